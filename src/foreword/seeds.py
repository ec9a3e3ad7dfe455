"""One training with several seeds: a run folder for each, their test scores, and how far these spread.

seed0/ seed1/ ...   ordinary run folders, each with its evaluation
summary.json        mean, standard deviation and interval of every score, and the scores of each seed
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from foreword.base import BaseModel
from foreword.config import TrainConfig
from foreword.errors import ConfigError, RunError
from foreword.evaluate import Evaluation, evaluate, writing_options
from foreword.metrics import Metric, get_metric
from foreword.prefix import Prefix
from foreword.runs import EVALUATION, SUMMARY, is_run, provenance
from foreword.storage import write_atomic
from foreword.tasks import Task, get_task
from foreword.train import TrainResult, train

__all__ = ["SeedsResult", "Spread", "evaluate_run", "spread", "train_seeds"]

Progress = Callable[[str, int, int], None]


class Spread(NamedTuple):
    """A score over several seeds: mean, standard deviation (n - 1), the ends of its 95 % interval, and each seed's.

    >>> str(Spread(71.0, 2.0, 67.5, 74.5, (69.0, 71.0, 73.0)))
    '71.0 ± 2.0 [67.5, 74.5]'
    """

    mean: float
    std: float
    low: float
    high: float
    per_seed: tuple[float, ...]

    def __str__(self) -> str:
        return format(self, ".1f")

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.std:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class SeedsResult:
    """The runs of all seeds, their evaluations where these were asked for, and the spread of every score."""

    seeds: tuple[int, ...]
    runs: list[TrainResult]
    evaluations: list[Evaluation]
    scores: dict[str, Spread]


def train_seeds(
    base: BaseModel,
    prefix: Prefix | Callable[[TrainConfig], Prefix | None] | None,
    task: Task | str,
    config: TrainConfig | None = None,
    *,
    seeds: int,
    out: str | Path,
    test: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SeedsResult:
    """Train with `seeds` seeds, from `config.seed` on, each in a run folder of its own under `out`.

    The order of rows and all random parts depend on the seed, and drawn rows too where there is no `sample_seed`.
    `prefix` is what all start from, or says for the options of each seed what that one starts from. With `test` each is
    scored on the test split, and `summary.json` tells how the scores spread. The same call goes on where it was
    stopped; what is finished is not done again. Raises what `train` and `evaluate` raise.
    """
    config = config or TrainConfig()
    task = get_task(task) if isinstance(task, str) else task
    path = Path(out)
    if seeds < 1:
        raise ConfigError(f"seeds {seeds}", "at least 1", "correct it")
    if is_run(path):
        raise RunError(f"{path} is the folder of a single run", "an unused name", "choose another --out")
    numbers = tuple(range(config.seed, config.seed + seeds))
    runs, evaluations = [], []
    for number in numbers:
        advance = None if progress is None else _named(progress, f"seed {number}")
        chosen, folder = replace(config, seed=number), path / f"seed{number}"
        begin = prefix(chosen) if callable(prefix) else prefix
        runs.append(train(base, begin, task, chosen, out=folder, overwrite=overwrite, progress=advance))
        if test:
            evaluations.append(evaluate_run(base, runs[-1], task, progress=advance))
    scores = spreads(evaluations) if evaluations else {}
    summary = _summary(base, task, config, numbers, runs, evaluations, scores)
    write_atomic(path / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return SeedsResult(numbers, runs, evaluations, scores)


def _named(progress: Progress, name: str) -> Progress:
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)


def evaluate_run(base: BaseModel, run: TrainResult, task: Task | str, progress: Progress | None = None) -> Evaluation:
    """The test scores of a finished run, kept in its folder; not computed again for the same rows, options, dtype."""
    task = get_task(task) if isinstance(task, str) else task
    kept = None if run.folder is None else run.folder / EVALUATION
    if kept is not None and kept.exists():
        known = Evaluation.load(kept)
        rows = {"task": task.name, "split": "test", "data_sha256": task.split("test").sha256}
        asked = {**rows, **writing_options(task)}, tuple(task.metrics), str(base.dtype).removeprefix("torch.")
        if (known.protocol, tuple(known.scores), known.record.get("dtype")) == asked:
            return known
    advance = None if progress is None else lambda done, total: progress("test", done, total)
    evaluation = evaluate(base, run.prefix, task, "test", progress=advance)
    if kept is not None:
        evaluation.save(kept)
    return evaluation


def spreads(evaluations: Sequence[Evaluation]) -> dict[str, Spread]:
    """How every score spreads over evaluations of the same rows."""
    found = {}
    for name in evaluations[0].scores:
        metric = get_metric(name)
        answers = [[output.text for output in each.outputs] for each in evaluations]
        sources = metric.needs == "sources"
        outputs = evaluations[0].outputs
        found[name] = spread(metric, answers, [row.prompt if sources else row.references for row in outputs])
    return found


def spread(
    metric: Metric, answers: Sequence[Sequence[str]], targets: Any, samples: int = 1000, seed: int = 0
) -> Spread:
    """The spread of a metric over seeds, each with an answer for every row.

    The interval is a percentile bootstrap on two levels: every sample draws seeds, and rows, with replacement; the
    rows are the same for all of its seeds, as the seeds were scored on the same rows. It answers how far the mean
    would move with other seeds and other rows.

    >>> spread(get_metric("exact_match"), [["a", "b"], ["a", "c"]], [["a"], ["c"]])[:2]
    (75.0, 35.35533905932738)
    """
    numbers = [metric.statistics(each, targets) for each in answers]
    scores = [float(metric.score(each.sum(axis=0))) for each in numbers]
    generator = np.random.default_rng(seed)
    rows = len(targets)
    means = []
    for _ in range(samples):
        times = generator.multinomial(rows, np.full(rows, 1.0 / rows))
        drawn, counts = np.unique(generator.integers(len(scores), size=len(scores)), return_counts=True)
        resampled = [metric.score(times @ numbers[each]) for each in drawn]
        means.append(float(np.average(resampled, weights=counts)))
    mean = statistics.fmean(scores)
    low, high = np.percentile(means, [2.5, 97.5])
    deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return Spread(mean, deviation, min(float(low), mean), max(float(high), mean), tuple(scores))


def _summary(
    base: BaseModel,
    task: Task,
    config: TrainConfig,
    numbers: Sequence[int],
    runs: Sequence[TrainResult],
    evaluations: Sequence[Evaluation],
    scores: dict[str, Spread],
) -> dict[str, Any]:
    """What the folder of all seeds says of them."""
    kept = ("best_dev_score", "best_dev_loss", "best_step", "steps", "train_seconds", "wall_seconds", "tokens")
    first = runs[0]
    summary: dict[str, Any] = {
        "status": "finished", "task": task.name, "base": base.name, "seeds": list(numbers),
        "options": {**config.to_dict(), "seed": None},
        "scores": {name: each._asdict() for name, each in scores.items()},
        "runs": [
            {"seed": number, **{key: run.metrics.get(key) for key in kept}}
            for number, run in zip(numbers, runs, strict=True)
        ],
        "trained_parameters": first.metrics["trained_parameters"], "prefix_parameters": first.prefix.num_parameters,
        **provenance(base.device),
    }  # fmt: skip
    if evaluations:
        tested = evaluations[0]
        summary["test"] = {
            "rows": len(tested.outputs), "data_sha256": tested.data_sha256, "skipped_rows": tested.skipped_rows,
            "cut_rows": tested.cut_rows, "seconds": sum(each.seconds for each in evaluations),
        }  # fmt: skip
    return summary
