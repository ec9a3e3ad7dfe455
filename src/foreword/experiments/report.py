"""The report of a study: one page that needs nothing else, and the same as Markdown.

Both are made of the same parts. Numbers are means over repetitions (samples of rows and seeds), in brackets the least
and the most of them; a single run has the bootstrap interval over its test rows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from foreword.experiments.comparisons import Difference, by_row, corrected, difference, rises
from foreword.experiments.expectations import expectations
from foreword.experiments.parts import Amount, Heading, Lines, Part, Shown, Table, Text, Value, html, markdown
from foreword.experiments.pictures import (
    compared_with,
    costs,
    differences,
    over_parameters,
    scores,
    seen_and_unseen,
    trade,
)
from foreword.experiments.plan import Study
from foreword.experiments.published import beside, published_for
from foreword.experiments.records import read_record
from foreword.experiments.results import Cell, Group, Results, Spread, recorded, unlike
from foreword.methods import METHODS
from foreword.metrics import number_format
from foreword.pages import save_page
from foreword.storage import write_atomic

__all__ = ["save_report"]

_REFERENCE = "prefix"  # what the others are compared with, where it is there
_LENGTH = 10  # of the prefix that others are compared with where there are several
_EXAMPLES = 6
_PAPER = (
    "Published are the figures of Prefix-Tuning, arXiv:2101.00190v1, in brackets those of the version at ACL 2021 "
    "where they differ: with gpt2-medium, gpt2-large or bart-large, trained on all rows. Base model, rows and steps "
    "are not those of the runs here."
)

_INTERVALS = (
    "Intervals are those of the paired bootstrap over rows (95 %), p is by approximate randomization. Neither knows "
    "how samples of training rows differ, and metrics of the same texts are not corrected for each other."
)


def save_report(study: Study, results: Results, folder: str | Path) -> tuple[Path, Path]:
    """Write `NAME.html` and `NAME.md` into a folder; their paths. Raises `RunError`, `StorageError`."""
    folder = Path(folder)
    parts = list(_parts(study, results))
    page, text = folder / f"{study.name}.html", folder / f"{study.name}.md"
    save_page(page, f"Study {study.name}", "\n".join(map(html, parts)))
    write_atomic(text, f"# Study {study.name}\n\n" + "\n\n".join(map(markdown, _in_words(parts))) + "\n")
    return page, text


def _in_words(parts: Sequence[Part]) -> list[Part]:
    """The parts that Markdown has something of: no pictures, and no headings of nothing else."""
    told = [part for part in parts if markdown(part)]
    following = [*told[1:], Heading("")]
    return [
        part for part, after in zip(told, following, strict=True)
        if not (isinstance(part, Heading) and isinstance(after, Heading))
    ]  # fmt: skip


def _parts(study: Study, results: Results) -> Iterator[Part]:
    done = len(results.jobs) - len(results.missing)
    yield Text(study.description)
    yield Lines(_summary(results, done))
    tested = {
        (panel, test, metric): found
        for panel in results.panels for test in results.tests(panel) for metric in results.metrics(panel, test)
        if (found := _tested(results, panel, test, metric))
    }  # fmt: skip
    for panel in results.panels:
        yield from _panel(results, panel, tested)
    yield from _tuned(results)
    yield from _expected(results)
    yield from _compared(results, [each for found in tested.values() for each in found])
    yield from _published(results)
    yield from _examples(results)
    yield from _made(results)


def _summary(results: Results, done: int) -> list[str]:
    """What was done, and the best of each test."""
    lines = [f"{done} of {len(results.jobs)} runs are done."]
    for panel in results.panels:
        for test in results.tests(panel):
            metric = results.metrics(panel, test)[0]
            for group in results.groups(panel, test):
                told = ", ".join(_ranked(group, test, metric)[:3])
                where = "; ".join(filter(None, (panel, "" if test == "test" else test, group.place))) or test
                if group.comparable:
                    lines.append(f"{where}: best {metric} {told}.")
                else:
                    lines.append(f"{where}: not ranked, for what is compared has no samples and seeds in common.")
    counts = sorted({cell.candidates for cell in results.cells} - {0})
    if not counts:
        return lines
    if counts == [1]:
        return [*lines, "No method was tuned: each has the options of its file."]
    told = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return [*lines, f"Methods were tuned over {told} candidates, by the loss on dev rows."]


def _ranked(group: Group, test: str, metric: str) -> list[str]:
    """Methods, and the places of the only one, with their mean scores, the best first."""
    titles = [cell.title for cell in group.cells]
    names = (
        [f"{title} at {place}" for title, place in zip(titles, group.places, strict=True)] if group.places else titles
    )
    pairs = zip(names, group.cells, strict=True)
    scores = [(name, score) for name, cell in pairs if (score := cell.score(test, metric)) is not None]
    scores.sort(key=lambda each: each[1].mean, reverse=rises(metric))
    return [f"{name} {score.mean:{score.form}}" for name, score in scores]


def _panel(results: Results, panel: str, tested: Mapping[tuple[str, str, str], list[Difference]]) -> Iterator[Part]:
    for test in results.tests(panel):
        title = " ".join(filter(None, (panel, "" if test == "test" else test)))
        yield Heading(f"Scores{f', {title}' if title else ''}")
        metrics = results.metrics(panel, test)
        yield from scores(results, panel, test, metrics[0])
        for group in results.groups(panel, test):
            told = f"{_repeated(group)}. {_rows(group.cells, test)}".strip()
            yield Text(f"{group.place}. {told}" if group.place else told)
            yield _table(results, group, test, metrics)
        yield from _notes(results.of(panel), test, metrics)
        found = [each for metric in metrics if (each := tested.get((panel, test, metric)))]
        for each in found:
            yield from _differences(results, each)
        if found:
            yield Text(_INTERVALS)
    yield from seen_and_unseen(results, panel)
    yield from _costs(results, panel)


def _notes(cells: Sequence[Cell], test: str, metrics: Sequence[str]) -> Iterator[Part]:
    """What columns of the tables of a test mean, where these have them."""
    if any(beside(cell, test, each) and cell.score(test, each) for cell in cells for each in metrics):
        yield Text(
            "In the column of another base model stands what Prefix-Tuning published for the method, trained on "
            "all rows; more of it is under Published figures."
        )
    if any(cell.candidates > 1 for cell in cells):
        yield Text(
            "training s is the time of the candidate that was chosen, tuning s that of all candidates. Prefixes "
            "that were tuned together share their time: each has the part that its tokens are of all."
        )
    if differing := unlike(cells):
        yield Text(f"The runs differ in {' and '.join(differing)}: their times tell more than how methods differ.")


def _rows(cells: Sequence[Cell], test: str) -> str:
    """How many test rows there are, and how many that no method was asked; "" where runs do not say."""
    tested = _counts({number for cell in cells for number in cell.counted("test_rows", test)})
    skipped = _counts({number for cell in cells for number in cell.counted("skipped_test_rows", test)})
    if not tested:
        return ""
    return f"{tested} test rows" + (
        f", and {skipped} too long for the base model." if skipped not in ("", "0") else "."
    )


def _counts(numbers: Collection[int]) -> str:
    """Numbers in words: the only one, or the least and the most."""
    return " to ".join(map(str, dict.fromkeys((min(numbers), max(numbers))))) if numbers else ""


def _table(results: Results, group: Group, test: str, metrics: Sequence[str]) -> Table:
    """The cells of a group with their scores, what was published beside them, sizes and times."""
    cells = group.cells
    columns: dict[str, Callable[[Cell], Value]] = {"method": lambda cell: cell.title}
    if group.places:
        columns[results.place] = lambda cell: results.at(cell.place)
    if not all(cell.whole and len(cell.results) == len(cells[0].results) for cell in cells):  # else it is said above
        columns["runs"] = _runs
    for metric in metrics:
        columns[metric] = partial(_score, test=test, metric=metric)
        bases = [
            each.base for cell in cells if cell.score(test, metric) and (each := beside(cell, test, metric))
        ]  # fmt: skip
        if bases:
            columns[f"{metric} ({bases[0]})"] = partial(_paper_score, test=test, metric=metric)
    columns[f"nats per {cells[0].unit}"] = lambda cell: _amount(cell.mean("nats_per_token", test), 3)
    columns["parameters"] = lambda cell: _amount(cell.mean("parameters"))
    columns["kB"] = lambda cell: _amount(_thousandth(cell.mean("num_bytes")))
    columns["training s"] = lambda cell: _amount(cell.mean("train_seconds"))
    if any(cell.candidates > 1 for cell in cells):
        columns["tuning s"] = lambda cell: _amount(cell.mean("tuning_seconds"))
    columns["ms a row"] = lambda cell: _amount(cell.inference_ms.mean if cell.inference_ms else None)
    return Table([*columns], [[value(cell) for value in columns.values()] for cell in cells])


def _runs(cell: Cell) -> Shown:
    done = len(cell.results)
    return Shown(str(done) if cell.whole else f"{done} of {len(cell.planned)}", done)


def _score(cell: Cell, test: str, metric: str) -> Spread | str:
    return cell.score(test, metric) or ""


def _paper_score(cell: Cell, test: str, metric: str) -> str:
    figure = beside(cell, test, metric)
    return figure.told(metric) if figure else ""


def _thousandth(value: float | None) -> float | None:
    return None if value is None else value / 1000


def _amount(value: float | None, decimals: int = 0) -> Amount | str:
    """A number, or a blank where there is none."""
    return "" if value is None else Amount(value, decimals)


def _tested(results: Results, panel: str, test: str, metric: str) -> list[Difference]:
    """Each method against the reference, at each place; where there is one method, its places against one of them."""
    cells = [cell for place in results.places(panel) for cell in results.of(panel) if cell.place == place]
    cells = [cell for cell in cells if cell.score(test, metric)]
    reference = _reference(cells)
    own = {cell.place: cell for cell in cells if cell.label == reference}
    if len(own) == len(cells) and own:
        usual = own.get(float(_LENGTH)) if results.place == "length" else None
        own = dict.fromkeys(own, usual or cells[0])
    pairs = [(own[cell.place], cell) for cell in cells if cell.place in own and cell is not own[cell.place]]
    found = [difference(*pair, test, metric) for pair in pairs]
    return corrected([each for each in found if each is not None])


def _differences(results: Results, found: Sequence[Difference]) -> Iterator[Part]:
    """Differences to one reference by one metric, with p-values that count how many they are."""
    yield Text(
        f"{found[0].metric} against {compared_with(found, results)} on the same rows, samples and seeds, with p-values "
        f"corrected by Holm for the {len(found)} differences of this table."
    )
    others = _counts({each.others for each in found})
    if others != "0":
        yield Text(
            f"Not all were tested on the same rows: differences are over the {_counts({each.rows for each in found})} "
            f"that two methods and their runs have in common, {others} others are left out. They are not those of the "
            "scores above."
        )
    yield from differences(found, results)
    rows: list[list[Value]] = []
    for each in found:
        shown = Shown(each.shown, each.found.difference)
        runs = Shown(str(each.runs), each.runs)
        where = _where(results, each.second.place)
        rows.append([each.second.title, *where, runs, shown, each.interval, Shown(each.p, each.p_value)])
    yield Table(["method", *filter(None, [results.place]), "runs", "difference", "interval", "p (Holm)"], rows)


def _reference(cells: Sequence[Cell]) -> str:
    """The label that the others are compared with: a prefix, where there is one."""
    own = [cell for cell in cells if cell.family == _REFERENCE]
    usual = [cell for cell in own if cell.label == _REFERENCE or cell.option("length") == _LENGTH]
    return next((cell.label for cell in (*usual, *own, *cells)), "")


def _costs(results: Results, panel: str) -> Iterator[Part]:
    """Scores against what is stored and how long it trains and writes."""
    tests = results.tests(panel)
    if not tests or len(results.of(panel)) < 2:
        return
    metric = results.metrics(panel, tests[0])[0]
    figures = [
        *trade(results, panel, tests[0], metric),
        *over_parameters(results, panel, tests[0], metric),
        *costs(results, panel),
    ]
    if figures:
        yield Heading(f"What it costs{f', {panel}' if panel else ''}")
        yield from figures


def _expected(results: Results) -> Iterator[Part]:
    found = expectations(results)
    if not found:
        return
    yield Heading("What the papers lead one to expect")
    yield Text(
        "A verdict is by p-values below 0.05 after Holm's correction for the differences of its own statement; base "
        "models, rows and steps are others than in the papers."
    )
    yield Table(
        ["statement", "source", "published", "these runs", "measured"],
        [[each.statement, each.source, each.published, each.verdict, "; ".join(each.measured)] for each in found],
    )


def _compared(results: Results, tested: Sequence[Difference]) -> Iterator[Part]:
    """The tested differences beside those of the paper, where it has both; base models are not the same."""
    told = [(each, published) for each in tested if (published := _published_gap(each)) is not None]
    if not told:
        return
    yield Heading(f"Differences to {told[0][0].first.title}, here and in the paper")
    yield Text("Base models differ; how much higher one method scores than another compares better than scores.")
    rows: list[list[Value]] = []
    for each, published in told:
        here = Shown(f"{each.shown} {each.interval}", each.found.difference)
        there = Shown(f"{published:+{number_format(each.metric)}}", published)
        test = each.second.tested(each.test)
        rows.append([each.second.title, *_where(results, each.second.place), test, each.metric, here,
                     Shown(each.p, each.p_value), there])  # fmt: skip
    where = filter(None, [results.place])
    yield Table(["method", *where, "test", "metric", "here", "p (Holm)", "published"], rows)


def _where(results: Results, place: float | None) -> list[Value]:
    """The place in a table, which has no such column where there are none."""
    return [results.at(place)] if results.place else []


def _published_gap(each: Difference) -> float | None:
    """How much higher the second cell scores in the paper; None unless it has two figures."""
    first, second = beside(each.first, each.test, each.metric), beside(each.second, each.test, each.metric)
    if first is None or second is None or first is second:  # one figure of two forms of a method is no difference
        return None
    return second.scores[each.metric] - first.scores[each.metric]


def _published(results: Results) -> Iterator[Part]:
    """All figures of the tasks, of other metrics and base models too."""
    for task in dict.fromkeys(str(cell.config.get("task", "")) for cell in results.cells):
        found = published_for(task)
        if not found:
            continue
        yield Heading(f"Published figures, {task}")
        yield Text(
            _PAPER + (" The paper split XSum by topic; here it is BBC headlines." if task.startswith("bbc") else "")
        )
        metrics = list(dict.fromkeys(name for each in found for name in each.scores))
        rows = [
            [" ".join([METHODS[each.method].title, each.said]).strip(), each.base, each.test, *map(each.told, metrics)]
            for each in found
        ]
        yield Table(["method", "base model", "test", *metrics], rows)


def _examples(results: Results) -> Iterator[Part]:
    """What each method wrote for the same rows, spread over the first test."""
    panel = results.panels[0] if results.panels else ""
    tests = results.tests(panel)
    cells = [cell for cell in results.of(panel, place=results.places(panel)[-1]) if cell.has_texts] if tests else []
    common = set.intersection(*(set(cell.results) for cell in cells)) if cells else set()
    if not common:
        return
    repetition = min(common, key=str)
    written = {cell.title: texts for cell in cells if (texts := by_row(cell.texts(repetition, tests[0])))}
    first = next(iter(written.values()), {})
    asked = [row for row in first if all(row in texts for texts in written.values())]
    if not asked:
        return
    count = len(asked)
    chosen = sorted({round(k * (count - 1) / max(1, _EXAMPLES - 1)) for k in range(min(_EXAMPLES, count))})
    yield Heading("What was written")
    yield Text(
        f"{len(chosen)} of {count} test rows, equally far apart; sample and seed {repetition[0]}, {repetition[1]}."
    )
    rows = []
    for row in (asked[place] for place in chosen):
        rows.append([str(first[row]["id"]), "prompt", str(first[row]["prompt"]).strip()])
        rows.append(["", "reference", str(first[row]["references"][0])])
        rows += [["", name, str(texts[row]["text"])] for name, texts in written.items()]
    yield Table(["row", "who", "text"], rows)


def _tuned(results: Results) -> Iterator[Part]:
    """What was tried for each method, what was chosen, and whether training was over when its steps were."""
    rows: list[list[Value]] = []
    for label in results.labels:
        cells = [cell for cell in results.cells if cell.label == label]
        runs = [result for cell in cells for result in cell.results.values() if result.get("candidates")]
        if not runs:
            continue
        differing = _differing([each["config"] for run in runs for each in run["candidates"] if each.get("config")])
        chosen = Counter(_values(run.get("chosen", {}), differing) for run in runs)
        told = ", ".join(f"{values} ({count})" for values, count in chosen.most_common()) if differing else ""
        fits = [run.get("fit", {}) for run in runs]
        planned = sorted({fit["planned_steps"] for fit in fits if fit.get("planned_steps")})
        last = sum(bool(fit.get("steps")) and fit["best_step"] == fit["planned_steps"] for fit in fits)
        rows.append([cells[0].title, len(runs[0]["candidates"]), told, ", ".join(map(str, planned)),
                     f"{last} of {len(runs)}" if planned else ""])  # fmt: skip
    if not rows:
        return
    yield Heading("How methods were tuned")
    yield Table(["method", "candidates", "chosen (runs)", "steps at most", "best at the last"], rows)
    yield Text(
        "The candidate with the lowest loss on dev rows was chosen in each run. Where the last step was the best, more "
        "steps or a higher learning rate may give more."
    )


def _differing(configs: Sequence[Mapping[str, object]]) -> list[str]:
    """The options that candidates do not have in common, but for the seed, which differs between runs."""
    keys = dict.fromkeys(key for config in configs for key in config if key != "seed")
    return [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]


def _values(config: Mapping[str, object], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {config.get(key)}" for key in keys)


def _made(results: Results) -> Iterator[Part]:
    """Every run with its command, and what they have in common."""
    yield Heading("How it was made")
    yield Lines([*_circumstances(results), f"report made {time.strftime('%Y-%m-%d %H:%M %Z')}"])
    missing = {job.name for job in results.missing}
    rows: list[list[Value]] = []
    for job in results.jobs:
        seconds = "" if job.name in missing else _amount(read_record(job.folder).get("seconds"))
        rows.append([job.name, "missing" if job.name in missing else "done", seconds, job.command])
    yield Table(["run", "state", "seconds", "command"], rows)


def _circumstances(results: Results) -> list[str]:
    """What the runs were made on and with, and how long they took."""
    known = recorded(results)
    lines = [f"{name}: {'; '.join(known[name])}" for name in ("machine", "device") if known[name]]
    lines += [f"{'; '.join(known['threads'])} threads for each run"] if known["threads"] else []
    seconds, starts, ends = known["seconds"], known["starts"], known["ends"]
    if seconds:
        minutes = round(sum(seconds) / 60)
        when = f", from {min(starts)} to {max(ends)}" if starts and ends else ""
        lines.append(f"{len(seconds)} runs took {minutes // 60} h {minutes % 60:02} min{when}")
    return [*lines, *known["versions"], *known["code"]]


def _repeated(group: Group) -> str:
    """What a figure of these cells is over."""
    cells = group.cells
    counts = sorted({len(cell.results) for cell in cells})
    told = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    if not group.comparable:
        return f"Means and ranges over {told} runs of different samples and seeds: not to be compared"
    common = (
        ""
        if all(cell.whole for cell in cells)
        else (f" the {told} of {max(len(cell.planned) for cell in cells)} that all here have,")
    )
    if counts[-1] == 1:
        return f"One run each,{common} with its 95 % bootstrap interval over test rows"
    if common:
        return f"Mean and range over {common.removeprefix(' the ').removesuffix(',')} (samples and seeds)"
    return f"Mean and range over {told} runs (samples and seeds)"
