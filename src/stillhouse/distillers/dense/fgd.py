"""Focal and global distillation: the detector learns the teacher's maps where objects and the teacher's attention are, and their relations.

Four terms a level. Inside and outside of the labelled boxes, apart: the squared difference of the maps, each object weighing the same
whatever its size, places and channels weighing as the teacher attends to them. The difference of the two networks' attentions. And the
difference of the maps after each has been given its global context by a block of its own, learned along and thrown away afterwards.

Masked: nothing; what is compared is weighted, by the labelled boxes and by the teacher's attention.
Source: Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv 2111.11837.

    stillhouse distill --method fgd --teacher RUN_OR_SPEC --student SPEC --data coco:DIR

Sure, from the official code: all four terms, the blocks and how they begin, and the weights for each kind of detector (its class's own
default of gamma is 0.001, its anchor-based configurations say 0.0005). Where we depart: boxes are brought to the maps by what the maps
cover, the padded batch; the official code takes the image without its padding, which stretches boxes wherever there is padding. Our
reading: temperature 0.5 throughout (the official configuration for FCOS has 0.8); detectors of transformers, which the paper did not have,
count as without anchors. The official detectors also begin with their teacher's neck and head (`--inherit teacher`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.distillers.classics.mgd import kind_of
from stillhouse.errors import UserError
from stillhouse.losses.maps import focal_distances, foreground_scale, spatial_attention, squared_distance
from stillhouse.models.levels import Align, Levels, default_place
from stillhouse.tasks.labels import label_losses, without_crowds

USUAL = {
    "two-stage": (5e-5, 2.5e-5, 5e-5, 5e-7),
    "anchors": (1e-3, 5e-4, 5e-4, 5e-6),
    "anchor-free": (1.6e-3, 8e-4, 8e-4, 8e-6),
}
"""The official alpha, beta, gamma and relation (the paper's lambda), by the kind of detector."""


class FGD(Distiller):
    """L_labels + sum_levels (alpha L_foreground + beta L_background + gamma L_attention + relation L_relation).

    Args:
        student: a detector.
        teacher: a detector with as many levels at the same place; channels need not match.
        where: what is compared: neck, backbone, or module names joined by +; by default the neck.
        teacher_where: the same of the teacher; by default as `where`.
        alpha: weight of the places inside boxes, >= 0; by default 1e-3, 1.6e-3 without anchors, 5e-5 for a two-stage detector.
        beta: weight of the places outside, >= 0; by default 5e-4, 8e-4, 2.5e-5.
        gamma: weight of the attentions, >= 0; by default 5e-4, 8e-4, 5e-5.
        relation: weight of the maps with their context, >= 0; by default 5e-6, 8e-6, 5e-7.
        temperature: of the attentions, > 0; lower attends to fewer places and channels.

    Raises:
        UserError: if a setting is out of range, the student is no detector, a place does not exist, the levels do not pair, or the teacher
            neither has torchvision's `transform` nor is one of transformers'.
    """

    tasks: ClassVar[tuple[str, ...]] = ("detect",)
    off: ClassVar[dict[str, Any]] = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "relation": 0.0}

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        where: str = "",
        teacher_where: str = "",
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        relation: float | None = None,
        temperature: float = 0.5,
    ) -> None:
        kind = kind_of(student)
        if kind == "segmenter":
            raise UserError(f"fgd weighs places by boxes, and {type(student).__name__} is no detector; use cwd, mgd or maskd")
        given = {"alpha": alpha, "beta": beta, "gamma": gamma, "relation": relation}
        weights = {key: usual if value is None else value for (key, value), usual in zip(given.items(), USUAL[kind], strict=True)}
        for key, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"{key} is {weight}, expected the weight of a term, a finite number of at least 0")
        if not 0 < temperature < float("inf"):
            raise UserError(f"temperature is {temperature}, expected a positive finite number, such as 0.5")
        super().__init__(student, teacher)
        self.weights, self.temperature = weights, temperature
        where = where or default_place(student)
        self.maps_S, self.maps_T = Levels(student, where), Levels(teacher, teacher_where or where)
        self.align = Align(self.maps_S, self.maps_T)
        if self.maps_T.frame is None:
            raise UserError(f"fgd cannot see how {type(teacher).__name__} resizes its images; use cwd, mgd or maskd")
        self.context_S = nn.ModuleList(Context(channels) for channels in self.maps_T.channels)
        self.context_T = nn.ModuleList(Context(channels) for channels in self.maps_T.channels)

    def forward(self, batch: tuple[Any, Any], turn: str = "student") -> dict[str, Tensor]:
        """The labels' terms, and `foreground`, `background`, `attention` and `relation`: the maps'."""
        terms = label_losses(self.student, batch)
        maps_S, maps_T = self.maps_S.take(), self.maps_T.of(self.refeed(batch[0]))
        boxes, canvas = self.boxes(batch)
        levels = zip(self.align(maps_S, maps_T), maps_T, self.context_S, self.context_T, strict=True)
        distances = []
        for S, T, in_S, in_T in levels:
            distances.append((*focal_distances(S, T, boxes, canvas, self.temperature), squared_distance(in_S(S), in_T(T))))
        alpha, beta, gamma, relation = (torch.stack(each).sum() for each in zip(*distances, strict=True))
        return {
            **terms,
            "foreground": self.weights["alpha"] * alpha,
            "background": self.weights["beta"] * beta,
            "attention": self.weights["gamma"] * gamma,
            "relation": self.weights["relation"] * relation,
        }

    def boxes(self, batch: tuple[Any, Any]) -> tuple[list[Tensor], tuple[int, int]]:
        """Boxes xyxy [n, 4] of each image as they lie on what the teacher's maps of the last pass cover, and its height and width."""
        frame = self.maps_T.frame
        assert frame is not None
        moved = []
        for image, target, (height, width) in zip(*batch, frame.sizes, strict=True):
            by_y, by_x = height / image.shape[-2], width / image.shape[-1]
            corners = without_crowds(target)["boxes"]
            by = torch.tensor([by_x, by_y, by_x, by_y], dtype=corners.dtype)
            moved.append(corners * by.to(corners.device, non_blocking=True))
        return moved, frame.canvas

    @torch.no_grad()
    def look(self, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        """Maps [B, h, w] of the finest level: `attention`, the teacher's, scaled to [0, 1] within an image; `foreground`, 1 under a box."""
        finest = self.maps_T.of(self.refeed(batch[0]))[0]
        boxes, canvas = self.boxes(batch)
        attention = spatial_attention(finest, self.temperature)
        foreground = foreground_scale(boxes, canvas, (finest.shape[-2], finest.shape[-1])) > 0
        return {"attention": attention / attention.amax((1, 2), keepdim=True), "foreground": foreground.float()}


class Context(nn.Module):
    """A global context block (GCNet, arXiv 1904.11492): adds to every place one vector, made of an attended mean over all places.

    It begins as the identity: the last layer starts at 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 2)
        self.attend = nn.Conv2d(channels, 1, kernel_size=1)
        first, last = nn.Conv2d(channels, inner, kernel_size=1), nn.Conv2d(inner, channels, kernel_size=1)
        self.transform = nn.Sequential(first, nn.LayerNorm([inner, 1, 1]), nn.ReLU(), last)
        nn.init.kaiming_normal_(self.attend.weight, nonlinearity="relu")
        for zero in (self.attend.bias, last.weight, last.bias):
            nn.init.zeros_(zero)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        places = self.attend(maps).flatten(2).softmax(-1)
        return maps + self.transform((maps.flatten(2) @ places.transpose(1, 2).to(maps.dtype)).unsqueeze(-1))
