"""Losses between maps: closed forms in float64, what they do not mind, and where they are 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.losses.maps import (
    attention_distance,
    background_scale,
    channel_attention,
    channel_divergence,
    focal_distances,
    foreground_scale,
    spatial_attention,
    squared_distance,
    token_distance,
)

GRID = (5, 7)
BOXES = [torch.tensor([[3.0, 5.0, 30.0, 21.0], [20.0, 9.0, 50.0, 39.0]]), torch.zeros(0, 4)]
EIGHT = (40, 56)
"""The image of which a place of the grid is 8 x 8 pixels."""


def maps(batch: int = 2, channels: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, *GRID, generator=torch.Generator().manual_seed(seed))


def masked(student: Tensor, teacher: Tensor) -> Tensor:
    return token_distance(student, teacher, torch.full((student.shape[0], 3, *GRID), 0.5))


def focal(student: Tensor, teacher: Tensor) -> Tensor:
    boxes = [BOXES[index % 2] for index in range(student.shape[0])]
    return torch.stack(focal_distances(student, teacher, boxes, EIGHT, 0.5)).sum()


def attentions(student: Tensor, teacher: Tensor) -> Tensor:
    return attention_distance(student, teacher, 0.5)


LOSSES = pytest.mark.parametrize("loss", [channel_divergence, squared_distance, masked, focal, attentions])


@LOSSES
def test_zero_when_equal_and_fp32_whatever_comes_in(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = maps().bfloat16(), maps(seed=1).bfloat16()
    assert loss(student, student).item() == pytest.approx(0, abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert value > 0
    assert torch.equal(value, loss(student.float(), teacher.float()))


@LOSSES
def test_the_mean_of_equal_parts_is_the_whole(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = maps(4), maps(4, seed=1)
    torch.testing.assert_close((loss(student[:2], teacher[:2]) + loss(student[2:], teacher[2:])) / 2, loss(student, teacher))


@LOSSES
def test_a_dead_map_gives_finite_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student = torch.zeros(2, 6, *GRID, requires_grad=True)
    loss(student, maps()).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@given(st.floats(0.5, 8), st.integers(0, 2**31))
def test_channel_divergence_is_its_formula(temperature: float, seed: int) -> None:
    student, teacher = maps(seed=seed), maps(seed=seed + 1)
    p_S, p_T = ((each.double().flatten(2) / temperature).softmax(-1) for each in (student, teacher))
    expected = temperature**2 * (p_T * (p_T / p_S).log()).sum() / (2 * 6)
    assert channel_divergence(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


def test_channel_divergence_does_not_mind_what_is_added_to_a_channel() -> None:
    student, teacher, more = maps(), maps(seed=1), torch.randn(2, 6, 1, 1)
    torch.testing.assert_close(channel_divergence(student + more, teacher - more), channel_divergence(student, teacher))
    assert channel_divergence(teacher + more, teacher).item() == pytest.approx(0, abs=1e-6)


def test_channels_are_compared_one_by_one() -> None:
    student, teacher = maps(), maps(seed=1)
    each = [channel_divergence(student[:, c : c + 1], teacher[:, c : c + 1]) for c in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(), channel_divergence(student, teacher))


def test_squared_distance_is_a_sum_over_all_but_the_batch() -> None:
    student, teacher = maps(), maps(seed=1)
    assert squared_distance(student, teacher).item() == pytest.approx(((student - teacher).double() ** 2).sum().item() / 2, rel=1e-5)


def test_token_distance_under_a_full_mask_is_the_mean_squared_difference() -> None:
    student, teacher = maps(), maps(seed=1)
    full = torch.ones(2, 3, *GRID)
    torch.testing.assert_close(token_distance(student, teacher, full), (student - teacher).square().mean())
    weights = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(token_distance(student, teacher, full, weights), (student - teacher).square().mean())


def test_token_distance_laid_out_mask_by_mask() -> None:
    student, teacher, masks = maps(), maps(seed=1), torch.rand(2, 3, *GRID)
    weights = torch.rand(2, 3).softmax(1)
    under = [student.unsqueeze(1) * masks.unsqueeze(2), teacher.unsqueeze(1) * masks.unsqueeze(2)]
    distances = (under[0] - under[1]).square().sum((3, 4)) / masks.sum((2, 3)).unsqueeze(-1)
    torch.testing.assert_close(token_distance(student, teacher, masks), distances.mean())
    torch.testing.assert_close(token_distance(student, teacher, masks, weights), (distances.mean(-1) * weights).sum(-1).mean())


def test_nothing_under_the_masks_is_no_distance() -> None:
    student, teacher, masks = maps(), maps(seed=1), torch.zeros(2, 3, *GRID)
    assert token_distance(student, teacher, masks).item() == 0
    masks[:, :, 0, 0] = 1
    torch.testing.assert_close(token_distance(student, teacher, masks), (student - teacher)[:, :, 0, 0].square().mean())


@given(st.floats(0.1, 4), st.integers(0, 2**31))
def test_attentions_are_one_on_average(temperature: float, seed: int) -> None:
    teacher = maps(seed=seed)
    torch.testing.assert_close(spatial_attention(teacher, temperature).mean((1, 2)), torch.ones(2))
    torch.testing.assert_close(channel_attention(teacher, temperature).mean(1), torch.ones(2))
    torch.testing.assert_close(spatial_attention(-teacher, temperature), spatial_attention(teacher, temperature))


def test_a_constant_map_attends_to_everything_alike() -> None:
    assert torch.equal(spatial_attention(torch.full((1, 6, *GRID), 3.0), 0.5), torch.ones(1, *GRID))
    assert torch.equal(channel_attention(torch.full((1, 6, *GRID), 3.0), 0.5), torch.ones(1, 6))
    assert torch.equal(spatial_attention(maps(), 1e6).round(decimals=3), torch.ones(2, *GRID))


def test_foreground_by_hand() -> None:
    """A box of [8, 24) x [16, 24) pixels touches columns 1 to 2 and row 2; ceil and one more make it 1 to 3 and 2 to 3."""
    scale = foreground_scale([torch.tensor([[8.0, 16.0, 24.0, 24.0]])], EIGHT, GRID)[0]
    expected = torch.zeros(GRID)
    expected[2:4, 1:4] = 1 / 6
    torch.testing.assert_close(scale, expected)
    assert scale.sum().item() == pytest.approx(1)


def test_every_object_weighs_one_where_the_grid_holds_it() -> None:
    whole = foreground_scale([torch.tensor([[0.0, 0.0, 56.0, 40.0]])], EIGHT, GRID)
    assert torch.equal(whole, torch.full((1, *GRID), 1 / (6 * 8))), "one row and column more than there are"
    apart = torch.tensor([[1.0, 1.0, 7.0, 7.0], [33.0, 17.0, 47.0, 31.0]])
    assert foreground_scale([apart], EIGHT, GRID).sum().item() == pytest.approx(2)


def test_the_smaller_object_wins_where_boxes_overlap_in_any_order() -> None:
    boxes = torch.tensor([[0.0, 0.0, 48.0, 32.0], [8.0, 8.0, 15.0, 15.0]])
    scale = foreground_scale([boxes], EIGHT, GRID)
    assert scale[0, 1, 1].item() == pytest.approx(1 / 4)
    assert scale[0, 0, 0].item() == pytest.approx(1 / 35)
    assert torch.equal(foreground_scale([boxes.flip(0)], EIGHT, GRID), scale)


def test_boxes_follow_what_the_maps_cover() -> None:
    boxes = torch.tensor([[3.0, 5.0, 30.0, 21.0]])
    assert torch.equal(foreground_scale([boxes], EIGHT, GRID), foreground_scale([3 * boxes], (120, 168), GRID))
    assert torch.equal(foreground_scale([boxes], EIGHT, GRID)[:, :3, :4], foreground_scale([boxes], (24, 32), (3, 4)))


def test_edges_on_the_grid_are_not_rounded_over_it() -> None:
    """800 pixels on 100 places: 96 pixels are exactly 12."""
    scale = foreground_scale([torch.tensor([[96.0, 96.0, 104.0, 104.0]])], (800, 800), (100, 100))[0]
    assert scale.nonzero().tolist() == [[12, 12], [12, 13], [13, 12], [13, 13]]


def test_background_is_the_rest_and_one_in_sum() -> None:
    foreground = foreground_scale([*BOXES, torch.tensor([[0.0, 0.0, 56.0, 40.0]])], EIGHT, GRID)
    background = background_scale(foreground)
    assert not (background * foreground).any()
    torch.testing.assert_close(background.sum((1, 2)), torch.tensor([1.0, 1.0, 0.0]), rtol=1e-5, atol=1e-6)
    assert torch.equal(background[1], torch.full(GRID, 1 / 35))


def test_without_boxes_all_is_background() -> None:
    student, teacher = maps(), maps(seed=1)
    inside, outside, _ = focal_distances(student, teacher, [torch.zeros(0, 4)] * 2, EIGHT, 0.5)
    assert inside.item() == 0
    weights = spatial_attention(teacher, 0.5).unsqueeze(1) * channel_attention(teacher, 0.5)[:, :, None, None]
    torch.testing.assert_close(outside, ((student - teacher).square() * weights).sum() / 2 / 35)


def test_what_happens_outside_of_the_boxes_is_no_matter_inside() -> None:
    student, teacher = maps(1), maps(1, seed=1)
    box = [torch.tensor([[0.0, 0.0, 15.0, 15.0]])]
    inside, outside, _ = focal_distances(student, teacher, box, EIGHT, 0.5)
    student[:, :, 3:] += 5
    moved_inside, moved_outside, _ = focal_distances(student, teacher, box, EIGHT, 0.5)
    assert torch.equal(inside, moved_inside)
    assert moved_outside > outside


def test_gradients_are_those_of_the_student_alone() -> None:
    """The teacher's attention weighs; the student's does not, and so nothing is gained by attending elsewhere."""
    student, teacher = maps().requires_grad_(), maps(seed=1)
    inside, outside, _ = focal_distances(student, teacher, BOXES, EIGHT, 0.5)
    (inside + outside).backward()
    weights = spatial_attention(teacher, 0.5).unsqueeze(1) * channel_attention(teacher, 0.5)[:, :, None, None]
    foreground = foreground_scale(BOXES, EIGHT, GRID)
    expected = 2 * (student - teacher) * weights * (foreground + background_scale(foreground)).unsqueeze(1) / 2
    torch.testing.assert_close(student.grad, expected.detach())
