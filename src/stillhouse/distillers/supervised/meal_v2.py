"""MEAL V2: a student that is trained already goes on learning, from nothing but what two teachers say together.

Its only target is the mean of the teachers' probabilities: no labels, no temperature. The student must begin trained: name a run as the
student, or published weights. A small discriminator reads logits and learns to say whether they are the student's or the teachers'.

Masked: nothing.
Source: Shen and Savvides, "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks", arXiv 2009.08453.

    stillhouse distill --method meal_v2 --teacher RUN_OR_SPEC --second-teacher RUN_OR_SPEC --student RUN --data SPEC

The paper's recipe is `--optimizer sgd --lr 0.01 --weight-decay 0 --warmup-epochs 0 --batch 512 --epochs 180`.

Sure, from paper and code: the target, the loss, that labels are not used, that the student begins trained. As the code has them: the
discriminator's layers, of which the last ends in a ReLU, too, so that it cannot deny; its input, the teachers' mean logits; and that the
student helps it, for both minimise its loss ("together"). "against" is the adversary of the paper's words, by a reversed gradient. Where we
depart: the learning rate falls along a cosine, where theirs falls once to a tenth; for few classes the discriminator's layers stay 8 wide;
one teacher is allowed, more than two are not; the code's other choice, one of the teachers at random in each step, is not here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Distiller, feed
from stillhouse.distillers.pair import check_choices
from stillhouse.errors import UserError
from stillhouse.losses.logits import cross_entropy, mean_probabilities, told_apart
from stillhouse.models.outputs import classes_of, logits_of

MODES = ("together", "against", "off")


class MEALV2(Distiller):
    """-mean sum_c q_c log softmax(z_S)_c + L_D, with q = mean_k softmax(z_Tk), and L_D of a discriminator on z_S and mean_k z_Tk.

    Args:
        student: a classifier, images [B, C, H, W] to logits [B, K], trained already.
        teacher: a classifier of the same classes.
        second_teacher: another one, in full precision, never cached; without it the target is the teacher's alone.
        discriminator: whose loss the student minimises ("together"), maximises ("against"), or that is not there ("off").

    Raises:
        UserError: if the mode is unknown, or the numbers of classes differ or cannot be told.
    """

    frozen: ClassVar[tuple[str, ...]] = ("teacher", "second_teacher")
    off: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        second_teacher: nn.Module | None = None,
        *,
        discriminator: Literal["together", "against", "off"] = "together",
    ) -> None:
        check_choices({"discriminator": MODES}, discriminator=discriminator)
        classes = _agreed(student=student, teacher=teacher, second_teacher=second_teacher)
        if classes is None and discriminator != "off":
            raise UserError('how many classes the student knows is not noted: give it an attribute num_classes, or discriminator="off"')
        super().__init__(student, teacher)
        self.second_teacher = second_teacher.requires_grad_(False).eval() if second_teacher is not None else None
        self.for_second = feed(student, second_teacher)
        self.against = discriminator == "against"
        self.discriminator = discriminating(classes) if classes is not None and discriminator != "off" else None

    def forward(self, batch: tuple[Tensor, Any], turn: str = "student") -> dict[str, Tensor]:
        """`kd`: what the teachers say together; `discriminator`: whose logits are whose."""
        images = batch[0]
        logits_S, logits_T = logits_of(self.student(images)), self.ask(images)
        terms = {"kd": cross_entropy(logits_S, mean_probabilities(*logits_T))}
        if self.discriminator is not None:
            seen = backwards(logits_S) if self.against else logits_S
            terms["discriminator"] = told_apart(self.discriminator(seen), self.discriminator(torch.stack(logits_T).mean(0)))
        return terms

    @torch.no_grad()
    def ask(self, images: Tensor) -> list[Tensor]:
        """The logits of each teacher, fed as it was trained."""
        first = logits_of(self.teach(images))
        if self.second_teacher is None:
            return [first]
        return [first, logits_of(self.second_teacher(self.for_second(images)))]


def discriminating(classes: int) -> nn.Sequential:
    """K logits to K/8, K/64 (both at least 8) and two outputs, with a ReLU behind each, also the last."""
    widths = (classes, max(8, classes // 8), max(8, classes // 64), 2)
    layers = [(nn.Linear(before, after), nn.ReLU()) for before, after in pairwise(widths)]
    return nn.Sequential(*(layer for pair in layers for layer in pair))


def backwards(logits: Tensor) -> Tensor:
    """The same logits, whose gradient has the other sign."""
    return 2 * logits.detach() - logits


def _agreed(**networks: nn.Module | None) -> int | None:
    """How many classes all of them know, as far as it is noted."""
    known = {name: classes_of(network) for name, network in networks.items() if network is not None}
    told = {name: classes for name, classes in known.items() if classes is not None}
    if len(set(told.values())) > 1:
        raise UserError(f"classes differ, expected as many of all: {', '.join(f'{name} {classes}' for name, classes in told.items())}")
    return next(iter(told.values()), None)
