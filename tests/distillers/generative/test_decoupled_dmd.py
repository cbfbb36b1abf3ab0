"""Decoupled DMD: the checks of its card, against the equations written out and a teacher whose scores are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.distillers.generative.decoupled_dmd import DecoupledDMD
from stillhouse.errors import UserError
from stillhouse.losses.distribution_matching import SCHEDULES, normaliser
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.models.sampling import Draws, FlowNetwork, Sampling, noised
from stillhouse.randomness import samples
from tests.conftest import CLASSES
from tests.generators import SHAPE, gaussians, tiny_generator

COUNT = 12
LABELS = torch.arange(COUNT) % CLASSES
IMAGES = torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(7))
CPU = torch.device("cpu")


def dmd(teacher: FlowNetwork | None = None, moved: bool = True, **settings: Any) -> DecoupledDMD:
    """With a fake score that has left the teacher, if it is `moved`."""
    made = DecoupledDMD(tiny_generator(1), teacher or tiny_generator(2), **settings)
    if moved:
        with torch.no_grad():
            for parameter in [*made.fake.parameters(), *made.student.parameters()]:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return made.train()


def terms(distiller: DecoupledDMD, turn: str = "student", step: int = 0) -> dict[str, Tensor]:
    with samples(0, step, torch.arange(COUNT)):
        return distiller((IMAGES, LABELS), turn)


def deltas(distiller: DecoupledDMD, sigma_t: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What moves these images, were they the generator's."""
    with samples(seed, 0, torch.arange(COUNT)):
        return distiller.deltas(IMAGES, torch.full((COUNT,), sigma_t), LABELS, Draws(COUNT, 2 + 2 * IMAGES[0].numel(), CPU))


def calls(network: FlowNetwork) -> list[tuple[Tensor, Tensor, Tensor]]:
    taken: list[Any] = []
    network.body.register_forward_pre_hook(lambda module, inputs: taken.append(inputs))
    return taken


@pytest.mark.parametrize("guidance", [1.5, 3.0, 7.5])
@pytest.mark.parametrize("normalise", ["none", "joint"])
def test_coupled_it_is_dmd_with_the_guided_teacher(guidance: float, normalise: Any) -> None:
    distiller = dmd(guidance=guidance, schedule="coupled", normalise=normalise)
    seen = calls(distiller.teacher)
    matched, augmented = deltas(distiller)
    x, sigma, _ = seen[0]
    with torch.no_grad():
        fake, real, null = (network.expected(x, sigma, labels) for network, labels in (
            (distiller.fake, LABELS), (distiller.teacher, LABELS), (distiller.teacher, torch.full_like(LABELS, CLASSES))))  # fmt: skip
    cfg = null + guidance * (real - null)
    delta = (fake - cfg) / (normaliser(IMAGES, cfg) if normalise == "joint" else 1)
    assert (matched + augmented - delta).abs().max() < 1e-6 * guidance


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_guidance_the_null_condition_is_never_asked_for(schedule: Any) -> None:
    distiller = dmd(tiny_generator(2), guidance=1.0, schedule=schedule)
    seen = calls(distiller.teacher)
    assert set(terms(distiller)) == {"dm"}
    assert len(seen) == 1
    assert not any((labels == CLASSES).any() for _, _, labels in seen)
    assert not deltas(distiller)[1].any()


def test_without_guidance_a_teacher_needs_no_null_condition() -> None:
    distiller = DecoupledDMD(tiny_generator(1, null=False), tiny_generator(2, null=False), guidance=1.0)
    with torch.no_grad():
        distiller.fake.body.last.bias.add_(0.1)
    assert terms(distiller)["dm"] > 0


def test_a_fake_score_that_is_the_teacher_leaves_nothing_to_match() -> None:
    distiller = dmd(moved=False)
    matched, augmented = deltas(distiller)
    assert not matched.any()
    assert augmented.any()
    assert terms(distiller)["dm"].item() == 0


@pytest.mark.parametrize("guidance", [1.5, 7.5])
def test_a_teacher_that_ignores_its_condition_augments_nothing(guidance: float) -> None:
    teacher = tiny_generator(2)
    with torch.no_grad():
        teacher.body.label.weight[:] = teacher.body.label.weight[0].clone()
    distiller = dmd(teacher, guidance=guidance)
    assert not deltas(distiller)[1].any()
    assert terms(distiller)["ca"].item() == 0


