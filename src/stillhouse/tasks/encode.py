"""Encoding: what a network's features are worth to a reader who learns from few labels and cannot change them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.tasks.base import Task, guessing

NEIGHBOURS, TEMPERATURE, RIDGE = 20, 0.07, 1e-2


class Encode(Task):
    """Two readers of features [B, D], both learned on labelled training images: a linear one, and the nearest neighbours.

    The linear one decides, as what is made by painting pixels is laid out for a readout and not by distances (arXiv 2111.06377 asks it
    so). It is solved, not trained: features with mean 0 and variance 1 over the examples, one output a class, least squares with a ridge
    of 1/100 of the number of examples; fp64. The neighbours are the 20 nearest by cosine, or all if there are fewer, and vote with weights
    exp(cosine / 0.07), as is usual (arXiv 1805.01978).

    Args:
        classes: their names, at least two.
        sync_on_compute: as for `Task`.

    Raises:
        UserError: if there are fewer.
    """

    headline: ClassVar[str] = "probe"
    titles: ClassVar[dict[str, str]] = {"probe": "linear probe", "knn": "nearest neighbours"}
    least_classes: ClassVar[int] = 2
    wants_examples: ClassVar[bool] = True

    samples: Tensor
    probe: Tensor
    knn: Tensor

    def __init__(self, classes: list[str], *, sync_on_compute: bool = True) -> None:
        super().__init__(classes, sync_on_compute=sync_on_compute)
        for count in ("samples", "probe", "knn"):
            self.add_state(count, torch.tensor(0), dist_reduce_fx="sum")
        self.learned: dict[str, Tensor] = {}

    @torch.no_grad()
    def learn(self, network: nn.Module, batches: Iterable[tuple[Any, Any]]) -> None:
        """Both readers, from batches of images and class numbers.

        Raises:
            UserError: if there are none.
        """
        seen = [(self._features(self.ask(network, images, targets)), targets) for images, targets in batches]
        if not seen:
            raise UserError("there is no labelled training image to learn from what an encoder is worth")
        features, labels = torch.cat([each for each, _ in seen]), torch.cat([each for _, each in seen])
        truth = F.one_hot(labels, len(self.classes)).double()
        mean, spread = features.double().mean(0), features.double().std(0, correction=0) + 1e-6
        scaled, centre = (features.double() - mean) / spread, truth.mean(0)
        weight = _ridge(scaled, truth - centre) / spread[:, None]
        self.learned = {
            "weight": weight.float(),
            "bias": (centre - mean @ weight).float(),
            "directions": F.normalize(features, dim=-1),
            "votes": truth.float(),
        }

    def update(self, output: Any, targets: Tensor, teacher_output: Any = None) -> None:
        """Add a batch: features [B, D] and class numbers [B]. What a teacher returned is not looked at: its features are its own.

        Raises:
            UserError: if the features have another shape.
        """
        if not self.learned:
            raise RuntimeError("learn() comes before update()")
        features = self._features(output.detach())
        readout = features @ self.learned["weight"] + self.learned["bias"]
        nearest = (F.normalize(features, dim=-1) @ self.learned["directions"].T).topk(min(NEIGHBOURS, len(self.learned["votes"])))
        votes = ((nearest.values / TEMPERATURE).exp()[..., None] * self.learned["votes"][nearest.indices]).sum(1)
        self.samples += len(targets)
        self.probe += (readout.argmax(-1) == targets).sum()
        self.knn += (votes.argmax(-1) == targets).sum()

    def compute(self) -> dict[str, float]:
        """`probe` and `knn`: the shares of images whose class was read right, in [0, 1].

        Raises:
            UserError: if there was none.
        """
        samples = int(self.samples)
        if not samples:
            raise UserError("nothing was measured: the validation set gave no sample")
        return {name: float(getattr(self, name)) / samples for name in ("probe", "knn")}

    @property
    def chance(self) -> float:
        """1/K, and two standard errors of it on the samples that were measured."""
        return guessing(len(self.classes), int(self.samples))

    @staticmethod
    def _features(output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"the encoder returns {shape} for a batch of images, expected features (batch, channels)")
        return output.float()


def _ridge(features: Tensor, truth: Tensor) -> Tensor:
    """The weights [D, K] of a ridge regression of [n, D] on [n, K], by whichever of its two forms solves for fewer unknowns."""
    examples, width = features.shape
    ridge = RIDGE * examples * torch.eye(min(examples, width), dtype=features.dtype, device=features.device)
    if width > examples:
        return features.T @ torch.linalg.solve(features @ features.T + ridge, truth)
    return torch.linalg.solve(features.T @ features + ridge, features.T @ truth)
