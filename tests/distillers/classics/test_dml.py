"""Deep mutual learning: its loss, where its gradients go, and what it reduces to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillers.classics.dml import DML
from stillhouse.distillers.classics.scratch import Scratch
from stillhouse.errors import UserError
from tests.conftest import images, labels, masks, tiny, tiny_cnn, tiny_segmenter

CLASSIFY, SEGMENT = (images(4), labels(4)), (images(4), masks(4))


def classifying(**settings: Any) -> DML:
    return DML(tiny(seed=1), tiny_cnn(seed=2), **settings).train()


def segmenting(**settings: Any) -> DML:
    return DML(tiny_segmenter(seed=1), tiny_segmenter(seed=2, width=16), **settings).train()


def reached(distiller: nn.Module, term: Tensor) -> set[str]:
    named = list(distiller.named_parameters())
    found = torch.autograd.grad(term, [parameter for _, parameter in named], allow_unused=True, retain_graph=True)
    return {name.split(".")[0] for (name, _), gradient in zip(named, found, strict=True) if gradient is not None and gradient.any()}


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_terms_are_cross_entropy_and_kl_both_ways(tau: float) -> None:
    distiller = classifying(alpha=0.5, temperature=tau)
    z_S, z_P = distiller.student(CLASSIFY[0]), distiller.partner(CLASSIFY[0])
    terms = distiller(CLASSIFY)

    def kl(own: Tensor, other: Tensor) -> Tensor:
        p, q = (other / tau).softmax(-1), (own / tau).softmax(-1)
        return 0.5 * tau**2 * (p * (p / q).log()).sum(-1).mean()

    expected = {
        "ce": F.cross_entropy(z_S, CLASSIFY[1]),
        "partner_ce": F.cross_entropy(z_P, CLASSIFY[1]),
        "kl": kl(z_S, z_P),
        "partner_kl": kl(z_P, z_S),
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)


def test_pixels_without_labels_take_no_part() -> None:
    pictures, truth = SEGMENT[0], SEGMENT[1].clone()
    truth[:, :16] = 255
    distiller = segmenting()
    z_S, z_P = (network(pictures)["out"] for network in (distiller.student, distiller.partner))
    p, q = z_P.softmax(1), z_S.softmax(1)
    expected = (p * (p / q).log()).sum(1)[:, 16:].mean()
    torch.testing.assert_close(distiller((pictures, truth))["kl"], expected, rtol=1e-4, atol=1e-5)
    assert all(term.item() == 0 for term in distiller((pictures, torch.full_like(truth, 255))).values())


@pytest.mark.parametrize(("build", "batch"), [(classifying, CLASSIFY), (segmenting, SEGMENT)])
def test_each_is_taught_and_who_teaches_gets_no_gradient(build: Any, batch: Any) -> None:
    distiller = build()
    terms = distiller(batch)
    assert reached(distiller, terms["kl"]) == {"student"}
    assert reached(distiller, terms["partner_kl"]) == {"partner"}
    first, second = distiller.turns()
    assert first.name == second.name
    assert {id(p) for p in first.parameters} == {id(p) for p in distiller.student.parameters()}
    assert {id(p) for p in second.parameters} == {id(p) for p in distiller.partner.parameters()}
    assert list(distiller.products) == list(distiller.examined(distiller.products)) == ["student", "partner"]


def test_soft_labels() -> None:
    terms = classifying()((CLASSIFY[0], torch.randn(4, 5).softmax(-1)))
    assert all(term.isfinite() for term in terms.values())


def test_equal_students_tell_each_other_nothing() -> None:
    student = tiny(seed=1)
    terms = DML(student, copy.deepcopy(student))(CLASSIFY)
    assert terms["kl"].item() == terms["partner_kl"].item() == 0


def test_off_is_two_trainings_of_their_own_bit_for_bit() -> None:
    distiller = segmenting(**DML.off)
    sum(distiller(SEGMENT).values()).backward()
    for ours, alone in zip(distiller.products.values(), (tiny_segmenter(seed=1), tiny_segmenter(seed=2, width=16)), strict=True):
        sum(Scratch(alone).train()(SEGMENT).values()).backward()
        for (name, a), b in zip(ours.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"alpha": -1.0}, "^alpha is -1.0, expected the weight of a term"),
        ({"temperature": 0.0}, "^temperature is 0.0, expected a positive"),
        ({"partner_rate": float("inf")}, "^partner_rate is inf, expected"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        classifying(**wrong)


def test_other_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"^the student knows 5 classes and the partner 7"):
        DML(tiny(seed=1), tiny(seed=2, num_classes=7))(CLASSIFY)
    one = tiny(seed=1)
    with pytest.raises(UserError, match=r"^student and partner are one network"):
        DML(one, one)
