"""`foreword predict`: what the head of a prefix says of texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.console import bar, emit, read_texts, say
from foreword.cli.options import Base, Device, Dtype, Json, load_prefix
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.prefix import Head

__all__ = ["predict"]


def predict(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="A text, or the two of a pair, or a text and its options; - or none reads rows from standard input, "
            "one a line, their parts separated by tabs."
        ),
    ] = None,
    prefix: Annotated[Path | None, typer.Option("--prefix", "-p", help="A prefix or run folder with a head.")] = None,
    base: Base = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 32,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Predict the label of a text or a pair, the right one of several options, or the tag of every word.

    foreword predict --prefix runs/sst2 "A film that one would like to see again."
    foreword predict --prefix runs/rte "It rained all day." "The ground was dry."
    """
    from foreword.predict import predict as run

    if prefix is None:
        raise ConfigError("no --prefix", "a prefix or run folder", "see foreword predict --help")
    lines = texts is None or texts in ([], ["-"])
    given = read_texts(texts, "text")
    loaded, trained = load_prefix(prefix, base, dtype, device)
    rows = [line.split("\t") for line in given] if lines else [given]
    asked = rows if trained.head is None else [_row(trained.head, parts) for parts in rows]
    with bar("predicting") as progress:
        found = run(loaded, trained, asked, batch_size=batch_size, progress=progress)
    for parts, each in zip(rows, found, strict=True):
        if not as_json:
            _print(trained.head, parts, each.label, each.probability)
    emit({"predictions": [{"parts": p, **each._asdict()} for p, each in zip(rows, found, strict=True)]}, as_json)


def _row(head: Head, parts: list[str]) -> Any:
    """The parts as `foreword.predict` reads them: the first text of a choice goes with each of its options."""
    if head.kind == "choice":
        return [(parts[0], option) for option in parts[1:]]
    return " ".join(parts) if head.kind == "tagging" else parts


def _print(head: Head | None, parts: list[str], label: str, probability: float) -> None:
    if head is not None and head.kind == "tagging":
        for word, tag in zip(" ".join(parts).split(), label.split(), strict=True):
            say(f"{word}\t{tag}")
        say()
        return
    option = f"  {parts[int(label)]}" if head is not None and head.kind == "choice" else ""
    say(f"{label}{option}  {100 * probability:.0f} %")
