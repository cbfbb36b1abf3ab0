"""Is the teacher any good, frozen, fed as it was trained; do the shapes meet; do gradients go where they belong? In seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from stillhouse import distillers, tasks
from stillhouse.data import Data
from stillhouse.data.boxes import BoxFiles
from stillhouse.data.loading import eval_batches
from stillhouse.distillers.base import Distiller, is_data
from stillhouse.errors import UserError
from stillhouse.models.detectors import classes_of
from stillhouse.models.outputs import logits_of
from stillhouse.models.precision import count_parameters
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.randomness import seeded
from stillhouse.training.batches import on_device
from stillhouse.training.evaluation import measured

SAMPLE, STEP_BATCH = 256, 4


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what was seen."""

    what: str
    seen: str


def check_distiller(distiller: Distiller, data: Data, transform: Any, allow_weak_teacher: bool = False) -> list[Finding]:
    """Looks at everything that makes a distillation silently useless.

    Args:
        distiller: student and teacher, as they would train.
        data: what they would train on.
        transform: the evaluation transform.
        allow_weak_teacher: say so instead of refusing when the teacher is no better than chance.

    Returns:
        What was seen, in order.

    Raises:
        UserError: at the first thing that cannot work, and what to do.
    """
    _refuse_without_boxes(data)
    findings = [_networks(distiller)]
    _, images, targets = next(iter(eval_batches(data.val, transform, batch=min(STEP_BATCH, len(data.val)))))  # type: ignore[arg-type]
    images, targets = on_device((images, targets), next(distiller.parameters()).device)
    with seeded("check"), put_back(distiller):
        if data.task in ANSWERS:
            findings.append(ANSWERS[data.task](distiller, images, len(data.classes)))
        if distiller.teacher is not None:
            findings += [_frozen(distiller), _normalisation(distiller)]
        if distiller.teacher is not None and data.task in ("classify", "detect", "segment"):
            findings.append(_teacher_accuracy(distiller, data, transform, allow_weak_teacher))
        findings.append(_one_step(distiller, (images, targets)))
    return findings


def _refuse_without_boxes(data: Data) -> None:
    """Where it is known without reading the images."""
    for part, purpose in ((data.train, "train"), (data.val, "validate")):
        if isinstance(part, BoxFiles) and part.iscrowd.all():
            raise UserError(f"no image of '{data.name}' to {purpose} with has a box that counts (crowds do not), expected at least one")


