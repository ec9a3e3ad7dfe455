"""Data sets of labelled or tagged rows: where their splits are, and how a split that they lack is held out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from foreword.tasks.holdout import in_order
from foreword.tasks.rows import Unusable
from foreword.tasks.source import HubSource, Row, dataset_rows
from foreword.tasks.task import Labelled, SkippedRow, Split, Tagged, check_split, collect

__all__ = ["DatasetTask"]

_FRACTION, _MOST = 0.1, 500
_SEED = 0  # what is held out is part of the task, the same for every run


class DatasetTask(ABC):
    """A task whose rows are in the folder of `FOREWORD_DATA` or on the hub.

    `files` are the files in that folder, by split. The splits in `cut` have none: each is a tenth of the different
    texts of the training file, at most 500, and what is left is the training split. Who is held out depends on the
    text alone, so that it is the same from either source and in any order.
    """

    kind: str
    max_new_tokens = 8
    stop: tuple[str, ...] = ("\n",)

    def __init__(
        self,
        name: str,
        labels: tuple[str, ...],
        *,
        instruction: str,
        metrics: tuple[str, ...],
        files: Mapping[str, str],
        hub: HubSource | None,
        cut: tuple[str, ...] = (),
        without_file: str = "",
    ) -> None:
        self.name, self.labels, self.instruction, self.metrics = name, labels, instruction, metrics
        self._files, self._hub, self._held_out, self._without_file = files, hub, cut, without_file

    @abstractmethod
    def example(self, row: Row, name: str, number: int) -> Labelled | Tagged | None:
        """The example in a row; `Unusable` if it cannot be read, None if there is nothing to read."""

    @abstractmethod
    def key(self, example: Any) -> str:
        """The text of an example, by which it is held out."""

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        """The first `limit` examples of `train`, `dev` or `test`, and the rows that cannot be used."""
        check_split(name, limit)
        part = "train" if name in self._held_out else name
        whole = part != "train" or not self._held_out
        rows, source = dataset_rows(self.name, part, self._hub, file=self._files.get(part), action=self._without_file)
        examples: list[Any]
        examples, skipped = collect(self._examples(rows, name), limit if whole else None, strict, source)
        if whole:
            return Split(name, examples, skipped, source=source)
        sides = self._sides(examples)
        used = [example for example in examples if sides.get(self.key(example), "train") == name][:limit]
        held_out = " and ".join(self._held_out)
        source += f" (without rows held out for {held_out})" if name == "train" else f" (rows held out for {name})"
        return Split(name, used, skipped if name == "train" else [], source=source)

    def _sides(self, examples: Iterable[Any]) -> dict[str, str]:
        """The split of every text that is held out."""
        order = in_order(map(self.key, examples), _SEED)
        count = min(max(1, round(_FRACTION * len(order))), _MOST)
        return {
            key: name for place, name in enumerate(self._held_out) for key in order[place * count : (place + 1) * count]
        }

    def _examples(self, rows: Iterable[Row], split: str) -> Iterator[Any]:
        for number, row in enumerate(rows, start=1):
            try:
                example = self.example(row, f"{self.name}-{split}-{number}", number)
                if example is not None:
                    yield example
            except Unusable as reason:
                yield SkippedRow(number, str(reason))
