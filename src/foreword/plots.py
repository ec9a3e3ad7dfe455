"""Heat maps as PNG files, drawn by matplotlib, and as HTML pages, which need nothing."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreword.errors import ConfigError
from foreword.optional import optional
from foreword.pages import MOST_NUMBERS, Scale, check_labels, heatmap_html, number_text, shown_labels
from foreword.storage import write_atomic

__all__ = ["heatmap_html", "heatmap_png"]

_DOTS_PER_INCH = 150
# An image of more rows keeps to about this many inches, and its cells get smaller.
_TALLEST = 40.0


def heatmap_png(path: str | Path, panels: Sequence[Mapping[str, Any]], *, title: str = "") -> None:
    """Write heat maps below each other into one image; panels are as `foreword.pages.heatmap_html` takes them.

    The first row of a panel is at the top. Colours run from the least to the greatest value, or around zero where some
    value is negative, or from -`reach` to `reach`. Raises `ConfigError` for labels that do not fit, `MissingPackage`
    without matplotlib, `StorageError`.
    """
    if not panels:
        raise ConfigError("no panels", "at least one", "name what is to be drawn")
    for panel in panels:
        check_labels(panel["values"], panel["row_labels"], panel["column_labels"])
    figure_module = optional("matplotlib.figure", "plot")
    columns = max(len(panel["column_labels"]) for panel in panels)
    cell_inches = 0.5 if columns <= MOST_NUMBERS else max(0.07, min(0.3, 14 / columns))
    width = max(4.5, min(18.0, 2.6 + cell_inches * columns))
    heights = [max(2.2, min(_TALLEST / len(panels), 1.3 + 0.26 * len(panel["values"]))) for panel in panels]
    figure = figure_module.Figure(figsize=(width, sum(heights)), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    for panel, axes, height in zip(
        panels, figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0], heights, strict=True
    ):
        bar = figure.colorbar(_draw(panel, axes, height), ax=axes, shrink=0.9, fraction=min(0.1, 0.9 / width), pad=0.02)
        bar.set_label(panel["value_label"], fontsize=9)
        bar.ax.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _draw(panel: Mapping[str, Any], axes: Any, height: float) -> Any:
    """One heat map in its place, `height` inches high; the image, whose colours a bar explains."""
    values, column_labels, row_labels = panel["values"], panel["column_labels"], panel["row_labels"]
    scale, columns = Scale.of(values, panel.get("reach")), len(column_labels)
    grid = [[_number(row[k] if k < len(row) else None) for k in range(columns)] for row in values]
    shown = axes.imshow(
        grid or [[math.nan]], cmap="RdBu_r" if scale.around else "viridis", vmin=scale.low, vmax=scale.high,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axes.set_facecolor("#d8dce1")  # where there is nothing
    axes.set_title(panel["title"], fontsize=11, loc="left")
    axes.set_yticks(range(len(row_labels)), shown_labels(row_labels, most=round(height / 0.15)), fontsize=8)
    axes.set_xticks(range(columns), shown_labels(column_labels), fontsize=8)
    if any(len(str(label)) > 5 for label in column_labels):
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.tick_params(length=0)
    if columns <= MOST_NUMBERS:
        _write_numbers(axes, grid, scale)
    return shown


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _write_numbers(axes: Any, grid: list[list[float]], scale: Scale) -> None:
    """Each value into its cell, in the ink that is readable there."""
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if math.isfinite(value):
                place = scale.place(value)
                light = 0.15 < place < 0.85 if scale.around else place > 0.55
                axes.text(
                    x, y, number_text(value), ha="center", va="center", fontsize=7, color="black" if light else "white"
                )
