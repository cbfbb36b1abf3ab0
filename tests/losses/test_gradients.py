"""Histograms of oriented gradients: where a slope goes, and what does not change it."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse.losses.gradients import edges_of_patches, oriented_gradients

PICTURE = 255 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_nothing_is_steep_in_a_grey_picture() -> None:
    assert not oriented_gradients(torch.full((1, 3, 16, 16), 99.0), 8).any()
    assert not edges_of_patches(torch.full((1, 3, 16, 16), 99.0), (2, 2), 4).any()


@pytest.mark.parametrize("degrees", [0.0, 35.0, 90.0, 110.0, 170.0])
def test_a_slope_has_its_angles_bin(degrees: float) -> None:
    """Inside, where no border flattens it, a slope of s grey levels a pixel is 2 s long."""
    down, right = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    for sign in (1, -1):
        slope = sign * 3 * (down * row + right * column)
        found = oriented_gradients(slope[None, None], 4)[0, 1:3, 1:3, 0]
        expected = torch.zeros(9)
        expected[int((degrees + 1e-3) % 180 // 20)] = 6
        torch.testing.assert_close(found, expected.expand(2, 2, 9), rtol=1e-4, atol=1e-4)


def test_a_turned_picture_has_its_angles_turned() -> None:
    """By 90 degrees, with 4 bins of 45, half-way between whose borders no angle of these lies on one."""
    found, turned = (oriented_gradients(each, 8, bins=4) for each in (PICTURE, PICTURE.rot90(1, (2, 3))))
    torch.testing.assert_close(turned, found.rot90(1, (1, 2)).roll(2, -1), rtol=1e-4, atol=1e-4)


def test_all_slopes_are_counted_once() -> None:
    """The sum over bins does not depend on how many there are."""
    sums = [oriented_gradients(PICTURE, 4, bins).sum(-1) for bins in (1, 9, 18)]
    torch.testing.assert_close(sums[1], sums[0])
    torch.testing.assert_close(sums[2], sums[0])


def test_contrast_does_not_change_whitened_edges() -> None:
    one, more = (edges_of_patches(size * PICTURE, (4, 4), 2) for size in (1.0, 3.0))
    torch.testing.assert_close(more, one, rtol=1e-3, atol=1e-3)


def test_a_patch_has_the_cells_that_lie_in_it() -> None:
    """Row by row, each histogram with mean 0 and variance 1."""
    edges, cells = edges_of_patches(PICTURE, (2, 4), 2), oriented_gradients(PICTURE, 2)
    assert edges.shape == (2, 8, 4 * 2 * 3 * 9)
    whitened = torch.nn.functional.layer_norm(cells, (9,))
    assert torch.equal(edges[1, 5], whitened[1, 4:8, 2:4].flatten())
    histograms = edges.unflatten(-1, (-1, 9))
    torch.testing.assert_close(histograms.mean(-1), torch.zeros(histograms.shape[:-1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(histograms.var(-1, correction=0), torch.ones(histograms.shape[:-1]), rtol=1e-4, atol=1e-4)
