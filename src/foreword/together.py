"""Several prefixes trained together over one frozen base model, each with the result that it gets alone.

The runs go in lockstep. The rows of all batches are sorted by length and cut into passes, few where a pass is dear and
tight where tokens are (`foreword.data.tight_batches`). In a pass each row reads the prefix of its own run
(`foreword.bank.Stacked`), and its loss reaches that prefix alone. Gradients, optimizer, schedule, measurements and the
end of each run are its own, so that what differs from training alone is rounding. What is gained: a GPU gets work
enough for its size, and a CPU multiplies less padding, since many rows sort better than few.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from foreword.bank import Stacked
from foreword.base import BaseModel
from foreword.begin import check_start
from foreword.config import TrainConfig
from foreword.data import tight_batches
from foreword.errors import ConfigError, RunError
from foreword.objectives import Part, Predicted
from foreword.parallel import Processes
from foreword.prefix import Prefix
from foreword.tasks import Task, drawn, get_task
from foreword.train import interruptible, prepared
from foreword.trainer import Progress, Trainer, TrainResult, begin_run

__all__ = ["SomeFailed", "train_together"]

Starts = Prefix | Sequence[Prefix | None] | None
Tasks = Task | str | Sequence[Task | str]

# What a pass costs beside its tokens, in tokens: a GPU waits for the launches, a CPU reads the weights once more.
_OVERHEAD = {"cpu": 50}
_OVERHEAD_ELSEWHERE = 16384
# With so many tokens the products of a CPU are full: more would only fill the memory.
_MOST_TOKENS = {"cpu": 1024}


class SomeFailed(RunError):
    """Of several runs some failed; `results` has what each came to in their order, a `RunError` where one failed."""

    def __init__(self, results: list[TrainResult | RunError]) -> None:
        self.results = results
        place, first = next((n, each) for n, each in enumerate(results, 1) if isinstance(each, RunError))
        super().__init__(f"run {place}: {first.got}", first.expected, first.action)


def train_together(
    base: BaseModel,
    prefixes: Starts,
    tasks: Tasks,
    configs: Sequence[TrainConfig],
    *,
    out: Sequence[str | Path] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[TrainResult]:
    """Train a prefix for each of `configs` at once; the results in their order, equal to those of `train` but rounding.

    `prefixes` and `tasks` are one for all or one for each. The runs may differ in everything that is a prefix's own:
    rows, seed, length, gates, learning rate, steps. Of one kind must be the tasks, what the heads read,
    `micro_batch_size` (here the most rows of a pass, of all runs together; 0: what does well on the device) and
    `gradient_checkpointing`. With run folders `out` the same call goes on where it was stopped, and finished runs are
    returned as they are; a run that goes on beside others than before differs by rounding. The seconds of a run are its
    share of those of all. `progress` gets (stage, done, total) steps of all runs.

    A run whose loss is not finite stops alone; `SomeFailed`, with the results of the others, is raised when they are
    finished. Raises what `foreword.train.train` raises, and `ConfigError` for runs that cannot be trained together,
    several processes, sharding and trackers.

    >>> import foreword as fw
    >>> base = fw.BaseModel.load("smollm2-135m")  # doctest: +SKIP
    >>> configs = [fw.TrainConfig(seed=seed) for seed in range(8)]
    >>> results = fw.train_together(base, None, "trails", configs)  # doctest: +SKIP
    """
    count = len(configs)
    starts = [prefixes] * count if prefixes is None or isinstance(prefixes, Prefix) else list(prefixes)
    given = list(tasks) if isinstance(tasks, Sequence) and not isinstance(tasks, str) else [tasks] * count
    folders = [None] * count if out is None else [Path(folder) for folder in out]
    processes = Processes(base.device)
    _check(configs, {"prefixes": len(starts), "tasks": len(given), "run folders": len(folders)}, processes)
    results: dict[int, TrainResult | RunError] = {}
    trainers: dict[int, Trainer] = {}
    with contextlib.ExitStack() as stack:
        for place, (start, task, config, folder) in enumerate(zip(starts, given, configs, folders, strict=True)):
            check_start(base, start, config)
            own = drawn(get_task(task) if isinstance(task, str) else task, config.to_dict())
            advance = None if progress is None else _named(progress, f"run {place + 1} of {count}")
            run = begin_run(
                base, start, own, config, processes, stack,
                out=folder, overwrite=overwrite, progress=advance, together=count,
            )  # fmt: skip
            if isinstance(run, TrainResult):
                results[place] = run
            else:
                trainers[place] = run
        if trainers:
            _check_alike(trainers)
            with prepared(base, configs[0], processes):
                results |= _Lockstep(base, trainers, progress).run()
    found = [results[place] for place in range(count)]
    whole = [each for each in found if isinstance(each, TrainResult)]
    if len(whole) < count:
        raise SomeFailed(found)
    return whole


def _named(progress: Progress, name: str) -> Progress:
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)


def _check(configs: Sequence[TrainConfig], given: dict[str, int], processes: Processes) -> None:
    """Raise `ConfigError` for what cannot be trained together, whatever the tasks are."""
    for name, number in given.items():
        if number != len(configs):
            raise ConfigError(f"{number} {name} for {len(configs)} configurations", "one for each", "give as many")
    if not configs:
        raise ConfigError("no configuration to train with", "one for each prefix", "give at least one")
    if processes.count > 1:
        raise ConfigError(
            f"several prefixes in {processes.count} processes", "a single process", "start without torchrun"
        )
    for name in ("shard", "tracker"):
        if any(getattr(config, name) for config in configs):
            raise ConfigError(f"{name} with several prefixes", "none", f"leave {name} out or train them one by one")
    for name in ("micro_batch_size", "gradient_checkpointing"):
        values = sorted({getattr(config, name) for config in configs})
        if len(values) > 1:
            listed = " and ".join(map(str, values))
            raise ConfigError(f"{name} {listed} in runs that share passes", "one value", "choose one of them for all")


def _check_alike(trainers: dict[int, Trainer]) -> None:
    """Raise `ConfigError` unless the objectives of all runs can share a pass."""
    first = next(iter(trainers.values())).objective
    for place, trainer in trainers.items():
        own = trainer.objective
        kinds = [each.task.kind for each in (first, own)]
        poolings = ["none" if each.head is None else each.head.pooling for each in (first, own)]
        for name, (wanted, got) in {"tasks of kind": kinds, "heads that read": poolings}.items():
            if wanted != got:
                raise ConfigError(
                    f"{name} {wanted} and, in run {place + 1}, {got}", "one kind", "train them in two calls"
                )


class _Lockstep:
    """Runs by their places, stepped and measured together until each is over."""

    def __init__(self, base: BaseModel, trainers: dict[int, Trainer], progress: Progress | None) -> None:
        self.base, self.active, self.progress = base, dict(trainers), progress
        self.results: dict[int, TrainResult | RunError] = {}
        self.runs = list(trainers.values())
        for trainer in self.runs:
            trainer.progress = None  # all runs are told of as one

    def run(self) -> dict[int, TrainResult | RunError]:
        """The results of all runs; the error in the place of one that failed."""
        with interruptible() as interrupted:
            while True:
                self._measure(interrupted)
                self._finish()
                if not self.active:
                    break
                self._step()
                if interrupted():
                    self._interrupt()
                for trainer in self.active.values():
                    trainer.save_now_and_then()
        return self.results

    def _step(self) -> None:
        """One optimizer step of every run that is not over."""
        start = time.perf_counter()
        places, trainers = list(self.active), list(self.active.values())
        steps = [trainer.begin_step() for trainer in trainers]
        whole = [
            Part(trainer.objective, trainer.rows, step.batch, trainer.position.step, owner)
            for owner, (trainer, step) in enumerate(zip(trainers, steps, strict=True))
        ]
        read = Stacked([step.leaves for step in steps])
        nats, units = [0.0] * len(whole), [0] * len(whole)
        for parts in self._passes(whole):
            losses = parts[0].objective.losses(parts, read)
            summed = torch.stack([loss for loss, _ in losses])
            # A row's loss depends on its own prefix alone: the gradient of the sum is that of each run's own loss.
            summed.sum().backward()
            for part, loss, (_, count) in zip(parts, summed.tolist(), losses, strict=True):
                nats[part.owner], units[part.owner] = nats[part.owner] + loss, units[part.owner] + count
        tokens = [trainer.tokens(step) for trainer, step in zip(trainers, steps, strict=True)]
        seconds = (time.perf_counter() - start) / sum(tokens)
        for owner, (place, trainer) in enumerate(zip(places, trainers, strict=True)):
            with self._failing_alone(place):
                trainer.end_step(steps[owner], nats[owner], units[owner], seconds * tokens[owner])
        self._report("training")

    def _measure(self, interrupted: Callable[[], bool]) -> None:
        """The dev rows of every run for which that is due."""
        start = time.perf_counter()
        due = {place: trainer for place, trainer in self.active.items() if trainer.is_due}
        if not due:
            return
        whole = [
            Part(trainer.objective, trainer.dev, range(len(trainer.dev)), owner=owner)
            for owner, trainer in enumerate(due.values())
        ]
        nats, units = [0.0] * len(whole), [0] * len(whole)
        found: list[dict[int, Predicted]] = [{} for _ in whole]
        with torch.no_grad():
            read = Stacked([trainer.module() for trainer in due.values()])
            for parts in self._passes(whole):
                if interrupted():
                    self._interrupt()
                for part, each in zip(parts, parts[0].objective.measures(parts, read), strict=True):
                    nats[part.owner], units[part.owner] = nats[part.owner] + each.nats, units[part.owner] + each.units
                    found[part.owner].update(zip(part.numbers, each.predictions, strict=False))
        seconds = (time.perf_counter() - start) / len(due)
        for owner, (place, trainer) in enumerate(due.items()):
            with self._failing_alone(place):
                trainer.end_measurement(nats[owner], units[owner], found[owner], seconds)
        self._report("dev loss")

    def _passes(self, whole: Sequence[Part]) -> Iterator[list[Part]]:
        """The rows of all parts in passes of like length, as large as do well on the device."""
        device = self.base.device.type
        rows = sorted((part.owner, number) for part in whole for number in part.numbers)
        lengths = [whole[owner].rows.lengths[number] for owner, number in rows]
        # No more rows than a step of all runs has: passes without gradients would have too many tokens of logits.
        most = self.runs[0].config.micro_batch_size or sum(trainer.config.batch_size for trainer in self.runs)
        overhead = _OVERHEAD.get(device, _OVERHEAD_ELSEWHERE)
        for batch in tight_batches(lengths, overhead, _MOST_TOKENS.get(device, 0), most):
            numbers: dict[int, list[int]] = {}
            for owner, number in sorted(rows[index] for index in batch):
                numbers.setdefault(owner, []).append(number)
            yield [whole[owner]._replace(numbers=own) for owner, own in numbers.items()]

    @contextlib.contextmanager
    def _failing_alone(self, place: int) -> Iterator[None]:
        """Inside, a `RunError` takes a run out of the others; it is kept."""
        try:
            yield
        except RunError as error:
            self.results[place] = error
            del self.active[place]

    def _finish(self) -> None:
        for place, trainer in list(self.active.items()):
            if trainer.is_over:
                self.results[place] = trainer.finish()
                del self.active[place]

    def _interrupt(self) -> None:
        for trainer in self.active.values():
            trainer.save()
        done, total = self._done()
        raise KeyboardInterrupt(f"stopped after {done} of {total} steps of {len(self.runs)} runs")

    def _done(self) -> tuple[int, int]:
        return sum(trainer.position.step for trainer in self.runs), sum(trainer.steps for trainer in self.runs)

    def _report(self, stage: str) -> None:
        if self.progress is not None:
            self.progress(f"{stage} | {len(self.active)} runs together", *self._done())
