"""`foreword compare`: runs and prefixes side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreword.cli.console import emit, note, say, table
from foreword.cli.options import Device, Dtype, Json, load_base

__all__ = ["compare"]


def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Run folders, folders of several seeds, or prefix folders; the first is compared with."),
    ],
    split: Annotated[
        str,
        typer.Option(help="The scores to compare: test, dev, or any kept ones (beams-5: evaluation-beams-5.json)."),
    ] = "test",
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also time forward passes with and without each prefix; loads the base model."),
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare runs: scores with intervals, paired differences from the first with p-values, sizes, times, costs.

    foreword compare runs/rte-apt runs/rte-plain
    foreword compare runs/* --measure --markdown
    """
    from foreword.compare import LEGEND
    from foreword.compare import compare as run

    found = run(paths, split=split, load=(lambda name: load_base(name, dtype, device)) if measure else None)
    if markdown:
        say(found.to_markdown())
    else:
        scores, costs = found.score_table(), found.cost_table()
        table(f"{split} scores", *scores)
        table("cost", *costs)
        for line in (LEGEND, *found.notes):
            note(line)
    emit(found.to_dict(), as_json)
