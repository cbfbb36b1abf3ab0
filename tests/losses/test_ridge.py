"""Kernel ridge regression: the card's identities, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stillhouse.losses.ridge import ridge_distance, ridge_of, ridge_prediction, with_bias

M, B, D, K = 6, 9, 11, 4


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


FITTED, TARGETS, ASKED, TRUTH = some(M, D), some(M, K, seed=1), some(B, D, seed=2), some(B, K, seed=3)


@pytest.mark.parametrize("width", [3, D], ids=["more samples than features", "fewer"])
def test_the_dual_form_is_the_primal_one(width: int) -> None:
    features, queries = FITTED[:, :width], ASKED[:, :width]
    F, Q = with_bias(features), with_bias(queries)
    penalty = ridge_of(F, 1e-3) * torch.eye(width + 1, dtype=torch.float64)
    primal = Q @ torch.linalg.solve(F.T @ F + penalty, F.T @ TARGETS)
    torch.testing.assert_close(ridge_prediction(features, TARGETS, queries, 1e-3), primal, rtol=0, atol=1e-10)


def test_without_a_ridge_the_fitted_samples_are_met() -> None:
    """With as many features as samples at least: asked about themselves they answer their targets, whatever the truth is."""
    torch.testing.assert_close(ridge_prediction(FITTED, TARGETS, FITTED, 1e-14), TARGETS, rtol=0, atol=1e-9)
    truth = some(M, K, seed=4)
    expected = (TARGETS - truth).square().mean()
    torch.testing.assert_close(ridge_distance(FITTED, TARGETS, FITTED, truth, 1e-14), expected, rtol=1e-9, atol=0)


def test_under_an_endless_ridge_the_answer_is_0() -> None:
    assert ridge_prediction(FITTED, TARGETS, ASKED, 1e12).abs().max() < 1e-9
    torch.testing.assert_close(ridge_distance(FITTED, TARGETS, ASKED, TRUTH, 1e12), TRUTH.square().mean(), rtol=1e-9, atol=0)


def test_the_ridge_is_a_share_of_the_trace_and_has_no_gradient() -> None:
    features = FITTED.clone().requires_grad_()
    found = ridge_of(with_bias(features), 1e-6)
    torch.testing.assert_close(found, 1e-6 * (with_bias(FITTED) @ with_bias(FITTED).T).trace())
    assert not found.requires_grad
    torch.testing.assert_close(ridge_of(10 * features, 1e-6), 100 * ridge_of(features, 1e-6))


def test_the_gradient_is_that_of_finite_differences_with_the_ridge_held() -> None:
    features = FITTED.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ridge_distance(features, TARGETS, ASKED, TRUTH, 1e-2), features)
    held = ridge_of(with_bias(FITTED), 1e-2)

    def loss(at: Tensor) -> Tensor:
        share = held / with_bias(at).square().sum()  # so that the ridge is what it was
        return ridge_distance(at, TARGETS, ASKED, TRUTH, float(share))

    moved = torch.zeros_like(FITTED)
    numeric = torch.zeros_like(FITTED)
    for place in range(FITTED.numel()):
        moved.view(-1)[place] = 1e-6
        numeric.view(-1)[place] = (loss(FITTED + moved) - loss(FITTED - moved)) / 2e-6
        moved.view(-1)[place] = 0
    torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-8)


def test_it_is_quadratic_in_the_targets() -> None:
    """dL/dY = 2 / (B K) M^T (M Y - truth), M = K_qs (K_ss + lambda I)^-1."""
    targets = TARGETS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ridge_distance(FITTED, targets, ASKED, TRUTH, 1e-3), targets)
    F, Q = with_bias(FITTED), with_bias(ASKED)
    matrix = Q @ F.T @ torch.linalg.inv(F @ F.T + ridge_of(F, 1e-3) * torch.eye(M, dtype=torch.float64))
    torch.testing.assert_close(gradient, 2 / (B * K) * matrix.T @ (matrix @ TARGETS - TRUTH))


def test_the_order_of_the_samples_does_not_matter() -> None:
    order = torch.randperm(M)
    torch.testing.assert_close(ridge_prediction(FITTED[order], TARGETS[order], ASKED), ridge_prediction(FITTED, TARGETS, ASKED))


def test_scaling_all_targets_scales_the_distance_by_the_square() -> None:
    distance = ridge_distance(FITTED, TARGETS, ASKED, TRUTH)
    torch.testing.assert_close(ridge_distance(FITTED, 3 * TARGETS, ASKED, 3 * TRUTH), 9 * distance)


def test_half_precision_features_are_solved_in_full() -> None:
    assert ridge_prediction(FITTED.bfloat16(), TARGETS.float(), ASKED.bfloat16()).dtype == torch.float64
    assert ridge_distance(FITTED.float(), TARGETS.float(), ASKED.float(), TRUTH.float()).isfinite()
