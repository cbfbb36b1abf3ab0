"""Receptive tokens: learned questions put to a feature map, each answered by a soft mask over its places; and a network seen through them.

Source: MasKD, arXiv 2205.14589.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.masks.features import spatial_masks
from stillhouse.models.taps import layer_of


class ReceptiveTokens(nn.Module):
    """The tokens of one level, and what weighs their masks.

    Args:
        channels: of the level.
        count: how many tokens.
        weighted: learn to weigh the masks of each image; else they count alike.
    """

    def __init__(self, channels: int, count: int, weighted: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(0.01 * torch.randn(count, channels))
        self.weighing: nn.Module | None = None
        if weighted:
            first, last = nn.Conv2d(channels, channels, kernel_size=3, padding=1), nn.Conv2d(channels, count, kernel_size=1)
            self.weighing = nn.Sequential(first, nn.AdaptiveAvgPool2d(1), last, nn.Flatten())
            for convolution in (first, last):
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]

    def masks(self, maps: Tensor) -> Tensor:
        """Of maps [B, C, H, W], in (0, 1): fp32 [B, T, H, W]."""
        return spatial_masks(maps.flatten(2).transpose(1, 2), self.tokens).unflatten(2, maps.shape[-2:])

    def weights(self, maps: Tensor) -> Tensor | None:
        """Of each image's masks, 1 in sum: fp32 [B, T]; None where they count alike."""
        return None if self.weighing is None else self.weighing(maps).float().softmax(1)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The maps times the sum of their (weighted) masks, and the masks."""
        masks, weights = self.masks(maps), self.weights(maps)
        total = masks if weights is None else masks * weights[:, :, None, None]
        return maps * total.sum(1, keepdim=True).to(maps.dtype), masks


class MaskedNetwork(nn.Module):
    """A frozen network whose maps are masked before what follows sees them. Only the tokens are this module's own, to learn and to keep.

    Args:
        network: of any kind; it stays as it is where it is called directly.
        refeed: makes images ready for it.
        names: its modules that return the maps: one of all levels, or one a level.
        tokens: a `ReceptiveTokens` a level.

    Raises:
        UserError: if several modules return several maps each; in a pass, if what they return are no maps.
    """

    def __init__(self, network: nn.Module, refeed: nn.Module, names: list[str], tokens: nn.ModuleList) -> None:
        super().__init__()
        if len(names) not in (1, len(tokens)):
            raise UserError(f"{'+'.join(names)} gives {len(tokens)} maps, expected one map of each module, or all of them of one module")
        self.tokens = tokens
        self.frozen = (network, refeed)  # within a tuple torch does not find them
        self.masking = False
        self.seen: dict[int, Tensor] = {}
        for level, name in enumerate(names):
            layer_of(network, name).register_forward_hook(partial(self._mask, level))

    @contextmanager
    def on(self) -> Iterator[nn.Module]:
        """The network, masked inside; the masks [B, T, H, W] of its last pass are then in `seen`, by level."""
        self.masking, self.seen = True, {}
        try:
            yield self.frozen[0]
        finally:
            self.masking = False

    def forward(self, images: Any) -> Any:
        """What the network answers when it is masked; images come as for the student."""
        with self.on() as network:
            return network(self.frozen[1](images))

    def _mask(self, first: int, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not self.masking:
            return None
        if isinstance(output, Tensor):
            return self._masked(first, output)
        if not isinstance(output, dict):
            return [self._masked(first + number, level) for number, level in enumerate(output)]
        masked = copy.copy(output)
        for number, (key, level) in enumerate(output.items()):
            masked[key] = self._masked(first + number, level)
        return masked

    def _masked(self, level: int, maps: Tensor) -> Tensor:
        if maps.ndim != 4:
            raise UserError(f"what is to be masked has the shape {tuple(maps.shape)}, expected maps [B, C, H, W]; name another place")
        masked, self.seen[level] = self.tokens[level](maps)
        return masked
