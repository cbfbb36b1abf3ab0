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
    teacher: nn.Module,
    student: nn.Module,
    *,
    image_size: int | tuple[int, int],
    classes: int,
    batch: int,
    rounds: int = 5,
    precision: str = "fp32",
) -> list[dict[str, Any]]:
    """Measures whole training steps (forward, backward, SGD with momentum) on random images; all in turn, in one process.

    Args:
        teacher: a detector or segmenter; copies on the same weights run.
        student: likewise; copies of it learn.
        image_size: side of the images, or their height and width, in pixels; a detector's own `min_size` has the last word.
        classes: how many there are, in detection without the background.
        batch: images in a step.
        rounds: measured steps of each row, after two that are not.
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

    for setting, value in {"image_size": image_size, "classes": classes, "batch": batch}.items():
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise UserError(f"{setting} is {value}, expected at least 1")
    if is_detector(teacher) != is_detector(student):
        raise UserError("one network is a detector and the other is not; name two detectors or two segmenters")
    examples = batch_of(is_detector(student), image_size, classes, batch)
    steps: dict[str, Callable[[], object]] = {
        name: step_of(distiller_of(name, teacher, student).train(), examples, precision) for name in (PLAIN, FEATURES, ACAM)
    }
    for step in steps.values():
        step()  # the optimiser makes its state, libraries load what they need
    memory = {name: peak_memory(step) for name, step in steps.items()}
    seconds = interleaved(steps, rounds, warmup=0)
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


def distiller_of(name: str, teacher: nn.Module, student: nn.Module) -> Distiller:
    """A row's distiller with its defaults, on a copy of the student and the weights of the teacher: it hooks modules of its own."""
    import copy

    from stillhouse.distillers.classics.fitnet import FitNet
    from stillhouse.distillers.classics.scratch import Scratch
    from stillhouse.distillers.dense.acam_kd import ACAMKD
    from stillhouse.measure.copies import with_frozen_weights
    from stillhouse.models.levels import default_place

    own = copy.deepcopy(student)
    if name == PLAIN:
        return Scratch(own)
    if name == ACAM:
        return ACAMKD(own, with_frozen_weights(teacher))
    return FitNet(own, with_frozen_weights(teacher), student_layer=default_place(student), teacher_layer=default_place(teacher))


def batch_of(detect: bool, image_size: int | tuple[int, int], classes: int, batch: int) -> tuple[Any, Any]:
    """Random images, with boxes or with masks."""
    import torch

    random = torch.Generator().manual_seed(0)
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    images = torch.rand(batch, 3, height, width, generator=random)
    if not detect:
        return images, torch.randint(classes, (batch, height, width), generator=random)
    corners = torch.rand(batch, BOXES, 2, generator=random) * torch.tensor([width, height]) / 2
    boxes = torch.cat([corners, corners + torch.tensor([width, height]) / 4], dim=-1)
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
