"""Lines 1 to 3, 5, 9 and 10 of the contract: what a forward pass reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foreword.conform.subject import Checks, Inputs, NotApplicable, Subject, rows
from foreword.families import position_limit
from foreword.prefix import Site, Sites, SiteTensors

__all__ = ["empty_prefix", "full_context", "mixed_batch", "padding_and_packing", "sliding_window", "text_as_prefix"]


def empty_prefix(subject: Subject, checks: Checks) -> None:
    """Line 1: attached without a prefix, or with an empty one, the model is the untouched one, bit for bit."""
    inputs = subject.inputs()
    with subject.attachment.suspended():
        want = subject.logits(inputs)
    checks.equal("attached", subject.logits(inputs), want, exact=True)
    checks.equal("length 0", subject.with_sites(subject.sites(0), inputs), want, exact=True)
    none = torch.zeros(len(want), dtype=torch.long, device=want.device)
    checks.equal("prefix_ids 0", subject.logits(inputs, prefix_ids=none), want, exact=True)
    with subject.resident([subject.sites(0)] * len(want)) as ids:
        checks.equal("length 0 from the bank", subject.logits(inputs, prefix_ids=ids), want, exact=True)


def text_as_prefix(subject: Subject, checks: Checks) -> None:
    """Line 2: the keys and values of a text X as the prefix, then Y, equals X and Y read in one pass."""
    if getattr(subject.config, "conv_kernel_size", 0):
        raise NotApplicable("a convolution reads the tokens beside each one, and slots are no tokens")
    total = min(subject.window or 16, 16)
    cut = total // 2
    inputs = subject.inputs(2, total, total)
    with contextlib.ExitStack() as stack:
        if subject.family.positions == "relative":
            stack.enter_context(_without_relative_positions(subject.model))
            checks.note("relative position scores are switched off for this line: a slot has no position")
        with subject.attachment.recording() as recorded, subject.captured() as entered:
            output = subject.output(inputs, output_hidden_states=True)
        want = _read(subject, output)
        lengths = {name: tensors[0].shape[1] for name, tensors in entered.items()}
        keep = {name: _keep(subject, name, length, cut) for name, length in lengths.items()}
        sites = _cut_sites(recorded, keep, lengths)
        hidden = {name: tensors[0][:, keep[name]] for name, tensors in entered.items()}
        more: dict[str, Any] = {"output_hidden_states": True}
        if subject.family.positions == "rotary":
            more["position_ids"] = keep[subject.stacks[0]][None].expand(2, -1)
        got = []
        for row in range(2):
            stack_row = {name: value[row : row + 1] for name, value in hidden.items()}
            more_row = {name: v[row : row + 1] if isinstance(v, Tensor) else v for name, v in more.items()}
            of_row = {site: SiteTensors(keys[row], values[row]) for site, (keys, values) in sites.items()}
            of_row = subject.open(of_row)
            with subject.attachment.bound(of_row), subject.replaced(stack_row):
                got.append(_read(subject, subject.output(rows(_cut_inputs(inputs, keep), row), **more_row)))
    checks.equal("X as prefix, then Y", torch.cat(got), want[:, keep[subject.stacks[-1]]])


def _read(subject: Subject, output: Any) -> Tensor:
    """Something with one entry per token: logits of what writes text, else the last hidden states."""
    hidden: Tensor = output["logits"] if subject.kind != "encoder" else output["hidden_states"][-1]
    return hidden


def _keep(subject: Subject, stack: str, length: int, cut: int) -> Tensor:
    """The places of Y: all after X in a causal stack; in an encoder X lies behind the first token (CLS)."""
    places = torch.arange(length, device=subject.model.device)
    cut = min(cut, length // 2)
    return places[cut:] if stack == "decoder" else torch.cat([places[:1], places[1 + cut :]])


def _cut_sites(
    recorded: dict[Site, tuple[Tensor, Tensor]], keep: dict[str, Tensor], lengths: dict[str, int]
) -> dict[Site, tuple[Tensor, Tensor]]:
    """The keys and values of X, `[batch, kv_heads, prefix, dim]`; cross attention reads the encoder's places."""
    cut = {}
    for site, (keys, values) in recorded.items():
        stack = "encoder" if site.stack == "cross" else site.stack
        left = torch.ones(lengths[stack], dtype=torch.bool, device=keys.device)
        left[keep[stack]] = False
        cut[site] = (keys[:, :, left], values[:, :, left])
    return cut


def _cut_inputs(inputs: Inputs, keep: dict[str, Tensor]) -> Inputs:
    cut = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        if name in inputs:
            cut[name] = inputs[name][:, keep.get("encoder", keep.get("decoder"))]
    if "decoder_input_ids" in inputs:
        cut["decoder_input_ids"] = inputs["decoder_input_ids"][:, keep["decoder"]]
    return cut


