"""Prediction: what the head of a prefix says of texts that no task has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from foreword.base import BaseModel
from foreword.errors import DataError, PrefixError
from foreword.evaluate import objective_for, predictions
from foreword.prefix import Head, Prefix
from foreword.tasks import Labelled, Split, Tagged

__all__ = ["HeadTask", "Prediction", "predict"]


class Prediction(NamedTuple):
    """A predicted label, or one tag for each word joined by spaces, and its probability (of tags: the mean).

    >>> Prediction("positive", 0.93).label
    'positive'
    """

    label: str
    probability: float


def predict(
    base: BaseModel,
    prefix: Prefix,
    texts: Sequence[str | Sequence[Any]],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """What the head of a prefix says of each text: a string, or the two strings of a pair.

    For a prefix of a multiple choice, a row is the sequence of its options, each a string or a pair. For tagging it is
    a string whose words are separated by white space, or the sequence of its words. Raises `PrefixError` for a prefix
    without a head, `DataError` for texts of another form or without tokens.

    >>> import foreword as fw
    >>> base = fw.BaseModel.load("minilm")  # doctest: +SKIP
    >>> prefix = fw.Prefix.load("runs/rte/prefix", base)  # doctest: +SKIP
    >>> fw.predict(base, prefix, [("It rained all day.", "It was dry.")])  # doctest: +SKIP
    """
    if prefix.head is None:
        raise PrefixError(
            "a prefix without a head", "one that was trained on an encoder for a task with labels",
            "score the label words of a decoder with foreword evaluate, or let it write with foreword generate",
        )  # fmt: skip
    if isinstance(texts, str):
        raise DataError("one string", "a sequence of texts", "put it into a list")
    if not texts:
        return []
    task = HeadTask(prefix.head)
    objective = objective_for(base, prefix, task)
    rows = objective.encode(
        Split("texts", [task.example(n, text) for n, text in enumerate(texts, start=1)]), strict=True
    )
    _, _, found = predictions(objective, rows, prefix, batch_size, progress)
    return [Prediction(objective.answer(each), each.probability) for each in found]


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

    def example(self, row: int, given: str | Sequence[str]) -> Labelled | Tagged:
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


def _parts(given: str | Sequence[str], row: int) -> tuple[str, ...]:
    parts = (given,) if isinstance(given, str) else tuple(given)
    if len(parts) not in (1, 2):
        raise DataError(f"{len(parts)} texts in row {row}", "one text, or a pair", "join them")
    return parts
