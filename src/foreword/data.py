"""From examples to batches of token ids: what is too long is left out, what is alike in length goes together.

Which rows make which batch depends on the seed, the epoch and the lengths alone, so a run can be taken up
again at any batch. No model here, and no tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from foreword.errors import DataError
from foreword.tasks import SkippedRow, Split

if TYPE_CHECKING:
    from foreword.base import BaseModel

__all__ = [
    "Encoded", "Rows", "encode_split", "epoch_batches", "micro_batches", "ordered_batches", "tight_batches",
    "usable_rows", "why_unusable",
]  # fmt: skip

# Batches are sorted by length within windows of this many, and lengths are blurred by this share before, so
# that little is padded and yet no epoch has the same batches as another.
_WINDOW = 50
_BLUR = 0.2


class Encoded(NamedTuple):
    """One row as a model reads it: `tokens` long, or the reason why it cannot be used; `cut` if it was longer."""

    values: Any
    tokens: int
    reason: str = ""
    cut: bool = False


@dataclass(frozen=True)
class Rows:
    """The usable rows of a split as a model reads them, their tokens and examples, and the rows left out.

    `encoded` are pairs of (prompt ids, completion ids), or what the objective of the task makes of a row; `cut` says
    how many of them were too long and are read in part.
    """

    encoded: list[Any]
    lengths: list[int]
    examples: list[Any] = field(default_factory=list)
    skipped: list[SkippedRow] = field(default_factory=list)
    cut: int = 0

    def __len__(self) -> int:
        return len(self.encoded)


def encode_split(
    base: BaseModel,
    split: Split,
    *,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """Prompts and completions of a split as token ids; rows that are empty or too long are left out.

    `strict` raises `DataError` at the first row that is not usable; so does a split without any that is.
    """
    return usable_rows(split, _pairs(base, split), strict=strict, progress=progress)


def usable_rows(
    split: Split,
    encoded: Iterable[Encoded],
    *,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """The encoded examples of a split without those that have a reason not to be used; errors as `encode_split`."""
    rows = Rows([], [], [], list(split.skipped))
    cut = 0
    for number, (example, row) in enumerate(zip(split.examples, encoded, strict=True), start=1):
        if not row.reason:
            rows.encoded.append(row.values)
            rows.lengths.append(row.tokens)
            rows.examples.append(example)
            cut += row.cut
        elif strict:
            raise DataError(f"row {example.row} of {split.source or split.name}: {row.reason}")
        else:
            rows.skipped.append(SkippedRow(example.row, row.reason))
        if progress is not None:
            progress(number, len(split.examples))
    if not rows.encoded:
        why = f" (row {rows.skipped[0].row}: {rows.skipped[0].reason})" if rows.skipped else ""
        raise DataError(
            f"no usable row in {split.source or split.name}, {len(rows.skipped)} skipped{why}",
            "at least one",
            "check the columns and the lengths",
        )
    return replace(rows, cut=cut)


def _pairs(base: BaseModel, split: Split) -> Iterator[Encoded]:
    joint = base.family.kind == "decoder"
    for example in split.examples:
        prompt, completion = base.encode(example.prompt, example.completion)
        reason = why_unusable(len(prompt), len(completion), base.max_tokens, joint)
        yield Encoded((prompt, completion), len(prompt) + len(completion), reason)


def why_unusable(prompt: int, completion: int, limit: int | None, joint: bool) -> str:
    """Why a row of so many tokens cannot be used; empty if it can.

    >>> why_unusable(60, 5, 64, joint=True)
    '65 tokens are longer than the model allows (64)'
    """
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


def tight_batches(lengths: Sequence[int], overhead: int, most_tokens: int = 0, most_rows: int = 0) -> list[list[int]]:
    """All rows once, sorted by length, the longest first, cut so that the padded tokens of all passes are fewest.

    A pass itself counts as `overhead` tokens. None has more rows or, but for a single row, more padded tokens than
    `most_rows` and `most_tokens` (0: no limit).

    >>> tight_batches([9, 3, 10, 3, 3], overhead=4), tight_batches([9, 3, 10, 3, 3], overhead=100)
    ([[2, 0], [1, 3, 4]], [[2, 0, 1, 3, 4]])
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    cost, start = [0] + [0] * len(order), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        least = max(0, end - most_rows) if most_rows else 0
        tried = [
            (cost[first] + overhead + padded, first)
            for first in range(least, end)
            for padded in ((end - first) * lengths[order[first]],)
            if not most_tokens or padded <= most_tokens or first == end - 1
        ]
        cost[end], start[end] = min(tried)
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[start[end] : end])
        end = start[end]
    return batches[::-1]


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
