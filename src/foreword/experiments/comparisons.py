"""Whether two cells of a study differ: differences on the same rows, and p-values for several of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from foreword.errors import ConfigError
from foreword.experiments.results import Cell
from foreword.metrics import Metric, get_metric, number_format
from foreword.metrics.bootstrap import PairedDifference, paired_difference

__all__ = ["Difference", "by_row", "difference", "holm", "known_metric", "p_text", "rises"]

_SAMPLES = 2000


class Difference(NamedTuple):
    """How much higher one cell scores than another, on the same rows, samples and seeds.

    `rows` is how many test rows that is over, `others` how many more were tested for one of the cells or some of its
    repetitions only.
    """

    first: Cell
    second: Cell
    test: str
    metric: str
    found: PairedDifference
    runs: int
    rows: int
    others: int

    @property
    def shown(self) -> str:
        """The difference with its sign."""
        return f"{self.found.difference:+{number_format(self.metric)}}"

    @property
    def interval(self) -> str:
        """The ends of the interval in words."""
        form = number_format(self.metric)
        return f"[{self.found.low:+{form}}, {self.found.high:+{form}}]"


def p_text(p_value: float) -> str:
    """A p-value as it is read.

    >>> p_text(0.0004), p_text(0.0125)
    ('< 0.001', '0.013')
    """
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


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
    return Difference(first, second, test, metric, found, len(common), len(kept), others)


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