@contextmanager
def put_back(distiller: Distiller) -> Iterator[None]:
    """Weights, statistics, gradients and modes are afterwards what they were."""
    state = {name: value.clone() for name, value in distiller.state_dict().items() if isinstance(value, Tensor)}
    gradients = [(parameter, parameter.grad) for parameter in distiller.parameters()]
    modes = [(module, module.training) for module in distiller.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        distiller.load_state_dict(state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def _networks(distiller: Distiller) -> Finding:
    there = {name: getattr(distiller, name, None) for name in distillers.networks(type(distiller))}
    counts = {name: count_parameters(network) for name, network in there.items() if network is not None}
    patches = f"; the teacher sees {distiller.kept} of its {distiller.patches} patches" if hasattr(distiller, "patches") else ""
    return Finding("networks", ", ".join(f"{name} {count / 1e6:.2f} M parameters" for name, count in counts.items()) + patches)


def _classes(distiller: Distiller, images: Any, classes: int) -> Finding:
    distiller.eval()
    with torch.no_grad():
        outputs = {"student": distiller.student(images)} | ({"teacher": distiller.teach(images)} if distiller.teacher is not None else {})
    for role, output in outputs.items():
        logits = logits_of(output)
        if not logits.isfinite().all():
            raise UserError(
                f"the {role} answers NaN or infinity on the first images; its weights are damaged, name others with --{role}-weights"
            )
        _refuse_other_classes(role, logits.shape[1], classes)
    return Finding("classes", f"{classes}, known to {' and '.join(outputs)}")


def _refuse_other_classes(role: str, known: int, classes: int) -> None:
    if known != classes:
        trained = (
            "train it on this data first with `stillhouse distill --method scratch --student …` and name that run folder with --teacher"
        )
        remedy = trained if role == "teacher" else "give it a head for these, or name another with --student"
        raise UserError(f"the {role} knows {known} classes, the data has {classes}; {remedy}")


def _detects(distiller: Distiller, images: Any, classes: int) -> Finding:
    for role, network in (("student", distiller.student), ("teacher", distiller.teacher)):
        known = classes_of(network) if network is not None else None
        if known is not None:
            _refuse_other_classes(role, known, classes)
    distiller.eval()
    with torch.no_grad():
        outputs = {"student": distiller.student(images)} | ({"teacher": distiller.teach(images)} if distiller.teacher is not None else {})
    for role, output in outputs.items():
        if not (isinstance(output, list) and all({"boxes", "labels", "scores"} <= found.keys() for found in output)):
            raise UserError(
                f"the {role} returns {type(output).__name__} for images, expected of a detector a list with the boxes, labels and scores "
                "of each image, as torchvision's return it; name a detector"
            )
        if not all(found["boxes"].isfinite().all() for found in output):
            raise UserError(f"the {role} finds boxes at NaN or infinity; its weights are damaged, name others with --{role}-weights")
    return Finding("answers", f"boxes, labels and scores by {' and '.join(outputs)}")


def _encodes(distiller: Distiller, images: Any, classes: int) -> Finding:
    distiller.eval()
    with torch.no_grad():
        asked = distiller.student if is_data(distiller.product) else next(iter(distiller.examined(distiller.products).values()))
        features = asked.eval()(images)  # a network trained on a set of data is not made before there is one
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.isfinite().all():
        seen = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"the student answers {seen} for images, expected finite features [images, D]; name an encoder such as timm's")
    return Finding("features", f"{features.shape[1]} of each image by student")


ANSWERS = {"classify": _classes, "segment": _classes, "regress": _classes, "detect": _detects, "encode": _encodes}
"""What is asked of the networks before anything is trained, by task."""


def _frozen(distiller: Distiller) -> Finding:
    distiller.train()
    teacher = distiller.teacher
    assert teacher is not None
    learning = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    if learning or any(module.training for module in teacher.modules()):
        raise UserError("the teacher is not frozen or not in eval mode after train(); its distiller must leave `Distiller.train` as it is")
    return Finding("teacher", "frozen, in eval mode")


def _normalisation(distiller: Distiller) -> Finding:
    student, teacher = preprocessing_of(distiller.student), preprocessing_of(distiller.teacher)  # type: ignore[arg-type]
    if student is None or teacher is None:
        return Finding("normalisation", "not known for both networks: the teacher gets images as the student does")
    if student == teacher:
        return Finding("normalisation", "the same for both networks")
    return Finding("normalisation", f"the teacher's images are made anew: mean {teacher.mean}, std {teacher.std}, {teacher.size} px")


def some_of(samples: Any, count: int) -> Subset[Any]:
    """At most so many samples, from all over a data set."""
    return Subset(samples, range(0, len(samples), max(1, len(samples) // count))[:count])


def _teacher_accuracy(distiller: Distiller, data: Data, transform: Any, allow_weak_teacher: bool) -> Finding:
    spread = some_of(data.val, SAMPLE)
    device = next(distiller.parameters()).device
    assert distiller.teacher is not None
    task: Any = tasks.find(data.task)
    whole = nn.Sequential(distiller.refeed, distiller.teacher)
    metric: Any = measured(whole, eval_batches(spread, transform, batch=32), device, task(data.classes, sync_on_compute=False))
    seen, count = metric.compute()[task.headline], len(spread)
    found = f"{task.titles[task.headline]} {seen:.3f} on {count} validation images (chance reaches {metric.chance:.3f})"
    if not seen > metric.chance and not allow_weak_teacher:
        raise UserError(f"the teacher is no better than chance: {found}; give it weights trained on these classes, or --allow-weak-teacher")
    return Finding("teacher's accuracy", found)


def _one_step(distiller: Distiller, batch: tuple[Any, Any]) -> Finding:
    """Gradients of one small batch."""
    distiller.train()
    silent: list[str] = []
    turns = distiller.turns()
    if not turns:
        return Finding("one step", "there is none: nothing is trained")
    for name, together in groupby(turns, key=lambda turn: turn.name):
        terms = distiller(batch, name)
        for term, value in terms.items():
            if not value.isfinite():
                raise UserError(
                    f"the loss term '{term}' is {float(value.detach())} on the first images; check the teacher's weights and the settings"
                )
        torch.stack(list(terms.values())).sum().backward()
        silent += _gradients(distiller, [parameter for turn in together for parameter in turn.parameters])
        distiller.zero_grad(set_to_none=True)
    without = f"; none for {', '.join(silent[:3])}{' …' if len(silent) > 3 else ''}" if silent else ""
    return Finding("one step", f"finite gradients where they belong, none in the teacher{without}")


def _gradients(distiller: Distiller, learning: list[nn.Parameter]) -> list[str]:
    """The names of learning parameters without a gradient; refuses gradients that are not finite or where none belong."""
    wanted = {id(parameter) for parameter in learning}
    silent = []
    for name, parameter in distiller.named_parameters():
        if parameter.grad is None:
            silent += [name] if id(parameter) in wanted else []
        elif not parameter.grad.isfinite().all():
            raise UserError(f"the gradient of {name} is not finite on the first images; lower the weights of the loss terms")
        elif not parameter.requires_grad:
            raise UserError(f"{name} is frozen but received a gradient")
    if len(silent) == len(wanted):
        raise UserError("nothing that learns received a gradient; the loss does not depend on the student")
    return silent
