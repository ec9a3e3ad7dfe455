"""What the contract's lines found, as objects, as text and as plain data."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Line", "Report"]


@dataclass(frozen=True)
class Line:
    """One line of the contract: `status` is "pass", "fail" or "n/a"; `error` the largest error seen, None if n/a.

    Errors are the largest absolute difference, relative to the largest absolute value of what was expected.
    """

    number: int
    title: str
    status: str
    error: float | None
    detail: str


@dataclass(frozen=True)
class Report:
    """The exactness contract of one model. `tolerance` bounds every error that need not be 0.

    >>> report = Report("tiny", "float32", 1e-5, (Line(1, "an empty prefix changes nothing", "pass", 0.0, ""),))
    >>> report.passed
    True
    >>> print(report.table())
    exactness contract of tiny (float32, tolerance 1.0e-05)
     1  pass  0        an empty prefix changes nothing
    1 passed, 0 failed, 0 not applicable
    """

    model: str
    dtype: str
    tolerance: float
    lines: tuple[Line, ...]

    @property
    def passed(self) -> bool:
        """Whether no line failed."""
        return all(line.status != "fail" for line in self.lines)

    def table(self) -> str:
        """The report as plain text."""
        rows = [f"exactness contract of {self.model} ({self.dtype}, tolerance {self.tolerance:.1e})"]
        for line in self.lines:
            rows.append(f"{line.number:2}  {line.status:4}  {_error(line.error):7}  {line.title}")
            rows += textwrap.wrap(line.detail, 96, initial_indent=" " * 21, subsequent_indent=" " * 21)
        rows.append(self._summary())
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "lines": [asdict(line) for line in self.lines], "passed": self.passed}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"exactness contract of {self.model} ({self.dtype}, tolerance {self.tolerance:.1e})")
        for column in ("line", "status", "error", "what holds"):
            table.add_column(column)
        colours = {"pass": "green", "fail": "bold red", "n/a": "dim"}
        for line in self.lines:
            what = f"{line.title}\n[dim]{line.detail}[/dim]" if line.detail else line.title
            status = f"[{colours[line.status]}]{line.status}[/]"
            table.add_row(str(line.number), status, _error(line.error), what)
        table.caption = self._summary()
        return table

    def _summary(self) -> str:
        count = {status: sum(line.status == status for line in self.lines) for status in ("pass", "fail", "n/a")}
        return f"{count['pass']} passed, {count['fail']} failed, {count['n/a']} not applicable"


def _error(error: float | None) -> str:
    if error is None:
        return "-"
    return "0" if error == 0 else f"{error:.1e}"
