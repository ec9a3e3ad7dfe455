"""Runs side by side: scores with intervals, sizes, training time, what reading a prefix costs, and differences.

What is compared are run folders, prefix folders, and folders with a run for each of several seeds. What one of them
lacks is left open, with a note that says how to get it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from foreword.artifact import HEADER, load_prefix
from foreword.base import BaseModel
from foreword.cost import Cost, Forward, attention_costs, forward_seconds, query_heads
from foreword.errors import ConfigError, RunError
from foreword.evaluate import Evaluation, Interval, evaluation_file
from foreword.metrics import get_metric, number_format
from foreword.metrics.bootstrap import paired_difference
from foreword.prefix import Prefix
from foreword.runs import CONFIG, PREFIX, SUMMARY, is_run
from foreword.seeds import Spread, spreads

__all__ = [
    "LEGEND", "Comparison", "Difference", "Entry", "compare", "method_words", "seed_folders", "short_names",
]  # fmt: skip

OPEN = "–"
LEGEND = (
    "prefix, trained: parameters; train s: seconds of the steps alone, of all with dev scores; "
    "slots, MACs: what reading the prefix adds for every token, in multiply-accumulates, "
    "and once for each text where gates read it whole; forward: time with the prefix over time without"
)


class Difference(NamedTuple):
    """How much higher one entry scores than another on the same rows, with the ends of the 95 % interval.

    `p_value` is two-sided: how often entries that do not differ would seem to differ as much.
    """

    name: str
    against: str
    metric: str
    value: float
    low: float
    high: float
    p_value: float
    rows: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.low <= 0 <= self.high

    def __str__(self) -> str:
        spec = f"+{number_format(self.metric)}"
        p_value = "< 0.001" if self.p_value < 0.001 else f"= {self.p_value:.3f}"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}], p {p_value}"


@dataclass
class Entry:
    """What is known of one run, one prefix, or the runs of several seeds; None where it is not known.

    `kind` is run, prefix or seeds. Seconds are those of one training, for several seeds their mean.
    """

    name: str
    path: str
    kind: str
    seeds: int = 1
    task: str = ""
    base: str = ""
    method: str = ""
    scores: dict[str, Interval | Spread] = field(default_factory=dict)
    prefix_parameters: int | None = None
    trained_parameters: int | None = None
    num_bytes: int | None = None
    train_seconds: float | None = None
    wall_seconds: float | None = None
    costs: list[Cost] = field(default_factory=list)
    forward: Forward | None = None
    notes: list[str] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the evaluations' texts."""
        evaluations, self.evaluations = self.evaluations, []
        try:
            plain = asdict(self)
        finally:
            self.evaluations = evaluations
        del plain["evaluations"]
        plain["scores"] = {name: score._asdict() for name, score in self.scores.items()}
        plain["costs"] = [cost._asdict() for cost in self.costs]
        plain["forward"] = None if self.forward is None else self.forward._asdict()
        rows = [{"split": each.split, "sha256": each.data_sha256, "rows": len(each.outputs)} for each in evaluations]
        return {**plain, "scored_rows": rows[0] if rows else None}


@dataclass(frozen=True)
class Comparison:
    """The entries, how each differs from the first where both were scored on the same rows, and notes."""

    entries: list[Entry]
    differences: list[Difference]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "entries": [entry.to_dict() for entry in self.entries],
            "differences": [{**each._asdict(), "clear": each.clear} for each in self.differences],
            "notes": self.notes,
        }

    def score_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: what each is, its scores, and Δ, how much higher it scores than the first."""
        metrics = list(dict.fromkeys(name for entry in self.entries for name in entry.scores))
        found = {(each.name, each.metric): each for each in self.differences}
        header = ["", "method", *metrics]
        against = [m for m in metrics if any(each.metric == m for each in self.differences)]
        header += [f"Δ {metric}" for metric in against]
        rows = []
        for entry in self.entries:
            own = [
                format(entry.scores[metric], number_format(metric)) if metric in entry.scores else OPEN
                for metric in metrics
            ]
            gaps = [
                str(found.get((entry.name, metric), "" if entry is self.entries[0] else OPEN)) for metric in against
            ]
            rows.append([entry.name, entry.method or OPEN, *own, *gaps])
        return header, rows

    def cost_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: parameters, bytes, seconds of training, and what is added for every token (see `LEGEND`)."""
        measured = any(entry.forward for entry in self.entries)
        header = ["", "prefix", "trained", "bytes", "train s", "slots", "MACs"]
        rows = []
        for entry in self.entries:
            seconds = OPEN if entry.train_seconds is None else f"{entry.train_seconds:,.0f}"
            if entry.train_seconds is not None and entry.wall_seconds is not None:
                seconds += f" of {entry.wall_seconds:,.0f}"
            sizes = (entry.prefix_parameters, entry.trained_parameters, entry.num_bytes)
            row = [entry.name, *(OPEN if size is None else f"{size:,}" for size in sizes), seconds]
            row += [_costs(entry.costs, lambda c: f"{c.slots:,}"), _costs(entry.costs, _multiply_adds)]
            forward = OPEN if entry.forward is None else f"× {entry.forward.ratio:.2f}"
            rows.append([*row, forward] if measured else row)
        return [*header, "forward"] if measured else header, rows

    def to_markdown(self) -> str:
        """Both tables and the notes."""
        tables = "\n\n".join(_markdown(*table) for table in (self.score_table(), self.cost_table()))
        return tables + "".join(f"\n\n{note}" for note in (LEGEND, *self.notes))


