"""Task `labelled`: a user's own labelled texts, or pairs of texts, from JSON lines, CSV, TSV or parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike

from foreword.errors import ConfigError, DataError
from foreword.tasks.classification import check_label
from foreword.tasks.own import OwnFiles, Rows
from foreword.tasks.rows import Unusable, require, row_label, row_text
from foreword.tasks.source import Row
from foreword.tasks.tables import table_rows
from foreword.tasks.task import Labelled, SkippedRow
from foreword.tasks.template import Template

__all__ = ["LabelledFiles"]


@dataclass(kw_only=True)
class LabelledFiles(OwnFiles):
    """Labelled rows from one file per split.

    Text and label are each one column, and so is the second text of a pair. `labels` are those of the training file,
    sorted, unless they are given. `label_words` are the labels as a decoder writes them, in the order of the labels,
    and `template` builds what it reads out of columns. Without a dev file, `dev_fraction` of the texts in `train`,
    chosen by `seed`, are the dev split.

    >>> LabelledFiles(test="rows.csv", labels=["no", "yes"], label_words=["No"])
    Traceback (most recent call last):
    foreword.errors.ConfigError: 1 label words (No); expected one for each label (no, yes); name them in this order
    """

    train: str | PathLike[str] | None = None
    dev: str | PathLike[str] | None = None
    test: str | PathLike[str] | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    labels: tuple[str, ...] = ()
    label_words: tuple[str, ...] = ()
    template: str | None = None
    dev_fraction: float = 0.1
    seed: int = 0
    name: str = "labelled"
    instruction: str = "Read the text that is given and name the class that it belongs to."
    metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    max_new_tokens: int = 8
    stop: tuple[str, ...] = ("\n",)
    kind: str = field(default="classification", init=False)

    _unit = "text"
    _reader = "labelled"
    _row_options = ("text_column", "text_pair_column", "label_column", "label_words", "template")

    def __post_init__(self) -> None:
        self._texts = [self.text_column, *([self.text_pair_column] if self.text_pair_column is not None else [])]
        self._prompt = _prompt(self._texts, self.template)
        self.metrics, self.stop = tuple(self.metrics), tuple(self.stop)
        self.labels, self.label_words = tuple(self.labels), tuple(self.label_words)
        if self.labels:
            self._check_words()
        self._set_files(known=bool(self.labels), train=self.train, dev=self.dev, test=self.test)
        self._check_files()
        if not self.labels:
            self.labels = self._labels_of_train()
            self._check_words()

    def _rows(self, split: str) -> Rows:
        return table_rows(self._files[split], self._needed(split))

    def _example(self, row: Row, _split: str, name: str, number: int) -> Labelled:
        found = self.unlabelled(row, name, number)
        label = row_label(row, self.label_column)
        check_label(label, self.labels)
        return found._replace(label=label)

    def unlabelled(self, row: Row, name: str, number: int) -> Labelled:
        """What is read of a row whose label nobody knows; the first one stands in for it."""
        texts = tuple(row_text(row, column).strip() for column in self._texts)
        prompt = self._prompt.render({column: row_text(row, column) for column in self._prompt.columns})
        words = self.label_words or self.labels
        return Labelled(name, (texts,), self.labels[0], prompt.rstrip() + "\n", words, number)

    def _key(self, example: Labelled) -> str:
        return json.dumps(example.texts)

    def _needed(self, _split: str) -> Sequence[str]:
        return [*self.columns, *([] if self.label_column in self.columns else [self.label_column])]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, but for the label."""
        return tuple(dict.fromkeys([*self._texts, *self._prompt.columns]))

    def _labels_of_train(self) -> tuple[str, ...]:
        if "train" not in self._files:
            raise ConfigError("neither labels nor a train file", "one of them", "name the labels")
        found: set[str] = set()
        seen: dict[str, None] = {}
        for record in self._rows("train"):
            if not isinstance(record, SkippedRow):
                seen.update(dict.fromkeys(record[1]))
                try:
                    found.add(row_label(record[1], self.label_column))
                except Unusable:  # reported with the row when the split is read
                    continue
        file = self._files["train"].name
        if seen:
            require([self.label_column], list(seen), file)
        if len(found) < 2:
            labels = f"one label only ({next(iter(found))})" if found else "no labels"
            raise DataError(f"{file} has {labels} in column {self.label_column!r}", "two or more", "add rows or labels")
        numbers = all(label.removeprefix("-").isdecimal() for label in found)
        return tuple(sorted(found, key=int if numbers else None))

    def _check_words(self) -> None:
        for what, names in (("label", self.labels), ("label word", self.label_words)):
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ConfigError(f"{what} {repeated[0]!r} more than once", "different ones", "correct them")
        if self.label_words and len(self.label_words) != len(self.labels):
            raise ConfigError(
                f"{len(self.label_words)} label words ({', '.join(self.label_words)})",
                f"one for each label ({', '.join(self.labels)})",
                "name them in this order",
            )


def _prompt(columns: Sequence[str], template: str | None) -> Template:
    if template is not None:
        return Template.parse(template)
    return Template(("", *["\n"] * (len(columns) - 1), ""), tuple(columns))
