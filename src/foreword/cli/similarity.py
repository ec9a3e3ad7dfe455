"""`foreword similarity`: how alike the gate patterns of prefixes are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foreword.cli.console import emit, note, say, table
from foreword.cli.options import Json
from foreword.errors import MissingPackage

__all__ = ["similarity"]


def similarity(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Run folders or prefix folders; a folder of several seeds stands for all of them."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("similarity"),
    as_json: Json = False,
) -> None:
    """Compare which layers the gates of prefixes open: a matrix of correlations, as a table, PNG, HTML and JSON.

    foreword similarity runs/rte runs/boolq runs/conll04
    """
    from foreword.similarity import draw_similarity
    from foreword.similarity import similarity as run

    found = run(paths)
    written = ["similarity.json", "similarity.html", "similarity.png"]
    try:
        draw_similarity(found, out)
    except MissingPackage as missing:
        written.pop()
        note(f"no image: {missing}")
    names = [each.name for each in found.patterns]
    rows: list[list[Any]] = [
        [name, *("–" if value is None else f"{value:.2f}" for value in row)]
        for name, row in zip(names, found.by_layer, strict=True)
    ]
    table("correlation of layer profiles", ["", *names], rows)
    for line in found.notes:
        note(line)
    say(f"{out}: {', '.join(written)}")
    emit({"folder": str(out), **found.to_dict()}, as_json)
