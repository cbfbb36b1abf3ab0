"""Attention transfer against its formula, between networks of any shape."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse.distillers.classics.attention_transfer import AttentionTransfer
from stillhouse.errors import UserError
from tests.conftest import images, labels, tiny, tiny_cnn, tiny_transformers

BATCH = images(4), labels(4)


def test_the_formula() -> None:
    student, teacher = tiny_cnn(1), tiny_cnn(2)
    terms = AttentionTransfer(student, teacher, beta=10.0)(BATCH)
    maps = [F.normalize(model.forward_features(BATCH[0]).pow(2).mean(1).flatten(1)) for model in (student, teacher)]
    torch.testing.assert_close(terms["attention"], 10.0 * (maps[0] - maps[1]).pow(2).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(student(BATCH[0]), BATCH[1]))


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    assert AttentionTransfer(tiny(), tiny())(BATCH)["attention"].item() == 0


@pytest.mark.parametrize(
    "student", [lambda: tiny(seed=1), lambda: tiny_cnn(1), lambda: tiny_transformers("ViT")], ids=["timm", "cnn", "transformers"]
)
@pytest.mark.parametrize(
    "teacher",
    [lambda: tiny("cait_xxs24_224", seed=2), lambda: tiny_cnn(2), lambda: tiny_transformers("Dinov2")],
    ids=["cait", "cnn", "transformers"],
)
def test_any_student_with_any_teacher(student: object, teacher: object) -> None:
    assert AttentionTransfer(student(), teacher())(BATCH)["attention"].isfinite()


def test_grids_that_differ_meet_on_the_teachers() -> None:
    terms = AttentionTransfer(tiny(seed=1, patch_size=4), tiny(seed=2))(BATCH)
    assert terms["attention"].isfinite()


@pytest.mark.parametrize("beta", [-1.0, float("inf"), float("nan")])
def test_bad_beta(beta: float) -> None:
    with pytest.raises(UserError, match=f"^beta is {beta}, expected"):
        AttentionTransfer(tiny(), tiny(), beta=beta)
