"""The loop of the methods that train weights: the same rows, order, loss, optimizer and choice as prefixes get.

A step is the one of `foreword.train`: the batches of `epoch_batches`, the loss of the task's objective, the gradient
clipped to norm 1, AdamW, a linear warm-up and fall; the best epoch by the loss on the dev rows is kept. A head on an
encoder is trained beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreword.base import Reading
from foreword.config import TrainConfig
from foreword.data import Rows, epoch_batches, micro_batches, ordered_batches
from foreword.errors import RunError
from foreword.frozen import frozen_training
from foreword.objectives import Objective
from foreword.tasks import Split
from foreword.train import learning_rate

__all__ = ["Keeper", "Progress", "encoded", "measure", "train_weights"]

Progress = Callable[[str, int, int], None]


def encoded(objective: Objective, plain: Rows, write: Callable[[Any], Any] | None = None) -> tuple[Rows, list[int]]:
    """The rows of `plain`, those that a prefix can read, as an objective reads them once a method has written them.

    Also the tokens that each has in `plain`: batches are planned by these, whatever is written around a prompt.
    """
    written = plain.examples if write is None else [write(example) for example in plain.examples]
    lengths = {id(example): length for example, length in zip(written, plain.lengths, strict=True)}
    rows = objective.encode(Split("train", written, plain.skipped))
    return rows, [lengths[id(example)] for example in rows.examples]


def measure(objective: Objective, rows: Rows, batch_size: int, read: Reading = None) -> float:
    """Nats per token or label of the right answers of all rows, as training of prefixes measures it."""
    total, count = 0.0, 0
    for batch in ordered_batches(rows.lengths, batch_size):
        measured = objective.measure(rows, batch, read)
        total, count = total + measured.nats, count + measured.units
    return total / count


class Keeper:
    """Measures on dev rows as often as asked, and says when a new best was found and when patience is at its end."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.losses: list[float] = []
        self.best_loss, self.best_step, self._since = math.inf, 0, 0

    def is_best(self, loss: float, step: int) -> bool:
        """Note a dev loss after a step; whether it is the lowest so far."""
        if not math.isfinite(loss):
            raise RunError(f"dev loss is {loss} after step {step}", "finite numbers", "lower learning_rate")
        self.losses.append(loss)
        self._since += 1
        if loss < self.best_loss:
            self.best_loss, self.best_step, self._since = loss, step, 0
        return self._since == 0

    @property
    def done(self) -> bool:
        """Whether so many measurements brought no new best that training ends."""
        return self._since >= (self.config.patience or math.inf)


class _Twins:
    """What is trained, and what the optimizer works on: the same, or a float32 twin where steps were rounded off."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.precise = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in parameters]

    def take_gradients(self, count: int) -> None:
        """The gradient of the mean over `count` tokens, from that of the sum."""
        for parameter, precise in zip(self.parameters, self.precise, strict=True):
            if parameter.grad is not None:
                precise.grad = parameter.grad.float().div_(count)
            if precise is not parameter:
                parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        for parameter, precise in zip(self.parameters, self.precise, strict=True):
            if precise is not parameter:
                parameter.copy_(precise)


def train_weights(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    train: Rows,
    dev: Rows,
    config: TrainConfig,
    *,
    lengths: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train parameters of a base model, or on one, with the head of its objective, to where the dev loss is lowest.

    The numbers of the training are returned. Batches are planned by `lengths` of the rows to train on; None: their own.
    What is in half precision has a twin in float32, which the optimizer works on. The memory needed beyond float32
    parameters is four times theirs: gradient, two moments, the best. Raises `RunError` when the loss is not finite.
    """
    per_epoch = -(-len(train) // config.batch_size)
    steps = config.max_steps or config.epochs * per_epoch
    keeper = Keeper(config)
    best: list[Tensor] = []
    tokens = done = 0
    heads = [] if objective.head is None else list(objective.head.parameters())
    trained = [*parameters, *heads]
    for parameter in trained:
        parameter.requires_grad_(True)
    twins = _Twins(trained)
    optimizer = _optimizer(twins.precise, len(parameters), config)
    try:
        with frozen_training(objective.base.model):
            for done in range(1, steps + 1):
                epoch, index = divmod(done - 1, per_epoch)
                batch = epoch_batches(lengths or train.lengths, config.batch_size, config.seed, epoch)[index]
                _set_rate(optimizer, learning_rate(config, done - 1, steps), config)
                shown = _step(objective, twins, train, batch, done - 1, optimizer, config)
                tokens += sum(train.lengths[row] for row in batch)
                if progress is not None:
                    progress(f"training | loss {shown:.3f}", done, steps)
                if done % (config.eval_every or per_epoch) == 0 or done == steps:
                    if keeper.is_best(measure(objective, dev, config.batch_size, {}), done):
                        _keep(best, trained)
                    if keeper.done:
                        break
        with torch.no_grad():
            for parameter, kept in zip(trained, best, strict=True):
                parameter.copy_(kept)
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None
    return {
        "dev_loss": keeper.best_loss, "dev_losses": keeper.losses, "best_step": keeper.best_step, "steps": done,
        "planned_steps": steps, "tokens": tokens, "trained_parameters": sum(p.numel() for p in trained),
    }  # fmt: skip


def _optimizer(parameters: Sequence[nn.Parameter], own: int, config: TrainConfig) -> torch.optim.Optimizer:
    """Of a method's `own` parameters, which come first, and of a head, each at its peak rate."""
    peaks = config.learning_rate, config.head_learning_rate or config.learning_rate
    groups = zip((parameters[:own], parameters[own:]), peaks, strict=True)
    return torch.optim.AdamW(
        [{"params": each, "lr": peak, "peak": peak} for each, peak in groups if each],
        config.learning_rate, (config.beta1, config.beta2), weight_decay=config.weight_decay,
    )  # fmt: skip


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, config: TrainConfig) -> None:
    """Let every group learn at as much of its peak rate as `rate` is of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate if group["peak"] == config.learning_rate else rate / config.learning_rate * group["peak"]


@torch.no_grad()
def _keep(best: list[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    """Copy the parameters to `best`, into the memory that it has already."""
    if not best:
        best.extend(torch.empty_like(parameter) for parameter in parameters)
    for kept, parameter in zip(best, parameters, strict=True):
        kept.copy_(parameter)


def _step(
    objective: Objective,
    twins: _Twins,
    rows: Rows,
    batch: Sequence[int],
    number: int,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> float:
    """One optimizer step, numbered from 0; the loss before it, in nats per token or label."""
    optimizer.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for part in micro_batches(batch, config.micro_batch_size):
        nats, units = objective.loss(rows, part, {}, number)
        nats.backward()
        total, count = total + nats.item(), count + units
    twins.take_gradients(count)
    norm = float(torch.nn.utils.clip_grad_norm_(twins.precise, config.clip or math.inf))
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise RunError(f"loss is {total / count} and gradient norm {norm}", "finite numbers", "lower learning_rate")
    optimizer.step()
    twins.write_back()
    return total / count
