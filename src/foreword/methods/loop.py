"""The loop of the methods that train weights: the same rows, order, loss, optimizer and choice as prefixes get.

A step is the one of `foreword.train`: the batches of `epoch_batches`, nats per completion token of the whole batch,
the gradient clipped to norm 1, AdamW, a linear warm-up and fall; the best epoch by the loss on the dev rows is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreword.base import BaseModel
from foreword.config import TrainConfig
from foreword.data import Rows, epoch_batches, micro_batches, ordered_batches
from foreword.errors import RunError
from foreword.frozen import frozen_training
from foreword.tasks import Example
from foreword.train import learning_rate

__all__ = ["Keeper", "Progress", "collated", "measure", "plain_lengths", "train_weights"]

Progress = Callable[[str, int, int], None]
Loss = Callable[[dict[str, Tensor]], tuple[Tensor, int]]


def collated(base: BaseModel, rows: Rows, numbers: Sequence[int]) -> dict[str, Tensor]:
    """Some rows as one batch for `BaseModel.completion_loss`."""
    return base.collate([rows.encoded[row] for row in numbers])


def plain_lengths(base: BaseModel, examples: Sequence[Example]) -> list[int]:
    """Tokens of examples as a prefix reads them. Batches are planned by these, whatever a method writes around them."""
    encoded = (base.encode(example.prompt, example.completion) for example in examples)
    return [len(prompt) + len(completion) for prompt, completion in encoded]


@torch.no_grad()
def measure(base: BaseModel, rows: Rows, batch_size: int, loss: Loss | None = None) -> float:
    """Nats per completion token over all rows, as training of prefixes measures it."""
    total, count = 0.0, 0
    for batch in ordered_batches(rows.lengths, batch_size):
        given = collated(base, rows, batch)
        nats, tokens = base.completion_loss(given, {}) if loss is None else loss(given)
        total, count = total + nats.item(), count + tokens
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
    base: BaseModel,
    parameters: Sequence[nn.Parameter],
    train: Rows,
    dev: Rows,
    config: TrainConfig,
    *,
    lengths: Sequence[int] | None = None,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train `parameters` of a base model, or on one, and leave them as they were at the lowest dev loss; the numbers.

    Batches are planned by `lengths` of the rows to train on; None: their own. `loss` maps a batch to the nats of its
    completions, summed, and their tokens; None: `completion_loss` of the base without a prefix. What is in half
    precision has a twin in float32, which the optimizer works on. The memory needed beyond float32 parameters is four
    times theirs: gradient, two moments, the best. Raises `RunError` when the loss is not finite.
    """
    per_epoch = -(-len(train) // config.batch_size)
    steps = config.max_steps or config.epochs * per_epoch
    keeper = Keeper(config)
    best: list[Tensor] = []
    tokens = done = 0
    for parameter in parameters:
        parameter.requires_grad_(True)
    twins = _Twins(parameters)
    optimizer = torch.optim.AdamW(
        twins.precise, config.learning_rate, (config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    try:
        with frozen_training(base.model):
            for done in range(1, steps + 1):
                epoch, index = divmod(done - 1, per_epoch)
                batch = epoch_batches(lengths or train.lengths, config.batch_size, config.seed, epoch)[index]
                shown = _step(base, twins, train, batch, optimizer, learning_rate(config, done - 1, steps),
                              config, loss)  # fmt: skip
                tokens += sum(train.lengths[row] for row in batch)
                if progress is not None:
                    progress(f"training | loss {shown:.3f}", done, steps)
                if done % (config.eval_every or per_epoch) == 0 or done == steps:
                    if keeper.is_best(measure(base, dev, config.batch_size, loss), done):
                        _keep(best, parameters)
                    if keeper.done:
                        break
        with torch.no_grad():
            for parameter, kept in zip(parameters, best, strict=True):
                parameter.copy_(kept)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    return {
        "dev_loss": keeper.best_loss, "dev_losses": keeper.losses, "best_step": keeper.best_step, "steps": done,
        "planned_steps": steps, "tokens": tokens, "trained_parameters": sum(p.numel() for p in parameters),
    }  # fmt: skip


@torch.no_grad()
def _keep(best: list[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    """Copy the parameters to `best`, into the memory that it has already."""
    if not best:
        best.extend(torch.empty_like(parameter) for parameter in parameters)
    for kept, parameter in zip(best, parameters, strict=True):
        kept.copy_(parameter)


def _step(
    base: BaseModel,
    twins: _Twins,
    rows: Rows,
    batch: Sequence[int],
    optimizer: torch.optim.Optimizer,
    rate: float,
    config: TrainConfig,
    loss: Loss | None,
) -> float:
    """One optimizer step; the loss before it, in nats per token."""
    optimizer.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for part in micro_batches(batch, config.micro_batch_size):
        given = collated(base, rows, part)
        nats, tokens = base.completion_loss(given, {}) if loss is None else loss(given)
        nats.backward()
        total, count = total + nats.item(), count + tokens
    twins.take_gradients(count)
    norm = float(torch.nn.utils.clip_grad_norm_(twins.precise, config.clip or math.inf))
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise RunError(f"loss is {total / count} and gradient norm {norm}", "finite numbers", "lower learning_rate")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    twins.write_back()
    return total / count
