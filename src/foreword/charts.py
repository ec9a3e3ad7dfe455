"""Charts as inline SVG for HTML pages: values over a quantity, each with its interval; nothing is fetched.

Series differ in colour and in the shape of their marks; a point tells what it is to the reader who points at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from foreword.errors import ConfigError
from foreword.pages import escaped

__all__ = ["Point", "Series", "chart", "ticks"]

_WIDTH, _HEIGHT = 760.0, 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 190.0, 14.0, 46.0
_DODGE = 5.0  # how far apart the intervals of two series at the same place are
_FEW = 8  # so many different places are all labelled

# Okabe and Ito: told apart without colour vision, on white and on black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")


class Point(NamedTuple):
    """A value at a place, the ends of its interval (None: it has none), and what is said of it.

    The mark of a `hollow` point has no filling: there is something about it that the page tells.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    said: str = ""
    hollow: bool = False


class Series(NamedTuple):
    """Points that belong together, and their name."""

    name: str
    points: Sequence[Point]


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    joined: bool = True,
    front: bool = False,
) -> str:
    """A figure of values over a quantity, as HTML.

    Points of a series are `joined` by a line. With `front` a line joins those points that no other beats: with no more
    of x, and at least as much of y. Raises `ConfigError` for no points, or x that a logarithmic axis cannot show.

    >>> figure = chart("BLEU", [Series("prefix", [Point(50, 30.5, 28, 33)])], x_label="rows", y_label="BLEU")
    >>> figure.startswith("<figure>"), "30.5" in figure
    (True, True)
    """
    points = [point for each in series for point in each.points]
    if not points:
        raise ConfigError("a chart without points", "at least one", "leave it out")
    if log_x and min(point.x for point in points) <= 0:
        raise ConfigError("x of 0 or less on a logarithmic axis", "numbers above 0", "use a linear axis")
    across = _Axis([point.x for point in points], _LEFT + 24, _WIDTH - _RIGHT - 24, log_x)
    ends = [end for p in points for end in (p.y, p.low, p.high) if end is not None]
    upwards = _Axis(ends, _HEIGHT - _BOTTOM - 10, _TOP + 10)
    parts = [_frame(across, upwards, x_label, y_label)]
    if front:
        parts.append(_front(points, across, upwards))
    for place, each in enumerate(series):
        shift = _DODGE * (place - (len(series) - 1) / 2) if joined else 0.0
        parts.append(_drawn(each, place, lambda x, shift=shift: across(x) + shift, upwards, joined))  # type: ignore[misc]
    said = "; ".join(f"{each.name}: {', '.join(_number(point.y) for point in each.points)}" for each in series)
    return (
        f'<figure><figcaption>{escaped(title)}</figcaption><svg class="chart" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" '
        f'role="img" aria-label="{escaped(f"{title}. {said}")}">{"".join(parts)}</svg></figure>'
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two ends, both included if they are round.

    >>> ticks(0, 50), ticks(0.12, 0.58)
    ([0.0, 10.0, 20.0, 30.0, 40.0, 50.0], [0.2, 0.3, 0.4, 0.5])
    """
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axis:
    """Where values are on the page, between two ends of it; a little room is left around them."""

    def __init__(self, values: Sequence[float], start: float, stop: float, log: bool = False) -> None:
        self.values, self.start, self.stop = sorted(set(values)), start, stop
        self._scale: Callable[[float], float] = math.log10 if log else float
        low, high = self._scale(self.values[0]), self._scale(self.values[-1])
        if low == high:
            low, high = low - 0.5, high + 0.5
        self.low, self.high, self.log = low, high, log

    def __call__(self, value: float) -> float:
        return self.start + (self._scale(value) - self.low) / (self.high - self.low) * (self.stop - self.start)

    def labelled(self, few: bool) -> list[float]:
        """What is labelled: all values if they are `few`, else round numbers."""
        if few and len(self.values) <= _FEW:
            return self.values
        if self.log:
            return [10.0**k for k in range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)] or self.values
        return ticks(self.low, self.high)


def _frame(across: _Axis, upwards: _Axis, x_label: str, y_label: str) -> str:
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in upwards.labelled(few=False):
        y = upwards(value)
        parts.append(f'<line class="grid" x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, _number(value), "end", "tick"))
    parts += [_text(across(x), bottom + 18, _number(x), "middle", "tick") for x in _apart(across)]
    parts.append(f'<line class="base" x1="{left:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
    parts.append(_text((left + right) / 2, _HEIGHT - 8, x_label, "middle"))
    y = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="rotate(-90 14 {y:.1f})" x="14" y="{y:.1f}" text-anchor="middle">{escaped(y_label)}</text>'
    )
    return "".join(parts)


def _apart(across: _Axis) -> list[float]:
    """The labelled places, without those whose label would touch the one before."""
    shown: list[float] = []
    for x in across.labelled(few=True):
        if not shown or across(x) - across(shown[-1]) >= 9 * max(len(_number(x)), len(_number(shown[-1]))):
            shown.append(x)
    return shown


def _drawn(each: Series, place: int, across: Callable[[float], float], upwards: _Axis, joined: bool) -> str:
    colour, points = _COLOURS[place % len(_COLOURS)], sorted(each.points, key=lambda point: (point.x, point.y))
    parts = []
    if joined and len(points) > 1:
        path = " ".join(f"{across(point.x):.1f},{upwards(point.y):.1f}" for point in points)
        dashes = ("", "7 4", "2 3")[place // len(_COLOURS) % 3]
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}" points="{path}"/>'
        )
    for point in points:
        x, said = across(point.x), point.said or f"{each.name}: {_number(point.y)}"
        parts.append(f"<g><title>{escaped(said)}</title>")
        if point.low is not None and point.high is not None:
            ends = f'y1="{upwards(point.low):.1f}" y2="{upwards(point.high):.1f}"'
            parts.append(f'<line stroke="{colour}" stroke-opacity=".55" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        parts.append(f"{_mark(x, upwards(point.y), place, colour, point.hollow)}</g>")
    y = _TOP + 12 + 19 * place
    parts.append(_mark(_WIDTH - _RIGHT + 18, y - 4, place, colour))
    parts.append(_text(_WIDTH - _RIGHT + 30, y, each.name, "start"))
    return "".join(parts)


def _mark(x: float, y: float, place: int, colour: str, hollow: bool = False) -> str:
    r, paint = 5.0, f'fill="none" stroke="{colour}" stroke-width="2"' if hollow else f'fill="{colour}"'
    corners = (
        None,
        ((-r, -r), (r, -r), (r, r), (-r, r)),
        ((0, -r * 1.2), (r * 1.1, r * 0.9), (-r * 1.1, r * 0.9)),
        ((0, -r * 1.3), (r * 1.3, 0), (0, r * 1.3), (-r * 1.3, 0)),
        ((0, r * 1.2), (r * 1.1, -r * 0.9), (-r * 1.1, -r * 0.9)),
    )[place % 5]
    if corners is None:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" {paint}/>'
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" {paint}/>'


def _front(points: Sequence[Point], across: _Axis, upwards: _Axis) -> str:
    """A line through those that no other point beats."""
    best, ahead = [], -math.inf
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if point.y > ahead:
            best.append(point)
            ahead = point.y
    path = " ".join(f"{across(point.x):.1f},{upwards(point.y):.1f}" for point in best)
    return f'<polyline class="front" points="{path}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def _number(value: float) -> str:
    """A number as it is read: 20,000; 0.25; 3.1.

    >>> _number(20000), _number(0.25), _number(3.14159), _number(0)
    ('20,000', '0.25', '3.1', '0')
    """
    if value == 0:
        return "0"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.2g}"
