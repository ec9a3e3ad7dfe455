"""`foreword show` and `foreword fold`: what a prefix folder holds, and the same without its training state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.console import bar, emit, say, table
from foreword.cli.options import Base, Device, Dtype, Json, file_flags, known_of, load_prefix, make_task
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.base import BaseModel
    from foreword.evaluate import Evaluation
    from foreword.prefix import Prefix
    from foreword.tasks import Task

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


@file_flags("train", "dev", "test")
def fold(
    path: _Path,
    out: Annotated[Path, typer.Option("--out", "-o", help="The prefix folder to write.")],
    gates: Annotated[
        str, typer.Option(help="mean: replace gates that read the text by their means over a data set. (default: keep)")
    ] = "",
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="With --gates: e2e, rte, ... (default: its own)")
    ] = None,
    base: Base = None,
    split: Annotated[str, typer.Option(help="With --gates: dev, test or train.")] = "dev",
    limit: Annotated[int, typer.Option(min=1, help="With --gates: the first rows of the split only.")] = 200,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
    files: dict[str, Any] | None = None,
) -> None:
    """Write a prefix without its training state: plain keys and values, the same function bit for bit.

    Gates that read the text stay. Servers of plain keys and values can carry their means alone: --gates mean puts these
    in their place and prints what that does to the score.

    foreword fold runs/trails --out prefixes/trails
    foreword fold runs/rte --gates mean --task rte --out prefixes/rte
    """
    from foreword.artifact import load_prefix as read
    from foreword.runs import find_prefix

    if gates not in ("", "mean"):
        raise ConfigError(f"--gates {gates}", "mean", "leave it out to keep them")
    prefix = read(find_prefix(path))
    results: list[Evaluation] = []
    if gates:
        loaded, prefix = load_prefix(path, base, dtype, device)
        chosen = make_task(task, files or {}, known_of(prefix), split)
        folded, results = _fold_mean(loaded, prefix, chosen, split, limit)
    else:
        folded = prefix.fold()
    folded.save(out)
    kept, before = folded.num_bytes, sum(t.numel() * 4 for t in (prefix.training_state or {}).values())
    gone = max(prefix.num_bytes - kept, 0)
    left_out = f"{before:,} bytes of training state" + (f" and {gone:,} of gates" if gone else "")
    say(f"{out}: {kept:,} bytes of keys and values; {left_out} left out")
    scored = {"results": [result.to_dict(outputs=False) for result in results]} if results else {}
    emit({"path": str(out), "num_bytes": kept, "dropped_bytes": before, **scored}, as_json)


def _fold_mean(base: BaseModel, prefix: Prefix, task: Task, split: str, limit: int) -> tuple[Prefix, list[Evaluation]]:
    """The prefix with the means of its gates, and its scores before and after; printed."""
    from foreword.cli.prune import score_change
    from foreword.probe import fold_gates, mean_gates

    with bar("reading gates") as progress:
        folded = fold_gates(prefix, mean_gates(base, prefix, task, split, limit=limit, progress=progress))
    folded.metadata["folded_gates"] = {"by": "mean", "task": task.name, "split": split, "limit": limit}
    return folded, score_change(base, prefix, folded, task, split, limit, "folded")


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
