"""Masked differences and Dice against closed forms in float64, and what the readings reward."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.losses.masked import Reading, dice, map_scale, masked_square

READINGS = pytest.mark.parametrize("reading", get_args(Reading))
DEGREES = {"a": 3, "b": 1, "c": 0}
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 12))


def drawn(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Squared differences [B, X] and masks [B, M, X]."""
    random = torch.Generator().manual_seed(seed)
    batch, count, places = shape
    squares, masks = torch.rand(batch, places, generator=random), torch.rand(batch, count, places, generator=random)
    return squares + 0.01, 0.05 + 0.9 * masks


@settings(deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_closed_forms(shape: tuple[int, int, int], seed: int) -> None:
    squares, masks = drawn(shape, seed)
    d, m = squares.double().numpy()[:, None], masks.double().numpy()
    masked = (m**2 * d).sum(-1)
    expected = {"a": masked * m.sum(-1), "b": masked / m.sum(-1), "c": masked / (m**2).sum(-1)}
    for reading, value in expected.items():
        assert masked_square(squares, masks, reading).item() == pytest.approx(value.mean(), rel=1e-5)
    pairs = [
        (2 * (m[:, i] * m[:, j]).sum(-1) / ((m[:, i] ** 2).sum(-1) + (m[:, j] ** 2).sum(-1))).mean()
        for i in range(shape[1])
        for j in range(shape[1])
        if i != j
    ]
    assert dice(masks).item() == pytest.approx(np.mean(pairs) if pairs else 0.0, rel=1e-5, abs=1e-7)


def test_reading_a_is_the_printed_line() -> None:
    """1/M sum_m 1/C sum_p M_p |M * difference|^2, and the same for channels, on a map [C, N] of one image."""
    difference, spatial, channel = torch.randn(3, 7), torch.rand(2, 7), torch.rand(2, 3)
    by_place = sum(m.sum() * (m * difference).square().sum() / 3 for m in spatial) / 2
    by_channel = sum(m.sum() * (m[:, None] * difference).square().sum() / 7 for m in channel) / 2
    squares = difference.square()[None]
    torch.testing.assert_close(masked_square(squares.mean(1), spatial[None], "a"), by_place)
    torch.testing.assert_close(masked_square(squares.mean(2), channel[None], "a"), by_channel)


@settings(deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_masks_of_one_half(shape: tuple[int, int, int], seed: int) -> None:
    squares, masks = drawn(shape, seed)
    half, mean, places = torch.full_like(masks, 0.5), squares.mean().item(), shape[2]
    assert masked_square(squares, half, "b").item() == pytest.approx(mean / 2, rel=1e-5)
    assert masked_square(squares, half, "c").item() == pytest.approx(mean, rel=1e-5)
    assert masked_square(squares, half, "a").item() == pytest.approx(mean * places**2 / 8, rel=1e-5)
    assert dice(half).item() == pytest.approx(1.0 if shape[1] > 1 else 0.0)


@READINGS
@settings(deadline=None)
@given(shapes, st.integers(0, 2**31), st.floats(0.1, 1.0))
def test_what_a_common_scale_of_the_masks_does(reading: Reading, shape: tuple[int, int, int], seed: int, scale: float) -> None:
    squares, masks = drawn(shape, seed)
    expected = scale ** DEGREES[reading] * masked_square(squares, masks, reading).item()
    assert masked_square(squares, scale * masks, reading).item() == pytest.approx(expected, rel=1e-4)
    assert dice(scale * masks).item() == pytest.approx(dice(masks).item(), rel=1e-4)


@READINGS
def test_no_difference_no_loss_and_never_negative(reading: Reading) -> None:
    squares, masks = drawn((2, 3, 9), 0)
    assert masked_square(torch.zeros_like(squares), masks, reading).item() == 0
    assert masked_square(squares, masks, reading).item() > 0


@READINGS
@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_the_order_of_places_and_of_units_does_not_matter(reading: Reading, seed: int) -> None:
    squares, masks = drawn((2, 4, 9), seed)
    places, units = torch.randperm(9), torch.randperm(4)
    torch.testing.assert_close(masked_square(squares[:, places], masks[..., places], reading), masked_square(squares, masks, reading))
    torch.testing.assert_close(masked_square(squares, masks[:, units], reading), masked_square(squares, masks, reading))
    torch.testing.assert_close(dice(masks[:, units][..., places]), dice(masks))


def test_dice_of_disjoint_masks_is_zero_and_of_one_mask_too() -> None:
    assert dice(torch.eye(5)[None]).item() == 0
    alone = torch.rand(2, 1, 5, requires_grad=True)
    value = dice(alone)
    assert value.item() == 0
    value.backward()
    assert not alone.grad.any(), "a gradient there is, so that DDP does not wait for it"


@settings(deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_dice_is_a_share(shape: tuple[int, int, int], seed: int) -> None:
    assert 0 <= dice(drawn(shape, seed)[1]).item() <= 1 + 1e-6


@READINGS
def test_the_mean_of_equal_parts_is_the_whole(reading: Reading) -> None:
    squares, masks = drawn((4, 3, 6), 0)
    parts = [masked_square(squares[i : i + 2], masks[i : i + 2], reading) for i in (0, 2)]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, masked_square(squares, masks, reading))
    torch.testing.assert_close((dice(masks[:2]) + dice(masks[2:])) / 2, dice(masks))


@pytest.mark.parametrize("reading", ["a", "b"])
def test_as_published_smaller_masks_are_a_smaller_loss(reading: Reading) -> None:
    """Why masks vanish when they are trained on it: where the difference is the same everywhere, every mask is too large."""
    masks = torch.full((1, 2, 8), 0.5, requires_grad=True)
    masked_square(torch.ones(1, 8), masks, reading).backward()
    assert (masks.grad > 0).all()


def test_a_weighted_mean_prefers_easy_places_whatever_its_scale() -> None:
    masks = torch.full((1, 1, 4), 0.5, requires_grad=True)
    masked_square(torch.tensor([[1.0, 1.0, 3.0, 3.0]]), masks, "c").backward()
    assert masks.grad.sum().item() == pytest.approx(0, abs=1e-7)
    assert (masks.grad[0, 0].sign() == torch.tensor([-1.0, -1.0, 1.0, 1.0])).all()


@READINGS
def test_closed_masks_give_finite_losses_and_gradients(reading: Reading) -> None:
    masks = torch.zeros(1, 2, 5, requires_grad=True)
    value = masked_square(torch.ones(1, 5), masks, reading) + dice(masks)
    value.backward()
    assert value.item() == 0
    assert masks.grad.isfinite().all()


@READINGS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_the_loss(reading: Reading, bad: float) -> None:
    squares, masks = drawn((2, 3, 6), 0)
    squares[1, 4] = bad
    assert not masked_square(squares, masks, reading).isfinite()


def test_fp32_whatever_comes_in() -> None:
    squares, masks = (each.bfloat16() for each in drawn((2, 3, 9), 0))
    with torch.autocast("cpu", torch.bfloat16):
        values = [masked_square(squares, masks, "b"), dice(masks)]
    for value, exact in zip(values, [masked_square(squares.float(), masks.float(), "b"), dice(masks.float())], strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, exact)


def test_compiled_they_are_the_same() -> None:
    squares, masks = drawn((2, 3, 9), 0)
    for function, arguments in ((masked_square, (squares, masks, "b")), (dice, (masks,)), (map_scale, (masks,))):
        assert torch.equal(torch.compile(function, backend="eager", fullgraph=True)(*arguments), function(*arguments))


def test_the_scale_of_a_map_is_each_images_own_and_never_zero() -> None:
    maps = torch.randn(3, 10, 4)
    scale = map_scale(maps)
    assert scale.shape == (3, 1, 1)
    torch.testing.assert_close((maps / scale).square().mean((1, 2)), torch.ones(3))
    torch.testing.assert_close(map_scale(5 * maps), 5 * scale)
    assert map_scale(torch.zeros(1, 4, 2)).item() > 0
