"""Charts: every point where it belongs, nothing from outside, no mark on top of another series' mark."""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.charts import Point, Series, View, chart, dots, side_by_side, ticks
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


@pytest.mark.parametrize(("higher", "left"), [(True, [5.0, 9.0]), (False, [5.0, 4.0])])
def test_the_front_leaves_out_what_another_beats(higher: bool, left: list[float]) -> None:
    points = [Point(1, 5.0), Point(2, 4.0), Point(3, 9.0)]
    html = side_by_side("t", [View([Series("a", points)], "x")], y_label="y", higher_is_better=higher)
    line = next(each for each in drawn(html).iter("polyline") if each.get("class") == "front")
    marks = {point.y: mark.get("cy") for point, mark in zip(points, list(drawn(html).iter("circle"))[1:], strict=True)}
    assert [pair.split(",")[1] for pair in str(line.get("points")).split()] == [marks[y] for y in left]


def test_pictures_side_by_side_share_names_and_heights() -> None:
    views = [
        View([Series("a", [Point(1, 5.0)]), Series("b", [Point(10, 7.0)])], "bytes", log_x=True),
        View([Series("b", [Point(3, 7.0)])], "seconds"),
    ]
    html = side_by_side("t", views, y_label="y")
    squares = list(drawn(html).iter("polygon"))
    assert len(list(drawn(html).iter("circle"))) == 2 and len(squares) == 3, "one in the legend, the others in pictures"
    assert {each.get("fill") for each in squares} == {squares[0].get("fill")}
    first, second = ([pair.split(",") for pair in str(each.get("points")).split()] for each in squares[1:])
    assert [y for _, y in first] == [y for _, y in second] and float(first[0][0]) < 300 < float(second[0][0])


def test_dots_are_under_each_other_and_in_words() -> None:
    named = {"low": Point(0, 1.0, 0.5, 2.0, "1.0 [0.5, 2.0]"), "high": Point(0, 4.0, said="4.0", hollow=True)}
    html = dots("t", named, x_label="BLEU", reference=0.0)
    low, high = drawn(html).iter("circle")
    assert float(low.get("cx", "")) < float(high.get("cx", "")) and float(low.get("cy", "")) < float(high.get("cy", ""))
    assert low.get("fill") != "none" and high.get("fill") == "none"
    line = next(each for each in drawn(html).iter("line") if each.get("class") == "axis")
    assert float(line.get("x1", "")) < float(low.get("cx", ""))
    texts = [each.text for each in drawn(html).iter("text")]
    assert {"low", "1.0 [0.5, 2.0]", "high", "4.0", "BLEU"} <= set(texts)
    with pytest.raises(ConfigError, match="without points"):
        dots("t", {}, x_label="x")


def test_names_stand_at_their_places() -> None:
    series = [Series("a", [Point(0, 1.0), Point(1, 2.0)])]
    html = chart("t", series, x_label="test", y_label="y", x_names={0.0: "seen", 1.0: "unseen"})
    at = {each.text: float(each.get("x", "")) for each in drawn(html).iter("text")}
    assert at["seen"] < at["unseen"]


def test_many_names_make_a_higher_picture() -> None:
    html = chart("t", [Series(f"s{k}", [Point(k, k)]) for k in range(30)], x_label="x", y_label="y")
    height = float(re.search(r'viewBox="0 0 \S+ (\S+)"', html).group(1))  # type: ignore[union-attr]
    assert height > max(float(each.get("y", 0)) for each in drawn(html).iter("text"))


def test_long_names_make_a_wider_picture() -> None:
    name = "Full fine-tuning max_steps 180, learning_rate 0.0001"
    for draw in (
        lambda series: chart("t", series, x_label="x", y_label="y"),
        lambda series: side_by_side("t", [View(series, "x")], y_label="y"),
    ):
        widths = []
        for series in ([Series("a", [Point(1, 2.0)])], [Series(name, [Point(1, 2.0)])]):
            html = draw(series)
            widths.append(float(re.search(r'viewBox="0 0 (\S+) ', html).group(1)))  # type: ignore[union-attr]
            (x,) = re.findall(rf'<text x="(\S+)"[^>]*>{series[0].name}<', html)
            assert float(x) + 6 * len(series[0].name) < widths[-1]
        assert widths[0] < widths[1]


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
