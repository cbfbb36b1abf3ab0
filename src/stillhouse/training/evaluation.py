"""One pass over the validation images: the student's metrics, what its teacher says about the same images, and every loss term."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.models.outputs import logits_of
from stillhouse.randomness import samples, seed_from
from stillhouse.tasks.classify import Classify


@torch.no_grad()
def evaluate(
    student: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    accelerator: Accelerator,
    classes: int,
    distiller: Distiller | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Metrics of `student` over `batches` of (ids, images, labels), gathered over all processes.

    With a distiller also the agreement with its teacher, the teacher's own top-1 *on what it was shown*, and the mean of every loss term
    as `val_NAME`; what a distiller draws by sample follows from `seed` and the sample alone. Networks are in eval mode during the pass,
    and back in the mode they were in after it.
    """
    task = Classify(classes).to(accelerator.device)
    sums: dict[str, Tensor] = {}
    with _evaluating(student, distiller), _teacher_logits(distiller) as seen:
        for ids, images, labels in batches:
            images, labels = images.to(accelerator.device, non_blocking=True), labels.to(accelerator.device, non_blocking=True)
            with accelerator.autocast(), samples(seed_from(seed, "evaluate"), 0, ids):
                terms = distiller((images, labels)) if distiller is not None else {}
                logits = logits_of(student(images))
            task.update(logits, labels, seen.pop() if seen else None)
            for name, value in {**terms, "": torch.ones((), device=images.device)}.items():
                sums[name] = sums.get(name, 0.0) + value.double() * len(labels)
    metrics = task.compute()
    total = {name: accelerator.reduce(value, "sum") for name, value in sums.items()}
    return metrics | {f"val_{name}": (value / total[""]).item() for name, value in total.items() if name}


@torch.no_grad()
def accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor]], device: torch.device) -> float:
    """Top-1 of any network over `batches` of (ids, images, labels), in eval mode, on this process alone."""
    right = count = 0
    with _evaluating(network):
        for _, images, labels in batches:
            right += int((logits_of(network(images.to(device))).argmax(-1).cpu() == labels).sum())
            count += len(labels)
    return right / count


@contextmanager
def _evaluating(*networks: nn.Module | None) -> Iterator[None]:
    present = [(network, network.training) for network in networks if network is not None]
    for network, _ in present:
        network.eval()
    try:
        yield
    finally:
        for network, training in present:
            network.train(training)


@contextmanager
def _teacher_logits(distiller: Distiller | None) -> Iterator[list[Tensor]]:
    """The list holds the logits of the teacher's last run, so that no distiller needs to hand them out."""
    seen: list[Tensor] = []
    teacher = getattr(distiller, "teacher", None)

    def remember(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[:] = [logits_of(output)]

    handle = teacher.register_forward_hook(remember) if teacher is not None else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()
