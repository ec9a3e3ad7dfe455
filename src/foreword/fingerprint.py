"""The fingerprint that ties a prefix to the exact base model it was made for."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

__all__ = ["fingerprint"]

_CHUNK = 1 << 24


def fingerprint(model: nn.Module) -> str:
    """A sha256 over the names, shapes and bfloat16-rounded numbers of the weights that make keys and values.

    The backbone alone counts (a head may be exchanged), and rounding makes the float32 and bfloat16 forms of
    one model equal. Computed once per model object.

    >>> len(fingerprint(nn.Linear(2, 2)))
    64
    """
    known: str | None = model.__dict__.get("_foreword_fingerprint")
    if known is None:
        known = model.__dict__["_foreword_fingerprint"] = _hash(getattr(model, "base_model", model))
    return known


def _hash(backbone: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(backbone.named_parameters()):
        if name.startswith(("pooler.", "foreword_prefix.")):
            continue
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        flat = weight.detach().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            part = flat[start : start + _CHUNK].to("cpu", torch.bfloat16).contiguous()
            digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()
