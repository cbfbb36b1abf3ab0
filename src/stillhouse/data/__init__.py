"""The users' data by one short spec, or by the torch datasets they already have."""

from __future__ import annotations

import errno
import hashlib
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from stillhouse.errors import UserError, nearest

LOG = logging.getLogger("stillhouse")
BadData = Literal["refuse", "skip"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TaskName = Literal["classify", "detect", "segment", "encode", "generate", "regress"]
OF_CLASSES = ("classify", "encode", "generate")
"""The tasks that take images with class numbers: to name them, to be told apart without learning them, to be made."""
IGNORED = 255
"""The value of a mask's pixels that nobody is judged by."""
SLACK = 1.0
"""Pixels that a box may reach out of its image: rounding, not a mistake."""
FORMS = {
    **{"digits": "digits", "fashion-mnist": "fashion-mnist", "animal-mnist": "animal-mnist"},
    **{"imagefolder": "imagefolder:DIR", "hf": "hf:DIR_OR_NAME"},
    **{"scenes": "scenes", "coco": "coco:DIR", "voc": "voc:DIR", "masks": "masks:DIR", "cityscapes": "cityscapes:DIR"},
    **{"deepforest": "deepforest", "histolytics": "histolytics", "contexts": "contexts", "motifs": "motifs", "b3db": "b3db"},
}


@dataclass(frozen=True)
class Data:
    """A training and a validation set of raw images: what `open_data` returns, and what users build from torch datasets of their own.

    `dataset[i]` is `(image, target)`: a PIL image or a uint8 tensor [C, H, W], before any transform, and what is to be said of it:

    - `classify`: a class number in [0, K);
    - `detect`: {"boxes": float [n, 4] as x1, y1, x2, y2 in pixels, "labels": long [n] in 1..K, 0 being torchvision's background}, and if
      some are crowds that count neither way "iscrowd": bool [n]; n may be 0;
    - `segment`: a mask of class numbers in [0, K), uint8 [H, W], 255 where nobody is judged;
    - `encode`, `generate`: a class number, from which an encoder does not learn; it says what an image is to be an image of;
    - `regress`: what a network is to answer, floats [K].

    With `inputs="graphs"` there is a graph of torch-geometric's in place of the image.

    Example:
        >>> from torchvision.datasets import CIFAR10
        >>> cifar = [CIFAR10("data", train=part, download=True) for part in (True, False)]
        >>> data = Data("cifar10", train=cifar[0], val=cifar[1], classes=cifar[0].classes, size=32)

    Attributes:
        classes: their names; in detection without the background.
        task: what a student is to say of an image.
        inputs: images or graphs. Of graphs `channels` is the number of kinds of nodes.
        size: the images' side in pixels, None if it varies.
        mean, std: of the channels, for pixels in [0, 1]. By default ImageNet's for three channels, one half for any other number.
        skipped: the bad files that were left out, each with what is wrong with it.
        fingerprint: sha256 of file names and sizes, or of the arrays; of what is known without reading the images for a user's own sets.

    Raises:
        UserError: if a set is empty or a first sample is not what is said above, or there are too few classes.
    """

    name: str
    train: Dataset[Any]
    val: Dataset[Any]
    classes: list[str]
    channels: int = 3
    size: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    skipped: list[str] = field(default_factory=list)
    fingerprint: str = ""
    task: TaskName = "classify"
    inputs: Literal["images", "graphs"] = "images"

    def __post_init__(self) -> None:
        known = (IMAGENET_MEAN, IMAGENET_STD) if self.channels == 3 else ((0.5,) * self.channels,) * 2
        facts = repr((self.name, [_length(self.train), _length(self.val)], self.classes, self.channels, self.size))
        defaults = {"mean": known[0], "std": known[1], "fingerprint": hashlib.sha256(facts.encode()).hexdigest()}
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        least = 2 if self.task in ("classify", "segment") else 1
        if len(self.classes) < least:
            raise UserError(f"data '{self.name}' has the classes {self.classes}, expected at least {'two' if least == 2 else 'one'}")
        for part in ("train", "val"):
            self._look_at_first(part)

    def _look_at_first(self, part: str) -> None:
        dataset = getattr(self, part)
        if not _length(dataset):
            raise UserError(f"the {part} set of '{self.name}' is empty, expected at least one image")
        sample = dataset[0]
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise UserError(f"the {part} set of '{self.name}' gives a {type(sample).__name__}, expected a pair (image, label)")
        image, label = sample
        if self.inputs == "graphs":
            pass  # what they are is known where they are put together
        elif isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
            if image.shape[0] != self.channels:
                raise UserError(f"the {part} set of '{self.name}' has {image.shape[0]} channels, expected {self.channels}: say channels=…")
        elif not isinstance(image, Image.Image):
            kind = f"{image.dtype} tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise UserError(
                f"the {part} set of '{self.name}' gives images as {kind}, expected PIL images or uint8 tensors [C, H, W]; "
                "leave its transforms out: images are resized, augmented and normalised afterwards"
            )
        wrong = self.wrong(image, label)
        if wrong:
            raise UserError(f"the {part} set of '{self.name}' has {wrong}")

    @property
    def wrong(self) -> Callable[[Any, Any], str]:
        """Says of an image and its target what is wrong with the target, "" if nothing is; every sample that is read is asked."""
        return partial(_WRONG[self.task], classes=len(self.classes))


