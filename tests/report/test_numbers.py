from __future__ import annotations

import math

import pytest

from stillhouse.report.numbers import DASH, change, duration, milliseconds, percent, plain, points, si

S = "\N{NARROW NO-BREAK SPACE}"


@pytest.mark.parametrize("write", [percent, si, milliseconds, duration, plain])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_not_known_is_a_dash(write, value) -> None:  # type: ignore[no-untyped-def]
    assert write(value) == DASH


def test_numbers_as_people_write_them() -> None:
    assert percent(0.921) == f"92.1{S}%"
    assert [points(0.03), points(-0.012), points(-0.0001)] == ["+3.0", "\N{MINUS SIGN}1.2", "+0.0"]
    assert [si(4.599e9), si(5_717_416), si(87_514), si(999_900), si(640)] == [f"4.60{S}G", f"5.72{S}M", f"87.5{S}k", f"1.00{S}M", "640"]
    assert [duration(83.4), duration(3661), duration(0.25)] == [f"1{S}min 23{S}s", f"1{S}h 1{S}min", f"0.2{S}s"]
    assert change(100, 52) == f"\N{MINUS SIGN}48{S}%"
    assert milliseconds(201.3) == f"201{S}ms"
