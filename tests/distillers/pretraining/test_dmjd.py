"""DMJD against its formula: two views that leave nothing out, two heads, two losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.distillers.pretraining.dmjd import DMJD
from stillhouse.errors import UserError
from stillhouse.losses.gradients import edges_of_patches
from stillhouse.masks.patches import disjoint_maskings
from stillhouse.models.mae import encode
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.randomness import samples
from tests.conftest import images, tiny

SMALL: dict[str, Any] = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
BATCH = images(3), None
MEAN, STD = (0.2, 0.3, 0.4), (0.5, 0.25, 0.2)


def made(**settings: Any) -> DMJD:
    torch.manual_seed(5)
    student = tiny(seed=1, num_classes=0)
    set_preprocessing(student, Preprocessing(MEAN, STD, 32))
    return DMJD(student, **{**SMALL, **settings}).train()


def terms_of(distiller: DMJD) -> dict[str, Tensor]:
    with samples(0, 3, torch.arange(3)):
        return distiller(BATCH)


@pytest.mark.parametrize("block", [1, 2])
def test_the_formula(block: int) -> None:
    distiller = made(theta=0.5, block=block)
    pixels = 255 * (BATCH[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
    target = edges_of_patches(pixels, (4, 4), 4).double()
    with samples(0, 3, torch.arange(3)):
        views = disjoint_maskings(3, (4, 4), 0.6, torch.device("cpu"), block=block)
    hidden, visible = [], []
    for view in views:
        latent = encode(distiller.student, BATCH[0], view.keep)
        said = distiller.of_hidden(distiller.decoder(latent, view.restore)[:, 1:]).double()
        hidden += [((said - target) ** 2)[view.mask.bool()].mean()]
        apart = (distiller.of_visible(latent[:, 1:]).double() - torch.stack([t[k] for t, k in zip(target, view.keep, strict=True)])).abs()
        visible += [torch.where(apart < 2, apart**2 / 4, apart - 1).mean()]
    terms = terms_of(distiller)
    assert terms["hidden"].item() == pytest.approx(torch.stack(hidden).mean().item(), rel=1e-5)
    assert terms["visible"].item() == pytest.approx(0.5 * torch.stack(visible).mean().item(), rel=1e-5)


def test_each_head_learns_from_its_own_patches() -> None:
    distiller = made()
    for term, own, other in (("hidden", distiller.of_hidden, distiller.of_visible), ("visible", distiller.of_visible, distiller.of_hidden)):
        distiller.zero_grad()
        terms_of(distiller)[term].backward()
        assert any(parameter.grad.any() for parameter in own.parameters())
        assert all(parameter.grad is None for parameter in other.parameters())
        decoder = [parameter.grad for parameter in distiller.decoder.parameters() if parameter.grad is not None]
        assert bool(decoder) == (term == "hidden")


def test_without_theta_the_visible_head_does_not_learn() -> None:
    distiller = made(theta=0.0)
    sum(terms_of(distiller).values()).backward()
    assert not any(parameter.grad.any() for parameter in distiller.of_visible.parameters())


def test_a_visible_patch_is_asked_about_itself() -> None:
    """A head that sees through pays nothing, whatever the order of the shuffle."""
    distiller = made()
    target = torch.randn(3, 16, 3 * 4 * 9)
    with samples(0, 3, torch.arange(3)):
        view = distiller.views(3, torch.device("cpu"))[0]
    right = torch.stack([t[k] for t, k in zip(target, view.keep, strict=True)])
    distiller.of_visible = torch.nn.Identity()
    distiller.of_visible.forward = lambda tokens: right
    assert distiller.view(BATCH[0], target, view)[1] == 0


def test_the_size_of_a_target() -> None:
    assert made().of_hidden[-1].out_features == 2 * 2 * 3 * 9
    assert made(cell=8).of_visible[-1].out_features == 3 * 9
    assert made(cell=1).of_visible[-1].out_features == 64 * 3 * 9


def test_what_was_shown_is_drawn() -> None:
    shown = made(masked=0.5).look(BATCH)["visible"]
    assert torch.equal(shown.sum((1, 2)), torch.full((3,), 8.0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"theta": -1.0}, "^theta is -1.0, expected the weight of the visible patches"),
        ({"cell": 3}, "^cell is 3, expected the side of a square of which a patch of 8 x 8 pixels has a whole number$"),
        ({"cell": 0}, "^cell is 0, expected"),
        ({"block": 3}, "^a grid of 4 x 4 patches does not divide into blocks of 3 x 3"),
        ({"masked": 0.99}, "^masked=0.99 does not leave both"),
        ({"predicted": 0.2}, "^predicted is 0.2, expected a share of the patches from masked=0.6 to 1$"),
    ],
)
def test_bad_input(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(**settings)
