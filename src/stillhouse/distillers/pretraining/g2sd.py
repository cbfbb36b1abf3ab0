"""G2SD: first what a big masked autoencoder's decoder thinks behind every patch, then what its fine-tuned sister answers.

The generic stage has no labels: student and teacher see the same quarter of a picture's patches, both their decoders lay them out among
mask tokens, and the student's, through a small predictor, has to say what the teacher's holds half-way, at all places. There is no loss of
pixels. The specific stage has labels and whole pictures: the student's class token learns from them, its distillation token from the
fine-tuned teacher's most likely class. What it answers afterwards is the mean of both.

Masked: the input patches of student and teacher in the generic stage, one uniform choice by sample for both. Removed, not zeroed.
Source: Huang et al., "Generic-to-Specific Distillation of Masked Autoencoders", CVPR 2023, arXiv 2302.14771.

    stillhouse distill --method g2sd --teacher RUN/autoencoder --specific-teacher RUN --student timm/deit_small_distilled_patch16_224

The teacher is of a run of `mae`; the specific teacher of one of `scratch` from that encoder (`--student RUN`). The generic stage learns
from `--unlabelled` data, if there are any.

Sure, from paper and code: both stages, targets and losses, the predictor. The official distillation token is the last and has no position.
Attention does not know an order, so here it is timm's distilled DeiT, whose token is the second, with a position that is held at zero: the
same function, in a network that timm opens. `targets="nkd"` is the code's other choice, without that token. Where we depart: the code's
predictor of encoder features, whose loss it weighs with 0, is not there; the specific teacher is in eval mode; both stages have the run's
one recipe (officially 2.4e-3 and 4e-3, layer decay in the second only). Our reading: the generic stage lasts 1.5 times the epochs, and on
top of them, after the official 300 and 200; `block` by default is half the teacher's decoder, after the official 4 of 8. Only classifiers:
the paper's second stages for detectors and segmenters are not here; for those `cwd` copies maps as it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from timm.layers.mlp import Mlp
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from stillhouse.distillers.base import Clock, Distiller, Stage
from stillhouse.distillers.classics.mae import shown
from stillhouse.errors import UserError
from stillhouse.losses.logits import cross_entropy, hard_cross_entropy
from stillhouse.losses.pretraining import normalised_kd, whitened_smooth_l1
from stillhouse.masks.patches import random_masking, visible_count
from stillhouse.models.mae import Decoder, MaskedAutoencoder, begin_pretraining, check_encoder, check_grids, encode, prefix_of
from stillhouse.models.outputs import classes_of, logits_of
from stillhouse.models.tokens import gather_tokens
from stillhouse.tasks.labels import label_losses


class G2SD(Distiller):
    """(1 - alpha) CE(z, y) + alpha CE(d, argmax q), from class token z and distillation token d: the specific stage, after `Generic`.

    Args:
        student: timm's distilled DeiT, such as timm/deit_small_distilled_patch16_224; for targets="nkd" a plain vision transformer.
        teacher: a masked autoencoder with its decoder, for the generic stage.
        specific_teacher: a classifier of the same classes, for the specific stage.
        masked: the share of hidden patches in the generic stage, in (0, 1).
        block: which block of the teacher's decoder is predicted, from 1; by default half its depth, at least 1.
        supervise: "all" tokens, or the "hidden" places alone.
        generic: how long the generic stage lasts, as a multiple of the epochs and on top of them; 0 leaves it out.
        decoder_width: of the student's decoder, a multiple of decoder_heads and of 4.
        decoder_depth: its blocks.
        decoder_heads: of its attention.
        alpha: weight of the specific teacher, in [0, 1]; 0 is plain training.
        targets: "hard", the specific teacher's most likely class; or "nkd", normalised distillation in place of both terms, its two
            parts and its temperature weighing 1.

    Raises:
        UserError: if a setting is out of range, or networks do not fit the stage that they are there for.
    """

    frozen: ClassVar[tuple[str, ...]] = ("teacher", "specific_teacher")
    unlabelled: ClassVar[bool] = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        specific_teacher: nn.Module,
        *,
        masked: float = 0.75,
        block: int | None = None,
        supervise: Literal["all", "hidden"] = "all",
        generic: float = 1.5,
        decoder_width: int = 256,
        decoder_depth: int = 4,
        decoder_heads: int = 8,
        alpha: float = 0.5,
        targets: Literal["hard", "nkd"] = "hard",
    ) -> None:
        if not 0 <= alpha <= 1 or not 0 <= generic < float("inf"):
            raise UserError(f"alpha is {alpha} and generic {generic}, expected a weight in [0, 1] and a finite number of at least 0")
        if targets not in ("hard", "nkd") or supervise not in ("all", "hidden"):
            raise UserError(f"targets is '{targets}' and supervise '{supervise}', expected 'hard' or 'nkd', and 'all' or 'hidden'")
        _check_student(student, specific_teacher, targets)
        super().__init__(student, specific_teacher)
        self.specific_teacher = specific_teacher  # this stage's teacher
        self.first: dict[str, Any] = {"masked": masked, "block": block, "supervise": supervise}
        self.first["decoder"] = (decoder_width, decoder_depth, decoder_heads)
        self.generic, self.alpha, self.targets = generic, alpha, targets
        if targets == "hard":
            with torch.no_grad():  # the same function: what was its position becomes its own
                student.dist_token += student.pos_embed[:, 1:2]  # type: ignore[operator,index]
        self.after_update(Clock(0, 1, 0, 1))

    @classmethod
    def stages(cls, student: nn.Module, teacher: nn.Module | None, epochs: int, **settings: Any) -> Iterator[Stage]:
        """`generic`, with a decoder that is thrown away; then the specific one, which begins with a new classifier."""
        assert teacher is not None
        second = cls(student, teacher, **settings)
        if second.generic:
            first = cls.generically(student, teacher, **second.first)
            yield Stage("generic", first, max(1, round(second.generic * epochs)), task="encode")
            for parameter in first.resting:
                parameter.requires_grad_(True)
            nn.init.trunc_normal_(student.head.weight, std=2e-5)  # type: ignore[union-attr,arg-type]
        yield Stage("", second, epochs)

    @staticmethod
    def generically(student: nn.Module, teacher: nn.Module, **settings: Any) -> Generic:
        """The generic stage."""
        return Generic(student, teacher, **settings)

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """`ce`: the labels' term; `kd`: the teacher's. Of nkd `target` and `rest`."""
        images, labels = batch
        if not self.alpha:
            return label_losses(self.student, batch)
        logits_T = logits_of(self.teach(images))
        if self.targets == "nkd":
            number = labels.argmax(-1) if labels.is_floating_point() else labels
            target, rest = normalised_kd(logits_of(self.student(images)), logits_T, number)
            return {"target": target, "rest": rest}
        tokens = self.student.head_drop(self.student.forward_features(images)[:, :2])  # type: ignore[operator]
        by_class, by_token = self.student.head(tokens[:, 0]), self.student.head_dist(tokens[:, 1])  # type: ignore[operator]
        return {"ce": (1 - self.alpha) * cross_entropy(by_class, labels), "kd": self.alpha * hard_cross_entropy(by_token, logits_T)}

    @torch.no_grad()
    def after_update(self, clock: Clock) -> None:
        """The distillation token has no position."""
        if self.targets == "hard":
            self.student.pos_embed[:, 1] = 0  # type: ignore[index,operator]


class Generic(Distiller):
    """mean smooth_L1(p(D_S), LN(D_T)), from the decoders' tokens D at every place, the teacher's behind a block within it.

    Args are as for `G2SD`; the student's heads, positions and distillation token rest. `decoder`: its width, depth and heads.
    """

    tasks: ClassVar[tuple[str, ...]] = ("encode",)

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, masked: float, block: int | None, supervise: str, decoder: tuple[int, int, int]
    ) -> None:
        if not isinstance(teacher, MaskedAutoencoder):
            raise UserError(f"the teacher is a {type(teacher).__name__}, expected a masked autoencoder: RUN/autoencoder of a run of mae")
        depth = len(teacher.decoder.blocks)
        block = max(1, depth // 2) if block is None else block
        if not 1 <= block <= depth:
            raise UserError(f"block is {block}, expected one of the {depth} blocks of the teacher's decoder, from 1 to {depth}")
        check_grids(student, teacher.encoder)
        if prefix_of(student) != teacher.decoder.prefix:
            raise UserError("student and teacher have other numbers of class tokens and registers, expected as many")
        super().__init__(student, teacher)
        self.decoder = Decoder(student, *decoder, pixels=False)
        width = teacher.decoder.mask_token.shape[-1]
        self.predictor = Mlp(decoder[0], width, width)
        self.grid = self.decoder.grid
        visible_count(masked, self.grid[0] * self.grid[1])
        self.masked, self.block, self.supervise = masked, block, supervise
        self.resting = begin_pretraining(student)

    def forward(self, batch: tuple[Tensor, Any], turn: str = "student") -> dict[str, Tensor]:
        """`hidden`: the decoders' distance."""
        images = batch[0]
        masking = random_masking(len(images), self.grid[0] * self.grid[1], self.masked, images.device)
        with torch.no_grad():
            hidden = self.teacher.hidden(self.refeed(images), masking.keep, masking.restore, self.block)
        predicted = self.predictor(self.decoder(encode(self.student, images, masking.keep), masking.restore))
        if self.supervise == "hidden":
            predicted, hidden = (gather_tokens(tokens, masking.hidden + self.decoder.prefix, 0) for tokens in (predicted, hidden))
        return {"hidden": whitened_smooth_l1(predicted, hidden)}

    def examined(self, kept: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The student's features, without its heads."""
        return {"student": MaskedAutoencoder(kept["student"], self.decoder)}

    @torch.no_grad()
    def look(self, batch: tuple[Tensor, Any]) -> dict[str, Tensor]:
        """`visible` [B, rows, columns]: 1 where a patch was visible, to both."""
        return {"visible": shown(batch[0], self.masked, self.grid)}


def _check_student(student: nn.Module, teacher: nn.Module, targets: str) -> None:
    distilled = isinstance(check_encoder(student, "student"), VisionTransformerDistilled)
    if distilled != (targets == "hard"):
        has, other = ("has a", "a plain one, such as timm/vit_small_patch16_224") if distilled else ("has no", "timm/deit_*_distilled_*")
        raise UserError(f"targets is '{targets}' and the student {has} distillation token, name {other}, or change targets")
    known = classes_of(teacher)
    if known not in (None, student.num_classes):
        told = "train it on this data first with `stillhouse distill --method scratch` and name that run folder"
        raise UserError(f"the specific teacher knows {known} classes and the student {student.num_classes}, expected the same; {told}")
