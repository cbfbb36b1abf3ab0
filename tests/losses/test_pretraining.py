"""Losses on pictures of which most is hidden, against their formulas and limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from stillhouse.losses.logits import cross_entropy, target_and_rest
from stillhouse.losses.pretraining import (
    direction_distance,
    feature_distance,
    hidden_pixels_loss,
    normalised_kd,
    normalised_pixels,
    patchify,
    whitened_smooth_l1,
)


def test_patches_are_cut_row_by_row() -> None:
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = patchify(images, (2, 3))
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4], images[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())


def test_pixels_are_normalised_with_the_unbiased_variance() -> None:
    pixels = torch.rand(2, 3, 12)
    normed = normalised_pixels(pixels)
    torch.testing.assert_close(normed.mean(-1), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(normed.var(-1), torch.ones(2, 3), atol=1e-3, rtol=0)
    assert torch.equal(normalised_pixels(torch.full((1, 1, 4), 3.0)), torch.zeros(1, 1, 4)), "a flat patch is no division by zero"


def test_only_hidden_patches_count() -> None:
    predicted, target = torch.randn(3, 8, 5), torch.randn(3, 8, 5)
    mask = (torch.rand(3, 8) < 0.7).float()
    loss = hidden_pixels_loss(predicted, target, mask)
    expected = sum(((predicted[n, i] - target[n, i]) ** 2).mean() for n in range(3) for i in range(8) if mask[n, i]) / mask.sum()
    torch.testing.assert_close(loss, torch.as_tensor(expected))
    assert torch.equal(hidden_pixels_loss(predicted + 9 * (1 - mask)[..., None], target, mask), loss)


@settings(deadline=None, max_examples=30)
@given(width=st.integers(1, 40), seed=st.integers(0, 9999), scale=st.floats(0.01, 100))
def test_directions_lie_between_0_and_2_over_root_d(width: int, seed: int, scale: float) -> None:
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 4, width, generator=random)
    distance = direction_distance(student, teacher)
    assert 0 <= distance <= 2 / width**0.5 + 1e-6
    torch.testing.assert_close(direction_distance(student, scale * teacher), distance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(direction_distance(-teacher, teacher), 2 * F.normalize(teacher, dim=-1).abs().mean())
    assert direction_distance(teacher, teacher) == 0


def test_features_as_they_are_feel_the_scale() -> None:
    student, teacher = torch.randn(2, 2, 3, 8)
    assert feature_distance(student, 2 * teacher) != feature_distance(student, teacher)
    torch.testing.assert_close(feature_distance(student, teacher), (student - teacher).abs().mean())
    torch.testing.assert_close(feature_distance(student, teacher, squared=True), (student - teacher).square().mean())


@pytest.mark.parametrize(
    ("error", "value", "slope"), [(0.0, 0.0, 0.0), (1.0, 0.25, 0.5), (2.0, 1.0, 1.0), (4.0, 3.0, 1.0), (-4.0, 3.0, -1.0)]
)
def test_smooth_l1_at_beta_2(error: float, value: float, slope: float) -> None:
    hidden = torch.tensor([[1.0, -1.0]])
    target = F.layer_norm(hidden, (2,), eps=1e-6)
    predicted = (target + error).requires_grad_()
    loss = whitened_smooth_l1(predicted, hidden)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, abs=1e-5)
    assert predicted.grad is not None
    assert (2 * predicted.grad).tolist()[0] == pytest.approx([slope] * 2, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 9999), scale=st.floats(0.5, 50), shift=st.floats(-10, 10))
def test_the_target_does_not_feel_an_affine_map_of_a_token(seed: int, scale: float, shift: float) -> None:
    random = torch.Generator().manual_seed(seed)
    predicted, hidden = torch.randn(2, 3, 4, 16, generator=random)
    torch.testing.assert_close(
        whitened_smooth_l1(predicted, scale * hidden + shift), whitened_smooth_l1(predicted, hidden), rtol=1e-3, atol=1e-4
    )


def test_nkd_is_its_formula() -> None:
    student, teacher, target = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    right, rest = normalised_kd(student, teacher, target, alpha=1.5, temperature=2.0)
    p_S, p_T = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(right, torch.stack([-p_T[i, t] * p_S[i, t].log() for i, t in enumerate(target)]).mean())
    total = torch.zeros(())
    for i, t in enumerate(target.tolist()):
        others = [c for c in range(5) if c != t]
        total = total - ((teacher[i, others] / 2).softmax(-1) * (student[i, others] / 2).log_softmax(-1)).sum()
    torch.testing.assert_close(rest, 1.5 * 4 * total / 4)


def test_nkd_of_the_others_has_dkds_gradient() -> None:
    """Cross-entropy and KL differ by the teacher's entropy."""
    student, teacher, target = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    ours, theirs = (
        torch.autograd.grad(term, student)[0]
        for term in (normalised_kd(student, teacher, target)[1], target_and_rest(student, teacher, target, 1.0)[1])
    )
    torch.testing.assert_close(ours, theirs)


def test_a_sure_teachers_nkd_is_cross_entropy() -> None:
    student, target = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    right, _ = normalised_kd(student, 100 * F.one_hot(target, 5).float(), target)
    torch.testing.assert_close(right, cross_entropy(student, target))
