"""The trained head that reads an encoder's output for a task of understanding: what it reads, drops and says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foreword.gates import masked_mean
from foreword.prefix import Head

__all__ = ["HeadModule", "kept_shares", "pooled"]


class HeadModule(nn.Module):
    """A linear head with parameters, in float32; see `foreword.prefix.Head` for its kinds.

    >>> head = HeadModule.new("classification", ("no", "yes"), "mean", hidden=8)
    >>> head(torch.zeros(3, 8)).shape, head.fold().labels
    (torch.Size([3, 2]), ('no', 'yes'))
    """

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.kind, self.labels, self.pooling = head.kind, head.labels, head.pooling
        self.weight = nn.Parameter(head.weight.detach().float().clone())
        self.bias = nn.Parameter(head.bias.detach().float().clone())

    @classmethod
    def new(cls, kind: str, labels: Sequence[str], pooling: str, hidden: int, seed: int = 0) -> HeadModule:
        """A head that knows nothing yet: small normal weights, as the models themselves begin with."""
        outputs = 1 if kind == "choice" else len(labels)
        weight = 0.02 * torch.randn(outputs, hidden, generator=torch.Generator().manual_seed(seed))
        return cls(Head(kind, tuple(labels), pooling, weight, torch.zeros(outputs)))

    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.linear(vectors.to(self.weight.dtype), self.weight, self.bias)

    def fold(self) -> Head:
        """The head that this module is now, on the CPU."""
        weight, bias = (tensor.detach().cpu().clone() for tensor in (self.weight, self.bias))
        return Head(self.kind, self.labels, self.pooling, weight, bias)


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector for each text `[batch, hidden]`, of hidden states `[batch, tokens, hidden]` padded on the right.

    >>> hidden, mask = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]])
    >>> pooled(hidden, mask, "cls").item(), pooled(hidden, mask, "mean").item()
    (1.0, 2.0)
    """
    if pooling == "cls":
        return hidden[:, 0]
    return masked_mean(hidden, mask)[:, 0]


def kept_shares(rows: Sequence[int], vectors: Sequence[int], hidden: int, dropout: float, seed: int) -> Tensor:
    """Dropout factors `[vectors of all rows, hidden]`: 0, or 1 / (1 - dropout).

    A row's factors depend on the seed and on its number alone, not on the rows beside it.

    >>> one, both = (kept_shares(rows, [1] * len(rows), 4, 0.5, seed=3) for rows in ([7], [2, 7]))
    >>> torch.equal(one[0], both[1])
    True
    """
    generator = torch.Generator()
    parts = []
    for row, count in zip(rows, vectors, strict=True):
        generator.manual_seed((seed * 1_000_003 + row) % 2**63)
        parts.append(torch.rand(count, hidden, generator=generator))
    return torch.cat(parts).ge_(dropout).div_(1 - dropout)
