"""Classification: what is measured over a pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from stillhouse.errors import UserError

BINS = 15


class Classify(Metric):
    """Accuracy, likelihood and calibration of a student, and how it compares with its teacher, over all batches of all processes.

    A torchmetrics metric: `update` with each batch, `compute` at the end, `reset` before the next pass. Its state is sums and not lists:
    it does not grow with the data, and processes with different numbers of batches agree. Everything is in fp32; `update` does not wait
    for the device.

    Args:
        classes: how many there are, at least two.

    Raises:
        UserError: if there are fewer.
    """

    full_state_update = False
    samples: Tensor
    top1: Tensor
    top5: Tensor
    nll: Tensor
    compared: Tensor
    agreement: Tensor
    teacher_top1: Tensor
    bin_gap: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise UserError(f"classes={classes}, expected at least two")
        self.classes = classes
        for count in ("samples", "top1", "top5", "compared", "agreement", "teacher_top1"):
            self.add_state(count, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("nll", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("bin_gap", torch.zeros(BINS), dist_reduce_fx="sum")

    def update(self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Add a batch: logits [B, K] and class numbers [B]; the teacher's logits [B, K] for `agreement` and `teacher_top1`.

        Raises:
            UserError: if the shapes do not meet.
        """
        for name, logits in (("student", student_logits), ("teacher", teacher_logits)):
            if logits is not None and logits.shape != (len(labels), self.classes):
                raise UserError(f"the {name}'s logits have the shape {tuple(logits.shape)}, expected ({len(labels)}, {self.classes})")
        log_probs = student_logits.detach().float().log_softmax(dim=-1)
        guess = log_probs.argmax(dim=-1)
        right = guess == labels
        self.samples += len(labels)
        self.top1 += right.sum()
        self.top5 += (log_probs.topk(min(5, self.classes)).indices == labels[:, None]).sum()
        self.nll -= log_probs.gather(1, labels[:, None]).sum()
        confidence = log_probs.gather(1, guess[:, None])[:, 0].exp()
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        self.bin_gap.scatter_add_(0, bins, right.float() - confidence)
        if teacher_logits is not None:
            teacher_guess = teacher_logits.detach().argmax(dim=-1)
            self.compared += len(labels)
            self.agreement += (guess == teacher_guess).sum()
            self.teacher_top1 += (teacher_guess == labels).sum()

    def compute(self) -> dict[str, float]:
        """Means over samples.

        `top1` and `top5` (the label among the K when K < 5), `ece` (expected calibration error, 15 bins of equal width, arXiv
        1706.04599), `agreement` (same guess as the teacher) and `teacher_top1` in [0, 1]; `nll` in nats. The last two only when a
        teacher was given.

        Raises:
            UserError: if no sample was.
        """
        samples, compared = int(self.samples), int(self.compared)
        if not samples:
            raise UserError("nothing was measured: the validation set gave no sample")
        result = {name: float(getattr(self, name)) / samples for name in ("top1", "top5", "nll")}
        result["ece"] = float(self.bin_gap.abs().sum()) / samples
        if compared:
            result |= {name: float(getattr(self, name)) / compared for name in ("agreement", "teacher_top1")}
        return result
