"""Soft masks over places and channels: the checks of the ACAM-KD card, on the masks alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.losses.masked import dice, masked_square
from stillhouse.masks.features import SelectionUnits, channel_masks, correlation, opposed, spatial_masks

BALANCED = pytest.mark.parametrize("balanced", [False, True])
shapes = st.tuples(st.integers(1, 3), st.integers(2, 12), st.integers(2, 9))


@settings(deadline=None)
@given(shapes, st.integers(1, 5), st.integers(0, 2**31))
def test_the_formulas(shape: tuple[int, int, int], count: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    feature = torch.randn(shape, generator=random)
    m_s, m_c = torch.randn(count, shape[2], generator=random), torch.randn(count, 1, generator=random)
    spatial, channel = spatial_masks(feature, m_s), channel_masks(feature, m_c)
    F, (s, c) = feature.double(), (m_s.double(), m_c.double())
    assert spatial.shape == (shape[0], count, shape[1])
    assert channel.shape == (shape[0], count, shape[2])
    torch.testing.assert_close(spatial.double(), torch.sigmoid(torch.einsum("mc,bnc->bmn", s, F)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(channel.double(), torch.sigmoid(torch.einsum("mo,bc->bmc", c, F.mean(1))), rtol=1e-5, atol=1e-5)
    for masks in (spatial, channel):
        assert ((masks > 0) & (masks < 1)).all()


def test_units_of_zero_make_masks_of_one_half() -> None:
    feature, squares = torch.randn(2, 10, 4), torch.rand(2, 10, 4)
    spatial, channel = spatial_masks(feature, torch.zeros(3, 4)), channel_masks(feature, torch.zeros(3, 1))
    assert (spatial == 0.5).all()
    assert (channel == 0.5).all()
    for masks, energy in ((spatial, squares.mean(2)), (channel, squares.mean(1))):
        torch.testing.assert_close(masked_square(energy, masks, "b"), squares.mean() / 2)
        assert dice(masks).item() == pytest.approx(1)


@BALANCED
def test_a_constant_feature_makes_constant_spatial_masks(balanced: bool) -> None:
    masks = spatial_masks(torch.randn(2, 1, 6).expand(2, 9, 6), torch.randn(3, 6), balanced=balanced)
    torch.testing.assert_close(masks, masks[..., :1].expand(-1, -1, 9), rtol=0, atol=1e-4)


@BALANCED
@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_the_order_of_places(balanced: bool, seed: int) -> None:
    torch.manual_seed(seed)
    feature, order, m_s, m_c = torch.randn(2, 9, 4), torch.randperm(9), torch.randn(3, 4), torch.randn(3, 1)
    moved = spatial_masks(feature[:, order], m_s, balanced=balanced)
    torch.testing.assert_close(moved, spatial_masks(feature, m_s, balanced=balanced)[..., order], rtol=1e-4, atol=1e-4)
    kept = channel_masks(feature, m_c, balanced=balanced)
    torch.testing.assert_close(channel_masks(feature[:, order], m_c, balanced=balanced), kept, rtol=1e-4, atol=1e-4)


@BALANCED
def test_channel_masks_have_rank_one_before_the_sigmoid(balanced: bool) -> None:
    logits = channel_masks(torch.randn(3, 7, 5), torch.randn(4, 1), balanced=balanced).double().logit()
    values = torch.linalg.svdvals(logits)
    assert (values[:, 1:] < 1e-5 * values[:, :1]).all()


@settings(deadline=None)
@given(shapes, st.floats(-3, 3), st.floats(0.5, 100))
def test_balanced_masks_do_not_mind_scale_and_offset_of_the_feature(shape: tuple[int, int, int], offset: float, scale: float) -> None:
    torch.manual_seed(0)
    feature, m_s, m_c = torch.randn(shape), torch.randn(3, shape[2]), torch.randn(3, 1)
    moved = scale * (feature + offset)
    close = {"rtol": 0, "atol": 2e-3}
    torch.testing.assert_close(spatial_masks(moved, m_s, balanced=True), spatial_masks(feature, m_s, balanced=True), **close)
    torch.testing.assert_close(channel_masks(moved, m_c, balanced=True), channel_masks(feature, m_c, balanced=True), **close)


def test_balanced_spatial_masks_can_neither_vanish_nor_fill_up() -> None:
    """Whatever the units: trained to be as small as they can, plain masks close and balanced ones stay."""
    feature, means = torch.randn(1, 100, 4) + 1, {}
    for balanced in (False, True):
        units = torch.nn.Parameter(0.01 * torch.randn(3, 4))
        optimizer = torch.optim.Adam([units], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            spatial_masks(feature, units, balanced=balanced).square().mean().backward()
            optimizer.step()
        means[balanced] = spatial_masks(feature, units, balanced=balanced).mean(2)
    assert (means[False] < 0.2).all()
    assert ((means[True] > 0.4) & (means[True] < 0.6)).all()


def test_opposed_is_the_same_mask_with_the_gradient_turned() -> None:
    masks, weight = torch.rand(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    assert torch.equal(opposed(masks), masks)
    (gradient,) = torch.autograd.grad((opposed(masks) * weight).sum(), masks)
    assert torch.equal(gradient, -weight)


@settings(deadline=None)
@given(st.integers(3, 20), st.integers(0, 2**31))
def test_correlation_is_pearsons(places: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(3, places, generator=random) for _ in range(2))
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(first.double().numpy(), second.double().numpy(), strict=True)])
    assert correlation(first, second).item() == pytest.approx(expected, abs=1e-4)


def test_correlation_at_its_ends() -> None:
    line = torch.arange(5.0)[None]
    assert correlation(line, 3 * line + 7).item() == pytest.approx(1, abs=1e-5)
    assert correlation(line, -line).item() == pytest.approx(-1, abs=1e-5)
    assert correlation(line, torch.full((1, 5), 0.1)).item() == 0
    assert correlation(line[:, :1], line[:, 1:2]).item() == 0, "one place alone, as on a detector's coarsest level"


@BALANCED
def test_fp32_whatever_comes_in(balanced: bool) -> None:
    feature, m_s, m_c = torch.randn(2, 9, 4).bfloat16(), torch.randn(3, 4), torch.randn(3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        masks = spatial_masks(feature, m_s, balanced=balanced), channel_masks(feature, m_c, balanced=balanced)
    exact = spatial_masks(feature.float(), m_s, balanced=balanced), channel_masks(feature.float(), m_c, balanced=balanced)
    for ours, theirs in zip(masks, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_units_start_near_one_half() -> None:
    units = SelectionUnits(64, 6)
    assert {name: tuple(value.shape) for name, value in units.named_parameters()} == {"spatial": (6, 64), "channel": (6, 1)}
    masks = units(torch.randn(2, 50, 64))
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {"channel": (2, 6, 64), "spatial": (2, 6, 50)}
    assert all((mask - 0.5).abs().max() < 0.2 for mask in masks.values())


@pytest.mark.parametrize("part", ["spatial", "channel"])
def test_parts(part: Any) -> None:
    units = SelectionUnits(8, 2, parts=part)
    assert set(units(torch.randn(1, 5, 8))) == {part} == set(dict(units.named_parameters()))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"units": 0}, "^units is 0, expected the number"), ({"units": 3, "parts": "all"}, "^parts is 'all', expected")],
)
def test_bad_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        SelectionUnits(8, **settings)


def test_compiled_they_are_the_same() -> None:
    units, feature = SelectionUnits(8, 3, balanced=True), torch.randn(2, 9, 8)
    compiled: Tensor = torch.compile(units, backend="eager", fullgraph=True)(feature)
    assert all(torch.equal(compiled[name], mask) for name, mask in units(feature).items())
