"""Data sets of texts to be written: what a row says becomes a prompt of one line and its references."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from foreword.tasks.rows import Unusable, check_text, missing
from foreword.tasks.source import HubSource, Row, dataset_rows
from foreword.tasks.task import Example, SkippedRow, Split, check_split, collect

__all__ = ["ARTICLE_WORDS", "GenerationTask", "Record", "SplitRows", "one_line", "row_lines", "triples_line"]

# Prefix-Tuning cuts articles to 512 BPE tokens (arXiv:2101.00190, section 5). Tasks know no tokenizer, and news has
# about 1.3 tokens per word.
ARTICLE_WORDS = 400

SplitRows = Callable[[Iterable[Row], str], Iterable[Row]]


class Record(NamedTuple):
    """What a row says: a prompt without its line end, and the texts that may follow it, at least one."""

    prompt: str
    references: tuple[str, ...]


class GenerationTask:
    """A task whose rows, in the folder of `FOREWORD_DATA` or on the hub, are records with one or more references.

    A training example is one reference; a dev or test example is one record, with all its references and the first of
    them as its completion.

    `read` makes the record of a row of the named split: `Unusable` if it cannot be read, None if the row is no part of
    this task. `rows`, if given, turns the rows of the hub into those that the folder has. `files` are the files in the
    folder, by split, and `without_file` says what to do where one is missing. `dataset` is the name in the ids of
    examples, the task's own unless several tasks share rows.
    """

    kind = "generation"
    labels: tuple[str, ...] = ()
    stop: tuple[str, ...] = ("\n",)

    def __init__(
        self,
        name: str,
        *,
        read: Callable[[Row, str], Record | None],
        instruction: str,
        metrics: tuple[str, ...],
        max_new_tokens: int,
        files: Mapping[str, str],
        hub: HubSource | None,
        rows: SplitRows | None = None,
        dataset: str = "",
        without_file: str = "",
    ) -> None:
        self.name, self.instruction, self.metrics, self.max_new_tokens = name, instruction, metrics, max_new_tokens
        self._read, self._rows, self._dataset = read, rows, dataset or name
        self._files, self._hub, self._without_file = files, hub, without_file

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        """The first `limit` examples of `train`, `dev` or `test`, and the rows before them that cannot be used."""
        check_split(name, limit)
        rows, source = dataset_rows(
            self._dataset, name, self._hub, file=self._files[name], action=self._without_file.format(split=name)
        )
        used, skipped = collect(self._examples(rows, name), limit, strict, source)
        return Split(name, used, skipped, source=source)

    def _examples(self, rows: Iterable[Row], split: str) -> Iterator[Example | SkippedRow]:
        rows = rows if self._rows is None else self._rows(rows, split)
        for number, row in enumerate(rows, start=1):
            try:
                record = self._read(row, split)
            except Unusable as reason:
                yield SkippedRow(number, str(reason))
                continue
            if record is None:
                continue
            name, prompt = f"{self._dataset}-{split}-{number}", record.prompt + "\n"
            if split != "train":
                yield Example(name, prompt, record.references[0], record.references, number)
                continue
            for version, text in enumerate(record.references, start=1):
                yield Example(f"{name}.{version}", prompt, text, (text,), number)


def one_line(text: str, words: int = 0) -> str:
    """The text on one line, or its first `words` words, so that a line end marks where the prompt ends.

    >>> one_line("First line.\\nSecond  line.", words=3)
    'First line. Second'
    """
    found = text.split()
    return " ".join(found[:words] if words else found)


def row_lines(row: Row, column: str) -> tuple[str, ...]:
    """The texts in a column, each on one line, without the empty ones; `Unusable` where there is none.

    >>> row_lines({"texts": ["A pub.", " ", "Aromi is\\na pub."]}, "texts")
    ('A pub.', 'Aromi is a pub.')
    """
    values = row.get(column)
    if values is not None and not isinstance(values, list):
        raise Unusable(f"column {column!r} is no list")
    found = [value for value in values or () if value is not None and value != "" and not str(value).isspace()]
    if not found:
        raise Unusable(f"column {column!r} is empty" if column in row else missing(column, row))
    return tuple(one_line(check_text(value, f"an item of column {column!r}")) for value in found)


def triples_line(triples: Iterable[Iterable[str]]) -> str:
    """Triples as Prefix-Tuning writes them (Li & Liang 2021, arXiv:2101.00190, appendix A.1).

    >>> triples_line([("Aarhus", "leader", "Jacob_Bundsgaard"), ("Aarhus", "country", "Denmark")])
    'Aarhus : leader : Jacob_Bundsgaard | Aarhus : country : Denmark'
    """
    return " | ".join(" : ".join(map(one_line, triple)) for triple in triples)
