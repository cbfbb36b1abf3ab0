"""Numbers computed by the paper's own code; dmjd.json says how. None of that code is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.losses.gradients import edges_of_patches, oriented_gradients
from tests.parity.waves import wave

OFFICIAL = json.loads(Path(__file__).with_name("dmjd.json").read_text())


@pytest.mark.parametrize("official", OFFICIAL["rows"], ids=lambda row: f"cells of {row['cell']}")
def test_oriented_gradients(official: dict[str, Any]) -> None:
    images = (127.5 * (1 + wave(2, 3, 16, 24, by=official["by"]))).float()
    found = oriented_gradients(images, official["cell"]).double()
    assert found[0, 0, 0, 0].tolist() == pytest.approx(official["first"], abs=1e-4)
    laid = found.permute(0, 3, 1, 2, 4)  # as the official code has it
    assert list(laid.shape) == official["shape"]
    assert float(laid.sum()) == pytest.approx(official["sum"], rel=1e-5)
    assert float((laid * wave(*laid.shape, by=0.11)).sum()) == pytest.approx(official["wave"], abs=1e-5 * official["sum"])

    rows, columns = 16 // official["cell"], 24 // official["cell"]
    cells = edges_of_patches(images, (rows, columns), official["cell"]).double()
    white = cells.view(2, rows, columns, 3, 9).permute(0, 3, 1, 2, 4)
    assert float(white.abs().sum()) == pytest.approx(official["white_abs"], rel=1e-5)
    expected = pytest.approx(official["white_wave"], abs=1e-5 * official["white_abs"])
    assert float((white * wave(*white.shape, by=0.11)).sum()) == expected
