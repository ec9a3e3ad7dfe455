"""`foreword train`: train a prefix, with one seed or several, and keep it in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.console import emit, note, print_skipped, say, stages, table
from foreword.cli.options import (
    OWN_TASKS,
    Base,
    Device,
    Json,
    config_flags,
    file_flags,
    known_of,
    load_base,
    make_task,
)
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.evaluate import Evaluation
    from foreword.seeds import SeedsResult
    from foreword.tasks import Task
    from foreword.train import TrainResult

__all__ = ["train"]


@config_flags
@file_flags("train", "dev", "test")
def train(
    task: Annotated[str | None, typer.Argument(help="e2e, rte, sst2, conll04, ...; none with your own files.")] = None,
    base: Base = "smollm2-135m",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder. (default: runs/TASK)")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="A TOML file of options from --length on: epochs = 5. Flags win over it."),
    ] = None,
    start: Annotated[Path | None, typer.Option("--from", help="Start from this prefix or run folder.")] = None,
    retrain: Annotated[
        str, typer.Option(help="With --from: continue with its slots, or rewind them to what they were at their birth.")
    ] = "continue",
    lengths_from: Annotated[
        Path | None, typer.Option(help="Lengths in the ratio of this run's gates, layer by layer (PT-2*).")
    ] = None,
    gates_from: Annotated[Path | None, typer.Option(help="Begin with the gates that this run has learned.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train so often, with seeds from --seed on, in OUT/seed0, ...")] = 1,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Then score on the test split.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Clear the run folder and start anew.")] = False,
    device: Device = None,
    as_json: Json = False,
    files: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Train a prefix for a task or for your own rows; the same command resumes a run that was stopped.

    foreword train trails --epochs 5
    foreword train rte --base minilm --shots 32 --seeds 5 --evaluate --out runs/rte-32
    foreword train --train rows.jsonl --prompt-column question --completion-column answer --out runs/answers
    foreword train --train rows.csv --text-column text --label-column label --base minilm --out runs/labels
    """
    from foreword.config import TrainConfig
    from foreword.seeds import evaluate_run, train_seeds
    from foreword.start import Start, of_seed
    from foreword.train import train as run

    begin = Start(start, retrain, lengths_from, gates_from)
    given = settings or {}
    chosen = TrainConfig.from_toml(config, given) if config is not None else TrainConfig(**given)
    work = make_task(task, files or {}, {} if start is None else _said_by(of_seed(start, chosen.seed)), "train")
    if evaluate and files and "test" not in files:
        raise ConfigError("--evaluate without --test", "your test rows", "name them, or leave --evaluate out")
    folder = out or Path("runs") / work.name
    loaded = load_base(base or "smollm2-135m", chosen.precision, device)
    note(f"run folder {folder}; Ctrl-C stops cleanly, the same command resumes")
    if seeds > 1:
        with stages() as progress:
            several = train_seeds(
                loaded, lambda config: begin.load(loaded, work, config), work, chosen, seeds=seeds, out=folder,
                test=evaluate, overwrite=overwrite, progress=progress,
            )  # fmt: skip
        _report_skipped(folder / f"seed{chosen.seed}")
        _print_seeds(several, folder)
        if not evaluate:
            rows = " and --test ROWS" if files and "test" not in files else ""
            say(f"next       the same command with --evaluate{rows}, which scores all seeds on the test split")
        emit({"folder": str(folder), **json.loads((folder / "summary.json").read_text(encoding="utf-8"))}, as_json)
        return
    with stages() as progress:
        first = begin.load(loaded, work, chosen)
        result = run(loaded, first, work, chosen, out=folder, overwrite=overwrite, progress=progress)
        tested = evaluate_run(loaded, result, work, progress=progress) if evaluate else None
    _report_skipped(folder)
    _print_run(result, tested, folder, work)
    scores = {} if tested is None else {"scores": {name: score._asdict() for name, score in tested.scores.items()}}
    emit({"folder": str(folder), **result.metrics, **scores}, as_json)


