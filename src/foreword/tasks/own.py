"""A user's own files: one for each split, and a dev split held out of train where none is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from foreword.errors import ConfigError, DataError
from foreword.tasks.holdout import held_out
from foreword.tasks.rows import Unusable, require
from foreword.tasks.source import Row
from foreword.tasks.tables import check_file, table_columns
from foreword.tasks.task import AnyExample, SkippedRow, Split, check_split, collect

__all__ = ["OwnFiles", "Rows"]

Rows = Iterable[tuple[int, Row] | SkippedRow]


class OwnFiles(ABC):
    """What tasks on a user's own files share. Subclasses say what their rows are and what an example is made of."""

    name: str
    dev_fraction: float
    seed: int
    _unit = "prompt"  # what is not to be on both sides of train and dev
    _reader: str  # what this kind of files is called
    _row_options: tuple[str, ...]  # the options that say how a row is read

    @property
    def reading(self) -> dict[str, Any]:
        """How rows are read, as plain values, so that others can be read the same way: see `reading_of`."""
        values = {name: getattr(self, name) for name in self._row_options}
        options = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value not in (None, ())
        }
        return {"task": self._reader, "options": options}

    def _set_files(self, *, known: bool = False, **given: str | PathLike[str] | None) -> None:
        """Take the files; none is needed where the labels are `known`, to predict them of other rows."""
        if not 0 <= self.dev_fraction < 1:
            raise ConfigError(f"dev_fraction {self.dev_fraction}", "at least 0 and below 1", "correct it")
        self._files = {split: Path(path) for split, path in given.items() if path is not None}
        if not self._files and not known:
            raise ConfigError("no file", "a train, dev or test file", "name one")

    def _check_files(self) -> None:
        """Look at the files now, and not after hours of training, when the test split is read."""
        for split, path in self._files.items():
            self._check_file(split, path)

    def _check_file(self, split: str, path: Path) -> None:
        check_file(path)
        columns = table_columns(path)
        if columns is not None:
            require(self._needed(split), columns, path.name)

    @abstractmethod
    def _rows(self, split: str) -> Rows:
        """The rows of a split's file."""

    @abstractmethod
    def _example(self, row: Row, split: str, name: str, number: int) -> AnyExample:
        """The example in a row of a split's file; `Unusable` if there is none."""

    @abstractmethod
    def _key(self, example: Any) -> str:
        """What keeps an example on one side of train and dev."""

    @abstractmethod
    def _needed(self, split: str) -> Sequence[str]:
        """The columns that a file must have."""

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        """The first `limit` examples of `train`, `dev` or `test`, and the rows before them that cannot be used.

        `strict` raises `DataError` at the first such row; so does a file without any row that can be used.
        """
        check_split(name, limit)
        cut = self.dev_fraction > 0 and "dev" not in self._files and "train" in self._files
        if cut and name in ("train", "dev"):
            return self._cut(name, limit, strict)
        if name not in self._files:
            raise DataError(f"split {name!r} without a file", f"a file for {name}", "name one")
        examples, skipped = self._read(name, name, limit, strict)
        return Split(name, examples, skipped, source=self._files[name].name)

    def _cut(self, name: str, limit: int | None, strict: bool) -> Split:
        examples, skipped = self._read("train", name, None, strict)
        keys = {self._key(example) for example in examples}
        file = self._files["train"].name
        if len(keys) < 2:
            raise DataError(
                f"{file} has one {self._unit} only",
                "two or more, to keep some for dev",
                "name a dev file or dev_fraction 0",
            )
        dev = held_out(keys, self.dev_fraction, self.seed)
        used = [example for example in examples if (self._key(example) in dev) == (name == "dev")][:limit]
        source = f"{file} ({'' if name == 'dev' else 'without '}{self.dev_fraction:g} for dev, seed {self.seed})"
        return Split(name, used, skipped if name == "train" else [], source=source)

    def _read(self, split: str, role: str, limit: int | None, strict: bool) -> tuple[list[Any], list[SkippedRow]]:
        file = self._files[split].name
        seen: dict[str, None] = {}
        rows: Iterator[Any] = self._examples(split, role, seen)
        examples, skipped = collect(rows, limit, strict, file)
        if not examples:
            if seen:  # a column that no row has is a mistake in its name
                require(self._needed(split), list(seen), file)
            if not skipped:
                raise DataError(f"{file} holds no rows", "at least one row", "fill it or name another file")
            first = skipped[0]
            raise DataError(
                f"{file} has no row that can be used ({len(skipped)} skipped; row {first.row}: {first.reason})",
                "at least one",
                "correct the rows, or name other columns",
            )
        return examples, skipped

    def _examples(self, split: str, role: str, seen: dict[str, None]) -> Iterator[AnyExample | SkippedRow]:
        for record in self._rows(split):
            if isinstance(record, SkippedRow):
                yield record
                continue
            number, row = record
            seen.update(dict.fromkeys(row))
            try:
                yield self._example(row, split, f"{self.name}-{role}-{number}", number)
            except Unusable as reason:
                yield SkippedRow(number, str(reason))
