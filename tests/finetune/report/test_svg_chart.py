"""Charts: every value stands where it belongs, gaps stay gaps, and a thinned curve keeps its extremes."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as xml

import pytest

from finetune.report.svg_chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    SHOWN_POINTS,
    TOP,
    WIDTH,
    Series,
    chart_html,
    format_tick,
    round_numbers,
    round_powers,
    thin,
)


def drawing(html: str) -> xml.Element:
    """Return the SVG of a chart. XML, unlike HTML, wants quotes around every attribute."""
    svg = re.search(r"<svg.*</svg>", html, re.DOTALL)
    assert svg
    return xml.fromstring(re.sub(r"=([^\s'\">]+)(?=[\s>])", r'="\1"', svg[0]))


def places(group: xml.Element) -> list[list[tuple[float, float]]]:
    """Return the points of each polyline."""
    lines = [line.attrib["points"].split() for line in group.iter("polyline")]
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line)] for line in lines]


def group_of(svg: xml.Element, kind: str) -> xml.Element:
    return next(group for group in svg.iter("g") if group.get("class") == kind)


@pytest.mark.parametrize(("kind", "measure"), [("linear", float), ("logarithmic", math.log10)])
def test_points_stand_at_their_values(kind, measure):
    """Both axes are affine in the step and in the value (or its logarithm), within a tenth of a unit."""
    values = [100.0, 3.0, 20.0, 0.5]
    svg = drawing(chart_html("x", [Series("x", list(zip([10, 20, 50, 110], values, strict=True)))]))
    (line,) = places(group_of(svg, kind))
    left, right = LEFT, WIDTH - RIGHT
    assert [x for x, _ in line] == pytest.approx(
        [left + (step - 10) / 100 * (right - left) for step in (10, 20, 50, 110)], abs=0.06
    )
    low, high = line[3][1], line[0][1]
    assert TOP <= high < low <= HEIGHT - BOTTOM
    shares = [(measure(value) - measure(0.5)) / (measure(100) - measure(0.5)) for value in values]
    assert [y for _, y in line] == pytest.approx([low + share * (high - low) for share in shares], abs=0.11)


def test_ticks_stand_at_their_values():
    svg = drawing(chart_html("x", [Series("x", [(0, 2.0), (100, 40.0)])]))
    (line,) = places(group_of(svg, "linear"))
    slope = (line[1][1] - line[0][1]) / 38
    texts = {float(text.text or ""): float(text.attrib["y"]) - 4 for text in group_of(svg, "linear").iter("text")}
    assert len(texts) >= 3
    for value, y in texts.items():
        assert y == pytest.approx(line[0][1] + slope * (value - 2), abs=0.15)


def test_values_that_are_not_finite_are_gaps_and_marks():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 2.0), (5, 1.0)]
    html = chart_html("x", [Series("loss", points)])
    svg = drawing(html)
    assert [len(line) for line in places(group_of(svg, "linear"))] == [2, 2]
    assert "<title>step 3: loss is not finite</title>" in html
    only = chart_html("x", [Series("loss", [(1, math.nan)])])
    assert "step 1: loss is not finite" in only and "<b>nan</b>" in only


def test_a_logarithmic_axis_is_for_values_above_0():
    assert "checkbox" not in chart_html("x", [Series("x", [(1, 0.0), (2, 100.0)])], logarithmic=True)
    assert "checkbox" not in chart_html("x", [Series("x", [(1, 50.0), (2, 100.0)])])
    assert "checkbox checked" in chart_html("x", [Series("x", [(1, 50.0), (2, 100.0)])], logarithmic=True)
    assert "checkbox autocomplete" in chart_html("x", [Series("x", [(1, 1.0), (2, 100.0)])])


def test_a_thinned_curve_keeps_its_ends_gaps_and_extremes():
    points = [(step, math.sin(step / 500)) for step in range(10_000)]
    points[4321] = (4321, 50.0)
    points[7000] = (7000, math.nan)
    thinned = thin(points)
    assert len(thinned) <= SHOWN_POINTS + 3 and thinned == sorted(thinned, key=lambda point: point[0])
    assert {points[0], points[4321], points[-1]} <= set(thinned) and any(step == 7000 for step, _ in thinned)
    assert min(value for _, value in thinned) == min(value for _, value in points if math.isfinite(value))


def test_names_from_outside_are_shown_as_text():
    html = chart_html("<i>t", [Series("<b>n", [(1, 1.0)])], marks={1: "<u>m"})
    assert "<i>t" not in html and "<b>n" not in html and "<u>m" not in html and "&lt;u&gt;m" in html


def test_ticks_are_round_and_few():
    assert round_numbers(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert round_numbers(3.0, 3.0, 5) == [3.0]
    assert round_powers(0.5, 2000) == [1, 10, 100, 1000]
    assert 3 <= len(round_powers(1e-9, 1e3)) <= 12
    assert [format_tick(value) for value in (0, 0.25, 1500, 20_000, 3e6, 1e-5)] == [
        "0",
        "0.25",
        "1,500",
        "20k",
        "3M",
        "1e-5",
    ]
