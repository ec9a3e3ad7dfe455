"""`foreword study`: many runs described by a few files: what there is, what is missing, and making it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.console import emit, note, say, stages, table
from foreword.cli.options import Json
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.experiments import Job, Outcome, Study
    from foreword.experiments.executors import Backend

__all__ = ["study"]

study = typer.Typer(
    name="study",
    help="Compare methods over tasks, data and options: make the runs of a study, each once, and see what is there.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Name = Annotated[str, typer.Argument(help="A study of `foreword study list`, or its folder.", metavar="NAME")]
_Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Where the results are kept. (default: runs/studies/NAME)")
]
_Only = Annotated[
    list[str] | None, typer.Option("--only", help="A method, a file of the study or a run's name; repeatable.")
]
_Set = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, wins over the study's files; repeatable.")]
_SCORES = 2  # of a result in one line


@study.command("list")
def list_(as_json: Json = False) -> None:
    """List the studies: those in ./experiments and the built-in ones."""
    from foreword.experiments import list_studies, load_study

    found = []
    for folder in list_studies().values():
        each = load_study(folder)
        found.append({"name": each.name, "runs": len(each.runs), "description": each.description})
    table("", ["study", "runs", ""], [[*each.values()] for each in found])
    emit({"studies": found}, as_json)


@study.command("show")
def show(name: _Name, only: _Only = None, given: _Set = None, as_json: Json = False) -> None:
    """Show what a study is made of: what its runs have in common, and what differs."""
    from foreword.experiments import select

    chosen = _load(name, given)
    runs = select(chosen.runs, only or [])
    common = {
        key: value for key, value in runs[0].config.items() if all(each.config.get(key) == value for each in runs)
    }
    say(f"{chosen.name}: {chosen.description}")
    table("in common", ["", ""], [[key, _shown(value)] for key, value in common.items()])
    rows = [
        [each.name, ", ".join(f"{key} = {_shown(each.config[key])}" for key in each.config if key not in common)]
        for each in runs
    ]
    table(f"{len(runs)} runs", ["run", "what differs"], rows)
    emit(
        {"study": chosen.name, "folder": str(chosen.folder), "perform": chosen.perform,
         "runs": [{"name": each.name, "config": each.config} for each in runs]}, as_json,
    )  # fmt: skip


@study.command("run")
def run(
    name: _Name,
    out: _Out = None,
    only: _Only = None,
    given: _Set = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Make so many of the missing runs only.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="Try a failed run so many times more.")] = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, help="So many processes that share the cores. (default: this one alone)")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Make the runs on Ray: auto, local, or HOST:PORT of a cluster.")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0.0, help="With --ray: processors for each run.")] = 1.0,
    gpus: Annotated[
        float | None, typer.Option(min=0.0, help="With --ray: GPUs for each run. (default: 1 if there are any)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the runs that are missing; the same command goes on where it was stopped, and never makes a run twice.

    A result belongs to its configuration, its data and the code of Foreword; where one of them changed, it is made
    anew. With --workers and --ray local both, Ray is started here with so many processors.

    foreword study run low-data-small --workers 2
    foreword study run low-data-small --only prefix --only lora --limit 4
    foreword study run low-data --ray auto --gpus 0.25
    """
    from foreword.experiments import execute, state_of

    if ray is None and gpus is not None:
        raise ConfigError("--gpus without --ray", "both or none", "leave it out, or add --ray auto")
    chosen, jobs, folder = _jobs(name, out, only, given)
    missing = [job for job in jobs if state_of(job.folder) != "done"]
    todo = missing[:limit]
    note(f"{len(jobs) - len(missing)} of {len(jobs)} runs are in {folder}; {len(todo)} to make; Ctrl-C stops cleanly")
    if todo and todo[0].git and todo[0].git["dirty"]:
        note("the code differs from its last commit; every record says so")
    told: Counter[str] = Counter()
    try:
        with _backend(workers, ray, cpus, gpus, needed=bool(todo)) as backend:
            execute(todo, backend, retries=retries, report=lambda job, end: _report(job, end, told, len(todo)))
    except KeyboardInterrupt:
        done = sum(state_of(job.folder) == "done" for job in jobs)
        raise KeyboardInterrupt(f"stopped; {done} of {len(jobs)} runs are done; the same command goes on") from None
    summary = _print_status(chosen, jobs, folder, commands=False)
    emit(summary, as_json)
    if summary["failed"]:
        raise typer.Exit(1)


@study.command("status")
def status(name: _Name, out: _Out = None, only: _Only = None, given: _Set = None, as_json: Json = False) -> None:
    """Say of every run whether it is done, running, failed or missing, and which command makes it."""
    chosen, jobs, folder = _jobs(name, out, only, given)
    emit(_print_status(chosen, jobs, folder, commands=True), as_json)


