"""Networks that make images, without diffusers: what a `FlowNetwork` needs of its body, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.models.sampling import FlowNetwork
from tests.conftest import CLASSES, scrambled

SHAPE = (3, 8, 8)


class Velocity(nn.Module):
    """Any module that takes x [B, C, H, W], sigma [B] and labels [B] to a velocity like x."""

    def __init__(self, shape: tuple[int, int, int], labels: int, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(shape[0], width, 3, padding=1), nn.Conv2d(width, shape[0], 3, padding=1)
        self.label, self.level = nn.Embedding(labels, width), nn.Linear(1, width)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        about = self.label(labels) + self.level(sigma.to(x.dtype)[:, None])
        return self.last(nn.functional.silu(self.first(x) + about[:, :, None, None]))


def tiny_generator(seed: int = 0, width: int = 8, null: bool = True, shape: tuple[int, int, int] = SHAPE) -> FlowNetwork:
    network = scrambled(lambda: FlowNetwork(Velocity(shape, CLASSES + null, width), shape, CLASSES, null=null), seed)
    assert isinstance(network, FlowNetwork)
    return network


class Gaussians(nn.Module):
    """The exact velocity where images of class c are N(mu_c, variance_c), value by value: with x_sigma = a x_0 + sigma eps, a = 1 - sigma,

    E[x_0 | x] = mu + a variance (x - a mu) / (a^2 variance + sigma^2), and v = (x - E[x_0 | x]) / sigma.
    """

    def __init__(self, means: Tensor, variances: Tensor) -> None:
        super().__init__()
        self.means, self.variances = nn.Parameter(means.double()), nn.Parameter(variances.double())

    def expected(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        mean, variance, sigma = (each.view(-1, 1, 1, 1) for each in (self.means[labels], self.variances[labels], sigma.double()))
        scale = 1 - sigma
        return mean + scale * variance * (x - scale * mean) / (scale.square() * variance + sigma.square())

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return (x - self.expected(x, sigma, labels)) / sigma.double().view(-1, 1, 1, 1)


def gaussians(means: list[float], variances: list[float], shape: tuple[int, int, int] = (1, 2, 2)) -> FlowNetwork:
    """An oracle; the last mean and variance are those of the null condition."""
    return FlowNetwork(Gaussians(torch.tensor(means), torch.tensor(variances)), shape, len(means) - 1)
