"""Masked generative distillation: from its map with random places hidden, the student has to make the teacher's whole map.

In every step each place of the student's map is hidden with the same probability, in all channels at once; of what is left a small
generation block (two 3x3 convolutions, learned along and thrown away afterwards) makes a whole map, whose squared error counts.

Masked: the student's own maps, at random; a different choice for every image, level and step, as a function of the seed.
Source: Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv 2205.01529.

    stillhouse distill --method mgd --teacher RUN_OR_SPEC --student SPEC --data coco:DIR

Sure, from paper and code: the mask, the block, the loss (a sum over channels and places, so that its weight is small) and the weights and
shares for one-stage detectors, two-stage detectors and segmenters. Our reading: segmenters are compared at their logits, as by the other
methods here; the official code takes the backbone's last map (`--where backbone.layer4` of a residual network) and adds channel-wise
distillation of the logits, which is a method of its own here. The official one-stage detectors also begin with their teacher's neck and
head (`--inherit teacher`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS

from stillhouse.distillers.base import Distiller
from stillhouse.errors import UserError
from stillhouse.losses.maps import squared_distance
from stillhouse.masks.tokens import random_scores
from stillhouse.models.detectors import is_detector
from stillhouse.models.levels import Align, Levels, default_place
from stillhouse.tasks.labels import label_losses

USUAL = {"two-stage": (5e-7, 0.45), "anchors": (2e-5, 0.65), "anchor-free": (2e-5, 0.65), "segmenter": (2e-5, 0.75)}
"""The official weight of the loss and share of hidden places, by the kind of network."""


class MGD(Distiller):
    """L_labels + alpha sum_levels |G(S * visible) - T|^2, with G learned along.

    Args:
        student: a detector or segmenter.
        teacher: a network with as many levels at the same place; channels need not match.
        where: what is compared: neck, backbone, logits, or module names joined by +; by default a detector's neck, a segmenter's logits.
        teacher_where: the same of the teacher; by default as `where`.
        alpha: weight of the generated maps, >= 0; by default 2e-5, for a two-stage detector 5e-7.
        masked: the share of hidden places, in [0, 1]; by default 0.65 for a one-stage detector, 0.45 for a two-stage one, 0.75 for a
            segmenter.

    Raises:
        UserError: if a setting is out of range, a place does not exist, or the levels do not pair.
    """

    tasks: ClassVar[tuple[str, ...]] = ("detect", "segment")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        where: str = "",
        teacher_where: str = "",
        alpha: float | None = None,
        masked: float | None = None,
    ) -> None:
        usual = USUAL[kind_of(student)]
        alpha, masked = usual[0] if alpha is None else alpha, usual[1] if masked is None else masked
        if not 0 <= alpha < float("inf"):
            raise UserError(f"alpha is {alpha}, expected the weight of the generated maps, a finite number of at least 0")
        if not 0 <= masked <= 1:
            raise UserError(f"masked is {masked}, expected the share of hidden places in [0, 1], such as 0.65")
        super().__init__(student, teacher)
        self.alpha, self.masked = alpha, masked
        where = where or default_place(student)
        self.maps_S, self.maps_T = Levels(student, where), Levels(teacher, teacher_where or where)
        self.align = Align(self.maps_S, self.maps_T)
        self.generation = nn.ModuleList(generation(channels) for channels in self.maps_T.channels)

    def forward(self, batch: tuple[Any, Any], turn: str = "student") -> dict[str, Tensor]:
        """The labels' terms, and `mgd`: the generated maps'."""
        terms = label_losses(self.student, batch)
        maps_S = self.maps_S.take()
        maps_T = self.maps_T.of(self.refeed(batch[0]))
        levels = zip(self.generation, self.align(maps_S, maps_T), visible(maps_T, self.masked), maps_T, strict=True)
        distances = [squared_distance(generate(S * shown), T) for generate, S, shown, T in levels]
        return {**terms, "mgd": self.alpha * torch.stack(distances).sum()}

    @torch.no_grad()
    def look(self, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        """`visible` [B, h, w]: 1 where a place of the finest level was left to generate from."""
        finest = self.maps_T.of(self.refeed(batch[0]))[:1]
        return {"visible": visible(finest, self.masked)[0].squeeze(1)}


def generation(channels: int) -> nn.Sequential:
    """What makes a map out of a masked one, of as many channels."""
    first, second = (nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second)


def visible(maps: list[Tensor], masked: float) -> list[Tensor]:
    """1.0 at the places of each level [B, C, H, W] that are not hidden, 0.0 at a share `masked` of them: fp32 [B, 1, H, W].

    One draw for all levels, as draws of the same sample and step are the same numbers.
    """
    sizes = [level.shape[-2:].numel() for level in maps]
    scores = random_scores(maps[0].shape[0], sum(sizes), maps[0].device).split(sizes, dim=1)
    return [(row < 1 - masked).float().view(-1, 1, *level.shape[-2:]) for row, level in zip(scores, maps, strict=True)]


def kind_of(network: nn.Module) -> Literal["two-stage", "anchors", "anchor-free", "segmenter"]:
    """What the official weights depend on: whether a detector refines regions, starts from anchors, or neither; else a segmenter."""
    if not is_detector(network):
        return "segmenter"
    if hasattr(network, "roi_heads"):
        return "two-stage"
    # torchvision's FCOS calls its points anchors
    return "anchors" if hasattr(network, "anchor_generator") and not isinstance(network, FCOS) else "anchor-free"
