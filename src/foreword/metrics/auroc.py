"""AUROC: how well a number tells positive rows from negative ones, exact with ties, with intervals and chance.

It is the probability that a positive row has the greater number, ties counted half: 0.5 tells nothing, 0 and 1 tell
all. Functions of many numbers at once take them as features `[rows, features]`, and resample all features alike.
Sources: Hanley and McNeil 1982 for the statistic; stratified percentile bootstrap for the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foreword.errors import ConfigError, DataError
from foreword.metrics.metric import Numbers

__all__ = ["auroc", "auroc_interval", "aurocs", "bootstrap_aurocs", "intervals", "permuted_aurocs"]

Labels: TypeAlias = NDArray[np.bool_]

_DRAWS_AT_ONCE = 4_000_000  # numbers in memory, 32 MB


def auroc(numbers: Sequence[float], positive: Sequence[bool]) -> float:
    """The probability that a positive row has a greater number than a negative one; `DataError` without both.

    >>> auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True])
    0.75
    """
    return float(aurocs(np.reshape(numbers, (-1, 1)), positive)[0])


def auroc_interval(
    numbers: Sequence[float],
    positive: Sequence[bool],
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """The ends of the percentile bootstrap interval of `auroc`.

    >>> auroc_interval([1.0, 2.0, 3.0, 4.0], [False, False, True, True])
    (1.0, 1.0)
    """
    column = np.reshape(numbers, (-1, 1))
    low, high = intervals(bootstrap_aurocs(column, positive, samples, seed), aurocs(column, positive), confidence)
    return float(low[0]), float(high[0])


def aurocs(features: ArrayLike, positive: ArrayLike) -> Numbers:
    """The AUROC of every feature `[features]`."""
    numbers, labels = _checked(features, positive)
    return _from_ranks(_ranks(numbers), labels[None])[0]


def bootstrap_aurocs(features: ArrayLike, positive: ArrayLike, samples: int = 1000, seed: int = 0) -> Numbers:
    """The AUROCs `[samples, features]` of rows drawn with replacement, as many positive and negative ones as there are.

    A sample draws the same rows for all features.
    """
    numbers, labels = _checked(features, positive)
    if samples < 1:
        raise ConfigError(f"samples {samples}", "at least 1", "correct it")
    generator = np.random.default_rng(seed)
    order = np.argsort(numbers, axis=0, kind="stable")
    found = []
    step = max(1, _DRAWS_AT_ONCE // len(labels))
    for start in range(0, samples, step):
        count = min(step, samples - start)
        drawn = [np.zeros((count, len(labels))) for _ in range(2)]
        for weights, rows in zip(drawn, (labels, ~labels), strict=True):
            weights[:, rows] = generator.multinomial(rows.sum(), np.full(rows.sum(), 1 / rows.sum()), size=count)
        found.append(
            np.stack(
                [_weighted(numbers[place, k], *(w[:, place] for w in drawn)) for k, place in enumerate(order.T)], 1
            )
        )
    return np.concatenate(found)


def _weighted(ascending: Numbers, positive: Numbers, negative: Numbers) -> Numbers:
    """The AUROC of every sample, from how often it draws each row `[samples, rows]`; rows in ascending order."""
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
    if len(starts) < len(ascending):  # ties: rows of one number count as one
        positive, negative = (np.add.reduceat(each, starts, axis=1) for each in (positive, negative))
    below = np.cumsum(negative, axis=1) - negative / 2
    return np.asarray((positive * below).sum(1) / (positive.sum(1) * negative.sum(1)))


def permuted_aurocs(
    features: ArrayLike, positive: ArrayLike, samples: int = 1000, seed: int = 0, groups: ArrayLike | None = None
) -> Numbers:
    """The AUROCs `[samples, features]` with the labels dealt out anew at random: what chance alone gives.

    With `groups`, whole numbers `[rows]`, labels stay in their group: what chance gives among rows that are alike.
    """
    numbers, labels = _checked(features, positive)
    generator = np.random.default_rng(seed)
    group = np.zeros(len(labels)) if groups is None else np.asarray(groups, dtype=np.float64)
    dealt = np.empty((samples, len(labels)), dtype=bool)
    dealt[:, np.argsort(group, kind="stable")] = labels[np.argsort(group + generator.random(dealt.shape), axis=1)]
    return _from_ranks(_ranks(numbers), dealt)


def intervals(samples: Numbers, points: Numbers, confidence: float = 0.95) -> tuple[Numbers, Numbers]:
    """Low and high ends `[features]` of percentile intervals, widened to hold the AUROCs of the rows themselves."""
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence {confidence}", "a number in (0, 1)", "correct it")
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(samples, [tail, 100.0 - tail], axis=0)
    return np.minimum(low, points), np.maximum(high, points)


def _from_ranks(ranks: Numbers, labels: Labels) -> Numbers:
    """AUROCs `[labelings, features]` of labels `[labelings, rows]`: the Mann-Whitney statistic."""
    positives = labels.sum(1, dtype=np.float64)[:, None]
    negatives = labels.shape[1] - positives
    return np.asarray((labels.astype(np.float64) @ ranks - positives * (positives + 1) / 2) / (positives * negatives))


def _ranks(numbers: Numbers) -> Numbers:
    """The rank of every row in each feature, from 1; rows of one number share the mean of their ranks."""
    columns = []
    for column in numbers.T:
        _, group, counts = np.unique(column, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        columns.append((last - (counts - 1) / 2)[group.reshape(-1)])
    return np.stack(columns, axis=1) if columns else numbers


def _checked(features: ArrayLike, positive: ArrayLike) -> tuple[Numbers, Labels]:
    numbers, labels = np.asarray(features, dtype=np.float64), np.asarray(positive, dtype=bool)
    if numbers.ndim != 2 or labels.ndim != 1 or len(numbers) != len(labels):
        raise DataError(f"numbers {list(numbers.shape)} and labels {list(labels.shape)}", "as many rows of each")
    if not np.isfinite(numbers).all():
        raise DataError("numbers that are not finite", "finite numbers to rank")
    if labels.all() or not labels.any():
        raise DataError(
            f"{labels.sum()} positive of {len(labels)} rows", "at least one positive and one negative row",
            "take more rows",
        )  # fmt: skip
    return numbers, labels
