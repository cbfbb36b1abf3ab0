"""Hints against their formula, between networks of any shape."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse.distillers.classics.fitnet import FitNet
from stillhouse.errors import UserError
from tests.conftest import images, labels, tiny, tiny_cnn, tiny_transformers

BATCH = images(4), labels(4)


def test_the_formula() -> None:
    student, teacher = tiny(seed=1, depth=4), tiny(seed=2, embed_dim=48)
    distiller = FitNet(student, teacher, beta=2.0)
    terms = distiller(BATCH)
    f_S = student.get_intermediate_layers(BATCH[0], n=[1])[0]
    f_T = teacher.get_intermediate_layers(BATCH[0], n=[0])[0]
    weight, bias = distiller.regressor.levels[0].weight, distiller.regressor.levels[0].bias
    expected = 2.0 * ((f_S @ weight[..., 0, 0].T + bias - f_T) ** 2).mean()
    torch.testing.assert_close(terms["hint"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(student(BATCH[0]), BATCH[1]))


def test_the_regressor_learns_along() -> None:
    distiller = FitNet(tiny(seed=1), tiny(seed=2, embed_dim=48))
    (turn,) = distiller.turns()
    assert any(parameter is distiller.regressor.levels[0].weight for parameter in turn.parameters)
    distiller(BATCH)["hint"].backward()
    assert distiller.regressor.levels[0].weight.grad.abs().sum() > 0
    assert distiller.student.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert distiller.student.blocks[1].mlp.fc1.weight.grad is None, "a hint in the middle teaches nothing behind it"


@pytest.mark.parametrize(
    "student", [lambda: tiny(seed=1), lambda: tiny_cnn(1), lambda: tiny_transformers("ViT")], ids=["timm", "cnn", "transformers"]
)
@pytest.mark.parametrize(
    "teacher",
    [lambda: tiny("cait_xxs24_224", seed=2), lambda: tiny_cnn(2), lambda: tiny_transformers("Dinov2")],
    ids=["cait", "cnn", "transformers"],
)
def test_any_student_with_any_teacher(student: object, teacher: object) -> None:
    terms = FitNet(student(), teacher())(BATCH)
    assert terms["hint"].isfinite()


def test_layers_by_name() -> None:
    student, teacher = tiny(seed=1), tiny_cnn(2)
    terms = FitNet(student, teacher, student_layer="blocks.1", teacher_layer="layer4")(BATCH)
    assert terms["hint"].isfinite()
    with pytest.raises(UserError, match=r"no layer 'blocks\.7'"):
        FitNet(student, teacher, student_layer="blocks.7")


@pytest.mark.parametrize("beta", [-1.0, float("inf"), float("nan")])
def test_bad_beta(beta: float) -> None:
    with pytest.raises(UserError, match=f"^beta is {beta}, expected"):
        FitNet(tiny(), tiny(), beta=beta)
