"""The two parts of a distribution matching gradient, their noise levels and what they leave on an image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from stillhouse.losses.distribution_matching import (
    LEAST,
    SCHEDULES,
    augmentation,
    matching,
    moments,
    noise_levels,
    normaliser,
    surrogate,
)

SIGMA_T = torch.tensor([1.0, 0.75, 0.5, 0.25])


def some(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def levels(schedule: str, high: float = 0.98) -> tuple[Tensor, Tensor]:
    """Of 500 samples at each sigma_t: [4, 500]."""
    random = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, generator=random), torch.rand(2000, generator=random)
    found = noise_levels(schedule, draws, SIGMA_T.repeat_interleave(500), 0.02, high)
    return found[0].view(4, -1), found[1].view(4, -1)


@pytest.mark.parametrize("guidance", [1.0, 1.5, 3.0, 7.5])
def test_both_parts_together_are_the_guided_teachers_gradient(guidance: float) -> None:
    fake, conditional, null = some(0), some(1), some(2)
    dmd = fake - (null + guidance * (conditional - null))
    assert (matching(fake, conditional) + augmentation(conditional, null, guidance) - dmd).abs().max() < 2e-6


def test_without_guidance_there_is_no_augmentation_and_without_a_condition_either() -> None:
    assert not augmentation(some(1), some(2), 1.0).any()
    assert not augmentation(some(1), some(1), 7.5).any()
    assert not matching(some(0), some(0)).any()


def test_the_gradient_on_an_image_is_delta_over_n_and_the_number_of_values() -> None:
    images, delta = some(0).requires_grad_(), some(1)
    divisor = normaliser(images.detach(), some(2))
    loss = surrogate(images, delta / divisor)
    (gradient,) = torch.autograd.grad(loss, images)
    assert torch.allclose(gradient, delta / divisor / images.numel(), rtol=1e-6, atol=0)
    assert loss.item() == pytest.approx(0.5 * (delta / divisor).square().mean().item())


def test_the_normaliser_is_a_mean_distance_by_image_and_never_nothing() -> None:
    images, expected = some(0), some(1)
    expected[1] = images[1]
    found = normaliser(images, expected)
    assert found.shape == (4, 1, 1, 1)
    assert found[0].item() == pytest.approx((images[0] - expected[0]).abs().mean().item())
    assert found[1].item() == pytest.approx(LEAST)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_levels_keep_to_their_range(schedule: str) -> None:
    coupled, *cleaner = SCHEDULES[schedule]
    for part, below in zip(levels(schedule), cleaner, strict=True):
        for sigma_t, sigma in zip(SIGMA_T.tolist(), part, strict=True):
            top = min(sigma_t, 0.98) if below else 0.98
            assert sigma.min() >= 0.02
            assert sigma.max() <= top
            assert sigma.max() > 0.02 + 0.98 * (top - 0.02)
            assert sigma.mean().item() == pytest.approx((0.02 + top) / 2, abs=0.04)
    assert torch.equal(*levels(schedule)) == coupled


def test_at_the_last_step_all_augmentation_is_below_a_quarter() -> None:
    assert levels("decoupled-hybrid")[1][3].max() <= 0.25


def test_a_generator_of_one_step_makes_the_method_its_schedule_3() -> None:
    ours, third = levels("decoupled-hybrid"), levels("decoupled")
    assert torch.equal(ours[1][0], third[1][0])
    assert torch.equal(ours[0], third[0])


@given(st.floats(0, 0.2), st.floats(0.5, 1), st.floats(0.21, 1), st.floats(0, 1, exclude_max=True), st.sampled_from(list(SCHEDULES)))
def test_whatever_the_range_levels_are_in_it(low: float, high: float, sigma_t: float, draw: float, schedule: str) -> None:
    uniform = torch.tensor([draw]), torch.tensor([1 - draw])
    matched, augmented = noise_levels(schedule, uniform, torch.tensor([sigma_t]), low, high)
    for sigma, below in zip((matched, augmented), SCHEDULES[schedule][1:], strict=True):
        assert low - 1e-6 <= sigma.item() <= (min(sigma_t, high) if below else high) + 1e-6


def test_moments_are_a_divergence_of_normals() -> None:
    images, real = 2 * some(0) + 1, some(1)
    flat, flat_real = images.flatten(1), real.flatten(1)
    target = Normal(flat_real.mean(), flat_real.var(1, unbiased=False).mean().sqrt())
    expected = kl_divergence(Normal(flat.mean(1), flat.std(1, unbiased=False)), target).mean()
    assert moments(images, real).item() == pytest.approx(expected.item(), rel=1e-4)
    one = real[:1]
    assert moments(one, one).item() == pytest.approx(0, abs=1e-6)
    assert moments(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)).isfinite()
