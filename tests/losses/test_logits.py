"""Losses between logits against closed forms in float64, and the mistakes other libraries shipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from stillhouse.losses.logits import cross_entropy, hard_cross_entropy, kl_divergence, target_and_rest

Array = NDArray[np.float64]


@st.composite
def pairs(draw: Any, least: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits [B, K] and classes [B]."""
    batch, classes = draw(st.integers(1, 6)), draw(st.integers(least, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    student, teacher = (scale * torch.randn(batch, classes, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(classes, (batch,), generator=generator)


temperatures = st.sampled_from([0.5, 1.0, 2.0, 4.0, 20.0])


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Array:
    z = logits.double().numpy() / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(log_p: Array, log_q: Array) -> float:
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def close(actual: Tensor, expected: float) -> None:
    assert actual.shape == ()
    assert actual.item() == pytest.approx(expected, rel=2e-5, abs=2e-5)


@given(pairs())
def test_cross_entropy_with_classes_and_with_soft_labels(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, classes = pair
    log_p = log_softmax(student)
    close(cross_entropy(student, classes), float(-log_p[np.arange(len(classes)), classes.numpy()].mean()))
    soft = teacher.softmax(-1)
    close(cross_entropy(student, soft), float(-(soft.double().numpy() * log_p).sum(-1).mean()))
    one_hot = F.one_hot(classes, student.shape[1])
    torch.testing.assert_close(cross_entropy(student, one_hot.float()), cross_entropy(student, classes))


@given(pairs(), temperatures)
def test_kl_divergence(pair: tuple[Tensor, Tensor, Tensor], temperature: float) -> None:
    student, teacher, _ = pair
    expected = temperature**2 * kl(log_softmax(teacher, temperature), log_softmax(student, temperature))
    assert kl_divergence(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-4, abs=1e-5 * temperature**2)


def test_kl_runs_from_teacher_to_student() -> None:
    """A student that spreads where the teacher is sure pays little; the other way round it would pay much."""
    sure, spread = torch.tensor([[8.0, 0.0, 0.0]]), torch.zeros(1, 3)
    close(kl_divergence(spread, sure), kl(log_softmax(sure), log_softmax(spread)))
    assert kl_divergence(spread, sure) < kl_divergence(sure, spread)


@given(pairs(), temperatures)
def test_kl_is_zero_exactly_when_equal_and_never_negative(pair: tuple[Tensor, Tensor, Tensor], temperature: float) -> None:
    student, teacher, _ = pair
    student = student.requires_grad_()
    loss = kl_divergence(student, student.detach(), temperature)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-5
    assert kl_divergence(student + 3.0, student, temperature).abs() < 1e-4 * temperature**2, "logits matter up to a constant"
    assert kl_divergence(student, teacher, temperature) > -1e-5 * temperature**2


def test_the_gradient_does_not_shrink_with_the_temperature() -> None:
    """Hinton et al.: for small logits and large tau the gradient is (z_S - z_T) / (B K), whatever tau is."""
    student, teacher = (0.01 * torch.randn(4, 10, dtype=torch.float64)).requires_grad_(), 0.01 * torch.randn(4, 10)
    gradients = []
    for temperature in (4.0, 16.0):
        (gradient,) = torch.autograd.grad(kl_divergence(student, teacher, temperature), student)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.05, atol=1e-6)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda student, teacher, classes: cross_entropy(student, classes),
    "cross_entropy, soft": lambda student, teacher, classes: cross_entropy(student, teacher.softmax(-1)),
    "kl": lambda student, teacher, classes: kl_divergence(student, teacher, 2.0),
    "hard": lambda student, teacher, classes: hard_cross_entropy(student, teacher),
    "tckd": lambda student, teacher, classes: target_and_rest(student, teacher, classes, 2.0)[0],
    "nckd": lambda student, teacher, classes: target_and_rest(student, teacher, classes, 2.0)[1],
}
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def some(batch: int = 8, classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, classes), torch.randn(batch, classes), torch.randint(classes, (batch,))


@EVERY_LOSS
def test_classes_that_cannot_be_do_not_change_the_loss(loss: Callable[..., Tensor]) -> None:
    """Divided by the batch only: a thousand more classes, all but impossible, leave it what it was."""
    student, teacher, classes = some()
    impossible = torch.full((8, 1000), -1e4)
    wide = loss(torch.cat([student, impossible], 1), torch.cat([teacher, impossible], 1), classes)
    torch.testing.assert_close(wide, loss(student, teacher, classes), rtol=1e-5, atol=1e-6)


@EVERY_LOSS
def test_the_mean_of_equal_parts_is_the_whole(loss: Callable[..., Tensor]) -> None:
    whole = some()
    parts = torch.stack([loss(*(each[i : i + 2] for each in whole)) for i in range(0, 8, 2)])
    torch.testing.assert_close(parts.mean(), loss(*whole), rtol=1e-5, atol=1e-6)


@EVERY_LOSS
def test_fp32_whatever_comes_in(loss: Callable[..., Tensor]) -> None:
    student, teacher, classes = some()
    student, teacher = student.bfloat16(), teacher.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher, classes)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value, loss(student.float(), teacher.float(), classes), rtol=2e-2 if loss is LOSSES["cross_entropy, soft"] else 0, atol=0
    )


@EVERY_LOSS
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_finite_however_sure_they_are(loss: Callable[..., Tensor], size: float) -> None:
    student, teacher, classes = some()
    student = (size * student).requires_grad_()
    value = loss(student, size * teacher, classes)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@EVERY_LOSS
def test_no_python_over_the_batch_and_no_waiting_for_the_device(loss: Callable[..., Tensor]) -> None:
    """Captured whole: a boolean index, an `.item()` or a loop over the rows would break the graph."""
    batch = some()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch), loss(*batch))


