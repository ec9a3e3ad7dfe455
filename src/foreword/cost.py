"""What reading a prefix costs: slots and multiply-adds for every token, and the time of a forward pass."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from foreword.base import BaseModel
from foreword.packaged import packaged_folder, packaged_models
from foreword.prefix import Prefix

__all__ = ["Cost", "Forward", "attention_costs", "forward_seconds", "query_heads"]


class Cost(NamedTuple):
    """What a prefix adds to the attention of every token of one kind: slots read and multiply-adds.

    `once` are multiply-adds that a text costs once, for gates that read it as a whole. Not `exact`: the model's query
    heads are not known, and its key/value heads were counted, of which there may be fewer.
    """

    token: str
    slots: int
    multiply_adds: int
    once: int
    exact: bool


class Forward(NamedTuple):
    """Seconds of a forward pass over a batch without and with the prefix (medians), and the median of their ratios."""

    batch: int
    tokens: int
    without_seconds: float
    with_seconds: float
    ratio: float
    device: str


def query_heads(base_name: str) -> int | None:
    """The attention heads of a base model that lies on this machine, as its configuration says; None if not known."""
    packaged = packaged_models().get(base_name)
    folder = Path(base_name) if packaged is None else packaged_folder(packaged)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    names = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
    found = [config[name] for name in names if name in config] if isinstance(config, dict) else []
    return found[0] if found and isinstance(found[0], int) else None


def attention_costs(prefix: Prefix, heads: int | None) -> list[Cost]:
    """What a prefix adds for each token, one entry for each kind of token that reads it.

    Every query head multiplies a slot's key and value once: heads · slots · (key_dim + value_dim) at each site. Gates
    of the text add hidden · slots, for every token or once for a text.
    """
    kinds: dict[str, list[int]] = {}
    exact = heads is not None
    for site, tensors in prefix.sites.items():
        token = "decoder" if site.stack == "cross" else site.stack
        found = kinds.setdefault(token, [0, 0, 0])
        kv_heads, key_dim, value_dim = tensors.shape
        found[0] += tensors.length
        found[1] += max(heads or 0, kv_heads) * tensors.length * (key_dim + value_dim)
        if tensors.gate is not None:
            found[1 if tensors.gate.pooling == "token" else 2] += tensors.gate.weight.numel()
    return [Cost(token, slots, adds, once, exact) for token, (slots, adds, once) in kinds.items()]


@torch.no_grad()
def forward_seconds(
    base: BaseModel, prefix: Prefix, *, batch: int = 8, tokens: int = 64, repeats: int = 15, seed: int = 0
) -> Forward:
    """Time forward passes over random tokens without and with the prefix, in turn, after two that warm up."""
    prefix.check_base(base.name, base.fingerprint, base.geometry, base.hidden_sizes)
    tokens = min(tokens, base.max_tokens or tokens)
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary // 2, vocabulary, (batch, tokens), generator=generator).to(base.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.family.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = ids
    if base.family.kind != "encoder":
        inputs["use_cache"] = False
    with base.rows(prefix, batch) as reading:
        found = [
            (_timed(base, inputs, torch.zeros_like(reading)), _timed(base, inputs, reading)) for _ in range(repeats + 2)
        ]
    without, with_ = zip(*found[2:], strict=True)
    ratio = statistics.median(b / a for a, b in zip(without, with_, strict=True))
    return Forward(batch, tokens, statistics.median(without), statistics.median(with_), ratio, str(base.device))


def _timed(base: BaseModel, inputs: dict[str, Any], reading: torch.Tensor) -> float:
    start = time.perf_counter()
    base.model(**inputs, prefix_ids=reading)
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
    return time.perf_counter() - start
