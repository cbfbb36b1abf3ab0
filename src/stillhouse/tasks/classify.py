"""Classification: what is measured over a pass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.models.outputs import logits_of
from stillhouse.tasks.base import Task, guessing

BINS = 15
MARGINS, FARTHEST = 4096, 32.0
"""The log-odds of two classes are counted in so many steps, from minus to plus so much."""


class Classify(Task):
    """Accuracy, likelihood and calibration of a student, and how it compares with its teacher.

    Its state is sums and not lists: it does not grow with the data, and processes with different numbers of batches agree. Everything is in
    fp32; `update` does not wait for the device.

    Args:
        classes: their names, at least two.
        sync_on_compute: as for `Task`.

    Raises:
        UserError: if there are fewer.
    """

    headline: ClassVar[str] = "top1"
    titles: ClassVar[dict[str, str]] = {
        "top1": "top-1",
        "top5": "top-5",
        "auroc": "AUROC",
        "nll": "NLL, nats",
        "ece": "calibration error",
        "agreement": "agrees with teacher",
    }
    least_classes: ClassVar[int] = 2

    samples: Tensor
    top1: Tensor
    top5: Tensor
    nll: Tensor
    compared: Tensor
    agreement: Tensor
    teacher_top1: Tensor
    bin_gap: Tensor
    margins: Tensor

    def __init__(self, classes: list[str], *, sync_on_compute: bool = True) -> None:
        super().__init__(classes, sync_on_compute=sync_on_compute)
        for count in ("samples", "top1", "top5", "compared", "agreement", "teacher_top1"):
            self.add_state(count, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("nll", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("bin_gap", torch.zeros(BINS), dist_reduce_fx="sum")
        if len(classes) == 2:
            self.add_state("margins", torch.zeros(2, MARGINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Any, targets: Tensor, teacher_output: Any = None) -> None:
        """Add a batch: outputs with logits [B, K] and class numbers [B]; the teacher's output for `agreement` and `teacher_top1`.

        Raises:
            UserError: if the shapes do not meet.
        """
        student_logits = self._logits("student", output, targets)
        log_probs = student_logits.detach().float().log_softmax(dim=-1)
        guess = log_probs.argmax(dim=-1)
        right = guess == targets
        self.samples += len(targets)
        self.top1 += right.sum()
        self.top5 += (log_probs.topk(min(5, len(self.classes))).indices == targets[:, None]).sum()
        self.nll -= log_probs.gather(1, targets[:, None]).sum()
        confidence = log_probs.gather(1, guess[:, None])[:, 0].exp()
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        self.bin_gap.scatter_add_(0, bins, right.float() - confidence)
        if len(self.classes) == 2:
            margin = (log_probs[:, 1] - log_probs[:, 0]).clamp(-FARTHEST, FARTHEST)
            place = ((margin / FARTHEST + 1) / 2 * (MARGINS - 1)).round().long()
            self.margins.view(-1).scatter_add_(0, targets * MARGINS + place, torch.ones_like(place))
        if teacher_output is not None:
            teacher_guess = self._logits("teacher", teacher_output, targets).detach().argmax(dim=-1)
            self.compared += len(targets)
            self.agreement += (guess == teacher_guess).sum()
            self.teacher_top1 += (teacher_guess == targets).sum()

    def compute(self) -> dict[str, float]:
        """Means over samples.

        `top1` and `top5` (the label among the K when K < 5), `ece` (expected calibration error, 15 bins of equal width, arXiv
        1706.04599), `agreement` (same guess as the teacher) and `teacher_top1` in [0, 1]; `nll` in nats. The last two only when a
        teacher was given. Of two classes also `auroc`: how often a sample of the second gets higher odds of being one than a sample of the
        first, from odds in steps of 1/64 on their logarithm; 1/2 if there were samples of one class alone.

        Raises:
            UserError: if no sample was.
        """
        samples, compared = int(self.samples), int(self.compared)
        if not samples:
            raise UserError("nothing was measured: the validation set gave no sample")
        result = {name: float(getattr(self, name)) / samples for name in ("top1", "top5", "nll")}
        result["ece"] = float(self.bin_gap.abs().sum()) / samples
        if len(self.classes) == 2:
            first, second = self.margins.double()
            pairs = float(first.sum() * second.sum())
            result["auroc"] = float((second * (first.cumsum(0) - first / 2)).sum()) / pairs if pairs else 0.5
        if compared:
            result |= {name: float(getattr(self, name)) / compared for name in ("agreement", "teacher_top1")}
        return result

    @property
    def chance(self) -> float:
        """1/K, and two standard errors of it on the samples that were measured."""
        return guessing(len(self.classes), int(self.samples))

    def _logits(self, role: str, output: Any, targets: Tensor) -> Tensor:
        logits, expected = logits_of(output), (len(targets), len(self.classes))
        if logits.shape != expected:
            raise UserError(f"the {role}'s logits have the shape {tuple(logits.shape)}, expected {expected}")
        return logits
