"""Hinton's distillation against its formula, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse.distillers.classics.kd import KD
from stillhouse.errors import UserError
from tests.conftest import images, labels, tiny, tiny_cnn

BATCH = images(4), labels(4)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_formula(alpha: float, temperature: float) -> None:
    student, teacher = tiny(seed=1), tiny_cnn(seed=2)
    terms = KD(student, teacher, alpha=alpha, temperature=temperature)(BATCH)
    z_S, z_T = student(BATCH[0]), teacher(BATCH[0])
    p = (z_T / temperature).softmax(-1)
    kl = (p * (p.log() - (z_S / temperature).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(terms["kd"], alpha * temperature**2 * kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["ce"], (1 - alpha) * F.cross_entropy(z_S, BATCH[1]))


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    assert KD(tiny(), tiny(), alpha=1.0, temperature=3.0)(BATCH)["kd"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "setting", [{"alpha": 2}, {"alpha": -0.1}, {"alpha": float("nan")}] + [{"temperature": t} for t in (0, -1, float("inf"), float("nan"))]
)
def test_bad_settings_get_one_sentence(setting: dict[str, float]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=f"^{name} is {value}, expected") as refusal:
        KD(tiny(), tiny(), **setting)
    assert "\n" not in str(refusal.value)
