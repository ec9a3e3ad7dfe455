"""What the papers lead one to expect, and whether a study's runs agree."""

from __future__ import annotations

from typing import NamedTuple

from foreword.experiments.comparisons import Difference, difference
from foreword.experiments.results import Cell, Results
from foreword.metrics import number_format

__all__ = ["Expectation", "expectations"]

_SOURCE = "Li & Liang 2021, arXiv:2101.00190"


class Expectation(NamedTuple):
    """A statement, its source, and what the runs say of it: `agrees`, `disagrees`, `within noise`, or `mixed`."""

    statement: str
    source: str
    verdict: str
    measured: list[str]


def expectations(results: Results) -> list[Expectation]:
    """All statements that the runs at hand can say something of."""
    found = [_low_data(results), _unseen(results), _lengths(results), _words(results)]
    return [each for each in found if each is not None]


def _low_data(results: Results) -> Expectation | None:
    if results.place != "rows":
        return None
    found = []
    for panel in results.panels:
        for place in results.places(panel):
            found += _pairs(results, panel, "full", "prefix", place, results.tests(panel))
    return _said("With few rows a prefix scores higher than full fine-tuning.", f"{_SOURCE}, 6.3", found)


def _unseen(results: Results) -> Expectation | None:
    found = []
    for panel in results.panels:
        for test in results.tests(panel):
            if "unseen" in test or "news" in panel:
                for place in results.places(panel):
                    found += _pairs(results, panel, "full", "prefix", place, [test])
    return _said("On topics that were not trained on a prefix scores higher.", f"{_SOURCE}, 6.4", found)


def _lengths(results: Results) -> Expectation | None:
    """The longest prefix against the best one of those that are shorter."""
    if results.place != "length":
        return None
    found = []
    for panel in results.panels:
        for label in results.labels:
            for test in results.tests(panel):
                metric = results.metrics(panel, test)[0]
                cells = [cell for cell in results.of(panel, label) if cell.score(test, metric)]
                cells.sort(key=lambda cell: cell.place or 0.0)
                if len(cells) < 3:
                    continue
                best = max(cells[:-1], key=lambda cell: _mean(cell, test, metric))
                each = difference(cells[-1], best, test, metric)
                found += [] if each is None else [each]
    return _said("Beyond some length a longer prefix scores lower.", f"{_SOURCE}, 7.2", found)


def _mean(cell: Cell, test: str, metric: str) -> float:
    score = cell.score(test, metric)
    return float("-inf") if score is None else score.mean


def _words(results: Results) -> Expectation | None:
    """Every other way to be born against random numbers."""
    if "random" not in results.labels:
        return None
    found = []
    for panel in results.panels:
        for label in results.labels:
            for place in results.places(panel) if label != "random" else []:
                found += _pairs(results, panel, "random", label, place, results.tests(panel))
    return _said("A prefix born from real words scores higher than a random one.", f"{_SOURCE}, 7.4", found)


def _pairs(
    results: Results, panel: str, first: str, second: str, place: float | None, tests: list[str]
) -> list[Difference]:
    """How much higher the second label scores, by the main metric of each test."""
    one, two = _cell(results, panel, first, place), _cell(results, panel, second, place)
    if one is None or two is None:
        return []
    scored = [(test, results.metrics(panel, test)[0]) for test in tests]
    found = [difference(one, two, *each) for each in scored if one.score(*each) and two.score(*each)]
    return [each for each in found if each is not None]


def _cell(results: Results, panel: str, label: str, place: float | None) -> Cell | None:
    return next((cell for cell in results.of(panel, label) if cell.place == place), None)


def _said(statement: str, source: str, found: list[Difference]) -> Expectation | None:
    """The verdict over all differences, each of which should be above 0."""
    if not found:
        return None
    signs = {(each.found.better if each.beyond_noise else None) for each in found}
    if signs == {True} or signs == {True, None}:
        verdict = "agrees" if signs == {True} else "agrees where it is beyond noise"
    elif signs == {False} or signs == {False, None}:
        verdict = "disagrees" if signs == {False} else "disagrees where it is beyond noise"
    else:
        verdict = "within noise" if signs == {None} else "mixed"
    return Expectation(statement, source, verdict, [_line(each) for each in found])


def _line(each: Difference) -> str:
    """A difference in words, with its interval over rows."""
    place = "" if each.second.place is None else f" at {each.second.place:g}"
    what = f"{each.second.label}{place} against {each.first.label}"
    if each.first.place != each.second.place and each.first.place is not None:
        what += f" at {each.first.place:g}"
    where = " ".join(part for part in (each.second.panel, each.test if each.test != "test" else "") if part)
    found = each.found
    interval = f"{found.difference:+{number_format(each.metric)}} {each.interval}"
    p_value = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
    return f"{what}{f' ({where})' if where else ''}: {each.metric} {interval}, {p_value}"
