"""What a step of ACAM-KD costs here above plain training and above plain feature distillation, for detectors and segmenters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stillhouse.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from stillhouse.distillers.base import Distiller

PLAIN, FEATURES, ACAM = "plain training", "plain feature KD", "ACAM-KD"
BOXES = 4
"""Objects in a made-up image."""


def estimate_dense(
    teacher: nn.Module, student: nn.Module, *, image_size: int, classes: int, batch: int, rounds: int = 5, precision: str = "fp32"
) -> list[dict[str, Any]]:
    """Measures whole training steps (forward, backward, SGD with momentum) on random images; all in turn, in one process.

    Args:
        teacher: a detector or segmenter; copies on the same weights run.
        student: likewise; copies of it learn.
        image_size: side of the images, in pixels; a detector's own `min_size` has the last word.
        classes: how many there are, in detection without the background.
        batch: images in a step.
        rounds: measured steps of each row, after one that is not.
        precision: "fp32", or "bf16" or "fp16" under autocast.

    Returns:
        A row each for plain training, `fitnet` on the maps, and ACAM-KD with its defaults: `name`; `step_s` in seconds and the ratios
        `of_plain` and `of_features` as (median, lower, upper quartile); `memory_bytes`, what a step needs at its peak beyond what is held
        before it, as `memory_of` measures it, and `above_plain`, how much of it is more than plain training's.

    Raises:
        UserError: if a setting is out of range, or the networks are not of one kind.
    """
    from stillhouse.measure.timing import interleaved, peak_memory, ratio, spread
    from stillhouse.models.detectors import is_detector

    for name, value in {"image_size": image_size, "classes": classes, "batch": batch}.items():
        if value < 1:
            raise UserError(f"{name} is {value}, expected at least 1")
    if is_detector(teacher) != is_detector(student):
        raise UserError("one network is a detector and the other is not; name two detectors or two segmenters")
    examples = batch_of(is_detector(student), image_size, classes, batch)
    distillers = _distillers(teacher, student)
    steps: dict[str, Callable[[], object]] = {name: step_of(each.train(), examples, precision) for name, each in distillers.items()}
    memory = {name: peak_memory(step) for name, step in steps.items()}
    seconds = interleaved(steps, rounds)
    return [
        {
            "name": name,
            "step_s": spread(seconds[name]),
            "of_plain": ratio(seconds[name], seconds[PLAIN]),
            "of_features": ratio(seconds[name], seconds[FEATURES]),
            "memory_bytes": memory[name].bytes,
            "memory_of": memory[name].of,
            "above_plain": memory[name].bytes - memory[PLAIN].bytes,
        }
        for name in steps
    ]


def _distillers(teacher: nn.Module, student: nn.Module) -> dict[str, Distiller]:
    """Each hooks modules of its own; students are copies, teachers share their weights."""
    import copy

    from stillhouse.distillers.classics.fitnet import FitNet
    from stillhouse.distillers.classics.scratch import Scratch
    from stillhouse.distillers.dense.acam_kd import ACAMKD
    from stillhouse.measure.copies import with_frozen_weights
    from stillhouse.models.levels import default_place

    def networks() -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(student), with_frozen_weights(teacher)

    features = FitNet(*networks(), student_layer=default_place(student), teacher_layer=default_place(teacher))
    return {PLAIN: Scratch(copy.deepcopy(student)), FEATURES: features, ACAM: ACAMKD(*networks())}


def batch_of(detect: bool, image_size: int, classes: int, batch: int) -> tuple[Any, Any]:
    """Random images, with boxes or with masks."""
    import torch

    random = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, image_size, image_size, generator=random)
    if not detect:
        return images, torch.randint(classes, (batch, image_size, image_size), generator=random)
    corners = torch.rand(batch, BOXES, 2, generator=random) * image_size / 2
    boxes = torch.cat([corners, corners + image_size / 4], dim=-1)
    labels = torch.randint(1, classes + 1, (batch, BOXES), generator=random)
    return list(images), [{"boxes": boxes[i], "labels": labels[i]} for i in range(batch)]


def step_of(distiller: Distiller, batch: tuple[Any, Any], precision: str) -> Callable[[], None]:
    """A whole update of everything that learns, where the networks are."""
    import torch

    from stillhouse.training.batches import on_device

    learning = [parameter for turn in distiller.turns() for parameter in turn.parameters]
    device = learning[0].device
    optimizer = torch.optim.SGD(learning, lr=1e-6, momentum=0.9)
    here = on_device(batch, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
            loss = torch.stack(list(distiller((here[0], here[1])).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
