"""Self-distillation: pre-training goes on with the target's images twice, the second time from the start and close to the first.

A network pre-trained on pictures of all kinds goes on with the target's own, without labels; a few of them are soon learnt by heart. So
what comes of it is only a teacher: the pre-trained network begins again, on the same images, and has to stay near it. The student is then
given a head, as after `mae`.

Masked: the student's input patches for the painting, a uniform choice by sample, fresh in each step. What is compared is of whole pictures.
Source: Lee et al., "Self-Distillation for Further Pre-training of Transformers", ICLR 2023, arXiv 2210.02871.

    stillhouse distill --method self_distill_pretrain --student RUN/autoencoder --data SPEC

RUN is one of `mae` on much data; a published encoder is a student too, with a new decoder. The teacher is made first, by as many epochs of
`mae`; a run of `mae` from the same start can be named as the teacher in its place.

Sure, from paper and code: both phases from the same weights, decoder included; MAE's loss with normalised pixels; the distance of the class
tokens behind the final norm, a sum over their channels, with weight 1 and the teacher in eval mode. The paper speaks of the hidden
representation; `compared="all"` takes all tokens, a mean over them: our reading. So are `rounds`, of which the paper studies more than one:
each begins from the start, its teacher is the student of the one before. Where we depart: the official rate is decayed linearly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Stage, feed
from stillhouse.distillers.classics.mae import MAE
from stillhouse.distillers.pair import check_choices
from stillhouse.errors import UserError
from stillhouse.losses.pretraining import squared_length
from stillhouse.models.mae import check_encoder, check_grids, encode, encoder_of, prefix_of


class SelfDistillPretrain(MAE):
    """MAE + alpha mean |h_S - h_T|^2, h the class token behind the final norm, of whole pictures.

    Args:
        student: a masked autoencoder, or a vision transformer of timm, as it was before it saw the target's images.
        teacher: the same after them. As a run's it may be left out, and is made.
        alpha: weight of the distance, >= 0; 0 is MAE.
        compared: "class" for the class token, "all" for all tokens.
        rounds: how often it begins again, at least 1.
        masked: the share of hidden patches, in (0, 1).
        norm_pixels: whether the pixels of each patch are brought to mean 0 and variance 1 before they are compared.
        decoder_width: of a new decoder's tokens, a multiple of decoder_heads and of 4.
        decoder_depth: its blocks.
        decoder_heads: of its attention.

    Raises:
        UserError: if a setting is out of range, there is no class token to compare, or the networks' shapes differ.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        alpha: float = 1.0,
        compared: Literal["class", "all"] = "class",
        rounds: int = 1,
        masked: float = 0.75,
        norm_pixels: bool = True,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        if not 0 <= alpha < float("inf") or not isinstance(rounds, int) or rounds < 1:
            raise UserError(
                f"alpha is {alpha} and rounds {rounds}, expected a finite weight of at least 0 and a whole number of at least 1"
            )
        check_choices({"compared": ("class", "all")}, compared=compared)
        sizes = {"decoder_width": decoder_width, "decoder_depth": decoder_depth, "decoder_heads": decoder_heads}
        super().__init__(student, masked=masked, norm_pixels=norm_pixels, **sizes)
        if teacher is None:
            raise UserError("there is no teacher to stay near: name the network after further pre-training, or let `stages` make it")
        self.teacher = _fit(self.student, encoder_of(teacher), compared).requires_grad_(False).eval()
        self.refeed = feed(self.student, self.teacher)
        self.alpha, self.compared, self.rounds = alpha, compared, rounds

    @classmethod
    def stages(cls, student: nn.Module, teacher: nn.Module | None, epochs: int, **settings: Any) -> Iterator[Stage]:
        """`teacher`, if there is none; then each round from the student as it is now, the last without a name."""
        start, rounds = copy.deepcopy(student), settings.get("rounds", 1)
        if teacher is None:
            of_mae = {name: value for name, value in settings.items() if name not in ("alpha", "compared", "rounds")}
            first = MAE(student, **of_mae)
            yield Stage("teacher", first, epochs)
            teacher = first.student
        for number in range(1, rounds + 1):
            learner = cls(copy.deepcopy(start), teacher, **settings)
            yield Stage("" if number == rounds else f"round-{number}", learner, epochs)
            teacher = learner.student

    def forward(self, batch: tuple[Tensor, Any], turn: str = "student") -> dict[str, Tensor]:
        """`pixels`: MAE's loss; `near`: how far the student is from the teacher."""
        with torch.no_grad():
            h_T = self.seen(self.teacher, self.refeed(batch[0]))
        distance = squared_length(self.seen(self.student, batch[0]) - h_T)
        return super().forward(batch, turn) | {"near": self.alpha * distance}

    def seen(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """The tokens that are compared, of whole pictures [B, 1 or all, D]."""
        tokens = encode(encoder, images)
        return tokens[:, :1] if self.compared == "class" else tokens


def _fit(student: Any, teacher: Any, compared: str) -> nn.Module:
    """The teacher, if its tokens can be compared with the student's."""
    check_grids(student, check_encoder(teacher, "teacher"))
    if teacher is student:
        raise UserError("student and teacher are one network, expected two: the teacher is what further pre-training made of a copy")
    own, other = ((network.embed_dim, prefix_of(network)) for network in (student, teacher))
    if own != other:
        raise UserError(
            f"the student's tokens have {own[0]} channels, {own[1]} before the patches, the teacher's {other[0]} and {other[1]}, expected "
            "the same network twice, before and after further pre-training"
        )
    if compared == "class" and student.cls_token is None:
        raise UserError('the student has no class token to compare, name one that has, or compared="all"')
    fitting: nn.Module = teacher
    return fitting