@pytest.mark.parametrize("normalise", ["branch", "joint", "none"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gradient_on_the_image_is_delta_over_its_normaliser_and_the_number_of_values(normalise: Any, schedule: Any) -> None:
    distiller = dmd(normalise=normalise, schedule=schedule, levels=(1.0,))
    made: list[Tensor] = []
    moved: list[tuple[Tensor, Tensor]] = []
    deltas_of = distiller.deltas

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        made.append(output)

    distiller.student.register_forward_hook(keep)
    distiller.deltas = lambda *args: moved.append(deltas_of(*args)) or moved[-1]  # type: ignore[method-assign]
    sum(terms(distiller).values()).backward()
    (velocity,), ((matched, augmented),) = made, moved
    assert velocity.grad is not None
    expected = -(matched + augmented) / matched.numel()  # at sigma_t = 1: x_0 = x - v
    assert torch.allclose(velocity.grad, expected, rtol=1e-4, atol=1e-9)


def test_each_part_is_divided_by_the_teachers_distance_at_its_own_level() -> None:
    plain, ours = deltas(dmd(normalise="none")), deltas(dmd(normalise="branch"))
    distiller = dmd(normalise="branch")
    seen = calls(distiller.teacher)
    deltas(distiller)
    for part, (x, sigma, labels) in zip(range(2), seen, strict=False):
        assert torch.equal(labels, LABELS)
        divisor = normaliser(IMAGES, distiller.teacher.expected(x, sigma, labels))
        assert torch.allclose(ours[part], plain[part] / divisor, atol=1e-6)


def test_gradients_reach_the_generator_alone_and_the_fake_score_in_its_turn() -> None:
    distiller = dmd()
    sum(terms(distiller).values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.student.parameters())
    assert all(parameter.grad is None for network in (distiller.fake, distiller.teacher) for parameter in network.parameters())
    distiller.zero_grad(set_to_none=True)
    terms(distiller, "fake")["fake"].backward()
    assert all(parameter.grad is not None for parameter in distiller.fake.parameters() if parameter is not distiller.fake.body.label.weight)
    assert all(parameter.grad is None for network in (distiller.student, distiller.teacher) for parameter in network.parameters())


def test_of_the_generators_passes_only_the_last_one_learns() -> None:
    distiller, passes = dmd(levels=(1.0, 0.6, 0.3)), []
    distiller.student.register_forward_hook(lambda module, inputs, output: passes.append((len(output), output.requires_grad)))
    terms(distiller)
    assert [learns for _, learns in passes] == [*[False] * (len(passes) - 1), True]
    assert passes[-1][0] == COUNT
    passes.clear()
    terms(distiller, "fake")
    assert not any(learns for _, learns in passes)


def test_backward_simulation_is_how_images_are_drawn() -> None:
    """The last step's input, and so its output, is that of `sample` from the same noise."""
    distiller = dmd(levels=(1.0, 0.6, 0.3))
    size = 1 + 3 * IMAGES[0].numel()
    with samples(0, 0, torch.arange(COUNT)):
        noisy, sigma = distiller.simulated(LABELS, Draws(COUNT, size, CPU))
        draws = Draws(COUNT, size, CPU)
    step = (draws.uniform() * 3).long()
    noise = torch.stack([draws.normal(SHAPE) for _ in range(3)])
    assert set(step.tolist()) == {0, 1, 2}
    assert torch.equal(sigma, torch.tensor([1.0, 0.6, 0.3])[step])
    assert torch.equal(noisy[step == 0], noise[0][step == 0])
    found = distiller.student.expected(noisy, sigma, LABELS)
    drawn = distiller.student.sample(LABELS, noise)
    assert torch.allclose(found[step == 2], drawn[step == 2], atol=1e-5)


@pytest.mark.parametrize("level", [1.0, 0.75, 0.5, 0.25])
def test_augmentation_is_never_noisier_than_the_generators_input(level: float) -> None:
    distiller = dmd()
    seen = calls(distiller.teacher)
    for seed in range(20):
        deltas(distiller, level, seed)
    matched, augmented, null = (torch.cat([sigma for _, sigma, _ in seen[part::3]]) for part in range(3))
    assert torch.equal(augmented, null)
    assert augmented.min() >= 0.02
    assert augmented.max() <= min(level, 0.98)
    assert augmented.max() > 0.85 * level
    assert matched.max() > 0.9


def test_one_step_makes_it_its_schedule_3() -> None:
    ours, third = (deltas(dmd(schedule=schedule, levels=(1.0,)), 1.0) for schedule in ("decoupled-hybrid", "decoupled"))
    assert torch.equal(ours[0], third[0])
    assert torch.equal(ours[1], third[1])


def test_the_fake_score_learns_flow_matching_on_the_generators_images_with_their_class() -> None:
    distiller = dmd(levels=(1.0, 0.5))
    seen, made = calls(distiller.fake), []
    distiller.student.register_forward_hook(lambda module, inputs, output: made.append((inputs, output)))
    loss = terms(distiller, "fake")["fake"]
    (x, sigma, labels), ((noisy, sigma_t, _), velocity) = seen[0], made[-1]
    image = noisy - sigma_t.view(-1, 1, 1, 1) * velocity
    eps = (x - (1 - sigma).view(-1, 1, 1, 1) * image) / sigma.view(-1, 1, 1, 1)
    answer = distiller.fake(x, sigma, LABELS)
    assert torch.equal(labels, LABELS)
    assert 0.02 <= sigma.min() <= sigma.max() <= 0.98
    assert loss.item() == pytest.approx((answer - (eps - image)).square().mean().item(), rel=1e-3)


def test_generator_and_fake_score_do_not_see_the_same_noise() -> None:
    distiller = dmd(levels=(1.0,))
    generator, fake = calls(distiller.student), calls(distiller.fake)
    terms(distiller)
    terms(distiller, "fake")
    assert not torch.isclose(generator[0][0], generator[1][0]).any(1).all()
    assert not torch.isclose(fake[0][0], fake[1][0]).any(1).all()


def test_a_batch_is_the_mean_of_its_parts() -> None:
    for turn in ("student", "fake"):
        distiller = dmd()
        whole = {name: value.item() for name, value in terms(distiller, turn).items()}
        parts = []
        for part in torch.arange(COUNT).split(COUNT // 3):
            with samples(0, 0, part):
                parts.append(distiller((IMAGES[part], LABELS[part]), turn))
        for name, value in whole.items():
            assert torch.stack([part[name] for part in parts]).mean().item() == pytest.approx(value, rel=1e-4)


def oracle() -> FlowNetwork:
    """Two classes, N(2, 1) and N(-2, 1); of any class: N(0, 1 + 4)."""
    return gaussians([2.0, -2.0, 0.0], [1.0, 1.0, 5.0])


def with_oracle(**settings: Any) -> DecoupledDMD:
    return DecoupledDMD(oracle(), oracle(), normalise="none", **settings).double()


def test_with_known_scores_augmentation_has_its_closed_form() -> None:
    """X_c - X_null at x: the class's posterior mean minus that of all, and it points to the class's side."""
    distiller, count = with_oracle(guidance=3.0), 2000
    labels, images = torch.arange(count) % 2, torch.zeros(count, 1, 2, 2).double()
    seen = calls(distiller.teacher)
    with samples(0, 0, torch.arange(count)):
        _, augmented = distiller.deltas(images, torch.full((count,), 0.5), labels, Draws(count, 10, CPU))
    x, sigma, _ = seen[1]
    level = sigma.double().view(-1, 1, 1, 1)
    mean = torch.tensor([2.0, -2.0]).double()[labels].view(-1, 1, 1, 1)
    scale = 1 - level
    conditional = mean + scale * (x - scale * mean) / (scale**2 + level**2)
    null = scale * 5 * x / (scale**2 * 5 + level**2)
    assert torch.allclose(augmented.double(), -2 * (conditional - null), atol=1e-5)
    assert ((-augmented * mean.sign()).mean() > 0).item()


def test_augmentation_alone_has_no_rest_near_the_class_and_matching_holds_it() -> None:
    """Images moved step by step, with the exact scores of what they are: DM alone leads to the class's mean, CA alone far beyond it."""

    def moved(hold: bool, guidance: float) -> list[float]:
        distiller, count = with_oracle(guidance=guidance, levels=(1.0,)), 500
        images, labels = torch.full((count, 1, 2, 2), 0.5).double(), torch.zeros(count, dtype=torch.long)
        path = []
        for step in range(400):
            with torch.no_grad():
                distiller.fake.body.means[0], distiller.fake.body.variances[0] = images.mean(), images.var() + 1e-3
            with samples(0, step, torch.arange(count)):
                matched, augmented = distiller.deltas(images, torch.ones(count), labels, Draws(count, 10, CPU))
            images = images - 0.1 * ((matched if hold else 0) + augmented)
            path.append(images.mean().item())
        return path

    alone, held, plain = moved(False, 3.0), moved(True, 3.0), moved(True, 1.0)
    assert plain[-1] == pytest.approx(2.0, abs=0.15)
    assert alone[-1] > 5
    assert 2 < held[-1] < 4
    assert alone == sorted(alone[:50]) + alone[50:]


def test_student_and_fake_score_begin_as_the_teacher_and_the_student_is_drawn_in_few_steps() -> None:
    distiller = dmd(moved=False, levels=(1.0, 0.4))
    for network in (distiller.student, distiller.fake):
        assert all(torch.equal(value, distiller.teacher.state_dict()[name]) for name, value in network.state_dict().items())
    assert distiller.product.sampling == Sampling((1.0, 0.4), renoise=True)
    assert len(distiller.teacher.sampling.steps) == len(distiller.fake.sampling.steps) == 32
    assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())


def test_turns() -> None:
    generator, fake = dmd(ratio=4, fake_rate=2.0).turns()
    assert (generator.name, generator.every, generator.rate) == ("student", 4, 1.0)
    assert (fake.name, fake.every, fake.rate) == ("fake", 1, 2.0)
    assert not {id(each) for each in generator.parameters} & {id(each) for each in fake.parameters}


def test_the_ablations_regularisers() -> None:
    assert set(terms(dmd(regulariser="none"))) == {"ca"}
    assert set(terms(dmd(regulariser="moments"))) == {"moments", "ca"}
    distiller = dmd(regulariser="moments", guidance=1.0)
    terms(distiller)["moments"].backward()
    assert all(parameter.grad is not None for parameter in distiller.student.parameters())


def test_what_is_watched_and_when_it_alarms() -> None:
    distiller = dmd()
    terms(distiller)
    figures = distiller.watch()
    assert set(figures) == {"size", "dm_size", "ca_size"}
    assert all(value.shape == () and value.isfinite() and not value.requires_grad for value in figures.values())
    assert distiller.alarm({"size": 1.1}) == ""
    assert "2.0 times as strong" in distiller.alarm({"size": 2.0})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"guidance": 0.9}, "guidance is 0.9"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"levels": (1.0, 0.5, 0.5)}, "fall from 1"),
        ({"levels": (0.9, 0.5)}, "fall from 1"),
        ({"levels": (1.0, 0.3), "sigma_min": 0.3}, "below the last level, 0.3"),
        ({"sigma_min": 0.6, "sigma_max": 0.5, "levels": (1.0,)}, "sigma_min < sigma_max"),
        ({"sigma_max": 1.1}, "sigma_max 1.1"),
        ({"schedule": "reversed"}, "schedule is 'reversed', expected one of coupled"),
        ({"regulariser": "gan"}, "regulariser is 'gan'"),
        ({"normalise": "batch"}, "normalise is 'batch'"),
        ({"ratio": 0}, "ratio is 0"),
        ({"fake_rate": 0.0}, "fake_rate 0.0"),
        ({"guidance": 1.0, "regulariser": "none"}, "nothing would be learnt"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dmd(**settings)


def test_networks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="the teacher knows no null condition: train one with null=true"):
        DecoupledDMD(tiny_generator(null=False), tiny_generator(null=False))
    with pytest.raises(UserError, match="give --student the teacher's own spec"):
        DecoupledDMD(tiny_generator(width=6), tiny_generator(width=8))
    with pytest.raises(UserError, match="the teacher is a Conv2d, expected a network that makes images"):
        DecoupledDMD(tiny_generator(), nn.Conv2d(3, 3, 1))
    student, teacher = tiny_generator(), tiny_generator()
    set_preprocessing(teacher, Preprocessing((0.1,) * 3, (0.5,) * 3))
    with pytest.raises(UserError, match="normalised differently"):
        DecoupledDMD(student, teacher)


def test_noise_is_added_by_the_convention_of_the_card() -> None:
    """sigma = 1 is noise: the teacher is shown something cleaner where sigma is smaller."""
    eps = torch.randn(COUNT, *SHAPE)
    near, far = (noised(IMAGES, eps, torch.full((COUNT,), sigma)) for sigma in (0.1, 0.9))
    assert (near - IMAGES).norm() < (far - IMAGES).norm()
