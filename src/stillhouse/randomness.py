"""Randomness is a function of where you are: every draw is made from (seed, what, epoch or step, sample id).

So nothing about it needs saving, and a run goes on exactly wherever it is taken up.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_here: ContextVar[tuple[int, int, Tensor] | None] = ContextVar("here", default=None)


def seed_from(*where: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part of `where` and on nothing else (not on process, machine or Python's hash seed)."""
    digest = hashlib.blake2b(repr(where).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(*where: int | str) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators start from `where` inside, and go on as if nothing had happened after."""
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (timm's augmentations draw from it)
    seed = seed_from(*where)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


@contextmanager
def samples(seed: int, step: int, ids: Tensor) -> Iterator[None]:
    """Inside, `uniform` draws for exactly these samples at this step: the same numbers on any number of processes, in any batch split."""
    token = _here.set((seed, step, ids))
    try:
        yield
    finally:
        _here.reset(token)


def sample_ids() -> Tensor | None:
    """The samples that the innermost `samples` is about; None outside."""
    here = _here.get()
    return here[2] if here is not None else None


def signs(count: int) -> Tensor:
    """-1 or 1 at each of so many places, fp32 [count], always the same."""
    import torch

    return (_mixed(torch.arange(count)) & 1).float() * 2 - 1


def uniform(rows: int, columns: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), fp32 [rows, columns]: a function of (seed, step, sample id) within `samples`, else of torch's own generator."""
    import torch

    here = _here.get()
    if here is None or len(here[2]) != rows:
        return torch.rand(rows, columns, device=device)
    seed, step, ids = here
    start = seed_from(seed, "uniform", step)
    counter = (ids.to(device, non_blocking=True)[:, None] * columns + torch.arange(columns, device=device)[None]) ^ start
    return (_mixed(counter) & 0xFFFFFF).float() / 2**24


def _mixed(bits: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (shifts made logical by masking): every input bit changes every output bit."""
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)
