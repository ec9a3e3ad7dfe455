"""Heat maps and pages: PNG files, HTML that parses and holds every number, and what is missing said in one line."""

from __future__ import annotations

import html
import json
import math
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import ConfigError, MissingPackage
from foreword.pages import (
    Cell,
    Estimate,
    Scale,
    colour,
    folded,
    forest,
    heatmap,
    listing,
    save_page,
    shown_labels,
    strip,
)  # fmt: skip
from foreword.plots import heatmap_html, heatmap_png

VOID = {"meta", "input", "link", "br", "circle", "line"}


class Reader(HTMLParser):
    """Checks that every element is closed in order, and collects elements and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for each, attributes in self.elements if each == tag]


def panel(values: list[list[float | None]], columns: int, **more: Any) -> dict[str, Any]:
    return {
        "title": "gates", "values": values, "row_labels": [f"layer {k}" for k in range(len(values))],
        "column_labels": [str(k) for k in range(columns)], "value_label": "λ·α", **more,
    }  # fmt: skip


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.mark.parametrize(("layers", "slots"), [(1, 1), (12, 20), (30, 200), (4, 4)])
def test_a_png_is_a_png_of_a_sensible_size(tmp_path: Path, layers: int, slots: int) -> None:
    pytest.importorskip("matplotlib")
    values = [[(k + layer) % 7 / 7 for k in range(slots - layer % 2)] for layer in range(layers)]
    heatmap_png(tmp_path / "new" / "gates.png", [panel(values, slots)])  # type: ignore[arg-type]
    width, height = size_of((tmp_path / "new" / "gates.png").read_bytes())
    assert 500 <= width <= 3000 and 250 <= height <= 3000


def test_the_same_values_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        heatmap_png(tmp_path / name, [panel([[0.1, None], [-0.5, 0.9]], 2)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_nothing_at_all_and_constants_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, values in {"none": [[None, None]], "same": [[0.5, 0.5]], "nan": [[math.nan, 1.0]]}.items():
        heatmap_png(tmp_path / f"{name}.png", [panel(values, 2)])
        heatmap_html(tmp_path / f"{name}.html", [panel(values, 2)], title=name)
        Reader((tmp_path / f"{name}.html").read_text())


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    options = panel([[0.1, 0.2, 0.3]], 2)
    with pytest.raises(ConfigError, match="1 rows of up to 3 values with 1 row and 2 column labels"):
        heatmap(**options)
    with pytest.raises(ConfigError, match="a label for every row"):
        heatmap_png(tmp_path / "x.png", [options])
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_one_line_says_so_and_pages_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = panel([[0.1]], 1)
    with pytest.raises(MissingPackage, match=r"'matplotlib' is not installed; run pip install 'foreword\[plot\]'"):
        heatmap_png(tmp_path / "x.png", [options])
    heatmap_html(tmp_path / "x.html", [options], title="gates")
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


def test_importing_plots_does_not_load_matplotlib() -> None:
    code = "import sys, foreword.plots; print('matplotlib' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "False"


values_of = st.lists(
    st.lists(st.one_of(st.none(), st.floats(-5, 5, allow_nan=False)), min_size=1, max_size=18), min_size=1, max_size=5
)


@given(values_of)
def test_the_page_holds_every_number(values: list[list[float | None]]) -> None:
    width = max(map(len, values))
    page = Reader(heatmap(**panel(values, width, details=[[f"detail {k}" for k in range(width)] for _ in values])))
    cells = [cell for cell in page.all("td") if cell]
    given = [row[k] if k < len(row) else None for row in values for k in range(width)]
    assert len(cells) == len(given)
    for cell, value in zip(cells, given, strict=True):
        assert (cell.get("data-value") is None) == (value is None)
        assert value is None or float(cell["data-value"] or "") == pytest.approx(value, rel=1e-5, abs=1e-12)
    assert [cell["data-detail"] for cell in cells[:width]] == [f"detail {k}" for k in range(width)]
    assert json.loads(page.all("table")[0]["data-columns"] or "") == [str(k) for k in range(width)]


def test_a_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    name = '<b>"rte" & BODY</b>'
    panels = [panel([[0.1, 0.9]], 2), panel([[-1.0, 1.0]] * 3, 2, details=[["what <all> are"]] * 3)]
    heatmap_html(tmp_path / "x.html", panels, title=name)
    text = (tmp_path / "x.html").read_text()
    page = Reader(text)
    assert page.text.count(name) == 2 and "<b>" not in text and "what &lt;all&gt; are" in text
    assert len(page.all("table")) == 2
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", text)
    assert "prefers-color-scheme:dark" in text and "default-src 'none'" in text


@given(st.floats(0, 1), st.booleans())
def test_colours_are_colours(place: float, around: bool) -> None:
    assert re.fullmatch("#[0-9a-f]{6}", colour(place, around))


def test_scales_and_labels() -> None:
    assert Scale.of([[]]) == Scale(0.0, 1.0, False) and Scale.of([[None, math.inf]]) == Scale(0.0, 1.0, False)
    assert Scale(2.0, 2.0, False).place(2.0) == 0.5
    assert Scale(0.0, 2.0, False).place(-1) == 0 and Scale(0.0, 2.0, False).place(1.0) == 0.5
    assert shown_labels(["a"] * 24) == ["a"] * 24
    assert sum(bool(label) for label in shown_labels(["a"] * 200)) <= 24


def test_a_forest_shows_estimates_beside_the_reference() -> None:
    drawn = Reader(forest([Estimate("a", 0.7, 0.6, 0.8), Estimate("b<", 0.5, 0.4, 0.6)], reference=0.5, label="AUROC"))
    assert [g["class"] for g in drawn.all("g")] == ["clear", "unclear"]
    assert "0.70 [0.60, 0.80]" in drawn.text and "b<" in drawn.text
    assert forest([], reference=0.5, label="none") == ""
    Reader(forest([Estimate("same", 0.5, 0.5, 0.5)], reference=0.5, label="one"))


def test_a_listing_sorts_by_what_it_is_told(tmp_path: Path) -> None:
    made = listing(
        ["id", "n"], [["<a>", 2], ["b", 0.5], [Cell("<i>c</i>", "c"), Cell("x", 3.0)]], classes=["right", "wrong"],
        name="rows",
    )  # fmt: skip
    page = Reader(made)
    assert [cell.get("data-order") for cell in page.all("td")] == [None, "2", None, "0.5", "c", "3"]
    assert [row.get("class") for row in page.all("tr")] == [None, "right", "wrong", None]
    assert "<a>" in page.text and page.all("table")[0]["id"] == "rows"
    save_page(tmp_path / "rows.html", "rows", made)
    Reader((tmp_path / "rows.html").read_text())


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=24))
def test_a_strip_has_a_field_for_each_value(values: list[float]) -> None:
    page = Reader(strip(values, "layer 0: 1, <2>"))
    (bar,) = page.all("i")
    assert bar["aria-label"] == "layer 0: 1, <2>"
    assert len(re.findall("#[0-9a-f]{6}", bar["style"] or "")) == len(values)


@given(st.text(min_size=0, max_size=400))
def test_folding_loses_nothing(text: str) -> None:
    page = html.unescape(re.sub(r"<[^>]*>", "", folded(text)))
    assert page.replace(" …", "", 1) == text or page == text
