"""Task `conll`: a user's own tagged sentences, from CoNLL text, JSON lines or parquet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from os import PathLike
from pathlib import Path

from foreword.errors import ConfigError, DataError
from foreword.tasks.bio import bio_labels, check_tags, entity_types, to_bio
from foreword.tasks.own import OwnFiles, Rows
from foreword.tasks.rows import Unusable, row_list
from foreword.tasks.source import Row
from foreword.tasks.tables import check_exists, read_lines, table_rows
from foreword.tasks.task import SkippedRow, Tagged

__all__ = ["ConllFiles", "conll_rows"]

_TABLES = (".jsonl", ".ndjson", ".parquet")


@dataclass(kw_only=True)
class ConllFiles(OwnFiles):
    """Tagged sentences from one file per split.

    A file is CoNLL text (one word a line, its tag in the last column, a blank line after each sentence) or, by its
    extension, JSON lines or parquet with a list of words and a list of tags in each row. IOB1, BIOES and BILUO become
    BIO. `types` are the entity types of the training file, sorted, unless they are given. A sentence of CoNLL text is
    known by its first line. Without a dev file, `dev_fraction` of the sentences in `train`, chosen by `seed`, are dev.
    """

    train: str | PathLike[str] | None = None
    dev: str | PathLike[str] | None = None
    test: str | PathLike[str] | None = None
    words_column: str = "tokens"
    tags_column: str = "tags"
    types: tuple[str, ...] = ()
    dev_fraction: float = 0.1
    seed: int = 0
    name: str = "conll"
    instruction: str = "Find the names in the sentence."
    metrics: tuple[str, ...] = ("entity_f1",)
    max_new_tokens: int = 8
    stop: tuple[str, ...] = ("\n",)
    kind: str = field(default="tagging", init=False)
    labels: tuple[str, ...] = field(default=(), init=False)

    _unit = "sentence"
    _reader = "conll"
    _row_options = ("words_column", "tags_column")

    def __post_init__(self) -> None:
        self.metrics, self.stop, self.types = tuple(self.metrics), tuple(self.stop), tuple(self.types)
        self._set_files(known=bool(self.types), train=self.train, dev=self.dev, test=self.test)
        self._check_files()
        self.types = self.types or self._types_of_train()
        self.labels = bio_labels(self.types)

    def _check_file(self, split: str, path: Path) -> None:
        if path.suffix.lower() == ".csv":
            raise ConfigError(f"file {path}", "CoNLL text or one of " + ", ".join(_TABLES), "convert the file")
        if _is_table(path):
            super()._check_file(split, path)
        else:
            check_exists(path)

    def _rows(self, split: str) -> Rows:
        path, columns = self._files[split], (self.words_column, self.tags_column)
        return table_rows(path, columns) if _is_table(path) else conll_rows(path, *columns)

    def _example(self, row: Row, _split: str, name: str, number: int) -> Tagged:
        words, tags = row_list(row, self.words_column), row_list(row, self.tags_column)
        return Tagged(name, words, check_tags(words, tags, self.labels), number)

    def _key(self, example: Tagged) -> str:
        return "\n".join(example.words)

    def _needed(self, _split: str) -> Sequence[str]:
        return [self.words_column, self.tags_column]

    def _types_of_train(self) -> tuple[str, ...]:
        if "train" not in self._files:
            raise ConfigError("neither types nor a train file", "one of them", "name the entity types")
        found: set[str] = set()
        broken: list[SkippedRow] = []  # reported with the row when the split is read, or here if there is nothing else
        for record in self._rows("train"):
            try:
                if isinstance(record, SkippedRow):
                    broken.append(record)
                else:
                    found.update(entity_types(to_bio(row_list(record[1], self.tags_column))))
            except Unusable as reason:
                broken.append(SkippedRow(record[0], str(reason)))
        if not found:
            why = f" (row {broken[0].row}: {broken[0].reason})" if broken else ""
            file = self._files["train"].name
            raise DataError(
                f"{file} has no entity in it{why}", "tags such as B-PER", "correct the tags, or name the types"
            )
        return tuple(sorted(found))


def conll_rows(path: Path, words: str = "tokens", tags: str = "tags") -> Iterator[tuple[int, Row] | SkippedRow]:
    """The sentences of a CoNLL file, each with the number of its first line.

    Columns are parted by tabs, where a line has one, or by spaces: the first is the word and the last its tag. Lines
    of `-DOCSTART-` part documents. A sentence with a line of one column is skipped and named by that line.
    """
    sentence: list[list[str]] = []
    first, broken = 0, None
    for number, line in enumerate(chain(read_lines(path), [""]), start=1):
        line = line.strip(" \t\r\n")
        fields = [field.strip(" ") for field in re.split("\t" if "\t" in line else " +", line)]
        if fields[0] in ("", "-DOCSTART-"):
            if broken is not None:
                yield broken
            elif sentence:
                yield first, {words: [columns[0] for columns in sentence], tags: [columns[-1] for columns in sentence]}
            sentence, broken = [], None
            continue
        if len(fields) == 1 and broken is None:
            broken = SkippedRow(number, f"one column ({fields[0]!r}), not a word and its tag")
        first = first if sentence else number
        sentence.append(fields)


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in _TABLES
