from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.report.chart import MOST_POINTS, Line, chart, label, path, ticks

finite = st.floats(-1e6, 1e6, allow_nan=False)


def points(drawn: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", drawn)]


def test_path_maps_data_linearly_with_y_upwards() -> None:
    line = Line("a", "a", [0.0, 5.0, 10.0], [1.0, 2.0, 5.0])
    assert path(line, (0, 10), (1, 5)) == "M0.00 100.00L50.00 75.00L100.00 0.00"


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=30, unique_by=lambda point: point[0]))
def test_every_point_of_a_chart_is_where_its_axes_say(data: list[tuple[float, float]]) -> None:
    data = sorted(data)
    drawn = chart("t", [Line("a", "a", [x for x, _ in data], [y for _, y in data])])
    assert drawn is not None
    x_low, x_high = data[0][0], data[-1][0]
    lowest, highest = ticks(min(y for _, y in data), max(y for _, y in data), outside=True)[:: len(drawn.y_ticks) - 1]
    for (x, y), (left, top) in zip(data, points(drawn.paths[0][2]), strict=True):
        assert left == pytest.approx(100 * (x - x_low) / (x_high - x_low), abs=0.006)
        assert top == pytest.approx(100 * (highest - y) / (highest - lowest), abs=0.006)
        assert -0.01 <= top <= 100.01
    assert [drawn.y_ticks[0][0], drawn.y_ticks[-1][0]] == pytest.approx([100, 0])


@given(finite, finite)
def test_ticks_are_few_even_and_span_the_data(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high, outside=True)
    assert 2 <= len(found) <= 8
    assert found[0] <= low + 1e-6 * (found[1] - found[0])
    assert found[-1] >= high - 1e-6 * (found[1] - found[0])
    gaps = [after - before for before, after in pairwise(found)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-3)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_a_gap(broken: float) -> None:
    drawn = chart("t", [Line("a", "a", [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, broken, 1.0, 0.0])])
    assert drawn is not None
    assert drawn.paths[0][2] == "M0.00 100.00L25.00 0.00M75.00 0.00L100.00 100.00"


def test_a_point_alone_is_a_dot_in_the_middle() -> None:
    drawn = chart("t", [Line("a", "a", [120.0], [0.5])])
    assert drawn is not None
    assert drawn.paths[0][2] == "M50.00 50.00h0"
    assert drawn.x_ticks == [(50.0, "120")]


def test_no_chart_without_a_finite_point() -> None:
    assert chart("t", []) is None
    assert chart("t", [Line("a", "a", [0.0], [math.nan])]) is None
    assert chart("t", [Line("teacher", "teacher", level=0.9)]) is None


def test_a_level_spans_the_plot_at_its_value() -> None:
    drawn = chart("t", [Line("a", "a", [0.0, 10.0], [0.0, 100.0]), Line("teacher", "teacher", level=75.0)], unit="%")
    assert drawn is not None
    assert drawn.paths[1] == ("teacher", "teacher", "M0.00 25.00L100.00 25.00", "75.0\N{NARROW NO-BREAK SPACE}%")


def test_many_rows_are_averaged_in_groups_and_the_chart_says_so() -> None:
    rows = 4 * MOST_POINTS
    drawn = chart("t", [Line("a", "a", [float(i) for i in range(rows)], [float(i % 4) for i in range(rows)])])
    assert drawn is not None
    assert len(points(drawn.paths[0][2])) == MOST_POINTS
    assert len({top for _, top in points(drawn.paths[0][2])}) == 1  # the mean of 0, 1, 2, 3 every time
    assert drawn.note == "Each point is the mean of 4 rows."
    assert drawn.paths[0][3] == "1.5"


def test_labels() -> None:
    assert [label(y, step=0.5) for y in (0.0, 0.5, 1.0)] == ["0.0", "0.5", "1.0"]
    assert [label(12_000), label(0.2513), label(900)] == ["12k", "0.251", "900"]
