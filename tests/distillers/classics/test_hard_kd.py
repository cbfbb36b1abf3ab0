"""DeiT's hard distillation against its formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse.distillers.classics.hard_kd import HardKD
from stillhouse.errors import UserError
from tests.conftest import images, labels, tiny, tiny_cnn

BATCH = images(4), labels(4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_formula(alpha: float) -> None:
    student, teacher = tiny(seed=1), tiny_cnn(seed=2)
    terms = HardKD(student, teacher, alpha=alpha)(BATCH)
    z_S, z_T = student(BATCH[0]), teacher(BATCH[0])
    torch.testing.assert_close(terms["ce"], (1 - alpha) * F.cross_entropy(z_S, BATCH[1]))
    torch.testing.assert_close(terms["kd"], alpha * F.cross_entropy(z_S, z_T.argmax(-1)))


def test_only_the_teachers_first_choice_counts() -> None:
    student, teacher = tiny(seed=1), tiny(seed=2)
    before = HardKD(student, teacher)(BATCH)["kd"]
    with torch.no_grad():
        teacher.head.weight.mul_(3)
        teacher.head.bias.mul_(3)
    assert torch.equal(HardKD(student, teacher)(BATCH)["kd"], before)


def test_bad_alpha() -> None:
    with pytest.raises(UserError, match="alpha is nan"):
        HardKD(tiny(), tiny(), alpha=float("nan"))
