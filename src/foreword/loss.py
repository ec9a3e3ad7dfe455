"""The loss of a frozen model's completions, which knows its gradient already in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["completion_nats"]

# Rows of logits that are worked on at once: few enough for the cache, many enough for both of few cores.
_ROWS = 16


def completion_nats(logits: Tensor, targets: Tensor, parts: Sequence[int] | None = None) -> Tensor:
    """Negative log-likelihood in nats of `targets` `[tokens]` under `logits` `[tokens, vocab]`, summed; float32.

    With `parts`, which say how many tokens belong together, one sum for each, `[parts]`. Equal to
    `cross_entropy(logits.float(), targets, reduction="sum")`, but no float32 copy of half-precision logits is ever
    whole, and the backward is one multiplication. Every target counts; there is no ignored index.

    >>> completion_nats(torch.zeros(3, 8), torch.tensor([1, 2, 3])) / 3  # ln 8
    tensor(2.0794)
    >>> completion_nats(torch.zeros(3, 8), torch.tensor([1, 2, 3]), parts=[2, 1])
    tensor([4.1589, 2.0794])
    """
    nats: Tensor = _CompletionNats.apply(logits, targets)
    return nats.sum() if parts is None else torch.stack([part.sum() for part in nats.split(list(parts))])


class _CompletionNats(torch.autograd.Function):
    """The nats of every target `[tokens]`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        precise = torch.promote_types(logits.dtype, torch.float32)
        nats = torch.empty(len(logits), dtype=precise, device=logits.device)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        rows = _ROWS if logits.device.type == "cpu" else max(len(logits), 1)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            index = targets[part, None]
            chances = torch.log_softmax(logits[part], dim=-1, dtype=precise)
            nats[part] = -chances.gather(1, index)[:, 0]
            if grad is not None:
                chances.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=precise))
                grad[part] = chances
        if grad is not None:
            ctx.save_for_backward(grad)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * weight[:, None].to(grad.dtype), None