def compare(
    paths: Sequence[str | Path],
    *,
    split: str = "test",
    samples: int = 1000,
    load: Callable[[str], BaseModel] | None = None,
) -> Comparison:
    """Compare run folders, prefix folders and folders of several seeds, in this order.

    Scores are those that `foreword evaluate` or `train --evaluate` kept for `split`: test, dev, or what follows
    "evaluation-" in the name of another file that was kept. With `load`, which gets a base
    model by name, forward passes with and without each prefix are timed. Raises `ConfigError` without paths, `RunError`
    for something else than a run or prefix, `DataError` for scores that cannot be read.
    """
    if not paths:
        raise ConfigError("nothing to compare", "run or prefix folders", "name at least one")
    entries = [_entry(Path(path), name, split) for path, name in zip(paths, short_names(paths), strict=True)]
    if load is not None:
        bases: dict[str, BaseModel] = {}
        for path, entry in zip(paths, entries, strict=True):
            prefix = _prefix_of(Path(path), entry.kind)
            if prefix is not None:
                base = bases.setdefault(entry.base, bases.get(entry.base) or load(entry.base))
                entry.forward = forward_seconds(base, prefix)
                entry.costs = attention_costs(prefix, getattr(base.model.config, "num_attention_heads", None))
    found, notes = _differences(entries, samples)
    for entry in entries:
        notes += [f"{entry.name}: {note}" for note in entry.notes]
    dtypes = sorted({str(each.record["dtype"]) for e in entries for each in e.evaluations if "dtype" in each.record})
    if len(dtypes) > 1:
        notes.append(f"scored with base models in {' and '.join(dtypes)}: rounding may be part of what differs")
    if any(not cost.exact for entry in entries for cost in entry.costs):
        notes.append("≥: the base model's query heads are not known here, its key/value heads were counted")
    return Comparison(entries, found, notes)


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """As many last parts of each path as tell it from the others.

    >>> short_names(["runs/rte", "runs/sst2"]), short_names(["a/rte", "b/rte"])
    (['rte', 'sst2'], ['a/rte', 'b/rte'])
    """
    parts = [Path(path).absolute().parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


# Reading


def _entry(path: Path, name: str, split: str) -> Entry:
    """What is known of what lies at `path`."""
    seeds = seed_folders(path)
    if seeds and not is_run(path):
        entry = _seeds_entry(path, name, seeds, split)
    elif is_run(path):
        entry = _run_entry(path, name, split)
    elif (path / HEADER).is_file():
        entry = Entry(name, str(path), "prefix", notes=[f"a prefix keeps no {split} score; compare its run folder"])
        _add_prefix(entry, load_prefix(path), {})
    else:
        raise RunError(f"{path} is neither a run nor a prefix", "a folder of foreword train", "check the path")
    return entry


def seed_folders(path: Path) -> list[Path]:
    """The runs of several seeds, in the order of the seeds."""
    found = [folder for folder in path.glob("seed*") if folder.name[4:].isdigit() and is_run(folder)]
    return sorted(found, key=lambda folder: int(folder.name[4:]))


def _run_entry(path: Path, name: str, split: str) -> Entry:
    config, summary = _json(path / CONFIG), _json(path / SUMMARY)
    entry = Entry(name, str(path), "run", task=config.get("identity", {}).get("task", ""), base=config.get("base", ""))
    entry.trained_parameters = summary.get("trained_parameters")
    entry.train_seconds, entry.wall_seconds = summary.get("train_seconds"), summary.get("wall_seconds")
    if not summary:
        entry.notes.append("not finished; the command of its config.json goes on")
    prefix = _prefix_of(path, "run")
    if prefix is not None:
        _add_prefix(entry, prefix, config.get("options", {}))
    scores = path / evaluation_file(split)
    if scores.is_file():
        entry.evaluations = [Evaluation.load(scores)]
        entry.scores = dict(entry.evaluations[0].scores)
        if entry.task not in ("", entry.evaluations[0].task):
            entry.notes.append(f"trained for {entry.task}, scored on {entry.evaluations[0].task}")
        entry.task = entry.evaluations[0].task
    else:
        dev, metric = summary.get("best_dev_score"), summary.get("score")
        known = f" (dev {metric} {dev:.1f})" if dev is not None else ""
        entry.notes.append(f"no {split} score{known}; foreword evaluate {path}{_split_flag(split)}")
    return entry


def _seeds_entry(path: Path, name: str, folders: Sequence[Path], split: str) -> Entry:
    """The runs of several seeds as one entry; what they have in common is the first one's."""
    runs = [_run_entry(folder, folder.name, split) for folder in folders]
    entry, summary = runs[0], _json(path / SUMMARY)
    entry.name, entry.path, entry.kind, entry.seeds = name, str(path), "seeds", len(runs)
    entry.evaluations = [evaluation for run in runs for evaluation in run.evaluations]
    entry.notes = [
        f"{run.name if place else folders[0].name}: {n}" for place, run in enumerate(runs) for n in run.notes
    ]
    for seconds in ("train_seconds", "wall_seconds"):
        known = [getattr(run, seconds) for run in runs if getattr(run, seconds) is not None]
        setattr(entry, seconds, statistics.fmean(known) if known else None)
    kept = summary.get("scores") if split == "test" and len(summary.get("seeds", ())) == len(runs) else None
    unlike = _unlike(entry.evaluations) if entry.evaluations else ""
    entry.scores = {}
    if unlike:
        entry.notes.append(f"the scores of its seeds do not go together: {unlike}")
    elif kept:
        entry.scores = {metric: Spread(**{**s, "per_seed": tuple(s["per_seed"])}) for metric, s in kept.items()}
    elif len(entry.evaluations) == len(runs):
        entry.scores = dict(spreads(entry.evaluations))
    return entry


def _add_prefix(entry: Entry, prefix: Prefix, options: Mapping[str, Any]) -> None:
    """What a prefix tells of itself."""
    entry.base = prefix.base_name
    entry.task = entry.task or str(prefix.metadata.get("task") or "")
    entry.prefix_parameters, entry.num_bytes = prefix.num_parameters, prefix.num_bytes
    entry.method = method_words(prefix, options or prefix.metadata.get("training") or {})
    entry.costs = attention_costs(prefix, query_heads(prefix.base_name))


def _prefix_of(path: Path, kind: str) -> Prefix | None:
    """The prefix of an entry, of several seeds the first one's; None for a run that has none."""
    folder = path if kind == "prefix" else (seed_folders(path)[0] if kind == "seeds" else path) / PREFIX
    return load_prefix(folder) if (folder / HEADER).is_file() else None


def _split_flag(split: str) -> str:
    return "" if split == "test" else f" --split {split}"


def _json(path: Path) -> dict[str, Any]:
    """A JSON file of a run; empty where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error})", "a file of a run", "leave this run out") from None
    return values if isinstance(values, dict) else {}


def method_words(prefix: Prefix, options: Mapping[str, Any]) -> str:
    """How a prefix was trained, in few words.

    >>> import torch
    >>> from foreword.prefix import Site, SiteTensors
    >>> site = SiteTensors(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
    >>> method_words(Prefix({Site("encoder", 0): site}, "tiny", ""), {"gates": "apt", "shots": 32})
    '4 slots, apt gates, 32 shots'
    """
    lengths = sorted(set(prefix.lengths.values()))
    words = [f"{lengths[0]}–{lengths[-1]} slots" if len(lengths) > 1 else f"{prefix.length} slots"]
    gates = options.get("gates") or (prefix.metadata.get("gates") or {}).get("kind") or "none"
    if gates != "none":
        without = [part for part in ("slot", "layer") if options.get(f"{part}_gates") is False]
        poolings = sorted({site.gate.pooling for site in prefix.sites.values() if site.gate is not None})
        read = f" ({', '.join(poolings)})" if poolings else ""
        words.append(f"{gates} gates{read}" + "".join(f" without {part} gates" for part in without))
    if options.get("parametrization") == "mlp":
        words.append("MLP")
    if options.get("shots"):
        words.append(f"{options['shots']} shots")
    if options.get("rows"):
        words.append(f"{options['rows']} rows")
    if options.get("fraction", 1.0) < 1:
        words.append(f"{100 * options['fraction']:g} % of the rows")
    return ", ".join(words)


# Differences


def _differences(entries: Sequence[Entry], samples: int) -> tuple[list[Difference], list[str]]:
    """Every entry against the first, and why that cannot be done for some."""
    first, found, notes = entries[0], [], []
    for other in entries[1:]:
        reason = _not_comparable(first, other)
        if reason:
            notes.append(f"{other.name} and {first.name} are not comparable: {reason}")
            continue
        if not (first.evaluations and other.evaluations):
            continue  # the entry's own note says that there is no score
        rows = first.evaluations[0].outputs
        answers = [[row.text for row in each.outputs] for each in (*first.evaluations, *other.evaluations)]
        for name in first.evaluations[0].scores:
            metric = get_metric(name)
            targets: Any = [row.prompt if metric.needs == "sources" else row.references for row in rows]
            numbers, runs = metric.joint_statistics(answers, targets), len(first.evaluations)
            gap = paired_difference(metric, numbers[:runs], numbers[runs:], samples, draw_repetitions=True)
            found.append(Difference(other.name, first.name, name, *gap[:4], len(rows)))
    if found:
        notes.insert(
            0,
            f"Δ: how much higher than {first.name}, paired over rows, with 95 % bootstrap intervals and the p-values "
            "of exchanged rows",
        )
    compared = {each.name for each in found}
    if len(compared) > 1:
        notes.append(
            f"{len(compared)} differences: each interval and p-value holds by itself; by chance 1 in 20 leaves out a "
            "true 0"
        )
    if found and any(entry.seeds == 1 for entry in entries if entry.evaluations):
        notes.append("of a single seed the interval tells what other rows would change, not what other seeds would")
    if found and any(entry.seeds > 1 for entry in entries if entry.evaluations):
        notes.append(
            "of several seeds the interval tells what other seeds would change too, the p-value only other rows"
        )
    return found, notes


def _not_comparable(first: Entry, other: Entry) -> str:
    """Why the scores of two entries cannot be held against each other; empty if they can or have none."""
    if first.task and other.task and first.task != other.task:
        return f"tasks {other.task} and {first.task}"
    if not (first.evaluations and other.evaluations):
        return ""
    return _unlike([*first.evaluations, *other.evaluations])


def _unlike(evaluations: Sequence[Evaluation]) -> str:
    """How evaluations differ in what their scores depend on besides the prefix; empty if they do not."""
    first = evaluations[0]
    for other in evaluations[1:]:
        one, two = first.protocol, other.protocol
        if one["data_sha256"] != two["data_sha256"]:
            return f"they were scored on different rows ({len(other.outputs)} and {len(first.outputs)})"
        for option in {**one, **two}:
            if one.get(option) != two.get(option):
                return f"they were written with {option} {two.get(option)} and {one.get(option)}"
    return "" if _ids_agree(evaluations) else "they could use different rows of the split"


def _ids_agree(evaluations: Sequence[Evaluation]) -> bool:
    ids = [[row.id for row in each.outputs] for each in evaluations]
    return all(each == ids[0] for each in ids)


# Tables


def _costs(costs: Sequence[Cost], shown: Callable[[Cost], str]) -> str:
    """One number, or one for each kind of token."""
    if len(costs) < 2:
        return shown(costs[0]) if costs else OPEN
    return ", ".join(f"{shown(cost)} ({cost.token})" for cost in costs)


def _multiply_adds(cost: Cost) -> str:
    more = f" + {cost.once:,}/text" if cost.once else ""
    return f"{'' if cost.exact else '≥ '}{cost.multiply_adds:,}{more}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
