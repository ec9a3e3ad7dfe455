"""Heat maps as PNG files, drawn by matplotlib, and as HTML pages, which need nothing."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from foreword.optional import optional
from foreword.pages import MOST_NUMBERS, Scale, Values, check_labels, heatmap_html, shown_labels
from foreword.storage import write_atomic

__all__ = ["heatmap_html", "heatmap_png"]

_DOTS_PER_INCH = 150
# A drawing of more rows keeps to this many inches, and its cells get smaller.
_TALLEST = 40.0


def heatmap_png(
    path: str | Path,
    values: Values,
    *,
    title: str,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    value_label: str,
    reach: float | None = None,
) -> None:
    """Write a heat map: `values` are rows of numbers, None where there is nothing; the first row is at the top.

    Colours run from the least to the greatest value, or around zero where some value is negative, or
    from -`reach` to `reach`. Raises `ConfigError`
    for labels that do not fit, `MissingPackage` without matplotlib, `StorageError`.
    """
    check_labels(values, row_labels, column_labels)
    figure_module = optional("matplotlib.figure", "plot")
    scale, columns = Scale.of(values, reach), len(column_labels)
    numbers = columns <= MOST_NUMBERS
    cell_inches = 0.5 if numbers else max(0.07, min(0.3, 14 / max(columns, 1)))
    width = min(18.0, 2.6 + cell_inches * columns)
    height = min(_TALLEST, 1.3 + 0.26 * len(values))
    figure = figure_module.Figure(figsize=(max(4.5, width), max(2.2, height)), layout="constrained")
    axes = figure.add_subplot()
    grid = [[_number(row[k] if k < len(row) else None) for k in range(columns)] for row in values]
    shown = axes.imshow(
        grid or [[math.nan]], cmap="RdBu_r" if scale.around else "viridis", vmin=scale.low, vmax=scale.high,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axes.set_facecolor("#d8dce1")  # where there is nothing
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_yticks(range(len(row_labels)), shown_labels(row_labels, most=round(height / 0.15)), fontsize=8)
    axes.set_xticks(range(columns), shown_labels(column_labels), fontsize=8)
    if any(len(str(label)) > 5 for label in column_labels):
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.tick_params(length=0)
    bar = figure.colorbar(shown, ax=axes, shrink=0.9, fraction=min(0.1, 0.9 / width), pad=0.02)
    bar.set_label(value_label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if numbers:
        _write_numbers(axes, grid, scale)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _write_numbers(axes: object, grid: list[list[float]], scale: Scale) -> None:
    """Each value into its cell, in the ink that is readable there."""
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if math.isfinite(value):
                place = scale.place(value)
                light = 0.15 < place < 0.85 if scale.around else place > 0.55
                axes.text(  # type: ignore[attr-defined]
                    x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="black" if light else "white"
                )
