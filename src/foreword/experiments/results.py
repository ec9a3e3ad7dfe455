"""What the runs of a study came to: cells over their repetitions."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from foreword.errors import RunError
from foreword.experiments.perform import PROTOCOL, TEXTS
from foreword.experiments.plan import Value
from foreword.experiments.records import Job, read_record, read_result
from foreword.methods import METHODS
from foreword.metrics import number_format

__all__ = ["REPEATED", "Cell", "Group", "Results", "Spread", "gather", "recorded", "unlike"]

Repetition: TypeAlias = tuple[Value, Value]  # sample and seed

_PARTS = ("task_transfer", "task_categories")  # options that make another task of a task: "bbc" and "bbc-within-news"
_TIME = "%Y-%m-%dT%H:%M:%S%z"  # as records have it
REPEATED = ("sample", "seed")  # what differs between repetitions of one cell
_OWN = ("method", "instruction", "tuning", "dev_limit")  # keys of the protocol that make another variant of a method
# What a study is over: the first of these that differs.
_PLACES = ("rows", "fraction", "rows_per_label", "length", "share", "rank", "max_steps")
_COUNTED = {"rows": "rows", "max_steps": "steps"}  # in words; 0 of them stands for all


class Spread(NamedTuple):
    """The mean of a cell's repetitions and the ends that are shown: least and most, or of one run its interval."""

    mean: float
    low: float
    high: float
    runs: int
    form: str  # how numbers of the metric are written

    def __str__(self) -> str:
        return f"{self.mean:{self.form}} [{self.low:{self.form}}, {self.high:{self.form}}]"


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their sample and seed only; `results` and `folders` go by these two.

    `label` is the name of the study's file and what else differs, `method` that of its method in words. `planned` are
    the repetitions that the study asks for, done or not; `varied` the keys that its method has several values of.
    """

    panel: str
    label: str
    method: str
    place: float | None
    config: dict[str, Value]
    planned: frozenset[Repetition] = field(repr=False)
    results: dict[Repetition, dict[str, Any]] = field(repr=False)
    folders: dict[Repetition, Path] = field(repr=False)
    varied: frozenset[str] = field(repr=False)

    @property
    def whole(self) -> bool:
        """Whether all planned repetitions are here."""
        return self.planned <= self.results.keys()

    @property
    def title(self) -> str:
        """The label in words."""
        return f"{self.method} {self.label.partition(' ')[2]}".strip()

    @property
    def family(self) -> str:
        """The file of the study that it comes from, whatever its options."""
        return self.label.partition(" ")[0]

    def option(self, name: str) -> Any:
        """A key as it is set, else its default; None for an option that the method does not have."""
        return _value(self.config, name)

    def usual(self, but: Collection[str] = ()) -> bool:
        """Whether its method, which the study may have in several forms, has its defaults here; no matter in `but`."""
        method = METHODS.get(str(self.config.get("method", "")))
        keys = [key for key in (*(method.options if method else ()), "instruction") if key in self.varied]
        return all(self.option(key) == _default(self.config, key) for key in keys if key not in but)

    def tested(self, test: str) -> str:
        """The name of the task whose test rows these are."""
        name = str(self.config.get("task", "")) if test == "test" else test
        parts = (self.config.get(key) for key in _PARTS)
        return "-".join([name, *(str(part) for part in parts if part and not name.endswith(f"-{part}"))])

    def score(self, test: str, metric: str) -> Spread | None:
        """The score over the repetitions; None unless all of them have it."""
        found = [_found(each, "scores", test, metric) for each in self.results.values()]
        values = [each["value"] for each in found if isinstance(each, dict) and _is_number(each.get("value"))]
        if len(values) < len(found):
            return None
        form = number_format(metric)
        if len(found) == 1:
            return Spread(values[0], found[0].get("low", values[0]), found[0].get("high", values[0]), 1, form)
        return Spread(statistics.fmean(values), min(values), max(values), len(values), form)

    def mean(self, *keys: str) -> float | None:
        """The mean of another number of the results, of one within another by several keys; None unless all have it."""
        values = [_found(each, *keys) for each in self.results.values()]
        return statistics.fmean(values) if all(map(_is_number, values)) else None

    @property
    def candidates(self) -> int:
        """The most candidates that a run chose from; 0 where none says so."""
        return max((len(each.get("candidates", ())) for each in self.results.values()), default=0)

    @property
    def unit(self) -> str:
        """What nats are per: a token, or a label that a head predicts."""
        return next((str(each["unit"]) for each in self.results.values() if "unit" in each), "token")

    @property
    def inference_ms(self) -> Spread | None:
        """Milliseconds to write for a row; None unless all runs say."""
        pairs = [(each.get("inference_seconds"), each.get("inference_rows")) for each in self.results.values()]
        values = [1000 * seconds / rows for seconds, rows in pairs if seconds is not None and rows]
        if len(values) < len(pairs):
            return None
        return Spread(statistics.fmean(values), min(values), max(values), len(values), ",.0f")

    def counted(self, name: str, test: str) -> set[int]:
        """What the runs say of how many rows there are of a test, such as `skipped_test_rows`."""
        return {int(n) for each in self.results.values() if _is_number(n := _found(each, name, test))}

    def has(self, test: str) -> bool:
        """Whether there are scores of a test."""
        return any(_found(each, "scores", test) for each in self.results.values())

    @property
    def has_texts(self) -> bool:
        """Whether what was written is kept; a function of one's own may keep none."""
        return any((self.folders[each] / TEXTS).exists() for each in self.results)

    def texts(self, repetition: Repetition, test: str) -> list[dict[str, Any]]:
        """What was written for the rows of a test. Raises `RunError` for a file that is damaged or missing."""
        path = self.folders[repetition] / TEXTS
        try:
            # texts may hold other ends of lines, such as U+2028
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            return [row for row in rows if row["test"] == test]
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(
                f"{path} cannot be read", "the texts of a run", f"remove {path.parent} and run again"
            ) from None