def _wrong_label(image: Any, label: Any, classes: int) -> str:
    try:
        return "" if 0 <= int(label) < classes else f"the label {label}, expected 0 to {classes - 1}"
    except (TypeError, ValueError):
        return f"a {type(label).__name__} as label, expected a class number; for boxes say task='detect', for masks task='segment'"


def _wrong_boxes(image: Any, target: Any, classes: int) -> str:
    if not isinstance(target, dict) or not {"boxes", "labels"} <= target.keys():
        return f"a {type(target).__name__} as target, expected a dictionary with 'boxes' [n, 4] and 'labels' [n]"
    boxes, labels = target["boxes"], target["labels"]
    if boxes.ndim != 2 or boxes.shape[1:] != (4,) or labels.shape != boxes.shape[:1]:
        return f"boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)}, expected [n, 4] and [n]"
    if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= classes:
        return f"the labels {labels.tolist()}, expected 1 to {classes} (0 is the background)"
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        return f"a box without area among {boxes.tolist()}, expected x1 < x2 and y1 < y2"
    height, width = _size(image)
    inside = (boxes >= -SLACK) & (boxes <= boxes.new_tensor([width, height, width, height]) + SLACK)
    return "" if inside.all() else f"a box that reaches out of its image of {width} x {height} among {boxes.tolist()}: cut it to the image"


def _wrong_mask(image: Any, mask: Any, classes: int) -> str:
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype.is_floating_point:
        return f"a {type(mask).__name__} as mask, expected class numbers, uint8 [H, W]"
    if tuple(mask.shape) != _size(image):
        seen, expected = (f"{width} x {height}" for height, width in (mask.shape, _size(image)))
        return f"a mask of {seen} for an image of {expected}, expected one size"
    if not (((mask >= classes) | (mask < 0)) & (mask != IGNORED)).any():
        return ""
    unknown = sorted(set(mask.unique().tolist()) - set(range(classes)) - {IGNORED})
    return f"the mask values {unknown}, expected 0 to {classes - 1}, or {IGNORED} where nobody is judged" if unknown else ""


def _wrong_floats(image: Any, target: Any, classes: int) -> str:
    if not isinstance(target, Tensor) or not target.dtype.is_floating_point or target.shape != (classes,):
        kind = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        return f"{kind} as target, expected floats [{classes}], one for each of `classes`"
    return "" if target.isfinite().all() else "a target that is NaN or infinite, expected finite numbers"


