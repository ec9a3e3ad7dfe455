"""Charts as inline SVG for HTML pages: values over a quantity, each with its interval; nothing is fetched.

`chart` draws values over one quantity, `side_by_side` over several with the same upward axis, `dots` those of names.
Series differ in colour and in the shape of their marks; a point tells what it is to the reader who points at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from foreword.errors import ConfigError
from foreword.pages import escaped

__all__ = ["Point", "Series", "View", "chart", "dots", "side_by_side", "ticks"]

_WIDTH, _HEIGHT = 760.0, 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 190.0, 14.0, 46.0
_DODGE = 5.0  # how far apart the intervals of two series at the same place are
_FEW = 8  # so many different places are all labelled
_LINE = 19.0  # from one name of a legend to the next
_GAP = 26.0  # between pictures side by side
_LETTER = 6.4  # the width of one, about

# Okabe and Ito: told apart without colour vision, on white and on black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")


class Point(NamedTuple):
    """A value at a place, the ends of its interval (None: it has none), and what is said of it.

    The mark of a `hollow` point has no filling, and its `size` is a factor: there is something about it that the page
    tells.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    said: str = ""
    hollow: bool = False
    size: float = 1.0


class Series(NamedTuple):
    """Points that belong together, and their name."""

    name: str
    points: Sequence[Point]


class View(NamedTuple):
    """One of several pictures side by side: series over one quantity. The same name has the same colour in all."""

    series: Sequence[Series]
    x_label: str
    log_x: bool = False


class _Area(NamedTuple):
    """Where values are drawn on a page."""

    left: float
    right: float
    top: float
    bottom: float


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    x_names: Mapping[float, str] | None = None,
) -> str:
    """A figure of values over a quantity, as HTML; the points of a series are joined by a line.

    `x_names` are written at their places instead of numbers. Raises `ConfigError` for no points, or x that a
    logarithmic axis cannot show.

    >>> figure = chart("BLEU", [Series("prefix", [Point(50, 30.5, 28, 33)])], x_label="rows", y_label="BLEU")
    >>> figure.startswith("<figure>"), "30.5" in figure
    (True, True)
    """
    height = _height(len(series))
    area = _Area(_LEFT, _WIDTH - _RIGHT, _TOP, height - _BOTTOM)
    across, upwards = _across([View(series, x_label, log_x)], [area])[0], _upwards(series, area)
    parts = [_grid(area, upwards), _ground(area, across, x_label, x_names or {}), _side(area, y_label)]
    for place, each in enumerate(series):
        shift = _DODGE * (place - (len(series) - 1) / 2)
        parts.append(_drawn(each, place, lambda x, shift=shift: across(x) + shift, upwards))  # type: ignore[misc]
        parts.append(_named(each.name, place))
    return _figure(title, series, parts, height, [each.name for each in series])


def side_by_side(title: str, views: Sequence[View], *, y_label: str, higher_is_better: bool = True) -> str:
    """A figure of the same values over several quantities, of each of which less is better.

    A dotted line in each picture joins those points that no other beats: with no more of x and at least as good a
    value. Raises `ConfigError` as `chart` does.

    >>> views = [View([Series("a", [Point(1, 2.0)])], label) for label in ("bytes", "seconds")]
    >>> side_by_side("BLEU", views, y_label="BLEU").count('class="front"')
    2
    """
    names = list(dict.fromkeys(each.name for view in views for each in view.series))
    series = [each for view in views for each in view.series]
    height = _height(len(names))
    width = (_WIDTH - _LEFT - _RIGHT - _GAP * (len(views) - 1)) / max(1, len(views))
    lefts = [_LEFT + place * (width + _GAP) for place in range(len(views))]
    areas = [_Area(left, left + width, _TOP, height - _BOTTOM) for left in lefts]
    axes = _across(views, areas)
    upwards = _upwards(series, areas[0])
    parts = [_side(areas[0], y_label), *(_named(name, place) for place, name in enumerate(names))]
    for view, area, across in zip(views, areas, axes, strict=True):
        parts += [_grid(area, upwards, labelled=area is areas[0]), _ground(area, across, view.x_label, {})]
        parts.append(_front([p for each in view.series for p in each.points], across, upwards, higher_is_better))
        parts += [_drawn(each, names.index(each.name), across, upwards, thin=True) for each in view.series]
    return _figure(title, series, parts, height, names)


