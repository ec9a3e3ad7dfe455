"""How far a corpus score would move on other rows, and whether two systems differ.

The interval is the percentile bootstrap (Koehn 2004, W04-3250), the p-value that of paired approximate randomization
(Noreen 1989; Riezler and Maxwell 2005, W05-0908).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreword.errors import ConfigError, DataError
from foreword.metrics.metric import Metric, Numbers, Targets

__all__ = [
    "PairedDifference", "mean_with_interval", "paired_difference", "paired_test", "score_with_interval",
]  # fmt: skip

_DRAWS_AT_ONCE = 4_000_000  # numbers in memory, 32 MB


class PairedDifference(NamedTuple):
    """How much higher a second system scores than a first on the same rows.

    `low` and `high` are the ends of the paired bootstrap interval, `p_value` is two-sided: how often systems that do
    not differ would seem to differ as much. `better` is whether the second is the better one, by the metric's
    direction.
    """

    difference: float
    low: float
    high: float
    p_value: float
    better: bool


def score_with_interval(
    metric: Metric,
    hypotheses: Sequence[str],
    targets: Targets,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """The score of the rows, and the ends that hold `confidence` of the scores of corpora drawn from them.

    Drawn is with replacement; the ends are widened to hold the score itself where all resampled ones lie beside it.
    """
    _check(samples, confidence)
    statistics = metric.statistics(hypotheses, targets)
    point = metric.score(statistics.sum(axis=0))
    scores = [metric.score(sums) for times in _drawn(len(statistics), samples, seed) for sums in times @ statistics]
    return point, *_around(scores, point, confidence)


def mean_with_interval(
    totals: Sequence[float], counts: Sequence[float], samples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """The sum of the rows' totals over that of their counts, and the ends of its interval over rows.

    >>> mean_with_interval([2.0, 4.0], [1, 2])
    (2.0, 2.0, 2.0)
    """
    _check(samples, confidence)
    if not len(totals):
        raise DataError("no rows", "at least one row")
    rows = np.array([totals, counts], dtype=np.float64).T
    sums = np.concatenate([times @ rows for times in _drawn(len(rows), samples, seed)])
    point = float(rows[:, 0].sum() / rows[:, 1].sum())
    return point, *_around((sums[:, 0] / sums[:, 1]).tolist(), point, confidence)


def paired_test(
    metric: Metric,
    first: Sequence[str],
    second: Sequence[str],
    targets: Targets,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """The difference of two systems on the same rows, with its interval and two-sided p-value.

    For the interval rows are drawn with replacement, the same for both. For the p-value the two outputs of every row
    change sides or not by the toss of a coin, as they might if nothing but chance told the systems apart; it is
    (1 + c) / (1 + samples) with c tosses that give at least the observed difference. Raises `ConfigError` for options
    and `DataError` for rows that cannot be used.

    >>> from foreword.metrics import get_metric
    >>> right, wrong = ["yes"] * 20, ["no"] * 20
    >>> found = paired_test(get_metric("accuracy"), wrong, right, [["yes"]] * 20)
    >>> found.difference, found.low, found.high, found.p_value < 0.001, found.better
    (100.0, 100.0, 100.0, True, True)
    """
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} outputs", "two systems on the same rows")
    return paired_difference(metric, *metric.paired_statistics(first, second, targets), samples, seed, confidence)


def paired_difference(
    metric: Metric,
    first: Numbers | Sequence[Numbers],
    second: Numbers | Sequence[Numbers],
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    *,
    draw_repetitions: bool = False,
) -> PairedDifference:
    """`paired_test` of the numbers of every row, `[rows, numbers]`, of two systems.

    A system that wrote for the rows several times has a list of them, all as `Metric.joint_statistics` makes them, and
    scores the mean of its repetitions. Rows are drawn, and change sides, in all repetitions alike; a repetition changes
    sides with that of the same place, of the system that has fewer with the first ones again. With `draw_repetitions`
    the interval, not the p-value, also tells what other repetitions would change: each system's are drawn too.
    """
    _check(samples, confidence)
    sides = _repetitions(first), _repetitions(second)
    if len(lengths := {len(each) for side in sides for each in side}) > 1:
        raise DataError(f"outputs for {', '.join(map(str, sorted(lengths)))} rows", "systems on the same rows")
    (rows,) = lengths
    sums = [[each.sum(axis=0) for each in side] for side in sides]
    means = [float(np.mean([metric.score(each) for each in side])) for side in sums]
    point = means[1] - means[0]

    generator = np.random.default_rng([seed, 2])
    gaps: list[float] = []
    for times in _drawn(rows, samples, seed):
        one, two = (
            _means(metric, [times @ each for each in side], generator if draw_repetitions else None) for side in sides
        )
        gaps += (two - one).tolist()

    pairs = [(k % len(sides[0]), k % len(sides[1])) for k in range(math.lcm(*map(len, sides)))]
    as_large = 0
    for tosses in _tossed(rows, samples, seed):
        moved = [tosses @ (sides[1][j] - sides[0][i]) for i, j in pairs]
        one = _means(metric, [sums[0][i] + each for (i, _), each in zip(pairs, moved, strict=True)])
        two = _means(metric, [sums[1][j] - each for (_, j), each in zip(pairs, moved, strict=True)])
        # sums in another order round otherwise
        as_large += int((abs(two - one) >= abs(point) - 1e-9 * max(1.0, abs(point))).sum())
    better = point > 0 if metric.higher_is_better else point < 0
    return PairedDifference(point, *_around(gaps, point, confidence), (1 + as_large) / (1 + samples), better)


def _repetitions(numbers: Numbers | Sequence[Numbers]) -> list[Numbers]:
    return [numbers] if isinstance(numbers, np.ndarray) and numbers.ndim == 2 else list(numbers)


def _means(metric: Metric, sums: Sequence[Numbers], generator: np.random.Generator | None = None) -> Numbers:
    """The scores `[samples]` of sums `[samples, numbers]`, over repetitions or, with a generator, over drawn ones."""
    scores = np.array([[metric.score(each) for each in repetition] for repetition in sums])
    count, samples = scores.shape
    weights = None if generator is None else generator.multinomial(count, np.full(count, 1.0 / count), size=samples).T
    return np.asarray(np.average(scores, axis=0, weights=weights))


def _check(samples: int, confidence: float) -> None:
    if samples < 1 or not 0 < confidence < 1:
        raise ConfigError(f"samples {samples}, confidence {confidence}", "samples of at least 1, confidence in (0, 1)")


def _around(scores: Sequence[float], point: float, confidence: float) -> tuple[float, float]:
    """The ends of the percentile interval, widened to hold `point`."""
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(scores, [tail, 100.0 - tail])
    return min(float(low), point), max(float(high), point)


def _drawn(rows: int, samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each row is drawn into every resampled corpus, `[samples, rows]`, in parts."""
    generator = np.random.default_rng(seed)
    for size in _parts(rows, samples):
        yield generator.multinomial(rows, np.full(rows, 1.0 / rows), size=size)


def _tossed(rows: int, samples: int, seed: int) -> Iterator[Numbers]:
    """Which rows change sides, 0 or 1, `[samples, rows]`, in parts."""
    generator = np.random.default_rng([seed, 1])
    for size in _parts(rows, samples):
        yield generator.integers(2, size=(size, rows)).astype(np.float64)


def _parts(rows: int, samples: int) -> Iterator[int]:
    step = max(1, _DRAWS_AT_ONCE // rows)
    for start in range(0, samples, step):
        yield min(step, samples - start)
