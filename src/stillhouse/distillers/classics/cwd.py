"""Channel-wise distillation: in each channel of a map the student puts its weight on the places where the teacher puts its own.

Each channel of the teacher's and of the student's map is made a distribution over places by a softmax with a temperature, and the two are
compared by their divergence. What counts is where a channel is stronger than elsewhere: a constant added to it changes nothing.

Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256.

Masked: nothing.

    stillhouse distill --method cwd --teacher RUN_OR_SPEC --student SPEC --data voc:DIR

Sure, from the official code: the divergence, tau^2, the mean over channels; and from the detection code it points to, weight 5 and
temperature 1 on each level of the neck, summed. Less sure: a segmenter's weights, 3 on logits and 50 on features at temperature 4, are
those of later comparisons (CIRKD, MGD), as the official code leaves them to the command line. Our reading: one place at a time; where the
channels agree nothing is learned in between (the official segmentation code has a 1x1 convolution on features even then); the pixels' KD
and the adversarial term, which that code can add, are left out.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.errors import UserError
from stillhouse.losses.maps import channel_divergence
from stillhouse.models.detectors import is_detector
from stillhouse.models.levels import Align, Levels, default_place
from stillhouse.tasks.labels import label_losses


class CWD(Distiller):
    """L_labels + alpha sum_levels tau^2 / C sum_c KL(softmax(T_c / tau) || softmax(S_c / tau)).

    Args:
        student: a detector or segmenter.
        teacher: a network with as many levels at the same place; channels need not match.
        where: what is compared: neck, backbone, logits, or module names joined by +; by default a detector's neck, a segmenter's logits.
        teacher_where: the same of the teacher; by default as `where`.
        alpha: weight of the comparison, >= 0; by default 5 for a detector, 3 for a segmenter's logits, 50 for its other maps.
        temperature: tau > 0; higher spreads the weight over more places; by default 1 for a detector, 4 for a segmenter.

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
        temperature: float | None = None,
    ) -> None:
        where = where or default_place(student)
        usual = (5.0, 1.0) if is_detector(student) else (3.0 if where == "logits" else 50.0, 4.0)
        alpha = usual[0] if alpha is None else alpha
        temperature = usual[1] if temperature is None else temperature
        if not 0 <= alpha < float("inf"):
            raise UserError(f"alpha is {alpha}, expected the weight of the comparison, a finite number of at least 0")
        if not 0 < temperature < float("inf"):
            raise UserError(f"temperature is {temperature}, expected a positive finite number, such as 1 or 4")
        super().__init__(student, teacher)
        self.alpha, self.temperature = alpha, temperature
        self.maps_S, self.maps_T = Levels(student, where), Levels(teacher, teacher_where or where)
        self.align = Align(self.maps_S, self.maps_T)

    def forward(self, batch: tuple[Any, Any], turn: str = "student") -> dict[str, Tensor]:
        """The labels' terms, and `cwd`: the maps'."""
        terms = label_losses(self.student, batch)
        maps_S = self.maps_S.take()
        maps_T = self.maps_T.of(self.refeed(batch[0]))
        pairs = zip(self.align(maps_S, maps_T), maps_T, strict=True)
        divergences = [channel_divergence(S, T, self.temperature) for S, T in pairs]
        return {**terms, "cwd": self.alpha * torch.stack(divergences).sum()}
