"""Self-contained HTML pages: styles and script are inline, nothing is fetched, light or dark as the reader has it.

A page is made of figures and tables, each a string of HTML: `heatmap` (cells that answer to hover and arrow keys),
`forest` (estimates with intervals) and `listing` (a table sorted by a click on its header).
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from foreword.errors import ConfigError
from foreword.storage import write_atomic

__all__ = [
    "Cell", "Estimate", "Scale", "bullets", "colour", "escaped", "folded", "forest", "heading", "heatmap",
    "heatmap_html", "listing", "paragraph", "save_page", "search", "strip",
]  # fmt: skip

Values = Sequence[Sequence[float | None]]

# viridis, and red to blue through white: readable without colour vision, and the maps of the PNG files.
_RISING = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
_AROUND = ("2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b")

# Up to so many columns the cells also show their numbers; beyond the second number only some columns are labelled.
MOST_NUMBERS, MOST_LABELS = 14, 24


class Scale(NamedTuple):
    """The values that the two ends of a colour map stand for; `around` zero where some value is negative.

    >>> Scale.of([[0.25, None], [1.0, 0.5]]), Scale.of([[-2.0, 1.0]])
    (Scale(low=0.25, high=1.0, around=False), Scale(low=-2.0, high=2.0, around=True))
    """

    low: float
    high: float
    around: bool

    @classmethod
    def of(cls, values: Values, reach: float | None = None) -> Scale:
        """The scale that shows all of these values, of 0 to 1 if there are none; or that of -reach to reach."""
        found = [value for row in values for value in row if value is not None and math.isfinite(value)]
        if not found:
            return cls(0.0, 1.0, around=False)
        if reach is not None:
            return cls(-reach, reach, around=True)
        if min(found) < 0:
            reach = max(abs(value) for value in found)
            return cls(-reach, reach, around=True)
        return cls(min(found), max(found), around=False)

    def place(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        span = self.high - self.low
        return 0.5 if span <= 0 else min(1.0, max(0.0, (value - self.low) / span))


def colour(place: float, around: bool = False) -> str:
    """The colour at a place from 0 to 1 of the map.

    >>> colour(0.0), colour(1.0), colour(0.5, around=True)
    ('#440154', '#fde725', '#f7f7f7')
    """
    return "#" + "".join(f"{part:02x}" for part in _mixed(place, around))


def _mixed(place: float, around: bool) -> list[int]:
    anchors = _AROUND if around else _RISING
    at = place * (len(anchors) - 1)
    left = min(int(at), len(anchors) - 2)
    first, second = ([int(anchors[k][n : n + 2], 16) for n in (0, 2, 4)] for k in (left, left + 1))
    return [round(a + (b - a) * (at - left)) for a, b in zip(first, second, strict=True)]


def heatmap_html(
    path: str | Path, panels: Sequence[Mapping[str, Any]], *, title: str, lines: Sequence[str] = ()
) -> None:
    """Write a page of heat maps, one for each panel.

    `lines` of text come first. A panel has `title`, `values` (rows of numbers, None where there is nothing),
    `row_labels`, `column_labels` and `value_label`; it may have `details`, rows of texts for the reader who points at
    a cell. Raises `ConfigError` for labels that do not fit, `StorageError`.
    """
    said = [bullets(lines)] if lines else []
    save_page(path, title, "\n".join([*said, *(heatmap(**panel) for panel in panels)]))


def heatmap(
    title: str,
    values: Values,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    value_label: str,
    details: Sequence[Sequence[str]] | None = None,
    reach: float | None = None,
) -> str:
    """A heat map as a table; pointing at a cell, or the arrow keys, show its labels, value and details.

    With `reach` the colours run from -reach to reach, whatever the values.
    """
    check_labels(values, row_labels, column_labels)
    scale, columns = Scale.of(values, reach), len(column_labels)
    numbers = columns <= MOST_NUMBERS
    shown = shown_labels(column_labels)
    rows = []
    for place, (label, row) in enumerate(zip(row_labels, values, strict=True)):
        notes = [] if details is None else list(details[place])
        cells = [
            _cell(row[k] if k < len(row) else None, notes[k] if k < len(notes) else "", scale, numbers)
            for k in range(columns)
        ]
        rows.append(f'<tr><th scope="row">{escaped(label)}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{escaped(label)}</th>' for label in shown)
    names = html.escape(json.dumps([str(label) for label in column_labels]), quote=True)
    return (
        f'<figure class="heat"><figcaption>{escaped(title)}</figcaption>'
        f'<div class="scroll"><table class="{"numbers" if numbers else "cells"}" data-columns="{names}" '
        f'data-label="{escaped(value_label)}" aria-label="{escaped(title)}">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'{_legend(scale, value_label)}<p class="readout" aria-live="polite">Point at a cell, or press Tab and the '
        "arrow keys, to read it.</p></figure>"
    )


def number_text(value: float) -> str:
    """A number as it stands in a cell: two decimals, or one digit of a small one.

    >>> number_text(0.5), number_text(0.0123)
    ('0.50', '0.01')
    """
    return f"{value:.2f}" if abs(value) >= 0.095 or not value else f"{value:.1g}"


def check_labels(values: Values, row_labels: Sequence[str], column_labels: Sequence[str]) -> None:
    """Raise `ConfigError` unless every row has a label and every value a column."""
    widest = max((len(row) for row in values), default=0)
    if len(values) != len(row_labels) or widest > len(column_labels):
        raise ConfigError(
            f"{len(values)} rows of up to {widest} values with {len(row_labels)} row and {len(column_labels)} column "
            "labels", "a label for every row and column", "give as many labels",
        )  # fmt: skip


def shown_labels(labels: Sequence[str], most: int = MOST_LABELS) -> list[str]:
    """The labels with most of them left empty where there would be too many to read.

    >>> shown_labels(["1", "2", "3", "4", "5"], most=3)
    ['1', '', '3', '', '5']
    """
    every = max(1, -(-len(labels) // most))
    return [str(label) if place % every == 0 else "" for place, label in enumerate(labels)]


def _cell(value: float | None, detail: str, scale: Scale, numbers: bool) -> str:
    more = f' data-detail="{escaped(detail)}"' if detail else ""
    if value is None or not math.isfinite(value):
        return f'<td class="none"{more}></td>'
    place = scale.place(value)
    red, green, blue = _mixed(place, scale.around)
    ink = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"
    shown = number_text(value) if numbers else ""
    return (
        f'<td style="background:{colour(place, scale.around)};color:{ink}" data-value="{value:.6g}"{more}>{shown}</td>'
    )


def _legend(scale: Scale, label: str) -> str:
    stops = ",".join(colour(k / 8, scale.around) for k in range(9))
    return (
        f'<p class="legend"><span>{scale.low:.3g}</span><i style="background:linear-gradient(to right,{stops})"></i>'
        f"<span>{scale.high:.3g}</span> {escaped(label)}</p>"
    )


class Estimate(NamedTuple):
    """A number with the ends of its interval, and what it is of."""

    label: str
    value: float
    low: float
    high: float
    note: str = ""


def forest(estimates: Sequence[Estimate], *, reference: float, label: str) -> str:
    """Estimates with their intervals, one under the other, beside a line at `reference`; drawn as SVG.

    Intervals that do not hold the reference are drawn in colour.
    """
    if not estimates:
        return ""
    low = min(reference, *(each.low for each in estimates))
    high = max(reference, *(each.high for each in estimates))
    margin = 0.05 * (high - low or 1.0)
    low, high = low - margin, high + margin
    left, width, step = 150, 420, 22
    height = step * len(estimates) + 34

    def x(value: float) -> float:
        return round(left + width * (value - low) / (high - low), 1)

    parts = [f'<line class="axis" x1="{x(reference)}" x2="{x(reference)}" y1="4" y2="{height - 28}"/>']
    for place, each in enumerate(estimates):
        y = 16 + step * place
        kind = "clear" if not each.low <= reference <= each.high else "unclear"
        said = f"{each.label}: {each.value:.3f} [{each.low:.3f}, {each.high:.3f}] {each.note}".strip()
        parts.append(
            f'<g class="{kind}"><title>{escaped(said)}</title>'
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escaped(each.label)}</text>'
            f'<line x1="{x(each.low)}" x2="{x(each.high)}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{x(each.value)}" cy="{y}" r="4"/>'
            f'<text x="{left + width + 12}" y="{y + 4}">{each.value:.2f} [{each.low:.2f}, {each.high:.2f}]</text></g>'
        )
    ends = [value for value in (low + margin, high - margin) if abs(x(value) - x(reference)) > 34]
    parts += [
        f'<text class="tick" x="{x(value)}" y="{height - 12}" text-anchor="middle">{value:.2f}</text>'
        for value in (reference, *ends)
    ]
    box = f'viewBox="0 0 {left + width + 130} {height}"'
    return (
        f'<figure><figcaption>{escaped(label)}</figcaption><svg class="forest" {box} role="img" '
        f'aria-label="{escaped(label)}">{"".join(parts)}</svg></figure>'
    )


def strip(values: Sequence[float], said: str) -> str:
    """A small bar of colours, one for each value from -1 over 0 to 1, and what it says in words."""
    size = 100 / max(1, len(values))
    stops = ",".join(
        f"{colour((min(1.0, max(-1.0, value)) + 1) / 2, around=True)} {k * size:.4g}% {(k + 1) * size:.4g}%"
        for k, value in enumerate(values)
    )
    style = f"background:linear-gradient(to right,{stops})" if len(values) > 1 else f"background:{stops.split(' ')[0]}"
    return f'<i class="strip" role="img" style="{style}" title="{escaped(said)}" aria-label="{escaped(said)}"></i>'


def folded(text: str, most: int = 220) -> str:
    """A text whose rest, where it is long, unfolds at a click."""
    if len(text) <= most:
        return escaped(text)
    start = text[:most].rpartition(" ")[0] or text[:most]
    return f"<details><summary>{escaped(start)} …</summary>{escaped(text[len(start) :])}</details>"


class Cell(NamedTuple):
    """A cell of a listing: its HTML, and what it is sorted by."""

    html: str
    order: float | str


def search(of: str) -> str:
    """A box that leaves only those rows of the listing `of` that hold what is typed."""
    return f'<p><input type="search" data-of="{of}" placeholder="find in the rows" aria-label="find in the rows"></p>'


def listing(
    header: Sequence[str], rows: Sequence[Sequence[float | str | Cell]], *, classes: Sequence[str] = (), name: str = ""
) -> str:
    """A table whose header buttons sort it; `classes` are those of the rows. Strings are texts, not HTML."""
    head = "".join(f'<th scope="col"><button type="button">{escaped(name)}</button></th>' for name in header)
    body = []
    for place, row in enumerate(rows):
        kind = f' class="{classes[place]}"' if place < len(classes) else ""
        body.append(f"<tr{kind}>{''.join(_listed(value) for value in row)}</tr>")
    named = f' id="{name}"' if name else ""
    return (
        f'<div class="scroll"><table class="sortable"{named}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def bullets(lines: Sequence[str]) -> str:
    """Sentences, one under the other."""
    return f'<ul class="summary">{"".join(f"<li>{escaped(line)}</li>" for line in lines)}</ul>'


def heading(text: str) -> str:
    """The heading of a part of the page."""
    return f"<h2>{escaped(text)}</h2>"


def paragraph(text: str) -> str:
    """What stands beside a figure or table, in small print."""
    return f'<p class="soft">{escaped(text)}</p>'


def _listed(value: float | str | Cell) -> str:
    if isinstance(value, Cell):
        order = f"{value.order:.6g}" if isinstance(value.order, float) else str(value.order)
        return f'<td data-order="{escaped(order)}">{value.html}</td>'
    if isinstance(value, str):
        return f"<td>{escaped(value)}</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    return f'<td class="number" data-order="{value:.6g}">{shown}</td>'


def escaped(value: object) -> str:
    """A text as HTML."""
    return html.escape(str(value), quote=True)


def save_page(path: str | Path, title: str, body: str) -> None:
    """Write a page around a body of HTML. Raises `StorageError`."""
    name = escaped(title)
    page = f"{_HEAD}<title>{name}</title>\n</head>\n<body>\n<h1>{name}</h1>\n{body}\n<script>{_SCRIPT}</script>\n"
    write_atomic(path, f"{page}</body>\n</html>\n")


_STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#5d646d;--paper:#fff;--line:#d8dce1;--mark:#0b62c4;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#a0a7b0;--paper:#15171a;--line:#383d44;--mark:#7ab4ff;
--bad:#ff8a80}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1100px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 1rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p{max-width:46rem}.soft,.legend,.readout{color:var(--soft);font-size:.85rem}
figure{margin:1.5rem 0}figcaption{font-weight:600;margin-bottom:.5rem}.scroll{overflow-x:auto}
table{border-collapse:collapse}th{font-weight:500;text-align:left}
.heat th{font-size:.75rem;color:var(--soft);padding:0 .5em 0 0;white-space:nowrap}
.heat tbody th{position:sticky;left:0;background:var(--paper)}
.heat thead th{padding:0 0 .2em;text-align:center;max-width:0;overflow:visible}
.heat td{border:1px solid var(--paper);font-size:.72rem;text-align:center;height:1.6em;cursor:default}
.heat .numbers td{min-width:3.6em}.heat .numbers thead th{max-width:none;padding:0 .3em .2em}
.heat .cells tbody td{min-width:9px;width:22px}
.heat tbody td:focus,.heat tbody td.on{outline:2px solid var(--mark);outline-offset:-1px}
.heat td.none{background:repeating-linear-gradient(45deg,var(--line) 0 2px,transparent 2px 6px)}
.heat thead td{border:0}
.legend i{display:inline-block;width:9rem;height:.8em;margin:0 .5em;vertical-align:-.05em;border-radius:2px}
.readout{min-height:3em;margin:.2rem 0}
svg.forest{max-width:700px;width:100%;font-size:12px}svg text{fill:var(--ink)}svg .tick{fill:var(--soft)}
svg line{stroke-width:2}svg .axis{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3}
svg .clear line{stroke:var(--mark)}svg .clear circle{fill:var(--mark)}
svg .unclear line{stroke:var(--soft)}svg .unclear circle{fill:var(--soft)}
svg.chart{max-width:760px;width:100%;font-size:12px}svg .grid{stroke:var(--line);stroke-width:1}
svg .base{stroke:var(--soft);stroke-width:1}svg .front{fill:none;stroke:var(--soft);stroke-dasharray:3 3}
.sortable{width:100%;font-size:.85rem}
.sortable td,.sortable th{border-bottom:1px solid var(--line);padding:.35em .6em;vertical-align:top}
.sortable thead th{position:sticky;top:0;background:var(--paper);white-space:nowrap}
.sortable button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;cursor:pointer}
.sortable [aria-sort=ascending] button::after{content:" \\25b2"}
.sortable [aria-sort=descending] button::after{content:" \\25bc"}
.number{text-align:right;font-variant-numeric:tabular-nums}.wrong .said{color:var(--bad);font-weight:600}
details{display:inline}summary{cursor:pointer;list-style:none}
.strip{display:inline-block;width:9rem;height:1.1em;border-radius:2px;vertical-align:middle}
ul.summary{padding-left:1.2rem;max-width:46rem}ul.summary li{margin:.4rem 0}
input[type=search]{font:inherit;padding:.3em .5em;margin:.3rem .6rem .3rem 0;min-width:16rem}
"""

