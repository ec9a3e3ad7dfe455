"""The report of a study: one page that needs nothing else, and the same as Markdown.

Both are made of the same parts. Numbers are means over repetitions (samples of rows and seeds), in brackets the least
and the most of them; a single run has the bootstrap interval over its test rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from foreword.charts import Point, Series, chart
from foreword.experiments.comparisons import Difference, difference, holm
from foreword.experiments.expectations import expectations
from foreword.experiments.parts import Amount, Figure, Heading, Lines, Part, Table, Text, Value, html, markdown
from foreword.experiments.plan import Study
from foreword.experiments.published import published_for
from foreword.experiments.results import Cell, Results, recorded
from foreword.methods import METHODS
from foreword.metrics import get_metric
from foreword.pages import save_page
from foreword.storage import write_atomic

__all__ = ["save_report"]

_REFERENCE = "prefix"  # what the others are compared with, where it is there
_EXAMPLES = 6


def save_report(study: Study, results: Results, folder: str | Path) -> tuple[Path, Path]:
    """Write `NAME.html` and `NAME.md` into a folder; their paths. Raises `RunError`, `StorageError`."""
    folder = Path(folder)
    parts = list(_parts(study, results))
    page, text = folder / f"{study.name}.html", folder / f"{study.name}.md"
    save_page(page, f"Study {study.name}", "\n".join(map(html, parts)))
    write_atomic(text, f"# Study {study.name}\n\n" + "\n\n".join(filter(None, map(markdown, parts))) + "\n")
    return page, text


def _parts(study: Study, results: Results) -> Iterator[Part]:
    done = len(results.jobs) - len(results.missing)
    yield Text(study.description)
    yield Lines(_summary(results, done))
    for panel in results.panels:
        yield from _panel(results, panel)
    yield from _expected(results)
    yield from _published(results)
    yield from _examples(results)
    yield from _made(results)


def _summary(results: Results, done: int) -> list[str]:
    """What was done, and the best of each test."""
    lines = [f"{done} of {len(results.jobs)} runs are done."]
    for panel in results.panels:
        for test in results.tests(panel):
            metric = results.metrics(panel, test)[0]
            for place in results.places(panel):
                cells = [cell for cell in results.of(panel, place=place) if _has(cell, test)]
                ranked = sorted(cells, key=lambda cell: cell.score(test, metric).mean, reverse=_rises(metric))
                told = ", ".join(f"{_name(each)} {_main(each, test, metric)}" for each in ranked[:3])
                where = "; ".join(filter(None, (panel, "" if test == "test" else test, _at(results, place))))
                lines.append(f"{where or test}: best {metric} {told}.")
    counts = sorted({len(each["candidates"]) for cell in results.cells for each in cell.results.values()})
    if counts == [1]:
        return [*lines, "No method was tuned: each has the options of its file."]
    told = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return [*lines, f"Methods were tuned over {told} candidates, by the loss on dev rows."]


def _panel(results: Results, panel: str) -> Iterator[Part]:
    for test in results.tests(panel):
        title = " ".join(filter(None, (panel, "" if test == "test" else test)))
        yield Heading(f"Scores{f', {title}' if title else ''}")
        metrics = results.metrics(panel, test)
        if len(results.places(panel)) > 1:
            yield _over_places(results, panel, test, metrics[0])
        for place in results.places(panel):
            cells = [cell for cell in results.of(panel, place=place) if _has(cell, test)]
            yield Text(f"{_at(results, place) or 'All rows'}. {_repeated(cells)}.")
            yield _scores(cells, test, metrics)
        yield from _differences(results, panel, test, metrics[0])
    yield from _costs(results, panel)


def _over_places(results: Results, panel: str, test: str, metric: str) -> Figure:
    series = []
    for label in results.labels:
        points = []
        for cell in results.of(panel, label):
            if cell.place is not None and _has(cell, test):
                found = cell.score(test, metric)
                said = f"{_name(cell)}, {_at(results, cell.place)}: {metric} {found}"
                points.append(Point(cell.place, found.mean, found.low, found.high, said))
        if points:
            series.append(Series(_titled(label), points))
    title = f"{metric} over {results.place}"
    log = min(point.x for each in series for point in each.points) > 0
    return Figure(chart(title, series, x_label=results.place, y_label=metric, log_x=log))


def _scores(cells: Sequence[Cell], test: str, metrics: Sequence[str]) -> Table:
    header = ["method", *metrics, "nats per token", "parameters", "bytes", "training s", "ms a row"]
    rows: list[list[Value]] = []
    for cell in cells:
        nats = sum(each["nats_per_token"][test] for each in cell.results.values()) / len(cell.results)
        inference = 1000 * cell.mean("inference_seconds") / cell.mean("inference_rows")
        scores = [cell.score(test, metric) for metric in metrics]
        sizes = [round(cell.mean("parameters")), round(cell.mean("num_bytes"))]
        seconds = Amount(cell.mean("train_seconds"), 0)
        rows.append([_name(cell), *scores, Amount(nats, 3), *sizes, seconds, Amount(inference, 0)])
    return Table(header, rows)


def _differences(results: Results, panel: str, test: str, metric: str) -> Iterator[Part]:
    """Each method against the reference, at each place, with p-values that count how many are compared."""
    reference = _REFERENCE if _REFERENCE in results.labels else results.labels[0]
    found: list[Difference] = []
    for place in results.places(panel):
        own = next((cell for cell in results.of(panel, reference, place) if _has(cell, test)), None)
        others = [cell for cell in results.of(panel, place=place) if cell.label != reference and _has(cell, test)]
        pairs = [difference(own, each, test, metric) for each in others] if own else []
        found += [each for each in pairs if each is not None]
    if not found:
        return
    digits = get_metric(metric).digits
    corrected = holm([each.found.p_value for each in found])
    yield Text(
        f"{metric} against {_titled(reference)} on the same rows, samples and seeds: the paired "
        "bootstrap interval over rows (95 %), and p by approximate randomization, corrected by Holm for the "
        f"{len(found)} differences of this table. Neither knows how samples of training rows differ."
    )
    rows: list[list[Value]] = []
    for each, p in zip(found, corrected, strict=True):
        rows.append(
            [
                _name(each.second),
                _at(results, each.second.place),
                Amount(each.found.difference, digits, signed=True),
                each.interval,
                Amount(p, 3),
            ]
        )
    yield Table(["method", results.place or "", "difference", "interval", "p (Holm)"], rows)


def _costs(results: Results, panel: str) -> Iterator[Part]:
    """Score against what a method stores and how long it trains, where most rows are."""
    place = results.places(panel)[-1]
    test = results.tests(panel)[0]
    metric = results.metrics(panel, test)[0]
    cells = [cell for cell in results.of(panel, place=place) if _has(cell, test)]
    if len(cells) < 2:
        return
    yield Heading("What it costs")
    for key, label, log in (
        ("parameters", "trained parameters for each task", True),
        ("train_seconds", "seconds of training", True),
    ):
        series = []
        for cell in cells:
            x, found = cell.mean(key), cell.score(test, metric)
            if x > 0:  # nothing is trained where only prompts are written
                said = f"{_name(cell)}: {x:,.0f} {label}, {metric} {found}"
                series.append(Series(_name(cell), [Point(x, found.mean, found.low, found.high, said)]))
        if len(series) > 1:
            title = f"{metric} against {label}" + (f", {_at(results, place)}" if place is not None else "")
            front = _rises(metric)
            figure = chart(title, series, x_label=label, y_label=metric, log_x=log, joined=False, front=front)
            yield Figure(figure, "The dotted line joins those that no other beats in both." if front else "")


def _expected(results: Results) -> Iterator[Part]:
    found = expectations(results)
    if not found:
        return
    yield Heading("What the papers lead one to expect")
    yield Table(
        ["statement", "source", "these runs", "measured"],
        [[each.statement, each.source, each.verdict, "; ".join(each.measured)] for each in found],
    )


def _published(results: Results) -> Iterator[Part]:
    tasks = list(dict.fromkeys(str(cell.config["task"]) for cell in results.cells))
    for task in tasks:
        found = published_for(task)
        if not found:
            continue
        yield Heading(f"Published figures, {task}")
        yield Text(
            "Prefix-Tuning (arXiv:2101.00190v1) with gpt2-medium, for summaries bart-large, trained on all rows; in "
            "brackets those of the version at ACL 2021 where they differ. Not the same model, rows or steps as here: "
            "they show how methods compared there."
            + (" The paper split XSum by topic; here it is BBC headlines." if task.startswith("bbc") else "")
        )
        metrics = list(dict.fromkeys(name for each in found for name in each.scores))
        rows = []
        for each in found:
            told = [_revised(each.scores.get(name), each.revised.get(name)) for name in metrics]
            rows.append([_titled(each.method), each.test, *told])
        yield Table(["method", "test", *metrics], rows)


def _revised(value: float | None, other: float | None) -> str:
    if value is None:
        return ""
    return f"{value:g}" if other is None or other == value else f"{value:g} ({other:g})"


def _examples(results: Results) -> Iterator[Part]:
    """What each method wrote for the same rows, spread over the first test."""
    panel = results.panels[0] if results.panels else ""
    cells = results.of(panel, place=results.places(panel)[-1]) if results.cells else []
    if not cells:
        return
    test = results.tests(panel)[0]
    common = set.intersection(*(set(cell.results) for cell in cells))
    if not common:
        return
    repetition = min(common, key=str)
    written = {_name(cell): cell.texts(repetition, test) for cell in cells if _has(cell, test)}
    count = min(map(len, written.values()))
    chosen = sorted({round(k * (count - 1) / max(1, _EXAMPLES - 1)) for k in range(min(_EXAMPLES, count))})
    yield Heading("What was written")
    yield Text(
        f"{len(chosen)} of {count} test rows, equally far apart; sample and seed {repetition[0]}, {repetition[1]}."
    )
    first = next(iter(written.values()))
    rows = []
    for place in chosen:
        rows.append([str(first[place]["id"]), "prompt", str(first[place]["prompt"]).strip()])
        rows.append(["", "reference", str(first[place]["references"][0])])
        rows += [["", name, str(texts[place]["text"])] for name, texts in written.items()]
    yield Table(["row", "who", "text"], rows)


def _made(results: Results) -> Iterator[Part]:
    """Every run with its command, and what they have in common."""
    yield Heading("How it was made")
    known = recorded(results)
    git = known["git"] or {}
    state = (
        f"commit {git.get('commit', '?')[:12]}{', with changes' if git.get('dirty') else ''}"
        if isinstance(git, dict)
        else f"{len(git)} states of the code"
    )
    devices = sorted({f"{each['device']}, {each['dtype']}" for cell in results.cells for each in cell.results.values()})
    versions = known["versions"]
    told = (
        ", ".join(f"{name} {number}" for name, number in versions.items())
        if isinstance(versions, dict)
        else "several versions"
    )
    yield Lines([f"device {'; '.join(devices)}", told, state, f"report made {time.strftime('%Y-%m-%d %H:%M %Z')}"])
    done = {
        cell.folders[repetition]: result for cell in results.cells for repetition, result in cell.results.items()
    }  # fmt: skip
    rows = []
    for job in results.jobs:
        result = done.get(Path(job.folder))
        seconds = Amount(result["train_seconds"] + result["inference_seconds"], 0) if result else ""
        rows.append([job.name, "done" if result else "missing", seconds, job.command])
    yield Table(["run", "state", "seconds", "command"], rows)


def _main(cell: Cell, test: str, metric: str) -> str:
    found = cell.score(test, metric)
    return f"{found.mean:{found.form}}"


def _name(cell: Cell) -> str:
    return _titled(cell.label)


def _titled(label: str) -> str:
    """The name of a method in tables, where a study's file is called by one."""
    return METHODS[label].title if label in METHODS else label


def _at(results: Results, place: float | None) -> str:
    return "" if place is None else f"{place:g} {results.place}"


def _repeated(cells: Sequence[Cell]) -> str:
    counts = sorted({len(cell.results) for cell in cells})
    if counts[-1] == 1:
        return "One run each, with its 95 % bootstrap interval over test rows"
    return f"Mean and range over {' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))} runs (samples and seeds)"


def _has(cell: Cell, test: str) -> bool:
    return all(test in each["scores"] for each in cell.results.values())


def _rises(metric: str) -> bool:
    return get_metric(metric).higher_is_better
