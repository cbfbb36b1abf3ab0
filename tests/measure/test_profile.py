"""Parts that add up to the step, operations that are those of the networks, and nothing left behind; never how fast anything was."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

import stillhouse as sh
from stillhouse.errors import UserError
from stillhouse.fitting import input_of, transforms_of
from stillhouse.measure.flops import macs
from stillhouse.measure.profile import PARTS, Products, Stopwatch, profile
from stillhouse.report.terminal import print_estimate
from stillhouse.training.recipe import Recipe
from tests.runs import DATA, RECIPE, STUDENT, TEACHER, data, distiller


def test_what_is_inside_interrupts_what_is_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, now = Stopwatch(), iter([0.0, 1.0, 11.0, 111.0, 1111.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    with watch.part("losses"), watch.part("teacher"):
        pass
    assert watch.seconds == {"losses": 1.0 + 100.0, "teacher": 10.0}
    assert watch.now == "rest"


def test_products_are_counted_where_they_run_and_only_they() -> None:
    watch = Stopwatch()
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    with Products(watch) as products:
        with watch.part("student forward"):
            total = (a @ b).relu().sum()
        with watch.part("backward"):
            total.backward()
    assert products.operations() == {"student forward": 2 * 3 * 5 * 7, "backward": 2 * 3 * 5 * 7}
    seconds = products.seconds()
    assert seconds.keys() == {"student forward", "backward"}
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize("name", ["masked_kd", "kd", "scratch"])
def test_parts_of_a_step(name: str, tmp_path: Path) -> None:
    learner = distiller(name)
    preprocessing = input_of(learner.student, data())
    recipe = Recipe(**RECIPE | {"log_every": 1})
    found = profile(learner, data(), transforms_of(preprocessing, data(), {}), preprocessing, recipe, tmp_path, rounds=1)
    rows = {row["part"]: row for row in found}
    assert [*rows] == [part for part in (*PARTS, "step") if part in rows]
    assert {"data", "student forward", "losses", "backward", "optimiser", "logging", "step"} <= rows.keys()
    assert ("saliency" in rows) == (name == "masked_kd")
    assert ("teacher" in rows) == (name != "scratch")
    batch, shape = RECIPE["batch"], (1, 8, 8)
    assert rows["student forward"]["flops"] == 2 * batch * macs(learner.student, shape)
    if name != "scratch":
        kept = learner.kept if name == "masked_kd" else None
        teacher = learner.teacher.model if name == "masked_kd" else learner.teacher
        assert rows["teacher"]["flops"] == 2 * batch * macs(teacher, shape, kept)
    assert rows["step"]["flops"] == sum(row["flops"] for part, row in rows.items() if part != "step")
    assert rows["step"]["bound_s"] == pytest.approx(sum(row["bound_s"] for part, row in rows.items() if part != "step"))
    assert rows["step"]["share"] == 1
    assert sum(row["share"] for part, row in rows.items() if part != "step") == pytest.approx(1)  # of one step
    assert "forward" not in vars(learner)
    assert "scores" not in vars(learner)
    assert not any(learner.student._forward_pre_hooks or module._forward_pre_hooks for module in learner.children())
    assert not [*tmp_path.iterdir()]


def test_no_rounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rounds is 0, expected at least 1"):
        profile(distiller("kd"), data(), (None, None), input_of(distiller("kd").student, data()), Recipe(), tmp_path, rounds=0)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    rows = sh.estimate(TEACHER, STUDENT, profile=True, data=DATA, batch=16, rounds=1)
    print_estimate(rows, Console(width=80))
    said = capsys.readouterr().out
    assert "times its bound" in " ".join(said.split())
    assert all(row["part"] in said for row in rows)
    assert "…" not in said
    for settings, sentence in (
        ({"method": "kd"}, "--method and --data are for taking a step apart: add --profile"),
        ({"profile": True, "task": "detect"}, "there are no random images to detect: name data with --data"),
        ({"profile": True, "method": "g2sd", "data": DATA}, "method g2sd has further networks"),
    ):
        with pytest.raises(UserError, match=sentence):
            sh.estimate(TEACHER, STUDENT, **settings)
