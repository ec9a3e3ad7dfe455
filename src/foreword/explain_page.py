"""The report of `foreword explain`: a page to read, with every layer, the most telling slots, and the rows to sort."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from foreword.explain import Explained, Explanation, Telling
from foreword.metrics.metric import Numbers
from foreword.pages import (
    Cell,
    Estimate,
    bullets,
    folded,
    forest,
    heading,
    heatmap,
    listing,
    paragraph,
    save_page,
    search,
    strip,
)
from foreword.storage import write_atomic

__all__ = ["save_explanation"]

# The page lists at most so many rows; the JSON file has all.
_LISTED = 1000
# So many standard deviations from its layer's mean a gate has the strongest colour.
_STRONGEST = 3.0


def save_explanation(found: Explanation, folder: str | Path) -> None:
    """Write `explain.html` and `explain.json` into a folder. Raises `StorageError`."""
    folder = Path(folder)
    write_atomic(folder / "explain.json", json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")
    title = f"Do the gates tell right from wrong? {found.task} {found.split}, {found.base}"
    save_page(folder / "explain.html", title, "\n".join([bullets(found.summary()), *_tellings(found), *_rows(found)]))


def _tellings(found: Explanation) -> list[str]:
    """The figures: every layer, every slot, the most telling slots; nothing where no number could tell."""
    if not found.layers or found.probability is None or found.tokens is None:
        return []
    width = max(map(len, found.slot_aurocs))
    offsets = [[value - 0.5 for value in row] + [None] * (width - len(row)) for row in found.slot_aurocs]
    chance = "" if found.slot_chance is None else (
        f" With labels dealt out at random, the best of all {sum(map(len, found.slot_aurocs))} slots is as telling as "
        f"the best here in {100 * found.slot_chance:.1f} % of the trials."
    )  # fmt: skip
    return [
        heading("Which layers tell"),
        paragraph(
            "AUROC: how often, of a right and a wrong row, the right one has the greater number. 0.5 tells nothing; "
            "below 0.5 the wrong rows have more. Bars are 95 % bootstrap intervals; those in colour leave out 0.5. "
            "Each holds by itself: of many layers, 1 in 20 leaves out 0.5 by chance, and as the gates of one text go "
            "together from layer to layer, so do their chance findings."
        ),
        forest(
            [_estimate(each) for each in (*found.layers, found.probability, found.tokens)], reference=0.5,
            label="AUROC of the mean gate λ·α of each layer, of the probability of the own answer, and of the length",
        ),
        heading("Which slots tell"),
        heatmap("AUROC − 0.5 of every slot", offsets, found.sites, [str(k) for k in range(width)], "AUROC − 0.5"),
        forest([_estimate(each) for each in found.slots], reference=0.5, label="The most telling slots"),
        paragraph(
            f"These {len(found.slots)} were picked for being far from 0.5, so that their intervals are too good."
            f"{chance}"
        ),
    ]  # fmt: skip


def _estimate(each: Telling) -> Estimate:
    note = f"— mean {each.mean_right:.4g} if right, {each.mean_wrong:.4g} if wrong"
    return Estimate(each.name, each.auroc, each.low, each.high, note)


def _rows(found: Explanation) -> list[str]:
    every = -(-len(found.rows) // _LISTED)
    chosen = found.rows[::every]
    gates = np.array([row.gates for row in found.rows])
    centre, spread = gates.mean(0), gates.std(0)
    cut = f"{len(chosen)} of {len(found.rows)} rows, one in {every}; explain.json has all. " if every > 1 else ""
    lines = []
    for row in chosen:
        away = np.divide(np.array(row.gates) - centre, spread, out=np.zeros_like(centre), where=spread > 1e-12)
        lines.append(_line(row, away, found.sites))
    return [
        heading("The rows"),
        paragraph(
            f"{cut}A click on a header sorts. Gates: one field for each layer, from the first to the last; red is more "
            f"than in the mean row, blue is less, full colour is {_STRONGEST:.0f} standard deviations away."
        ),
        search("rows"),
        listing(
            ["row", "text", "gold", "predicted", "probability", "", "gates by layer", "mean gate"], lines,
            classes=["right" if row.right else "wrong" for row in chosen], name="rows",
        ),
    ]  # fmt: skip


def _line(row: Explained, away: Numbers, sites: Sequence[str]) -> list[float | str | Cell]:
    said = ", ".join(f"{site} {gate:.3g}" for site, gate in zip(sites, row.gates, strict=True))
    mean = math.fsum(row.gates) / max(1, len(row.gates))
    return [
        row.id, Cell(folded(row.text), row.text), Cell(folded(row.gold, 80), row.gold),
        Cell(f'<span class="said">{folded(row.predicted, 80)}</span>', row.predicted), row.probability,
        "right" if row.right else "wrong",
        Cell(strip((away / _STRONGEST).tolist(), said), mean), mean,
    ]  # fmt: skip
