"""A teacher that says again what it has said: asked once about an image as it is augmented, read from then on.

What is learned from is always what is kept, also while it is being kept: a run does not depend on how much was there when it began.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.cache.answers import Answers, Part
from stillhouse.cache.storage import Storage, pack, pack_top, unpack
from stillhouse.errors import UserError
from stillhouse.models.outputs import logits_of
from stillhouse.models.taps import Tap, tapped
from stillhouse.randomness import sample_ids, signs

APART = 0.01
"""How far the prints of an image may be apart: rounding moves them by 1e-6, another image by about 1."""

LOOKED_AT = 4096
"""How many numbers of an image its print is made of, about."""


class CachedTeacher:
    """Stands in for a teacher's forward pass, within `answering`, for the samples of `randomness.samples`.

    Kept are the logits (or whatever the network's main output is) and what `Tap` and `Levels` look at, and with them a print of the images:
    an answer is only ever given again to the question that it was an answer to. The distiller notices nothing: the taps are told what was
    kept as if the layers had run.

    Args:
        teacher: a distiller's, frozen; its hooks are those of the distiller.
        storage: fp32, fp16, bf16, int16 or int8.
        top_k: keep so many logits and spread the rest; None for all.
        classifies: whether the output is logits of classes, whose probabilities are worth comparing.
    """

    def __init__(self, teacher: nn.Module, storage: Storage = "fp16", top_k: int | None = None, classifies: bool = True) -> None:
        self.teacher, self.network = teacher, teacher.forward
        self.storage, self.top_k, self.classifies = storage, top_k, classifies
        self.told = tapped(teacher)
        self.taps = {name: Tap(teacher, name) for name in self.told}
        self.answers: Answers | None = None
        self.part: Part | None = None
        self.read = self.asked = self.steps = self.steps_alone = 0  # images, and steps of training
        self.alone = True
        self.apart: Tensor | None = None

    def turn_to(self, name: str, count: int) -> None:
        """From here on the images are those of one view: "view-0" and so on, or "val"; `count` is how many the data set has."""
        self.flush()
        self.alone = True
        assert self.answers is not None
        self.part = self.answers.part(name, count)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Inside, the teacher is only run for images of which nothing is kept."""
        self.teacher.forward = self.answer  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.teacher.forward = self.network  # type: ignore[method-assign]  # of a teacher elsewhere this is Accelerate's

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # a compiled network runs compiled within
    def answer(self, images: Any, *others: Any) -> Any:
        """What the teacher has said or says now. Images of another shape than the first ones are not kept."""
        said = self._recall(images, others)
        return said if said is not None else self._keep(self.network(images, *others), images, others)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _recall(self, images: Any, others: tuple[Any, ...]) -> Tensor | None:
        """What was said about these, if it is known of all of them."""
        part, ids, inputs = self.part, sample_ids(), _tensors(images, others)
        if part is None or ids is None or part.about.get("inputs") != _shapes(inputs) or len(part.missing(ids)):
            return None
        self.read += len(ids)
        numbers = {name: each.to(images.device, non_blocking=True) for name, each in part.read(ids).items()}
        apart = (prints(inputs) - numbers["print"]).abs().max()
        self.apart = apart if self.apart is None else torch.maximum(self.apart, apart)
        return self._say(part.about["answers"], numbers)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _keep(self, output: Any, images: Any, others: tuple[Any, ...]) -> Any:
        """Keeps what is said now, and says it as it is kept."""
        part, ids, inputs = self.part, sample_ids(), _tensors(images, others)
        self.asked += len(images)
        self.alone = False
        if part is None or ids is None or not inputs or part.about.get("inputs", _shapes(inputs)) != _shapes(inputs):
            return output
        said = self._listen(output, len(ids))
        part.about = {"inputs": _shapes(inputs), "answers": {name: [str(each.dtype), *_shapes([each])] for name, each in said.items()}}
        numbers, errors = self._kept(said)
        missing = part.missing(ids)
        part.add(ids[missing], {name: each[missing.to(each.device)] for name, each in {"print": prints(inputs), **numbers}.items()}, errors)
        return self._say(part.about["answers"], numbers)

    def _listen(self, output: Any, batch: int) -> dict[str, Tensor]:
        """All that the network has just said, by name."""
        said = {"output": logits_of(output)}
        for name, tap in self.taps.items():
            seen: Any = tap.take()
            several = seen.values() if isinstance(seen, dict) else seen
            said |= {name: seen} if isinstance(seen, Tensor) else {f"{name}/{level}": each for level, each in enumerate(several)}
        for name, each in said.items():
            if len(each) != batch:
                raise UserError(f"the teacher's '{name}' is {tuple(each.shape)} for {batch} images: it cannot be kept by image")
        return said

    def _kept(self, said: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, int]]]:
        """The numbers as they are kept, and the errors of that."""
        numbers: dict[str, Tensor] = {}
        errors: dict[str, tuple[Tensor, int]] = {}
        for name, values in said.items():
            first = name == "output"
            kept = pack_top(values, self.top_k, self.storage) if first and self.top_k else pack(values, self.storage)
            again, values = unpack(kept, tuple(values.shape[1:]), values.dtype).float(), values.float()
            if first and self.classifies and values.ndim == 2:
                errors["probability moved"] = _greatest((again.softmax(1) - values.softmax(1)).abs().sum(1) / 2)
            if "classes" in kept:
                again, values = (each.gather(1, kept["classes"].long()) for each in (again, values))
            errors[name] = _greatest((again - values).abs())
            numbers |= {f"{name}:{part}": each for part, each in kept.items()}
        return numbers, errors

    def _say(self, answers: dict[str, Any], numbers: dict[str, Tensor]) -> Tensor:
        """Tells the taps, and returns the output."""
        said = {
            name: unpack(
                {key.rpartition(":")[2]: each for key, each in numbers.items() if key.rpartition(":")[0] == name},
                tuple(shape),
                getattr(torch, dtype.removeprefix("torch.")),
            )
            for name, (dtype, shape) in answers.items()
        }
        for name, told in self.told.items():
            levels = [each for key, each in said.items() if key.rpartition("/")[0] == name]
            for remember in told:
                remember(self.teacher, (), said.get(name, levels))
        return said["output"]

    def check(self) -> None:
        """Waits for the device.

        Raises:
            UserError: if an answer was given again to another question, or a number is too large for how it is kept.
        """
        if self.part is not None:
            self.part.check()
        if self.apart is not None and not float(self.apart) <= APART:
            raise UserError(
                "the teacher is asked about other images than the answers in its cache are about: the data, their augmentation or what the "
                "method makes of them is no function of seed, view and sample alone; train without --teacher-cache, or name a new folder"
            )
        self.apart = None

    def end_step(self) -> None:
        """Counts a step of training, and whether the teacher did not run in it."""
        self.steps += 1
        self.steps_alone += self.alone
        self.alone = True

    def flush(self) -> None:
        """Writes what is held."""
        if self.part is not None:
            self.part.flush()

    @property
    def counts(self) -> list[int]:
        """What was read and asked so far, for checkpoints."""
        return [self.read, self.asked, self.steps, self.steps_alone]

    @counts.setter
    def counts(self, counts: list[int]) -> None:
        self.read, self.asked, self.steps, self.steps_alone = counts

    def facts(self, read: int, asked: int, steps: int, steps_alone: int) -> dict[str, Any]:
        """What `run.json` says: counts as in `counts`, where the answers are and how large, and what keeping them cost in exactness."""
        assert self.answers is not None
        return {
            "folder": str(self.answers.folder),
            "bytes": self.answers.bytes,
            "storage": self.storage,
            "top_k": self.top_k,
            "images_read": read,
            "images_asked": asked,
            "steps": steps,
            "steps_without_teacher": steps_alone,
            "errors": self.errors,
        }

    @property
    def errors(self) -> dict[str, dict[str, float]]:
        """Of each answer the greatest and the mean error of keeping it; "probability moved" is half the L1 distance of softmax."""
        found: dict[str, list[tuple[float, float, int]]] = {}
        for part in self.answers.parts.values() if self.answers is not None else []:
            for name, each in part.errors.items():
                found.setdefault(name, []).append(each)
        return {
            name: {"max": max(each[0] for each in of), "mean": sum(each[1] for each in of) / sum(each[2] for each in of)}
            for name, of in found.items()
        }


