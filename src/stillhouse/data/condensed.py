"""Condensed data: few images, learnt or chosen, with what a network is to say of them, in place of many. What condensation leaves behind.

A run's folder `data` holds `pairs.safetensors` (`images` [m, C, H, W] and `targets`), `about.json`, and `images.png` to look at. With
`--data RUN` any network trains on the pairs. Images stay the floats they were learnt as, with 1 for white and values beyond 0 and 1 where
learning went there: rounding them to a picture's 8 bits would be other data. They are validated on the images of the run's own data: their
targets are what the run's teacher says of them, or their classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.utils import save_image

from stillhouse.data import Data, open_data
from stillhouse.data.arrays import Arrays, fingerprint
from stillhouse.errors import UserError
from stillhouse.models.forests import is_forests
from stillhouse.run_folder import read_settings, whole_folder, writing

ASKED_AT_ONCE = 256
SHOWN = 64
"""Pixels of a smaller image's side in the sheet, about: to be looked at."""


class Condensed(nn.Module):
    """Images and their targets, as parameters; class numbers, which cannot be learnt, as a buffer.

    Args:
        images: floats [m, C, H, W], 1 is white.
        targets: features, floats [m, D], to regress; to classify, soft labels, floats [m, K], or class numbers [m].
        mean, std: how images are normalised for the networks they were learnt with, one value a channel.
        task: what a network trained on them does.

    Raises:
        UserError: if there is no image, images are whole numbers, or the targets are not one of the above for each image.
    """

    images: Tensor
    targets: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        task: Literal["classify", "regress"] = "regress",
    ) -> None:
        super().__init__()
        if images.ndim != 4 or not images.is_floating_point():
            raise UserError(
                f"the images are {images.dtype} {tuple(images.shape)}, expected floats [m, C, H, W], 1 for white: "
                "whole numbers cannot be learnt"
            )
        if not len(images) or len(images) != len(targets):
            raise UserError(f"there are {len(images)} images and {len(targets)} targets, expected as many, at least one")
        numbers = task == "classify" and targets.ndim == 1 and not targets.is_floating_point()
        if not numbers and not (targets.ndim == 2 and targets.is_floating_point()):
            classes = " or class numbers [m]" if task == "classify" else ""
            raise UserError(f"the targets are {targets.dtype} {tuple(targets.shape)}, expected floats [m, D]{classes} to {task}")
        self.task: Literal["classify", "regress"] = task
        self.images = nn.Parameter(images.detach().clone())
        if numbers:
            self.register_buffer("targets", targets.clone())
        else:
            self.targets = nn.Parameter(targets.detach().clone())
        for name, values in (("mean", mean), ("std", std)):
            column = torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)
            self.register_buffer(name, column, persistent=False)

    def __len__(self) -> int:
        return len(self.images)

    def fed(self) -> Tensor:
        """The images as networks take them, normalised [m, C, H, W], with gradient."""
        return (self.images - self.mean) / self.std

    def no_weight_decay(self) -> set[str]:
        """Neither an image nor a target is better for being smaller."""
        return {"images", "targets"}

    @torch.no_grad()
    def write(self, folder: str | Path) -> None:
        """Writes the pairs, what they are and what they look like to `folder`: all of it or nothing; pairs written there before go.

        Raises:
            UserError: if the folder holds something else or cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / "about.json").is_file() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"'{folder}' exists and holds no condensed data, give another folder")
        images, targets = (tensor.detach().cpu().contiguous() for tensor in (self.images, self.targets))
        about = {
            "task": self.task,
            "images": list(images.shape),
            "targets": list(targets.shape),
            "mean": [round(value, 6) for value in self.mean.flatten().tolist()],
            "std": [round(value, 6) for value in self.std.flatten().tolist()],
            "bytes": {"images": images.nbytes, "targets": targets.nbytes},
        }
        with writing(folder), whole_folder(folder) as new:
            save_file({"images": images, "targets": targets}, new / "pairs.safetensors")
            (new / "about.json").write_text(json.dumps(about, indent=1) + "\n")
            larger = max(1, SHOWN // images.shape[-1])
            shown = F.interpolate(images[:, :3] if images.shape[1] >= 3 else images[:, :1], scale_factor=larger)
            save_image(shown, new / "images.png", nrow=max(1, round(len(images) ** 0.5)), padding=1, pad_value=0.5)


def read_condensed(folder: str | Path) -> Condensed:
    """The pairs that `Condensed.write` wrote to `folder`.

    Raises:
        UserError: if they are not there or damaged.
    """
    folder = Path(folder)
    try:
        about, tensors = json.loads((folder / "about.json").read_text()), load_file(folder / "pairs.safetensors")
        if about["task"] not in ("classify", "regress"):
            raise ValueError(f"nothing is done by the name {about['task']}")
        return Condensed(tensors["images"], tensors["targets"], about["mean"], about["std"], task=about["task"])
    except (OSError, LookupError, TypeError, ValueError, SafetensorError, UserError) as error:
        raise UserError(f"'{folder}' holds no whole condensed data ({error}); let the run write it again with --resume") from error


def open_condensed(folder: str | Path) -> Data:
    """A run's condensed data to train on, with the images that its own data validate on.

    To regress, what is to be said of these is what the run's teacher says of them; the teacher is asked once, here.

    Raises:
        UserError: if the pairs are damaged, or the run's data or teacher cannot be opened.
    """
    folder = Path(folder)
    if is_forests(folder / "data"):
        from stillhouse.data.forests import open_forests

        return open_forests(folder)
    condensed = read_condensed(folder / "data")
    images, targets = condensed.images.detach(), condensed.targets.detach()
    try:
        source, val, classes = _judged_on(folder, condensed)
    except UserError as error:
        raise UserError(
            f"the condensed data in '{folder}' cannot be judged: {error}; its data and teacher have to be where its settings.yaml says"
        ) from error
    return CondensedData(
        name=str(folder),
        train=Arrays(images, targets),
        val=val,
        classes=classes,
        channels=images.shape[1],
        size=images.shape[-1],
        mean=tuple(condensed.mean.flatten().tolist()),
        std=tuple(condensed.std.flatten().tolist()),
        fingerprint=fingerprint(images, targets, source.fingerprint),
        task=condensed.task,
    )


@dataclass(frozen=True)
class CondensedData(Data):
    """Data whose training images are floats that `Condensed` has looked at: 1 is white."""

    def _look_at_first(self, part: str) -> None:
        if part == "val":
            super()._look_at_first(part)


def _judged_on(folder: Path, condensed: Condensed) -> tuple[Data, Dataset[Any], list[str]]:
    """The run's own data, their validation images with what is to be said of them, and what that is called."""
    job = read_settings(folder / "settings.yaml")
    if job.get("data") is None:
        raise UserError("its data were objects in Python, which no file names")
    source = open_data(job["data"], seed=job.get("seed", 0), bad_data="skip")
    if condensed.task == "classify":
        return source, source.val, source.classes
    answers = _answers(job, source, condensed.images.shape[-1])
    if answers.shape[1] != condensed.targets.shape[1]:
        raise UserError(f"its teacher answers {answers.shape[1]} numbers, and the targets have {condensed.targets.shape[1]}")
    return source, Answered(source.val, answers), [f"feature {number}" for number in range(answers.shape[1])]


@torch.no_grad()
def _answers(job: dict[str, Any], source: Data, size: int) -> Tensor:
    """What the run's teacher says of the validation images, floats [N, D]."""
    from stillhouse.data.loading import eval_batches
    from stillhouse.data.transforms import eval_transform
    from stillhouse.models.opening import open_model
    from stillhouse.models.preprocessing import preprocessing_of

    if job.get("teacher") is None:
        raise UserError("its teacher was an object in Python, which no file names")
    opened = {"weights": job.get("teacher_weights", "pretrained"), "allow_partial": job.get("allow_partial", False)}
    teacher = open_model(job["teacher"], classes=len(source.classes), channels=source.channels, task="encode", **opened).eval()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    teacher.to(device)
    transform = eval_transform(preprocessing_of(teacher), replace(source, size=source.size or size))
    batches = eval_batches(source.val, transform, batch=ASKED_AT_ONCE)
    return torch.cat([teacher(images.to(device)).float().cpu() for _, images, _ in batches])


class Answered(Dataset[tuple[Any, Tensor]]):
    """The images of a data set, with other targets [N, D]."""

    def __init__(self, images: Dataset[Any], targets: Tensor) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        return self.images[i][0], self.targets[i]
