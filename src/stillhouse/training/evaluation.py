"""One pass over the validation images: the student's metrics, what its teacher says about the same images, and every loss term."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Subset

from stillhouse.data import Data
from stillhouse.data.loading import eval_batches
from stillhouse.distillers.base import Distiller
from stillhouse.randomness import samples, seed_from
from stillhouse.tasks.base import Task
from stillhouse.training.batches import on_device

EXAMPLES = 4096
"""Labelled training images from which a metric learns."""


@torch.no_grad()
def evaluate(
    student: nn.Module,
    batches: Iterable[tuple[Tensor, Any, Any]],
    accelerator: Accelerator,
    metric: Task,
    distiller: Distiller | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """What `metric` (of `stillhouse.tasks`) says of `student` over `batches` of (ids, images, targets), gathered over all processes.

    With a distiller also how the student compares with its teacher, where the teacher's own output was seen (its top-1 is that *on what
    it was shown*), and the mean of every loss term as `val_NAME`; what a distiller draws by sample follows from `seed` and the sample
    alone. Networks are in eval mode during the pass, and back in the mode they were in after it.
    """
    metric = metric.to(accelerator.device)
    sums: dict[str, Tensor] = {}
    with _evaluating(student, distiller), _teacher_output(distiller) as seen:
        for ids, images, targets in batches:
            images, targets = on_device((images, targets), accelerator.device)
            with accelerator.autocast(), samples(seed_from(seed, "evaluate"), 0, ids):
                terms = distiller((images, targets)) if distiller is not None else {}
                output = metric.ask(student, images, targets)
            metric.update(output, targets, seen.pop() if seen else None)
            for name, value in {**terms, "": torch.ones((), device=accelerator.device)}.items():
                sums[name] = sums.get(name, 0.0) + value.double() * len(targets)
    metrics: dict[str, float] = metric.compute()
    total = {name: accelerator.reduce(value, "sum") for name, value in sums.items()}
    return metrics | {f"val_{name}": (value / total[""]).item() for name, value in total.items() if name}


@torch.no_grad()
def learnt(metric: Task, network: nn.Module, data: Data, transform: Any, device: torch.device, batch: int, workers: int = 0) -> Task:
    """The metric, once it has learnt what it wants to from labelled training images: from the same ones for any number of processes."""
    if not metric.wants_examples:
        return metric
    length = len(data.train)  # type: ignore[arg-type]
    chosen = Subset(data.train, range(0, length, -(-length // EXAMPLES)))
    batches = eval_batches(chosen, transform, batch=batch, workers=workers)
    with _evaluating(network):
        metric.to(device).learn(network, (on_device((images, targets), device) for _, images, targets in batches))
    return metric


@torch.no_grad()
def measured(network: nn.Module, batches: Iterable[tuple[Tensor, Any, Any]], device: torch.device, metric: Task) -> Task:
    """`metric`, after any network's pass over `batches` of (ids, images, targets), in eval mode.

    For what one process does alone, make the metric with `sync_on_compute=False`.
    """
    metric = metric.to(device)
    with _evaluating(network):
        for ids, images, targets in batches:
            images, targets = on_device((images, targets), device)
            with samples(seed_from("evaluate"), 0, ids):
                metric.update(metric.ask(network, images, targets), targets)
    return metric


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
def _teacher_output(distiller: Distiller | None) -> Iterator[list[Any]]:
    """The list holds the output of the teacher's last run, so that no distiller needs to hand it out."""
    seen: list[Any] = []
    teacher = getattr(distiller, "teacher", None)

    def remember(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[:] = [output]

    handle = teacher.register_forward_hook(remember) if teacher is not None else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()