def prints(inputs: list[Tensor]) -> Tensor:
    """A number a sample [B], fp32, that other inputs do not share: their projections on fixed signs, each at length 1, summed.

    Of an input some thousands of numbers are looked at, spread over all rows and columns: all would take longer than reading answers.
    """
    found = torch.zeros(len(inputs[0]), device=inputs[0].device)
    for each in inputs:
        flat = each.flatten(1)
        flat = flat[:, :: (flat.shape[1] // LOOKED_AT) | 1].float()  # odd: no row or column of a picture is always passed over
        found = found + (flat * _signs(flat.shape[1], flat.device)).sum(1) / flat.square().sum(1).sqrt().clamp_min(1e-12)
    return found


@cache
def _signs(count: int, device: torch.device) -> Tensor:
    return signs(count).to(device)


def _tensors(images: Any, others: tuple[Any, ...]) -> list[Tensor]:
    """What was asked; nothing where the images are no batch."""
    return [images, *(each for each in others if isinstance(each, Tensor))] if isinstance(images, Tensor) else []


def _shapes(tensors: list[Tensor]) -> list[list[int]]:
    return [list(each.shape[1:]) for each in tensors]


def _greatest(errors: Tensor) -> tuple[Tensor, int]:
    """[greatest, sum] and how many."""
    return torch.stack([errors.max(), errors.sum()]), errors.numel()
