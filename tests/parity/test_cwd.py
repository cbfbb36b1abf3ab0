"""Numbers computed by the paper's own code and by the detection code it points to; cwd.json says how. None of that code is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.losses.maps import channel_divergence
from tests.parity.waves import check, maps

OFFICIAL = json.loads(Path(__file__).with_name("cwd.json").read_text())["rows"]


@pytest.mark.parametrize("official", OFFICIAL, ids=lambda row: f"{row['code']}-{row['temperature']}")
def test_loss_and_gradient_are_the_official_ones(official: dict[str, Any]) -> None:
    student, teacher = maps()
    check(channel_divergence(student, teacher, official["temperature"]), student, official)