_SCRIPT = """
for(const table of document.querySelectorAll('.heat table')){
  const columns=JSON.parse(table.dataset.columns),out=table.closest('figure').querySelector('.readout');
  const rows=[...table.tBodies[0].rows],at=(r,c)=>rows[r]&&rows[r].cells[c+1];
  let marked=null;
  const read=cell=>{
    if(!cell||cell.tagName!=='TD')return;
    const row=cell.parentNode,value=cell.dataset.value;
    out.textContent=row.cells[0].textContent+', '+columns[cell.cellIndex-1]+': '+
      (value===undefined?'nothing here':table.dataset.label+' '+value)+
      (cell.dataset.detail?' \\u2014 '+cell.dataset.detail:'');
    if(marked)marked.classList.remove('on');marked=cell;cell.classList.add('on');
  };
  if(at(0,0))at(0,0).tabIndex=0;
  table.addEventListener('mouseover',e=>read(e.target.closest('tbody td')));
  table.addEventListener('focusin',e=>read(e.target.closest('tbody td')));
  table.addEventListener('keydown',e=>{
    const step={ArrowUp:[-1,0],ArrowDown:[1,0],ArrowLeft:[0,-1],ArrowRight:[0,1]}[e.key],cell=e.target;
    if(!step||cell.tagName!=='TD')return;
    const next=at(rows.indexOf(cell.parentNode)+step[0],cell.cellIndex-1+step[1]);
    e.preventDefault();
    if(next&&next.tagName==='TD'){cell.tabIndex=-1;next.tabIndex=0;next.focus();}
  });
}
for(const table of document.querySelectorAll('.sortable')){
  const body=table.tBodies[0],heads=[...table.tHead.rows[0].cells];
  const key=(row,k)=>{const c=row.cells[k];return c.dataset.order===undefined?c.textContent:c.dataset.order;};
  heads.forEach((head,k)=>head.querySelector('button').addEventListener('click',()=>{
    const up=head.getAttribute('aria-sort')!=='ascending';
    heads.forEach(other=>other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort',up?'ascending':'descending');
    const order=(a,b)=>{const x=key(a,k),y=key(b,k),n=x-y;return isNaN(n)?x.localeCompare(y):n;};
    [...body.rows].sort((a,b)=>up?order(a,b):order(b,a)).forEach(row=>body.append(row));
  }));
}
for(const box of document.querySelectorAll('input[type=search]')){
  const body=document.getElementById(box.dataset.of).querySelector('tbody');
  box.addEventListener('input',()=>{
    const wanted=box.value.toLowerCase();
    for(const row of body.rows)row.hidden=!row.textContent.toLowerCase().includes(wanted);
  });
}
"""

_HEAD = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none';style-src 'unsafe-inline';script-src 'unsafe-inline'">
<style>{_STYLE}</style>
"""