class Group(NamedTuple):
    """Cells that share a table: those at one place, which `place` names; or those of one method, at `places`."""

    place: str
    cells: list[Cell]
    places: list[str]

    @property
    def comparable(self) -> bool:
        """Whether the cells are over the same repetitions."""
        return len({frozenset(cell.results) for cell in self.cells}) <= 1


@dataclass(frozen=True)
class Results:
    """The cells of a study, and the jobs without a result; `place` names what cells are drawn over, "" for nothing.

    The cells of a group are over the same samples and seeds: those that all of them have. `alone` are the panels of one
    method, whose places are a group.
    """

    cells: tuple[Cell, ...]
    missing: tuple[Job, ...]
    jobs: tuple[Job, ...]
    place: str
    alone: frozenset[str] = frozenset()

    @cached_property
    def panels(self) -> list[str]:
        """What differs besides method, place and repetition: tasks, base models, beams."""
        return list(dict.fromkeys(cell.panel for cell in self.cells))

    @cached_property
    def labels(self) -> list[str]:
        """The methods, as the study's files call them."""
        return list(dict.fromkeys(cell.label for cell in self.cells))

    def of(self, panel: str, label: str | None = None, place: float | None = None) -> list[Cell]:
        """The cells of a panel, by label and place."""
        return [
            cell for cell in self.cells
            if cell.panel == panel and label in (None, cell.label) and (place is None or place == cell.place)
        ]  # fmt: skip

    def places(self, panel: str) -> list[float | None]:
        """Where the cells of a panel are, the least first."""
        found = {cell.place for cell in self.of(panel)}
        return sorted(found, key=lambda place: -1.0 if place is None else place)

    def at(self, place: float | None) -> str:
        """A place in words."""
        if place is None:
            return ""
        if self.place == "fraction":
            return f"{100 * place:g} % of the rows"
        return f"{place:g} {_COUNTED[self.place]}" if self.place in _COUNTED else f"{self.place} {place:g}"

    def groups(self, panel: str, test: str) -> list[Group]:
        """The cells with scores of a test, as they share tables: by place or, where there is but one method, all."""
        places = self.places(panel)
        scored = {
            place: [cell for cell in self.of(panel) if cell.place == place and cell.has(test)] for place in places
        }
        if panel not in self.alone:
            return [Group(self.at(place), cells, []) for place, cells in scored.items() if cells]
        cells = [cell for each in scored.values() for cell in each]
        return [Group("", cells, [self.at(cell.place) for cell in cells])] if cells else []

    def tests(self, panel: str) -> list[str]:
        """The tests of a panel, in order."""
        scores = [_found(each, "scores") for cell in self.of(panel) for each in cell.results.values()]
        return list(dict.fromkeys(test for each in scores if isinstance(each, dict) for test in each))

    def metrics(self, panel: str, test: str) -> list[str]:
        """The metrics of a test, the main one of the first cell first."""
        scores = [_found(each, "scores", test) for cell in self.of(panel) for each in cell.results.values()]
        return list(dict.fromkeys(name for each in scores if isinstance(each, dict) for name in each))


