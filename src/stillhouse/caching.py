"""Can a teacher's answers be kept; what do they follow from; how much room do they take? Found out before anything is spent."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.cache.answers import Answers, Part
from stillhouse.cache.teacher import CachedTeacher
from stillhouse.checking import STEP_BATCH, put_back
from stillhouse.data import Data
from stillhouse.data.loading import eval_batches
from stillhouse.distillers.base import Clock, Distiller, Stage
from stillhouse.errors import UserError
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.randomness import samples, seeded
from stillhouse.training.batches import on_device
from stillhouse.training.recipe import Recipe

LOG = logging.getLogger("stillhouse")
ENDLESS = 10**9
LEAVE_OUT = "leave out --teacher-cache"


def cached_teacher(
    stage: Stage,
    data: Data,
    transform: Any,
    recipe: Recipe,
    beside: Path,
    follows_from: dict[str, Any],
) -> CachedTeacher | None:
    """The stage's teacher with a folder for its answers, if the recipe asks for that; nothing is written yet.

    Args:
        stage: the only one of its training.
        data: what it learns from.
        transform: the evaluation transform.
        recipe: with `teacher_cache`, `views`, `cache_storage` and `cache_top_k`.
        beside: the folder where `auto` finds or makes one, named after all that the answers follow from.
        follows_from: what the answers follow from beside recipe and data: hashes, what images are made into, augmentation.

    Raises:
        UserError: if the method cannot learn from kept answers, there is no room for them, or the folder holds others.
    """
    if recipe.teacher_cache is None:
        return None
    teacher = stage.distiller.teacher
    if teacher is None or stage.name:
        raise UserError(f"the method {'has no teacher' if teacher is None else 'trains in several stages'}: {LEAVE_OUT}")
    cache = CachedTeacher(teacher, recipe.cache_storage, recipe.cache_top_k, classifies=data.task == "classify")
    about, size = try_out(cache, stage.distiller, data, transform)
    facts = follows_from | {
        "data": data.fingerprint,
        "teacher_input": str(preprocessing_of(teacher)),
        "precision": recipe.precision,
        "asked": about["inputs"],
        "answers": list(about["answers"]),
        "storage": recipe.cache_storage,
        "top_k": recipe.cache_top_k,
        "mixing": {name: getattr(recipe, name) for name in ("mixup", "cutmix", "batch")} if recipe.mixup or recipe.cutmix else None,
        "seed": recipe.seed,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    cache.answers = Answers(beside / f"answers-{digest[:12]}" if recipe.teacher_cache == "auto" else Path(recipe.teacher_cache), facts)
    train, val, views = len(data.train), len(data.val), min(recipe.views or 1, recipe.epochs)  # type: ignore[arg-type]
    _refuse_without_room(cache.answers, size * (views * (train // recipe.batch * recipe.batch) + val))
    LOG.info("teacher's answers: %d bytes an image and view, in %s", size, cache.answers.folder)
    return cache


def try_out(cache: CachedTeacher, distiller: Distiller, data: Data, transform: Any) -> tuple[dict[str, Any], int]:
    """Whether a distiller learns the same from its teacher's kept answers: the teacher is asked once in a turn, about the same whatever
    becomes of the student and however far the training is, and nothing is heard of it but what is kept.

    Returns:
        What is asked and answered (`Part.about`), and the bytes that an image takes.

    Raises:
        UserError: if it does not, and why.
    """
    _, images, targets = next(iter(eval_batches(data.val, transform, batch=min(STEP_BATCH, len(data.val)))))  # type: ignore[arg-type]
    batch, ids = on_device((images, targets), next(distiller.parameters()).device), torch.arange(len(targets))
    exact, asked = copy.copy(cache), list[Any]()
    exact.storage, exact.top_k, exact.part = "fp32", None, Part(Path(), len(ids))
    cache = copy.copy(cache)
    cache.part = Part(Path(), len(ids))
    handle = cache.teacher.register_forward_pre_hook(lambda teacher, inputs: asked.append(inputs))
    with seeded("check"), put_back(distiller), samples(0, 0, ids), torch.no_grad():
        try:
            with exact.answering():
                _terms(distiller, batch, 0)
            first, asked[:] = list(asked), []
            _refuse_other_questions(first, turns=len({turn.name for turn in distiller.turns()}))
            for parameter in (each for turn in distiller.turns() for each in turn.parameters):
                parameter.add_(torch.randn_like(parameter))
            distiller.after_update(Clock(ENDLESS, ENDLESS, ENDLESS, ENDLESS))
            terms = _terms(distiller, batch, 1)
            if not _same(first, asked):
                raise UserError("what it is asked changes with the student, the progress of the training, or by chance")
            if not _same(terms, _replayed(exact, distiller, batch)):
                raise UserError("it changes, or more of it is looked at than is kept")
            with cache.answering():
                _terms(distiller, batch, 1)
        except UserError as error:
            raise UserError(f"the answers of this method's teacher cannot be kept: {error}; {LEAVE_OUT}") from None
        finally:
            handle.remove()
    return cache.part.about, cache.part.held // len(ids)


def _terms(distiller: Distiller, batch: tuple[Any, Any], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    turns = dict.fromkeys(turn.name for turn in distiller.train().turns())
    return [value for name in turns for value in distiller(batch, name).values()]


def _replayed(exact: CachedTeacher, distiller: Distiller, batch: tuple[Any, Any]) -> list[Tensor]:
    try:
        with exact.answering():
            return _terms(distiller, batch, 1)
    except (RuntimeError, LookupError, TypeError, AttributeError):  # whatever it misses
        return []


def _refuse_other_questions(asked: list[Any], turns: int) -> None:
    if not asked:
        raise UserError("it is never run as a whole (a detector stops at its neck, an encoder at some block)")
    if len(asked) > turns:
        raise UserError(f"it is asked {len(asked)} times a step")
    if not isinstance(asked[0][0], Tensor):
        raise UserError("it is not asked about a batch of images of one size")


def _same(one: Any, other: Any) -> bool:
    """Of tensors in lists and tuples."""
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(_same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other


def _refuse_without_room(answers: Answers, size: int) -> None:
    there = next(folder for folder in (answers.folder.absolute(), *answers.folder.absolute().parents) if folder.exists())
    missing, free = size - answers.bytes, shutil.disk_usage(there).free
    if missing > free:
        raise UserError(
            f"the teacher's answers take {size / 1e9:.1f} GB in {answers.folder}, and {free / 1e9:.1f} GB are free: ask for fewer --views, "
            "--cache-top-k, or --cache-storage int8"
        )
