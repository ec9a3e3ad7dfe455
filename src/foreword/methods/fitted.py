"""What every method gives: something that writes and scores, and says what of it is stored for a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foreword.base import BaseModel
from foreword.errors import DataError
from foreword.methods.config import MethodConfig
from foreword.methods.prompting import Prompting
from foreword.methods.tuning import Tuning
from foreword.prefix import Prefix
from foreword.tasks import Example

__all__ = ["Fitted", "FittedPrefix", "FittedPrompting", "FittedTuning"]

_NEW_TOKENS = 64


class Fitted(ABC):
    """A method fitted to a task. The base model itself is as it was; many may be fitted on one, used one at a time.

    `metrics` are the numbers of the fit: `dev_loss` in nats per token, `steps`, `best_step`, `tokens` read,
    `train_seconds` of the whole fit, with encoding the rows and measuring on dev rows, `trained_parameters`
    (`parameters` are what is stored), `train_rows`, `dev_rows` and `skipped_rows`; of all but prefixes also
    `dev_losses`, one each time it was measured.
    """

    def __init__(self, base: BaseModel, config: MethodConfig, metrics: Mapping[str, Any]) -> None:
        self.base, self.config, self.metrics = base, config, dict(metrics)

    @property
    def parameters(self) -> int:
        """Trained numbers that are stored for a task; token ids and texts are none."""
        return sum(tensor.numel() for tensor in self.tensors().values() if tensor.is_floating_point())

    @property
    def num_bytes(self) -> int:
        """Bytes that are stored for a task."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored for a task, by name."""

    @abstractmethod
    def generate(self, prompts: Sequence[str], **generation: Any) -> list[str]:
        """The texts after prompts; options and errors are those of `BaseModel.generate`."""

    @abstractmethod
    def _sums(self, examples: Sequence[Example], batch_size: int) -> list[tuple[float, int]]:
        """Nats and tokens of each example's completion."""

    def score(self, examples: Sequence[Example], *, batch_size: int = 16) -> float:
        """Nats per token of the examples' completions, end tokens included, as `foreword.evaluate` counts them.

        Raises `DataError` for no example, or for one that is too long.
        """
        if not examples:
            raise DataError("no example to score", "at least one", "pass some")
        sums = self._sums(examples, batch_size)
        return sum(nats for nats, _ in sums) / sum(tokens for _, tokens in sums)


def _scored(base: BaseModel, examples: Sequence[Example], batch_size: int, prefix: Prefix | None = None) -> Any:
    prompts, completions = [each.prompt for each in examples], [each.completion for each in examples]
    return base.score(prompts, completions, prefix, batch_size=batch_size)


class FittedTuning(Fitted):
    """A method that changes weights, layers or embeddings while it is used; `prompting` writes its prompts."""

    def __init__(
        self,
        base: BaseModel,
        config: MethodConfig,
        metrics: Mapping[str, Any],
        tuning: Tuning,
        prompting: Prompting | None = None,
    ) -> None:
        super().__init__(base, config, metrics)
        self.tuning, self.prompting = tuning, prompting

    def tensors(self) -> dict[str, Tensor]:
        return self.tuning.tensors()

    def generate(self, prompts: Sequence[str], **generation: Any) -> list[str]:
        if self.prompting is not None:
            prompts = [self.prompting.write(prompt) for prompt in prompts]
        with self.tuning.applied() as base:
            return base.generate(prompts, **generation)

    def _sums(self, examples: Sequence[Example], batch_size: int) -> list[tuple[float, int]]:
        if self.prompting is not None:
            examples = [self.prompting.fit_example(each) for each in examples]
        with self.tuning.applied() as base:
            return list(_scored(base, examples, batch_size))


class FittedPrefix(Fitted):
    """A trained prefix."""

    def __init__(self, base: BaseModel, config: MethodConfig, metrics: Mapping[str, Any], prefix: Prefix) -> None:
        super().__init__(base, config, metrics)
        self.prefix = prefix

    def tensors(self) -> dict[str, Tensor]:
        return self.prefix.tensors()

    def generate(self, prompts: Sequence[str], **generation: Any) -> list[str]:
        return self.base.generate(prompts, self.prefix, **generation)

    def _sums(self, examples: Sequence[Example], batch_size: int) -> list[tuple[float, int]]:
        return list(_scored(self.base, examples, batch_size, self.prefix))


class FittedPrompting(Fitted):
    """An instruction, with solved examples or without."""

    def __init__(self, base: BaseModel, config: MethodConfig, metrics: Mapping[str, Any], prompting: Prompting) -> None:
        super().__init__(base, config, metrics)
        self.prompting = prompting

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @property
    def num_bytes(self) -> int:
        return self.prompting.num_bytes

    def generate(self, prompts: Sequence[str], **generation: Any) -> list[str]:
        room = generation.setdefault("max_new_tokens", _NEW_TOKENS)
        return self.base.generate([self.prompting.write(prompt, room) for prompt in prompts], **generation)

    def _sums(self, examples: Sequence[Example], batch_size: int) -> list[tuple[float, int]]:
        return list(_scored(self.base, [self.prompting.fit_example(each) for each in examples], batch_size))
