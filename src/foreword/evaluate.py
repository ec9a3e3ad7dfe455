"""Evaluation: what is written or predicted for every row of a split, and its scores with bootstrap intervals."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from foreword.base import BaseModel
from foreword.data import Rows, ordered_batches
from foreword.errors import ConfigError, DataError, PrefixError
from foreword.frozen import frozen_training
from foreword.metrics import check_metrics, get_metric, score_with_interval
from foreword.metrics.bootstrap import mean_with_interval
from foreword.objectives import HeadOptions, Objective, Predicted, objective_of
from foreword.prefix import Prefix
from foreword.runs import EVALUATION, provenance
from foreword.storage import write_atomic
from foreword.tasks import Example, Labelled, Split, Tagged, Task, get_task

__all__ = [
    "Evaluation", "Interval", "Output", "evaluate", "evaluation_file", "objective_for", "predictions", "score_outputs",
    "writing_options",
]  # fmt: skip

_LONGEST_NAME = 150  # of 255 that file systems allow, in letters of one byte


class Interval(NamedTuple):
    """A score with the ends of its 95 % bootstrap interval over rows."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return format(self, ".1f")

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Output:
    """What the model wrote or predicted for one row; tags are joined by spaces.

    `probability` is that of the predicted label among all labels (of tags: the mean), None for text that was written.
    `nats` is the cost of the first reference, of so many `tokens`; None for labels.
    """

    id: str
    prompt: str
    text: str
    references: tuple[str, ...]
    probability: float | None = None
    nats: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """The scores of one base model, with or without a prefix, on one split, and every text behind them.

    The cost of the right answers is `nats_per_token` of each row's first reference, with the ends of its 95 % interval
    in `nats_interval` where texts are written, or `nats_per_label` where a head predicts labels; `seconds` is the wall
    time of generating or predicting. `parameters` counts the prefix and the head. `cut_rows` were too long and read in
    part, `skipped_rows` could not be used. `record` says where and with what this was computed.
    """

    base: str
    prefix: str | None
    task: str
    split: str
    data_sha256: str
    skipped_rows: int
    scores: dict[str, Interval]
    nats_per_token: float | None
    seconds: float
    generation: dict[str, Any]
    outputs: list[Output] = field(repr=False)
    nats_interval: tuple[float, float] | None = None
    nats_per_label: float | None = None
    cut_rows: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def perplexity(self) -> Interval | None:
        """The perplexity of the first references, where texts are written."""
        if self.nats_per_token is None or self.nats_interval is None:
            return None
        return Interval(*map(math.exp, (self.nats_per_token, *self.nats_interval)))

    @property
    def protocol(self) -> dict[str, Any]:
        """What evaluations have in common whose scores can be held against each other: the rows, and how to write.

        Beams that are not named are one.
        """
        rows = {"task": self.task, "split": self.split, "data_sha256": self.data_sha256}
        return {**rows, **({"num_beams": 1, **self.generation} if self.generation else {})}

    def to_dict(self, outputs: bool = True) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        plain["rows"] = len(self.outputs)
        plain["scores"] = {name: score._asdict() for name, score in self.scores.items()}
        plain["perplexity"] = None if self.perplexity is None else self.perplexity._asdict()
        if not outputs:
            del plain["outputs"]
        return plain

    def save(self, path: str | Path) -> None:
        """Write everything, the texts included, as one JSON file."""
        write_atomic(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what `save` wrote; `DataError` if it is something else."""
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
            plain["scores"] = {name: Interval(**score) for name, score in plain["scores"].items()}
            plain["outputs"] = [Output(**{**row, "references": tuple(row["references"])}) for row in plain["outputs"]]
            plain["nats_interval"] = tuple(plain["nats_interval"]) if plain.get("nats_interval") else None
            for derived in ("rows", "perplexity"):
                plain.pop(derived, None)
            return cls(**plain)
        except OSError as error:
            raise DataError(
                f"cannot read {path} ({error.strerror})", "scores that were saved", "check the path"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path} holds no evaluation", "scores that were saved", "evaluate again") from None


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
    metrics: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    unscored: Callable[[Evaluation], None] | None = None,
    **generation: Any,
) -> Evaluation:
    """Write or predict for the first `limit` rows of a split, through `prefix` or through nothing, and score.

    `generation` goes to `BaseModel.generate` (greedy when empty); `max_new_tokens` and stop strings are the task's
    unless given. For tasks with labels the label is predicted: by the prefix's head on an encoder, which has to have
    one, else as the likeliest candidate after the prompt. `metrics` names what is scored in place of the task's own:
    metrics or sets of them (see `foreword.metrics`). What was written is handed to `unscored` if scoring it fails or is
    interrupted. Raises `ConfigError`, `DataError`, `PrefixError`, `UnsupportedModel`.
    """
    task = get_task(task) if isinstance(task, str) else task
    chosen = check_metrics(task.metrics if metrics is None else metrics, task)
    objective = (
        objective_for(base, prefix, task) if task.kind != "generation" or base.family.kind == "encoder" else None
    )
    data = task.split(split, limit=limit, strict=strict)
    told = None if prefix is None else str(prefix.metadata.get("name") or prefix.metadata.get("task") or "prefix")
    named: dict[str, Any] = {
        "base": base.name, "prefix": told, "task": task.name, "split": split, "data_sha256": data.sha256,
        "parameters": _parameters(prefix),
        "record": {**provenance(base.device), "dtype": str(base.dtype).removeprefix("torch."), **_training(prefix)},
    }  # fmt: skip
    if objective is not None:
        if generation or max_new_tokens is not None:
            given = ", ".join([*generation, *(["max_new_tokens"] if max_new_tokens is not None else [])])
            raise ConfigError(f"{given} for task {task.name!r}", "no options of generation", "labels are predicted")
        return _evaluate_labels(objective, prefix, data, chosen, named, strict, batch_size, progress)
    options = {**writing_options(task), **({"max_new_tokens": max_new_tokens} if max_new_tokens else {}), **generation}
    prompts = [example.prompt for example in data.examples]
    start = time.perf_counter()
    texts = base.generate(prompts, prefix, batch_size=batch_size, progress=progress, **options)
    seconds = time.perf_counter() - start
    costs = base.score(prompts, [example.completion for example in data.examples], prefix, batch_size=batch_size)
    cost = mean_with_interval([each.nats for each in costs], [each.tokens for each in costs])
    written = Evaluation(
        skipped_rows=len(data.skipped),
        scores={},
        nats_per_token=cost[0],
        nats_interval=cost[1:],
        seconds=seconds,
        generation=options,
        outputs=[
            Output(example.id, example.prompt, text.strip(), example.references, nats=each.nats, tokens=each.tokens)
            for example, text, each in zip(data.examples, texts, costs, strict=True)
        ],
        **named,
    )
    try:
        return replace(written, scores=score_outputs(chosen, [row.text for row in written.outputs], data.examples))
    except BaseException:
        if unscored is not None:
            unscored(written)
        raise


def writing_options(task: Task) -> dict[str, Any]:
    """How texts are written for a task unless it is said otherwise; nothing where labels are predicted."""
    if task.kind != "generation":
        return {}
    return {"num_beams": 1, "max_new_tokens": task.max_new_tokens, "stop": list(task.stop)}


def evaluation_file(split: str = "test", differs: Sequence[str] = ()) -> str:
    """The file in a run folder for an evaluation; what `differs` from the run's own rows and options is in its name.

    A name that is cut ends with digits of the hash of all that differs.

    >>> evaluation_file(), evaluation_file("dev"), evaluation_file("test", ["webnlg-unseen", "beams-5"])
    ('evaluation.json', 'evaluation-dev.json', 'evaluation-webnlg-unseen-beams-5.json')
    """
    words = "-".join([*([] if split == "test" else [split]), *differs])
    plain = re.sub(r"[^\w.+-]+", "-", words, flags=re.ASCII)
    if len(plain) > _LONGEST_NAME:
        digits = f"-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
        plain = plain[: _LONGEST_NAME - len(digits)] + digits
    return f"evaluation-{plain}.json" if plain else EVALUATION


def objective_for(base: BaseModel, prefix: Prefix | None, task: Task) -> Objective:
    """What predicts labels; an encoder needs a head that was trained for them."""
    head = None if prefix is None else prefix.head
    max_tokens = HeadOptions.max_tokens if prefix is None else prefix.metadata.get("max_tokens", HeadOptions.max_tokens)
    objective = objective_of(base, task, HeadOptions(max_tokens=max_tokens), head)
    if objective.head is not None and head is None:
        what = "the untouched encoder" if prefix is None else "a prefix"
        action = "evaluate a trained prefix by itself" if prefix is None else f"train one for {task.name}"
        raise PrefixError(f"{what} without a head predicts no labels", "a prefix trained for the task", action)
    return objective


def _parameters(prefix: Prefix | None) -> dict[str, int]:
    if prefix is None:
        return {"prefix": 0, "head": 0}
    head = 0 if prefix.head is None else prefix.head.weight.numel() + prefix.head.bias.numel()
    return {"prefix": prefix.num_parameters, "head": head}


def _training(prefix: Prefix | None) -> dict[str, Any]:
    """The options and the seed that a prefix was trained with, where it says so."""
    training = {} if prefix is None else prefix.metadata.get("training") or {}
    return {"seed": training.get("seed"), "training": training} if training else {}


def _evaluate_labels(
    objective: Objective,
    prefix: Prefix | None,
    data: Split,
    metrics: Sequence[str],
    named: dict[str, Any],
    strict: bool,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Evaluation:
    start = time.perf_counter()
    rows = objective.encode(data, strict=strict)
    nats, units, found = predictions(objective, rows, prefix, batch_size, progress)
    seconds = time.perf_counter() - start
    answers = [objective.answer(each) for each in found]
    references = [(objective.right(example),) for example in rows.examples]
    scores = {name: Interval(*score_with_interval(get_metric(name), answers, references)) for name in metrics}
    cost = nats / max(units, 1)
    outputs = [
        Output(example.id, _shown(example, objective.head is None), answer, right, each.probability)
        for example, answer, right, each in zip(rows.examples, answers, references, found, strict=True)
    ]
    return Evaluation(
        skipped_rows=len(rows.skipped), cut_rows=rows.cut, scores=scores, seconds=seconds, generation={},
        outputs=outputs,
        nats_per_token=cost if objective.unit == "token" else None,
        nats_per_label=cost if objective.unit == "label" else None,
        **named,
    )  # fmt: skip


def predictions(
    objective: Objective,
    rows: Rows,
    prefix: Prefix | None,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int, list[Predicted]]:
    """The cost of the right answers, their tokens or labels, and what is predicted, in the order of the rows."""
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}", "at least 1", "correct it")
    nats, units = 0.0, 0
    found: dict[int, Predicted] = {}
    with frozen_training(objective.base.model):
        for batch in ordered_batches(rows.lengths, batch_size):
            measured = objective.measure(rows, batch, prefix)
            nats, units = nats + measured.nats, units + measured.units
            found.update(zip(batch, measured.predictions, strict=True))
            if progress is not None:
                progress(len(found), len(rows))
    return nats, units, [found[row] for row in range(len(rows))]


def _shown(example: Labelled | Tagged, prompt: bool) -> str:
    """What is read of a row, for people: by a decoder its prompt."""
    if isinstance(example, Tagged):
        return " ".join(example.words)
    if prompt:
        return example.prompt
    return " | ".join(" / ".join(text) for text in example.texts)


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
        scores[name] = Interval(*score_with_interval(metric, texts, targets))
    return scores
