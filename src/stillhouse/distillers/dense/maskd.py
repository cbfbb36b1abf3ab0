"""Masked distillation with receptive tokens: the teacher first learns where its maps matter, then the student learns them there.

First stage, the teacher alone and frozen: a few learned tokens a level make soft masks over places (the sigmoid of a place's dot product
with a token); under the masks the teacher has to keep its own task loss, while a Dice term keeps the masks from being alike. Second stage:
the tokens are frozen, and the student's map is compared with the teacher's under each mask; after a while only where the student's own map,
asked by the same tokens, agrees. For detectors a small network, learned with the tokens, weighs the masks of each image.

Masked: both networks' maps, by tokens that the teacher has learned; later by those and the student's map together.
Source: Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023, arXiv 2205.14589.

    stillhouse distill --method maskd --teacher RUN_OR_SPEC --student SPEC --data coco:DIR

Sure, from paper and code: both stages' losses, the tokens, their weighting for detectors and its absence for segmenters, the weights. Where
we depart: masks are not laid over maps one by one, which gives the same numbers in less memory; the teacher stays in eval mode in both
stages (the official segmentation code lets its batch statistics drift in the first); a segmenter's auxiliary head and the boxes a
detector's head predicts, which the official code distils too, are left alone; the official RetinaNet also begins with its teacher's neck
and head (`--inherit teacher`). Our reading: the first stage takes a share of the epochs on top of them (officially 2000 to 180000 steps for
detectors, 10000 to 40000 for segmenters), with the run's own optimiser and learning rate (officially Adam at 0.01, SGD at 0.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Clock, Distiller, Stage, Turn
from stillhouse.distillers.classics.mgd import kind_of
from stillhouse.errors import UserError
from stillhouse.losses.maps import token_distance
from stillhouse.losses.masked import dice
from stillhouse.masks.receptive import MaskedNetwork, ReceptiveTokens
from stillhouse.models.detectors import is_detector
from stillhouse.models.levels import Align, Levels, default_place
from stillhouse.tasks.labels import label_losses

USUAL = {"two-stage": (1.0, 6, 0.04), "anchors": (7.0, 6, 0.04), "anchor-free": (10.0, 6, 0.04), "segmenter": (0.5, 8, 1.0)}
"""The official weight of the loss, tokens a level, and share of the training after which the student's masks join in, by the kind."""


