"""Losses between two that learn together: closed forms in float64, bounds, what they do not mind, and where they are 0."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from stillhouse.losses.mutual import affinity_distance, masked_mean, pixel_divergence, place_distance

seeds = st.integers(0, 2**31)


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(seeds)
def test_distances_of_places_are_their_formulas(seed: int) -> None:
    S, T = maps(seed, 2, 5, 3, 4), maps(seed + 1, 2, 5, 3, 4)
    s, t = S.double(), T.double()
    cosine = (s * t).sum(1) / (s.square().sum(1).sqrt() * t.square().sum(1).sqrt())
    torch.testing.assert_close(place_distance(S, T, "cosine").double(), 1 - cosine, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(place_distance(S, T, "mse").double(), 2 / 5 * (1 - cosine), atol=1e-5, rtol=1e-4)
    p = t.exp() / t.exp().sum(1, keepdim=True)
    expected = (p * (p.log() - (s - s.logsumexp(1, keepdim=True)))).sum(1)
    torch.testing.assert_close(place_distance(S, T, "kl").double(), expected, atol=1e-5, rtol=1e-4)
    for by in ("cosine", "mse", "kl"):
        assert (place_distance(S, T, by) >= -1e-6).all()
        torch.testing.assert_close(place_distance(S, S, by), torch.zeros(2, 3, 4), atol=1e-6, rtol=0)
        assert place_distance(S.bfloat16(), T.bfloat16(), by).dtype == torch.float32
    torch.testing.assert_close(place_distance(3 * S, T), place_distance(S, T), atol=1e-6, rtol=1e-5)


@given(seeds, st.sampled_from([0.5, 1.0, 4.0]))
def test_the_divergence_of_pixels_is_kl_and_minds_no_constant(seed: int, tau: float) -> None:
    S, T = maps(seed, 2, 5, 3, 4), maps(seed + 1, 2, 5, 3, 4)
    expected = F.kl_div((S.double() / tau).log_softmax(1), (T.double() / tau).softmax(1), reduction="none").sum(1) * tau**2
    torch.testing.assert_close(pixel_divergence(S, T, tau).double(), expected, atol=1e-5, rtol=1e-4)
    shifts = 4 * maps(seed + 2, 2, 1, 3, 4)
    torch.testing.assert_close(pixel_divergence(S + shifts, T - shifts, tau), pixel_divergence(S, T, tau), atol=1e-4, rtol=1e-3)
    assert torch.equal(pixel_divergence(S, S, tau), torch.zeros(2, 3, 4))


def test_affinities_need_no_equal_channels_and_leave_out_what_does_not_count() -> None:
    S, T = maps(0, 2, 4, 6), maps(1, 2, 4, 3)
    counts = torch.tensor([[True, True, False, True], [False] * 4])
    found = affinity_distance(S, T, counts)
    for r in range(4):
        squares = [
            (F.cosine_similarity(S[0, r], S[0, q], dim=0) - F.cosine_similarity(T[0, r], T[0, q], dim=0)).square() for q in (0, 1, 3)
        ]
        torch.testing.assert_close(found[0, r], torch.stack(squares).mean())
    assert torch.equal(found[1], torch.zeros(4))
    turn = torch.linalg.qr(maps(2, 3, 3))[0]
    torch.testing.assert_close(affinity_distance(T @ turn, T, counts), torch.zeros(2, 4), atol=1e-6, rtol=0)


@given(seeds, st.floats(0, 1))
def test_a_masked_mean_and_a_mean_over_all(seed: int, share: float) -> None:
    values = maps(seed, 3, 7).square().requires_grad_()
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) < share
    expected = values[mask].mean() if mask.any() else torch.tensor(0.0)
    torch.testing.assert_close(masked_mean(values, mask), expected)
    torch.testing.assert_close(masked_mean(values, mask, torch.ones(3, 7)), values[mask].sum() / 21)
    assert masked_mean(values, mask, torch.ones(3, 7)) <= values.mean() + 1e-6


def test_a_mean_over_nothing_is_0_with_gradient_whatever_stands_there() -> None:
    values = torch.tensor([float("inf"), float("nan"), 1.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([0.0, 0.0, 0.0]))
    assert mean.item() == 0
    mean.backward()
    assert torch.equal(values.grad, torch.zeros(3))
    assert masked_mean(values, torch.tensor([False, False, True])).item() == 1


def test_soft_masks_weigh() -> None:
    assert masked_mean(torch.tensor([1.0, 3.0]), torch.tensor([0.25, 0.25])).item() == pytest.approx(2.0)
