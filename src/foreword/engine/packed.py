"""One forward pass over tokens of many sequences, packed into a single row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foreword.base import BaseModel
from foreword.engine.attention import Ragged

__all__ = ["packed_logits"]


def packed_logits(base: BaseModel, call: Ragged, ids: list[int], positions: list[int], wanted: list[bool]) -> Tensor:
    """Logits `[wanted, vocab]` of the tokens of one packed pass."""
    device = base.device
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.tensor([positions], device=device),
        # A mask of four dimensions is taken as it is; the call decides what is seen.
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=base.dtype, device=device),
    }
    with base.attachment.bound(call), base.logits_at(torch.tensor([wanted], device=device)):
        logits: Tensor = base.model(**inputs, use_cache=False)["logits"]
    return logits[0]
