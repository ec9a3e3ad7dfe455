"""What tasks with some of the training rows of another task share."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import TypeVar

from foreword.tasks.task import AnyExample, Example, Labelled, Split, Task, check_split

__all__ = ["SampledTask", "by_row", "content", "input_of"]

_E = TypeVar("_E", bound=AnyExample)


class SampledTask(ABC):
    """A task under the same name with some of its training rows; the test split is the whole one.

    Subclasses say which rows `train` and `dev` have.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.name, self.kind, self.labels = task.name, task.kind, task.labels
        self.instruction, self.metrics = task.instruction, task.metrics
        self.max_new_tokens, self.stop = task.max_new_tokens, task.stop
        self.reading = getattr(task, "reading", None)

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        """The first `limit` rows of the sampled `train`, of `dev`, or of the whole `test`."""
        check_split(name, limit)
        return self.task.split(name, limit, strict) if name == "test" else self._sampled(name, limit, strict)

    @abstractmethod
    def _sampled(self, name: str, limit: int | None, strict: bool) -> Split:
        """The sampled `train`, or `dev`."""


def input_of(example: AnyExample) -> str:
    """What a model reads of an example, as a key: prompt, texts or words."""
    if isinstance(example, Example):
        return example.prompt
    return json.dumps(example.texts if isinstance(example, Labelled) else example.words)


def content(example: AnyExample) -> str:
    """What an example says, as a key: what a model reads, and the completion of a prompt."""
    return json.dumps([example.prompt, example.completion]) if isinstance(example, Example) else input_of(example)


def by_row(examples: list[_E]) -> list[_E]:
    """The examples in the order of their source."""
    return sorted(examples, key=lambda example: example.row)
