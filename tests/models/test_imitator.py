"""Networks that imitate features, and weights that are drawn anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.imitator import Imitator, PoolNetwork, imitate, redraw
from tests.conftest import images, tiny, tiny_cnn


@pytest.mark.parametrize("network", [tiny_cnn, tiny], ids=["residual network", "transformer"])
def test_all_weights_are_drawn_anew_from_the_generator(network: type) -> None:
    drawn = []
    for seed in (0, 0, 1):
        model = network(seed=3)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(seed)
        redraw(model)
        drawn.append(model.state_dict())
        for name, value in model.named_parameters():
            assert not torch.equal(value, before[name]), name
    assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())
    assert any(not torch.equal(value, drawn[2][name]) for name, value in drawn[0].items())


def test_statistics_of_normalisation_begin_anew() -> None:
    model = tiny_cnn().train()
    model(images())
    assert model.bn1.running_mean.any()
    assert not redraw(model).bn1.running_mean.any()


def test_its_layer_sees_every_place() -> None:
    network = Imitator(tiny_cnn(), 7, images())
    assert network.embed(images()).shape == (2, 16 * 4 * 4)
    assert network(images()).shape == (2, 7)
    torch.testing.assert_close(network.eval().embed(images()), network.encoder.forward_features(images()).flatten(1))


def test_the_encoder_that_is_given_is_left_alone() -> None:
    given = tiny_cnn().requires_grad_(False)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    learnt = imitate(given, images(), torch.randn(2, 3), epochs=1, batch=2, lr=0.1, decay=0.0)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert not learnt.training
    assert not torch.equal(learnt.encoder.conv1[0].weight, given.conv1[0].weight)


def test_it_learns_what_it_is_shown_and_follows_from_the_generator() -> None:
    pictures, targets = images(4), torch.randn(4, 3)

    def learnt(epochs: int) -> Tensor:
        torch.manual_seed(5)
        with torch.no_grad():  # as it is called in an evaluation
            return imitate(tiny_cnn(), pictures, targets, epochs=epochs, batch=2, lr=0.02, decay=0.0).train()(pictures)

    assert torch.equal(learnt(2), learnt(2))
    assert F.mse_loss(learnt(20), targets) < 0.5 * F.mse_loss(learnt(0), targets)


def test_a_network_of_a_pool_keeps_its_age_and_momentum_in_its_state() -> None:
    pictures, targets = images(4), torch.randn(4, 3)
    first, second = PoolNetwork(tiny_cnn(), 3, pictures), PoolNetwork(tiny_cnn(), 3, pictures)
    for _ in range(2):
        first.learn(pictures, targets, lr=0.05, decay=1e-3)
    second.load_state_dict(first.state_dict())
    for network in (first, second):
        network.learn(pictures, targets, lr=0.05, decay=1e-3)
    assert second.age == 3
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_network_without_features_is_refused() -> None:
    with pytest.raises(UserError, match="has no forward_features"):
        Imitator(nn.Sequential(nn.Flatten()), 3, images())