def _size(image: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    return (image.shape[-2], image.shape[-1]) if isinstance(image, Tensor) else (image.height, image.width)


_WRONG = {
    **dict.fromkeys(OF_CLASSES, _wrong_label),
    **{"detect": _wrong_boxes, "segment": _wrong_mask, "regress": _wrong_floats},
}


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        raise UserError(
            f"{type(dataset).__name__} has no length: streaming sets are not supported, give a set with len() and [i]"
        ) from None


def open_data(spec: str | Data, *, seed: int = 0, bad_data: BadData = "refuse", task: TaskName | None = None) -> Data:
    """Open a data set by its spec; a `Data` passes through.

    To classify: `digits`, `fashion-mnist`, `animal-mnist`, `imagefolder:DIR`, `hf:DIR_OR_NAME`. To detect: `coco:DIR`, `voc:DIR`,
    `deepforest`. To segment: `masks:DIR`, `cityscapes:DIR`, `histolytics`, `contexts`. To do either of the last two: `scenes`. Graphs to
    classify: `motifs`, `b3db`.
    What is there to classify can also be encoded or generated. A run whose product is a data set: its folder. Each takes options after a
    colon: `digits:canvas=16,clutter=2,train=300`, `scenes:size=64,task=segment`, `imagefolder:DIR:val=0.1` (see this package's modules).

    Args:
        seed: picks the subset that `train=N` leaves, and what generated sets draw. Never the split into train and val, nor the
            validation images: runs are compared on the same images, and a teacher trained with one seed has not seen another's val.
        bad_data: "refuse" stops at broken images and names them, "skip" leaves them out and names them in `Data.skipped`.
        task: what a student is to do, where the data allow several or to be sure; by default what the data are for.

    Raises:
        UserError: if there is no such data set or option, nothing usable in it, or it is for another task.
    """
    if bad_data not in ("refuse", "skip"):
        raise UserError(f"bad_data is '{bad_data}', expected 'refuse' or 'skip'")
    if not isinstance(spec, (str, Data)):
        raise UserError(f"the data are a {type(spec).__name__}, expected a name such as {FORMS['imagefolder']}, or a Data")
    if task is not None and task not in _WRONG:
        raise UserError(f"there is no task '{task}'{nearest(task, _WRONG)}; expected {', '.join(_WRONG)}")
    try:
        data = spec if isinstance(spec, Data) else _open(spec, seed, bad_data, task)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"the name of the data begins '{str(spec)[:40]}' and is longer than a file's can be") from error
    if data is not spec and data.skipped:
        LOG.warning("%d left out of '%s': %s%s", len(data.skipped), spec, "; ".join(data.skipped[:3]), "; …" * (len(data.skipped) > 3))
    if task in OF_CLASSES and data.task in OF_CLASSES and data.inputs == "images":
        data = data if task == data.task else replace(data, task=task)
    if task is not None and data.task != task:
        raise UserError(f"the data '{data.name}' are to {data.task}, not to {task}: leave --task out or name other data")
    return data


def _open(spec: str, seed: int, bad_data: BadData, task: TaskName | None) -> Data:
    source, _, rest = spec.partition(":")
    if os.path.isdir(os.path.join(spec, "data")):  # unlike Path, it answers for names that no file can have
        from stillhouse.data.condensed import open_condensed

        return open_condensed(Path(spec))
    if source not in FORMS:
        hint = f", did you mean 'imagefolder:{spec}'?" if os.path.isdir(spec) else nearest(source, FORMS)
        raise UserError(f"unknown data set '{spec}'{hint or ':'} expected one of {', '.join(FORMS.values())}")
    module = importlib.import_module(f"{__name__}.{source.replace('-', '_')}")
    opener = getattr(module, f"open_{source.replace('-', '_')}")
    offered = {"seed": seed, "bad_data": bad_data, "task": task}
    wanted = inspect.signature(opener).parameters
    data: Data = opener(rest, **{name: value for name, value in offered.items() if name in wanted})
    return data
