"""Whether a model can be served: packed passes have to give what ordinary ones give, or it is refused."""

from __future__ import annotations

import torch

from foreword.base import BaseModel
from foreword.engine.attention import Piece, Ragged
from foreword.engine.cache import SlotCache
from foreword.engine.packed import packed_logits
from foreword.errors import UnsupportedModel
from foreword.frozen import frozen_training
from foreword.prefix import Sites, SiteTensors

__all__ = ["check_model"]

_TEXTS = ((5, 3, 11, 7, 2, 13, 4), (9, 6, 8))
# Relative to the largest logit; what two orders of the same sums differ by.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}


@torch.no_grad()
def check_model(base: BaseModel) -> None:
    """Raise `UnsupportedModel` unless two packed texts, one behind a prefix, give the logits that each gives alone."""
    if base.family.kind != "decoder":
        raise UnsupportedModel(f"{base.name!r} is an {base.family.kind}", "a decoder", "serve a decoder")
    config = base.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {each.get("rope_type") for each in rope.values() if isinstance(each, dict)}
    if kinds & {"dynamic", "longrope"}:
        raise UnsupportedModel(
            f"{base.name!r} turns its positions by the length of the longest text in the batch",
            "positions that depend on their own text alone", "serve another base model",
        )  # fmt: skip
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        raise UnsupportedModel(f"{base.name!r} has layers of {', '.join(sorted(odd))}", "full or sliding attention")
    try:
        with frozen_training(base.model):  # as it will run
            worst = _difference(base)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UnsupportedModel(
            f"{base.name!r} cannot read packed texts ({type(error).__name__}: {str(error).splitlines()[0][:120]})",
            "a decoder with the attention interface of transformers", "serve another base model",
        ) from None  # fmt: skip
    if not worst <= _TOLERANCE.get(base.dtype, 1e-3):
        raise UnsupportedModel(
            f"packed texts change the logits of {base.name!r} by {worst:.1e} of the largest",
            f"at most {_TOLERANCE.get(base.dtype, 1e-3):.0e}", "serve another base model",
        )  # fmt: skip


def _difference(base: BaseModel) -> float:
    """The largest difference of packed logits to those of each text alone, relative to the largest logit."""
    sites: Sites = {}
    generator = torch.Generator().manual_seed(0)
    for site, shape in base.geometry.items():
        keys = torch.randn(shape.kv_heads, 2, shape.key_dim, generator=generator)
        values = torch.randn(shape.kv_heads, 2, shape.value_dim, generator=generator)
        sites[site] = SiteTensors(keys, values).map(lambda t: t.to(base.device, base.dtype))
    cache = SlotCache(base.geometry, 2, 16, base.dtype, base.device)
    cache.put(0, sites)
    cache.put(1, {})
    cache.reserve(16)
    first, second = _TEXTS
    # the first text but its last token in two pieces, the second beside the first of them; then the last tokens of both
    for start, stop, beside in ((0, 4, 2), (4, 6, 0)):
        call = Ragged(cache, 0, [Piece(0, stop - start), *([Piece(1, beside)] if beside else [])])
        ids = [*first[start:stop], *second[:beside]]
        wanted = [place == 0 for place in range(len(ids))]
        if len(packed_logits(base, call, ids, [*range(start, stop), *range(beside)], wanted)) != 1:
            raise ValueError("its head does not say which tokens it reads")
        _check_windows(base, call)
        cache.texts[0], cache.texts[1] = stop, 2
    found = packed_logits(base, Ragged(cache, 2), [first[6], second[2]], [6, 2], [True, True]).float()
    alone = []
    for text, read in ((first, sites), (second, {})):
        with base.attachment.bound(read):
            logits = base.model(torch.tensor([text], device=base.device), use_cache=False)["logits"]
        alone.append(logits[0, -1].float())
    expected = torch.stack(alone)
    return float((found - expected).abs().max() / expected.abs().max())


def _check_windows(base: BaseModel, call: Ragged) -> None:
    """Every layer with a window has to say how wide it is, for short texts do not show it."""
    types = getattr(base.model.config.get_text_config(), "layer_types", None) or []
    for site, window in call.windows.items():
        if site.layer < len(types) and types[site.layer] == "sliding_attention" and window is None:
            raise UnsupportedModel(f"layer {site.layer} of {base.name!r} hides its window", "a window that is told")
