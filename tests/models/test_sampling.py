"""The path between noise and images, and drawing along it; against diffusers' own scheduler and exact velocities."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.models.sampling import Draws, FlowNetwork, Sampling, clean, guided, noised, normal_of, to_sigma
from stillhouse.randomness import samples
from tests.conftest import CLASSES
from tests.generators import SHAPE, gaussians, tiny_generator

CPU = torch.device("cpu")


def noise(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def test_the_papers_time_0_is_pure_noise() -> None:
    assert to_sigma(0.0) == 1.0
    assert to_sigma(1.0) == 0.0
    assert to_sigma(0.25) == 0.75
    assert torch.equal(to_sigma(torch.tensor([0.0, 1.0])), torch.tensor([1.0, 0.0]))


def test_a_later_time_of_the_paper_is_a_cleaner_level() -> None:
    assert to_sigma(0.9) < to_sigma(0.3)


@given(st.floats(0, 1))
def test_the_velocity_leads_back_to_the_image(level: float) -> None:
    image, eps, sigma = noise(2, 3, 4, 4).double(), noise(2, 3, 4, 4, seed=1).double(), torch.full((2,), level)
    assert torch.allclose(clean(noised(image, eps, sigma), eps - image, sigma), image, atol=1e-12)


def test_the_ends_of_the_path() -> None:
    image, eps = noise(2, 1, 2, 2), noise(2, 1, 2, 2, seed=1)
    assert torch.equal(noised(image, eps, torch.ones(2)), eps)
    assert torch.equal(noised(image, eps, torch.zeros(2)), image)


def test_guidance_of_one_is_the_condition_alone_and_more_goes_beyond() -> None:
    a, b = torch.tensor(3.0), torch.tensor(1.0)
    assert guided(a, b, 1.0) == a
    assert guided(a, b, 2.0) == 5.0


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ((0.5, 0.25), "fall from 1"),
        ((1, 1), "fall from 1"),
        ((1, 0.5, 0.6), "fall from 1"),
        ((1.0, 0.0), "above 0"),
        ((), "fall from 1"),
        (0, "at least one"),
    ],
)
def test_levels_that_do_not_fall_from_1_are_refused(levels: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Sampling(levels)


def test_guidance_below_one_or_without_null_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        Sampling(4, 0.5)
    with pytest.raises(UserError, match="no null condition"):
        tiny_generator(null=False).set_sampling(Sampling(4, 2.0))


@given(st.integers(1, 60))
def test_a_number_of_levels_is_equally_spaced_and_written_down_as_such(count: int) -> None:
    made = Sampling(count)
    assert len(made.steps) == count
    assert made.steps[0] == 1
    assert made.steps[-1] == pytest.approx(1 / count)
    assert made.options["levels"] == count
    assert Sampling(**made.options) == made


def test_other_levels_are_written_down_as_they_are() -> None:
    few = Sampling((1, 0.4), renoise=True)
    assert few.options == {"levels": (1.0, 0.4), "guidance": 1.0, "renoise": True}
    assert Sampling(**few.options) == few


@pytest.mark.parametrize("renoise", [False, True], ids=["euler", "renoised"])
def test_images_are_drawn_as_diffusers_scheduler_draws_them(renoise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stochastic sampling is the jump to the image and fresh noise."""
    module = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete", reason="diffusers is not installed")
    scheduler = module.FlowMatchEulerDiscreteScheduler(stochastic_sampling=renoise)
    levels, network, labels = (1.0, 0.7, 0.2), tiny_generator(), torch.tensor([0, 3])
    eps = noise(3, 2, *SHAPE)
    scheduler.set_timesteps(sigmas=list(levels))
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **rest: eps[scheduler.step_index + 1] if scheduler.step_index < 2 else eps[0])
    x = eps[0]
    with torch.no_grad():
        for time in scheduler.timesteps:
            x = scheduler.step(network(x, (time / 1000).expand(2), labels), time, x).prev_sample
    found = network.sample(labels, eps if renoise else eps[:1], Sampling(levels, renoise=renoise))
    assert torch.allclose(found, x, atol=1e-5)


