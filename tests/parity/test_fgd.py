"""Numbers computed by the paper's own code; fgd.json says how. None of that code is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.distillers.dense.fgd import Context
from stillhouse.losses.maps import focal_distances, squared_distance
from tests.parity.waves import check, fill, gradients, maps

OFFICIAL = json.loads(Path(__file__).with_name("fgd.json").read_text())["rows"]
ROWS = pytest.mark.parametrize("official", OFFICIAL, ids=lambda row: f"{[len(each) for each in row['boxes']]}-{row['temperature']}")


@ROWS
@pytest.mark.parametrize("number", range(3), ids=["foreground", "background", "attention"])
def test_the_focal_terms(official: dict[str, Any], number: int) -> None:
    student, teacher = maps()
    boxes = [torch.tensor(each).view(-1, 4) for each in official["boxes"]]
    terms = focal_distances(student, teacher, boxes, (40, 56), official["temperature"])
    check(terms[number], student, official[("foreground", "background", "attention")[number]])


@ROWS
def test_the_global_term(official: dict[str, Any]) -> None:
    student, teacher = maps()
    in_S, in_T = Context(6), Context(6)
    # the official parameters by name: channel_add_conv_s (6), channel_add_conv_t (6), conv_mask_s (2), conv_mask_t (2)
    for block, transform, attend in ((in_S, 0, 12), (in_T, 6, 14)):
        fill(block.transform, transform)
        fill(block.attend, attend)
    check(squared_distance(in_S(student), in_T(teacher)), student, official["relation"])
    assert gradients(in_S, in_T) == pytest.approx(official["relation"]["weights"], rel=1e-5)
