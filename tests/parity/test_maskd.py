"""Numbers computed by the paper's own code for detectors and for segmenters; maskd.json says how. None of that code is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from stillhouse.losses.maps import token_distance
from stillhouse.losses.masked import dice
from stillhouse.masks.receptive import ReceptiveTokens
from tests.parity.waves import SHAPE, check, fill, gradients, maps, wave

OFFICIAL = json.loads(Path(__file__).with_name("maskd.json").read_text())


def tokens(code: str) -> Any:
    return fill(ReceptiveTokens(6, 3, weighted=code == "detection"))


@pytest.mark.parametrize("official", OFFICIAL["first"], ids=lambda row: row["code"])
def test_the_first_stage(official: dict[str, Any]) -> None:
    teacher, learning = maps()[1], tokens(official["code"])
    masked, masks = learning(teacher)
    overlap = dice(masks.flatten(2))
    assert float(overlap.detach()) == pytest.approx(official["dice"], rel=1e-5)
    assert float(masked.detach().abs().sum()) == pytest.approx(official["masked"], rel=1e-5)
    assert float((masked.detach() * wave(*SHAPE, by=0.11)).sum()) == pytest.approx(official["masked_wave"], abs=1e-5 * official["masked"])
    (overlap + (masked * wave(*SHAPE, by=0.05)).sum()).backward()
    assert float(learning.tokens.grad.abs().sum()) == pytest.approx(official["tokens"], rel=1e-5)
    assert gradients(learning) - float(learning.tokens.grad.abs().sum()) == pytest.approx(official["weights"], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("official", OFFICIAL["second"], ids=lambda row: f"{row['code']}-{row['own']}")
def test_the_second_stage(official: dict[str, Any]) -> None:
    (student, teacher), learned = maps(), tokens(official["code"]).requires_grad_(False)
    masks: Tensor = learned.masks(teacher)
    if official["own"]:
        masks = masks * learned.masks(student.detach())
    half = 0.5 if official["code"] == "segmentation" else 1.0  # the official weight is within its loss
    check(half * token_distance(student, teacher, masks, learned.weights(teacher)), student, official)