def dots(title: str, named: Mapping[str, Point], *, x_label: str, reference: float | None = None) -> str:
    """A figure of values by name, one under the other, as HTML: the `y` of each point from left to right, in words too.

    A line stands at the `reference`, if there is one. Raises `ConfigError` for no points.

    >>> dots("BLEU", {"prefix": Point(0, 30.5, 28, 33, "30.5 [28.0, 33.0]")}, x_label="BLEU").count("<circle")
    1
    """
    if not named:
        raise ConfigError("a chart without points", "at least one", "leave it out")
    left = min(300.0, 24 + _LETTER * max(map(len, named)))
    right = _WIDTH - 16 - _LETTER * max(len(point.said) for point in named.values())
    area = _Area(left, right, _TOP, _TOP + 22 * len(named) + 8)
    ends = [e for p in named.values() for e in (p.y, p.low, p.high) if e is not None]
    across = _Axis([*ends, *([] if reference is None else [reference])], left + 12, right - 12)
    parts = [_ground(area, across, x_label, {}, few=False)]
    if reference is not None:
        x = across(reference)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{area.top:g}" y2="{area.bottom:g}"/>')
    for place, (name, point) in enumerate(named.items()):
        y = area.top + 16 + 22 * place
        parts.append(f"<g><title>{escaped(f'{name}: {point.said}')}</title>")
        if point.low is not None and point.high is not None:
            ends_at = f'x1="{across(point.low):.1f}" x2="{across(point.high):.1f}" y1="{y:g}" y2="{y:g}"'
            parts.append(f'<line stroke="{_COLOURS[0]}" stroke-opacity=".55" {ends_at}/>')
        parts.append(f"{_mark(across(point.y), y, 0, _COLOURS[0], point)}</g>")
        parts += [_text(left - 10, y + 4, name, "end"), _text(right + 10, y + 4, point.said, "start")]
    said = [Series(name, [point]) for name, point in named.items()]
    return _figure(title, said, parts, area.bottom + _BOTTOM)


def _height(names: int) -> float:
    return max(_HEIGHT, _TOP + _LINE * names + _BOTTOM)


def _figure(
    title: str, series: Sequence[Series], parts: Sequence[str], height: float, legend: Sequence[str] = ()
) -> str:
    """The picture, wider where a name of the legend needs it."""
    width = max(_WIDTH, _WIDTH - _RIGHT + 38 + _LETTER * max(map(len, legend), default=0))
    said = "; ".join(f"{each.name}: {', '.join(_number(point.y) for point in each.points)}" for each in series)
    return (
        f"<figure><figcaption>{escaped(title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" '
        f'role="img" aria-label="{escaped(f"{title}. {said}")}">{"".join(parts)}</svg></figure>'
    )


def _across(views: Sequence[View], areas: Sequence[_Area]) -> list[_Axis]:
    """The axis of each view. Raises `ConfigError` for no points, or x that a logarithmic axis cannot show."""
    axes = []
    for view, area in zip(views, areas, strict=True):
        places = [point.x for each in view.series for point in each.points]
        if not places:
            raise ConfigError("a chart without points", "at least one", "leave it out")
        if view.log_x and min(places) <= 0:
            raise ConfigError("x of 0 or less on a logarithmic axis", "numbers above 0", "use a linear axis")
        axes.append(_Axis(places, area.left + 24, area.right - 24, view.log_x))
    return axes


def _upwards(series: Sequence[Series], area: _Area) -> _Axis:
    points = [point for each in series for point in each.points]
    ends = [end for p in points for end in (p.y, p.low, p.high) if end is not None]
    return _Axis(ends, area.bottom - 10, area.top + 10)


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


