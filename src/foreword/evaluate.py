"""Evaluation: generate for every row of a split, score against the references, with bootstrap intervals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from foreword.base import BaseModel
from foreword.metrics import bootstrap_interval, get_metric
from foreword.prefix import Prefix
from foreword.storage import write_atomic
from foreword.tasks import Example, Task, get_task

__all__ = ["Evaluation", "Interval", "Output", "evaluate", "score_outputs"]


class Interval(NamedTuple):
    """A score with the ends of its 95 % bootstrap interval over rows."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Output:
    """What the model wrote for one row."""

    id: str
    prompt: str
    text: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """The scores of one base model, with or without a prefix, on one split, and every text behind them.

    `nats_per_token` is the mean cost of each row's first reference; `seconds` the wall time of generating.
    """

    base: str
    prefix: str | None
    task: str
    split: str
    data_sha256: str
    skipped_rows: int
    scores: dict[str, Interval]
    nats_per_token: float
    seconds: float
    generation: dict[str, Any]
    outputs: list[Output] = field(repr=False)

    def to_dict(self, outputs: bool = True) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        plain["rows"] = len(self.outputs)
        plain["scores"] = {name: score._asdict() for name, score in self.scores.items()}
        if not outputs:
            del plain["outputs"]
        return plain

    def save(self, path: str | Path) -> None:
        """Write everything, the texts included, as one JSON file."""
        write_atomic(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def evaluate(
    base: BaseModel,
    prefix: Prefix | None,
    task: Task | str,
    split: str = "test",
    *,
    limit: int | None = None,
    strict: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = 20,
    progress: Callable[[int, int], None] | None = None,
    **generation: Any,
) -> Evaluation:
    """Generate for the first `limit` rows of a split, through `prefix` or through nothing, and score.

    `generation` goes to `BaseModel.generate` (greedy when empty); `max_new_tokens` and stop strings are the
    task's unless given.
    """
    task = get_task(task) if isinstance(task, str) else task
    data = task.split(split, limit=limit, strict=strict)
    options = {"max_new_tokens": max_new_tokens or task.max_new_tokens, "stop": list(task.stop), **generation}
    prompts = [example.prompt for example in data.examples]
    start = time.perf_counter()
    texts = base.generate(prompts, prefix, batch_size=batch_size, progress=progress, **options)
    seconds = time.perf_counter() - start
    costs = base.score(prompts, [example.completion for example in data.examples], prefix, batch_size=batch_size)
    texts = [text.strip() for text in texts]
    return Evaluation(
        base=base.name,
        prefix=None if prefix is None else str(prefix.metadata.get("name") or prefix.metadata.get("task") or "prefix"),
        task=task.name,
        split=split,
        data_sha256=data.sha256,
        skipped_rows=len(data.skipped),
        scores=score_outputs(task.metrics, texts, data.examples),
        nats_per_token=sum(cost.nats for cost in costs) / max(1, sum(cost.tokens for cost in costs)),
        seconds=seconds,
        generation=options,
        outputs=[
            Output(example.id, example.prompt, text, example.references)
            for example, text in zip(data.examples, texts, strict=True)
        ],
    )


def score_outputs(metrics: Sequence[str], texts: Sequence[str], examples: Sequence[Example]) -> dict[str, Interval]:
    r"""Each metric of the texts against their examples, with its interval.

    >>> score_outputs(["exact_match"], ["yes"], [Example("1", "true?\n", "yes", ("yes",), 1)])
    {'exact_match': Interval(value=100.0, low=100.0, high=100.0)}
    """
    scores = {}
    for name in metrics:
        metric = get_metric(name)
        sources = metric.needs == "sources"
        targets: Any = [example.prompt if sources else example.references for example in examples]
        scores[name] = Interval(metric(texts, targets), *bootstrap_interval(metric, texts, targets))
    return scores
