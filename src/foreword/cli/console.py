"""What all commands share: progress bars, tables, the machine's last line, and errors as one line."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from foreword.errors import ConfigError

__all__ = ["bar", "emit", "note", "print_skipped", "read_texts", "say", "stages", "table"]


_FILE_WIDTH = 160  # columns of a table that goes into a file or a pipe, where nothing says how wide the page is


def say(text: str = "") -> None:
    """A line for the person at the terminal; rich markup is not interpreted."""
    print(text, flush=True)  # noqa: T201


def note(text: str) -> None:
    """A line beside the results, on standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def emit(result: dict[str, Any], as_json: bool) -> None:
    """The result as one JSON line, the last of standard output, where `--json` asks for it."""
    if as_json:
        say(json.dumps(result, ensure_ascii=False, default=str))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output; all columns but the first are set to the right when they hold numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    built = Table(title=title or None, show_header=any(header), title_justify="left", title_style="bold")
    for column, name in enumerate(header):
        numbers = column > 0 and all(isinstance(row[column], int | float) for row in rows)
        built.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        built.add_row(*(Text(_cell(value)) for value in row))
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH
    console.print(built)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


@contextlib.contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; the yielded function takes (done, total)."""
    with stages() as advance:
        yield lambda done, total: advance(description, done, total)


@contextlib.contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on standard error, one for each stage named; the yielded function takes (stage, done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        known: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            name = stage.split("|", maxsplit=1)[0].strip()
            if name not in known:
                known[name] = progress.add_task(stage, total=total)
            progress.update(known[name], description=stage, completed=done, total=total)

        yield advance


def print_skipped(skipped: Sequence[Mapping[str, Any]], split: str, more: str = "", most: int = 5) -> None:
    """The first rows that could not be used, on standard error; `more` says where the others are listed."""
    for each in skipped[:most]:
        note(f"skipped    row {each['row']} of {split}: {each['reason']}")
    if len(skipped) > most:
        note(f"skipped    {len(skipped) - most} more rows of {split}{more}")


def read_texts(given: list[str] | None, what: str) -> list[str]:
    """The texts that were given, or the lines of standard input where none or - was; `what` says what they are."""
    texts = given if given and given != ["-"] else [line for line in _lines(what) if line.strip()]
    if not texts:
        raise ConfigError(f"no {what}", f"{what}s as arguments or lines of standard input", "give one")
    for number, text in enumerate(texts, start=1):
        if text != text.encode(errors="replace").decode():
            raise ConfigError(f"{what} {number} is not UTF-8", "UTF-8 text", "convert it")
    return texts


def _lines(what: str) -> list[str]:
    if sys.stdin.isatty():
        note(f"one {what} per line; Ctrl-D ends")
    try:
        return [line.rstrip("\r\n") for line in sys.stdin]
    except UnicodeDecodeError:
        raise ConfigError("standard input is not UTF-8", "UTF-8 text", "convert it") from None
