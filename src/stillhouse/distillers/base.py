"""The contract: what a published way to distil has to say about itself, and nothing about devices, optimisers, loggers, files or processes.

A `Distiller` is a plain `nn.Module` that owns every network that takes part and answers: who learns (`turns`), what is minimised
(`forward`), what moves without gradients (`after_update`), what is kept (`products`). Stillhouse's loop can train it, or anyone's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.models.preprocessing import Refeed, preprocessing_of


@dataclass(frozen=True)
class Clock:
    """Where the training is: `step` updates of `steps` are done, in `epoch` (from 0) of `epochs`."""

    step: int
    steps: int
    epoch: int
    epochs: int

    @property
    def progress(self) -> float:
        """The share of the training that is done, in [0, 1]."""
        return min(1.0, self.step / max(1, self.steps))


@dataclass(frozen=True)
class Turn:
    """Who learns within a step: `parameters` take an update from the sum of `forward(batch, turn=name)`, in every `every`-th step.

    Turns that follow each other under the same name learn from one and the same pass, each with its own optimiser.

    Attributes:
        optimizer: another of timm's optimisers than the run's.
        rate: what the run's learning rate is multiplied by.
    """

    name: str
    parameters: list[nn.Parameter] = field(repr=False)
    every: int = 1
    optimizer: str | None = None
    rate: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One part of a training in several parts; each starts from the product of the one before.

    `task` is what this part is judged by, where it is not what the data are for: "encode" while nothing is learnt from labels yet. Such a
    part learns from the run's unlabelled images, if there are any.
    """

    name: str
    distiller: Distiller
    epochs: int
    task: str = ""


class Distiller(nn.Module):
    """A student, its teacher, and how the one learns from the other.

    Subclasses take networks first and the paper's hyper-parameters by keyword, with the paper's defaults; the command line and the docs are
    made from that signature. Networks beside student and teacher are named there too, and opened as teachers are if they are `frozen`, as
    students are if not. The teacher is frozen: in eval mode whatever `train()` says, outside gradients, optimisers and `state_dict`.

    Args:
        student: the network to train; batches come as it wants them.
        teacher: the network to learn from, or None. Its parameters are set to require no gradient.
    """

    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    """The names of the networks that never learn."""
    off: ClassVar[dict[str, Any]] = {"alpha": 0.0}
    """The settings under which only the labels count: training is then plain training, bit for bit."""
    tasks: ClassVar[tuple[str, ...]] = ("classify",)
    """What the method is for: classify, detect, segment, encode, generate, regress."""
    inputs: ClassVar[tuple[str, ...]] = ("images",)
    """What its networks take: images, graphs."""
    unlabelled: ClassVar[bool] = False
    """Whether it has a stage of its own that learns from images without labels, which may be other ones than the data's."""
    prepared_on: ClassVar[int | None] = None
    """How many training images `prepare` is to see, spread over the set; all of them by default."""
    teacher: Any

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval() if teacher is not None else None
        self.refeed = feed(student, teacher)
        self.register_state_dict_post_hook(_without_frozen)
        self.register_load_state_dict_pre_hook(_with_frozen)

    def prepare(self, batches: Iterable[tuple[Any, Any]]) -> None:
        """What has to be done once before the first step: `batches` are the training set, as it is when it is evaluated, on the distiller's
        device; all of it, or `prepared_on` of its images. It is done again when a run is taken up, so it must follow from them and from
        torch's generator alone.
        """

    def turns(self) -> list[Turn]:
        """Who learns, in order, within one step. One turn by default: all parameters that require grad. None: there is nothing to train."""
        return [Turn("student", [parameter for parameter in self.parameters() if parameter.requires_grad])]

    def forward(self, batch: Any, turn: str = "student") -> dict[str, Tensor]:
        """The named, already weighted loss terms of this turn (scalars); their sum is what is minimised."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it minimises")

    def after_update(self, clock: Clock) -> None:
        """What moves without gradients: an EMA teacher, a queue, a schedule. Called after every step, with a generator of its own."""

    def look(self, batch: Any) -> dict[str, Tensor]:
        """What may be drawn for these images: named maps [B, h, w] in [0, 1], such as what the teacher was shown. Called in eval mode."""
        return {}

    def watch(self) -> dict[str, Tensor]:
        """Named figures (scalars, without gradient) of the last forward pass that are worth a curve but are not minimised."""
        return {}

    def alarm(self, figures: dict[str, float]) -> str:
        """A sentence when these means of what `watch` returned say that the method does not do its work; by default none."""
        return ""

    def news(self) -> str:
        """A sentence about what it has decided since it was last asked; by default none."""
        return ""

    @property
    def product(self) -> nn.Module:
        """What is kept when the training is over."""
        return self.student

    @property
    def products(self) -> dict[str, nn.Module]:
        """All that is kept, by the name of its folder in the run's; the main one first. A set of data has a method `write(folder)`."""
        return {"student": self.product}

    def examined(self, kept: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The networks that validation measures, by name: by default the first of `kept`, which are the products or their moving averages.

        The metrics of all but the first are named after them. A method that makes data trains a fresh network on them here; the loop asks
        within `torch.no_grad()`, with a generator that follows from the step.
        """
        return dict([next(iter(kept.items()))])

    @classmethod
    def stages(cls, student: nn.Module, teacher: nn.Module | None, epochs: int, **settings: Any) -> Iterator[Stage]:
        """The parts of the training, in order. One by default."""
        yield Stage("", cls(student, **({"teacher": teacher} if teacher is not None else {}), **settings), epochs)

    def teach(self, images: Any, *args: Any) -> Any:
        """The teacher's output on images that come as the student wants them, fed as the teacher was trained; without gradient."""
        assert self.teacher is not None
        with torch.no_grad():
            return self.teacher(self.refeed(images), *args)

    def train(self, mode: bool = True) -> Distiller:
        """Training mode for all that learns; the frozen networks stay in eval mode."""
        super().train(mode)
        for name in self.frozen:
            network = getattr(self, name, None)
            if network is not None:
                network.eval()
        return self


def feed(student: nn.Module, other: nn.Module | None) -> Refeed:
    """What makes the student's images ready for another network; those of a segmenter keep their shape."""
    segments = getattr(student, "stillhouse", {}).get("task") == "segment"
    return Refeed(preprocessing_of(student), preprocessing_of(other) if other is not None else None, keep_shape=segments)


def is_data(product: nn.Module) -> bool:
    """Whether a product is a set of data, which writes itself, and not a network."""
    return hasattr(product, "write")


def _without_frozen(module: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    frozen = tuple(f"{prefix}{name}." for name in module.frozen)
    for key in [key for key in state if key.startswith(frozen)]:
        del state[key]


def _with_frozen(module: Any, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for name in module.frozen:
        if getattr(module, name, None) is not None:
            state.update(getattr(module, name).state_dict(prefix=f"{prefix}{name}."))
