"""MEAL V2 against its formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.distillers.classics.kd import KD
from stillhouse.distillers.supervised.meal_v2 import MEALV2, discriminating
from stillhouse.errors import UserError
from stillhouse.losses.logits import cross_entropy, mean_probabilities
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from tests.conftest import images, labels, tiny, tiny_cnn
from tests.parts import gradients

BATCH = images(6), labels(6)


def made(**settings: Any) -> MEALV2:
    torch.manual_seed(0)
    return MEALV2(tiny(seed=1), tiny_cnn(seed=2), tiny(seed=3, embed_dim=48), **settings).train()


def test_the_formula() -> None:
    distiller = made()
    z_S, z_1, z_2 = (network(BATCH[0]).double() for network in (distiller.student, distiller.teacher, distiller.second_teacher))
    q = (z_1.softmax(-1) + z_2.softmax(-1)) / 2
    expected = -(q * z_S.log_softmax(-1)).sum(-1).mean()
    verdicts = [distiller.discriminator(z.float()).double().sigmoid() for z in (z_S, (z_1 + z_2) / 2)]
    right = [(verdicts[0][:, 0], verdicts[0][:, 1]), (verdicts[1][:, 1], verdicts[1][:, 0])]
    told = -torch.stack([torch.stack([yes.log(), (1 - no).log()]) for yes, no in right]).mean()
    terms = distiller(BATCH)
    assert terms["kd"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["discriminator"].item() == pytest.approx(told.item(), rel=1e-5)


def test_one_teacher_teaches_as_kd_without_labels() -> None:
    """But for the teacher's entropy, which is constant."""
    alone = MEALV2(tiny(seed=1), tiny_cnn(seed=2), discriminator="off").train()
    kd = KD(tiny(seed=1), tiny_cnn(seed=2), alpha=1.0).train()
    entropy = torch.distributions.Categorical(logits=kd.teacher(BATCH[0])).entropy().mean().item()
    assert alone(BATCH)["kd"].item() == pytest.approx(kd(BATCH)["kd"].item() + entropy, rel=1e-5)
    theirs = gradients(kd, BATCH)
    for name, gradient in gradients(alone, BATCH).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-7)


def test_the_same_teacher_twice_is_one_and_their_order_does_not_matter() -> None:
    student, one, other = tiny(seed=1), tiny_cnn(seed=2), tiny(seed=3, embed_dim=48)

    def kd(*teachers: Any) -> Tensor:
        return MEALV2(student, *teachers, discriminator="off")(BATCH)["kd"]

    assert kd(one, copy.deepcopy(one)) == kd(one)
    assert kd(one, other) == kd(other, one)
    assert kd(one, other) != kd(one)


@given(st.integers(1, 4), st.integers(2, 9), st.floats(0.1, 20), st.integers(0, 2**31))
def test_probabilities_are_averaged(teachers: int, classes: int, size: float, seed: int) -> None:
    logits = size * torch.randn(teachers, 3, classes, generator=torch.Generator().manual_seed(seed))
    q, each = mean_probabilities(*logits), logits.softmax(-1)
    torch.testing.assert_close(q.sum(-1), torch.ones(3))
    assert ((q >= each.amin(0) - 1e-6) & (q <= each.amax(0) + 1e-6)).all()


def test_probabilities_are_averaged_and_not_logits() -> None:
    sure, other = torch.tensor([[10.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    assert mean_probabilities(sure, other)[0, 0] < 0.6
    assert ((sure + other) / 2).softmax(-1)[0, 0] > 0.9


def test_a_student_that_says_what_the_teachers_say_has_nothing_to_learn() -> None:
    q = mean_probabilities(torch.randn(5, 7), torch.randn(5, 7))
    logits = q.log().requires_grad_()
    loss = cross_entropy(logits, q)
    loss.backward()
    assert loss.item() == pytest.approx(torch.distributions.Categorical(q).entropy().mean().item(), rel=1e-5)
    assert logits.grad.abs().max() < 1e-7


def test_labels_are_not_used() -> None:
    distiller = made()
    first = gradients(distiller, BATCH)
    again = gradients(distiller, (BATCH[0], BATCH[1].flip(0)))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_against_is_together_with_the_students_gradient_reversed() -> None:
    """Of the discriminator's loss; the discriminator itself learns the same."""
    found = {}
    for mode in ("together", "against"):
        distiller = made(discriminator=mode)
        with torch.no_grad():
            for layer in distiller.discriminator[::2]:
                layer.bias.fill_(3.0)  # no output is in its ReLU's dead half
        distiller(BATCH)["discriminator"].backward()
        found[mode] = {name: parameter.grad for name, parameter in distiller.named_parameters() if parameter.grad is not None}
    assert any(gradient.any() for name, gradient in found["together"].items() if name.startswith("student."))
    for name, gradient in found["together"].items():
        sign = -1 if name.startswith("student.") else 1
        torch.testing.assert_close(found["against"][name], sign * gradient, rtol=1e-5, atol=1e-8)


def test_the_discriminators_layers() -> None:
    def widths(classes: int) -> list[tuple[int, int]]:
        return [(layer.in_features, layer.out_features) for layer in discriminating(classes)[::2]]

    assert widths(1000) == [(1000, 125), (125, 15), (15, 2)]
    assert widths(10) == [(10, 8), (8, 8), (8, 2)]
    assert (discriminating(1000)(torch.randn(4, 1000)) >= 0).all()


def test_off_has_none() -> None:
    distiller = made(discriminator="off")
    assert list(distiller(BATCH)) == ["kd"]
    assert not [name for name, _ in distiller.named_parameters() if name.startswith("discriminator")]


def test_each_teacher_sees_images_as_it_was_trained() -> None:
    """A grey picture is as grey in any size."""
    networks, seen = (tiny(seed=1), tiny_cnn(seed=2), tiny_cnn(seed=3)), []
    told = [((0.1,) * 3, (0.5,) * 3, 32), ((0.2,) * 3, (0.25,) * 3, 32), ((0.3,) * 3, (0.2,) * 3, 48)]
    for network, each in zip(networks, told, strict=True):
        set_preprocessing(network, Preprocessing(*each))
        network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    MEALV2(*networks)((torch.full((2, 3, 32, 32), 0.8), labels(2)))  # 0.5 of the way from black to white
    for pictures, grey, side in zip(seen, (0.8, (0.5 - 0.2) / 0.25, (0.5 - 0.3) / 0.2), (32, 32, 48), strict=True):
        torch.testing.assert_close(pictures, torch.full((2, 3, side, side), grey), rtol=1e-5, atol=1e-5)


def test_both_teachers_are_frozen_and_not_in_the_state() -> None:
    distiller = made().train()
    for teacher in (distiller.teacher, distiller.second_teacher):
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "discriminator"}


@pytest.mark.parametrize(
    ("networks", "settings", "said"),
    [
        ((tiny, tiny, tiny), {"discriminator": "on"}, "^discriminator is 'on', expected one of together, against, off$"),
        ((tiny, lambda: tiny(num_classes=7), tiny), {}, r"^classes differ, expected as many of all: student \d+, teacher 7, second"),
        ((tiny, tiny, lambda: tiny(num_classes=7)), {"discriminator": "off"}, "^classes differ"),
        ((torch.nn.Flatten, torch.nn.Flatten), {}, "^how many classes the student knows is not noted: give it an attribute num_classes"),
    ],
)
def test_bad_input(networks: tuple[Any, ...], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        MEALV2(*(network() for network in networks), **settings)
