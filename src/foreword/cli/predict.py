"""`foreword predict`: the labels of texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli.console import bar, emit, read_texts, say
from foreword.cli.options import Base, Device, Dtype, Json, load_prefix
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.predict import Prediction

__all__ = ["predict"]


def predict(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="The texts of one row in the order of the task's columns: a text, or the two of a pair, or what is "
            "chosen from; - or none reads rows from standard input, one a line, their texts separated by tabs."
        ),
    ] = None,
    prefix: Annotated[
        Path | None, typer.Option("--prefix", "-p", help="A prefix or run folder, trained for a task with labels.")
    ] = None,
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
    from foreword.predict import reading_task

    if prefix is None:
        raise ConfigError("no --prefix", "a prefix or run folder", "see foreword predict --help")
    lines = texts is None or texts in ([], ["-"])
    given = read_texts(texts, "text")
    loaded, trained = load_prefix(prefix, base, dtype, device)
    rows = [line.split("\t") for line in given] if lines else [given]
    tagging = reading_task(trained).kind == "tagging"
    with bar("predicting") as progress:
        found = run(
            loaded, trained, [" ".join(parts) for parts in rows] if tagging else rows, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
    for parts, each in zip(rows, found, strict=True):
        if not as_json:
            _print(" ".join(parts).split() if tagging else [], each)
    emit({"predictions": [{"parts": p, **each._asdict()} for p, each in zip(rows, found, strict=True)]}, as_json)


def _print(words: list[str], found: Prediction) -> None:
    """Each word with its tag, or the label and how probable it is."""
    if words:
        for word, tag in zip(words, found.label.split(), strict=True):
            say(f"{word}\t{tag}")
        say()
        return
    say(f"{found.label}{f'  {found.option}' if found.option else ''}  {100 * found.probability:.0f} %")
