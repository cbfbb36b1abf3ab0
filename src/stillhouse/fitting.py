"""What settings, data and networks ask of each other: which setting is whose, which task it is, what is opened and how images are made."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from torch import nn

from stillhouse import distillers
from stillhouse.data import OF_CLASSES, Data, TaskName
from stillhouse.data.dense_transforms import dense_transforms
from stillhouse.data.transforms import eval_transform, train_transform
from stillhouse.distillers.base import Distiller
from stillhouse.errors import UserError, nearest
from stillhouse.models.detectors import is_detector
from stillhouse.models.opening import open_model, task_of
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of, set_preprocessing
from stillhouse.training.recipe import NAMES, Recipe

AUGMENTATION = frozenset(inspect.signature(train_transform).parameters) - {"preprocessing", "data"}
OWN = (
    *("method", "teacher", "student", "data", "unlabelled", "task", "teacher_weights", "student_weights", "inherit", "judge"),
    *("allow_partial", "allow_weak_teacher", "baseline", "bad_data", "teacher_precision", "teacher_error", "teacher_device"),
)
"""The settings that are `stillhouse.distill`'s own, not the loop's, the augmentation's or the method's."""
OF_SEVERAL_TASKS = ("scenes", "voc")
"""The data that are there to detect as well as to segment."""
DENSE = ("detect", "segment")
SIZES = {"classify": 224, "encode": 224, "regress": 224, "generate": 32, "segment": 512}
"""The side of the images, in pixels, where neither data nor network name one."""


def split_settings(method: str | type[Distiller], settings: dict[str, Any]) -> tuple[Recipe, dict[str, Any], dict[str, Any]]:
    """The recipe, the augmentation and the method's own settings (with their defaults) out of one flat list.

    Raises:
        UserError: for a name none of them knows, with the nearest one.
    """
    own = distillers.settings(method)
    settings = {name: value for name, value in settings.items() if name not in OWN and name not in distillers.others(method)}
    for name in settings:
        if name not in NAMES | AUGMENTATION | set(own):
            known = [*own, *NAMES, *AUGMENTATION]
            raise UserError(
                f"'{name}' is no setting of {distillers.name_of(method)} or of the training{nearest(name, known)}; "
                f"the method's own are {', '.join(own) or 'none'}"
            )
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}  # as before it was YAML
    recipe = Recipe(**{name: value for name, value in settings.items() if name in NAMES})
    augmentation = {name: value for name, value in settings.items() if name in AUGMENTATION}
    return recipe, augmentation, {name: settings.get(name, parameter.default) for name, parameter in own.items()}


def task_of_job(job: dict[str, Any]) -> TaskName | None:
    """The task asked for; where none is and the data allow several, what the student is there for."""
    data, student = job["data"], job["student"]
    open_question = job["task"] is None and isinstance(data, str) and data.partition(":")[0] in OF_SEVERAL_TASKS and "task=" not in data
    if not open_question or student is None:
        return job["task"]  # type: ignore[no-any-return]
    found = task_of_network(student)
    return found if found in DENSE else None


def task_of_network(network: str | nn.Module) -> TaskName | None:
    """What a network is there for, by its name or its contract; None where neither tells."""
    if isinstance(network, str):
        return task_of(network)
    return "detect" if is_detector(network) else getattr(network, "stillhouse", {}).get("task")


def for_method(method: str | type[Distiller], data: Data, asked: str | None) -> Data:
    """Images with class numbers, for the first task of the method that takes such, where it has nothing to do with classifying them."""
    fitting = [task for task in distillers.find(method).tasks if task in OF_CLASSES]
    if asked is not None or data.inputs != "images" or data.task not in OF_CLASSES or data.task in fitting or not fitting:
        return data
    return dataclasses.replace(data, task=fitting[0])  # type: ignore[arg-type]


def refuse_other_task(method: str | type[Distiller], data: Data) -> None:
    """Refuses data that are not what the method is for.

    Raises:
        UserError: naming the methods that are.
    """

    def fits(kind: type[Distiller]) -> bool:
        return data.task in kind.tasks and data.inputs in kind.inputs

    kind = distillers.find(method)
    if not fits(kind):
        fitting = sorted(name for name in distillers.modules() if fits(distillers.find(name)))
        raise UserError(
            f"method {distillers.name_of(method)} is for {' or '.join(kind.inputs)} to {' or '.join(kind.tasks)}, and '{data.name}' has "
            f"{data.inputs} to {data.task}; use one of {', '.join(fitting)}"
        )


def fit_of(data: Data) -> dict[str, Any]:
    """What the data ask of a network, as `open_model` wants to hear it. Classifiers know their own image size."""
    named = {"names": data.classes} if data.task in DENSE else {}
    size = {"image_size": data.size} if data.task in (*DENSE, "generate") else {}
    return {"classes": len(data.classes), "channels": data.channels, "inputs": data.inputs, "task": data.task, **named, **size}


def transforms_of(preprocessing: Preprocessing, data: Data, augmentation: dict[str, Any]) -> tuple[Any, Any]:
    """The training and the evaluation transform."""
    if data.inputs == "graphs":
        from stillhouse.data.graphs import Graphs

        return Graphs(), Graphs()
    if data.task in DENSE:
        return dense_transforms(preprocessing, data, **augmentation)
    if data.task == "regress":
        if any(value for value in augmentation.values()):
            raise UserError(f"the targets of '{data.name}' are those of images as they are: leave {', '.join(augmentation)} out")
        as_it_is: dict[str, Any] = {"hflip": 0.0, "crop_scale": (1.0, 1.0), "auto_augment": "", "random_erasing": 0.0}
        return train_transform(preprocessing, data, **as_it_is), eval_transform(preprocessing, data)
    return train_transform(preprocessing, data, **augmentation), eval_transform(preprocessing, data)


def open_student(spec: str | nn.Module, data: Data, weights: str, allow_partial: bool, seed: int) -> nn.Module:
    """The student with a head that fits the data. With random weights it takes images normalised by the data's own mean and std."""
    student = open_model(spec, **fit_of(data), weights=weights, allow_partial=allow_partial, seed=seed, new_head=True)
    normalises_itself = data.task == "detect" or data.inputs == "graphs"
    if weights == "random" and isinstance(spec, str) and student.stillhouse["weights"] == "random" and not normalises_itself:  # type: ignore[index]
        own = preprocessing_of(student)
        size = own.size if own and hasattr(student, "patch_embed") else getattr(getattr(student, "config", None), "image_size", None)
        size = int(student.shape[-1]) if data.task == "generate" else size  # type: ignore[index, arg-type]  # what it makes
        set_preprocessing(student, Preprocessing(data.mean, data.std, size or data.size or (own.size if own else None) or SIZES[data.task]))
    return student


def input_of(student: nn.Module, data: Data) -> Preprocessing:
    """What the data's images are made into: what the student was trained with, or the data's own statistics."""
    known = preprocessing_of(student)
    if data.task == "detect" or data.inputs == "graphs":
        return known or Preprocessing((0.0,) * data.channels, (1.0,) * data.channels, None)
    known = known or Preprocessing(data.mean, data.std, data.size or SIZES[data.task])
    return known if known.size or data.task not in DENSE else dataclasses.replace(known, size=data.size or SIZES[data.task])
