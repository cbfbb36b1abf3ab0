"""How a run trains, apart from what it learns: one flat list of settings, each a flag of the command. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from stillhouse.errors import UserError

STORAGES = ("fp32", "fp16", "bf16", "int16", "int8")


@dataclass(frozen=True)
class Recipe:
    """The settings of the training loop.

    Args:
        epochs: passes over the training data.
        max_steps: stop after so many updates, wherever that is; the learning rate's schedule ends there too.
        batch: images per update, over all processes and accumulated parts.
        accumulate: split each process's part of the batch into so many passes; the update is the same.
        optimizer: a name timm knows: adamw, sgd, lamb, lion, muon, …
        lr: learning rate at its peak.
        min_lr: learning rate at the end of the cosine.
        warmup_epochs: epochs of linear warm-up, at most a fifth of the run; none if they would last as long as the run.
        weight_decay: decoupled decay; biases, norms and what the model excludes have none.
        layer_decay: factor on the learning rate from each layer to the one below; none by default.
        clip: largest norm of the gradient; none by default.
        precision: fp32, bf16 or fp16 autocast.
        ema: decay of an exponential moving average of the student, which is then the one evaluated and kept; none by default.
        compile: compile the networks with torch.compile; it takes about a minute before the first step.
        fused: update all parameters in one kernel; by default where the optimiser has one.
        channels_last: keep convolutions in channels-last order; by default in convolutional networks.
        checkpointing: compute the student's activations again in the backward pass instead of keeping them: less memory, more time.
        mixup: mixup's alpha, 0 for none; mixed labels are soft.
        cutmix: cutmix's alpha, 0 for none.
        smoothing: label smoothing in [0, 1).
        views: epochs after which augmentation, mixing and random masks repeat: an image then has so many views; never by default.
        teacher_cache: folder that keeps what the teacher says about each view, so that it is asked once; auto: one beside the run.
        cache_storage: how its numbers are kept: fp32 (exact), fp16, bf16, int16 or int8.
        cache_top_k: keep so many of the largest logits and spread the probability of the rest evenly; by default all.
        workers: processes that load images; 0 loads in the main process.
        save_every: updates between checkpoints; by default one an epoch.
        keep_checkpoints: how many of the last checkpoints stay; with one alone there is none to fall back on if it is damaged.
        log_every: updates between rows of the log; the loss is checked there too.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        trackers: where curves go beside the CSV files: tensorboard, wandb, mlflow, trackio, or none; several joined by commas.
        timeout: seconds that one of several processes waits for the others before it gives up.
        seed: everything random is a function of it.
        smoke: do everything once, tiny: four updates, two batches of evaluation.
    """

    epochs: int = 100
    max_steps: int | None = None
    batch: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = None
    compile: bool = False
    fused: bool | None = None
    channels_last: bool | None = None
    checkpointing: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    views: int | None = None
    teacher_cache: str | None = None
    cache_storage: Literal["fp32", "fp16", "bf16", "int16", "int8"] = "fp16"
    cache_top_k: int | None = None
    workers: int = 0
    save_every: int | None = None
    keep_checkpoints: int = 2
    log_every: int = 50
    eval_every: int = 1
    trackers: str = "tensorboard"
    timeout: float = 1800.0
    seed: int = 0
    smoke: bool = False

    def __post_init__(self) -> None:
        """Refuses what cannot work.

        Raises:
            UserError: naming the setting, its value and what was expected.
        """
        counts = ("epochs", "batch", "accumulate", "log_every", "eval_every", "max_steps", "save_every", "keep_checkpoints")
        for name in (*counts, "views", "cache_top_k"):
            self._expect(name, lambda value: value >= 1 and value == int(value), "a whole number of at least 1")
        for name in ("workers", "seed"):
            self._expect(name, lambda value: value >= 0 and value == int(value), "a whole number of at least 0")
        for name in ("lr", "clip", "timeout"):
            self._expect(name, lambda value: 0 < value < math.inf, "a positive finite number")
        for name in ("min_lr", "warmup_epochs", "weight_decay", "mixup", "cutmix"):
            self._expect(name, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
        for name in ("ema", "smoothing"):
            self._expect(name, lambda value: 0 <= value < 1, "a number in [0, 1)")
        self._expect("layer_decay", lambda value: 0 < value <= 1, "a number in (0, 1]")
        if self.teacher_cache is not None and self.views is None:
            raise UserError(
                "teacher_cache keeps what the teacher says about each view: say how many with views, 1 where nothing is augmented"
            )
        self._expect("cache_storage", lambda value: value in STORAGES, ", ".join(STORAGES))
        self._expect("precision", lambda value: value in ("fp32", "bf16", "fp16"), "fp32, bf16 or fp16")

    def _expect(self, name: str, holds: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if value is None and OPTIONAL[name]:
            return
        try:
            right = holds(value)
        except (TypeError, ValueError, OverflowError):
            right = False
        if not right:
            raise UserError(f"{name} is {value}, expected {expected}")


OPTIONAL = {field.name: field.default is None for field in fields(Recipe)}
NAMES = frozenset(field.name for field in fields(Recipe))
"""The names of all settings of the loop."""
