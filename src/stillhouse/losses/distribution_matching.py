"""Distribution matching distillation in two parts (arXiv 2511.22677; DMD2, arXiv 2405.14867), in the space of clean images [B, C, H, W].

A generator made x_0; noised again, a frozen teacher and a fake score (which follows the generator) say which image they expect behind it.
Delta is what x_0 is moved against. It is the sum of distribution matching and of what classifier-free guidance adds.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["coupled", "coupled-cleaner", "decoupled", "decoupled-hybrid"]
SCHEDULES: dict[str, tuple[bool, bool, bool]] = {
    "coupled": (True, False, False),
    "coupled-cleaner": (True, True, True),
    "decoupled": (False, False, False),
    "decoupled-hybrid": (False, False, True),
}
"""Whether both parts share noise and its level; whether matching, and whether augmentation, sees only levels cleaner than the input's."""
LEAST = 1e-4
"""The normaliser is at least this, where the teacher expects just the generator's image."""


def matching(fake_BCHW: Tensor, conditional_BCHW: Tensor) -> Tensor:
    """Delta_DM = X_fake,c - X_real,c."""
    return fake_BCHW - conditional_BCHW


def augmentation(conditional_BCHW: Tensor, null_BCHW: Tensor, guidance: float) -> Tensor:
    """Delta_CA = -(guidance - 1) (X_real,c - X_real,null)."""
    return (1 - guidance) * (conditional_BCHW - null_BCHW)


def normaliser(images_BCHW: Tensor, expected_BCHW: Tensor) -> Tensor:
    """mean |x_0 - X| of each image, at least `LEAST`: [B, 1, 1, 1] (DMD, arXiv 2311.18828, eq. 8)."""
    return (images_BCHW - expected_BCHW).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(LEAST)


def surrogate(images_BCHW: Tensor, delta_BCHW: Tensor) -> Tensor:
    """1/2 mean (x_0 - sg[x_0 - Delta])^2: its gradient on x_0 is Delta / numel, exactly; its value 1/2 mean Delta^2."""
    return 0.5 * (images_BCHW - images_BCHW.detach() + delta_BCHW.detach()).square().mean()


def moments(images_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
    """KL(N(m_b, s_b^2) || N(m, s^2)): m_b and s_b^2 over the values of an image, m and s^2 their means over the real ones; mean over b.

    After the paper's "mean-variance KL", whose exact form was not seen.
    """
    images, real = images_BCHW.float().flatten(1), real_BCHW.float().flatten(1)
    mean, variance = images.mean(1), images.var(1, unbiased=False).clamp_min(LEAST**2)
    mean_real, variance_real = real.mean(1).mean(), real.var(1, unbiased=False).mean().clamp_min(LEAST**2)
    return 0.5 * ((variance + (mean - mean_real).square()) / variance_real - 1 - (variance / variance_real).log()).mean()


def noise_levels(schedule: str, uniform_B: tuple[Tensor, Tensor], sigma_t_B: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """sigma_DM and sigma_CA [B], uniform in [low, high], or, where the schedule says cleaner, in [low, min(sigma_t, high)].

    Args:
        schedule: one of `SCHEDULES`: 1 coupled (DMD), 2 coupled and cleaner, 3 decoupled, 4 decoupled, augmentation cleaner (the method).
        uniform_B: two draws in [0, 1); coupled schedules use the first for both.
        sigma_t_B: the level of the generator's input.
        low, high: the full range.
    """
    coupled, *cleaner = SCHEDULES[schedule]
    tops = [sigma_t_B.clamp(max=high) if each else torch.full_like(sigma_t_B, high) for each in cleaner]
    draws = (uniform_B[0], uniform_B[0] if coupled else uniform_B[1])
    sigma_DM, sigma_CA = (low + (top - low) * draw for top, draw in zip(tops, draws, strict=True))
    return sigma_DM, sigma_CA
