"""The face that every task's metric has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from stillhouse.errors import UserError
from stillhouse.tasks.colours import as_rgb


class Task(Metric):
    """How well a student does what it is for, over all batches of all processes.

    A torchmetrics metric: `update` with each batch, `compute` at the end, `reset` before the next pass.

    Args:
        classes: the names of the data's classes.
        sync_on_compute: whether `compute` is of all processes together, which then all have to call it. It cannot be changed later.

    Raises:
        UserError: if there are too few, or two that are measured one by one have the same name.
    """

    headline: ClassVar[str]
    """The key of the metric that decides; larger is better."""
    titles: ClassVar[dict[str, str]]
    """What a table calls the metrics, in its order. A share in [0, 1], unless the title names a unit after a comma."""
    per_class: ClassVar[str] = ""
    """What is measured of every class, as a table calls it; `compute` has it under "key/NAME". Empty if nothing is."""
    least_classes: ClassVar[int] = 1
    wants_examples: ClassVar[bool] = False
    """Whether `learn` is to be called before every pass."""
    judged: ClassVar[bool] = False
    """Whether it takes a `judge`: a network that classifies the same data."""

    full_state_update = False

    def __init__(self, classes: list[str], *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        if len(classes) < self.least_classes:
            raise UserError(f"the data has {len(classes)} classes, expected at least {self.least_classes}")
        if self.per_class and len(set(classes)) < len(classes):
            twice = next(name for name in classes if classes.count(name) > 1)
            raise UserError(f"two classes of the data are called '{twice}', expected every name once; rename one")
        self.classes = classes

    def learn(self, network: nn.Module, batches: Iterable[tuple[Any, Any]]) -> None:
        """What the task learns on top of a network before it is measured: from labelled training images, without gradient."""

    def ask(self, network: nn.Module, images: Any, targets: Any) -> Any:
        """What the network says of a batch, for `update`."""
        return network(images)

    def update(self, output: Any, targets: Any, teacher_output: Any = None) -> None:
        """Add a batch: what the student, and perhaps its teacher, returned in eval mode on the batch's images, and what is true."""
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """The metrics by key, and the values of single classes."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """What a network must exceed in the headline, on what was measured, to know anything."""
        raise NotImplementedError

    @staticmethod
    def draw(images: Tensor, what: Any, classes: list[str], score: float = 0.3) -> Tensor:
        """Pictures uint8 [n, 3, H, W]: `what` (targets, or a network's output in eval mode) over images uint8 [n, C, H, W].

        By default the images alone: a class is a word, and features are no picture.

        `score`: the least that is drawn of what a network is not sure of.
        """
        return as_rgb(images)


def guessing(classes: int, samples: int) -> float:
    """What guessing among so many classes reaches: 1/K, and two standard errors of it on that many samples."""
    share = 1 / classes
    return share + 2 * (share * (1 - share) / max(1, samples)) ** 0.5
