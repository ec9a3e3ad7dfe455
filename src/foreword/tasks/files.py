"""Task `files`: a user's own rows from JSON lines, CSV, TSV or parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike

from foreword.errors import ConfigError
from foreword.tasks.own import OwnFiles, Rows
from foreword.tasks.rows import Unusable, check_text, missing, row_text
from foreword.tasks.source import Row
from foreword.tasks.tables import table_rows
from foreword.tasks.task import Example
from foreword.tasks.template import Template

__all__ = ["FileTask"]


@dataclass(kw_only=True)
class FileTask(OwnFiles):
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
    kind: str = field(default="generation", init=False)
    labels: tuple[str, ...] = field(default=(), init=False)

    _reader = "files"
    _row_options = ("prompt_column", "completion_column", "template", "completion_template", "references")

    def __post_init__(self) -> None:
        self._prompt = _template("prompt", self.prompt_column, self.template)
        self._completion = _template("completion", self.completion_column, self.completion_template)
        if self.references is not None and not self.references:
            raise ConfigError("references without a column", "a column", "name one or leave references out")
        self.metrics, self.stop = tuple(self.metrics), tuple(self.stop)
        self._set_files(train=self.train, dev=self.dev, test=self.test)
        self._check_files()

    def _rows(self, split: str) -> Rows:
        return table_rows(self._files[split], self._columns(split))

    def _example(self, row: Row, split: str, name: str, number: int) -> Example:
        prompt, completion, references = self._texts(row, split)
        return Example(name, prompt, completion, references, number)

    def _key(self, example: Example) -> str:
        return example.prompt

    def _texts(self, row: Row, split: str) -> tuple[str, str, tuple[str, ...]]:
        prompt = self._prompt.render({column: row_text(row, column) for column in self._prompt.columns})
        references = self._references(row) if self._scored(split) else ()
        if references and not any(column in row for column in self._completion.columns):
            completion = references[0]
        else:
            completion = self._completion.render({column: row_text(row, column) for column in self._completion.columns})
        completion = completion.strip()
        return prompt.rstrip() + "\n", completion, references or (completion,)

    def _references(self, row: Row) -> tuple[str, ...]:
        columns = [self.references] if isinstance(self.references, str) else list(self.references or ())
        texts: list[str] = []
        for column in columns:
            value = row.get(column)
            if isinstance(value, list):
                texts += [check_text(item, f"an item of column {column!r}") for item in value if item not in (None, "")]
            elif column not in row:
                raise Unusable(missing(column, row))
            elif value not in (None, ""):
                texts.append(row_text(row, column))
        if not texts:
            raise Unusable("no references in " + " and ".join(f"column {column!r}" for column in columns))
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


def _template(what: str, column: str | None, template: str | None) -> Template:
    if column is not None and template is not None:
        raise ConfigError(f"both a {what} column and a template", "one of them", "leave one out")
    return Template.parse(template) if template is not None else Template.of_column(column or what)
