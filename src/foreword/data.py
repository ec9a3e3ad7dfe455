"""From examples to batches of token ids: what is too long is left out, what is alike in length goes together.

Which rows make which batch depends on the seed, the epoch and the lengths alone, so a run can be taken up
again at any batch. No model here, and no tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from foreword.errors import DataError
from foreword.tasks import SkippedRow, Split

if TYPE_CHECKING:
    from foreword.base import BaseModel

__all__ = ["Rows", "encode_split", "epoch_batches", "micro_batches", "ordered_batches"]

Encoded = tuple[list[int], list[int]]

# Batches are sorted by length within windows of this many, and lengths are blurred by this share before, so
# that little is padded and yet no epoch has the same batches as another.
_WINDOW = 50
_BLUR = 0.2


@dataclass(frozen=True)
class Rows:
    """A split as (prompt ids, completion ids), with the rows that could not be used."""

    encoded: list[Encoded]
    skipped: list[SkippedRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt and completion together, row by row."""
        return [len(prompt) + len(completion) for prompt, completion in self.encoded]


def encode_split(
    base: BaseModel,
    split: Split,
    *,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """Token ids of a split's usable rows; `strict` raises `DataError` at the first that is not usable.

    A row is left out if its prompt or completion is empty or it is longer than the model allows. `DataError`
    if none is left.
    """
    encoded: list[Encoded] = []
    skipped = list(split.skipped)
    for number, example in enumerate(split.examples, start=1):
        prompt, completion = base.encode(example.prompt, example.completion)
        reason = _unusable(len(prompt), len(completion), base.max_tokens, base.family.kind == "decoder")
        if not reason:
            encoded.append((prompt, completion))
        elif strict:
            raise DataError(f"row {example.row} of {split.source or split.name}: {reason}")
        else:
            skipped.append(SkippedRow(example.row, reason))
        if progress is not None:
            progress(number, len(split.examples))
    if not encoded:
        why = f" (row {skipped[0].row}: {skipped[0].reason})" if skipped else ""
        raise DataError(
            f"no usable row in {split.source or split.name}, {len(skipped)} skipped{why}",
            "at least one",
            "check the columns and the lengths",
        )
    return Rows(encoded, skipped)


def _unusable(prompt: int, completion: int, limit: int | None, joint: bool) -> str:
    """Why a row of so many tokens cannot be used; empty if it can."""
    if not prompt or not completion:
        return f"{'completion' if prompt else 'prompt'} has no tokens"
    longest = prompt + completion if joint else max(prompt, completion)
    if limit is not None and longest > limit:
        return f"{longest} tokens are longer than the model allows ({limit})"
    return ""


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, as row numbers: every row once, all batches full but one.

    >>> batches = epoch_batches([5, 90, 7, 80], 2, seed=0, epoch=0)
    >>> sorted(sorted(batch) for batch in batches)
    [[0, 2], [1, 3]]
    """
    generator = random.Random(f"foreword {seed} {epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    blurred = [length * generator.uniform(1 - _BLUR, 1 + _BLUR) for length in lengths]
    batches: list[list[int]] = []
    for start in range(0, len(order), _WINDOW * batch_size):
        window = sorted(order[start : start + _WINDOW * batch_size], key=lambda row: blurred[row])
        batches += _cut(window, batch_size)
    generator.shuffle(batches)
    return batches


def ordered_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All rows once, sorted by length, the longest first: for measurements, where order does not matter."""
    return _cut(sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)), batch_size)


def micro_batches(batch: Sequence[int], size: int, process: int = 0, processes: int = 1) -> list[list[int]]:
    """This process's part of a batch, cut into passes of at most `size` rows (0: one pass).

    Every process gets equally many passes, so that sharded models stay in step; a pass may be empty.

    >>> micro_batches([4, 5, 6], 1, process=0, processes=2), micro_batches([4, 5, 6], 1, process=1, processes=2)
    ([[4], [6]], [[5], []])
    """
    own = list(batch[process::processes])
    largest = -(-len(batch) // processes)
    size = size or max(largest, 1)
    return [own[start : start + size] for start in range(0, largest, size)]


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
