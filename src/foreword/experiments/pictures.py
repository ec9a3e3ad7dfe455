"""The pictures of a study's report: scores and costs over what it varies, and against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from foreword.charts import Point, Series, View, chart, dots, side_by_side
from foreword.experiments.comparisons import Difference, rises
from foreword.experiments.parts import Figure
from foreword.experiments.results import Cell, Results, Spread

__all__ = ["compared_with", "costs", "differences", "over_parameters", "scores", "seen_and_unseen", "trade"]

_HOLLOW = "Hollow marks: not over all planned runs."
_SIZES = ("length", "share", "rank")  # places that are a size of what is trained
_LEVEL = 0.05
_SMALL, _LARGE = 0.7, 1.4  # the marks of the first and the last place


def scores(results: Results, panel: str, test: str, metric: str) -> Iterator[Figure]:
    """Scores over the place, or one under the other where a study has no places."""
    cells = [cell for cell in results.of(panel) if cell.score(test, metric)]
    if len(results.places(panel)) > 1:
        yield from _over_places(results, cells, metric, lambda cell: cell.score(test, metric), f"{metric}")
    elif len(cells) > 1:
        ranked = [(cell, score) for cell in cells if (score := cell.score(test, metric))]
        ranked.sort(key=lambda each: each[1].mean, reverse=rises(metric))
        named = {
            cell.title: Point(0.0, score.mean, score.low, score.high, str(score), hollow=not cell.whole)
            for cell, score in ranked
        }
        yield Figure(dots(f"{metric}, the best first", named, x_label=metric), _bars(cells))


def costs(results: Results, panel: str) -> Iterator[Figure]:
    """What writing costs over the place, where this is a size of what was trained."""
    if len(results.places(panel)) > 1 and results.place in _SIZES:
        cells = [cell for cell in results.of(panel) if cell.inference_ms]
        yield from _over_places(
            results, cells, "ms a row", lambda cell: cell.inference_ms, "milliseconds to write a row"
        )


def over_parameters(results: Results, panel: str, test: str, metric: str) -> Iterator[Figure]:
    """Scores over trained parameters, where a method comes in several sizes."""
    series, cells, sizes = [], [], set()
    for family, members in _families(results.of(panel)):
        found = [
            (parameters, cell, score) for cell in members
            if (parameters := cell.mean("parameters")) and (score := cell.score(test, metric))
        ]  # fmt: skip
        cells += [cell for _, cell, _ in found]
        sizes |= {(family, parameters) for parameters, *_ in found}
        if found:
            series.append(Series(family, [_point(results, x, score, cell, metric) for x, cell, score in found]))
    if len(sizes) > len(series) and series:
        label = "trained parameters for each task"
        yield Figure(chart(f"{metric} over {label}", series, x_label=label, y_label=metric, log_x=True), _bars(cells))


def trade(results: Results, panel: str, test: str, metric: str) -> Iterator[Figure]:
    """Scores against trained parameters and against seconds of training, of all cells."""
    cells = [cell for cell in results.of(panel) if cell.score(test, metric)]
    seconds, label = _seconds(cells)
    views = []
    for x_label, number in (("trained parameters", lambda cell: cell.mean("parameters")), (label, seconds)):
        series = []
        for family, members in _families(cells):
            found = [(x, cell) for cell in members if (x := number(cell))]  # without parameters nothing is trained
            points = [_sized(results, panel, x, cell, test, metric) for x, cell in found]
            series += [Series(family, points)] if points else []
        if len({point.x for each in series for point in each.points}) > 1:
            views.append(View(series, x_label, log_x=True))
    if len(cells) < 2 or not views:
        return
    notes = ["Further left is cheaper. The dotted line joins those that no other beats in both."]
    if len(results.places(panel)) > 1:
        notes.append(f"Marks grow with the {results.place}.")
    if any(not cell.whole for cell in cells):
        notes.append(_HOLLOW)
    title = f"{metric} against what it costs, all runs"
    yield Figure(side_by_side(title, views, y_label=metric, higher_is_better=rises(metric)), " ".join(notes))


def seen_and_unseen(results: Results, panel: str) -> Iterator[Figure]:
    """The same runs on topics that were trained on and on others, for tests that are called so."""
    tests = results.tests(panel)
    for seen in tests:
        unseen = f"{seen.removesuffix('seen')}unseen"
        if not seen.endswith("-seen") or unseen not in tests:
            continue
        metric = results.metrics(panel, seen)[0]
        for place in results.places(panel):
            cells = [
                cell for cell in results.of(panel)
                if cell.place == place and cell.score(seen, metric) and cell.score(unseen, metric)
            ]  # fmt: skip
            series = [
                Series(cell.title, [
                    _point(results, x, score, cell, f"{test} {metric}")
                    for x, test in enumerate((seen, unseen)) if (score := cell.score(test, metric))
                ]) for cell in cells
            ]  # fmt: skip
            if series:
                title = f"{metric} on seen and on unseen topics{f', {results.at(place)}' if place is not None else ''}"
                figure = chart(title, series, x_label="", y_label=metric, x_names={0.0: seen, 1.0: unseen})
                yield Figure(figure, _bars(cells))


def compared_with(found: Sequence[Difference], results: Results) -> str:
    """What differences are to, in words; with its place where that is the same for all of them."""
    first = found[0].first
    at = results.at(first.place) if any(each.second.place != each.first.place for each in found) else ""
    return ", ".join(filter(None, (first.title, at)))


def differences(found: Sequence[Difference], results: Results) -> Iterator[Figure]:
    """Differences to the reference, with their intervals around 0 and p-values that are corrected."""
    if not found:
        return
    named = {}
    for each in found:
        gap, at = each.found, results.at(each.second.place)
        said = f"{each.shown} {each.interval}, p {each.p}"
        name = ", ".join(filter(None, (each.second.title, at)))
        named[name] = Point(0.0, gap.difference, gap.low, gap.high, said, hollow=each.p_value >= _LEVEL)
    reference = compared_with(found, results)
    title = f"{found[0].metric}: difference to {reference}"
    better = "right" if rises(found[0].metric) else "left"
    note = f"Further {better} is better than {reference}. Filled marks: p (Holm) below {_LEVEL:g}."
    yield Figure(dots(title, named, x_label="difference", reference=0.0), note)


def _over_places(
    results: Results, cells: Sequence[Cell], metric: str, spread: Callable[[Cell], Spread | None], y_label: str
) -> Iterator[Figure]:
    series = []
    for label in dict.fromkeys(cell.label for cell in cells):
        own = [cell for cell in cells if cell.label == label]
        points = [
            _point(results, cell.place, found, cell, metric)
            for cell in own if cell.place is not None and (found := spread(cell))
        ]  # fmt: skip
        series += [Series(own[0].title, points)] if points else []
    if series:
        log = min(point.x for each in series for point in each.points) > 0
        title = f"{y_label} over {results.place}"
        yield Figure(chart(title, series, x_label=results.place, y_label=y_label, log_x=log), _bars(cells))


def _point(results: Results, x: float, spread: Spread, cell: Cell, metric: str) -> Point:
    at = results.at(cell.place)
    said = f"{cell.title}{f', {at}' if at else ''}: {metric} {spread}, {len(cell.results)} of {len(cell.planned)} runs"
    return Point(x, spread.mean, spread.low, spread.high, said, hollow=not cell.whole)


def _sized(results: Results, panel: str, x: float, cell: Cell, test: str, metric: str) -> Point:
    """A point without its interval, as large as its place is far on."""
    places, score = results.places(panel), cell.score(test, metric)
    share = places.index(cell.place) / max(1, len(places) - 1)
    size = _SMALL + (_LARGE - _SMALL) * share if len(places) > 1 else 1.0
    at = results.at(cell.place)
    said = f"{cell.title}{f', {at}' if at else ''}: {metric} {score}, {x:,.0f}"
    return Point(x, score.mean if score else 0.0, said=said, hollow=not cell.whole, size=size)


def _seconds(cells: Sequence[Cell]) -> tuple[Callable[[Cell], float | None], str]:
    """How long a method takes to be trained; with all its candidates, where these are told."""
    if any(cell.candidates > 1 for cell in cells) and all(cell.mean("tuning_seconds") for cell in cells):
        return lambda cell: cell.mean("tuning_seconds"), "seconds to train all candidates"
    return lambda cell: cell.mean("train_seconds"), "seconds to train"


def _families(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """The cells of each file of the study, under its name."""
    for family in dict.fromkeys(cell.family for cell in cells):
        members = [cell for cell in cells if cell.family == family]
        yield members[0].method, members


def _bars(cells: Sequence[Cell]) -> str:
    """What the bars of a picture are, and its hollow marks."""
    several = any(len(cell.results) > 1 for cell in cells)
    single = any(len(cell.results) == 1 for cell in cells)
    notes = ["Bars: the least and the most over runs (samples and seeds)."] if several else []
    notes += ["Bars of a single run: its 95 % bootstrap interval over test rows."] if single else []
    return " ".join([*notes, *([_HOLLOW] if any(not cell.whole for cell in cells) else [])])