class MasKD(Distiller):
    """L_labels + alpha sum_levels sum_t w_t / C sum_c |m_t (S_c - T_c)|^2 / |m_t|: the second stage; the first is `TokenLearning`.

    Args:
        student: a detector or segmenter.
        teacher: a network with as many levels at the same place; channels need not match.
        where: what is masked: neck, backbone, logits, or module names joined by +; by default a detector's neck, a segmenter's logits.
        teacher_where: the same of the teacher; by default as `where`.
        alpha: weight of the masked maps, >= 0; by default 7, without anchors 10, for a two-stage detector 1, for a segmenter 0.5.
        tokens: how many masks a level has; by default 6 for a detector, 8 for a segmenter.
        own_from: the share of the training after which the student's own masks join in, in [0, 1]; by default 0.04 for a detector, and
            1, never, for a segmenter.
        token_share: how long the tokens learn first, as a share of the epochs and on top of them, in (0, 1]; at least one epoch.

    Raises:
        UserError: if a setting is out of range, a place does not exist, or the levels do not pair.
    """

    frozen: ClassVar[tuple[str, ...]] = ("teacher", "tokens")
    tasks: ClassVar[tuple[str, ...]] = ("detect", "segment")
    tokens: Any

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        where: str = "",
        teacher_where: str = "",
        alpha: float | None = None,
        tokens: int | None = None,
        own_from: float | None = None,
        token_share: float = 0.1,
    ) -> None:
        usual, detects = USUAL[kind_of(student)], is_detector(student)
        alpha, own_from = usual[0] if alpha is None else alpha, usual[2] if own_from is None else own_from
        tokens = usual[1] if tokens is None else tokens
        if not 0 <= alpha < float("inf"):
            raise UserError(f"alpha is {alpha}, expected the weight of the masked maps, a finite number of at least 0")
        if not 0 <= own_from <= 1 or not 0 < token_share <= 1:
            raise UserError(f"own_from is {own_from} and token_share {token_share}, expected shares of the training in [0, 1] and (0, 1]")
        if tokens < 1:
            raise UserError(f"tokens is {tokens}, expected how many masks a level has, at least 1")
        super().__init__(student, teacher)
        self.alpha, self.own_from, self.token_share, self.progress = alpha, own_from, token_share, 0.0
        where = where or default_place(student)
        self.maps_S, self.maps_T = Levels(student, where), Levels(teacher, teacher_where or where)
        self.align = Align(self.maps_S, self.maps_T, always=detects)
        self.tokens = nn.ModuleList(ReceptiveTokens(channels, tokens, detects) for channels in self.maps_T.channels).requires_grad_(False)
        self.seen: dict[str, Tensor] = {}

    @classmethod
    def stages(cls, student: nn.Module, teacher: nn.Module | None, epochs: int, **settings: Any) -> Iterator[Stage]:
        """`tokens`, where they learn and the student does not; then the student's, with the full number of epochs."""
        assert teacher is not None
        second = cls(student, teacher, **settings)
        learning, mode = [parameter for parameter in student.parameters() if parameter.requires_grad], student.training
        yield Stage("tokens", TokenLearning(student, teacher, second), max(1, round(second.token_share * epochs)))
        second.tokens.requires_grad_(False)
        student.train(mode)
        for parameter in learning:
            parameter.requires_grad_(True)
        yield Stage("", second, epochs)

    def forward(self, batch: tuple[Any, Any], turn: str = "student") -> dict[str, Tensor]:
        """The labels' terms, and `maskd`: the masked maps'."""
        terms = label_losses(self.student, batch)
        maps_S = self.maps_S.take()
        maps_T = self.maps_T.of(self.refeed(batch[0]))
        distances, sizes = [], []
        for tokens, S, T in zip(self.tokens, self.align(maps_S, maps_T), maps_T, strict=True):
            masks = tokens.masks(T)
            if self.progress >= self.own_from:
                masks = masks * tokens.masks(S.detach())
            distances.append(token_distance(S, T, masks, tokens.weights(T)))
            sizes.append(masks.mean())
        self.seen = {"mask_mean": torch.stack(sizes).mean()}
        return {**terms, "maskd": self.alpha * torch.stack(distances).sum()}

    def after_update(self, clock: Clock) -> None:
        """The student's own masks join in by the training's progress."""
        self.progress = clock.progress

    def get_extra_state(self) -> Tensor:
        """How far the training is, for checkpoints."""
        return torch.tensor(self.progress, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes up where a checkpoint left."""
        self.progress = float(state)

    def watch(self) -> dict[str, Tensor]:
        """`mask_mean`: the mean of all masks, in (0, 1)."""
        return self.seen

    def look(self, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        """`mask 1`, `mask 2`, ... [B, h, w]: the teacher's masks on the finest level."""
        return _drawn(self.tokens, self.maps_T.of(self.refeed(batch[0])))


class TokenLearning(Distiller):
    """The first stage: L_task of the frozen teacher under its masks + sum_levels Dice. The student is there for its images, and rests.

    Args:
        student: as for `MasKD`; its parameters are set to require no gradient.
        teacher: likewise.
        second: the second stage, whose tokens learn here.
    """

    frozen: ClassVar[tuple[str, ...]] = ("teacher", "student")

    def __init__(self, student: nn.Module, teacher: nn.Module, second: MasKD) -> None:
        super().__init__(student.requires_grad_(False), teacher)
        self.maps_T = second.maps_T
        self.masked = MaskedNetwork(teacher, self.refeed, self.maps_T.names, second.tokens.requires_grad_(True))

    def turns(self) -> list[Turn]:
        """Only the tokens learn."""
        return [Turn("tokens", list(self.masked.parameters()))]

    def forward(self, batch: tuple[Any, Any], turn: str = "tokens") -> dict[str, Tensor]:
        """The masked teacher's own terms, and `overlap`: how alike the masks are."""
        with self.masked.on() as teacher:
            terms = label_losses(teacher, (self.refeed(batch[0]), batch[1]))
        if torch.is_grad_enabled() and not any(term.requires_grad for term in terms.values()):
            raise UserError(f"the teacher's losses do not depend on its {self.maps_T.where}, expected what its head works on, such as neck")
        overlap = torch.stack([dice(masks.flatten(2)) for masks in self.masked.seen.values()]).sum()
        self.masked.seen = {level: masks.detach() for level, masks in self.masked.seen.items()}  # for a moving average to copy
        return {**terms, "overlap": overlap}

    def watch(self) -> dict[str, Tensor]:
        """`mask_mean`: the mean of all masks, in (0, 1)."""
        return {"mask_mean": torch.stack([masks.mean() for masks in self.masked.seen.values()]).mean()}

    def look(self, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        """As the second stage's."""
        return _drawn(self.masked.tokens, self.maps_T.of(self.refeed(batch[0])))

    @property
    def product(self) -> nn.Module:
        """The teacher under its masks: what it answers is what the tokens are worth."""
        return self.masked


@torch.no_grad()
def _drawn(tokens: Any, maps: list[Tensor]) -> dict[str, Tensor]:
    return {f"mask {number}": mask for number, mask in enumerate(tokens[0].masks(maps[0]).unbind(1), 1)}