def _said_by(path: Path) -> dict[str, Any]:
    """What the prefix to start from says of its task."""
    from foreword.artifact import load_prefix
    from foreword.runs import find_prefix

    return known_of(load_prefix(find_prefix(path)))


def _print_run(result: TrainResult, tested: Evaluation | None, folder: Path, work: Task) -> None:
    from foreword.cli.evaluate import print_scores

    metrics = result.metrics
    scored = metrics.get("best_dev_score") is not None
    unit = "label" if result.prefix.head is not None else "token"
    loss = f"{metrics['best_dev_loss']:.4f} nats per {unit}"
    found = f"dev {metrics['score']} {metrics['best_dev_score']:.1f}, loss {loss}," if scored else f"dev loss {loss}"
    say(
        f"{found} at step {metrics['best_step']} of {metrics['steps']}, "
        f"{metrics['wall_seconds']:.0f} s, {metrics['tokens_per_second']:.0f} tokens per second, "
        f"peak {metrics['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    head = f" and a head of {metrics['head_parameters']:,}" if metrics.get("head_parameters") else ""
    say(f"prefix     {result.prefix.num_parameters:,} parameters{head} in {folder}")
    if tested is not None:
        print_scores([tested])
    own = work.name in OWN_TASKS
    say(f"next       {_next(folder, None if own else work.name, scored, result.prefix.head is not None)}")


def _next(folder: Path, task: str | None, labels: bool = False, head: bool = False) -> str:
    """The command to try after training: a task has a test split, own rows are named by their user."""
    if task is not None:
        return f"foreword evaluate {folder}{'' if head else ' --with-base'}"
    if labels:
        return f'foreword evaluate {folder} --test ROWS, or foreword predict --prefix {folder} "TEXT"'
    return f'foreword generate --prefix {folder} "PROMPT", or foreword evaluate {folder} --with-base --test ROWS'


def _print_seeds(result: SeedsResult, folder: Path) -> None:
    """One row for each seed, and what they have in common."""
    from foreword.metrics import number_format

    names = list(result.scores)
    spreads = [(spread, number_format(name)) for name, spread in result.scores.items()]
    rows: list[list[Any]] = []
    for place, (seed, run) in enumerate(zip(result.seeds, result.runs, strict=True)):
        dev = run.metrics.get("best_dev_score")
        own = [format(each.per_seed[place], spec) for each, spec in spreads]
        shown = f"{run.metrics['best_dev_loss']:.3f}" if dev is None else f"{dev:.1f}"
        rows.append([f"seed {seed}", shown, run.metrics["best_step"], f"{run.metrics['wall_seconds']:.0f}", *own])
    if names:
        rows.append(["mean ± sd", "", "", "", *(f"{s.mean:{spec}} ± {s.std:{spec}}" for s, spec in spreads)])
        rows.append(["95 %", "", "", "", *(f"[{s.low:{spec}}, {s.high:{spec}}]" for s, spec in spreads)])
    metrics = result.runs[0].metrics
    dev = f"dev {metrics['score']}" if metrics.get("best_dev_score") is not None else "dev loss"
    table(f"{folder}{', test scores' if names else ''}", ["", dev, "best step", "seconds", *names], rows)
    if names:
        say("95 % bootstrap intervals of the mean, over seeds and test rows")


def _report_skipped(folder: Path) -> None:
    """The first rows of each split that could not be used, on standard error; the run folder lists all."""
    config = folder / "config.json"
    for split, data in json.loads(config.read_text(encoding="utf-8"))["data"].items():
        print_skipped(data["skipped"], split, f"; {config} lists them")
        if data.get("cut_rows"):
            note(f"cut        {data['cut_rows']} of {data['rows']} rows of {split} are longer than --max-tokens")
