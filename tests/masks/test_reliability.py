"""Who teaches whom: errors, directions, and their means over regions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.masks.reliability import class_means, directions, leads, pixel_errors, region_means

seeds = st.integers(0, 2**31)


def drawn(seed: int, classes: int = 4, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two, and labels, a fifth of them ignored."""
    random = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(2, classes, side, side, generator=random) for _ in range(2))
    labels = torch.randint(classes, (2, side, side), generator=random)
    labels[torch.rand(2, side, side, generator=random) < 0.2] = 255
    return first, second, labels


@given(seeds)
def test_errors_are_the_labels_cross_entropy_and_nothing_where_ignored(seed: int) -> None:
    logits, _, labels = drawn(seed)
    errors = pixel_errors(logits.requires_grad_(), labels)
    known = labels != 255
    expected = -logits.log_softmax(1).gather(1, labels.clamp(max=3)[:, None])[:, 0]
    torch.testing.assert_close(errors[known], expected[known].detach())
    assert not errors[~known].any()
    assert not errors.requires_grad
    torch.testing.assert_close(pixel_errors(logits + torch.randn(2, 1, 8, 8), labels), errors, atol=1e-5, rtol=1e-4)


@given(seeds)
def test_nobody_is_taught_twice_and_swapping_swaps(seed: int) -> None:
    first, second, labels = drawn(seed)
    errors, counts = (pixel_errors(first, labels), pixel_errors(second, labels)), labels != 255
    to_first, to_second = directions(*errors, counts)
    assert not (to_first & to_second).any()
    assert not ((to_first | to_second) & ~counts).any()
    assert all(torch.equal(a, b) for a, b in zip(directions(errors[1], errors[0], counts), (to_second, to_first), strict=True))
    assert torch.equal(to_first | to_second, counts & (errors[0] != errors[1]))
    assert not any(mask.any() for mask in directions(errors[0], errors[0], counts)), "ties teach nobody"


def test_constants_added_to_logits_turn_no_direction_round() -> None:
    """Powers of two on logits that are few bits long: not a rounding away from exact."""
    random = torch.Generator().manual_seed(0)
    first, second = (torch.randint(-8, 9, (2, 4, 8, 8), generator=random) / 4 for _ in range(2))
    labels = torch.randint(4, (2, 8, 8), generator=random)
    before = directions(pixel_errors(first, labels), pixel_errors(second, labels), labels != 255)
    shift = torch.randint(-2, 3, (2, 1, 8, 8), generator=random).float()
    after = directions(pixel_errors(first + shift, labels), pixel_errors(second - shift, labels), labels != 255)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_means_over_a_grid_leave_out_what_has_no_label(number: int) -> None:
    values, _, labels = drawn(3)
    labels[0, :4, :4] = 255
    found = region_means(values, labels, "grid", number)
    assert found.means_BRC.shape == (2, number**2, 4)
    step = 8 // number
    for image in range(2):
        for region in range(number**2):
            rows, columns = (slice(step * place, step * place + step) for place in divmod(region, number))
            known = labels[image, rows, columns] != 255
            assert found.counts_BR[image, region] == known.any()
            expected = values[image, :, rows, columns][:, known].mean(1) if known.any() else torch.zeros(4)
            torch.testing.assert_close(found.means_BRC[image, region], expected, atol=1e-5, rtol=1e-4)


@given(seeds, st.integers(1, 5), st.integers(5, 9), st.integers(10, 33))
def test_a_region_with_a_labelled_pixel_has_labels_on_a_coarser_map(seed: int, number: int, coarse: int, fine: int) -> None:
    """The errors are pooled from pixels, features from a coarser map, whose cells may overlap: none may be empty."""
    labels = torch.full((2, fine, fine), 255)
    place = torch.randint(fine, (3, 2), generator=torch.Generator().manual_seed(seed))
    labels[0, place[:, 0], place[:, 1]] = 1
    on_pixels = region_means(torch.ones(2, 1, fine, fine), labels, "grid", number)
    on_map = region_means(torch.ones(2, 3, coarse, coarse), labels, "grid", number)
    assert not (on_pixels.counts_BR & ~on_map.counts_BR).any()
    assert on_pixels.counts_BR[0].any()
    assert not on_map.counts_BR[1].any()
    assert on_map.means_BRC.isfinite().all()
    torch.testing.assert_close(on_map.means_BRC[on_map.counts_BR], torch.ones_like(on_map.means_BRC[on_map.counts_BR]))


def test_means_over_classes_are_of_each_image() -> None:
    values, _, labels = drawn(5)
    labels[1][labels[1] == 2] = 255
    found = region_means(values, labels, "classes", 4)
    for image in range(2):
        for name in range(4):
            there = labels[image] == name
            assert found.counts_BR[image, name] == there.any()
            if there.any():
                torch.testing.assert_close(found.means_BRC[image, name], values[image][:, there].mean(1), atol=1e-5, rtol=1e-4)
    assert not found.counts_BR[1, 2]
    assert not found.means_BRC[1, 2].any()
    half = region_means(F.avg_pool2d(values, 2), labels, "classes", 4)
    assert torch.equal(half.counts_BR, found.counts_BR)


def test_means_under_soft_masks() -> None:
    values, weights = torch.randn(1, 3, 2, 2), torch.tensor([[[[0.5, 0.0], [0.25, 0.25]], [[0.0, 0.0], [0.0, 0.0]]]])
    found = class_means(values, weights)
    torch.testing.assert_close(found[0, 0], values[0, :, 0, 0] / 2 + values[0, :, 1, 0] / 4 + values[0, :, 1, 1] / 4)
    assert not found[0, 1].any()


def test_more_regions_than_places_are_refused() -> None:
    with pytest.raises(UserError, match=r"^regions is 9 and a high-layer map has 8 x 8 places, expected at most 8$"):
        region_means(torch.zeros(1, 2, 8, 8), torch.zeros(1, 32, 32, dtype=torch.int64), "grid", 9)


def test_who_leads_in_a_class() -> None:
    labels = torch.tensor([[[0, 0, 1], [2, 255, 255]]])
    first = torch.tensor([[[0.1, 0.1, 0.9], [0.5, 0.0, 9.0]]])
    second = torch.tensor([[[0.4, 0.0, 0.2], [0.5, 9.0, 0.0]]])
    found = leads(first, second, labels)
    assert found[:4].tolist() == [1, -1, 0, 0]
    assert not found[3:].any()
