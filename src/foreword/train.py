"""Training: examples in, the best prefix out. The loop, top to bottom.

The base model never holds a trainable parameter. Each step reads the prefix's sites once, lays detached copies
(leaves) before the attention, and takes the leaves' gradients back through the prefix's parametrization. Only
these small gradients are summed over micro-batches and processes, so how a batch is cut changes no more than
the rounding. A step depends on the state and on its number alone: the one random thing, the order of the rows,
is a function of seed and epoch. So a run that was killed and taken up again ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from foreword.config import TrainConfig
from foreword.data import Rows, encode_split, epoch_batches, micro_batches, ordered_batches
from foreword.errors import ConfigError, PrefixError, RunError, UnsupportedModel
from foreword.frozen import frozen_training
from foreword.init import new_prefix
from foreword.parallel import Processes, checkpoint_layers, shard_model
from foreword.parametrization import PrefixModule, parametrize
from foreword.prefix import Prefix, Sites, SiteTensors
from foreword.runs import RunFolder, State, peak_memory_bytes, provenance
from foreword.tasks import Split, Task, get_task

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
    path = None if out is None else Path(out)
    _check(base, prefix, config)
    processes = Processes(base.device, config.tracker, path)
    if processes.device != base.device:
        base.model.to(processes.device)
    splits = {
        "train": task.split("train", config.train_limit or None, config.strict),
        "dev": task.split("dev", config.dev_limit or None, config.strict),
    }
    with contextlib.ExitStack() as stack:
        folder: RunFolder | None = None

        def finished() -> TrainResult | None:
            nonlocal folder
            if path is None:
                return None
            identity = _identity(base, prefix, task, config, splits)
            folder = stack.enter_context(RunFolder(path, identity, overwrite=overwrite))
            summary = folder.summary()
            return None if summary is None else TrainResult(Prefix.load(folder.prefix, base), summary, path)

        result = processes.from_main(finished)
        if result is not None:
            return result
        rows = {name: _encode(base, split, config, progress) for name, split in splits.items()}
        module = _module(base, prefix, task, config).to(processes.device)
        module.load_state_dict(processes.from_main(module.state_dict))
        trainer = _Trainer(base, module, rows, config, processes, folder, progress)
        trainer.origin = {"task": task.name, "data": {name: split.sha256 for name, split in splits.items()}}
        record = {
            "options": config.to_dict(), "base": base.name, "processes": processes.count,
            "data": {name: _describe(split, rows[name]) for name, split in splits.items()},
            **provenance(base.device),
        }  # fmt: skip
        state = processes.from_main(lambda: None if folder is None else folder.begin(record))
        if state is not None:
            trainer.restore(state)
        processes.start_tracking(task.name, config.to_dict())
        stack.callback(processes.stop_tracking)
        with _prepared(base, config, processes):
            return trainer.run()


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
    measurements_without_best: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0


class _Trainer:
    """One run: the module, the optimizer, the position, and the loop over steps."""

    origin: dict[str, Any]

    def __init__(
        self,
        base: BaseModel,
        module: PrefixModule,
        rows: dict[str, Rows],
        config: TrainConfig,
        processes: Processes,
        folder: RunFolder | None,
        progress: Progress | None,
    ) -> None:
        self.base, self.module, self.config, self.processes = base, module, config, processes
        self.folder, self.progress = folder, progress
        self.rows, self.dev = rows["train"], rows["dev"]
        self.skipped = sum(len(each.skipped) for each in rows.values())
        self.steps_per_epoch = -(-len(self.rows) // config.batch_size)
        self.steps = config.max_steps or config.epochs * self.steps_per_epoch
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.learning_rate, (config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self.position = _Position()
        self.best: dict[str, Tensor] = {}
        self.lengths = self.rows.lengths
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
        sites = self.module()
        leaves = {site: _leaf(tensors) for site, tensors in sites.items()}
        own = self._loss(self.rows, batch, leaves, backward=True)
        nats, tokens, stop = self.processes.totals(*own, interrupted)
        loss = nats / tokens
        norm = self._backpropagate(sites, leaves, tokens)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(f"loss is {loss} and gradient norm {norm} in step {position.step + 1}")
        rate = learning_rate(config, position.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        seconds = time.perf_counter() - start
        read = sum(self.lengths[row] for row in batch)
        position.step += 1
        position.tokens += read
        position.train_seconds += seconds
        self._log(nats_per_token=loss, learning_rate=rate, gradient_norm=norm, tokens=read, seconds=seconds)
        best = "" if math.isinf(position.best_dev_loss) else f" | best dev {position.best_dev_loss:.3f}"
        self._report(f"training | loss {loss:.3f}{best}")
        return stop > 0

    def _batch(self, step: int) -> list[int]:
        """The rows of a step, from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.plan[0] != epoch:
            self.plan = epoch, epoch_batches(self.lengths, self.config.batch_size, self.config.seed, epoch)
        return self.plan[1][index]

    def _loss(self, rows: Rows, batch: Sequence[int], sites: Sites, backward: bool) -> tuple[float, int]:
        """Nats and completion tokens of this process's part of a batch; its gradients are added up in `sites`."""
        nats, tokens = 0.0, 0
        for part in micro_batches(batch, self.config.micro_batch_size, self.processes.rank, self.processes.count):
            # A process without a row of its own still takes part: a sharded model needs all processes in each pass.
            inputs = self.base.collate([rows.encoded[row] for row in part or batch[:1]])
            if not part:
                inputs["labels"].fill_(-100)
            loss, count = self.base.completion_loss(inputs, sites)
            if backward:
                loss.backward()
            nats, tokens = nats + loss.item(), tokens + count
        return nats, tokens

    def _backpropagate(self, sites: Sites, leaves: Sites, tokens: float) -> float:
        """Gradients of the mean loss in the parameters, clipped; their norm before."""
        self.optimizer.zero_grad(set_to_none=True)
        pairs = [
            (tensor, leaf)
            for site in sites
            for tensor, leaf in ((sites[site].keys, leaves[site].keys), (sites[site].values, leaves[site].values))
            if tensor.requires_grad
        ]
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for _, leaf in pairs]
        gradients = [gradient / tokens for gradient in self.processes.sum(gradients)]
        torch.autograd.backward([tensor for tensor, _ in pairs], gradients)
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf))

    def _measure(self, interrupted: Callable[[], bool]) -> None:
        """The dev loss; a new best is kept."""
        start = time.perf_counter()
        nats, tokens, position = 0.0, 0, self.position
        batches = ordered_batches(self.dev.lengths, self.config.batch_size)
        with torch.no_grad():
            sites = self.module()
            for number, batch in enumerate(batches, start=1):
                if interrupted() and self.processes.count == 1:
                    self._interrupt()
                part = self._loss(self.dev, batch, sites, backward=False)
                nats, tokens = nats + part[0], tokens + part[1]
                if self.progress is not None and self.processes.is_main:
                    self.progress(f"dev loss | step {position.step}", number, len(batches))
        total_nats, total_tokens = self.processes.totals(nats, tokens)
        loss = total_nats / total_tokens
        if not math.isfinite(loss):
            raise self._not_finite(f"dev loss is {loss} after step {position.step}")
        position.measured_step = position.step
        position.measurements_without_best += 1
        self._log(dev_nats_per_token=loss, dev_tokens=int(total_tokens), seconds=time.perf_counter() - start)
        if loss < position.best_dev_loss:
            position.best_dev_loss, position.best_step = loss, position.step
            position.measurements_without_best = 0
            self.best = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
            if self.folder is not None:
                self.folder.save_prefix(self._fold())

    def _fold(self) -> Prefix:
        """The module as a prefix, with what is known of its training."""
        folded = self.module.fold(keep_training_state=self.config.keep_training_state)
        metrics = {"dev_nats_per_token": self.position.best_dev_loss, "step": self.position.best_step}
        metadata = {**folded.metadata, **self.origin, "metrics": metrics, "training": self.config.decisive()}
        sites = {site: tensors.map(lambda t: t.cpu()) for site, tensors in folded.sites.items()}
        return replace(folded, sites=sites, metadata=metadata)

    def _finish(self) -> TrainResult:
        self.module.load_state_dict(self.best)
        prefix, position = self._fold(), self.position
        self._tick()
        summary = {
            "steps": position.step, "planned_steps": self.steps, "epochs": position.step / self.steps_per_epoch,
            "best_step": position.best_step, "best_dev_loss": position.best_dev_loss, "tokens": position.tokens,
            "tokens_per_second": position.tokens / position.train_seconds, "train_seconds": position.train_seconds,
            "wall_seconds": position.wall_seconds, "peak_memory_bytes": peak_memory_bytes(self.processes.device),
            "train_rows": len(self.rows), "dev_rows": len(self.dev), "skipped_rows": self.skipped,
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
        self.module.load_state_dict(parts["module"])
        self.best = parts["best"]
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
            tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
            tensors |= {f"optimizer.{i}.{name}": t for i, values in slots.items() for name, t in values.items()}
            self.folder.save_state(State(tensors, {"position": asdict(self.position)}))
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
        kept = "" if self.folder is None or not self.best else f" (the best prefix so far is {self.folder.prefix})"
        return RunError(got, "finite numbers", f"lower learning_rate or clip{kept}")

    def _log(self, **values: float) -> None:
        """A line of metrics, for the folder and the tracker."""
        step = self.position.step
        if self.folder is not None:
            self.folder.log(step=step, epoch=step / self.steps_per_epoch, **values)
        self.processes.track(values, step)

    def _report(self, stage: str) -> None:
        if self.progress is not None and self.processes.is_main:
            self.progress(stage, self.position.step, self.steps)


def _leaf(tensors: SiteTensors) -> SiteTensors:
    """The same numbers, cut from the graph, with gradients of their own."""
    keys, values = (tensor.detach().requires_grad_() for tensor in (tensors.keys, tensors.values))
    return SiteTensors(keys, values, tensors.log_mass)


def _check(base: BaseModel, prefix: Prefix | None, config: TrainConfig) -> None:
    if base.family.kind == "encoder":
        raise UnsupportedModel(
            f"{base.name!r} is an encoder and writes no completions", "a decoder or encoder-decoder",
            "choose another base model",
        )  # fmt: skip
    dtype = str(base.dtype).removeprefix("torch.")
    if config.precision not in ("auto", dtype):
        raise ConfigError(
            f"precision {config.precision!r} with a base model in {dtype}", "the same",
            f"load it with dtype={config.precision!r} or choose precision 'auto'",
        )  # fmt: skip
    if prefix is None:
        return
    prefix.check_base(base.name, base.fingerprint, base.geometry)
    if prefix.position_offset:
        raise PrefixError(
            f"a prefix with position offset {prefix.position_offset} to train", "position offset 0",
            "start from a native prefix",
        )  # fmt: skip


def _module(base: BaseModel, prefix: Prefix | None, task: Task, config: TrainConfig) -> PrefixModule:
    """What is trained, at its beginning."""
    if prefix is None:
        text = config.text or task.instruction
        prefix = new_prefix(base, config.length, config.init, text=text or None, seed=config.seed)
    if config.parametrization == "direct":
        return parametrize(prefix, "direct", freeze_first_slot=config.freeze_first_slot)
    frozen = config.freeze_first_slot or None
    return parametrize(prefix, "mlp", hidden=config.hidden_size, freeze_first_slot=frozen, seed=config.seed)


def _identity(
    base: BaseModel, prefix: Prefix | None, task: Task, config: TrainConfig, splits: dict[str, Split]
) -> dict[str, Any]:
    """What decides the result: a run folder is for one identity."""
    start = f"text {config.text or task.instruction!r}" if prefix is None else f"prefix {_digest(prefix)}"
    return {
        **config.decisive(), "task": task.name, "start": start, "base": base.fingerprint,
        "dtype": str(base.dtype).removeprefix("torch."),
        "data": {name: split.sha256 for name, split in splits.items()},
    }  # fmt: skip


def _digest(prefix: Prefix) -> str:
    """A hash of all tensors that training starts from."""
    digest = hashlib.sha256()
    tensors = [(str(site), tensor) for site, each in prefix.sites.items() for tensor in each if tensor is not None]
    for name, tensor in [*tensors, *sorted((prefix.training_state or {}).items())]:
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _encode(base: BaseModel, split: Split, config: TrainConfig, progress: Progress | None) -> Rows:
    advance = None if progress is None else lambda done, total: progress(f"reading {split.name} rows", done, total)
    return encode_split(base, split, strict=config.strict, progress=advance)


def _describe(split: Split, rows: Rows) -> dict[str, Any]:
    """What a run records of a split."""
    skipped = [{"row": row, "reason": reason} for row, reason in rows.skipped]
    return {"source": split.source, "sha256": split.sha256, "rows": len(rows), "skipped": skipped}


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