@study.command("report")
def report(
    name: _Name,
    out: _Out = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="The folder of the report. (default: that of the results)")
    ] = None,
    only: _Only = None,
    given: _Set = None,
    code: Annotated[
        str, typer.Option(help="Report the results of that code version, or its beginning. (default: the present one)")
    ] = "",
    as_json: Json = False,
) -> None:
    """Write what a study came to as one page, NAME.html, and as NAME.md: tables, charts, texts side by side.

    It can be written at any time; what is missing is said in it. Results that were made before the code of Foreword was
    changed are reported with --code; `run.json` of each names its version.

    foreword study report low-data-small --to docs/results
    """
    from foreword.experiments import other_results
    from foreword.experiments.report import save_report
    from foreword.experiments.results import gather

    chosen, jobs, folder = _jobs(name, out, only, given, code)
    results = gather(jobs)
    if not results.cells:
        others = "" if code or not other_results(folder, jobs[0].code) else ", or name the --code of the results there"
        action = f"foreword study run {name}{others}"
        raise ConfigError(f"no run of {chosen.name} is done in {folder}", "at least one", action)
    page, text = save_report(chosen, results, to or folder)
    say(f"{len(jobs) - len(results.missing)} of {len(jobs)} runs are in {page} and {text.name}")
    emit({"study": chosen.name, "page": str(page), "markdown": str(text), "missing": len(results.missing)}, as_json)


def _load(name: str, given: list[str] | None) -> Study:
    from foreword.experiments import load_study, settings

    return load_study(name, settings(given or []))


def _jobs(
    name: str, out: Path | None, only: list[str] | None, given: list[str] | None, code: str = ""
) -> tuple[Study, list[Job], Path]:
    """The study, its jobs, and the folder of their results; with `code`, what that version of the code has made."""
    from foreword.experiments import jobs_made_with, jobs_of, select

    chosen = _load(name, given)
    folder = out or Path("runs") / "studies" / chosen.name
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file", "a folder or an unused name", "choose another --out")
    runs = select(chosen.runs, only or [])
    if code:
        return chosen, jobs_made_with(code, chosen, folder, runs, sets=given or [], name=name), folder
    return chosen, jobs_of(chosen, folder, runs, sets=given or [], name=name), folder


@contextmanager
def _backend(workers: int | None, ray: str | None, cpus: float, gpus: float | None, needed: bool) -> Iterator[Backend]:
    """Where the runs are made."""
    from foreword.experiments.cluster import RayTasks
    from foreword.experiments.executors import InProcess
    from foreword.experiments.workers import LocalWorkers

    if ray is not None and needed:
        yield RayTasks(ray, workers=workers or 0, cpus=cpus, gpus=gpus)
        return
    with stages() as progress:
        yield InProcess(progress) if workers is None else LocalWorkers(workers, progress=progress)


def _report(job: Job, outcome: Outcome, told: Counter[str], total: int) -> None:
    """A line on standard error for the end of an attempt."""
    from foreword.experiments import read_result

    told[outcome.status] += 1
    if outcome.status == "failed":
        note(f"failed  {job.name}: {outcome.error}" + (", to be tried again" if outcome.again else ""))
    else:
        scores = _scores(read_result(job.folder)) if outcome.status == "done" else "another process makes it"
        note(f"{outcome.status:7} {told['done']}/{total} {job.name}, {outcome.seconds:.0f} s, {scores}".rstrip(", "))


def _print_status(chosen: Study, jobs: list[Job], folder: Path, commands: bool) -> dict[str, Any]:
    """A table of all cells; the same as plain values."""
    from foreword.experiments import other_results, read_record, read_result, state_of

    cells, rows = [], []
    for job in jobs:
        state, record = state_of(job.folder), read_record(job.folder)
        attempts = record.get("attempts", [])
        error = attempts[-1].get("error", "") if state == "failed" else ""
        seconds = record.get("seconds") if state == "done" else None
        cells.append(
            {"name": job.name, "state": state, "seconds": seconds, "attempts": len(attempts), "error": error,
             "command": job.command, "folder": job.folder}
        )  # fmt: skip
        shown = _scores(read_result(job.folder)) if state == "done" else error
        rows.append([job.name, state, "" if seconds is None else f"{seconds:.0f}", shown])
    table(f"{chosen.name} in {folder}", ["run", "state", "seconds", "scores, or what went wrong"], rows)
    counts = Counter(cell["state"] for cell in cells)
    states = ("done", "running", "failed", "missing")
    say(", ".join(f"{counts[state]} {state}" for state in states))
    code = jobs[0].code
    others = other_results(folder, code)
    if others:
        say(f"{others} results in {folder} are of other code than {code[:8]}; `study report --code` reports them")
    if commands:
        for cell in cells:
            say(f"{cell['state']:8} {cell['command']}")
    return {
        "study": chosen.name, "out": str(folder), "code": code,
        **{state: counts[state] for state in states}, "others": others, "cells": cells,
    }  # fmt: skip


def _scores(result: dict[str, Any] | None) -> str:
    """The first scores of a result in a line."""
    told = []
    for test, scores in ((result or {}).get("scores") or {}).items():
        of = "" if test == "test" else f"{test} "
        told += [f"{of}{name} {score['value']:.1f}" for name, score in list(scores.items())[:_SCORES]]
    return ", ".join(told)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
