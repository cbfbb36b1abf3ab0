"""Schedules: constant between their points, told as numbers, mappings or text, and refused in one sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.errors import UserError
from stillhouse.masks.schedules import Schedule


@given(st.floats(0, 1))
def test_one_number_is_in_force_everywhere(progress: float) -> None:
    assert Schedule(0.5).at(progress) == 0.5


@pytest.mark.parametrize(
    "value", ["0:1.0,0.5:0.5,0.75:4", {0.0: 1.0, 0.5: 0.5, 0.75: 4}, {0.75: 4, 0: 1.0, 0.5: 0.5}, " 0 : 1.0 , 0.5 : 0.5, 0.75: 4"]
)
def test_points(value: str | dict[float, float]) -> None:
    schedule = Schedule(value)
    assert [schedule.at(progress) for progress in (0.0, 0.4999, 0.5, 0.7, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.5, 4, 4]
    assert schedule.values() == [1.0, 0.5, 4]


@pytest.mark.parametrize(("text", "number"), [("98", 98), ("0.5", 0.5), ("1", 1), ("1.0", 1.0)])
def test_a_count_stays_a_count_and_a_share_a_share(text: str, number: float | int) -> None:
    value = Schedule(text).at(0)
    assert value == number
    assert type(value) is type(number)


@given(st.dictionaries(st.floats(0, 1), st.floats(0, 1)), st.floats(0, 1))
def test_the_last_point_that_was_passed_is_in_force(points: dict[float, float], progress: float) -> None:
    points = {**points, 0.0: 0.125}
    assert Schedule(points).at(progress) == points[max(point for point in points if point <= progress)]


@pytest.mark.parametrize(
    "value", ["abc", "", "0.5:1", "0:1,2:1", "-1:1", "0:", "0:1,", "0:1:2", {}, {0.5: 1.0}, {0: 1.0, 1.5: 1.0}, "nan:1", "²"]
)
def test_refused_in_one_sentence(value: object) -> None:
    with pytest.raises(UserError) as refusal:
        Schedule(value)  # type: ignore[arg-type]
    assert "0:1.0,0.5:0.5" in str(refusal.value)
    assert "\n" not in str(refusal.value)