def gather(jobs: Iterable[Job]) -> Results:
    """The results of jobs as cells.

    Raises `RunError` for a damaged file, and for other weights or precisions of a base model under one name.
    """
    jobs = tuple(jobs)
    axes = {job.name: [part.partition("=")[0] for part in job.name.split(",")[1:]] for job in jobs}
    differing = dict.fromkeys(key for keys in axes.values() for key in keys if key not in REPEATED)
    numeric = [key for key in differing if all(_is_number(job.config.get(key)) for job in jobs)]
    numeric = [key for key in numeric if key not in _COUNTED or all(job.config[key] for job in jobs)]
    own = [key for key in numeric if not _is_of_panel(key)]
    place = next((key for key in (*_PLACES, *own) if key in numeric), "")
    panels = sorted((key for key in differing if _is_of_panel(key) and key != place), key=lambda key: key != "task")
    groups: dict[tuple[str, str, float | None], list[Job]] = {}
    for job in jobs:
        others = [key for key in axes[job.name] if key not in (*REPEATED, *panels, place)]
        label = " ".join([job.name.partition(",")[0], *(f"{key} {job.config[key]}" for key in others)])
        panel = ", ".join(f"{'' if key == 'task' else f'{key} '}{_value(job.config, key)}" for key in panels)
        where = float(job.config[place]) if place else None
        groups.setdefault((panel, label, where), []).append(job)
    found = {job.name: result for job in jobs if (result := read_result(job.folder)) is not None}
    words, varied = _in_words(jobs), _varied(jobs)
    cells = [
        _cell(*key, words, group, found, varied[str(group[0].config.get("method", ""))])
        for key, group in groups.items() if any(job.name in found for job in group)
    ]  # fmt: skip
    _check_weights(jobs, found)
    missing = tuple(job for job in jobs if job.name not in found)
    methods = Counter(panel for panel, _ in {(panel, label) for panel, label, _ in groups})
    alone = frozenset(panel for panel, count in methods.items() if count == 1 and place)
    return Results(tuple(_over_the_same(cells, alone)), missing, jobs, place, alone)


def _is_of_panel(key: str) -> bool:
    """Whether runs with other values of a key are not to be compared: those of other base models, tasks or beams."""
    return key.startswith("task_") or (key in PROTOCOL and key not in _OWN)


def _check_weights(jobs: Iterable[Job], found: Mapping[str, dict[str, Any]]) -> None:
    """A base model may have changed where it comes from, and `auto` is not the same precision everywhere.

    What it was then and now, or here and there, is not one thing.
    """
    known: dict[tuple[Any, ...], Any] = {}
    for job in jobs:
        result = found.get(job.name, {})
        base, dtype = _value(job.config, "base"), result.get("dtype")
        again = f"remove {job.folder} and run again, or choose another --out"
        weights = result.get("base_fingerprint")
        if weights is not None and known.setdefault(("weights", base, dtype), weights) != weights:
            raise RunError(
                f"{job.name} was made with other weights of {base} than runs before it", "the same base model", again
            )
        wanted = _value(job.config, "dtype")
        before = known.setdefault(("dtype", base, wanted), dtype) if dtype is not None else None
        if before != dtype:
            raise RunError(
                f"{job.name} was made with {base} in {dtype}, runs before it in {before}",
                f"one precision for dtype = {wanted!r}", again,
            )  # fmt: skip


def _in_words(jobs: Iterable[Job]) -> dict[str, str]:
    """What the study's files are called in words: by their method, unless that has several files with other names."""
    methods = {job.name.partition(",")[0]: str(job.config.get("method", "")) for job in jobs}
    alone = [method for method, count in Counter(methods.values()).items() if count == 1]
    return {
        file: METHODS[method].title if method in METHODS and (file == method or method in alone) else file
        for file, method in methods.items()
    }


def _varied(jobs: Iterable[Job]) -> dict[str, frozenset[str]]:
    """The keys that runs of a method have several values of, by method."""
    configs: dict[str, list[Mapping[str, Value]]] = {}
    for job in jobs:
        configs.setdefault(str(job.config.get("method", "")), []).append(job.config)
    return {
        method: frozenset(
            key for key in {key for each in own for key in each} if len({_value(each, key) for each in own}) > 1
        )
        for method, own in configs.items()
    }


