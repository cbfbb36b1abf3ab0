"""Numbers computed by the paper's own code; dmae.json says how. None of that code is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from stillhouse.distillers.pretraining.dmae import DMAE
from stillhouse.models.mae import finished, through
from tests.parity.waves import fill, gradients, wave

OFFICIAL = json.loads(Path(__file__).with_name("dmae.json").read_text())
PROJECTIONS = {"fc-1layer": "linear", "mlp-1layer": "mlp", "none": "none"}


def vit(width: int, depth: int, heads: int, **options: Any) -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 2, "num_classes": 0, "embed_dim": width, "depth": depth, "num_heads": heads}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **options)


def noise(rows: int, columns: int, device: torch.device) -> Tensor:
    return wave(rows, columns, by=1.7, start=0.3)


@pytest.mark.parametrize("official", OFFICIAL["rows"], ids=lambda row: f"{row['projection']}-{row['distance']}")
def test_dmae(official: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.masks.patches.uniform", noise)
    projection = PROJECTIONS[official["projection"]]
    distiller = DMAE(
        vit(16, 4, 2),
        vit(16 if projection == "none" else 24, 3, 4),
        student_blocks="+".join(map(str, official["student"])),
        teacher_blocks="+".join(map(str, official["teacher"])),
        distance=official["distance"].lower(),
        projection=projection,  # type: ignore[arg-type]
        norm_pixels=official["norm_pixels"],
        **{"decoder_width": 12, "decoder_depth": 2, "decoder_heads": 3},
    ).double()
    for start, network in ((0, distiller.student), (100, distiller.decoder), (200, distiller.projection), (300, distiller.teacher)):
        fill(network, start)
    images = 2 * wave(3, 3, 8, 8, by=0.37)
    terms = distiller((images, None))
    assert float(terms["pixels"].detach()) == pytest.approx(official["pixels"], rel=1e-5)
    assert float(terms["features"].detach()) == pytest.approx(official["features"], rel=1e-5)

    keep = torch.tensor(official["keep"])
    assert torch.equal(keep, noise(3, 16, keep.device).argsort(1)[:, :4])
    *_, last = through(distiller.student, images, keep)
    restore = noise(3, 16, keep.device).argsort(1).argsort(1)
    painted = distiller.decoder.pixels(distiller.decoder(finished(distiller.student, last), restore)).detach()
    assert float(painted.abs().sum()) == pytest.approx(official["painted"], rel=1e-6)
    assert float((painted * wave(*painted.shape, by=0.11)).sum()) == pytest.approx(official["painted_wave"], abs=1e-6 * official["painted"])

    for term in ("pixels", "features"):
        distiller.zero_grad()
        terms[term].backward(retain_graph=True)
        found = {"encoder": gradients(distiller.student), "decoder": gradients(distiller.decoder)}
        found["projection"] = gradients(distiller.projection)
        assert {name: value for name, value in found.items() if value} == pytest.approx(official[f"grad_{term}"], rel=1e-4)
