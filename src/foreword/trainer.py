"""One run of training: its rows, what is trained, the optimizer, where it stands, the best so far, its folder.

The loops of `foreword.train` (one run) and `foreword.together` (several) ask a `Trainer` which rows come next, give it
their loss with the gradients in its leaves, and measure it on the dev rows when that is due.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foreword.base import BaseModel
from foreword.begin import begin_module, begin_objective, describe_rows, identity_of, parameter_groups
from foreword.config import TrainConfig
from foreword.data import Rows, epoch_batches, ordered_batches
from foreword.errors import RunError
from foreword.objectives import Objective, Predicted
from foreword.parallel import Processes
from foreword.parametrization import PrefixModule
from foreword.prefix import Prefix, Sites, SiteTensors
from foreword.runs import RunFolder, State, peak_memory_bytes, provenance
from foreword.tasks import Split, Task

__all__ = ["Progress", "Step", "TrainResult", "Trainer", "begin_run", "learning_rate"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainResult:
    """The best prefix, the run's numbers (as in `summary.json`), and the run folder if there is one."""

    prefix: Prefix
    metrics: dict[str, Any]
    folder: Path | None = None


def begin_run(
    base: BaseModel,
    prefix: Prefix | None,
    task: Task,
    config: TrainConfig,
    processes: Processes,
    stack: contextlib.ExitStack,
    *,
    out: Path | None,
    overwrite: bool = False,
    progress: Progress | None = None,
    together: int = 1,
) -> Trainer | TrainResult:
    """A run to train, taken up where its folder says, or its result if it is finished.

    `stack` holds the folder; `together` says how many runs are trained at once. Errors as `foreword.train.train`.
    """
    objective = begin_objective(base, prefix, task, config)
    splits = _splits(task, config)
    folder: RunFolder | None = None

    def finished() -> TrainResult | None:
        nonlocal folder
        if out is None:
            return None
        identity = identity_of(base, prefix, task, config, splits)
        folder = stack.enter_context(RunFolder(out, identity, overwrite=overwrite))
        summary = folder.summary()
        return None if summary is None else TrainResult(Prefix.load(folder.prefix, base), summary, out)

    result = processes.from_main(finished)
    if result is not None:
        return result
    rows = {name: _encode(objective, split, config, progress) for name, split in splits.items()}
    module = begin_module(base, prefix, task, config).to(processes.device)
    module.load_state_dict(processes.from_main(module.state_dict))
    trainer = Trainer(module, objective, rows, config, processes, folder, progress)
    trainer.origin = _origin(task, splits)
    record = {
        "options": config.to_dict(), "base": base.name, "processes": processes.count,
        "data": {name: describe_rows(split, rows[name], config.draws_few) for name, split in splits.items()},
        **provenance(base.device),
    }  # fmt: skip
    if together > 1:
        record["together"] = trainer.extra["together"] = together
    state = processes.from_main(lambda: None if folder is None else folder.begin(record))
    if state is not None:
        trainer.restore(state)
    return trainer


def _origin(task: Task, splits: dict[str, Split]) -> dict[str, Any]:
    """What a prefix remembers of its task and rows."""
    origin: dict[str, Any] = {"task": task.name, "data": {name: split.sha256 for name, split in splits.items()}}
    if task.labels:
        origin["labels"] = list(task.labels)
    if reading := getattr(task, "reading", None):
        origin["reading"] = reading
    return origin


def _splits(task: Task, config: TrainConfig) -> dict[str, Split]:
    """The rows to train and to measure on; drawn dev rows are few and all of them count."""
    dev_limit = None if config.draws_few else config.dev_limit or None
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
class Position:
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


class Step(NamedTuple):
    """A step that was begun: its rows by their numbers, the sites in the graph, and their leaves for gradients."""

    batch: list[int]
    sites: Sites
    leaves: Sites


