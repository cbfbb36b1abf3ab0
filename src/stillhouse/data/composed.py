"""Scenes drawn in integers out of a raw bit stream: the same on every machine, whatever the order in which they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]
T = TypeVar("T")


class Composed(Dataset[tuple[Tensor, Any]]):
    """`count` scenes `(image uint8 [3, size, size], target)`, each drawn when it is first asked for and then kept."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: dict[int, tuple[Tensor, Any]] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        if i not in self._kept:
            image, target = self.scene(i)
            self._kept[i] = torch.from_numpy(image).permute(2, 0, 1).contiguous(), target
        return self._kept[i]

    def scene(self, i: int) -> tuple[Bytes, Any]:
        """Scene i: image [size, size, 3] and target."""
        raise NotImplementedError


class Draws:
    """Random integers of a raw bit stream, which numpy promises never to change (what `Generator` makes of it, it may)."""

    def __init__(self, seed: int) -> None:
        self._stream = np.random.PCG64(seed)

    def below(self, n: int) -> int:
        """0 to n - 1."""
        return (self._stream.random_raw() >> 32) * n >> 32

    def bytes(self, n: int) -> Bytes:
        return self._stream.random_raw(n // 8 + 1).astype("<u8").view(np.uint8)[:n]

    def one_of(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]


def noisy(canvas: Ints, noise: int, draws: Draws) -> Bytes:
    """The canvas with up to `noise` grey levels more or less in every value, as uint8."""
    levels = (draws.bytes(canvas.size).reshape(canvas.shape).astype(np.int32) * (2 * noise + 1) >> 8) - noise
    return (canvas + levels).clip(0, 255).astype(np.uint8)
