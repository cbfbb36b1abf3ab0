"""Losses on the correlations of two sets of features over a batch: they are of the batch as a whole, not a mean over its samples."""

from __future__ import annotations

import torch
from torch import Tensor


def correlation(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """C_ij, the correlation over the batch of feature i of one with feature j of the other: fp32 [D, D], in [-1, 1]."""
    first, second = (_standardised(features.float()) for features in (first_BD, second_BD))
    with torch.autocast(first.device.type, enabled=False):
        return first.T @ second / len(first)


def redundancy(first_BD: Tensor, second_BD: Tensor, weight: float = 5e-3) -> Tensor:
    """sum_i (1 - C_ii)^2 + `weight` sum_{i != j} C_ij^2 (Barlow Twins, arXiv 2103.03230, eq. 1): 0 when each feature is the same in both
    and none says what another does.
    """
    correlation_DD = correlation(first_BD, second_BD)
    diagonal = correlation_DD.diagonal()
    return (1 - diagonal).square().sum() + weight * (correlation_DD.square().sum() - diagonal.square().sum())


def _standardised(features_BD: Tensor) -> Tensor:
    """Mean 0 and variance 1 of every feature over the batch, as a batch normalisation without weights has it."""
    variance, mean = torch.var_mean(features_BD, dim=0, correction=0)
    return (features_BD - mean) * (variance + 1e-5).rsqrt()
