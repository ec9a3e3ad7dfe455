"""`foreword check`: the exactness contract of one base model, line by line."""

from __future__ import annotations

from typing import Annotated

import typer

from foreword.cli.console import bar, emit, say
from foreword.cli.options import Device, Dtype, Json, load_base

__all__ = ["check"]


def check(
    model: Annotated[str, typer.Argument(help="smollm2-135m, minilm, a folder or a Hugging Face model id.")],
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Seed of the random prefixes and texts.")] = 0,
    gates: Annotated[str, typer.Option(help="Check prefixes with these gates: none, apt, static or mass.")] = "none",
    gate_pooling: Annotated[
        str,
        typer.Option(help="What apt gates read: token, cls, mean or prompt. (default: mean in encoders, else token)"),
    ] = "",
    as_json: Json = False,
) -> None:
    """Prove on MODEL that prefixes are exact; exits with status 1 if any line fails.

    Ten lines: an empty prefix changes nothing, a prefix made of text equals the text, padding, packing, caches,
    beams, mixed batches, gradients, folding, sliding windows and full context. `n/a` says why a line cannot apply.
    """
    from foreword.conform import check as run

    base = load_base(model, dtype, device)
    with bar(f"checking {base.name}") as progress:
        report = run(base, seed=seed, gates=gates, gate_pooling=gate_pooling, progress=progress)
    say(report.table())
    emit(report.to_dict(), as_json)
    if not report.passed:
        raise typer.Exit(1)
