"""Prediction: the labels of texts that no file has, read as the task of a prefix reads its own rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from foreword.base import BaseModel
from foreword.errors import DataError, PrefixError
from foreword.evaluate import objective_for, predictions
from foreword.prefix import Head, Prefix
from foreword.tasks import OWN_TASKS, Labelled, Split, Tagged, Task, get_task, list_tasks, reading_of
from foreword.tasks.rows import Unusable

__all__ = ["HeadTask", "Prediction", "predict", "reading_task"]

Given: TypeAlias = str | Sequence[Any] | Mapping[str, str]


class Prediction(NamedTuple):
    """A predicted label, or one tag for each word joined by spaces, and its probability (of tags: the mean).

    Of a choice, `option` is the text that was chosen.

    >>> Prediction("positive", 0.93).label
    'positive'
    """

    label: str
    probability: float
    option: str = ""


class _Reader(Protocol):
    """A task that reads rows without their labels; `columns` are what a row consists of."""

    columns: tuple[str, ...]

    def unlabelled(self, row: Mapping[str, str], name: str, number: int) -> Labelled:
        """What is read of a row; `Unusable` if it cannot be read."""


def predict(
    base: BaseModel,
    prefix: Prefix,
    rows: Sequence[Given],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """The label of each row, by the head of a prefix on an encoder, by the task's label words on other models.

    A row is a text, or the texts that the prefix's task reads, in the order of its columns or by their names, as
    `(premise, hypothesis)` for `rte`. For tagging it is a string whose words are separated by white space, or the
    sequence of its words. Where the prefix was trained for a task of the caller's own, a row is what its head reads: a
    text, a pair, or the sequence of the options of a choice, each a text or a pair.

    Raises `PrefixError` for a prefix that predicts no labels, `DataError` for rows of another form or without tokens.

    >>> import foreword as fw
    >>> base = fw.BaseModel.load("minilm")  # doctest: +SKIP
    >>> prefix = fw.Prefix.load("runs/rte/prefix", base)  # doctest: +SKIP
    >>> fw.predict(base, prefix, [("It rained all day.", "It was dry.")])  # doctest: +SKIP
    """
    task = reading_task(prefix)
    if isinstance(rows, str):
        raise DataError("one string", "a sequence of texts", "put it into a list")
    if not rows:
        return []
    objective = objective_for(base, prefix, task)
    examples = [_example(task, row, number) for number, row in enumerate(rows, start=1)]
    encoded = objective.encode(Split("texts", examples), strict=True)
    _, _, found = predictions(objective, encoded, prefix, batch_size, progress)
    answers = [objective.answer(each) for each in found]
    return [
        Prediction(answer, each.probability, _option(task, example, answer))
        for answer, each, example in zip(answers, found, examples, strict=True)
    ]


def reading_task(prefix: Prefix) -> Task:
    """The task whose rows a prefix was trained to read, as far as the prefix tells it.

    Raises `PrefixError` for a prefix that predicts no labels.
    """
    known = prefix.metadata
    name, labels = str(known.get("task")), tuple(known.get("labels", ()))
    own, options = reading_of(known)
    if own == "labelled":
        return get_task(own, labels=labels, **options)
    if labels and name in list_tasks() and name not in OWN_TASKS:
        task = get_task(name)
        if task.labels == labels and hasattr(task, "unlabelled"):
            return task
    if prefix.head is None and labels:
        raise PrefixError("a prefix that does not tell how it reads rows", "one that does", "train it again")
    if prefix.head is None:
        raise PrefixError(
            "a prefix that predicts no labels", "one that was trained for a task with labels",
            "let it write with foreword generate",
        )  # fmt: skip
    return HeadTask(prefix.head)


class HeadTask:
    """The task that a head was trained for, as far as the head tells it."""

    instruction, max_new_tokens = "", 1
    metrics: tuple[str, ...] = ("accuracy",)
    stop: tuple[str, ...] = ()

    def __init__(self, head: Head) -> None:
        self.name, self.kind, self.labels = "texts", head.kind, head.labels

    def split(self, *_: Any, **__: Any) -> Split:
        """Nothing: the texts come from the caller."""
        return Split("texts", [])

    def example(self, given: Any, row: int) -> Labelled | Tagged:
        """A row of the task, with a label that nobody knows."""
        label = self.labels[0]
        if self.kind == "tagging":
            words = tuple(given.split() if isinstance(given, str) else given)
            return Tagged(str(row), words, ("O",) * len(words), row)
        if self.kind == "choice":
            options = [given] if isinstance(given, str) else given
            if len(options) < 2:
                raise DataError(f"{len(options)} option(s) in row {row}", "at least two", "give all options")
            texts = tuple(_parts(option, row) for option in options)
        else:
            texts = (_parts(given, row),)
        return Labelled(str(row), texts, label, "", (), row)


def _example(task: Task, given: Given, row: int) -> Labelled | Tagged:
    if isinstance(task, HeadTask):
        return task.example(given, row)
    reader: _Reader = task  # type: ignore[assignment]  # reading_task has looked
    columns = reader.columns
    if not isinstance(given, Mapping | Sequence):
        raise DataError(f"{given!r} in row {row}", f"texts for {', '.join(columns)}", "correct the row")
    if not isinstance(given, Mapping):
        parts = [given] if isinstance(given, str) else list(given)
        if len(parts) != len(columns):
            raise DataError(
                f"{len(parts)} text(s) in row {row}", f"{len(columns)}: {', '.join(columns)}",
                "give them in this order",
            )  # fmt: skip
        given = dict(zip(columns, parts, strict=True))
    try:
        return reader.unlabelled(given, f"row {row}", row)
    except Unusable as reason:
        raise DataError(f"row {row}: {reason}", f"texts for {', '.join(columns)}", "correct the row") from None


def _option(task: Task, example: Labelled | Tagged, answer: str) -> str:
    """The text of a choice's answer, where it is known."""
    if task.kind != "choice" or isinstance(example, Tagged):
        return ""
    number = task.labels.index(answer)
    return example.candidates[number] if example.candidates else " ".join(example.texts[number])


def _parts(given: str | Sequence[str], row: int) -> tuple[str, ...]:
    parts = (given,) if isinstance(given, str) else tuple(given)
    if len(parts) not in (1, 2):
        raise DataError(f"{len(parts)} texts in row {row}", "one text, or a pair", "join them")
    return parts