@contextlib.contextmanager
def _without_relative_positions(model: nn.Module) -> Iterator[None]:
    """Inside, scores do not depend on the distance of tokens."""
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith("relative_attention_bias"):
                handle = module.register_forward_hook(lambda *call: torch.zeros_like(call[2]))
                stack.callback(handle.remove)
            elif hasattr(module, "disentangled_attention_bias"):
                module.__dict__["disentangled_attention_bias"] = lambda *_: 0
                stack.callback(module.__dict__.pop, "disentangled_attention_bias")
        yield


def padding_and_packing(subject: Subject, checks: Checks) -> None:
    """Line 3: padding on either side, and packing several texts into one row, changes nothing."""
    if not subject.reads_text:
        raise NotApplicable("it reads no tokens: nothing is padded or packed")
    inputs, sites = subject.inputs(), subject.sites(4, ragged=True)
    with subject.captured() as entered:
        want = subject.with_sites(sites, inputs)
    for side, (left, right) in {"left": (3, 0), "right": (0, 3)}.items():
        padded, hidden = _padded(subject, inputs, {k: v[0] for k, v in entered.items()}, left, right)
        more: dict[str, Any] = {}
        if subject.family.positions == "rotary":
            more["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
        if side == "left" and subject.kind == "encoder" and want.dim() == 2:
            checks.note("left padding of a head that reads the first place is not defined")
            continue
        with subject.replaced(hidden):
            got = subject.with_sites(sites, padded, **more)
        if want.dim() == 3:
            places = slice(left, got.shape[1] - right) if subject.kind != "encoder-decoder" else slice(None)
            got = got[:, places]
        checks.equal(f"padded {side}", got, want)
    _packing(subject, checks)


def _padded(
    subject: Subject, inputs: Inputs, entered: dict[str, Tensor], left: int, right: int
) -> tuple[Inputs, dict[str, Tensor]]:
    """Padded ids and mask, and what enters the first layer: the text's embeddings where the text now is.

    Positions are so the text's own also in models whose positions count from the row's first place.
    """
    pad = nn.functional.pad
    filler = subject.config.pad_token_id or 0
    padded = {**inputs, "input_ids": pad(inputs["input_ids"], (left, right), value=filler)}
    padded["attention_mask"] = pad(inputs["attention_mask"], (left, right))
    stack = subject.stacks[0]
    if subject.family.positions == "rotary":
        return padded, {}
    return padded, {stack: pad(entered[stack], (0, 0, left, right))}


def _packing(subject: Subject, checks: Checks) -> None:
    """Two texts in one row, each with a prefix of its own, against each alone."""
    if subject.kind != "decoder" or "position_ids" not in subject.signature:
        checks.note("no packing: only decoders that take position_ids pack")
        return
    if subject.gates.kind == "apt" and subject.gates.pooling == "prompt":
        checks.note("no packing: gates that read the prompt want a row for each text")
        return
    size = subject.tokens
    texts = [subject.inputs(1, size), subject.inputs(1, size - 1)]
    packed = {
        "input_ids": torch.cat([text["input_ids"] for text in texts], 1),
        "position_ids": torch.cat([torch.arange(size), torch.arange(size - 1)])[None].to(subject.model.device),
    }
    with subject.attachment.suspended():
        plain = torch.cat([subject.logits(text) for text in texts], 1)
        trial = Checks(checks.tolerance)
        trial.equal("", subject.logits(packed), plain)
    if trial.failed:
        checks.note("no packing: the model itself does not keep packed texts apart")
        return
    owners = [subject.sites(3), subject.sites(5, ragged=True)]
    want = torch.cat([subject.with_sites(*pair) for pair in zip(owners, texts, strict=True)], 1)
    with subject.resident(owners) as ids:
        got = subject.logits(packed, prefix_ids=ids.repeat_interleave(torch.tensor([size, size - 1]))[None])
    checks.equal("packed", got, want)
    shared = subject.with_sites(owners[0], packed)
    want = torch.cat([subject.with_sites(owners[0], text) for text in texts], 1)
    checks.equal("packed, one prefix for all", shared, want)


def mixed_batch(subject: Subject, checks: Checks) -> None:
    """Line 5: rows of one batch with prefixes of different length, with gates or not, equal each alone."""
    owners: list[Sites | None] = [subject.sites(3), None, subject.sites(5, ragged=True), subject.sites(1, gated=False)]
    inputs = subject.inputs(len(owners))
    lengths = [subject.tokens] * len(owners)
    if subject.reads_text:
        lengths = [subject.tokens - row % 2 for row in range(len(owners))]
        mask = torch.arange(subject.tokens)[None] < torch.tensor(lengths)[:, None]
        inputs["attention_mask"] = mask.long().to(subject.model.device)
    with subject.resident(owners) as ids:
        got = subject.logits(inputs, prefix_ids=ids)
        again = subject.logits({k: v.flip(0) for k, v in inputs.items()}, prefix_ids=ids.flip(0)).flip(0)
    scale = float(got.abs().max())
    for row, sites in enumerate(owners):
        alone = rows(inputs, row)
        for name in ("input_ids", "attention_mask"):
            if name in alone:
                alone[name] = alone[name][:, : lengths[row]]
        want = subject.with_sites(sites or {}, alone)
        seen = slice(None) if got.dim() == 2 or subject.kind == "encoder-decoder" else slice(want.shape[1])
        checks.equal(f"row {row}", got[row : row + 1, seen], want, scale=scale)
        checks.equal(f"row {row}, other order", again[row : row + 1, seen], want, scale=scale)


def sliding_window(subject: Subject, checks: Checks) -> None:
    """Line 9: past the window the text sees the whole prefix and of the text only the window."""
    if subject.window is None:
        raise NotApplicable("it has no sliding-window layers")
    with _window_of(subject.config, 4):
        window, cut, total = 4, 3, 15
        inputs = subject.inputs(1, total)
        places = torch.arange(total)
        distance = places[:, None] - places[None, :]
        causal = subject.kind == "decoder"
        full = distance >= 0 if causal else torch.ones(total, total, dtype=torch.bool)
        near = full & (distance.abs() < (subject.window or window)) | (full & (places < cut)[None, :])
        hidden = torch.finfo(subject.model.dtype).min
        masks = {
            name: subject.random(1, 1, total, total).zero_().masked_fill_(~seen.to(subject.model.device), hidden)
            for name, seen in (("full_attention", full), ("sliding_attention", near))
        }
        layers = getattr(subject.config, "layer_types", None)
        joint = {**inputs, "attention_mask": masks if layers and len(set(layers)) > 1 else masks["sliding_attention"]}
        with subject.attachment.recording() as recorded:
            want = _read(subject, subject.output(joint, output_hidden_states=True))[:, cut:]
        sites = {site: SiteTensors(keys[0][:, :cut], values[0][:, :cut]) for site, (keys, values) in recorded.items()}
        sites = subject.open(sites)
        text = {name: value[:, cut:] for name, value in inputs.items()}
        positions = torch.arange(cut, total, device=subject.model.device)[None]
        with subject.attachment.bound(sites):
            got = _read(subject, subject.output(text, position_ids=positions, output_hidden_states=True))
    checks.equal("text longer than the window", got, want)


@contextlib.contextmanager
def _window_of(config: Any, size: int) -> Iterator[None]:
    """Inside, the model's masks have a small window, so that short texts go past it."""
    name = "local_attention" if getattr(config, "local_attention", None) else "sliding_window"
    before = getattr(config, name)
    setattr(config, name, size)
    try:
        yield
    finally:
        setattr(config, name, before)


def full_context(subject: Subject, checks: Checks) -> None:
    """Line 10: as many tokens as without a prefix, and they enter the first layer as they do without one."""
    inputs: dict[str, Any]
    if subject.family.positions == "relative":
        raise NotApplicable("its positions are relative and have no limit")
    limit = position_limit(subject.config)
    if subject.reads_text or subject.kind == "encoder-decoder":
        if limit is None:
            raise NotApplicable("its configuration names no limit")
        tokens = limit if limit <= 2048 else 64
        inputs = dict(subject.inputs(1, tokens, tokens))
        if tokens < limit:
            inputs["position_ids"] = torch.arange(limit - tokens, limit, device=subject.model.device)[None]
            checks.note(f"the last {tokens} of {limit} positions")
        else:
            checks.note(f"{limit} tokens")
    else:
        inputs = dict(subject.inputs(1))
    sites = subject.sites(5)
    with subject.captured() as plain:
        want = subject.logits(inputs)
    with subject.captured() as prefixed:
        got = subject.with_sites(sites, inputs)
    checks.true("a logit for every token", got.shape == want.shape and bool(got.isfinite().all()))
    checks.true("the prefix is read", checks.differs(got, want))
    for stack, tensors in plain.items():
        checks.true(f"{stack}: as many inputs", len(tensors) == len(prefixed[stack]))
        if stack == "encoder" or "encoder" not in plain:
            for before, after in zip(tensors, prefixed[stack], strict=True):
                checks.equal(f"what enters the {stack}", after, before, exact=True)
        else:  # the decoder is also given what the encoder made of its prefix
            checks.equal(f"what enters the {stack}", prefixed[stack][0], tensors[0], exact=True)
