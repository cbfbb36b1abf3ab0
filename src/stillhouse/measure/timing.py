"""Step time and memory, measured so that two ways of doing a step can be compared on a machine that is never quite quiet."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from stillhouse.errors import UserError


class Ratio(NamedTuple):
    """Median and quartiles of what was measured over the rounds."""

    median: float
    low: float
    high: float


class Memory(NamedTuple):
    """Bytes needed at the peak beyond what was held before, and what was looked at: "CUDA tensors" or "process"."""

    bytes: int
    of: str


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` of them for each function, after `warmup` rounds that are not measured.

    In each round every function runs once, and each round begins with the next function: a machine that slows down, warms
    up or is shared does it to all of them alike, and none always follows the same one. On CUDA a call ends when the
    device has finished.

    Raises:
        UserError: if there is no round to measure.
    """
    if rounds < 1 or warmup < 0:
        raise UserError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            took = seconds_of(functions[name])
            if turn >= warmup:
                seconds[name].append(took)
    return seconds


def with_quartiles(measured: tuple[float, float, float], digits: int) -> str:
    """Such as 1.60 (1.59, 1.63), for tables."""
    median, low, high = (f"{value:.{digits}f}" for value in measured)
    return f"{median} ({low}, {high})"


def spread(values: Sequence[float]) -> Ratio:
    """Median, lower and upper quartile of at least one value."""
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """How many times `b` is `a`: median and quartiles of a[i] / b[i], paired by round, so that what slows a whole round cancels.

    Raises:
        UserError: if the two were not measured in the same rounds.
    """
    if len(a) != len(b) or not a:
        raise UserError(f"a ratio is paired by round and needs as many of both, got {len(a)} and {len(b)} measurements")
    return spread([x / y for x, y in zip(a, b, strict=True)])


def peak_memory(function: Callable[[], object]) -> Memory:
    """What one call of `function` needs at its peak beyond what is held when it begins.

    On CUDA: bytes of tensors, by the caching allocator, exact. Elsewhere: growth of the process's resident memory, which
    has the grain of pages, counts libraries' buffers too, and misses what fits into memory the allocator had kept from
    before (on Linux that is given back first). Where the process's peak cannot be set back (no Linux), only growth over
    the highest peak so far is seen, so that measuring the smallest first is the only fair order.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return Memory(torch.cuda.max_memory_allocated() - before, "CUDA tensors")
    _forget_peak()
    before = _peak_resident()
    function()
    return Memory(max(_peak_resident() - before, 0), "process")


def seconds_of(function: Callable[[], object]) -> float:
    """How long one call takes; on CUDA until the device has finished."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """On CUDA: until the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peak() -> None:
    """Linux only: give freed pages back, and let the peak start again from what is resident now."""
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)
    with contextlib.suppress(OSError):  # some containers forbid it: growth is then over the highest peak so far
        Path("/proc/self/clear_refs").write_text("5")


def _peak_resident() -> int:
    """Bytes: the highest resident size since the last reset, or since the process began."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
