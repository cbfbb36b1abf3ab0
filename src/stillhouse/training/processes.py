"""Processes, devices, precision and trackers, as Accelerate knows them."""

from __future__ import annotations

import atexit
import gc
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, LoggerType, parse_flag_from_env
from torch import distributed

from stillhouse.errors import UserError, nearest
from stillhouse.training.recipe import Recipe

HOURGLASS = 10.0
"""Seconds within which the processes that still work say so, after one of them gave up waiting."""


def processes(timeout: float = 1800.0) -> PartialState:
    """This process among the others of the run; whoever asks first joins their group, and waits for any of them at most `timeout` seconds.

    The group lasts from one run to the next, and is left before Python ends: gloo's threads would otherwise release tensors while the
    interpreter is taken down, and abort the process after all its work is done.

    Raises:
        UserError: if they do not find each other.
    """
    alone = not distributed.is_initialized()
    try:
        state = PartialState(cpu=on_cpu(), timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise UserError(
            f"the processes of the run do not find each other ({' '.join(str(error).split())}); if torchrun has started them again, start "
            "torchrun itself with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or it tells them addresses of processes that are gone"
        ) from error
    if alone and distributed.is_initialized():
        atexit.register(_leave)
    return state


def _leave() -> None:
    if distributed.is_initialized():
        gc.collect()  # networks wrapped for several processes lie in circles, and each holds the group
        distributed.destroy_process_group()


def missing() -> list[int]:
    """Which processes do not answer; [] where nothing is known of them, for the store that torchrun keeps is gone too.

    All that gave up waiting call it at about the same time, and answer each other there.
    """
    ours, attempt = processes(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    others = [number for number in range(ours.num_processes) if number != ours.process_index]
    try:
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=HOURGLASS)
        )
        store.set(f"stillhouse/{attempt}/{ours.process_index}", "here")
        return [number for number in others if not _answers(store, f"stillhouse/{attempt}/{number}")]
    except (KeyError, ValueError, RuntimeError):
        return []


def _answers(store: Any, key: str) -> bool:
    try:
        store.wait([key], timedelta(seconds=HOURGLASS))
    except RuntimeError:
        return False
    return True


def accelerator_for(recipe: Recipe, folder: Path, turns: int = 1) -> Accelerator:
    """Accelerate's view of this machine or cluster, as `accelerate launch` or torchrun set it up.

    Raises:
        UserError: if the precision asked for does not work here, or a tracker is unknown or not installed.
    """
    processes(recipe.timeout)
    AcceleratorState._reset_state()  # a run before this one in the same process may have had another precision
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision fp16 needs a CUDA device; use bf16 or fp32 here")
    return Accelerator(
        cpu=on_cpu(),
        mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision),
        log_with=trackers_of(recipe) or None,
        project_dir=folder / "curves",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=turns > 1)],
    )


def on_cpu() -> bool:
    """Whether to compute on CPUs: there is nothing better, or Accelerate's own switch says so.

    Accelerate counts several processes without a GPU as one each unless it is told; they would all write the same folder.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def trackers_of(recipe: Recipe) -> list[str]:
    """The trackers asked for, all of them known to Accelerate and installed.

    Raises:
        UserError: if one is not.
    """
    known, installed = LoggerType.list(), [str(each) for each in get_available_trackers()]
    trackers = [name.strip() for name in recipe.trackers.split(",") if name.strip() not in ("", "none")]
    for name in trackers:
        if name not in known:
            raise UserError(f"there is no tracker '{name}'{nearest(name, known)}; use none, or some of {', '.join(known)}")
        if name not in installed:
            raise UserError(f"the tracker {name} is not installed: pip install {name}, or use another with --trackers")
    return trackers
