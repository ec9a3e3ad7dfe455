"""What every method gives: something that writes or predicts, scores, and says what of it is stored for a task."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from foreword.base import BaseModel
from foreword.data import Rows
from foreword.errors import ConfigError, DataError
from foreword.evaluate import predictions
from foreword.methods.config import MethodConfig
from foreword.methods.loop import measure
from foreword.methods.prompting import Prompting
from foreword.methods.tuning import Tuning
from foreword.objectives import HeadOptions, Objective, objective_of
from foreword.prefix import Head, Prefix
from foreword.tasks import AnyExample, Split, Task

__all__ = ["Fitted", "FittedPrefix", "FittedPrompting", "FittedTuning"]

_NEW_TOKENS = 64


class Fitted(ABC):
    """A method fitted to a task. The base model itself is as it was; many may be fitted on one, used one at a time.

    `metrics` are the numbers of the fit: `dev_loss` in nats per token (per label, where a head predicts), `steps`,
    `best_step`, `tokens` read, `train_seconds` of the whole fit, with encoding the rows and measuring on dev rows,
    `trained_parameters` (`parameters` are what is stored), `train_rows`, `dev_rows` and `skipped_rows`; of all but
    prefixes also `dev_losses`, one each time it was measured. `prefix` and `head` are what was trained of these.
    """

    prefix: Prefix | None = None
    head: Head | None = None

    def __init__(self, base: BaseModel, task: Task, config: MethodConfig, metrics: Mapping[str, Any]) -> None:
        self.base, self.task, self.config, self.metrics = base, task, config, dict(metrics)

    @property
    def parameters(self) -> int:
        """Trained numbers that are stored for a task; token ids and texts are none."""
        return sum(tensor.numel() for tensor in self.tensors().values() if tensor.is_floating_point())

    @property
    def num_bytes(self) -> int:
        """Bytes that are stored for a task."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What is stored for a task, by name."""
        return {} if self.head is None else {"head.weight": self.head.weight, "head.bias": self.head.bias}

    @abstractmethod
    def generate(self, prompts: Sequence[str], **generation: Any) -> list[str]:
        """The texts after prompts; options and errors are those of `BaseModel.generate`."""

    def predict(
        self,
        examples: Sequence[AnyExample],
        *,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """The label of each example, or its tags joined by spaces, as `foreword.evaluate` predicts them.

        By the head on an encoder, else as the likeliest candidate after the prompt. Raises `ConfigError` for a task
        without labels, `DataError` as `score`.
        """
        if not self.task.labels:
            raise ConfigError(f"labels of a task of kind {self.task.kind}", "a task that has some", "use generate")
        with self._asked(examples) as (objective, rows):
            _, _, found = predictions(objective, rows, self.prefix, batch_size, progress)
        return [objective.answer(each) for each in found]

    def score(self, examples: Sequence[AnyExample], *, batch_size: int = 16) -> float:
        """Nats per token or label of the right answers, end tokens of texts included, as `foreword.evaluate` counts.

        Raises `DataError` for no example, or for one that is too long.
        """
        with self._asked(examples) as (objective, rows):
            return measure(objective, rows, batch_size, self.prefix)

    @contextlib.contextmanager
    def _asked(self, examples: Sequence[AnyExample]) -> Iterator[tuple[Objective, Rows]]:
        """Inside, the objective of the fitted model, and the examples as it reads them."""
        if not examples:
            raise DataError("no example to score", "at least one", "pass some")
        with self._applied() as base:
            objective = objective_of(base, self.task, HeadOptions(max_tokens=self.config.max_tokens), self.head)
            yield objective, objective.encode(Split("given", self._written(examples)), strict=True)

    @contextlib.contextmanager
    def _applied(self) -> Iterator[BaseModel]:
        """Inside, the yielded base model reads and writes as it was fitted to; a prefix is read beside it."""
        yield self.base

    def _written(self, examples: Sequence[Any]) -> list[Any]:
        """The examples with their prompts as the model reads them."""
        return list(examples)


class FittedTuning(Fitted):
    """A method that changes weights, layers or embeddings while it is used; `prompting` writes its prompts."""

    def __init__(
        self,
        base: BaseModel,
        task: Task,
        config: MethodConfig,
        metrics: Mapping[str, Any],
        tuning: Tuning,
        prompting: Prompting | None = None,
        head: Head | None = None,
    ) -> None:
        super().__init__(base, task, config, metrics)
        self.tuning, self.prompting, self.head = tuning, prompting, head

    def tensors(self) -> dict[str, Tensor]:
        return {**self.tuning.tensors(), **super().tensors()}

    def generate(self, prompts: Sequence[str], **generation: Any) -> list[str]:
        if self.prompting is not None:
            prompts = [self.prompting.write(prompt) for prompt in prompts]
        with self._applied() as base:
            return base.generate(prompts, **generation)

    @contextlib.contextmanager
    def _applied(self) -> Iterator[BaseModel]:
        with self.tuning.applied() as base:
            yield base

    def _written(self, examples: Sequence[Any]) -> list[Any]:
        if self.prompting is None:
            return list(examples)
        return [self.prompting.fit_example(each) for each in examples]


class FittedPrefix(Fitted):
    """A trained prefix."""

    prefix: Prefix

    def __init__(
        self, base: BaseModel, task: Task, config: MethodConfig, metrics: Mapping[str, Any], prefix: Prefix
    ) -> None:
        super().__init__(base, task, config, metrics)
        self.prefix, self.head = prefix, prefix.head

    def tensors(self) -> dict[str, Tensor]:
        return {**self.prefix.tensors(), **super().tensors()}

    def generate(self, prompts: Sequence[str], **generation: Any) -> list[str]:
        return self.base.generate(prompts, self.prefix, **generation)


class FittedPrompting(Fitted):
    """An instruction, with solved examples or without."""

    def __init__(
        self, base: BaseModel, task: Task, config: MethodConfig, metrics: Mapping[str, Any], prompting: Prompting
    ) -> None:
        super().__init__(base, task, config, metrics)
        self.prompting = prompting

    @property
    def num_bytes(self) -> int:
        return self.prompting.num_bytes

    def generate(self, prompts: Sequence[str], **generation: Any) -> list[str]:
        room = generation.setdefault("max_new_tokens", _NEW_TOKENS)
        return self.base.generate([self.prompting.write(prompt, room) for prompt in prompts], **generation)

    def _written(self, examples: Sequence[Any]) -> list[Any]:
        return [self.prompting.fit_example(each) for each in examples]
