"""What takes a training down from outside, told in one sentence: memory, processes that load images, other processes of the run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from stillhouse.errors import UserError
from stillhouse.training.processes import missing, processes

LOADER = ("DataLoader worker",)
MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "Cannot allocate memory")
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Connection refused", "gloo")
"""What PyTorch's messages hold; it has no exceptions of their own for these."""


@contextmanager
def explained(step: Callable[[], int]) -> Iterator[None]:
    """Inside, such failures become sentences. Nothing that was written is lost by them.

    Args:
        step: how many updates are done.

    Raises:
        UserError: instead of MemoryError, torch.OutOfMemoryError, and the RuntimeErrors of loaders and of torch.distributed.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        sentence = _sentence(error, step())
        if not sentence:
            raise
        raise UserError(sentence) from error


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, the end of another loader raises nothing; PyTorch's handler of SIGCHLD may do so between any two lines."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():  # there PyTorch has no handler
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _sentence(error: Exception, step: int) -> str:
    text = " ".join(str(error).split())
    if any(sign in text for sign in LOADER):
        return (
            f"a process that loads images was ended from outside after step {step} ({text}): most often memory ran out. "
            "Go on with --resume, with fewer --workers if so"
        )
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in text for sign in MEMORY):
        return (
            f"memory ran out after step {step} ({text or 'of this process'}): free some and go on with --resume, or begin another run "
            "with a smaller --batch or in more parts with --accumulate"
        )
    if distributed.is_initialized() and (isinstance(error, distributed.DistError) or any(sign in text for sign in LOST)):
        here, gone = processes().process_index, missing()
        who = "process " + ", ".join(map(str, gone)) if gone else "another process"
        return (
            f"process {here} waited after step {step} for {who} of {processes().num_processes}, which is gone or does not answer ({text}): "
            "look there first, then go on with --resume"
        )
    return ""
