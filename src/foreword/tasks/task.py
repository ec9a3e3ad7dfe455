"""What a task is: examples, splits of them, and the protocol that training and evaluation read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

from foreword.errors import ConfigError, DataError

__all__ = [
    "KINDS", "SPLITS", "AnyExample", "Example", "Labelled", "SkippedRow", "Split", "Tagged", "Task", "check_split",
    "collect",
]  # fmt: skip

KINDS = ("generation", "classification", "choice", "tagging")

SPLITS = ("train", "dev", "test")


class Example(NamedTuple):
    """One prompt with the completion to learn and all references to be scored against.

    `row` is the row of the source that the example came from, counted from 1.

    >>> Example("e2e-train-1", "name : Aromi\\n", "Aromi is here.", ("Aromi is here.",), 1).completion
    'Aromi is here.'
    """

    id: str
    prompt: str
    completion: str
    references: tuple[str, ...]
    row: int


class Labelled(NamedTuple):
    """One text, pair of texts, or set of options, with its label.

    `texts` is what an encoder reads: one entry (a text or a pair) for classification, one for each option of a
    multiple choice. `prompt` is what a decoder reads; its continuation is one of `candidates`: a word for each label
    of the task, in their order, or the options. The right one is `candidates[task.labels.index(label)]`.

    >>> example = Labelled("sst2-train-1", (("a joy",),), "positive", "a joy\\n", ("negative", "positive"), 1)
    >>> example.candidates[("negative", "positive").index(example.label)]
    'positive'
    """

    id: str
    texts: tuple[tuple[str, ...], ...]
    label: str
    prompt: str
    candidates: tuple[str, ...]
    row: int


class Tagged(NamedTuple):
    """The words of one sentence with a BIO tag for each.

    >>> Tagged("wnut17-1", ("In", "New", "York"), ("O", "B-location", "I-location"), 1).tags[1]
    'B-location'
    """

    id: str
    words: tuple[str, ...]
    tags: tuple[str, ...]
    row: int


AnyExample: TypeAlias = Example | Labelled | Tagged
_E = TypeVar("_E", Example, Labelled, Tagged)


class SkippedRow(NamedTuple):
    """A row that cannot be used, with the reason.

    >>> SkippedRow(7, "column 'answer' is empty").row
    7
    """

    row: int
    reason: str


@dataclass(frozen=True)
class Split:
    """The examples of one split, the rows left out, and where they came from.

    The examples are of one type, which goes with the `kind` of the task: `Example` for generation, `Labelled` for
    classification and choice, `Tagged` for tagging. `sha256` is the hash of the examples themselves, so that it is the
    same wherever they were read from.

    >>> split = Split("dev", [Example("a", "x\\n", "y", ("y",), 1)], source="example.jsonl")
    >>> len(split.examples), split.sha256[:8]
    (1, 'd53b2733')
    """

    name: str
    examples: list[Any]  # Example, Labelled or Tagged, as the kind of the task says
    skipped: list[SkippedRow] = field(default_factory=list)
    sha256: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if not self.sha256:
            object.__setattr__(self, "sha256", _digest(self.examples))

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.examples)


@runtime_checkable
class Task(Protocol):
    """Anything that yields examples.

    `kind` is one of `KINDS`. `labels` are () for generation, "1", "2", ... for choice, and for tagging every BIO tag,
    "O" first. `instruction` is the text that a prefix may be initialised from; the first metric selects models.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    instruction: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...]

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        """The split `train`, `dev` or `test`: its first `limit` examples; `strict` refuses rows to be skipped."""


def check_split(name: str, limit: int | None) -> None:
    """Raise `ConfigError` unless the split exists and the limit can be kept."""
    if name not in SPLITS:
        raise ConfigError(f"split {name!r}", "one of " + ", ".join(SPLITS), "name one of them")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit}", "at least 1 row", "raise the limit or leave it out")


def collect(
    rows: Iterable[_E | SkippedRow], limit: int | None, strict: bool, source: str
) -> tuple[list[_E], list[SkippedRow]]:
    """The first `limit` examples of a stream and the rows skipped before them; `strict` stops at a skipped row."""
    skipped: list[SkippedRow] = []

    def usable() -> Iterator[_E]:
        for row in rows:
            if not isinstance(row, SkippedRow):
                yield row
            elif strict:
                raise DataError(
                    f"row {row.row} of {source}: {row.reason}", "a usable row", "correct it, or leave strict out"
                )
            else:
                skipped.append(row)

    return list(islice(usable(), limit)), skipped


def _digest(examples: Iterable[AnyExample]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(list(example), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
