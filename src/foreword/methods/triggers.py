"""AutoPrompt: a search for the tokens which, written before or behind every prompt, make the completions likeliest.

The gradient at a trigger's embedding says to first order what any other token would do there; the best few are tried
in earnest. Source: Shin et al. 2020, arXiv 2010.15980, section 2.2, here with the nats of right answers as the loss.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from foreword.base import BaseModel
from foreword.begin import begin_objective
from foreword.data import epoch_batches, micro_batches
from foreword.frozen import frozen_training
from foreword.methods.config import MethodConfig
from foreword.methods.loop import Keeper, Progress, encoded, measure
from foreword.methods.tuning import Tuning
from foreword.methods.virtual import Extended, Vectors, VirtualTokens, vocabulary, word_vectors
from foreword.tasks import Task

__all__ = ["Trial", "TriggerSearch", "TriggerTuning"]


class TriggerTuning(Tuning):
    """Token ids that are read with every prompt, in front of it or at its back."""

    def __init__(self, base: BaseModel, ids: Sequence[int], place: str) -> None:
        self.ids = list(ids)
        self.view = Extended(base, **{place: self.ids})

    @contextlib.contextmanager
    def applied(self) -> Iterator[BaseModel]:
        yield self.view

    def parameters(self) -> list[nn.Parameter]:
        return []

    def tensors(self) -> dict[str, Tensor]:
        return {"ids": torch.tensor(self.ids, dtype=torch.int32)}


class Trial(NamedTuple):
    """One step of the search: nats per token on its batch before and after, and the triggers after it."""

    before: float
    after: float
    ids: tuple[int, ...]


class TriggerSearch:
    """The search on a base model: one trigger is looked at in each step, on a batch of the training rows of a task.

    Rows hold virtual tokens where the triggers go, so that gradients can be taken there; with the vectors of words
    these are triggers to be tried.
    """

    def __init__(self, base: BaseModel, task: Task, config: MethodConfig) -> None:
        self.base, self.config = base, config
        self.options = config.training()
        self.place, self.candidates = config.options["place"], config.options["candidates"]
        self.draw = random.Random(f"foreword autoprompt {config.seed}")
        self.allowed = torch.tensor(vocabulary(base), device=base.device)
        self.ids = self._first(config.options["length"])
        table = word_vectors(base).weight
        self.vectors = Vectors(torch.zeros(len(self.ids), table.shape[1], device=base.device))
        self.soft = VirtualTokens(base, self.vectors, len(self.ids), self.place)
        plain = begin_objective(base, None, task, self.options).encode(task.split("train"))
        self.objective = begin_objective(self.soft.view, None, task, self.options)
        self.train, self.lengths = encoded(self.objective, plain)
        self.dev = self.objective.encode(task.split("dev"))
        self.trials: list[Trial] = []
        self.tokens = 0  # of the batches, in every pass over them

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Search as many steps as the other methods train; leaves the triggers of the lowest dev loss in `ids`."""
        config = self.options
        per_epoch = -(-len(self.train) // config.batch_size)
        steps = config.max_steps or config.epochs * per_epoch
        keeper, best, done = Keeper(config), self.ids, 0
        with frozen_training(self.base.model):
            for done in range(1, steps + 1):
                epoch, index = divmod(done - 1, per_epoch)
                batch = epoch_batches(self.lengths, config.batch_size, config.seed, epoch)[index]
                trial = self.step(batch)
                if progress is not None:
                    progress(f"searching | loss {trial.after:.3f}", done, steps)
                if done % (config.eval_every or per_epoch) == 0 or done == steps:
                    with self._reading(self.ids):
                        loss = measure(self.objective, self.dev, config.batch_size, {})
                    if keeper.is_best(loss, done):
                        best = self.ids
                    if keeper.done:
                        break
        self.ids = best
        return {
            "dev_loss": keeper.best_loss, "dev_losses": keeper.losses, "best_step": keeper.best_step, "steps": done,
            "planned_steps": steps, "tokens": self.tokens, "trained_parameters": 0,
            "exchanges": sum(trial.after < trial.before for trial in self.trials),
        }  # fmt: skip

    def step(self, batch: Sequence[int]) -> Trial:
        """Try the most promising tokens at one place; keep the best of them if it beats what is there."""
        place = self.draw.randrange(len(self.ids))
        before = self.loss(self.ids, batch)
        best = before, self.ids
        for token in self.promising(batch, place):
            tried = [*self.ids[:place], token, *self.ids[place + 1 :]]
            best = min(best, (self.loss(tried, batch), tried), key=lambda pair: pair[0])
        after, self.ids = best
        trial = Trial(before, after, tuple(self.ids))
        self.trials.append(trial)
        return trial

    def promising(self, batch: Sequence[int], place: int) -> list[int]:
        """The tokens whose embeddings lower the loss most to first order: the lowest e · gradient (eq. 2)."""
        self.vectors.vectors.grad = None
        with self._reading(self.ids):
            for part in self._passes(batch):
                nats, _ = self.objective.loss(self.train, part, {})
                nats.backward()
        gradient = cast(Tensor, self.vectors.vectors.grad)
        scores = word_vectors(self.base).weight.detach()[self.allowed].float() @ gradient[place]
        count = min(self.candidates, len(self.allowed))
        return [int(token) for token in self.allowed[scores.topk(count, largest=False).indices]]

    @torch.no_grad()
    def loss(self, ids: Sequence[int], batch: Sequence[int]) -> float:
        """Nats per token of the right answers of a batch after these triggers."""
        total, count = 0.0, 0
        with self._reading(ids):
            for part in self._passes(batch):
                nats, tokens = self.objective.loss(self.train, part, {})
                total, count = total + nats.item(), count + tokens
        return total / count

    def _passes(self, batch: Sequence[int]) -> list[list[int]]:
        """The micro-batches that a batch is read in; its tokens are counted."""
        self.tokens += sum(self.train.lengths[row] for row in batch)
        return micro_batches(batch, self.options.micro_batch_size)

    def _first(self, length: int) -> list[int]:
        """Drawn tokens to begin with."""
        return [int(self.allowed[self.draw.randrange(len(self.allowed))]) for _ in range(length)]

    @contextlib.contextmanager
    def _reading(self, ids: Sequence[int]) -> Iterator[None]:
        """Inside, these tokens are read where the triggers go."""
        with torch.no_grad():
            self.vectors.vectors.copy_(word_vectors(self.base)(torch.tensor(ids, device=self.base.device)))
        with self.soft.applied():
            yield
