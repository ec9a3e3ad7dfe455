"""`foreword probe`: the gates and the importance of every slot of a prefix, as numbers and as heat maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.console import bar, emit, note, say, table
from foreword.cli.options import (
    Base,
    Device,
    Dtype,
    Json,
    Strict,
    file_flags,
    file_words,
    known_of,
    load_prefixes,
    make_task,
)
from foreword.errors import MissingPackage

if TYPE_CHECKING:
    from foreword.probe import Probe

__all__ = ["ProbedLimit", "print_probe", "probe"]

ProbedLimit = Annotated[int, typer.Option(min=2, help="Read the first rows of the split only.")]


@file_flags("train", "dev", "test")
def probe(
    path: Annotated[Path, typer.Argument(help="A prefix folder, a run folder, or one of several seeds.")],
    task: Annotated[str | None, typer.Option("--task", "-t", help="e2e, rte, ... (default: the prefix's own)")] = None,
    base: Base = None,
    split: Annotated[str, typer.Option(help="dev, test or train; one that it was not trained on.")] = "dev",
    limit: ProbedLimit = 200,
    seed: Annotated[int, typer.Option(help="Which rows go into which half.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write. (default: probe in the run folder)")
    ] = None,
    strict: Strict = False,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
    files: dict[str, Any] | None = None,
) -> None:
    """Read over a data set how far the gates of a prefix are open, and how much each slot matters to the loss.

    Writes probe.json, heatmap.html and heatmap.png. Two halves of the rows are compared, so that nobody reads noise.

    foreword probe runs/rte
    foreword prune runs/rte --keep 0.5
    """
    from foreword.probe import beside, draw
    from foreword.probe import probe as run
    from foreword.start import drawn_as

    loaded, prefixes = load_prefixes(path, base, dtype, device)
    results = []
    for name, place, prefix in prefixes:
        chosen = make_task(task, files or {}, known_of(prefix), split)
        rows = chosen if files else drawn_as(prefix, chosen)
        with bar(f"probing {name}".strip()) as progress:
            found = run(loaded, prefix, rows, split, limit=limit, strict=strict, seed=seed, progress=progress)
        folder = beside(place, "probe") if out is None else out / name
        found.save(folder)
        try:
            draw(found, folder)
        except MissingPackage as missing:
            note(f"no image: {missing}")
        print_probe(found)
        say(f"written    {folder}: probe.json and heat maps")
        results.append({"folder": str(folder), **found.to_dict()})
    say(f"next       foreword prune {path} --keep 0.5{file_words(files or {})}")
    emit(results[0] if len(results) == 1 else {"results": results}, as_json)


def print_probe(found: Probe) -> None:
    """One row for each site: λ, its gates' mean and spread, its share of all importance; and how far halves agree."""
    total = sum(sum(each.importance) for each in found.sites.values()) or 1.0
    with_layers = any(each.layer is not None for each in found.sites.values())
    header = ["", "slots", *(["λ"] if with_layers else []), *(["mean gate", "spread"] if found.has_gates else [])]
    rows: list[list[Any]] = []
    for site, each in found.sites.items():
        row: list[Any] = [str(site), len(each.importance)]
        if with_layers:
            row.append("" if each.layer is None else each.layer)
        if found.has_gates:
            row += [_mean(each.gates), _mean(each.spread)]
        rows.append([*row, f"{100 * sum(each.importance) / total:.1f} %"])
    table(f"{found.task} {found.split}, {found.rows} rows, {found.base}", [*header, "importance"], rows)
    for line in found.agreements():
        say(f"agreement  {line}")
    for line in found.warnings():
        say(f"warning    {line}")


def _mean(values: list[float] | None) -> Any:
    return sum(values) / len(values) if values else ""
