"""Kernel ridge regression: the best last layer on some features, in closed form, so that a gradient goes through having fitted it.

Everything is in fp64: the smallest eigenvalue of what is solved is the ridge, a millionth of the trace, which fp32 cannot tell from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_bias(features_ND: Tensor) -> Tensor:
    """Features with a column of ones, fp64 [N, D + 1]: the fitted layer has a bias, which the ridge holds back as it does the weights."""
    features = features_ND.double()
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


def ridge_of(features_MD: Tensor, ridge: float) -> Tensor:
    """lambda = `ridge` trace(F F^T), a scalar without gradient: relative to the features, so that their width and scale do not matter."""
    return ridge * features_MD.detach().double().square().sum()


def ridge_prediction(features_MD: Tensor, targets_MK: Tensor, queries_BD: Tensor, ridge: float = 1e-6) -> Tensor:
    """K_qs (K_ss + lambda I)^-1 Y, fp64 [B, K]: what the ridge regression from features to targets says of the queries.

    K_ss = F F^T and K_qs = Q F^T, each with a column of ones; lambda is `ridge_of` the features. This is the dual form, whose system has a
    row a sample: the same numbers as (F^T F + lambda I)^-1 F^T Y, at a cost that does not grow with the features' width. Source: KIP
    (arXiv 2011.00050), with a network's features KRR-ST (arXiv 2310.06511).

    Args:
        features_MD: of the samples that are fitted, with gradient if they are to be learnt.
        targets_MK: what is true of them, likewise.
        queries_BD: features of what is asked.
        ridge: lambda as a share of the trace of K_ss, > 0.
    """
    fitted, asked = with_bias(features_MD), with_bias(queries_BD)
    kernel_MM = fitted @ fitted.T
    penalty = ridge_of(fitted, ridge) * torch.eye(len(fitted), dtype=fitted.dtype, device=fitted.device)
    return asked @ (fitted.T @ torch.linalg.solve(kernel_MM + penalty, targets_MK.double()))


def ridge_distance(features_MD: Tensor, targets_MK: Tensor, queries_BD: Tensor, truth_BK: Tensor, ridge: float = 1e-6) -> Tensor:
    """The mean over queries and outputs of (`ridge_prediction` - truth)^2, fp64."""
    return (ridge_prediction(features_MD, targets_MK, queries_BD, ridge) - truth_BK.double()).square().mean()
