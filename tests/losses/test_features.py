"""Losses between features against closed forms in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.losses.features import activation_map, attention_transfer_loss, hint_loss

shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 8))
LOSSES = pytest.mark.parametrize("loss", [hint_loss, attention_transfer_loss])


@given(shapes, st.integers(0, 2**31))
def test_closed_forms(shape: tuple[int, int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    s, t = student.double().numpy(), teacher.double().numpy()
    assert hint_loss(student, teacher).item() == pytest.approx(((s - t) ** 2).mean(), rel=1e-5, abs=1e-7)
    maps = [(x**2).mean(-1) for x in (s, t)]
    maps = [m / (m**2).sum(-1, keepdims=True) ** 0.5 for m in maps]
    assert attention_transfer_loss(student, teacher).item() == pytest.approx(((maps[0] - maps[1]) ** 2).mean(), rel=1e-4, abs=1e-6)


def test_maps_have_length_one_and_do_not_mind_size_or_width() -> None:
    tokens = torch.randn(3, 9, 5)
    torch.testing.assert_close(activation_map(tokens).norm(dim=1), torch.ones(3))
    torch.testing.assert_close(activation_map(7 * tokens), activation_map(tokens))
    torch.testing.assert_close(activation_map(tokens.repeat(1, 1, 4)), activation_map(tokens))
    assert attention_transfer_loss(tokens, -3 * tokens.repeat(1, 1, 2)).item() == pytest.approx(0, abs=1e-12)


@LOSSES
def test_zero_when_equal_and_fp32_whatever_comes_in(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = torch.randn(2, 4, 3).bfloat16(), torch.randn(2, 4, 3).bfloat16()
    assert loss(student, student).item() == 0
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(student.float(), teacher.float()))


@LOSSES
def test_the_mean_of_equal_parts_is_the_whole(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    torch.testing.assert_close((loss(student[:2], teacher[:2]) + loss(student[2:], teacher[2:])) / 2, loss(student, teacher))


@LOSSES
def test_a_dead_feature_gives_finite_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student = torch.zeros(2, 4, 3, requires_grad=True)
    loss(student, torch.randn(2, 4, 3)).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
