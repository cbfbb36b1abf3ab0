"""How a network wants its images (mean, std, side, interpolation), and feeding a teacher images made ready for the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.errors import UserError

_INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class Preprocessing:
    """What was done to the images that a network was trained on.

    Args:
        mean, std: one value a channel, for pixels in [0, 1]; std > 0.
        size: side of the square image in pixels, None if any will do.
        interpolation: `"bicubic"` or `"bilinear"`, always antialiased.

    Raises:
        UserError: if one of them is out of range, or mean and std have different lengths.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        if len(self.mean) != len(self.std) or not self.mean:
            raise UserError(f"mean has {len(self.mean)} values and std {len(self.std)}, expected one of each a channel")
        if not all(0 < value < float("inf") for value in self.std):
            raise UserError(f"std is {self.std}, expected positive finite values")
        if self.size is not None and self.size < 1:
            raise UserError(f"image size is {self.size}, expected at least one pixel")
        if self.interpolation not in _INTERPOLATIONS:
            raise UserError(f"interpolation is '{self.interpolation}', expected one of {', '.join(_INTERPOLATIONS)}")


def preprocessing_of(model: nn.Module) -> Preprocessing | None:
    """What the network's weights were trained with: `model.preprocessing` if it was set, else what timm knows, else None.

    For a network with random weights timm tells what its published weights would want.
    """
    known = getattr(model, "preprocessing", None)
    if isinstance(known, Preprocessing):
        return known
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or "mean" not in cfg:
        return None
    channels, height, width = cfg["input_size"]
    height, width = _built_size(model) or (height, width)
    channels = getattr(model, "in_chans", channels)
    interpolation = cfg.get("interpolation", "bicubic")
    return Preprocessing(
        mean=_for_channels(cfg["mean"], channels),
        std=_for_channels(cfg["std"], channels),
        size=height if height == width else None,
        interpolation=interpolation if interpolation in _INTERPOLATIONS else "bicubic",
    )


def _built_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width in pixels of a timm network built for one size."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return (size[0], size[1]) if isinstance(size, (tuple, list)) and len(size) == 2 else None


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A value a channel; published values for other channels are averaged, as timm does when it adapts the first layer."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def set_preprocessing(model: nn.Module, preprocessing: Preprocessing) -> None:
    """Remember on the network what it is trained with; a timm network also carries it in `pretrained_cfg`, so that it is exported."""
    model.preprocessing = preprocessing  # type: ignore[assignment]
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict):
        return
    told = {"mean": preprocessing.mean, "std": preprocessing.std, "interpolation": preprocessing.interpolation}
    if preprocessing.size is not None:
        told["input_size"] = (len(preprocessing.mean), preprocessing.size, preprocessing.size)
    model.pretrained_cfg = model.default_cfg = {**cfg, **told}  # type: ignore[assignment]


class Refeed(nn.Module):
    """Images made ready for the student -> images as the teacher wants them: one resize (if the side differs) and one affine map a channel.

    With s the student's and t the teacher's preprocessing: `((x * std_s + mean_s) - mean_t) / std_t`, folded into `x * scale + shift`.
    Where nothing differs the very same tensor is returned; an unknown (None) preprocessing on either side leaves the images alone.

    Args:
        student, teacher: theirs.
        keep_shape: the images need not be square, their shorter side is the student's size (before they are padded to a batch), and the
            teacher gets them of the same shape: for segmenters. Else what differs from the teacher's square is made square.

    Raises:
        UserError: if student and teacher see a different number of channels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, student: Preprocessing | None, teacher: Preprocessing | None, *, keep_shape: bool = False) -> None:
        super().__init__()
        self.size: int | None = None
        self.of_student: int | None = None
        self.keep_shape = keep_shape
        self.interpolation = "bicubic"
        self.affine = False
        if student is None or teacher is None:
            return
        if len(student.mean) != len(teacher.mean):
            raise UserError(
                f"the teacher sees {len(teacher.mean)} channel(s) and the student {len(student.mean)}, "
                "expected the same number; build one of them for the other's channels (option in_chans)"
            )
        self.size, self.interpolation, self.of_student = teacher.size, teacher.interpolation, student.size
        self.affine = (student.mean, student.std) != (teacher.mean, teacher.std)
        if self.affine:
            mean_s, std_s = _column(student.mean), _column(student.std)
            mean_t, std_t = _column(teacher.mean), _column(teacher.std)
            self.register_buffer("scale", (std_s / std_t).float(), persistent=False)
            self.register_buffer("shift", ((mean_s - mean_t) / std_t).float(), persistent=False)

    def forward(self, images: Any) -> Any:
        """[B, C, H, W] -> [B, C, size, size], or of the images' shape, of the same dtype (computed in fp32).

        A detector's list of images is made ready image by image.
        """
        if isinstance(images, (list, tuple)):
            return [self.feed(image[None])[0] for image in images]
        return self.feed(images)

    def feed(self, images: Tensor) -> Tensor:
        """The images of one tensor."""
        fed = images
        wanted = self.wanted(*images.shape[-2:])
        if images.shape[-2:] != wanted:
            fed = F.interpolate(images.float(), wanted, mode=self.interpolation, antialias=True)
        if self.affine:
            fed = fed * self.scale + self.shift
        return fed.to(images.dtype)

    def wanted(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that the teacher gets images of this size in."""
        if self.size is None:
            return height, width
        if not self.keep_shape:
            return self.size, self.size
        share = self.size / (self.of_student or min(height, width))
        return round(height * share), round(width * share)


def _column(values: tuple[float, ...]) -> Tensor:
    """[C, 1, 1] in fp64, so that folding rounds once."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
