"""Networks that make images out of noise: the straight path between the two, and how images are drawn along it.

The noise level sigma runs from 1 (noise) to 0 (image): x_sigma = (1 - sigma) x_0 + sigma eps. A network says v = eps - x_0, so that
x_sigma - sigma v is the image it expects (flow matching, arXiv 2210.02747, in diffusers' convention). Papers that count time from noise to
image are converted by `to_sigma`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.randomness import uniform

MANY = 32
"""Steps by which a network is sampled that nobody made fast."""


def to_sigma(time: Any) -> Any:
    """The noise level at a flow time t that is 0 for noise and 1 for images: 1 - t."""
    return 1 - time


def noised(images_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x_0 + sigma eps."""
    sigma = _column(sigma_B, images_BCHW)
    return (1 - sigma) * images_BCHW + sigma * noise_BCHW


def clean(noisy_BCHW: Tensor, velocity_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """The image that a velocity at x_sigma means: x_sigma - sigma v."""
    return noisy_BCHW - _column(sigma_B, noisy_BCHW) * velocity_BCHW


def guided(conditional: Tensor, null: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of velocities or images: null + guidance (conditional - null)."""
    return null + guidance * (conditional - null)


def _column(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Sampling:
    """How images are drawn.

    Args:
        levels: the noise levels at which the network is asked, from 1 down; or their number, then equally far apart.
        guidance: of the classes, at least 1, which is none; above, each step asks the network twice.
        renoise: each step jumps to the image and adds fresh noise up to the next level, as a network of few steps learns it (arXiv
            2303.01469); else it follows the velocity to the next level (Euler).

    Raises:
        UserError: if levels do not fall from 1 to above 0, or the guidance is below 1.
    """

    levels: tuple[float, ...] | int = MANY
    guidance: float = 1.0
    renoise: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.levels, int):
            if self.levels < 1:
                raise UserError(f"levels is {self.levels}, expected at least one step")
            object.__setattr__(self, "levels", tuple(1 - step / self.levels for step in range(self.levels)))
        levels = tuple(float(level) for level in self.levels)  # type: ignore[union-attr]
        object.__setattr__(self, "levels", levels)
        if not levels or levels[0] != 1 or any(a <= b for a, b in zip(levels, (*levels[1:], 0.0), strict=True)):
            raise UserError(f"the noise levels are {levels}, expected to fall from 1 step by step and to end above 0, as in (1, 0.5)")
        if not 1 <= self.guidance < float("inf"):
            raise UserError(f"guidance is {self.guidance}, expected a finite number of at least 1 (none)")

    @property
    def steps(self) -> tuple[float, ...]:
        """The levels, as numbers."""
        assert isinstance(self.levels, tuple)
        return self.levels

    @property
    def options(self) -> dict[str, Any]:
        """What a network's spec says of it: equally spaced levels by their number."""
        equal = self.steps == Sampling(len(self.steps)).steps
        return {"levels": len(self.steps) if equal else self.steps, "guidance": self.guidance, "renoise": self.renoise}


class Draws:
    """Random numbers for each sample of a batch, so many in all: a function of (seed, step, sample) in a training, whatever its batches.

    Args:
        rows: samples.
        columns: numbers that will be taken for each.
        device: where.
        skip: leave out so many of each sample's first, which somebody else takes at the same step.
    """

    def __init__(self, rows: int, columns: int, device: torch.device, skip: int = 0) -> None:
        self.rows, self.at = rows, skip
        self.table = uniform(rows, skip + columns, device)

    def uniform(self) -> Tensor:
        """[rows] in [0, 1)."""
        return self._take(1)[:, 0]

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """[rows, *shape], standard normal."""
        flat = self._take(torch.Size(shape).numel())
        return normal_of(flat).view(self.rows, *shape)

    def _take(self, count: int) -> Tensor:
        if self.at + count > self.table.shape[1]:
            raise ValueError(f"{self.at + count} numbers a sample are taken of {self.table.shape[1]}")
        self.at += count
        return self.table[:, self.at - count : self.at]


def normal_of(uniform: Tensor) -> Tensor:
    """Standard normal numbers of fp32 numbers k / 2^24 in [0, 1): half a step is added, as 0 and 1 have none; all sums are exact."""
    return (2 * uniform - 1 + 2**-24).erfinv().mul(2**0.5)


class FlowNetwork(nn.Module):
    """A velocity of images given their class, and how images are drawn with it.

    Args:
        body: any module, `body(x [B, C, H, W], sigma [B], labels [B]) -> v [B, C, H, W]`.
        shape: (C, H, W) of an image.
        classes: their number.
        null: whether `body` also takes the label `classes`, for "of any class".
        sampling: how images are drawn.

    Raises:
        UserError: if guidance is asked of a network that knows no null condition.
    """

    sampling: Sampling

    def __init__(
        self, body: nn.Module, shape: tuple[int, int, int], classes: int, *, null: bool = True, sampling: Sampling | None = None
    ) -> None:
        super().__init__()
        self.body, self.shape, self.classes = body, tuple(shape), classes
        self.null = classes if null else None
        self.set_sampling(sampling or Sampling())

    def set_sampling(self, sampling: Sampling) -> None:
        """From now on images are drawn so; where the network is saved, it is written down."""
        if sampling.guidance != 1 and self.null is None:
            raise UserError(f"guidance is {sampling.guidance}, but the network knows no null condition; sample it with guidance=1")
        self.sampling = sampling
        info = getattr(self, "stillhouse", None)
        if info is not None:
            self.stillhouse = {**info, "options": {**info["options"], **sampling.options}}

    def forward(self, x: Tensor, sigma: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """v [B, C, H, W]. By default at sigma = 1, of any class (or of the first, where there is no null condition)."""
        sigma = x.new_ones(len(x)) if sigma is None else sigma
        labels = torch.full((len(x),), self.null or 0, device=x.device) if labels is None else labels
        return self.body(x, sigma, labels)

    def expected(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """The image x_0 that the network expects behind x_sigma; `None` for an image of any class."""
        return clean(x, self(x, sigma, labels), sigma)

    def velocity(self, x: Tensor, sigma: Tensor, labels: Tensor, guidance: float) -> Tensor:
        """v with guidance; without it the network is asked once."""
        if guidance == 1:
            return self(x, sigma, labels)
        assert self.null is not None
        both = self(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([labels, torch.full_like(labels, self.null)]))
        conditional, null = both.chunk(2)
        return guided(conditional, null, guidance)

    @torch.no_grad()
    def sample(self, labels: Tensor, noise: Tensor | None = None, sampling: Sampling | None = None) -> Tensor:
        """Images [B, C, H, W] of these classes [B].

        Args:
            labels: class numbers, on the network's device.
            noise: standard normal [N, B, C, H, W]: N = 1, or one for each level where noise is added anew; drawn if None.
            sampling: another way than the network's own.
        """
        how = sampling or self.sampling
        levels, count = how.steps, len(how.steps) if how.renoise else 1
        if noise is None:
            draws = Draws(len(labels), count * torch.Size(self.shape).numel(), labels.device)
            noise = torch.stack([draws.normal(self.shape) for _ in range(count)])
        x = noise[0]
        for number, (level, below) in enumerate(zip(levels, (*levels[1:], 0.0), strict=True), 1):
            sigma = x.new_full((len(x),), level)
            v = self.velocity(x, sigma, labels, how.guidance)
            if not how.renoise:
                x = x + (below - level) * v
            else:
                x = clean(x, v, sigma)
                x = x if number == len(levels) else noised(x, noise[number], x.new_full((len(x),), below))
        return x
