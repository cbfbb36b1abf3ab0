"""A keep rate that finds itself: its limits, its budget, its order in the tolerance, and that it goes on from its state."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.errors import UserError
from stillhouse.masks.keep_rate import LADDER, LOOKS, OVERHEAD, PROBES, KeepRate

KL = st.floats(0, 20)
TURNED = st.lists(st.floats(0, 2), min_size=len(LADDER) - 1, max_size=len(LADDER) - 1).map(lambda found: [0.0, *found])


def rate(tolerance: Any = 0.5, budget: Any = 1.0, macs_S: int = 50) -> KeepRate:
    """On 100 patches, of a teacher that needs 1 multiply-add a patch and 2 for the class token."""
    return KeepRate(100, lambda count: count + 2, macs_S, tolerance, budget)


@given(turned=TURNED, distance=KL)
def test_without_tolerance_all_is_kept_and_with_infinite_tolerance_the_least(turned: list[float], distance: float) -> None:
    strict, lenient = rate(tolerance=0.0), rate(tolerance=math.inf)
    strict.choose(turned, distance, 1, 2)
    lenient.choose(turned, distance, 1, 2)
    assert strict.kept == 100
    assert lenient.kept == 15


@given(turned=TURNED, distance=KL, tolerances=st.tuples(st.floats(0, 10), st.floats(0, 10)), budget=st.floats(0.2, 1))
def test_more_tolerance_never_keeps_more(turned: list[float], distance: float, tolerances: tuple[float, float], budget: float) -> None:
    strict, lenient = (rate(tolerance, budget) for tolerance in sorted(tolerances))
    strict.choose(turned, distance, 1, 2)
    lenient.choose(turned, distance, 1, 2)
    assert lenient.kept <= strict.kept


@given(turned=TURNED, distance=KL, tolerance=st.floats(0, 10))
def test_what_is_kept_is_within_the_tolerance_and_nothing_smaller_is(turned: list[float], distance: float, tolerance: float) -> None:
    one = rate(tolerance)
    one.choose(turned, distance, 1, 2)
    assert one.rung == 0 or turned[one.rung] < tolerance
    assert all(each >= tolerance for each in turned[one.rung + 1 :])


@given(data=st.data(), budget=st.floats(0.17, 1), tolerance=st.floats(0, 3), steps=st.integers(1, 300))
def test_the_budget_is_respected_and_used_up_to_a_rung_where_the_tolerance_wants_more(
    data: st.DataObject, budget: float, tolerance: float, steps: int
) -> None:
    one = rate(tolerance, budget, macs_S=10**6)
    for step in range(1, steps + 1):
        if one.due(step, steps, batch=64):
            one.choose(data.draw(TURNED), data.draw(KL), step, steps)
    assert one.spent / steps <= budget + 1e-6


@given(steps=st.integers(1, 3000), batch=st.integers(1, 256), macs_S=st.integers(1, 500))
def test_looking_costs_what_it_may(steps: int, batch: int, macs_S: int) -> None:
    one = rate(macs_S=macs_S)
    looks = [step for step in range(1, steps + 1) if one.due(step, steps, batch)]
    assert len(looks) <= LOOKS
    look = PROBES * (macs_S + sum(count + 2 for count in one.counts))
    cheapest = steps * batch * (3 * macs_S + one.counts[-1] + 2)
    assert len(looks) * look <= OVERHEAD * cheapest + 1e-6


def test_it_looks_more_often_at_the_beginning() -> None:
    one = rate(macs_S=10**6)
    looks = [step for step in range(1, 442) if one.due(step, 441, 64)]
    assert looks == [number**2 for number in range(1, 21)]


def test_so_short_a_training_that_no_look_is_paid_for_stays_as_it_began_and_says_so() -> None:
    one = rate(macs_S=1)
    assert not any(one.due(step, 3, 64) for step in range(1, 4))
    assert one.kept == 100
    assert one.news() == "keep 1, to the end: so short a training does not pay for finding another"
    assert one.news() == ""


def test_a_single_look_is_at_a_quarter() -> None:
    one = rate(macs_S=10**6)
    one.looks = 1
    assert [step for step in range(1, 101) if one.due(step, 100, 64)] == [25]


def test_it_says_why_and_once() -> None:
    one = rate()
    assert one.news() == ""
    one.choose([0, 0.1, 0.2, 0.6, 0.9, 2.0], 1.0, 1, 2)
    assert one.news() == (
        "keep 1 -> 0.5: that turns the teacher's pull by 0.20, 0.35 would by 0.60; the tolerance is 0.5; the student's distance from the "
        "teacher 1"
    )
    assert one.news() == ""
    one.choose([0, 0.1, 0.2, 0.6, 0.9, 2.0], 1.0, 1, 2)
    assert one.news() == "", "nothing changed"
    poor = rate(budget=0.5)
    assert poor.kept == 35, "half the patches need 52 of 102 multiply-adds"
    poor.spent = 0.1
    poor.choose([0, 0.1, 0.2, 0.6, 0.9, 2.0], 1.0, 1, 2)
    assert poor.news().startswith("keep 0.35 -> 0.5: that turns the teacher's pull by 0.20, 0.35 would by 0.60; the tolerance")
    poor.spent = 0.9
    poor.choose([0, 0.1, 0.2, 0.6, 0.9, 2.0], 1.0, 1, 2)
    assert poor.news().endswith("pull by 2.00; more than 15 patches would exceed the budget of 0.5")


def test_it_goes_on_from_its_state() -> None:
    one, other = rate(macs_S=10**6), rate(macs_S=10**6)
    for step in range(1, 50):
        if one.due(step, 100, 64):
            one.choose([0, 0.1, 0.2, 0.6, 0.9, 2.0 / step], 1.0, step, 100)
    other.restore(one.state())
    assert other.state() == one.state()
    assert [other.due(step, 100, 64) for step in range(50, 101)] == [one.due(step, 100, 64) for step in range(50, 101)]


@pytest.mark.parametrize(
    "setting", [{"tolerance": -1.0}, {"tolerance": math.nan}, {"tolerance": "all"}, {"budget": 0.1}, {"budget": 1.1}], ids=str
)
def test_bad_settings_get_one_sentence(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=f"{name} is {value}, expected") as refusal:
        rate(**setting)
    assert "\n" not in str(refusal.value)
