"""`foreword train`: train a prefix and keep it in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from foreword.cli.console import emit, note, say, stages
from foreword.cli.options import (
    Base,
    Completion,
    CompletionTemplate,
    Device,
    Json,
    PromptColumn,
    References,
    Template,
    TestFile,
    config_flags,
    load_base,
    make_task,
)  # fmt: skip

__all__ = ["train"]


@config_flags
def train(
    task: Annotated[str | None, typer.Argument(help="e2e or trails; none with your own files.")] = None,
    base: Base = "smollm2-135m",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder. (default: runs/TASK)")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="A TOML file of options from --length on: epochs = 5. Flags win over it."),
    ] = None,
    start: Annotated[Path | None, typer.Option("--from", help="Start from this prefix or run folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Clear the run folder and start anew.")] = False,
    train_file: Annotated[Path | None, typer.Option("--train", help="Your rows: JSONL, CSV, TSV or parquet.")] = None,
    dev_file: Annotated[Path | None, typer.Option("--dev", help="Your dev rows. (default: a tenth of --train)")] = None,
    test: TestFile = None,
    prompt_column: PromptColumn = None,
    completion_column: Completion = None,
    template: Template = None,
    completion_template: CompletionTemplate = None,
    references: References = None,
    device: Device = None,
    as_json: Json = False,
    settings: dict[str, Any] | None = None,
) -> None:
    """Train a prefix for a task or for your own rows; the same command resumes a run that was stopped.

    foreword train trails --epochs 5
    foreword train --train rows.jsonl --prompt-column question --completion-column answer --out runs/answers
    """
    from foreword.config import TrainConfig
    from foreword.prefix import Prefix
    from foreword.runs import find_prefix
    from foreword.train import train as run

    given = settings or {}
    chosen = TrainConfig.from_toml(config, given) if config is not None else TrainConfig(**given)
    work = make_task(
        task, train=train_file, dev=dev_file, test=test, prompt_column=prompt_column, template=template,
        completion_column=completion_column, completion_template=completion_template, references=references,
    )  # fmt: skip
    folder = out or Path("runs") / work.name
    loaded = load_base(base or "smollm2-135m", chosen.precision, device)
    begin = None if start is None else Prefix.load(find_prefix(start), loaded)
    note(f"run folder {folder}; Ctrl-C stops cleanly, the same command resumes")
    with stages() as progress:
        result = run(loaded, begin, work, chosen, out=folder, overwrite=overwrite, progress=progress)
    _report_skipped(folder)
    metrics = result.metrics
    say(
        f"dev loss {metrics['best_dev_loss']:.4f} nats per token at step {metrics['best_step']} of {metrics['steps']}, "
        f"{metrics['wall_seconds']:.0f} s, {metrics['tokens_per_second']:.0f} tokens per second, "
        f"peak {metrics['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    say(f"prefix     {result.prefix.num_parameters:,} parameters in {folder}")
    say(f"next       {_next(folder, task)}")
    emit({"folder": str(folder), **metrics}, as_json)


def _next(folder: Path, task: str | None) -> str:
    """The command to try after training: a task has a test split, own rows are named by their user."""
    if task is not None:
        return f"foreword evaluate {folder} --with-base"
    return f'foreword generate --prefix {folder} "PROMPT", or foreword evaluate {folder} --with-base --test ROWS'


def _report_skipped(folder: Path, most: int = 5) -> None:
    """The first rows of each split that could not be used, on standard error; the run folder lists all."""
    config = folder / "config.json"
    for split, data in json.loads(config.read_text(encoding="utf-8"))["data"].items():
        skipped = data["skipped"]
        for each in skipped[:most]:
            note(f"skipped    row {each['row']} of {split}: {each['reason']}")
        if len(skipped) > most:
            note(f"skipped    {len(skipped) - most} more rows of {split}; {config} lists them")
