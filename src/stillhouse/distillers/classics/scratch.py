"""Labels only: no teacher. The baseline every distillation must beat, and how a user trains a teacher on their own data.

    stillhouse distill --method scratch --student timm/vit_small_patch16_224 --data imagefolder:DIR

Masked: nothing. No paper is needed.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.tasks.labels import label_losses


class Scratch(Distiller):
    """Plain training with the labels: class numbers or soft labels, masks, boxes, or numbers to answer.

    Args:
        student: a classifier, images [B, C, H, W] to logits [B, K]; a segmenter, to [B, K, h, w]; a detector as torchvision's; or a network
            that answers D numbers, to [B, D].
    """

    tasks: ClassVar[tuple[str, ...]] = ("classify", "detect", "segment", "regress")
    inputs: ClassVar[tuple[str, ...]] = ("images", "graphs")
    off: ClassVar[dict[str, Any]] = {}

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)

    def forward(self, batch: tuple[Any, Any], turn: str = "student") -> dict[str, Tensor]:
        """`ce`: the cross-entropy; for a detector its own terms; `mse`: the squared error of numbers."""
        return label_losses(self.student, batch)
