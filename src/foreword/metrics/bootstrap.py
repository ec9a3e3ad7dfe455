"""How far a corpus score would move on other rows: the percentile bootstrap (Koehn 2004, W04-3250)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foreword.errors import ConfigError
from foreword.metrics.metric import Metric, Numbers, Targets

__all__ = ["interval"]

_DRAWS_AT_ONCE = 4_000_000  # numbers in memory, 32 MB


def interval(
    metric: Metric,
    hypotheses: Sequence[str],
    targets: Targets,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """The interval that holds `confidence` of the scores of corpora drawn, with replacement, from the rows.

    It is widened to hold the score of the rows themselves where the resampled scores lie beside it.
    """
    if samples < 1 or not 0 < confidence < 1:
        raise ConfigError(f"samples {samples}, confidence {confidence}", "samples of at least 1, confidence in (0, 1)")
    statistics = metric.statistics(hypotheses, targets)
    point = metric.score(statistics.sum(axis=0))
    scores = [metric.score(sums) for sums in _resampled_sums(statistics, samples, seed)]
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(scores, [tail, 100.0 - tail])
    return min(float(low), point), max(float(high), point)


def _resampled_sums(statistics: Numbers, samples: int, seed: int) -> Numbers:
    """The sums of every resampled corpus, `[samples, numbers]`."""
    generator = np.random.default_rng(seed)
    rows = len(statistics)
    step = max(1, _DRAWS_AT_ONCE // rows)
    sums = []
    for start in range(0, samples, step):
        times_drawn = generator.multinomial(rows, np.full(rows, 1.0 / rows), size=min(step, samples - start))
        sums.append(times_drawn @ statistics)
    return np.concatenate(sums)
