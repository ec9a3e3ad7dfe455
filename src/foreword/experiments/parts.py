"""What a report is made of, shown as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from foreword.experiments.results import Spread
from foreword.pages import Cell as TableCell
from foreword.pages import bullets, escaped, folded, heading, listing, paragraph

__all__ = ["Amount", "Figure", "Heading", "Lines", "Part", "Shown", "Table", "Text", "Value", "html", "markdown"]


class Heading(NamedTuple):
    """The heading of a part."""

    text: str


class Text(NamedTuple):
    """A paragraph in small print."""

    text: str


class Lines(NamedTuple):
    """Sentences, one under the other."""

    lines: Sequence[str]


class Figure(NamedTuple):
    """A picture, as HTML, and what is said under it; the tables have its numbers."""

    drawn: str
    note: str = ""


class Table(NamedTuple):
    """A header and rows as wide as it."""

    header: Sequence[str]
    rows: Sequence[Sequence[Value]]


class Amount(NamedTuple):
    """A number that is shown with so many decimals."""

    value: float
    decimals: int = 0

    def __str__(self) -> str:
        return f"{self.value:,.{self.decimals}f}"


class Shown(NamedTuple):
    """A text that is sorted by a number."""

    text: str
    value: float

    def __str__(self) -> str:
        return self.text


Value = str | int | Amount | Shown | Spread
Part = Heading | Text | Lines | Figure | Table


def html(part: Part) -> str:
    """A part of the page."""
    match part:
        case Heading(text):
            return heading(text)
        case Text(text):
            return paragraph(text) if text else ""
        case Lines(lines):
            return bullets(lines)
        case Figure(drawn, note):
            return drawn + (paragraph(note) if note else "")
        case Table(header, rows):
            return listing(header, [[_table_cell(value) for value in row] for row in rows])


def _table_cell(value: Value) -> str | int | TableCell:
    if isinstance(value, Spread):
        return TableCell(escaped(value).replace(" ", "&nbsp;"), value.mean)  # in one line
    if isinstance(value, Amount | Shown):
        return TableCell(escaped(value).replace(" ", "&nbsp;"), value.value)
    if isinstance(value, str) and len(value) > 220:
        return TableCell(folded(value), value)
    return value


def markdown(part: Part) -> str:
    """The same as Markdown; nothing of a figure, whose numbers the tables have."""
    match part:
        case Heading(text):
            return f"## {text}"
        case Text(text):
            return text
        case Lines(lines):
            return "\n".join(f"* {line}" for line in lines)
        case Figure():
            return ""
        case Table(header, rows):
            body = [" | ".join(_plain(value) for value in row) for row in rows]
            return "\n".join(f"| {line} |" for line in [" | ".join(header), "|".join(["---"] * len(header)), *body])


def _plain(value: Value) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")
