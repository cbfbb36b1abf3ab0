"""Who runs when, how measurements are paired, and that the peak is this call's own: properties, never speeds."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.errors import UserError
from stillhouse.measure.timing import interleaved, peak_memory, ratio, spread

positive = st.floats(0.01, 100)


def test_each_round_runs_all_in_rotated_order() -> None:
    calls: list[str] = []
    seconds = interleaved({name: (lambda name=name: calls.append(name)) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_warmup_is_not_measured_and_no_round_is_refused() -> None:
    calls: list[int] = []
    assert len(interleaved({"a": lambda: calls.append(0)}, rounds=2, warmup=3)["a"]) == 2
    assert len(calls) == 5
    with pytest.raises(UserError, match="rounds"):
        interleaved({"a": list}, rounds=0)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20), st.floats(0.1, 10))
def test_a_ratio_is_paired_by_round(pairs: list[tuple[float, float]], factor: float) -> None:
    b, slow = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    paired = ratio([x * s * factor for x, s in zip(b, slow, strict=True)], [x * s for x, s in zip(b, slow, strict=True)])
    assert tuple(paired) == pytest.approx((factor, factor, factor))


@given(st.lists(positive, min_size=1, max_size=20))
def test_spread_is_ordered_and_inside(values: list[float]) -> None:
    median, low, high = spread(values)
    assert min(values) <= low <= median <= high <= max(values)


def test_spread_of_known_values() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)
    assert ratio([2.0], [4.0]) == (0.5, 0.5, 0.5)


def test_unpaired_measurements_are_refused() -> None:
    with pytest.raises(UserError, match="got 2 and 1"):
        ratio([1.0, 2.0], [1.0])
    with pytest.raises(UserError):
        ratio([], [])


@pytest.mark.skipif(not (sys.platform.startswith("linux") or torch.cuda.is_available()), reason="only Linux lets a process reset its peak")
def test_peak_is_this_calls_own() -> None:
    def uses(mebibytes: int) -> float:
        return peak_memory(lambda: torch.ones(mebibytes * 2**18).sum()).bytes / 2**20

    uses(8)  # what torch sets up at its first call is not the call's own
    for mebibytes in (96, 24, 96):  # the small one after the large one: an old peak would show
        assert uses(mebibytes) == pytest.approx(mebibytes, abs=12)
