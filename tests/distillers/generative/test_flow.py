"""Flow matching: the loss by hand, labels left out, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.distillers.generative.flow import Flow
from stillhouse.errors import UserError
from stillhouse.models.sampling import Draws, FlowNetwork, Sampling
from stillhouse.randomness import samples
from tests.conftest import CLASSES
from tests.generators import SHAPE, gaussians, tiny_generator

LABELS = torch.arange(40) % CLASSES


def images(count: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def asked(flow: Flow) -> list[Tensor]:
    """What the body was given in one pass."""
    taken: list[Any] = []
    flow.student.body.register_forward_pre_hook(lambda module, inputs: taken.extend(inputs))
    with samples(0, 0, torch.arange(40)):
        flow((images(), LABELS))
    return taken


def test_the_loss_is_the_squared_difference_of_velocities() -> None:
    flow, pictures = Flow(tiny_generator(), drop=0.0), images()
    with samples(0, 0, torch.arange(40)):
        found = flow((pictures, LABELS))["flow"]
        draws = Draws(40, 2 + pictures[0].numel(), torch.device("cpu"))
    sigma, _, eps = draws.uniform(), draws.uniform(), draws.normal(SHAPE)
    level = sigma.view(-1, 1, 1, 1)
    velocity = flow.student((1 - level) * pictures + level * eps, sigma, LABELS)
    assert found.item() == pytest.approx((velocity - (eps - pictures)).square().mean().item(), rel=1e-5)


def test_the_exact_velocity_has_no_more_to_learn_than_a_shifted_one() -> None:
    """The least loss is that of the conditional mean, whatever the class."""
    oracle, pictures = gaussians([1.0, -1.0, 0.0], [0.25, 0.25, 1.25]), torch.randn(4000, 1, 2, 2)
    labels = torch.arange(4000) % 2
    pictures = (0.5 * pictures + torch.tensor([1.0, -1.0])[labels].view(-1, 1, 1, 1)).double()

    class Shifted(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            return oracle(x, sigma, labels) + 0.3

    shifted = FlowNetwork(Shifted(), oracle.shape, 2)
    with samples(0, 0, torch.arange(4000)):
        least, more = (Flow(each, drop=0.0)((pictures, labels))["flow"] for each in (oracle, shifted))
    assert more.item() == pytest.approx(least.item() + 0.09, abs=0.02)


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.99])
def test_a_share_of_the_labels_becomes_the_null_condition_and_nothing_else(drop: float) -> None:
    labels = asked(Flow(tiny_generator(), drop=drop))[2]
    left = labels != CLASSES
    assert torch.equal(labels[left], LABELS[left])
    assert (~left).float().mean().item() == pytest.approx(drop, abs=0.2)


def test_levels_are_uniform_and_noise_is_full_at_the_top() -> None:
    x, sigma, _ = asked(Flow(tiny_generator(), drop=0.1))
    assert x.shape == (40, *SHAPE)
    assert 0 <= sigma.min() < 0.2
    assert 0.8 < sigma.max() < 1


def test_it_learns_and_what_it_learnt_is_drawn() -> None:
    """A few hundred steps on bright and dark images of 1 x 1: the classes come out where they are."""
    torch.manual_seed(0)
    network = tiny_generator(width=32, shape=(1, 1, 1))
    flow, optimizer = Flow(network, drop=0.1).train(), torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(400):
        labels = torch.randint(2, (256,))
        pictures = (2.0 * labels - 1).view(-1, 1, 1, 1) + 0.1 * torch.randn(256, 1, 1, 1)
        loss = flow((pictures, labels))["flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made = network.eval().sample(torch.tensor([0, 1]).repeat_interleave(200), sampling=Sampling(16)).flatten()
    assert made[:200].mean().item() == pytest.approx(-1, abs=0.2)
    assert made[200:].mean().item() == pytest.approx(1, abs=0.2)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="share of labels"):
        Flow(tiny_generator(), drop=1.0)
    with pytest.raises(UserError, match="knows no null condition: build it with null=true"):
        Flow(tiny_generator(null=False))
    Flow(tiny_generator(null=False), drop=0.0)
    with pytest.raises(UserError, match="makes images of 3x8x8 and the data's are 3x9x8; build it for their size"):
        Flow(tiny_generator())((torch.zeros(2, 3, 9, 8), LABELS[:2]))
    with pytest.raises(UserError, match="expected a network that makes images"):
        Flow(nn.Conv2d(3, 3, 1))
