"""Training: examples in, the best prefix out. The loop, top to bottom.

The base model never holds a trainable parameter. Each step reads the prefix's sites once, lays detached copies
(leaves) before the attention, and takes the leaves' gradients back through the prefix's parametrization. Only
these small gradients, and those of a head, are summed over micro-batches and processes, so how a batch is cut
changes no more than the rounding. A step depends on the state and on its number alone: the random things, the order
of the rows and what a head drops, are functions of seed, step and row. So a run that was killed and taken up again
ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from foreword.base import BaseModel
from foreword.begin import check_start
from foreword.config import TrainConfig
from foreword.data import micro_batches
from foreword.frozen import frozen_training
from foreword.objectives import Predicted
from foreword.parallel import Processes, checkpoint_layers, shard_model
from foreword.prefix import Prefix, Sites
from foreword.tasks import Task, drawn, get_task
from foreword.trainer import Progress, Trainer, TrainResult, begin_run, learning_rate

__all__ = ["TrainResult", "interruptible", "learning_rate", "prepared", "train"]


def train(
    base: BaseModel,
    prefix: Prefix | None,
    task: Task | str,
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train `prefix` (None: a new one, as `config` says) on a task; the best by the dev loss is returned.

    With a run folder `out` everything is recorded there, and the same call goes on where an interrupted or
    killed one stopped; a finished run is returned as it is. `overwrite` discards what is there. `progress`
    gets (stage, done, total). The test split is not read. Under `torchrun` or `accelerate launch` all processes
    train one prefix together.

    Raises `ConfigError`, `DataError` (no usable rows), `PrefixMismatch`, `RunError` (the folder belongs to
    another run; the loss is not finite), `StorageError`, `MissingPackage`; `KeyboardInterrupt` after Ctrl-C,
    with the state saved. Source: Prefix-Tuning, arXiv 2101.00190, eq. 2.

    >>> import foreword as fw
    >>> base = fw.BaseModel.load("smollm2-135m")  # doctest: +SKIP
    >>> result = fw.train(base, None, "trails", fw.TrainConfig(epochs=5), out="runs/trails")  # doctest: +SKIP
    """
    config = config or TrainConfig()
    task = get_task(task) if isinstance(task, str) else task
    task = drawn(task, config.to_dict())
    path = None if out is None else Path(out)
    check_start(base, prefix, config)
    processes = Processes(base.device, config.tracker, path)
    if processes.device != base.device:
        base.model.to(processes.device)
    with contextlib.ExitStack() as stack:
        run = begin_run(
            base, prefix, task, config, processes, stack, out=path, overwrite=overwrite, progress=progress
        )  # fmt: skip
        if isinstance(run, TrainResult):
            return run
        processes.start_tracking(task.name, config.to_dict())
        stack.callback(processes.stop_tracking)
        with prepared(base, config, processes):
            return _run(run)


def _run(trainer: Trainer) -> TrainResult:
    """Step and measure until the last step or until patience ends."""
    trainer.report("training")
    with interruptible() as interrupted:
        while True:
            if trainer.is_due:
                _measure(trainer, interrupted)
            if trainer.is_over:
                return trainer.finish()
            if _step(trainer, interrupted()):
                trainer.interrupt()
            trainer.save_now_and_then()


def _step(trainer: Trainer, interrupted: bool) -> bool:
    """One optimizer step; whether any process was interrupted."""
    start = time.perf_counter()
    step = trainer.begin_step()
    nats, units, stop = trainer.processes.totals(*_loss(trainer, step.batch, step.leaves), interrupted)
    trainer.end_step(step, nats, units, time.perf_counter() - start)
    return stop > 0


def _loss(trainer: Trainer, batch: Sequence[int], leaves: Sites) -> tuple[float, int]:
    """Nats of this process's part of a batch, and of how many units; gradients are added up in leaves and head."""
    nats, units = 0.0, 0
    for part in _parts(trainer, batch):
        # A process without a row of its own still takes part: a sharded model needs all processes in each pass.
        loss, count = trainer.objective.loss(trainer.rows, part or batch[:1], leaves, trainer.position.step)
        if not part:
            loss, count = 0 * loss, 0
        loss.backward()
        nats, units = nats + loss.item(), units + count
    return nats, units


def _parts(trainer: Trainer, batch: Sequence[int]) -> list[list[int]]:
    """The passes of this process over a batch, as row numbers."""
    processes = trainer.processes
    return micro_batches(batch, trainer.config.micro_batch_size, processes.rank, processes.count)


def _measure(trainer: Trainer, interrupted: Callable[[], bool]) -> None:
    """The loss and, where labels are predicted, the score on the dev rows."""
    start = time.perf_counter()
    nats, units = 0.0, 0
    found: dict[int, Predicted] = {}
    with torch.no_grad():
        sites = trainer.module()
        for number, batch in enumerate(trainer.dev_batches, start=1):
            if interrupted() and trainer.processes.count == 1:
                trainer.interrupt()
            for part in _parts(trainer, batch):
                measured = trainer.objective.measure(trainer.dev, part or batch[:1], sites)
                if part:
                    nats, units = nats + measured.nats, units + measured.units
                    found.update(zip(part, measured.predictions, strict=False))
            if trainer.progress is not None and trainer.processes.is_main:
                trainer.progress(f"dev loss | step {trainer.position.step}", number, len(trainer.dev_batches))
    total_nats, total_units = trainer.processes.totals(nats, units)
    trainer.end_measurement(total_nats, total_units, found, time.perf_counter() - start)


@contextlib.contextmanager
def prepared(base: BaseModel, config: TrainConfig, processes: Processes) -> Iterator[None]:
    """Inside, the base model is as fast or as small as the options ask; outside as before (sharding stays)."""
    shard = config.shard or processes.wants_sharding
    with contextlib.ExitStack() as stack:
        if not (shard or config.gradient_checkpointing):
            stack.enter_context(frozen_training(base.model))
        if config.gradient_checkpointing:
            stack.callback(checkpoint_layers(base.model))
        if shard:
            stack.callback(shard_model(base.model, processes))
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, a first Ctrl-C is only noted, for the next step's end; a second one interrupts at once."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        noted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)
