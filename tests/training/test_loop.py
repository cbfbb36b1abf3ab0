"""The loop is a bare PyTorch loop, whatever it is asked for."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.data.loading import train_batches
from stillhouse.data.transforms import train_transform
from stillhouse.distillers.base import Clock, Distiller, Turn
from stillhouse.fitting import input_of
from stillhouse.losses.logits import cross_entropy
from stillhouse.models.outputs import logits_of
from tests.runs import RECIPE, assert_equal, data, distiller, loop, network, weights

EPOCHS, BATCH, PER_EPOCH, LR, MIN_LR, DECAY = 3, 16, 4, 1e-2, 1e-5, 0.05
STEPS, WARMUP = EPOCHS * PER_EPOCH, 2


def batches(student: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    transform = train_transform(input_of(student, data()), data())
    for epoch in range(EPOCHS):
        for _, _, images, labels in train_batches(data().train, transform, batch=BATCH, epoch=epoch, seed=0):
            yield images, labels


def rate(step: int) -> float:
    """Linear warm-up, then a cosine."""
    if step < WARMUP:
        return 1e-6 + step * (LR - 1e-6) / WARMUP
    return MIN_LR + 0.5 * (LR - MIN_LR) * (1 + math.cos(math.pi * step / STEPS))


def groups(network: nn.Module) -> list[dict[str, Any]]:
    """No decay on biases, norms, positions and class tokens."""
    named = list(network.named_parameters())
    spared = [parameter for name, parameter in named if parameter.ndim <= 1 or name in ("pos_embed", "cls_token")]
    ids = {id(parameter) for parameter in spared}
    decayed = [parameter for _, parameter in named if id(parameter) not in ids]
    return [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": DECAY}]


def at_rate(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate(step)


def bare(learner: Distiller, clip: float | None = None, ema: float | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that plain PyTorch gives, and their moving average."""
    optimizer = torch.optim.AdamW(groups(learner.student), lr=LR, fused=True)
    average = copy.deepcopy(learner.student.state_dict())
    learner.train()
    for step, batch in enumerate(batches(learner.student)):
        at_rate(optimizer, step)
        sum(learner(batch).values()).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(learner.student.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            decay = min(ema, 1 - (1 + step) ** (-2 / 3)) if step else 0.0
            for name, value in learner.student.state_dict().items():
                average[name].lerp_(value, 1 - decay)
    return weights(learner), average


@pytest.mark.parametrize("name", ["masked_kd", "scratch"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_weights_are_those_of_a_bare_loop(name: str, clip: float | None, tmp_path: Path) -> None:
    expected, _ = bare(distiller(name), clip)
    learner = distiller(name)
    begin = weights(learner.student)
    loop(learner, tmp_path, clip=clip).run()
    after = weights(learner)
    assert not torch.equal(after["student.head.weight"], begin["head.weight"])
    assert_equal({k: v for k, v in after.items() if k != "_extra_state"}, {k: v for k, v in expected.items() if k != "_extra_state"})


def test_accumulation_does_not_change_an_update(tmp_path: Path) -> None:
    """One plain step and a clipped one; Adam would blow rounding up."""
    after = []
    for parts in (1, 2, 4, 16):
        learner = distiller("masked_kd")
        loop(learner, tmp_path / str(parts), accumulate=parts, optimizer="sgd", clip=1.0, max_steps=2, epochs=1).run()
        after.append(weights(learner.student))
    for found in after[1:]:
        for name, value in after[0].items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def test_the_moving_average_is_the_written_one_and_is_what_is_kept(tmp_path: Path) -> None:
    expected, average = bare(distiller("masked_kd"), ema=0.6)
    learner = distiller("masked_kd")
    run = loop(learner, tmp_path, ema=0.6)
    run.run()
    assert torch.equal(learner.student.head.weight, expected["student.head.weight"])
    kept = weights(run.kept["student"])
    assert not torch.equal(kept["head.weight"], learner.student.head.weight)
    assert kept.keys() == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-6, atol=1e-7)


class Duel(Distiller):
    """A student that also wants to please a critic, and the critic, who judges every second step."""

    def __init__(self, student: nn.Module, *, first: int = 1, second: int = 2) -> None:
        super().__init__(student)
        self.critic = nn.Linear(10, 1)
        self.every = first, second
        self.clocks: list[Clock] = []

    def turns(self) -> list[Turn]:
        first, second = self.every
        return [
            Turn("student", list(self.student.parameters()), every=first),
            Turn("critic", list(self.critic.parameters()), every=second, optimizer="sgd"),
        ]

    def forward(self, batch: Any, turn: str = "student") -> dict[str, Tensor]:
        images, labels = batch
        logits = logits_of(self.student(images))
        if turn == "critic":
            return {"critic": nn.functional.softplus(self.critic(logits.detach())).mean()}
        return {"ce": cross_entropy(logits, labels), "please": -0.1 * self.critic(logits).mean()}

    def after_update(self, clock: Clock) -> None:
        self.clocks.append(clock)


def duel(**settings: int) -> Duel:
    torch.manual_seed(0)
    return Duel(network(), **settings)


@pytest.mark.parametrize("every", [(1, 1), (1, 2), (2, 2), (3, 2)])
def test_several_turns_are_a_bare_loop_of_several_optimisers(every: tuple[int, int], tmp_path: Path) -> None:
    """With (2, 2) and (3, 2) there are steps in which nobody learns."""
    plain, learner = duel(first=every[0], second=every[1]), duel(first=every[0], second=every[1])
    critic_groups = [{"params": [plain.critic.bias], "weight_decay": 0.0}, {"params": [plain.critic.weight], "weight_decay": DECAY}]
    players = {
        "student": torch.optim.AdamW(groups(plain.student), lr=LR, fused=True),
        "critic": torch.optim.SGD(critic_groups, lr=LR, momentum=0.9, nesterov=True, fused=True),
    }
    plain.train()
    for step, batch in enumerate(batches(plain.student)):
        for (name, optimizer), due in zip(players.items(), every, strict=True):
            if step % due == 0:
                at_rate(optimizer, step)
                sum(plain(batch, turn=name).values()).backward()
                optimizer.step()
                plain.zero_grad()
    loop(learner, tmp_path, log_every=1).run()
    assert_equal(weights(learner), weights(plain))
    assert learner.clocks == [Clock(step, STEPS, step // PER_EPOCH, EPOCHS) for step in range(1, STEPS + 1)]


def test_layers_have_the_rates_of_timms_factory(tmp_path: Path) -> None:
    from timm.optim import create_optimizer_v2

    learner = distiller("masked_kd")
    run = loop(learner, tmp_path, layer_decay=0.5, warmup_epochs=0.0)
    theirs = create_optimizer_v2(learner.student, opt="adamw", lr=LR, weight_decay=DECAY, layer_decay=0.5)
    run.players[0].schedule.step_update(0)
    ours = run.players[0].optimizer.param_groups
    facts = {id(p): (group["lr"], group["weight_decay"]) for group in ours for p in group["params"]}
    expected = {id(p): (LR * group["lr_scale"], group["weight_decay"]) for group in theirs.param_groups for p in group["params"]}
    assert len({lr for lr, _ in expected.values()}) > 2
    assert facts == expected
    run.players[0].schedule.step_update(STEPS // 2)
    for ours_after, group in zip(ours, theirs.param_groups, strict=True):
        assert ours_after["lr"] == pytest.approx(rate(STEPS // 2) * group["lr_scale"])


def test_what_a_distiller_learns_beside_the_student_is_trained_too(tmp_path: Path) -> None:
    learner = distiller("fitnet")
    before = learner.regressor.levels[0].weight.clone()
    run = loop(learner, tmp_path, max_steps=2)
    optimised = {id(p) for group in run.players[0].optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in learner.parameters() if p.requires_grad}
    run.run()
    assert not torch.equal(learner.regressor.levels[0].weight, before)


def test_workers_do_not_change_the_weights(tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        learner = distiller("masked_kd")
        loop(learner, tmp_path / str(workers), workers=workers, mixup=0.8, cutmix=1.0, smoothing=0.1, max_steps=6).run()
        found.append(weights(learner.student))
    assert_equal(found[1], found[0])


def test_a_second_run_in_the_same_process_may_have_another_precision(tmp_path: Path) -> None:
    rows = []
    for precision in ("fp32", "bf16", "fp32"):
        learner = distiller("kd")
        loop(learner, tmp_path / f"{precision}{len(rows)}", precision=precision, max_steps=3).run()
        rows.append(weights(learner.student))
    assert_equal(rows[2], rows[0])
    assert not torch.equal(rows[1]["head.weight"], rows[0]["head.weight"])


def test_smoke_is_four_steps(tmp_path: Path) -> None:
    run = loop(distiller("scratch"), tmp_path, smoke=True)
    run.run()
    assert run.step == run.steps == 4


def test_rows_and_evaluations_come_when_they_are_due(tmp_path: Path) -> None:
    from stillhouse.training.log import read_table

    loop(distiller("masked_kd"), tmp_path, log_every=5, eval_every=2).run()
    train, val = read_table(tmp_path / "train.csv"), read_table(tmp_path / "val.csv")
    assert [(row["step"], row["epoch"]) for row in train] == [("5", "2"), ("10", "3"), ("12", "3")]
    assert [row["step"] for row in val] == ["8", "12"]
    assert list(train[0]) == ["step", "epoch", "lr", "total", "ce", "kd"]
    assert {"top1", "top5", "nll", "ece", "agreement", "teacher_top1", "val_ce", "val_kd"} <= set(val[0])
    assert float(train[0]["total"]) == float(train[0]["ce"]) + float(train[0]["kd"])
    assert float(train[1]["lr"]) == pytest.approx(rate(9))
    assert RECIPE["epochs"] == EPOCHS
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"step-{n:08d}.safetensors" for n in (0, 6, 12)]


def test_validation_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    """Random masks too are drawn by sample."""
    found = []
    for batch in (16, 8):
        run = loop(distiller("masked_kd", by="random"), tmp_path / str(batch), max_steps=1)
        run.batch = batch
        found.append(run.evaluate())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"by": "random"}], ids=["student", "random"])
def test_views_that_never_repeat_are_none(settings: dict[str, Any], tmp_path: Path) -> None:
    """But for random masks, which are then drawn by view and sample, not by step and sample."""
    learners = [distiller("masked_kd", **settings) for _ in range(2)]
    for learner, views in zip(learners, (None, EPOCHS), strict=True):
        loop(learner, tmp_path / str(views), views=views, mixup=0.8).run()
    if settings:
        with pytest.raises(AssertionError):
            assert_equal(*map(weights, learners))
    else:
        assert_equal(*map(weights, learners))
