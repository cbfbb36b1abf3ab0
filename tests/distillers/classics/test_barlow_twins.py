"""Barlow Twins: an encoder from images alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillhouse.distillers.classics.barlow_twins import BarlowTwins
from stillhouse.errors import UserError
from stillhouse.losses.correlation import redundancy
from stillhouse.randomness import samples
from tests.conftest import images, labels, tiny_cnn

BATCH = images(6), labels(6)
PLAIN = {"crop": 1.0, "flip": 0.0, "jitter": 0.0}


def made(**settings: Any) -> BarlowTwins:
    distiller = BarlowTwins(tiny_cnn(), **{"width": 8} | settings).train()
    distiller.prepare([BATCH])
    return distiller


def test_with_nothing_drawn_both_views_are_the_image() -> None:
    for view in made(**PLAIN).views(BATCH[0]):
        torch.testing.assert_close(view, BATCH[0], rtol=1e-4, atol=1e-4)


def test_flips_are_left_to_right() -> None:
    for view in made(**PLAIN | {"flip": 1.0}).views(BATCH[0]):
        torch.testing.assert_close(view, BATCH[0].flip(-1), rtol=1e-4, atol=1e-4)


def test_a_crop_shows_a_part_enlarged() -> None:
    """Of a ramp from -1 to 1: as much of it as the side of the crop, somewhere within it."""
    ramp = torch.linspace(-1, 1, 32).expand(64, 3, 32, 32)
    (first, second) = made(**PLAIN | {"crop": 0.25}).views(ramp)
    assert not torch.equal(first, second)
    spans = first[:, 0, 0, -1] - first[:, 0, 0, 0]
    assert first.min() >= -1 - 1e-5
    assert first.max() <= 1 + 1e-5
    assert 0.9 < spans.min() < spans.max() < 2
    torch.testing.assert_close(first[:, 0, 0], first[:, 1, 17], msg="rows and channels are alike in the ramp")


def test_jitter_changes_contrast_and_brightness_within_its_bounds() -> None:
    (view, _) = made(**PLAIN | {"jitter": 0.4}).views(BATCH[0])
    before, after = (each.flatten(1) for each in (BATCH[0], view))
    assert ((after.mean(1) - before.mean(1)).abs() <= 0.4 + 1e-5).all()
    ratio = after.std(1) / before.std(1)
    assert ((ratio > 0.6 - 1e-4) & (ratio < 1.4 + 1e-4)).all()
    assert ratio.std() > 0.01


def test_what_is_drawn_is_the_samples_own_in_any_split_of_a_batch() -> None:
    distiller, ids = made(), torch.arange(6)
    with samples(0, 3, ids):
        whole = distiller.views(BATCH[0])
    with samples(0, 3, ids[4:]):
        part = distiller.views(BATCH[0][4:])
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(one[4:], other)
    with samples(0, 4, ids):
        assert not torch.equal(distiller.views(BATCH[0])[0], whole[0])


def test_the_loss_is_of_the_projected_views() -> None:
    distiller = made(weight=0.1)
    ids = torch.arange(6)
    with samples(0, 0, ids):
        term = distiller(BATCH)["barlow"]
    with samples(0, 0, ids):
        first, second = (distiller.projector(distiller.student(view)) for view in distiller.views(BATCH[0]))
    assert first.shape == (6, 8)
    torch.testing.assert_close(term, redundancy(first, second, 0.1))


def test_its_projector_is_three_layers_and_is_not_kept() -> None:
    distiller = made()
    assert [layer.out_features for layer in distiller.projector if isinstance(layer, torch.nn.Linear)] == [8, 8, 8]
    assert distiller.product is distiller.student
    distiller(BATCH)["barlow"].backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight is -1.0"),
        ({"width": 1}, "width 1"),
        ({"crop": 0.0}, "crop is 0.0"),
        ({"flip": 1.5}, "flip 1.5"),
        ({"jitter": 1.0}, "jitter 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(**settings)
