"""Randomness is a function of where you are."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.randomness import samples, seed_from, seeded, uniform

CPU = torch.device("cpu")
_where = st.lists(st.one_of(st.integers(), st.text()), max_size=4)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


@given(_where, _where)
def test_a_seed_depends_on_every_part(a: list[int | str], b: list[int | str]) -> None:
    assert 0 <= seed_from(*a) < 2**63
    assert (seed_from(*a) == seed_from(*b)) == (a == b)


def test_a_seed_does_not_depend_on_the_process() -> None:
    program = "from stillhouse.randomness import seed_from; print(seed_from(0, 'order', 3))"
    other = os.environ | {"PYTHONHASHSEED": "7"}
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=other).stdout
    assert int(told) == seed_from(0, "order", 3)
    assert seed_from(0, "order", 3) == 8244215730568551301, "another value would change every run ever made"


def test_the_number_one_is_not_its_text() -> None:
    assert seed_from(1) != seed_from("1")
    assert seed_from("a", "b") != seed_from("ab")


def test_seeded_starts_from_where_and_leaves_no_trace() -> None:
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    before = drawn()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    with seeded(0, "augment", 3):
        inside = drawn()
    assert drawn() == before
    with seeded(0, "augment", 3):
        assert drawn() == inside
    with seeded(0, "augment", 4):
        assert all(a != b for a, b in zip(drawn(), inside, strict=True))


def test_seeded_leaves_no_trace_when_it_fails() -> None:
    torch.manual_seed(5)
    before = drawn()
    torch.manual_seed(5)
    with pytest.raises(ZeroDivisionError), seeded(1):
        _ = torch.rand(3) if 1 / 0 else None
    assert drawn()[2] == before[2]


@given(st.integers(0, 2**62), st.integers(0, 10**6), st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True))
def test_uniform_is_a_function_of_seed_step_and_sample(seed: int, step: int, ids: list[int]) -> None:
    with samples(seed, step, torch.tensor(ids)):
        whole = uniform(len(ids), 5, CPU)
    assert whole.dtype == torch.float32
    assert ((whole >= 0) & (whole < 1)).all()
    for row, sample in zip(whole, ids, strict=True):
        with samples(seed, step, torch.tensor([sample])):
            assert torch.equal(uniform(1, 5, CPU)[0], row)


def test_uniform_is_uniform_and_rows_are_independent() -> None:
    with samples(0, 0, torch.arange(20000)):
        draws = uniform(20000, 16, CPU).double()
    counts = torch.histc(draws, 100, 0, 1)
    expected = draws.numel() / 100
    assert ((counts - expected).square() / expected).sum() < 160, "chi square with 99 degrees of freedom, far below one in 10,000"
    assert draws[:-1].flatten().sub(0.5).mul(draws[1:].flatten() - 0.5).mean().abs() < 1e-3, "next samples"
    assert draws[:, :-1].sub(0.5).mul(draws[:, 1:] - 0.5).mean().abs() < 1e-3, "next places"
    with samples(0, 1, torch.arange(20000)):
        later = uniform(20000, 16, CPU).double()
    assert draws.sub(0.5).mul(later - 0.5).mean().abs() < 1e-3, "next steps"
    chosen = draws.topk(8, dim=1).indices.flatten().bincount(minlength=16) / 20000
    assert (chosen - 0.5).abs().max() < 0.02, "every place is chosen as often"


def test_without_samples_it_is_torchs_own_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2, 4)
    torch.manual_seed(3)
    assert torch.equal(uniform(2, 4, CPU), expected)


def test_samples_end_where_they_end() -> None:
    with samples(0, 0, torch.tensor([1])):
        outer = uniform(1, 4, CPU)
        with samples(0, 1, torch.tensor([1])):
            assert not torch.equal(uniform(1, 4, CPU), outer)
        assert torch.equal(uniform(1, 4, CPU), outer)
    assert not torch.equal(uniform(1, 4, CPU), outer)
