"""What the labels alone ask of a student: the terms that every supervised distiller adds its own to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.losses.logits import cross_entropy
from stillhouse.models.detectors import detection_losses
from stillhouse.models.outputs import logits_of

IGNORED = 255
AUXILIARY = 0.4
"""The weight of a segmenter's auxiliary head (PSPNet, arXiv 1612.01105)."""


def label_losses(network: nn.Module, batch: tuple[Any, Any]) -> dict[str, Tensor]:
    """Runs `network` on a batch and returns what its labels say, named and weighted.

    - Class numbers [B] or soft labels [B, K]: `ce`.
    - Masks of class numbers [B, H, W], 255 ignored: `ce` over pixels, and `aux` of an auxiliary head.
    - A list of boxes and labels, an image each: the detector's own terms.
    - Of a network that is there to regress, numbers [B, D]: `mse`, the mean over batch and outputs of the squared difference.
    """
    images, targets = batch
    if isinstance(targets, list):
        return detection_losses(network, images, [without_crowds(target) for target in targets])
    if getattr(network, "stillhouse", {}).get("task") == "regress":  # the targets' shape does not tell them from soft labels
        return {"mse": F.mse_loss(logits_of(network(images)).float(), targets.float())}
    return losses_of(network(images), targets)


def losses_of(output: Any, targets: Tensor) -> dict[str, Tensor]:
    """What labels [B] or [B, K] or masks [B, H, W] say of a network's output: `ce`, and `aux` of a segmenter's auxiliary head."""
    if targets.ndim < 3:
        return {"ce": cross_entropy(logits_of(output), targets)}
    terms = {"ce": pixel_cross_entropy(logits_of(output), targets)}
    if isinstance(output, dict) and "aux" in output:
        terms["aux"] = AUXILIARY * pixel_cross_entropy(output["aux"], targets)
    return terms


def without_crowds(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Boxes and labels of an image, those left out that stand for a crowd: nobody learns from them."""
    crowd = target.get("iscrowd", torch.zeros_like(target["labels"])).bool()
    return {name: target[name][~crowd] for name in ("boxes", "labels")}


def pixel_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over the pixels that count of -log p(class): logits [B, K, h, w] are resized to the masks [B, H, W] (bilinear); fp32.

    0, with gradient, where no pixel counts.
    """
    logits = on_pixels(logits.float(), masks.shape[-2:])
    total = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp(min=1)


def on_pixels(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits [B, K, h, w] on the pixels of a mask, bilinear; unchanged where they are."""
    return logits if logits.shape[-2:] == size else F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
