"""Task `files`: a user's own rows from JSON lines, CSV, TSV or parquet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from foreword.errors import ConfigError, DataError
from foreword.tasks.source import Row
from foreword.tasks.tables import check_file, table_columns, table_rows
from foreword.tasks.task import Example, SkippedRow, Split, check_split, collect
from foreword.tasks.template import Template

__all__ = ["FileTask"]


@dataclass(kw_only=True)
class FileTask:
    """Examples from one file per split.

    Prompt and completion are each one column (`prompt` and `completion` unless named) or a template of columns.
    White space around a completion is dropped; the end of a prompt becomes one line end. `references` names a column
    of texts or lists of texts, or several columns of texts; dev and test are scored against them, and the first stands
    in for a missing completion column. Without a dev file, `dev_fraction` of the prompts in `train`, chosen by
    `seed`, are the dev split: rows with the same prompt stay together, and the rest is the train split.

    >>> FileTask(prompt_column="question", template="Question: {question}")
    Traceback (most recent call last):
    foreword.errors.ConfigError: both a prompt column and a template; expected one of them; leave one out
    """

    train: str | PathLike[str] | None = None
    dev: str | PathLike[str] | None = None
    test: str | PathLike[str] | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    template: str | None = None
    completion_template: str | None = None
    references: str | Sequence[str] | None = None
    dev_fraction: float = 0.1
    seed: int = 0
    name: str = "files"
    instruction: str = "Read the text that is given and write the answer that belongs to it."
    metrics: tuple[str, ...] = ("bleu", "chrf++")
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._prompt = _template("prompt", self.prompt_column, self.template)
        self._completion = _template("completion", self.completion_column, self.completion_template)
        if not 0 <= self.dev_fraction < 1:
            raise ConfigError(f"dev_fraction {self.dev_fraction}", "at least 0 and below 1", "correct it")
        if self.references is not None and not self.references:
            raise ConfigError("references without a column", "a column", "name one or leave references out")
        self.metrics, self.stop = tuple(self.metrics), tuple(self.stop)
        given = {"train": self.train, "dev": self.dev, "test": self.test}
        self._files = {split: Path(path) for split, path in given.items() if path is not None}
        if not self._files:
            raise ConfigError("no file", "a train, dev or test file", "name one")
        # now, and not after hours of training, when the test split is read
        for split, path in self._files.items():
            check_file(path)
            self._check_columns(split, path)

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
        prompts = sorted({example.prompt for example in examples}, key=lambda prompt: _order(self.seed, prompt))
        held_out = set(prompts[: max(1, round(self.dev_fraction * len(prompts)))])
        file = self._files["train"].name
        if len(prompts) < 2:
            raise DataError(
                f"{file} has one prompt only", "two or more, to keep some for dev", "name a dev file or dev_fraction 0"
            )
        used = [example for example in examples if (example.prompt in held_out) == (name == "dev")][:limit]
        source = f"{file} ({'' if name == 'dev' else 'without '}{self.dev_fraction:g} for dev, seed {self.seed})"
        return Split(name, used, skipped if name == "train" else [], source=source)

    def _read(self, split: str, role: str, limit: int | None, strict: bool) -> tuple[list[Example], list[SkippedRow]]:
        path = self._files[split]
        seen: dict[str, None] = {}
        examples, skipped = collect(self._examples(path, split, role, seen), limit, strict, path.name)
        if not examples:
            if seen:  # a column that no row has is a mistake in its name
                _require(self._needed(split), list(seen), path.name)
            if not skipped:
                raise DataError(f"{path.name} holds no rows", "at least one row", "fill it or name another file")
            first = skipped[0]
            raise DataError(
                f"{path.name} has no row that can be used ({len(skipped)} skipped; row {first.row}: {first.reason})",
                "at least one",
                "correct the rows, or name other columns",
            )
        return examples, skipped

    def _examples(self, path: Path, split: str, role: str, seen: dict[str, None]) -> Iterator[Example | SkippedRow]:
        for record in table_rows(path, self._columns(split)):
            if isinstance(record, SkippedRow):
                yield record
                continue
            number, row = record
            seen.update(dict.fromkeys(row))
            try:
                prompt, completion, references = self._texts(row, split)
            except _Unusable as reason:
                yield SkippedRow(number, str(reason))
            else:
                yield Example(f"{self.name}-{role}-{number}", prompt, completion, references, number)

    def _texts(self, row: Row, split: str) -> tuple[str, str, tuple[str, ...]]:
        prompt = self._prompt.render({column: _text(row, column) for column in self._prompt.columns})
        references = self._references(row) if self._scored(split) else ()
        if references and not any(column in row for column in self._completion.columns):
            completion = references[0]
        else:
            completion = self._completion.render({column: _text(row, column) for column in self._completion.columns})
        completion = completion.strip()
        return prompt.rstrip() + "\n", completion, references or (completion,)

    def _references(self, row: Row) -> tuple[str, ...]:
        columns = [self.references] if isinstance(self.references, str) else list(self.references or ())
        texts: list[str] = []
        for column in columns:
            value = row.get(column)
            if isinstance(value, list):
                texts += [
                    _check_text(item, f"an item of column {column!r}") for item in value if item not in (None, "")
                ]
            elif column not in row:
                raise _Unusable(_missing(column, row))
            elif value not in (None, ""):
                texts.append(_text(row, column))
        if not texts:
            raise _Unusable("no references in " + " and ".join(f"column {column!r}" for column in columns))
        return tuple(text.strip() for text in texts)

    def _scored(self, split: str) -> bool:
        """Whether the references of this file are read; training has no use for them."""
        return self.references is not None and split != "train"

    def _needed(self, split: str) -> list[str]:
        """The columns that a file must have."""
        if not self._scored(split):
            return [*self._prompt.columns, *self._completion.columns]
        references = [self.references] if isinstance(self.references, str) else list(self.references or ())
        return [*self._prompt.columns, *references]

    def _columns(self, split: str) -> list[str]:
        """The columns that are read where a file has them."""
        return list(dict.fromkeys([*self._needed(split), *self._completion.columns]))

    def _check_columns(self, split: str, path: Path) -> None:
        columns = table_columns(path)
        if columns is not None:
            _require(self._needed(split), columns, path.name)


class _Unusable(Exception):
    """Why a row cannot be used."""


def _template(what: str, column: str | None, template: str | None) -> Template:
    if column is not None and template is not None:
        raise ConfigError(f"both a {what} column and a template", "one of them", "leave one out")
    return Template.parse(template) if template is not None else Template.of_column(column or what)


def _require(needed: Sequence[str], columns: Sequence[str], file: str) -> None:
    for column in needed:
        if column not in columns:
            raise DataError(
                f"no column {column!r} in {file}", "one of its columns: " + ", ".join(columns), "name one of them"
            )


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise _Unusable(_missing(column, row))
    return _check_text(row[column], f"column {column!r}")


def _check_text(value: Any, what: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _Unusable(f"{what} is empty")
    if not isinstance(value, str):
        raise _Unusable(f"{what} is {_KINDS.get(type(value), type(value).__name__)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Unusable(f"{what} holds half a character (a lone surrogate)") from None
    return value


_KINDS: dict[type, str] = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}


def _missing(column: str, row: Row) -> str:
    return f"no column {column!r} (columns here: {', '.join(map(str, row)) or 'none'})"


def _order(seed: int, prompt: str) -> bytes:
    """A place in an order that depends on nothing but the seed and the prompt."""
    return hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