class Trainer:
    """One run between its steps; see `begin_run`."""

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
        self.position = Position()
        self.best: dict[str, Tensor] = {}
        self.unsaved = False
        self.extra: dict[str, Any] = {}
        self.dev_batches = ordered_batches(self.dev.lengths, config.batch_size)
        self.plan: tuple[int, list[list[int]]] = (-1, [])
        self.started = self.saved = time.perf_counter()

    @property
    def is_due(self) -> bool:
        """Whether the dev rows are to be measured before anything else."""
        every, position = self.config.eval_every or self.steps_per_epoch, self.position
        due = position.step > 0 and (position.step % every == 0 or position.step == self.steps)
        return due and position.measured_step != position.step

    @property
    def is_over(self) -> bool:
        """Whether the last step was made or patience has ended."""
        position, patience = self.position, self.config.patience or math.inf
        return position.step == self.steps or position.measurements_without_best >= patience

    def begin_step(self) -> Step:
        """The next step; its loss, and the gradients of the summed nats in its leaves, make it complete."""
        self.optimizer.zero_grad(set_to_none=True)
        sites = self.module()
        leaves = {site: _leaf(tensors) for site, tensors in sites.items()}
        return Step(self._batch(self.position.step), sites, leaves)

    def end_step(self, step: Step, nats: float, units: float, seconds: float) -> None:
        """Move the parameters; `seconds` are what the step has taken so far. `RunError` for what is not finite."""
        start = time.perf_counter()
        position, config = self.position, self.config
        loss = nats / units
        norm = self._backpropagate(step.sites, step.leaves, units)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(f"loss is {loss} and gradient norm {norm} in step {position.step + 1}")
        rate = learning_rate(config, position.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if group["peak"] == config.learning_rate else rate / config.learning_rate * group["peak"]
        self.optimizer.step()
        seconds += time.perf_counter() - start
        read = self.tokens(step)
        position.step += 1
        position.tokens += read
        position.train_seconds += seconds
        self._log({self.loss_name: loss}, learning_rate=rate, gradient_norm=norm, tokens=read, seconds=seconds)
        self.report(f"training | loss {loss:.3f}{self._best_so_far()}")

    def tokens(self, step: Step) -> int:
        """Tokens that are read in a step, without padding."""
        return sum(self.rows.lengths[row] for row in step.batch)

    def _batch(self, step: int) -> list[int]:
        """The rows of a step, from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.plan[0] != epoch:
            self.plan = epoch, epoch_batches(self.rows.lengths, self.config.batch_size, self.config.seed, epoch)
        return self.plan[1][index]

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

    def end_measurement(self, nats: float, units: float, found: dict[int, Predicted], seconds: float) -> None:
        """Take over the loss on the dev rows and what was predicted for each; a new best is kept.

        Raises `RunError` for a loss that is not finite.
        """
        position = self.position
        loss = nats / units
        if not math.isfinite(loss):
            raise self._not_finite(f"dev loss is {loss} after step {position.step}")
        start = time.perf_counter()
        score = self._score(found)
        position.measured_step = position.step
        position.measurements_without_best += 1
        scored = {} if score is None else {f"dev_{self.objective.score_name}": score}
        counted = {f"dev_{self.loss_name}": loss, f"dev_{self.objective.unit}s": int(units)}
        self._log({**counted, **scored}, seconds=seconds + time.perf_counter() - start)
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

    def finish(self) -> TrainResult:
        """The result; the folder is marked as finished."""
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
            **self.extra,
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
        self.position = Position(**state.values["position"])
        self.started = self.saved = time.perf_counter()

    def save(self) -> None:
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

    def save_now_and_then(self) -> None:
        """Save the state if the last time is long enough ago."""
        if time.perf_counter() - self.saved >= self.config.checkpoint_seconds:
            self.save()

    def interrupt(self) -> None:
        """Save the state and raise `KeyboardInterrupt`."""
        self.save()
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

    def report(self, stage: str) -> None:
        """Tell how far the run is."""
        if self.progress is not None and self.processes.is_main:
            self.progress(stage, self.position.step, self.steps)


def _leaf(tensors: SiteTensors) -> SiteTensors:
    """The same numbers, cut from the graph; what is trained gets gradients of its own."""
    return tensors.map(lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad))


def _encode(objective: Objective, split: Split, config: TrainConfig, progress: Progress | None) -> Rows:
    advance = None if progress is None else lambda done, total: progress(f"reading {split.name} rows", done, total)
    return objective.encode(split, strict=config.strict, progress=advance)
