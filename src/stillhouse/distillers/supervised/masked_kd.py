"""MaskedKD: the student's own attention decides which patches the teacher sees.

In every step the student looks at the whole image; its class token's attention in the last block ranks the patches; the teacher computes
on the K highest ranked only, and the student learns from what the teacher says about them. Half the patches cost the teacher about half
its multiply-adds; the paper's claim is that the student loses no accuracy by it.

Masked: the teacher's input tokens, by the student. Removed, not zeroed; a different choice for every image and step.
Source: Son et al., "The Role of Masking for Efficient Supervised Knowledge Distillation of Vision Transformers", ECCV 2024,
arXiv 2302.10494.

    stillhouse distill --method masked_kd --teacher timm/deit_base_patch16_224 --student timm/deit_tiny_patch16_224 --data imagefolder:DIR

Sure, from paper and code: scores, choice, where tokens are dropped, both losses, defaults. Where paper and code differ we follow the code:
the softmax includes the class token's own column, and the terms are mixed as (1 - alpha) and alpha (the paper adds lambda KD).
Our reading: students without a class token rank patches by the mean attention they receive, convolutional students by the norm of their
last feature map; grids that differ are resampled; keep may follow a schedule; hint and attention transfer are taken on the kept places of
the last layer's features, as the paper combines MaskedKD with such losses without fixing their form. keep="auto" is our own, for the
paper leaves open how much to keep (see `stillhouse.masks.keep_rate`). So is by="sampled": a small student's highest attention may fall on
neighbouring places that say little; drawn with its attention as odds, the patches are scattered and still mostly salient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch._dynamo import mark_static

from stillhouse.distillers.classics.kd import check_weighting
from stillhouse.distillers.keeping import BUDGET, TOLERANCE, Keeping
from stillhouse.errors import UserError
from stillhouse.losses.features import attention_transfer_loss, hint_loss
from stillhouse.losses.logits import cross_entropy, hard_cross_entropy, kl_divergence
from stillhouse.masks.tokens import as_mask, drawn_scores, highest, random_scores, resample
from stillhouse.models.outputs import logits_of
from stillhouse.models.taps import SaliencyTap, Tap, as_tokens, feature_channels, last_layer, on_grid


class MaskedKD(Keeping):
    """(1 - alpha) CE(z_S, y) + alpha KD(z_S, z_T(x_kept)).

    Args:
        student: a classifier, images [B, C, H, W] to logits [B, K]; its saliency is read while it runs.
        teacher: a vision transformer of the same classes that can run on some of its tokens (see `stillhouse.models.tokens`).
        keep: the share in (0, 1] or the number of patches the teacher sees; or a schedule over training, "0:1.0,0.5:0.5";
            or "auto": it finds itself, from where the masked teacher pulls the student.
        alpha: weight of the teacher, in [0, 1]; 0 is plain training.
        temperature: tau > 0, for soft targets.
        targets: "soft", tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)); or "hard", cross-entropy with argmax z_T.
        by: who chooses the patches: "student" (the method: those it looks at most) or "sampled" (drawn with its attention as odds); for
            comparison "teacher" (its own attention, at full cost), "random", or "lowest" (the student's least salient patches).
        hint: weight of a FitNets hint on the kept places, 0 for none.
        attention: weight of attention transfer on the kept places, 0 for none.
        tolerance: of keep="auto": by how much masking may turn the teacher's pull on the student (1 - cosine of the gradients by its
            logits, on some training images); 0 keeps all patches, above 2 a seventh.
        budget: of keep="auto": the teacher's multiply-adds, mean over the training, as a share of those on all patches, at most.

    Raises:
        UserError: if a setting is out of range, the teacher cannot run on some of its tokens, or the student has no saliency.
    """

    off: ClassVar[dict[str, Any]] = {"alpha": 0.0}

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        keep: int | float | str | Mapping[float, float] = 0.5,
        alpha: float = 0.5,
        temperature: float = 1.0,
        targets: Literal["soft", "hard"] = "soft",
        by: Literal["student", "sampled", "teacher", "random", "lowest"] = "student",
        hint: float = 0.0,
        attention: float = 0.0,
        tolerance: float = TOLERANCE,
        budget: float = BUDGET,
    ) -> None:
        check_weighting(alpha, temperature)
        _check_choices(targets, by, hint, attention)
        super().__init__(student, teacher, keep, tolerance, budget)
        self.alpha, self.temperature, self.targets, self.by = alpha, temperature, targets, by
        self.hint, self.attention = hint, attention
        self.saliency = None if by == "random" else SaliencyTap(teacher if by == "teacher" else student)
        if hint or attention:
            self.feature_S, self.feature_T = Tap(student, last_layer(student)), Tap(teacher, last_layer(teacher))
        if hint:
            self.regressor = nn.Linear(feature_channels(student, last_layer(student)), feature_channels(teacher, last_layer(teacher)))

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """`ce`: the labels' term; `kd`: the masked teacher's; `hint` and `attention` when asked for."""
        images, labels = batch
        self.part = len(images)
        logits_S = logits_of(self.student(images))
        keep = highest(self.scores(images), self.kept) if self.kept < self.patches else None
        if keep is not None:
            mark_static(keep, 1)  # compiled once for each number of patches, not once for any number
        logits_T = logits_of(self.teach(images, keep))
        kd = self.distillation(logits_S, logits_T)
        terms = {"ce": (1 - self.alpha) * cross_entropy(logits_S, labels), "kd": self.alpha * kd}
        return terms | self.feature_terms(keep)

    def distillation(self, logits_S: Tensor, logits_T: Tensor) -> Tensor:
        """KL or cross-entropy between what student and teacher say."""
        if self.targets == "soft":
            return kl_divergence(logits_S, logits_T, self.temperature)
        return hard_cross_entropy(logits_S, logits_T)

    def scores(self, images: Tensor) -> Tensor:
        """How much each of the teacher's patches deserves to be seen: fp32 [B, N], on the teacher's grid. The student has just run."""
        return self.ranked(self.looks(images), images)

    def looks(self, images: Tensor) -> Tensor | None:
        """Where the student looks, or the teacher: fp32 [B, N] of at least 0, on the teacher's grid; None where nobody is asked."""
        if self.saliency is None:
            return None
        if self.by == "teacher":
            self.teach(images)
        return resample(*self.saliency.take(), self.teacher.grid)

    def ranked(self, looks: Tensor | None, images: Tensor) -> Tensor:
        """What follows from that for the choice, as scores."""
        if looks is None:
            return random_scores(len(images), self.patches, images.device)
        if self.by == "sampled":
            return drawn_scores(looks)
        return -looks if self.by == "lowest" else looks

    def feature_terms(self, keep: Tensor | None) -> dict[str, Tensor]:
        """The losses between features at the places the teacher saw (`keep` [B, K], None for all)."""
        if not (self.hint or self.attention):
            return {}
        tokens_T = as_tokens(self.feature_T.take(), self.teacher.model)
        tokens_S = on_grid(self.feature_S.take(), self.student, self.teacher.grid)
        if keep is not None:
            tokens_S = tokens_S.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens_S.shape[-1]))
        terms = {}
        if self.hint:
            terms["hint"] = self.hint * hint_loss(self.regressor(tokens_S), tokens_T)
        if self.attention:
            terms["attention"] = self.attention * attention_transfer_loss(tokens_S, tokens_T)
        return terms

    @torch.no_grad()
    def look(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Maps [B, rows, columns]: `shown`, 1 where the teacher saw the patch; `saliency`, where the student looks, or `teacher looks`.

        The latter two are scaled to [0, 1] within an image; a random choice has neither.
        """
        images = batch[0]
        self.student(images)
        looks = self.looks(images)
        maps = {"shown": as_mask(highest(self.ranked(looks, images), self.kept), self.patches)}
        if looks is not None:
            low, high = looks.amin(1, keepdim=True), looks.amax(1, keepdim=True)
            maps["teacher looks" if self.by == "teacher" else "saliency"] = (looks - low) / (high - low).clamp_min(1e-12)
        return {name: drawn.unflatten(1, self.teacher.grid) for name, drawn in maps.items()}


def _check_choices(targets: str, by: str, hint: float, attention: float) -> None:
    if targets not in ("soft", "hard"):
        raise UserError(f"targets is '{targets}', expected 'soft' or 'hard'")
    if by not in ("student", "sampled", "teacher", "random", "lowest"):
        raise UserError(f"by is '{by}', expected 'student', 'sampled', 'teacher', 'random' or 'lowest'")
    if not (0 <= hint < float("inf") and 0 <= attention < float("inf")):
        raise UserError(f"hint is {hint} and attention is {attention}, expected finite weights of at least 0")
