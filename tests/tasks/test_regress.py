"""What is measured of a network that imitates features."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics.regression import R2Score

from stillhouse import tasks
from stillhouse.errors import UserError
from stillhouse.tasks.labels import label_losses
from stillhouse.tasks.regress import Regress
from tests.conftest import images, tiny

NAMES = [f"feature {number}" for number in range(4)]


def test_it_is_torchmetrics_r2_weighted_by_variance_and_the_mean_squared_error() -> None:
    metric, reference = Regress(NAMES), R2Score(multioutput="variance_weighted")
    found, truth = torch.randn(30, 4), torch.randn(30, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 5
    for part in (slice(0, 13), slice(13, 30)):
        metric.update(found[part], truth[part])
    reference.update(found, truth)
    assert metric.compute() == {
        "r2": pytest.approx(float(reference.compute()), rel=1e-5),
        "mse": pytest.approx(float((found - truth).square().mean()), rel=1e-5),
    }
    assert tasks.find("regress") is Regress
    assert metric.headline in metric.titles


def test_the_truth_is_1_and_the_mean_is_chance() -> None:
    truth = torch.randn(30, 4)
    for answer, expected in ((truth, 1.0), (truth.mean(0).expand(30, 4), 0.0)):
        metric = Regress(NAMES)
        metric.update(answer, truth)
        assert metric.compute()["r2"] == pytest.approx(expected, abs=1e-6)
    assert metric.chance == 0.0


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match="nothing was measured"):
        Regress(NAMES).compute()
    metric = Regress(NAMES)
    with pytest.raises(UserError, match=r"shape \(3, 5\).*expected \(3, 4\)"):
        metric.update(torch.zeros(3, 5), torch.zeros(3, 4))
    metric.update(torch.zeros(3, 4), torch.ones(3, 4))
    with pytest.raises(UserError, match="the same targets"):
        metric.compute()


def test_it_draws_the_images() -> None:
    pictures = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert Regress.draw(pictures, torch.zeros(2, 4), NAMES).shape == (2, 3, 8, 8)


def test_a_network_that_regresses_learns_numbers_and_one_that_classifies_soft_labels() -> None:
    network, pictures, targets = tiny(num_classes=4), images(), torch.randn(2, 4).softmax(-1)
    assert list(label_losses(network, (pictures, targets))) == ["ce"]
    network.stillhouse = {"task": "regress"}
    terms = label_losses(network, (pictures, targets))
    torch.testing.assert_close(terms["mse"], nn.functional.mse_loss(network(pictures), targets))
    assert list(terms) == ["mse"]
