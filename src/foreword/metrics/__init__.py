"""Metrics: strings in, one number out, with an interval; tests of differences. No torch here.

Scores are in percent, unless a metric's `maximum` says otherwise. Metrics that read texts with a model are in
`foreword.model_metrics`, which is imported when one is asked for: `get_metric("bertscore:MODEL")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

from foreword.errors import ConfigError
from foreword.metrics.bootstrap import PairedDifference, paired_test, score_with_interval
from foreword.metrics.classes import Accuracy, EntityF1, MacroF1
from foreword.metrics.coco import Cider, CocoRougeL, Meteor
from foreword.metrics.metric import Metric, Targets
from foreword.metrics.ngram import SCRIPT_REFERENCES, Bleu, ChrfPlusPlus, MultiBleu, Ter
from foreword.metrics.nist import Nist
from foreword.metrics.overlap import Coverage, ExactMatch, Rouge
from foreword.metrics.slots import SlotErrors
from foreword.metrics.sources import field_values

if TYPE_CHECKING:
    from foreword.tasks import Task

__all__ = [
    "METRIC_SETS",
    "Bleu",
    "Metric",
    "PairedDifference",
    "accuracy",
    "bleu",
    "bootstrap_interval",
    "check_metrics",
    "chrf",
    "coverage",
    "entity_f1",
    "exact_match",
    "field_values",
    "get_metric",
    "list_metrics",
    "list_model_metrics",
    "macro_f1",
    "metric_names",
    "number_format",
    "paired_test",
    "register_model_metric",
    "rouge_l",
    "score_with_interval",
    "slot_error_rate",
]

bleu = Bleu()
chrf = ChrfPlusPlus()
rouge_l = Rouge("L")
coverage = Coverage()
slot_error_rate = SlotErrors()
exact_match = ExactMatch()
accuracy = Accuracy()
macro_f1 = MacroF1()
entity_f1 = EntityF1()

_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        bleu,
        Nist(),
        Meteor(),
        CocoRougeL(),
        Cider(),
        MultiBleu("bleu_webnlg"),
        MultiBleu("bleu_dart", fill=True),
        Meteor("meteor_webnlg", "split"),
        Ter(),
        Ter("ter_webnlg", limit=SCRIPT_REFERENCES),
        chrf,
        Rouge("1"),
        Rouge("2"),
        rouge_l,
        coverage,
        slot_error_rate,
        SlotErrors("missing_slots", ["missing"]),
        SlotErrors("wrong_slots", ["wrong"]),
        SlotErrors("invented_slots", ["invented"]),
        exact_match,
        accuracy,
        macro_f1,
        entity_f1,
    )
}

# What is written or predicted for the rows of a kind of task, as metrics call it.
_MADE = {"generation": "text", "classification": "label", "choice": "label", "tagging": "tag"}

# What the official scripts and the papers print for a task, under one name.
METRIC_SETS: dict[str, tuple[str, ...]] = {
    "e2e": ("bleu", "nist", "meteor", "rouge_l_coco", "cider"),
    "webnlg": ("bleu_webnlg", "meteor_webnlg", "ter_webnlg"),
    "dart": ("bleu_dart", "meteor_webnlg", "ter_webnlg"),
    "summary": ("rouge_1", "rouge_2", "rouge_l"),
    "slots": ("coverage", "slot_error_rate", "missing_slots", "wrong_slots", "invented_slots"),
}


def _by_model(name: str) -> Callable[[str], Metric]:
    """What makes a metric of `foreword.model_metrics`, imported by name: it needs torch, which nothing here knows."""

    def make(model: str) -> Metric:
        made: Metric = getattr(import_module("foreword.model_metrics"), name)(model)
        return made

    return make


_MODEL_METRICS: dict[str, Callable[[str], Metric]] = {
    "bertscore": _by_model("BertScore"),
    "moverscore": _by_model("MoverScore"),
    "bleurt": _by_model("Bleurt"),
}


def list_metrics() -> list[Metric]:
    """All metrics that need no model, each with its `name`, `description`, `needs`, `maximum`, `higher_is_better`.

    >>> [metric.name for metric in list_metrics()][:5]
    ['bleu', 'nist', 'meteor', 'rouge_l_coco', 'cider']
    """
    return list(_METRICS.values())


def list_model_metrics() -> list[str]:
    """The names of metrics that need a model.

    >>> list_model_metrics()
    ['bertscore:MODEL', 'moverscore:MODEL', 'bleurt:MODEL']
    """
    return [f"{name}:MODEL" for name in _MODEL_METRICS]


def register_model_metric(name: str, make: Callable[[str], Metric]) -> None:
    """Make `get_metric(f"{name}:MODEL")` give `make(MODEL)`."""
    _MODEL_METRICS[name] = make


def get_metric(name: str) -> Metric:
    """The metric of that name; `ConfigError` for an unknown one.

    >>> get_metric("exact_match")(["yes"], [["yes"]])
    100.0
    """
    if name in _METRICS:
        return _METRICS[name]
    kind, _, model = name.partition(":")
    if kind in _MODEL_METRICS:
        if not model:
            raise ConfigError(f"metric {name!r} without a model", f"{kind}:MODEL", "name a folder or model id")
        return _with_model(kind, model)
    known = ", ".join([*_METRICS, *list_model_metrics()])
    raise ConfigError(f"metric {name!r}", f"one of {known}", "name one of them")


@lru_cache(maxsize=2)  # each may hold a model
def _with_model(kind: str, model: str) -> Metric:
    return _MODEL_METRICS[kind](model)


def metric_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names of metrics and of sets of them as names of metrics, each once; `ConfigError` for an unknown one.

    >>> metric_names(["summary", "bleu", "rouge_1"])
    ('rouge_1', 'rouge_2', 'rouge_l', 'bleu')
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in METRIC_SETS:
            kind, _, model = name.partition(":")
            if not (kind in _MODEL_METRICS and model):
                _known(name)
        found.update(dict.fromkeys(METRIC_SETS.get(name, (name,))))
    return tuple(found)


def check_metrics(names: Iterable[str], task: Task, *, ready: bool = True) -> tuple[str, ...]:
    """The metrics of those names and sets, if they score what is written or predicted for the task.

    Raises `ConfigError` for one that does not or is unknown, and, with `ready`, what would stop scoring later:
    `MissingPackage`, `ModelNotFound`.

    >>> from foreword.tasks import get_task
    >>> check_metrics(["summary"], get_task("trails"))
    ('rouge_1', 'rouge_2', 'rouge_l')
    >>> check_metrics(["macro_f1"], get_task("trails"))
    Traceback (most recent call last):
    foreword.errors.ConfigError: metric 'macro_f1' for task 'trails'; expected a metric of texts; choose another
    """
    chosen = metric_names(names)
    for name in chosen:
        if _MADE[task.kind] not in _suits(name):
            raise ConfigError(
                f"metric {name!r} for task {task.name!r}", f"a metric of {_MADE[task.kind]}s", "choose another"
            )
    if ready:
        for name in chosen:
            get_metric(name).ready()
    return chosen


def _suits(name: str) -> tuple[str, ...]:
    """What a metric scores; those that need a model, which is not loaded for it, score texts."""
    return _METRICS[name].suits if name in _METRICS else Metric.suits


def _known(name: str) -> None:
    """Refuse an unknown name, with the names of the sets too."""
    try:
        get_metric(name)
    except ConfigError as error:
        raise ConfigError(error.got, f"{error.expected}, or a set: {', '.join(METRIC_SETS)}", error.action) from None


def number_format(name: str) -> str:
    """How the scores of a metric are written, for `format`.

    >>> format(8.6094, number_format("nist")), format(65.93, number_format("bleu"))
    ('8.61', '65.9')
    """
    metric = _METRICS.get(name)
    return f".{1 if metric is None else metric.digits}f"


def bootstrap_interval(
    metric: Metric | str,
    hypotheses: Sequence[str],
    targets: Targets,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Low and high end of the percentile bootstrap interval around the score of a corpus.

    >>> bootstrap_interval("exact_match", ["yes"] * 4, [["yes"]] * 4)
    (100.0, 100.0)
    """
    chosen = get_metric(metric) if isinstance(metric, str) else metric
    return score_with_interval(chosen, hypotheses, targets, samples, seed, confidence)[1:]
