"""Numbers computed by the paper's own code; mgd.json says how. None of that code is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.distillers.classics import mgd
from stillhouse.losses.maps import squared_distance
from tests.parity.waves import check, fill, gradients, maps

OFFICIAL = json.loads(Path(__file__).with_name("mgd.json").read_text())["rows"]


def drawn(batch: int, places: int, device: torch.device) -> Tensor:
    """What the official code was given for random numbers."""
    return ((torch.arange(batch * places, dtype=torch.float64) + 0.5) * 0.6180339887498949 % 1).view(batch, places)


@pytest.mark.parametrize("official", OFFICIAL, ids=lambda row: str(row["masked"]))
def test_mask_block_loss_and_gradient_are_the_official_ones(official: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mgd, "random_scores", drawn)
    student, teacher = maps()
    block = fill(mgd.generation(6))
    (shown,) = mgd.visible([teacher], official["masked"])
    check(squared_distance(block(student * shown), teacher), student, official)
    assert gradients(block) == pytest.approx(official["weights"], rel=1e-5)
