"""Decoupled distillation against its formula."""

from __future__ import annotations

import pytest
import torch

from stillhouse.distillers.classics.dkd import DKD
from stillhouse.errors import UserError
from stillhouse.losses.logits import kl_divergence
from tests.conftest import CLASSES, images, labels, tiny, tiny_cnn

BATCH = images(4), labels(4)


def test_the_formula() -> None:
    student, teacher = tiny(seed=1), tiny_cnn(seed=2)
    terms = DKD(student, teacher, alpha=0.5, beta=3.0, temperature=2.0)(BATCH)
    p_S, p_T = ((model(BATCH[0]).double() / 2).softmax(-1) for model in (student, teacher))
    tckd, nckd = 0.0, 0.0
    for s, t, target in zip(p_S, p_T, BATCH[1].tolist(), strict=True):
        b_S, b_T = torch.stack([s[target], 1 - s[target]]), torch.stack([t[target], 1 - t[target]])
        tckd += (b_T * (b_T / b_S).log()).sum().item()
        others = [index for index in range(CLASSES) if index != target]
        r_S, r_T = s[others] / s[others].sum(), t[others] / t[others].sum()
        nckd += (r_T * (r_T / r_S).log()).sum().item()
    assert terms["tckd"].item() == pytest.approx(0.5 * 4 * tckd / 4, rel=1e-4)
    assert terms["nckd"].item() == pytest.approx(3.0 * 4 * nckd / 4, rel=1e-4)


def test_weighted_as_kl_would_be_it_is_kl() -> None:
    """Eq. 5, on one image: beta = 1 - p_t of the teacher."""
    student, teacher, one = tiny(seed=1), tiny(seed=2), (images(1), labels(1))
    z_S, z_T = student(one[0]), teacher(one[0])
    rest = 1 - z_T.softmax(-1)[0, one[1]].item()
    terms = DKD(student, teacher, alpha=1.0, beta=rest, temperature=1.0)(one)
    torch.testing.assert_close(terms["tckd"] + terms["nckd"], kl_divergence(z_S, z_T), rtol=1e-4, atol=1e-5)


def test_soft_labels_take_their_largest_class() -> None:
    distiller = DKD(tiny(seed=1), tiny(seed=2))
    soft = 0.9 * torch.nn.functional.one_hot(BATCH[1], CLASSES) + 0.1 / CLASSES
    hard = distiller(BATCH)
    mixed = distiller((BATCH[0], soft))
    assert torch.equal(mixed["tckd"], hard["tckd"])
    assert torch.equal(mixed["nckd"], hard["nckd"])


@pytest.mark.parametrize("beta", [-1.0, float("inf"), float("nan")])
def test_bad_beta(beta: float) -> None:
    with pytest.raises(UserError, match=f"^beta is {beta}, expected"):
        DKD(tiny(), tiny(), beta=beta)
