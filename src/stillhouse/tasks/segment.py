"""Semantic segmentation: what is measured over a pass, and how it is drawn."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_segmentation_masks

from stillhouse.errors import UserError
from stillhouse.models.outputs import logits_of
from stillhouse.tasks.base import Task
from stillhouse.tasks.colours import BACKGROUND, as_rgb, colours

IGNORED = 255
"""The value of a pixel of which nothing is known."""


class Segment(Task):
    """Intersection over union of a student's masks with the true ones, and how the student compares with its teacher.

    Its state is the counts of pixels by true class and guess, [K, K]: it does not grow with the data, and processes with different
    numbers of batches agree. Logits are resized (bilinear) to the masks, in fp32; `update` does not wait for the device.

    Args:
        classes: the names of the values 0..K-1 of a mask, at least two.
        sync_on_compute: as for `Task`.

    Raises:
        UserError: if there are fewer.
    """

    headline: ClassVar[str] = "miou"
    titles: ClassVar[dict[str, str]] = {"miou": "mIoU", "accuracy": "pixel accuracy", "agreement": "agrees with teacher"}
    per_class: ClassVar[str] = "IoU"
    least_classes: ClassVar[int] = 2

    pixels: Tensor
    teacher_pixels: Tensor
    agreement: Tensor
    unknown: Tensor

    def __init__(self, classes: list[str], *, sync_on_compute: bool = True) -> None:
        super().__init__(classes, sync_on_compute=sync_on_compute)
        count = len(classes)
        self.add_state("pixels", torch.zeros(count, count, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("teacher_pixels", torch.zeros(count, count, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("agreement", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("unknown", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Any, targets: Tensor, teacher_output: Any = None) -> None:
        """Add a batch: outputs with logits [B, K, h, w] and masks [B, H, W] of 0..K-1, 255 where a pixel does not count.

        Raises:
            UserError: if the shapes do not meet.
        """
        truth = targets.long()
        counts = (truth >= 0) & (truth < len(self.classes))
        self.unknown += (~counts & (truth != IGNORED)).sum()
        guess = self._guess("student", output, truth)
        self.pixels += self._confusion(truth, guess, counts)
        if teacher_output is not None:
            teacher_guess = self._guess("teacher", teacher_output, truth)
            self.teacher_pixels += self._confusion(truth, teacher_guess, counts)
            self.agreement += ((guess == teacher_guess) & counts).sum()

    def compute(self) -> dict[str, float]:
        """Shares in [0, 1] of the pixels that count, over all images together.

        `miou`: the mean over classes of intersection over union; a class that is neither in the truth nor in the answers has none and is
        left out of the mean. `accuracy`: pixels that are right. `iou/NAME` of each class. With a teacher `agreement` (pixels where both
        answer the same) and `teacher_miou`.

        Raises:
            UserError: if no pixel counts, or a mask has a value that is no class.
        """
        if int(self.unknown):
            raise UserError(
                f"{int(self.unknown)} pixels of the validation masks are neither one of the {len(self.classes)} classes nor {IGNORED}; "
                f"make them {IGNORED} to ignore them"
            )
        total = int(self.pixels.sum())
        if not total:
            raise UserError("nothing was measured: the validation masks have no pixel that counts")
        iou = _iou(self.pixels)
        result = {"miou": float(iou.nanmean()), "accuracy": int(self.pixels.trace()) / total}
        compared = int(self.teacher_pixels.sum())
        if compared:
            result |= {"agreement": int(self.agreement) / compared, "teacher_miou": float(_iou(self.teacher_pixels).nanmean())}
        return result | {f"iou/{name}": value for name, value in zip(self.classes, iou.tolist(), strict=True) if value == value}

    @property
    def chance(self) -> float:
        """The mIoU of answering the most frequent class everywhere."""
        truth = self.pixels.cpu().sum(1).double()
        return float(truth.max() / truth.sum() / (truth > 0).sum()) if truth.sum() else 0.0

    @staticmethod
    def draw(images: Tensor, what: Any, classes: list[str], score: float = 0.3) -> Tensor:
        """Each class's pixels in its colour over the images uint8 [n, C, H, W]; background and what does not count stay as they are.

        Args:
            images: the pictures.
            what: masks [n, H, W] of whole numbers, or a network's output with logits [n, K, h, w].
            classes: the names of the values.
            score: not used: every pixel has its class.
        """
        is_mask = isinstance(what, Tensor) and what.dim() == 3 and not what.is_floating_point()
        masks = what.long() if is_mask else _resized(logits_of(what), images.shape[-2:]).argmax(1)
        painted = [number for number, name in enumerate(classes) if name.lower() not in BACKGROUND]
        palette = colours(len(classes))
        drawn = []
        for image, mask in zip(as_rgb(images.cpu()), masks.cpu(), strict=True):
            here = [number for number in painted if (mask == number).any()]
            if here:
                each = torch.stack([mask == number for number in here])
                image = draw_segmentation_masks(image, each, alpha=0.6, colors=[palette[number] for number in here])
            drawn.append(image)
        return torch.stack(drawn)

    def _guess(self, role: str, output: Any, truth: Tensor) -> Tensor:
        logits = logits_of(output)
        if logits.dim() != 4 or logits.shape[:2] != (len(truth), len(self.classes)):
            expected = f"({len(truth)}, {len(self.classes)}, height, width)"
            raise UserError(f"the {role}'s logits have the shape {tuple(logits.shape)}, expected {expected}")
        return _resized(logits.detach(), truth.shape[-2:]).argmax(1)

    def _confusion(self, truth: Tensor, guess: Tensor, counts: Tensor) -> Tensor:
        """Pixels by (true class, guess), [K, K]. Those that do not count go to the first place, as nothing."""
        count = len(self.classes)
        place = torch.where(counts, truth * count + guess, 0).flatten()
        return truth.new_zeros(count * count).scatter_add_(0, place, counts.long().flatten()).view(count, count)


def _iou(pixels: Tensor) -> Tensor:
    """Intersection over union [K] of counts [K, K]; NaN for a class that is nowhere."""
    pixels = pixels.cpu()
    together = pixels.diagonal()
    return together.double() / (pixels.sum(0) + pixels.sum(1) - together)


def _resized(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    logits = logits.float()
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
