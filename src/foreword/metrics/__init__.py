"""Metrics: strings in, one number from 0 to 100 out, with an interval. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from foreword.errors import ConfigError
from foreword.metrics.bootstrap import interval
from foreword.metrics.classes import Accuracy, EntityF1, MacroF1
from foreword.metrics.metric import Metric, Targets
from foreword.metrics.ngram import Bleu, ChrfPlusPlus
from foreword.metrics.overlap import Coverage, ExactMatch, RougeL, field_values

__all__ = [
    "Bleu",
    "Metric",
    "accuracy",
    "bleu",
    "bootstrap_interval",
    "chrf",
    "coverage",
    "entity_f1",
    "exact_match",
    "field_values",
    "get_metric",
    "list_metrics",
    "macro_f1",
    "rouge_l",
]

bleu = Bleu()
chrf = ChrfPlusPlus()
rouge_l = RougeL()
coverage = Coverage()
exact_match = ExactMatch()
accuracy = Accuracy()
macro_f1 = MacroF1()
entity_f1 = EntityF1()

_METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (bleu, chrf, rouge_l, coverage, exact_match, accuracy, macro_f1, entity_f1)
}


def list_metrics() -> list[Metric]:
    """All metrics, each with its `name`, `description`, `needs` and `higher_is_better`.

    >>> [metric.name for metric in list_metrics()]
    ['bleu', 'chrf++', 'rouge_l', 'coverage', 'exact_match', 'accuracy', 'macro_f1', 'entity_f1']
    """
    return list(_METRICS.values())


def get_metric(name: str) -> Metric:
    """The metric of that name; `ConfigError` for an unknown one.

    >>> get_metric("exact_match")(["yes"], [["yes"]])
    100.0
    """
    if name not in _METRICS:
        raise ConfigError(f"metric {name!r}", "one of " + ", ".join(_METRICS), "name one of them")
    return _METRICS[name]


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
    return interval(chosen, hypotheses, targets, samples, seed, confidence)
