"""ACAM-KD: student and teacher choose together, at every step, which places and channels of a feature map are worth copying.

At each level the teacher's map asks and the student's answers (cross-attention); on the fused feature M learnable units make soft masks
over places and M over channels; the student copies the teacher's map under these masks, and a Dice term keeps the masks apart. So the
masks follow the student through its training. Nothing of this is left in the student.

Masked: the distillation loss, by soft masks over places and channels that teacher and student make together. No input is masked.
Source: Lan and Tian, "ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation", ICCV 2025, arXiv 2503.06307.

    stillhouse distill --method acam_kd --teacher RUN_OR_SPEC --student torchvision/retinanet:backbone=resnet18 --data coco:DIR

Sure: fusion, units, where Dice and losses stand, M, alpha = lambda = 1. No code is published.
Our reading: the masked loss, whose printed form is ambiguous (`reading`; see losses/masked.py); Dice as a mean over pairs, places and
channels added; each level has its own units, and losses are means over levels; queries and keys without bias; the units' start,
N(0, 0.01^2), from MasKD's code.
Departures, all of them settings (as published: reading b, mask_grad joint, balanced and normalise false; as printed: reading a): masks that
descend the loss vanish, and masks that learn from diversity alone become constant, each open or shut everywhere. By default they ascend a
weighted mean (reading c), on balanced units, and maps are divided by the teacher's size, so that alpha means the same for any network.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Clock, Distiller
from stillhouse.errors import UserError
from stillhouse.losses.masked import dice, map_scale, masked_square
from stillhouse.masks.features import SelectionUnits, correlation, opposed
from stillhouse.models.fusion import CrossAttention
from stillhouse.models.levels import Align, Levels, default_place
from stillhouse.tasks.labels import label_losses

CLOSED, OPEN, ALIKE = 0.05, 0.95, 0.98
SETTLED = 100
"""Steps after which masks, alike when they start, have had time to part."""
CHOICES = {
    "reading": ("a", "b", "c"),
    "mask_grad": ("joint", "detach_student", "detach", "oppose"),
    "masks": ("cooperative", "student_query", "teacher", "fixed"),
}


class ACAMKD(Distiller):
    """L_task + alpha (L_channel + L_spatial) + lambda L_diversity, the latter three as means over the levels.

    Args:
        student: a detector or segmenter.
        teacher: one with as many levels.
        where: what is copied, a role (neck, backbone, logits) or modules joined by +; by default a detector's neck, a segmenter's logits.
        teacher_where: the same in the teacher; by default as `where`.
        units: M, how many masks over places and how many over channels; 0 is the paper's: one a class at the logits, else 6.
        alpha: weight of both masked losses, >= 0.
        diversity: lambda, weight of the Dice term, >= 0.
        reading: of the masked loss: "a" as printed, "b" divided by the mask's sum, "c" a weighted mean.
        mask_grad: what the masked losses do to the masks: "joint", they are minimised over masks and student alike (the paper);
            "detach_student", so, but the student cannot steer masks; "detach", nothing, masks learn from diversity alone;
            "oppose" (ours), masks ascend them, not weighed by alpha, and so seek where the student still differs.
        masks: what they are made from: "cooperative", the teacher asks and the student answers; "student_query", the other way round;
            "teacher", the teacher asks itself; "fixed", units read the teacher's map as it is and learn from diversity alone.
        parts: "both", or masks over places ("spatial") or channels ("channel") only.
        normalise: divide both maps by the root mean square of the teacher's, image by image.
        balanced: standardise what units read, so that masks stay around 1/2 (ours; see masks/features.py).

    Raises:
        UserError: if a setting is out of range, levels do not pair, or in the first forward pass a map is not finite.
    """

    tasks: ClassVar[tuple[str, ...]] = ("detect", "segment")
    off: ClassVar[dict[str, Any]] = {"alpha": 0.0, "diversity": 0.0}

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        where: str = "",
        teacher_where: str = "",
        units: int = 0,
        alpha: float = 1.0,
        diversity: float = 1.0,
        reading: Literal["a", "b", "c"] = "c",
        mask_grad: Literal["joint", "detach_student", "detach", "oppose"] = "oppose",
        masks: Literal["cooperative", "student_query", "teacher", "fixed"] = "cooperative",
        parts: Literal["both", "spatial", "channel"] = "both",
        normalise: bool = True,
        balanced: bool = True,
    ) -> None:
        _check(alpha, diversity, reading=reading, mask_grad=mask_grad, masks=masks)
        super().__init__(student, teacher)
        where = where or default_place(student)
        teacher_where = teacher_where or where
        self.maps_S, self.maps_T = Levels(student, where), Levels(teacher, teacher_where)
        channels = self.maps_T.channels
        self.align = Align(self.maps_S, self.maps_T)
        self.fusion = nn.ModuleList(CrossAttention(each) for each in channels if masks != "fixed")
        units = units or (channels[0] if teacher_where == "logits" else 6)
        self.units = nn.ModuleList(SelectionUnits(each, units, parts=parts, balanced=balanced) for each in channels)
        self.alpha, self.diversity, self.reading, self.normalise = alpha, diversity, reading, normalise
        self.mask_grad, self.made_from = "detach" if masks == "fixed" else mask_grad, masks
        self.checked, self.settled, self.figures = False, False, dict[str, Tensor]()

    def forward(self, batch: tuple[Any, Any], turn: str = "student") -> dict[str, Tensor]:
        """The labels' terms; `channel` and `spatial`, what the student does not copy under the masks; `diversity`, how alike masks are."""
        terms = label_losses(self.student, batch)
        terms_of_levels, figures_of_levels = [], []
        for level, (map_S, map_T) in enumerate(self.pairs(self.maps_S.take(), self.maps_T.of(self.refeed(batch[0])))):
            masks = self.masks(level, map_S, map_T)
            squares = (map_T - map_S).square()
            alike = {part: dice(mask) for part, mask in masks.items()}
            levels_terms = {part: self.alpha * self.copied(squares, part, mask) for part, mask in masks.items()}
            terms_of_levels.append({**levels_terms, "diversity": self.diversity * torch.stack(list(alike.values())).sum()})
            figures_of_levels.append(_figures(squares, masks, alike))
        self.figures = {name: torch.stack([each[name] for each in figures_of_levels]).mean() for name in figures_of_levels[0]}
        return terms | {name: torch.stack([each[name] for each in terms_of_levels]).mean() for name in terms_of_levels[0]}

    def pairs(self, maps_S: list[Tensor], maps_T: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Student's and teacher's map of every level as tokens: fp32 [B, N, C], on the teacher's grid with its channels.

        What is not finite is refused at first sight; later the losses show it, which whoever trains looks at without waiting every step.
        """
        maps_S = self.align(maps_S, maps_T)
        pairs = [(S.flatten(2).mT.float(), T.flatten(2).mT.float()) for S, T in zip(maps_S, maps_T, strict=True)]
        if not self.checked:
            _refuse_unless_finite(pairs)
            self.checked = True
        return [(S / map_scale(T), T / map_scale(T)) for S, T in pairs] if self.normalise else pairs

    def masks(self, level: int, map_S: Tensor, map_T: Tensor) -> dict[str, Tensor]:
        """`channel` [B, M, C] and `spatial` [B, M, N], from maps [B, N, C] (eq. 1-3)."""
        if self.mask_grad != "joint":
            map_S = map_S.detach()
        asking = map_S if self.made_from == "student_query" else map_T
        answering = map_S if self.made_from == "cooperative" else map_T
        masks: dict[str, Tensor] = self.units[level](map_T if self.made_from == "fixed" else self.fusion[level](asking, answering))
        return masks

    def copied(self, squares_BNC: Tensor, part: str, mask: Tensor) -> Tensor:
        """L_channel or L_spatial (eq. 5, 6) of the squared difference, with the gradient masks are to have."""
        if self.mask_grad in ("detach", "oppose"):
            mask = mask.detach() if self.mask_grad == "detach" else opposed(mask, 1 / self.alpha if self.alpha else 0.0)
        return masked_square(squares_BNC.mean(2 if part == "spatial" else 1), mask, self.reading)

    def watch(self) -> dict[str, Tensor]:
        """`mask_mean` and `dice` of both parts; `corr`, the correlation over places of spatial masks and |F_T - F_S|. Means over levels."""
        return self.figures

    def alarm(self, figures: dict[str, float]) -> str:
        """Says when masks have closed, opened or become one: then nothing, or everything alike, is copied."""
        if not self.alpha:
            return ""
        for part in ("spatial", "channel"):
            mean, alike = figures.get(f"mask_mean_{part}", 0.5), figures.get(f"dice_{part}", 0.0)
            if mean < CLOSED:
                return f"the {part} masks have closed (mean {mean:.3f}): nearly nothing of the teacher's maps is copied; try balanced=true"
            if mean > OPEN:
                return f"the {part} masks are wide open (mean {mean:.3f}): they choose nothing any more; try balanced=true"
            if alike > ALIKE and self.settled:
                return f"the {part} masks are all alike (Dice {alike:.3f}): they are one mask; try a larger diversity"
        return ""

    def after_update(self, clock: Clock) -> None:
        """Masks are alike when they start; that is no alarm before half of the training."""
        self.settled = clock.progress >= 0.5 and clock.step >= SETTLED

    @torch.no_grad()
    def look(self, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        """At the finest level: `mask 1`, ... over places and `difference`, |F_T - F_S| up to the image's largest; `channels` [B, M, C]."""
        maps_S, maps_T = self.maps_S.of(batch[0]), self.maps_T.of(self.refeed(batch[0]))
        map_S, map_T = self.pairs(maps_S, maps_T)[0]
        masks, grid = self.masks(0, map_S, map_T), maps_T[0].shape[-2:]
        difference = (map_T - map_S).abs().mean(2)
        difference = (difference / difference.amax(1, keepdim=True).clamp_min(1e-12)).unflatten(1, grid)
        places = masks["spatial"].unflatten(2, grid).unbind(1) if "spatial" in masks else ()
        drawn = {f"mask {number}": place for number, place in enumerate(places, 1)} | {"difference": difference}
        return drawn | ({"channels": masks["channel"]} if "channel" in masks else {})


def _figures(squares_BNC: Tensor, masks: dict[str, Tensor], alike: dict[str, Tensor]) -> dict[str, Tensor]:
    figures = {f"mask_mean_{part}": mask.detach().mean() for part, mask in masks.items()}
    if "spatial" in masks:
        figures["corr"] = correlation(masks["spatial"].detach().mean(1), squares_BNC.detach().mean(2).sqrt())
    return figures | {f"dice_{part}": value.detach() for part, value in alike.items()}


def _refuse_unless_finite(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for level, maps in enumerate(pairs, 1):
        for who, each in zip(("student", "teacher"), maps, strict=True):
            if not each.isfinite().all():
                raise UserError(f"the {who}'s map at level {level} of {len(pairs)} holds values that are not finite; check its weights")


def _check(alpha: float, diversity: float, **chosen: str) -> None:
    if not (0 <= alpha < float("inf") and 0 <= diversity < float("inf")):
        raise UserError(f"alpha is {alpha} and diversity is {diversity}, expected finite weights of at least 0")
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise UserError(f"{name} is '{value}', expected one of {', '.join(CHOICES[name])}")
