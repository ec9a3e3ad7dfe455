"""`foreword explain`: do the gates of a prefix tell its right answers from its wrong ones?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.console import emit, say, stages, table
from foreword.cli.options import (
    Base,
    Device,
    Dtype,
    Json,
    Limit,
    Strict,
    file_flags,
    known_of,
    load_prefixes,
    make_task,
)

if TYPE_CHECKING:
    from foreword.explain import Explanation

__all__ = ["explain"]


@file_flags("dev", "test")
def explain(
    path: Annotated[
        Path, typer.Argument(help="A run folder, one of several seeds, or a prefix folder, trained with gates apt.")
    ],
    task: Annotated[str | None, typer.Option("--task", "-t", help="rte, sst2, ... (default: the prefix's own)")] = None,
    base: Base = None,
    split: Annotated[str, typer.Option(help="test or dev.")] = "test",
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn at random.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 20,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write. (default: explain in the run folder)")
    ] = None,
    strict: Strict = False,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
    files: dict[str, Any] | None = None,
) -> None:
    """Relate the gates of a prefix, row by row, to its right and wrong answers: AUROC of every layer, and the rows.

    Writes explain.html, a report to read and sort, and explain.json.

    foreword explain runs/rte
    """
    from foreword.explain import explain as run
    from foreword.explain_page import save_explanation
    from foreword.probe import beside

    loaded, prefixes = load_prefixes(path, base, dtype, device)
    results = []
    for name, place, prefix in prefixes:
        chosen = make_task(task, files or {}, known_of(prefix), split)
        with stages() as progress:
            found = run(
                loaded, prefix, chosen, split, limit=limit, strict=strict, batch_size=batch_size, seed=seed,
                progress=progress,
            )  # fmt: skip
        folder = beside(place, "explain") if out is None else out / name
        save_explanation(found, folder)
        _print(found, name)
        say(f"report     {folder / 'explain.html'}")
        results.append({"folder": str(folder), **found.to_dict()})
        del results[-1]["rows"]
    emit(results[0] if len(results) == 1 else {"results": results}, as_json)


def _print(found: Explanation, name: str) -> None:
    """The most telling layers, and what was found in sentences."""
    rows = [
        [each.name, f"{each.auroc:.3f}", f"[{each.low:.3f}, {each.high:.3f}]", each.mean_right, each.mean_wrong]
        for each in found.most_telling[:5]
    ]
    if rows:
        table(f"{name} most telling layers".strip(), ["", "AUROC", "95 %", "gate if right", "gate if wrong"], rows)
    for line in found.summary():
        say(line)
