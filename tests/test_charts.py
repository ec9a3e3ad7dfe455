"""Charts: every point where it belongs, nothing from outside, no mark on top of another series' mark."""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.charts import Point, Series, chart, ticks
from foreword.errors import ConfigError

NUMBERS = st.floats(-1e4, 1e4, allow_nan=False).map(lambda value: round(value, 3))
ENDS = st.none() | NUMBERS
POINTS = st.lists(st.builds(Point, NUMBERS, NUMBERS, ENDS, ENDS, st.text("a<&", max_size=3)), min_size=1, max_size=5)


def drawn(html: str) -> ET.Element:
    return ET.fromstring(html)


@given(st.lists(POINTS, min_size=1, max_size=8))
def test_all_is_inside_of_the_picture(groups: list[list[Point]]) -> None:
    html = chart("t", [Series(f"s{k}", points) for k, points in enumerate(groups)], x_label="x", y_label="y")
    _, _, width, height = map(float, re.search(r'viewBox="([^"]+)"', html).group(1).split())  # type: ignore[union-attr]
    circles = [each for each in drawn(html).iter() if each.tag in ("circle", "polygon")]
    assert len(circles) == sum(map(len, groups)) + len(groups), "one mark for each point and one in the legend"
    for each in drawn(html).iter("circle"):
        assert 0 <= float(each.get("cx", "")) <= width and 0 <= float(each.get("cy", "")) <= height


def test_more_is_higher_and_further_right() -> None:
    points = [Point(50, 10.0), Point(100, 20.0), Point(500, 15.0)]
    html = chart("t", [Series("a", points)], x_label="rows", y_label="BLEU", log_x=True)
    line = drawn(html).find(".//polyline")
    assert line is not None
    places = [tuple(map(float, pair.split(","))) for pair in str(line.get("points")).split()]
    assert places[0][0] < places[1][0] < places[2][0]
    assert places[1][1] < places[2][1] < places[0][1], "y grows downwards on a page"
    assert places[1][0] - places[0][0] < places[2][0] - places[1][0], "a logarithmic axis"


def test_the_front_leaves_out_what_another_beats() -> None:
    points = [Point(1, 5.0), Point(2, 4.0), Point(3, 9.0)]
    html = chart("t", [Series("a", points)], x_label="x", y_label="y", joined=False, front=True)
    line = next(each for each in drawn(html).iter("polyline") if each.get("class") == "front")
    assert len(str(line.get("points")).split()) == 2


def test_names_are_text_and_points_say_what_they_are() -> None:
    html = chart("<b>", [Series("a & b", [Point(1, 2, 1, 3, "two <of> them")])], x_label="x", y_label="y")
    assert "<b>" not in html and "two &lt;of&gt; them" in html and "a &amp; b" in html


def test_a_hollow_mark_is_drawn_as_a_line() -> None:
    html = chart("t", [Series("a", [Point(1, 2), Point(2, 3, hollow=True)])], x_label="x", y_label="y")
    fillings = [each.get("fill") for each in drawn(html).iter("circle")]
    assert fillings[0] == fillings[2] != "none" and fillings[1] == "none", "the second point; the last is the legend's"


def test_what_cannot_be_drawn_is_an_error() -> None:
    with pytest.raises(ConfigError, match="without points"):
        chart("t", [Series("a", [])], x_label="x", y_label="y")
    with pytest.raises(ConfigError, match="logarithmic"):
        chart("t", [Series("a", [Point(0, 1)])], x_label="x", y_label="y", log_x=True)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_within(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert len(found) <= 7
    assert all(low - span * 1e-6 <= each <= low + span * (1 + 1e-6) for each in found)
    assert found == sorted(set(found))
