"""Correlations of features over a batch."""

from __future__ import annotations

import torch

from stillhouse.losses.correlation import correlation, redundancy


def test_it_is_the_correlation() -> None:
    first, second = torch.randn(50, 3), torch.randn(50, 4)
    expected = torch.corrcoef(torch.cat([first, second], dim=1).T)[:3, 3:]
    torch.testing.assert_close(correlation(first, second), expected, rtol=1e-4, atol=1e-4)


def test_scale_and_shift_of_a_feature_do_not_matter() -> None:
    first, second = torch.randn(50, 3), torch.randn(50, 3)
    torch.testing.assert_close(correlation(5 * first + 2, second - 7), correlation(first, second), rtol=1e-4, atol=1e-4)


def test_it_is_0_for_the_same_features_that_say_nothing_of_each_other() -> None:
    features = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert redundancy(features, features) < 1e-8
    torch.testing.assert_close(redundancy(features, -features), torch.tensor(8.0), rtol=1e-4, atol=0)  # 2 features, (1 + 1)^2 each
    same = features[:, :1].expand(4, 2)
    torch.testing.assert_close(redundancy(same, same, 0.1), torch.tensor(0.2), rtol=1e-4, atol=0)  # two correlations of 1, weighted


def test_what_does_not_vary_has_a_finite_gradient() -> None:
    features = torch.ones(4, 2, requires_grad=True)
    redundancy(features, features).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
