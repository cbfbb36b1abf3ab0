"""Masked autoencoding: only hidden patches count, and what is kept is an encoder, and encoder and decoder together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillhouse.distillers.classics.mae import MAE
from stillhouse.errors import UserError
from stillhouse.losses.pretraining import normalised_pixels, patchify
from stillhouse.masks.patches import random_masking
from stillhouse.models.mae import MaskedAutoencoder
from stillhouse.randomness import samples
from tests.conftest import images, tiny, tiny_cnn

SMALL: dict[str, Any] = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
BATCH = images(3), None


def mae(seed: int = 1, **settings: Any) -> MAE:
    torch.manual_seed(5)
    return MAE(tiny(seed=seed, num_classes=0), **{**SMALL, **settings}).train()


@pytest.mark.parametrize("normalised", [True, False])
def test_the_formula(normalised: bool) -> None:
    distiller = mae(norm_pixels=normalised)
    with samples(0, 3, torch.arange(3)):
        term = distiller(BATCH)["pixels"]
        drawn = random_masking(3, 16, 0.75, torch.device("cpu"))
    whole = distiller.products["autoencoder"]
    assert isinstance(whole, MaskedAutoencoder)
    painted, target = whole.paint(BATCH[0], drawn.keep, drawn.restore), patchify(BATCH[0], (4, 4))
    target = normalised_pixels(target) if normalised else target
    hidden = drawn.mask.bool()
    assert hidden.sum() == 3 * 12
    torch.testing.assert_close(term, (painted - target)[hidden].square().mean())


def test_what_is_kept() -> None:
    distiller = mae()
    assert list(distiller.products) == ["student", "autoencoder"]
    assert distiller.products["student"] is distiller.product is distiller.student
    whole = distiller.products["autoencoder"]
    assert whole.encoder is distiller.student
    assert whole.decoder is distiller.decoder
    assert not any(key.startswith("autoencoder") for key in distiller.state_dict()), "nothing is stored twice"


def test_positions_stay() -> None:
    distiller = mae()
    (turn,) = distiller.turns()
    assert not {id(distiller.student.pos_embed)} & {id(parameter) for parameter in turn.parameters}
    distiller(BATCH)["pixels"].backward()
    assert all(parameter.grad is not None for parameter in turn.parameters), "DDP would wait for it"


def test_it_learns_to_paint() -> None:
    distiller = mae()
    plain = torch.zeros(8, 3, 32, 32)
    plain[:4, :, :, ::2] = 1  # stripes one way or the other, to be seen on any patch
    plain[4:, :, ::2] = 1
    optimizer, losses = torch.optim.Adam(distiller.turns()[0].parameters, 3e-3), []
    for step in range(60):
        with samples(0, step, torch.arange(8)):
            loss = distiller((plain, None))["pixels"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def test_what_was_shown_is_drawn() -> None:
    shown = mae(masked=0.5).look(BATCH)["visible"]
    assert shown.shape == (3, 4, 4)
    assert torch.equal(shown.sum((1, 2)), torch.full((3,), 8.0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"masked": 1.0}, r"^masked=1.0 does not leave both"),
        ({"masked": 0.95}, r"^masked=0.95 does not leave both visible and hidden ones of 16 patches"),
        ({"decoder_width": 25}, r"^a decoder of width 25, depth 1 and 2 heads cannot be made"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        mae(**settings)


def test_a_student_that_cannot() -> None:
    with pytest.raises(UserError, match=r"^the student is a ResNet, which cannot be the encoder of a masked autoencoder"):
        MAE(tiny_cnn())
