"""What readers of rows share: cells that must be texts, labels or lists, and columns that must be there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foreword.errors import DataError
from foreword.tasks.source import Row

__all__ = ["Unusable", "check_text", "missing", "require", "row_label", "row_list", "row_text"]

_KINDS: dict[type, str] = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}


class Unusable(Exception):
    """Why a row cannot be used."""


def row_text(row: Row, column: str) -> str:
    """The text of a column; `Unusable` where there is none."""
    if column not in row:
        raise Unusable(missing(column, row))
    return check_text(row[column], f"column {column!r}")


def check_text(value: Any, what: str) -> str:
    """The value if it is a text with something in it; `Unusable` calls it `what`."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable(f"{what} is empty")
    if not isinstance(value, str):
        raise Unusable(f"{what} is {_KINDS.get(type(value), type(value).__name__)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable(f"{what} holds half a character (a lone surrogate)") from None
    return value


def row_label(row: Row, column: str) -> str:
    """The label in a column: a text, a whole number, true or false."""
    value = row.get(column)
    return str(value) if isinstance(value, int) else row_text(row, column).strip()


def row_list(row: Row, column: str) -> tuple[str, ...]:
    """The list of texts in a column: the words or the tags of a sentence."""
    if column not in row:
        raise Unusable(missing(column, row))
    values = row[column]
    if values in (None, "", []):
        raise Unusable(f"column {column!r} is empty")
    if not isinstance(values, list):
        raise Unusable(f"column {column!r} is {_KINDS.get(type(values), 'text')}, not a list")
    return tuple(check_text(value, f"item {number} of column {column!r}") for number, value in enumerate(values, 1))


def missing(column: str, row: Row) -> str:
    """The reason to skip a row without a column."""
    return f"no column {column!r} (columns here: {', '.join(map(str, row)) or 'none'})"


def require(needed: Sequence[str], columns: Sequence[str], file: str) -> None:
    """Raise `DataError` unless the file has all columns that are needed."""
    for column in needed:
        if column not in columns:
            raise DataError(
                f"no column {column!r} in {file}", "one of its columns: " + ", ".join(columns), "name one of them"
            )
