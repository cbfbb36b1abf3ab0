"""A class has one colour, in every picture and in the legend."""

from __future__ import annotations

import colorsys

from torch import Tensor

BACKGROUND = ("background", "__background__", "_background_", "unlabeled")
"""What data sets call the class of what is no object; it is not painted."""


def colours(count: int) -> list[tuple[int, int, int]]:
    """RGB colours in 0..255, the first ones as different as can be: hues a golden section apart, by turns strong, light and dark."""
    bright = [(0.9, 1.0), (0.6, 1.0), (1.0, 0.8)]
    shares = [colorsys.hsv_to_rgb((0.07 + 0.618034 * i) % 1, *bright[i % len(bright)]) for i in range(count)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in shares]


def as_rgb(images: Tensor) -> Tensor:
    """Images uint8 [n, C, H, W] with three channels; other than three become their mean, in grey."""
    return images if images.shape[1] == 3 else images.float().mean(1, keepdim=True).round().byte().expand(-1, 3, -1, -1)
