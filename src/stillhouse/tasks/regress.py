"""Regression of features: how well a network imitates what another says of the same images."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.models.outputs import logits_of
from stillhouse.tasks.base import Task


class Regress(Task):
    """Mean squared error of a network's outputs, and the share of the targets' variance that they explain.

    Its state is sums in fp64 and not lists: it does not grow with the data, and processes with different numbers of batches agree.

    Args:
        classes: the names of the outputs.
        sync_on_compute: as for `Task`.

    Raises:
        UserError: if there is none.
    """

    headline: ClassVar[str] = "r2"
    titles: ClassVar[dict[str, str]] = {"r2": "variance explained", "mse": "squared error, units²"}

    samples: Tensor
    error: Tensor
    sums: Tensor
    squares: Tensor

    def __init__(self, classes: list[str], *, sync_on_compute: bool = True) -> None:
        super().__init__(classes, sync_on_compute=sync_on_compute)
        self.set_dtype(torch.float64)
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("error", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("sums", "squares"):
            self.add_state(name, torch.zeros(len(classes), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: Any, targets: Tensor, teacher_output: Any = None) -> None:
        """Add a batch: outputs [B, D] and what they should be, float [B, D]. The teacher's output is not compared: it is the target.

        Raises:
            UserError: if the shapes do not meet.
        """
        found, expected = logits_of(output), (len(targets), len(self.classes))
        if found.shape != expected or targets.shape != expected:
            raise UserError(
                f"the student's outputs have the shape {tuple(found.shape)} and the targets {tuple(targets.shape)}, expected {expected}"
            )
        truth = targets.double()
        self.samples += len(truth)
        self.error += (found.detach().double() - truth).square().sum()
        self.sums += truth.sum(0)
        self.squares += truth.square().sum(0)

    def compute(self) -> dict[str, float]:
        """`mse`: the mean over samples and outputs. `r2`: 1 - mse / the targets' own variance, outputs weighted by theirs; at most 1,
        0 for saying the mean of each output, below 0 for worse.

        Raises:
            UserError: if no sample was, or all targets are the same.
        """
        samples = int(self.samples)
        if not samples:
            raise UserError("nothing was measured: the validation set gave no sample")
        variance = float((self.squares - self.sums.square() / samples).sum())
        if variance <= 1e-12 * float(self.squares.sum()):
            raise UserError("all validation images have the same targets: there is nothing to explain; take more or other images")
        error = float(self.error)
        return {"r2": 1 - error / variance, "mse": error / (samples * len(self.classes))}

    @property
    def chance(self) -> float:
        """0: the mean of each output, whatever the image."""
        return 0.0