def test_many_steps_of_the_exact_velocity_give_the_data() -> None:
    network = gaussians([2.0, -1.0, 0.5], [0.25, 1.0, 3.0], shape=(1, 1, 1))
    for label, (mean, deviation) in enumerate([(2.0, 0.5), (-1.0, 1.0)]):
        found = network.sample(torch.full((20_000,), label), noise(1, 20_000, 1, 1, 1), Sampling(200))
        assert found.mean().item() == pytest.approx(mean, abs=0.03)
        assert found.std().item() == pytest.approx(deviation, abs=0.03)


def test_one_step_gives_the_mean_of_the_data() -> None:
    network = gaussians([2.0, -1.0, 0.5], [0.25, 1.0, 3.0])
    found = network.sample(torch.tensor([0, 1]), sampling=Sampling(1))
    assert torch.allclose(found, torch.tensor([2.0, -1.0]).double().view(2, 1, 1, 1).expand_as(found))


def test_guided_sampling_asks_twice_and_plain_sampling_once() -> None:
    network, calls = tiny_generator(), []
    network.body.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    network.sample(torch.tensor([1, 2]), sampling=Sampling(3))
    assert calls == [2, 2, 2]
    calls.clear()
    network.sample(torch.tensor([1, 2]), sampling=Sampling(2, 2.0))
    assert calls == [4, 4]


def test_a_network_can_be_asked_with_images_alone() -> None:
    network, x = tiny_generator(), noise(2, *SHAPE)
    assert torch.equal(network(x), network(x, torch.ones(2), torch.full((2,), CLASSES)))
    assert tiny_generator(null=False)(x).shape == x.shape


def test_what_is_drawn_follows_from_the_place_alone() -> None:
    network, ids = tiny_generator(), torch.arange(10, 16)
    with samples(0, 3, ids):
        whole = network.sample(ids % CLASSES, sampling=Sampling(2, renoise=True))
    parts = []
    for part in ids.split(2):
        with samples(0, 3, part):
            parts.append(network.sample(part % CLASSES, sampling=Sampling(2, renoise=True)))
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


def test_draws_are_normal_by_sample_and_never_taken_twice() -> None:
    with samples(0, 0, torch.arange(2000)):
        draws = Draws(2000, 21, CPU)
        first, second, share = draws.normal((2, 5)), draws.normal((10,)), draws.uniform()
        others = Draws(2000, 5, CPU, skip=21)
        other = others.normal((5,))
    for values in (first, second, other):
        assert values.isfinite().all()
        assert values.mean().item() == pytest.approx(0, abs=0.03)
        assert values.std().item() == pytest.approx(1, abs=0.03)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([first.view(2000, 10)[:, 0], other[:, 0]]))[0, 1]) < 0.08
    assert 0 <= share.min() <= share.max() < 1
    with pytest.raises(ValueError, match="are taken of"):
        draws.uniform()


def test_the_ends_of_what_is_drawn_have_a_normal_too() -> None:
    found = normal_of(torch.tensor([0.0, 2**-24, 0.5 - 2**-24, 0.5, 1 - 2**-23, 1 - 2**-24]))
    assert found.isfinite().all()
    assert torch.equal(found, -found.flip(0))
    assert (found.diff() > 0).all()
    assert 5 < found[-1] < 6


def test_how_images_are_drawn_is_written_down_where_the_network_is_known_by_name() -> None:
    network = tiny_generator()
    network.stillhouse = {"spec": "x", "options": {"channels": 3}}
    other = copy.deepcopy(network)
    network.set_sampling(Sampling((1, 0.5), renoise=True))
    assert network.stillhouse["options"] == {"channels": 3, "levels": 2, "guidance": 1.0, "renoise": True}
    assert other.stillhouse["options"] == {"channels": 3}
    assert isinstance(other, FlowNetwork)
    assert len(other.sampling.steps) == 32
