"""`foreword show` and `foreword fold`: what a prefix folder holds, and the same without its training state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foreword.cli.console import emit, say, table
from foreword.cli.options import Json

__all__ = ["fold", "show"]

_Path = Annotated[Path, typer.Argument(help="A prefix folder or a run folder.")]


def show(path: _Path, as_json: Json = False) -> None:
    """Show a prefix: its base model, geometry, origin and metrics; everything in it is checked."""
    from foreword.artifact import load_prefix, read_header
    from foreword.runs import find_prefix

    folder = find_prefix(path)
    header, prefix = read_header(folder), load_prefix(folder)
    stacks: dict[str, list[int]] = {}
    for site, length in prefix.lengths.items():
        stacks.setdefault(site.stack, []).append(length)
    rows: list[list[Any]] = [
        ["base model", prefix.base_name],
        ["fingerprint", prefix.fingerprint[:16]],
        *([f"{stack} lengths", _lengths(lengths)] for stack, lengths in stacks.items()),
        ["parameters", prefix.num_parameters],
        ["bytes", prefix.num_bytes],
        ["position offset", prefix.position_offset],
        ["training state", "kept" if prefix.training_state else "folded away"],
        *([str(key), _short(value)] for key, value in prefix.metadata.items()),
    ]
    table(str(path), ["", ""], rows)
    emit(header, as_json)


def fold(
    path: _Path,
    out: Annotated[Path, typer.Option("--out", "-o", help="The prefix folder to write.")],
    as_json: Json = False,
) -> None:
    """Write a prefix without its training state: plain keys and values, the same function bit for bit."""
    from foreword.artifact import load_prefix
    from foreword.runs import find_prefix

    prefix = load_prefix(find_prefix(path))
    folded = prefix.fold()
    folded.save(out)
    kept, before = folded.num_bytes, sum(t.numel() * 4 for t in (prefix.training_state or {}).values())
    say(f"{out}: {kept:,} bytes of keys and values; {before:,} bytes of training state left out")
    emit({"path": str(out), "num_bytes": kept, "dropped_bytes": before}, as_json)


def _lengths(lengths: list[int]) -> str:
    same = len(set(lengths)) == 1
    return f"{lengths[0]} slots at {len(lengths)} layers" if same else ", ".join(map(str, lengths))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
