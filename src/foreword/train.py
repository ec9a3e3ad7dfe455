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
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreword.base import BaseModel
from foreword.begin import (
    begin_module,
    begin_objective,
    check_start,
    describe_rows,
    identity_of,
    parameter_groups,
)  # fmt: skip
from foreword.config import TrainConfig
from foreword.data import Rows, epoch_batches, micro_batches, ordered_batches
from foreword.errors import RunError
from foreword.frozen import frozen_training
from foreword.objectives import Objective, Predicted
from foreword.parallel import Processes, checkpoint_layers, shard_model
from foreword.parametrization import PrefixModule
from foreword.prefix import Prefix, Sites, SiteTensors
from foreword.runs import RunFolder, State, peak_memory_bytes, provenance
from foreword.tasks import FewShot, Split, Task, get_task

__all__ = ["TrainResult", "learning_rate", "train"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainResult:
    """The best prefix, the run's numbers (as in `summary.json`), and the run folder if there is one."""

    prefix: Prefix
    metrics: dict[str, Any]
    folder: Path | None = None


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
    task = FewShot(task, config.shots, config.seed) if config.shots else task
    path = None if out is None else Path(out)
    check_start(base, prefix, config)
    processes = Processes(base.device, config.tracker, path)
    if processes.device != base.device:
        base.model.to(processes.device)
    objective = begin_objective(base, prefix, task, config)
    splits = _splits(task, config)
    with contextlib.ExitStack() as stack:
        folder: RunFolder | None = None

        def finished() -> TrainResult | None:
            nonlocal folder
            if path is None:
                return None
            identity = identity_of(base, prefix, task, config, splits)
            folder = stack.enter_context(RunFolder(path, identity, overwrite=overwrite))
            summary = folder.summary()
            return None if summary is None else TrainResult(Prefix.load(folder.prefix, base), summary, path)

        result = processes.from_main(finished)
        if result is not None:
            return result
        rows = {name: _encode(objective, split, config, progress) for name, split in splits.items()}
        module = begin_module(base, prefix, task, config).to(processes.device)
        module.load_state_dict(processes.from_main(module.state_dict))
        trainer = _Trainer(module, objective, rows, config, processes, folder, progress)
        trainer.origin = {"task": task.name, "data": {name: split.sha256 for name, split in splits.items()}}
        if task.labels:
            trainer.origin["labels"] = list(task.labels)
        if reading := getattr(task, "reading", None):
            trainer.origin["reading"] = reading
        record = {
            "options": config.to_dict(), "base": base.name, "processes": processes.count,
            "data": {name: describe_rows(split, rows[name], config.shots > 0) for name, split in splits.items()},
            **provenance(base.device),
        }  # fmt: skip
        state = processes.from_main(lambda: None if folder is None else folder.begin(record))
        if state is not None:
            trainer.restore(state)
        processes.start_tracking(task.name, config.to_dict())
        stack.callback(processes.stop_tracking)
        with _prepared(base, config, processes):
            return trainer.run()


def _splits(task: Task, config: TrainConfig) -> dict[str, Split]:
    """The rows to train and to measure on; drawn dev rows are few and all of them count."""
    dev_limit = None if config.shots else config.dev_limit or None
    return {
        "train": task.split("train", config.train_limit or None, config.strict),
        "dev": task.split("dev", dev_limit, config.strict),
    }


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then as `config.schedule` says.

    >>> config = TrainConfig(learning_rate=1.0, warmup_ratio=0.2, schedule="linear")
    >>> [learning_rate(config, step, 10) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    gone = (step - warmup) / max(1, steps - warmup)
    falls = {"linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2, "constant": 1.0}
    return config.learning_rate * falls[config.schedule]


@dataclass
class _Position:
    """Where a run stands: what was done, the best so far, and how long it took."""

    step: int = 0
    measured_step: int = 0
    best_step: int = 0
    best_dev_loss: float = math.inf
    best_dev_score: float | None = None
    measurements_without_best: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0


class _Trainer:
    """One run: what is trained, the optimizer, the position, and the loop over steps."""

    origin: dict[str, Any]

    def __init__(
        self,
        module: PrefixModule,
        objective: Objective,
        rows: dict[str, Rows],
        config: TrainConfig,
        processes: Processes,
        folder: RunFolder | None,
        progress: Progress | None,
    ) -> None:
        self.module, self.objective, self.head = module, objective, objective.head
        self.config, self.processes, self.folder, self.progress = config, processes, folder, progress
        self.rows, self.dev = rows["train"], rows["dev"]
        self.skipped = sum(len(each.skipped) for each in rows.values())
        self.steps_per_epoch = -(-len(self.rows) // config.batch_size)
        self.steps = config.max_steps or config.epochs * self.steps_per_epoch
        groups = parameter_groups(module, self.head, config)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups, config.learning_rate, (config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self.by_score = config.select == "score" or (config.select == "auto" and bool(objective.score_name))
        self.loss_name = f"nats_per_{objective.unit}"
        self.position = _Position()
        self.best: dict[str, Tensor] = {}
        self.unsaved = False
        self.dev_batches = ordered_batches(self.dev.lengths, config.batch_size)
        self.plan: tuple[int, list[list[int]]] = (-1, [])
        self.started = self.saved = time.perf_counter()

    def run(self) -> TrainResult:
        """Step and measure until the last step or until patience ends."""
        every = self.config.eval_every or self.steps_per_epoch
        position = self.position
        self._report("training")
        with _interruptible() as interrupted:
            while True:
                due = position.step > 0 and (position.step % every == 0 or position.step == self.steps)
                if due and position.measured_step != position.step:
                    self._measure(interrupted)
                patience = self.config.patience or math.inf
                if position.step == self.steps or position.measurements_without_best >= patience:
                    return self._finish()
                if self._step(interrupted()):
                    self._interrupt()
                if time.perf_counter() - self.saved >= self.config.checkpoint_seconds:
                    self._save()

    def _step(self, interrupted: bool) -> bool:
        """One optimizer step; whether any process was interrupted."""
        start = time.perf_counter()
        position, config = self.position, self.config
        batch = self._batch(position.step)
        self.optimizer.zero_grad(set_to_none=True)
        sites = self.module()
        leaves = {site: _leaf(tensors) for site, tensors in sites.items()}
        nats, units, stop = self.processes.totals(*self._loss(batch, leaves), interrupted)
        loss = nats / units
        norm = self._backpropagate(sites, leaves, units)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(f"loss is {loss} and gradient norm {norm} in step {position.step + 1}")
        rate = learning_rate(config, position.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if group["peak"] == config.learning_rate else rate / config.learning_rate * group["peak"]
        self.optimizer.step()
        seconds = time.perf_counter() - start
        read = sum(self.rows.lengths[row] for row in batch)
        position.step += 1
        position.tokens += read
        position.train_seconds += seconds
        self._log({self.loss_name: loss}, learning_rate=rate, gradient_norm=norm, tokens=read, seconds=seconds)
        self._report(f"training | loss {loss:.3f}{self._best_so_far()}")
        return stop > 0

    def _batch(self, step: int) -> list[int]:
        """The rows of a step, from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.plan[0] != epoch:
            self.plan = epoch, epoch_batches(self.rows.lengths, self.config.batch_size, self.config.seed, epoch)
        return self.plan[1][index]

    def _parts(self, batch: Sequence[int]) -> list[list[int]]:
        """The passes of this process over a batch, as row numbers."""
        return micro_batches(batch, self.config.micro_batch_size, self.processes.rank, self.processes.count)

    def _loss(self, batch: Sequence[int], leaves: Sites) -> tuple[float, int]:
        """Nats of this process's part of a batch, and of how many units; gradients are added up in leaves and head."""
        nats, units = 0.0, 0
        for part in self._parts(batch):
            # A process without a row of its own still takes part: a sharded model needs all processes in each pass.
            loss, count = self.objective.loss(self.rows, part or batch[:1], leaves, self.position.step)
            if not part:
                loss, count = 0 * loss, 0
            loss.backward()
            nats, units = nats + loss.item(), units + count
        return nats, units

    def _backpropagate(self, sites: Sites, leaves: Sites, units: float) -> float:
        """Gradients of the mean loss in the parameters, clipped; their norm before."""
        pairs = [
            (tensor, leaf)
            for site in sites
            for tensor, leaf in zip(sites[site].named().values(), leaves[site].named().values(), strict=True)
            if tensor.requires_grad
        ]
        heads = [] if self.head is None else list(self.head.parameters())
        own = [*(leaf for _, leaf in pairs), *heads]
        gradients = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in own]
        gradients = [gradient / units for gradient in self.processes.sum(gradients)]
        torch.autograd.backward([tensor for tensor, _ in pairs], gradients[: len(pairs)])
        for parameter, gradient in zip(heads, gradients[len(pairs) :], strict=True):
            parameter.grad = gradient
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf))

    def _measure(self, interrupted: Callable[[], bool]) -> None:
        """The loss and, where labels are predicted, the score on the dev rows; a new best is kept."""
        start = time.perf_counter()
        nats, units, position = 0.0, 0, self.position
        found: dict[int, Predicted] = {}
        with torch.no_grad():
            sites = self.module()
            for number, batch in enumerate(self.dev_batches, start=1):
                if interrupted() and self.processes.count == 1:
                    self._interrupt()
                for part in self._parts(batch):
                    measured = self.objective.measure(self.dev, part or batch[:1], sites)
                    if part:
                        nats, units = nats + measured.nats, units + measured.units
                        found.update(zip(part, measured.predictions, strict=False))
                if self.progress is not None and self.processes.is_main:
                    self.progress(f"dev loss | step {position.step}", number, len(self.dev_batches))
        total_nats, total_units = self.processes.totals(nats, units)
        loss = total_nats / total_units
        if not math.isfinite(loss):
            raise self._not_finite(f"dev loss is {loss} after step {position.step}")
        score = self._score(found)
        position.measured_step = position.step
        position.measurements_without_best += 1
        scored = {} if score is None else {f"dev_{self.objective.score_name}": score}
        counted = {f"dev_{self.loss_name}": loss, f"dev_{self.objective.unit}s": int(total_units)}
        self._log({**counted, **scored}, seconds=time.perf_counter() - start)
        self._compare(loss, score)

    def _score(self, found: dict[int, Predicted]) -> float | None:
        """The selecting metric of the predictions of all processes."""
        if not self.objective.score_name:
            return None
        whole = self.processes.merged(found)
        return self.objective.score(self.dev, [whole[row] for row in range(len(self.dev))])

    def _compare(self, loss: float, score: float | None) -> None:
        """Keep what is trained if it is a new best: by its score, then by its loss."""
        position = self.position
        before = -math.inf if position.best_dev_score is None else position.best_dev_score
        better = loss < position.best_dev_loss
        if self.by_score and score is not None and score != before:
            better = score > before
        if not better:
            return
        position.best_dev_loss, position.best_dev_score, position.best_step = loss, score, position.step
        position.measurements_without_best = 0
        self.best = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        self.unsaved = True
        if self.folder is not None and not self.folder.prefix.exists():
            self._save_best()

    def _save_best(self) -> None:
        """Write the best prefix if that was not done; after the first one this happens whenever the state is saved."""
        if self.folder is None or not self.unsaved:
            return
        now = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        self._load(self.best)
        self.folder.save_prefix(self._fold())
        self._load(now)
        self.unsaved = False

    def _tensors(self) -> dict[str, Tensor]:
        """All that is trained, by name."""
        head = {} if self.head is None else self.head.state_dict()
        return {**self.module.state_dict(), **{f"head.{name}": tensor for name, tensor in head.items()}}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        self.module.load_state_dict(own)
        if self.head is not None:
            self.head.load_state_dict({name: tensors[f"head.{name}"] for name in self.head.state_dict()})

    def _fold(self) -> Prefix:
        """What is trained as a prefix, with what is known of its training."""
        folded = self.module.fold(keep_training_state=self.config.keep_training_state)
        position, name = self.position, self.objective.score_name
        metrics = {f"dev_{self.loss_name}": position.best_dev_loss, "step": position.best_step}
        if position.best_dev_score is not None:
            metrics[f"dev_{name}"] = position.best_dev_score
        metadata = {**folded.metadata, **self.origin, "metrics": metrics, "training": self.config.decisive()}
        sites = {site: tensors.map(lambda t: t.cpu()) for site, tensors in folded.sites.items()}
        head = folded.head
        if self.head is not None:
            head, metadata["max_tokens"] = self.head.fold(), self.config.max_tokens
        return replace(folded, sites=sites, metadata=metadata, head=head)

    def _finish(self) -> TrainResult:
        self._load(self.best)
        prefix, position = self._fold(), self.position
        self._tick()
        summary = {
            "steps": position.step, "planned_steps": self.steps, "epochs": position.step / self.steps_per_epoch,
            "best_step": position.best_step, "best_dev_loss": position.best_dev_loss,
            "best_dev_score": position.best_dev_score, "score": self.objective.score_name, "tokens": position.tokens,
            "tokens_per_second": position.tokens / position.train_seconds, "train_seconds": position.train_seconds,
            "wall_seconds": position.wall_seconds, "peak_memory_bytes": peak_memory_bytes(self.processes.device),
            "train_rows": len(self.rows), "dev_rows": len(self.dev), "skipped_rows": self.skipped,
            "cut_rows": self.rows.cut + self.dev.cut,
            "head_parameters": 0 if self.head is None else sum(p.numel() for p in self.head.parameters()),
            "trained_parameters": sum(p.numel() for p in self.parameters), "processes": self.processes.count,
        }  # fmt: skip
        if self.folder is not None:
            self.folder.save_prefix(prefix)
            self.folder.finish(summary)
        path = None if self.folder is None else self.folder.path
        return TrainResult(prefix, {"status": "finished", **summary}, path)

    def restore(self, state: State) -> None:
        """Go on from a saved state."""
        parts: dict[str, dict[str, Tensor]] = {"module": {}, "best": {}, "optimizer": {}}
        for name, tensor in state.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self._load(parts["module"])
        self.best, self.unsaved = parts["best"], bool(parts["best"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, slot = name.partition(".")
            slots.setdefault(int(index), {})[slot] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.position = _Position(**state.values["position"])
        self.started = self.saved = time.perf_counter()

    def _save(self) -> None:
        """Keep everything that the next step depends on."""
        self._tick()
        if self.folder is not None:
            slots = self.optimizer.state_dict()["state"]
            tensors = {f"module.{name}": tensor for name, tensor in self._tensors().items()}
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
            tensors |= {f"optimizer.{i}.{name}": t for i, values in slots.items() for name, t in values.items()}
            self.folder.save_state(State(tensors, {"position": asdict(self.position)}))
            self._save_best()
        self.saved = time.perf_counter()

    def _tick(self) -> None:
        """Bring the wall time up to date."""
        now = time.perf_counter()
        self.position.wall_seconds += now - self.started
        self.started = now

    def _interrupt(self) -> None:
        self._save()
        where = "" if self.folder is None else "; the same command resumes"
        raise KeyboardInterrupt(f"stopped after step {self.position.step} of {self.steps}{where}")

    def _not_finite(self, got: str) -> RunError:
        self._save_best()
        kept = "" if self.folder is None or not self.best else f" (the best prefix so far is {self.folder.prefix})"
        return RunError(got, "finite numbers", f"lower learning_rate or clip{kept}")

    def _log(self, named: dict[str, float], **others: float) -> None:
        """A line of metrics, for the folder and the tracker."""
        values = {**named, **others}
        step = self.position.step
        if self.folder is not None:
            self.folder.log(step=step, epoch=step / self.steps_per_epoch, **values)
        self.processes.track(values, step)

    def _best_so_far(self) -> str:
        if not self.best:
            return ""
        score = self.position.best_dev_score
        shown = f"{self.position.best_dev_loss:.3f}" if score is None else f"{self.objective.score_name} {score:.1f}"
        return f" | best dev {shown}"

    def _report(self, stage: str) -> None:
        if self.progress is not None and self.processes.is_main:
            self.progress(stage, self.position.step, self.steps)


def _leaf(tensors: SiteTensors) -> SiteTensors:
    """The same numbers, cut from the graph; what is trained gets gradients of its own."""
    return tensors.map(lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad))


def _encode(objective: Objective, split: Split, config: TrainConfig, progress: Progress | None) -> Rows:
    advance = None if progress is None else lambda done, total: progress(f"reading {split.name} rows", done, total)
    return objective.encode(split, strict=config.strict, progress=advance)


@contextlib.contextmanager
def _prepared(base: BaseModel, config: TrainConfig, processes: Processes) -> Iterator[None]:
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
def _interruptible() -> Iterator[Callable[[], bool]]:
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