def _value(config: Mapping[str, Value], key: str) -> Any:
    """What a run has under a key: as it is set, else its default."""
    return config[key] if key in config else _default(config, key)


def _default(config: Mapping[str, Value], key: str) -> Any:
    method = METHODS.get(str(config.get("method", "")))
    return method.options[key].default if method and key in method.options else PROTOCOL.get(key)


def _cell(
    panel: str, label: str, place: float | None, words: Mapping[str, str], jobs: Sequence[Job],
    found: Mapping[str, dict[str, Any]], varied: frozenset[str],
) -> Cell:  # fmt: skip
    by_repetition = {(job.config.get("sample", 0), job.config.get("seed", 0)): job for job in jobs}
    done = {repetition: job for repetition, job in by_repetition.items() if job.name in found}
    return Cell(
        panel, label, words[label.partition(" ")[0]], place, jobs[0].config, frozenset(by_repetition),
        {repetition: found[job.name] for repetition, job in done.items()},
        {repetition: Path(job.folder) for repetition, job in done.items()}, varied,
    )  # fmt: skip


def _over_the_same(cells: Sequence[Cell], alone: Collection[str]) -> list[Cell]:
    """The cells of each group over the repetitions that all of them have, planned for all or not.

    Where they have none in common, they stay as they are and are not `comparable`.
    """
    keys = [(cell.panel, None if cell.panel in alone else cell.place) for cell in cells]
    groups: dict[tuple[str, float | None], set[Repetition]] = {}
    for key, cell in zip(keys, cells, strict=True):
        groups.setdefault(key, set(cell.results)).intersection_update(cell.results)
    return [_only(cell, groups[key]) if groups[key] else cell for key, cell in zip(keys, cells, strict=True)]


def _only(cell: Cell, repetitions: Collection[Repetition]) -> Cell:
    return replace(cell, results={each: result for each, result in cell.results.items() if each in repetitions})


def unlike(cells: Iterable[Cell]) -> list[str]:
    """What the runs of cells do not have in common of what their times depend on: machine, device, threads."""
    known: dict[str, set[Any]] = {"machine": set(), "device": set(), "threads": set()}
    for cell in cells:
        for repetition, result in cell.results.items():
            record = read_record(cell.folders[repetition])
            known["machine"].add(record.get("machine"))
            known["device"].add(result.get("device"))
            known["threads"].add(record.get("threads", result.get("threads")))
    return [name for name, values in known.items() if len(values - {None}) > 1]


def recorded(results: Results) -> dict[str, list[Any]]:
    """What the records of all runs that are done say: each different value once, but for the times, one of each run.

    Machines, devices with their precision, threads, versions and states of the code in words; seconds; starts and ends.
    """
    done = [job for job in results.jobs if job not in results.missing]
    records = [read_record(job.folder) for job in done]
    found = [read_result(job.folder) or {} for job in done]
    attempts = [each for record in records for each in record.get("attempts", []) if each.get("status") == "done"]
    versions = [record.get("versions", {}) for record in records]
    threads = [record.get("threads", result.get("threads")) for record, result in zip(records, found, strict=True)]
    return {
        "machine": _different(record.get("machine") for record in records),
        "device": _different(", ".join(filter(None, (each.get("device"), each.get("dtype")))) for each in found),
        "threads": _different(threads),
        "versions": _different(", ".join(f"{name} {number}" for name, number in each.items()) for each in versions),
        "code": _different(_state(record.get("git")) for record in records),
        "seconds": [record["seconds"] for record in records if _is_number(record.get("seconds"))],
        "starts": [each["started"] for each in attempts if "started" in each],
        "ends": [end for each in attempts if (end := _end(each)) is not None],
    }


def _different(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value))


def _state(git: dict[str, Any] | None) -> str:
    """The commit in words; "" where there was no checkout."""
    return f"commit {git.get('commit', '?')[:12]}{', with changes' if git.get('dirty') else ''}" if git else ""


def _end(attempt: Mapping[str, Any]) -> str | None:
    """When an attempt ended, written as its start is."""
    try:
        start = datetime.strptime(attempt["started"], _TIME)
        return (start + timedelta(seconds=attempt["seconds"])).strftime(_TIME)
    except (KeyError, TypeError, ValueError):
        return None


def _found(values: Any, *keys: str) -> Any:
    """What stands in a result under these keys, one within the other; None where there is nothing."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
