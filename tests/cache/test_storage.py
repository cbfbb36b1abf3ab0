"""How numbers are kept comes with bounds, and they hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.cache.storage import FLOATS, pack, pack_top, unpack
from stillhouse.errors import UserError
from stillhouse.losses.logits import kl_divergence

BITS = {"int16": 16, "int8": 8}
DIGITS = {"fp32": 24, "fp16": 11, "bf16": 8}
ROWS = st.lists(st.lists(st.floats(-3e4, 3e4, width=32), min_size=6, max_size=6), min_size=1, max_size=4)


def again(values: Tensor, storage: str) -> Tensor:
    return unpack(pack(values, storage), tuple(values.shape[1:]), values.dtype)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=150)
@given(ROWS, st.sampled_from(sorted(BITS)))
def test_whole_numbers_are_off_by_half_a_step(rows: list[list[float]], storage: str) -> None:
    values = torch.tensor(rows).view(-1, 2, 3)
    span = values.flatten(1).amax(1) - values.flatten(1).amin(1)
    half = span / (2 ** BITS[storage] - 1) / 2
    rounding = 4 * torch.finfo(torch.float32).eps * values.flatten(1).abs().amax(1) + 1e-37
    assert ((again(values, storage) - values).abs().flatten(1).amax(1) <= half + rounding).all()


@settings(deadline=None, max_examples=150)
@given(ROWS, st.sampled_from(sorted(DIGITS)))
def test_floats_are_off_by_half_of_their_last_place(rows: list[list[float]], storage: str) -> None:
    values = torch.tensor(rows)
    off = (again(values, storage) - values).abs()
    smallest = torch.finfo(FLOATS[storage]).smallest_normal * 2.0 ** -(DIGITS[storage] - 1)
    assert (off <= values.abs() * 2.0 ** -DIGITS[storage] + smallest).all()
    assert storage != "fp32" or not off.any()


@settings(deadline=None, max_examples=50)
@given(ROWS, st.sampled_from(sorted(BITS) + sorted(DIGITS)))
def test_what_was_kept_is_kept_as_it_is(rows: list[list[float]], storage: str) -> None:
    """Up to the rounding of fp32 in whole numbers."""
    values = again(torch.tensor(rows), storage)
    torch.testing.assert_close(again(values, storage), values, rtol=1e-5, atol=1e-5 * max(1.0, float(values.abs().max())))


def test_the_dtype_comes_back_and_bf16_is_exact_in_fp32() -> None:
    values = torch.randn(3, 5).bfloat16()
    assert torch.equal(again(values, "fp32"), values)
    assert again(values, "int8").dtype == torch.bfloat16


def test_equal_numbers_stay_equal() -> None:
    assert torch.equal(again(torch.full((2, 4), 0.1), "int8"), torch.full((2, 4), 0.1))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_rest_is_spread_evenly(temperature: float) -> None:
    """The kept probabilities and the rest's sum are exact at temperature 1; the L1 distance has the bounds that are promised."""
    logits = 3 * torch.randn(64, 20, dtype=torch.float64).float()
    found = unpack(pack_top(logits, 4, "fp32"), (20,), torch.float32)
    top = logits.topk(4).indices
    assert torch.equal(found.gather(1, top), logits.gather(1, top))
    true, kept = ((each / temperature).softmax(1) for each in (logits, found))
    rest_true, rest_kept = (1 - each.gather(1, top).sum(1) for each in (true, kept))
    distance = (true - kept).abs().sum(1)
    if temperature == 1:
        torch.testing.assert_close(rest_kept, rest_true)
        torch.testing.assert_close(kept.gather(1, top), true.gather(1, top))
    assert (rest_kept >= rest_true - 1e-6).all()
    assert (distance <= 2 * rest_kept + 1e-6).all()
    others = kept.scatter(1, top, 0.0)
    assert torch.allclose(others.amax(1), others.sum(1) / 16, atol=1e-6)
    assert kl_divergence(logits, found, temperature).isfinite()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.sampled_from(["int8", "int16", "fp16"]), st.sampled_from([1.0, 2.0, 4.0]))
def test_the_gradient_of_kd_moves_no_further_than_promised(seed: int, storage: str, temperature: float) -> None:
    """tau (exp(2 e / tau) - 1) in L1, a sample, with e the largest error of a logit."""
    random = torch.Generator().manual_seed(seed)
    teacher, student = (4 * torch.randn(8, 10, generator=random) for _ in range(2))
    kept = again(teacher, storage)
    largest = (kept - teacher).abs().amax(1)
    moved = []
    for each in (teacher, kept):
        logits = student.clone().requires_grad_(True)
        (kl_divergence(logits, each, temperature) * len(logits)).backward()
        moved.append(logits.grad)
    assert ((moved[0] - moved[1]).abs().sum(1) <= temperature * ((2 * largest / temperature).exp() - 1) + 1e-5).all()


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="storage is 'int4', expected one of fp32"):
        pack(torch.zeros(2, 3), "int4")  # type: ignore[arg-type]
    for k, logits in ((3, torch.zeros(2, 3)), (0, torch.zeros(2, 3)), (1, torch.zeros(2, 3, 4, 4))):
        with pytest.raises(UserError, match=f"top_k is {k}, expected 1 to"):
            pack_top(logits, k, "fp32")


def test_many_classes_have_numbers_that_fit() -> None:
    logits = torch.arange(40_000.0).view(1, -1) / 1e4
    kept = pack_top(logits, 2, "fp32")
    assert kept["classes"].tolist() == [[39_999, 39_998]]
    assert math.isclose(float(unpack(kept, (40_000,), torch.float32).logsumexp(1)), float(logits.logsumexp(1)), rel_tol=1e-5)
