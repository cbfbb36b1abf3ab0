"""Numbers computed by the paper's own code; krr_st.json says how. None of that code is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.losses.ridge import ridge_distance
from tests.parity.waves import wave

OFFICIAL = json.loads(Path(__file__).with_name("krr_st.json").read_text())["rows"]


@pytest.mark.parametrize("official", OFFICIAL, ids=lambda row: f"{row['pairs']} pairs, {row['features']} features")
def test_the_outer_loss(official: dict[str, Any]) -> None:
    pairs, batch, pixels, width, outputs = (official[name] for name in ("pairs", "batch", "pixels", "features", "outputs"))
    into, says = 0.5 * wave(pixels, width, by=0.7, start=2.0), wave(pixels, outputs, by=0.41, start=0.5)
    learnt = {"images": wave(pairs, pixels, by=0.37), "targets": 2 * wave(pairs, outputs, by=0.29, start=1.0)}
    for tensor in learnt.values():
        tensor.requires_grad_()
    real = wave(batch, pixels, by=0.23, start=0.3)
    loss = ridge_distance((learnt["images"] @ into).tanh(), learnt["targets"], (real @ into).tanh(), (real @ says).sin())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(official["loss"], rel=1e-6)
    for name, tensor in learnt.items():
        gradient = tensor.grad
        assert gradient is not None
        assert float(gradient.abs().sum()) == pytest.approx(official[name], rel=1e-6)
        assert float((gradient * wave(*tensor.shape, by=0.11)).sum()) == pytest.approx(official[f"{name}_wave"], abs=1e-6 * official[name])
