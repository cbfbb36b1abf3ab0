"""Numbers computed by the paper's own code; g2sd.json says how. None of that code is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from stillhouse.distillers.pretraining.g2sd import G2SD, Generic
from stillhouse.losses.pretraining import normalised_kd
from stillhouse.models.mae import Decoder, MaskedAutoencoder
from tests.parity.test_dmae import noise, vit
from tests.parity.waves import fill, gradients, wave

OFFICIAL = json.loads(Path(__file__).with_name("g2sd.json").read_text())
IMAGES = 2 * wave(3, 3, 8, 8, by=0.37)


@pytest.mark.parametrize("official", OFFICIAL["generic"], ids=lambda row: row["supervise"])
def test_the_generic_stage(official: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.masks.patches.uniform", noise)
    encoder = vit(24, 3, 4)
    teacher = MaskedAutoencoder(encoder, Decoder(encoder, 20, 4, 4))
    settings = {"masked": 0.75, "block": 2, "supervise": official["supervise"], "decoder": (12, 2, 3)}
    distiller = Generic(vit(16, 4, 2), teacher, **settings).double()
    for start, network in ((0, distiller.student), (100, distiller.decoder), (200, distiller.predictor)):
        fill(network, start)
    fill(teacher.encoder, 300)
    fill(teacher.decoder, 400)
    seen: list[Tensor] = []
    distiller.predictor.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    loss = distiller((IMAGES, None))["hidden"]
    assert float(loss.detach()) == pytest.approx(official["loss"], rel=1e-5)
    if official["supervise"] == "all":
        assert seen[0].shape[:2].numel() == official["rows"]
        assert float(seen[0].abs().sum()) == pytest.approx(official["predicted"], rel=1e-6)
    loss.backward()
    found = {"encoder": distiller.student, "decoder": distiller.decoder, "predictor": distiller.predictor}
    assert {name: gradients(module) for name, module in found.items()} == pytest.approx(official["grad"], rel=1e-4)


class Answers(nn.Module):
    """A teacher that always answers the same."""

    num_classes = 5

    def forward(self, images: Tensor) -> Tensor:
        return 3 * wave(3, 5, by=1.3, start=0.5)


def test_the_specific_stage() -> None:
    official = OFFICIAL["specific"]
    sizes = {"img_size": 8, "patch_size": 2, "num_classes": 5, "embed_dim": 16, "depth": 2, "num_heads": 2}
    student = fill(timm.create_model("deit_tiny_distilled_patch16_224", **sizes))
    with torch.no_grad():
        student.pos_embed[:, 1] = 0  # type: ignore[index,operator]
    distiller = G2SD(student, nn.Identity(), Answers()).train()
    terms = distiller((IMAGES, (2 * wave(3, 5, by=0.9)).softmax(-1)))
    assert {name: float(term.detach()) for name, term in terms.items()} == pytest.approx(
        {"ce": official["ce"], "kd": official["kd"]}, rel=1e-5
    )
    sum(terms.values()).backward()
    student.pos_embed.grad = None  # type: ignore[assignment]
    assert gradients(student) == pytest.approx(official["grad"], rel=1e-5)
    torch.testing.assert_close(student.eval()(IMAGES), torch.tensor(official["answer"], dtype=torch.float64))


@pytest.mark.parametrize("official", OFFICIAL["nkd"], ids=["soft labels", "classes"])
def test_nkd(official: dict[str, Any]) -> None:
    labels = (2 * wave(3, 5, by=0.9)).argmax(-1) if official["soft"] else torch.tensor([0, 3, 2])
    student = (2 * wave(3, 5, by=0.61)).requires_grad_()
    loss = sum(normalised_kd(student, 3 * wave(3, 5, by=1.3, start=0.5), labels))
    assert isinstance(loss, Tensor)
    assert float(loss.detach()) == pytest.approx(official["loss"], rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert float(student.grad.abs().sum()) == pytest.approx(official["grad"], rel=1e-5)
