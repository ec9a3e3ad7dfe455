"""Whether two cells of a study differ: differences on the same rows, and p-values for several of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from foreword.errors import ConfigError
from foreword.experiments.results import Cell
from foreword.metrics import Metric, get_metric, number_format
from foreword.metrics.bootstrap import PairedDifference, paired_difference

__all__ = ["Difference", "by_row", "corrected", "difference", "holm", "known_metric", "p_text", "rises"]

_SAMPLES = 10_000
_LEAST = 1 / (1 + _SAMPLES)  # no p-value of so many draws is lower


class Difference(NamedTuple):
    """How much higher one cell scores than another, on the same rows, samples and seeds.

    `rows` is how many test rows that is over, `others` how many more were tested for one of the cells or some of its
    repetitions only. `p_value` is that of `found` until it is corrected for `compared` differences.
    """

    first: Cell
    second: Cell
    test: str
    metric: str
    found: PairedDifference
    runs: int
    rows: int
    others: int
    p_value: float
    compared: int = 1

    @property
    def shown(self) -> str:
        """The difference with its sign."""
        return f"{self.found.difference:+{number_format(self.metric)}}"

    @property
    def interval(self) -> str:
        """The ends of the interval in words."""
        form = number_format(self.metric)
        return f"[{self.found.low:+{form}}, {self.found.high:+{form}}]"

    @property
    def p(self) -> str:
        """The p-value in words."""
        return p_text(self.p_value, self.compared)


def p_text(p_value: float, compared: int = 1) -> str:
    """A p-value that is corrected for so many differences as it is read; the least that can be drawn is a bound.

    >>> p_text(0.0004), p_text(0.0125), p_text(28 / 10_001, 28), p_text(28 / 10_001)
    ('< 0.001', '0.013', '< 0.003', '0.003')
    """
    least = min(1.0, compared * _LEAST)
    if p_value < 0.001 or p_value <= least * (1 + 1e-9) < 1.0:  # products of Holm's correction round otherwise
        return f"< {max(0.001, math.ceil(1000 * least) / 1000):.3f}"
    return f"{p_value:.3f}"


def known_metric(name: str) -> Metric | None:
    """The metric of that name, if there is one that needs no model; a function of one's own may have others."""
    try:
        return None if ":" in name else get_metric(name)
    except ConfigError:
        return None


def rises(metric: str) -> bool:
    """Whether higher is better, as for a metric that is not known."""
    known = known_metric(metric)
    return known is None or known.higher_is_better


def difference(first: Cell, second: Cell, test: str, metric: str) -> Difference | None:
    """How much higher the second cell scores; None where they have no repetition, row or metric in common.

    That is the mean over repetitions, as in the tables, where all were tested on the same rows, else on those that all
    have. Rows are drawn and exchanged in all repetitions alike: a row counts as one however often it was written for.
    """
    common = [each for each in first.results if each in second.results]
    scorer = known_metric(metric)
    if not common or scorer is None or not (first.has_texts and second.has_texts):
        return None
    written = [[by_row(cell.texts(each, test)) for each in common] for cell in (first, second)]
    tested = [rows.keys() for side in written for rows in side]
    kept = [row for row in tested[0] if all(row in each for each in tested)]
    if not kept:
        return None
    sides: tuple[list[Any], list[Any]] = ([], [])
    for one, two in zip(*written, strict=True):
        targets: Sequence[Any] = [one[row]["references" if scorer.needs == "references" else "prompt"] for row in kept]
        texts = [one[row]["text"] for row in kept], [two[row]["text"] for row in kept]
        for side, numbers in zip(sides, scorer.paired_statistics(*texts, targets), strict=True):
            side.append(numbers)
    found = paired_difference(scorer, *sides, samples=_SAMPLES)
    others = len({row for each in tested for row in each}) - len(kept)
    return Difference(first, second, test, metric, found, len(common), len(kept), others, found.p_value)


def by_row(texts: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """What was written by the row's name, and by how many rows of that name came before it."""
    counts: Counter[str] = Counter()
    found = {}
    for text in texts:
        found[text["id"], counts[text["id"]]] = text
        counts[text["id"]] += 1
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are, step by step (Holm 1979).

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = least
    return corrected


def corrected(found: Sequence[Difference]) -> list[Difference]:
    """Differences with p-values that count how many they are."""
    p_values = holm([each.found.p_value for each in found])
    return [each._replace(p_value=p, compared=len(found)) for each, p in zip(found, p_values, strict=True)]