def _grid(area: _Area, upwards: _Axis, labelled: bool = True) -> str:
    parts = []
    for value in upwards.labelled(few=False):
        y = upwards(value)
        parts.append(f'<line class="grid" x1="{area.left:g}" x2="{area.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts += [_text(area.left - 8, y + 4, _number(value), "end", "tick")] if labelled else []
    return "".join(parts)


def _ground(area: _Area, across: _Axis, label: str, names: Mapping[float, str], few: bool = True) -> str:
    """The axis at the bottom, with its numbers or names."""
    at = [*names] or _apart(across, few)
    parts = [_text(across(x), area.bottom + 18, names.get(x) or _number(x), "middle", "tick") for x in at]
    parts.append(
        f'<line class="base" x1="{area.left:g}" x2="{area.right:g}" y1="{area.bottom:g}" y2="{area.bottom:g}"/>'
    )
    return "".join([*parts, _text((area.left + area.right) / 2, area.bottom + 38, label, "middle")])


def _side(area: _Area, label: str) -> str:
    y = (area.top + area.bottom) / 2
    return f'<text transform="rotate(-90 14 {y:.1f})" x="14" y="{y:.1f}" text-anchor="middle">{escaped(label)}</text>'


def _named(name: str, place: int) -> str:
    """A name in the legend, with its mark."""
    y = _TOP + 12 + _LINE * place
    mark = _mark(_WIDTH - _RIGHT + 18, y - 4, place, _COLOURS[place % len(_COLOURS)])
    return mark + _text(_WIDTH - _RIGHT + 30, y, name, "start")


def _apart(across: _Axis, few: bool) -> list[float]:
    """The labelled places, without those whose label would touch the one before."""
    shown: list[float] = []
    for x in across.labelled(few):
        if not shown or across(x) - across(shown[-1]) >= 9 * max(len(_number(x)), len(_number(shown[-1]))):
            shown.append(x)
    return shown


def _drawn(each: Series, place: int, across: Callable[[float], float], upwards: _Axis, thin: bool = False) -> str:
    """The points of a series, joined by a line."""
    colour, points = _COLOURS[place % len(_COLOURS)], sorted(each.points, key=lambda point: (point.x, point.y))
    parts = []
    if len(points) > 1:
        path = " ".join(f"{across(point.x):.1f},{upwards(point.y):.1f}" for point in points)
        dashes = ("", "7 4", "2 3")[place // len(_COLOURS) % 3]
        width = 'stroke-width="1" stroke-opacity=".5"' if thin else 'stroke-width="2"'
        parts.append(f'<polyline fill="none" stroke="{colour}" {width} stroke-dasharray="{dashes}" points="{path}"/>')
    for point in points:
        x, said = across(point.x), point.said or f"{each.name}: {_number(point.y)}"
        parts.append(f"<g><title>{escaped(said)}</title>")
        if point.low is not None and point.high is not None:
            ends = f'y1="{upwards(point.low):.1f}" y2="{upwards(point.high):.1f}"'
            parts.append(f'<line stroke="{colour}" stroke-opacity=".55" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        parts.append(f"{_mark(x, upwards(point.y), place, colour, point)}</g>")
    return "".join(parts)


def _mark(x: float, y: float, place: int, colour: str, point: Point | None = None) -> str:
    r = 5.0 * (1.0 if point is None else point.size)
    hollow = point is not None and point.hollow
    paint = f'fill="none" stroke="{colour}" stroke-width="2"' if hollow else f'fill="{colour}"'
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


def _front(points: Sequence[Point], across: _Axis, upwards: _Axis, higher_is_better: bool) -> str:
    """A line through those that no other point beats."""
    best: list[Point] = []
    sign = 1 if higher_is_better else -1
    for point in sorted(points, key=lambda point: (point.x, -sign * point.y)):
        if not best or sign * point.y > sign * best[-1].y:
            best.append(point)
    path = " ".join(f"{across(point.x):.1f},{upwards(point.y):.1f}" for point in best)
    return f'<polyline class="front" points="{path}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def _number(value: float) -> str:
    """A number as it is read: 20,000; 0.25; 3.1.

    >>> _number(20000), _number(0.25), _number(3.14159), _number(0), _number(1e7)
    ('20,000', '0.25', '3.1', '0', '10M')
    """
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.2g}"
