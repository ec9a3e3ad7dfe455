"""The study behind docs/results.md: adaptive prefixes beside plain ones, on understanding tasks, with several seeds.

    python benchmarks/understanding.py --out runs/study            # hours on 2 cores; goes on where it was stopped
    python benchmarks/understanding.py --out runs/study --list     # the commands alone
    python benchmarks/understanding.py --out runs/study --report   # the tables of what is there

Every cell is one `foreword` command, which is printed and which anybody can run alone; this script runs those that are
missing, several at a time, and prints the tables. A cell is a folder of several seeds with their test scores.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

SHARED = ["--base", "minilm", "--precision", "bfloat16", "--evaluate", "--patience", "0", "--dev-limit", "300"]


class Setting(NamedTuple):
    """How much data: the flags, and the epochs and rows of a step that it is trained with."""

    title: str
    flags: tuple[str, ...]


class Method(NamedTuple):
    """A row of the tables: its flags; `after` is the method whose runs it starts from."""

    title: str
    flags: tuple[str, ...]
    after: str = ""


SETTINGS = {
    "32-shot": Setting("32 rows of each label", ("--shots", "32", "--epochs", "20", "--eval-every", "10")),
    "full": Setting("all training rows", ("--epochs", "6", "--eval-every", "60")),
}
OPTIONS = ("--batch-size", "16", "--length", "16", "--learning-rate", "0.01", "--warmup-ratio", "0.1")
GATES = ("--gates", "apt")
METHODS = {
    "plain": Method("plain prefix (P-Tuning v2)", ()),
    "plus": Method("PT-2+: 1.5 × the length", ("--length-factor", "1.5")),
    "star": Method("PT-2*: lengths from APT's gates", ("--lengths-from", "{apt}"), "apt"),
    "apt": Method("APT", GATES),
    "no-slots": Method("APT without α", (*GATES, "--no-slot-gates")),
    "no-layers": Method("APT without λ", (*GATES, "--no-layer-gates")),
    "no-text": Method("APT without h", ("--gates", "static")),
    "fast": Method("APT, gates at the prefix's rate", (*GATES, "--gate-learning-rate", "0.01")),
    "middle": Method("APT, gates at a third of that rate", (*GATES, "--gate-learning-rate", "0.003")),
    "one": Method("APT, λ begins at 1", (*GATES, "--layer-gate-start", "1")),
    "first": Method("APT, gates read the first token", (*GATES, "--gate-pooling", "cls")),
    "tokens": Method("APT, each token has its own gates", (*GATES, "--gate-pooling", "token")),
    "short": Method("plain prefix of half the length", ("--length", "8")),
    "short-plus": Method("PT-2+ of half the length", ("--length", "8", "--length-factor", "1.5")),
    "half": Method("APT of half the length, from scratch", (*GATES, "--length", "8")),
    "pruned": Method("APT pruned to half, retrained", ("--from", "{apt}-half"), "apt"),
    "rewound": Method("the same from its birth", ("--from", "{apt}-half", "--retrain", "rewind"), "apt"),
}


# What the differences below a table are taken against.
COMPARISONS = {
    "plain": ("plus", "star", "apt", "no-slots", "no-layers", "no-text", "fast", "one", "first", "middle", "tokens"),
    "plus": ("apt",),
    "short": ("half",),
    "short-plus": ("half",),
    "apt": ("pruned", "rewound"),
    "half": ("pruned", "rewound"),
}


class Cell(NamedTuple):
    """One command and the folder that it fills."""

    folder: Path
    commands: list[list[str]]
    after: Path | None


def cells(out: Path, tasks: list[str], settings: list[str], methods: list[str], seeds: int) -> list[Cell]:
    found = []
    for setting in settings:
        for method in methods:
            for task in tasks:
                each = METHODS[method]
                folder = out / setting / task
                flags = [flag.replace("{apt}", str(folder / "apt")) for flag in each.flags]
                command = ["foreword", "train", task, *SHARED, *SETTINGS[setting].flags, *OPTIONS, *flags]
                command += ["--seeds", str(seeds), "--out", str(folder / method)]
                before = []
                apt = folder / "apt"
                if "{apt}-half" in each.flags and not apt.with_name("apt-half").exists():
                    before = [["foreword", "prune", str(apt), "--keep", "0.5", "--out", f"{apt}-half"]]
                after = folder / each.after if each.after else None
                found.append(Cell(folder / method, [*before, command], after))
    return found


def run(cell: Cell) -> None:
    """The commands of a cell, unless it is finished; a failure is told and the others go on."""
    if (cell.folder / "summary.json").exists():
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for command in cell.commands:
        print("$", shlex.join(command), flush=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"failed: {shlex.join(command)}\n{done.stderr.strip()[-600:]}", flush=True)
            return


def run_all(todo: list[Cell], workers: int) -> None:
    """First what needs nothing else, then the rest."""
    for group in ([c for c in todo if c.after is None], [c for c in todo if c.after is not None]):
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run, group))


def report(out: Path, tasks: list[str], settings: list[str]) -> str:
    """Markdown tables of all that is finished."""
    lines = []
    for setting in settings:
        summaries = {(m, t): read(out / setting / t / m) for m in METHODS for t in tasks}
        shown = [t for t in tasks if any(summaries[m, t] for m in METHODS)]
        if not shown:
            continue
        lines += [f"### {SETTINGS[setting].title}", ""]
        lines += ["| | parameters | " + " | ".join(shown) + " | mean |", "|---|--:|" + "--:|" * (len(shown) + 1)]
        for method, each in METHODS.items():
            found = [summaries[method, task] for task in shown]
            if any(found):
                lines.append(f"| {each.title} | {parameters(found)} | " + " | ".join(map(cell_text, found)) + " | "
                             + mean_text(found) + " |")  # fmt: skip
        lines.append("")
        for against, methods in COMPARISONS.items():
            lines += differences(summaries, shown, against, methods)
        lines.append("")
    return "\n".join(lines)


def read(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main_score(summary: dict[str, Any]) -> dict[str, Any]:
    return next(iter(summary["scores"].values()))


def cell_text(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "–"
    score = main_score(summary)
    return f"{score['mean']:.1f} ± {score['std']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def parameters(found: list[dict[str, Any] | None]) -> str:
    counts = sorted({each["prefix_parameters"] for each in found if each is not None})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,}–{counts[-1]:,}"


def mean_text(found: list[dict[str, Any] | None]) -> str:
    return "–" if None in found else f"{fmean(main_score(each)['mean'] for each in found if each is not None):.1f}"


def differences(
    summaries: dict[tuple[str, str], dict[str, Any] | None], tasks: list[str], against: str, methods: tuple[str, ...]
) -> list[str]:
    """Methods against another: the mean difference over tasks and seeds, and how far other seeds would move it."""
    generator = np.random.default_rng(0)
    lines = []
    for method in methods:
        pairs, shares = [], []
        for task in tasks:
            one, other = summaries[method, task], summaries[against, task]
            if one is not None and other is not None:
                pairs.append(np.subtract(main_score(one)["per_seed"], main_score(other)["per_seed"]))
                shares.append(100 * main_score(one)["mean"] / main_score(other)["mean"])
        if not pairs:
            continue
        seeds = len(pairs[0])
        means = [fmean(row[generator.integers(seeds, size=seeds)].mean() for row in pairs) for _ in range(4000)]
        low, high = np.percentile(means, [2.5, 97.5])
        mean = fmean(float(row.mean()) for row in pairs)
        wins = sum(float(row.mean()) > 0 for row in pairs)
        told = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}], above it on {wins} of {len(pairs)} tasks"
        share = f"{min(shares):.1f} to {max(shares):.1f} % of its score"
        lines.append(f"* {METHODS[method].title}, against {METHODS[against].title}: {told}, {share}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--tasks", default="sst2,trec,rte,conll04,copa")
    parser.add_argument("--settings", default="32-shot")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="commands at a time, one thread each")
    parser.add_argument("--list", action="store_true", help="print the commands alone")
    parser.add_argument("--report", action="store_true", help="print the tables alone")
    arguments = parser.parse_args()
    tasks, settings = arguments.tasks.split(","), arguments.settings.split(",")
    todo = cells(arguments.out, tasks, settings, arguments.methods.split(","), arguments.seeds)
    if arguments.list:
        print("\n".join(shlex.join(command) for cell in todo for command in cell.commands))
        return
    if not arguments.report:
        run_all(todo, arguments.workers)
    print(report(arguments.out, tasks, settings))


if __name__ == "__main__":
    main()
