"""What a run begins with: checks, what is trained, what tells it from other runs, and the record of its rows."""

from __future__ import annotations

from typing import Any

from torch import nn

from foreword.base import BaseModel
from foreword.config import TrainConfig
from foreword.data import Rows
from foreword.errors import ConfigError, PrefixError
from foreword.gates import GateOptions
from foreword.init import new_prefix
from foreword.metrics import get_metric
from foreword.objectives import HeadOptions, Objective, objective_of
from foreword.parametrization import PrefixModule, parametrize
from foreword.prefix import Prefix
from foreword.tasks import Split, Task

__all__ = ["begin_module", "begin_objective", "check_start", "describe_rows", "identity_of", "parameter_groups"]


def check_start(base: BaseModel, prefix: Prefix | None, config: TrainConfig) -> None:
    """Raise what `foreword.train.train` says unless training can start from this."""
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


def begin_objective(base: BaseModel, prefix: Prefix | None, task: Task, config: TrainConfig) -> Objective:
    """What training lowers; a prefix with a head goes on with it."""
    options = HeadOptions(config.head_pooling, config.head_dropout, config.max_tokens, config.seed)
    objective = objective_of(base, task, options, None if prefix is None else prefix.head)
    if objective.score_name:  # a metric whose package is missing is found out now, not after the first epoch
        metric = get_metric(objective.score_name)
        metric.ready()
        if not metric.higher_is_better or metric.needs == "sources":
            raise ConfigError(
                f"metric {metric.name!r} to select by for task {task.name!r}", "one of labels, higher is better",
                "name another first",
            )  # fmt: skip
    if config.select == "score" and not objective.score_name:
        raise ConfigError(
            f"select 'score' for task {task.name!r}, in which nothing is predicted while training", "loss or auto",
            "correct select",
        )  # fmt: skip
    return objective


def begin_module(base: BaseModel, prefix: Prefix | None, task: Task, config: TrainConfig) -> PrefixModule:
    """The prefix that is trained, at its beginning."""
    if prefix is None:
        text = config.text or task.instruction
        length = max(1, round(config.length * config.length_factor))
        prefix = new_prefix(base, length, config.init, text=text or None, seed=config.seed)
    gates = GateOptions(
        config.gates, config.slot_gates, config.layer_gates, config.gate_pooling, config.layer_gate_start
    )
    direct = config.parametrization == "direct"
    return parametrize(
        prefix,
        config.parametrization,
        hidden=None if direct else config.hidden_size,
        freeze_first_slot=config.freeze_first_slot if direct else config.freeze_first_slot or None,
        seed=config.seed,
        gates=gates,
        hidden_sizes=base.hidden_sizes,
    )


def parameter_groups(module: PrefixModule, head: nn.Module | None, config: TrainConfig) -> list[dict[str, Any]]:
    """What is trained, in groups for an optimizer: the prefix, its gates and the head, each at its own peak rate."""
    gates = [] if module.gates is None else [p for p in module.gates.parameters() if p.requires_grad]
    known = {id(parameter) for parameter in gates}
    own = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    heads = [] if head is None else list(head.parameters())
    rate = config.learning_rate
    # W sums over hundreds of hidden units that Adam moves alike, so that gates soon saturate at the prefix's rate.
    rates = (rate, config.gate_learning_rate or rate / 10, config.head_learning_rate or rate)
    groups = zip((own, gates, heads), rates, strict=True)
    return [{"params": parameters, "lr": peak, "peak": peak} for parameters, peak in groups if parameters]


def identity_of(
    base: BaseModel, prefix: Prefix | None, task: Task, config: TrainConfig, splits: dict[str, Split]
) -> dict[str, Any]:
    """What decides the result: a run folder is for one identity."""
    start = f"text {config.text or task.instruction!r}" if prefix is None else f"prefix {prefix.sha256(training=True)}"
    return {
        **config.decisive(), "task": task.name, "start": start, "base": base.fingerprint,
        "dtype": str(base.dtype).removeprefix("torch."),
        "data": {name: split.sha256 for name, split in splits.items()},
    }  # fmt: skip


def describe_rows(split: Split, rows: Rows, chosen: bool) -> dict[str, Any]:
    """What a run records of a split; of `chosen` rows also which they are."""
    skipped = [{"row": row, "reason": reason} for row, reason in rows.skipped]
    described: dict[str, Any] = {
        "source": split.source, "sha256": split.sha256, "rows": len(rows), "skipped": skipped,
    }  # fmt: skip
    if rows.cut:
        described["cut_rows"] = rows.cut
    if chosen:
        described["chosen"] = [{"row": example.row, "id": example.id} for example in rows.examples]
    return described