def test_hard_targets_are_the_teachers_most_likely_class() -> None:
    student, teacher, _ = some()
    log_p = log_softmax(student)
    close(hard_cross_entropy(student, teacher), float(-log_p[np.arange(8), teacher.numpy().argmax(-1)].mean()))


def two_parts(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[float, float]:
    """DKD's eq. 6 by hand: KL between (p_t, 1 - p_t), and KL between the others renormalised."""
    rows = np.arange(len(target))
    p_T, p_S = np.exp(log_softmax(teacher, temperature)), np.exp(log_softmax(student, temperature))
    binary = [np.stack([p[rows, target.numpy()], 1 - p[rows, target.numpy()]], -1) for p in (p_T, p_S)]
    tckd = kl(np.log(binary[0]), np.log(binary[1]))
    others = [np.stack([np.delete(row, t) for row, t in zip(p, target.numpy(), strict=True)]) for p in (p_T, p_S)]
    others = [each / each.sum(-1, keepdims=True) for each in others]
    return tckd * temperature**2, kl(np.log(others[0]), np.log(others[1])) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_target_and_rest(temperature: float, classes: int) -> None:
    student, teacher, target = some(6, classes)
    tckd, nckd = target_and_rest(student, teacher, target, temperature)
    expected = two_parts(student, teacher, target, temperature)
    close(tckd, expected[0])
    close(nckd, expected[1])


@given(pairs(least=2))
def test_kl_is_target_part_plus_weighted_rest(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    """DKD, eq. 5: KL = TCKD + (1 - p_t) NCKD, for each sample at tau 1."""
    for row in range(len(pair[0])):
        student, teacher, target = (each[row : row + 1] for each in pair)
        tckd, nckd = target_and_rest(student, teacher, target, 1.0)
        rest = 1 - teacher.double().softmax(-1)[0, target.item()]
        assert (tckd + rest * nckd).item() == pytest.approx(kl_divergence(student, teacher).item(), rel=1e-4, abs=1e-4)


def test_two_classes_have_no_rest() -> None:
    student, teacher, target = some(8, 2)
    student.requires_grad_()
    tckd, nckd = target_and_rest(student, teacher, target, 4.0)
    (tckd + nckd).backward()
    assert nckd.item() == 0
    close(tckd, kl_divergence(student, teacher, 4.0).item())
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_teacher_that_is_certain_is_finite() -> None:
    """p_t rounds to 1 in fp32, so 1 - p_t would be 0 and its logarithm infinite."""
    teacher = torch.tensor([[200.0, 0.0, 1.0]])
    assert teacher.softmax(-1)[0, 0] == 1
    student = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    tckd, nckd = target_and_rest(student, teacher, torch.tensor([0]), 1.0)
    (tckd + nckd).backward()
    assert tckd.item() == pytest.approx(200, rel=1e-3)
    assert student.grad is not None
    assert student.grad.isfinite().all()
