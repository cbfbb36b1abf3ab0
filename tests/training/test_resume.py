"""A run that was stopped and taken up again is the run that was not."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stillhouse import distillers
from stillhouse.errors import UserError
from stillhouse.interrupted import Interrupted
from stillhouse.training.checkpoint import checkpoints, load_checkpoint
from stillhouse.training.failures import explained
from tests.runs import assert_equal, distiller, interrupt, loop, weights
from tests.training.test_loop import duel

STOP = 6
"""In the middle of the second epoch, on no row of the log boundary."""
ALL = {"accumulate": 2, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "ema": 0.8, "clip": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "workers": {"workers": 2},
    "everything": ALL,
    "everything, workers": {**ALL, "workers": 2},
    "bf16": {**ALL, "precision": "bf16"},
    "layer decay": {"layer_decay": 0.7, "optimizer": "lamb"},
}


def held(
    make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...] = (STOP,), resumed_workers: int = 0, **recipe: Any
) -> None:
    recipe = {"log_every": 5, **recipe}
    whole = make()
    uninterrupted = loop(whole, folder / "whole", **recipe)
    metrics = uninterrupted.run()
    for stop in stops:
        interrupt(monkeypatch, stop)
        stopped = loop(make(), folder / "stopped", resume=stop != stops[0], **recipe)
        with pytest.raises(Interrupted, match=f"after step {stop}$"):
            stopped.run()
    learner = make()
    resumed = loop(learner, folder / "stopped", resume=True, **{"workers": resumed_workers, **recipe})
    assert resumed.step == stops[-1]
    assert resumed.run() == metrics
    assert_equal(weights(learner), weights(whole))
    assert_equal(weights(nn.ModuleDict(resumed.kept)), weights(nn.ModuleDict(uninterrupted.kept)))
    for name in ("train.csv", "val.csv", "watch.csv"):
        ends = [folder / part / name for part in ("whole", "stopped")]
        assert len({end.read_bytes() if end.exists() else b"" for end in ends}) == 1, name
    ends = [load_checkpoint(checkpoints(folder / name / "checkpoints")[-1])[0] for name in ("whole", "stopped")]
    for part, tensors in ends[0].items():
        assert_equal(ends[1][part], tensors)
    assert not [key for key in ends[1]["distiller"] if key.startswith("teacher")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(distillers.modules()))
def test_every_distiller_goes_on_exactly(name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun without loaders, in full precision taken up with two; with accumulation, a moving average, and mixup where there are labels."""
    if name == "mirage":
        pytest.skip("it trains nothing: tests/test_taken_up.py")
    mixed = {"mixup": 0.8} if "classify" in distillers.find(name).tasks else {}
    settings = {**mixed, "ema": 0.8, "accumulate": 2, "precision": precision}
    held(lambda: distiller(name), tmp_path, monkeypatch, resumed_workers=2 if precision == "fp32" else 0, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_everything_switched_on(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held(lambda: distiller("masked_kd"), tmp_path, monkeypatch, **VARIANTS[variant])


@pytest.mark.parametrize("settings", [{"keep": "0:1.0,0.25:0.5,0.6:0.25"}, {"by": "random", "hint": 1.0}], ids=["schedule", "random"])
def test_masks_go_on_exactly(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held(lambda: distiller("masked_kd", **settings), tmp_path, monkeypatch)


@pytest.mark.parametrize("every", [(1, 2), (2, 1), (3, 2)])
def test_several_turns_go_on_exactly(every: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held(lambda: duel(first=every[0], second=every[1]), tmp_path, monkeypatch, stops=(3, 7, 9))


def test_stopped_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first step, at the end of an epoch, on a row of the log, and at the last step."""
    held(lambda: distiller("masked_kd"), tmp_path, monkeypatch, stops=(1, 4, 10, 12), ema=0.8)


def test_sigterm_stops_as_ctrl_c_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupt(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Interrupted, match="after step 3") as caught:
        loop(distiller("scratch"), tmp_path).run()
    assert caught.value.signal == signal.SIGTERM
    assert load_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])[1]["step"] == 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_dropout_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stillhouse.distillers.classics.scratch import Scratch
    from tests.runs import STUDENT, network

    held(lambda: Scratch(network(f"{STUDENT},proj_drop_rate=0.3")), tmp_path, monkeypatch, workers=2)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows written after it are written again, not twice."""
    whole = distiller("masked_kd")
    loop(whole, tmp_path / "whole", save_every=5, log_every=2).run()
    learner = loop(distiller("masked_kd"), tmp_path / "killed", save_every=5, log_every=2)
    update = learner.update

    def dying(step: int, *batch: Any) -> None:
        if step == 9:
            raise MemoryError("no more")
        update(step, *batch)

    monkeypatch.setattr(learner, "update", dying)
    sentence = r"memory ran out after step 9 \(no more\): free some and go on with --resume"
    with pytest.raises(UserError, match=sentence), explained(lambda: learner.step):  # as a session runs it
        learner.run()
    resumed = distiller("masked_kd")
    again = loop(resumed, tmp_path / "killed", save_every=5, log_every=2, resume=True)
    assert again.step == 5
    again.run()
    assert_equal(weights(resumed), weights(whole))
    for name in ("train.csv", "val.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_loop_does_nothing_more(tmp_path: Path) -> None:
    first = distiller("masked_kd")
    metrics = loop(first, tmp_path).run()
    second = distiller("masked_kd")
    assert loop(second, tmp_path, resume=True).run() == metrics
    assert_equal(weights(second), weights(first))


def test_a_loop_outside_the_main_thread_runs(tmp_path: Path) -> None:
    """Python allows signal handlers in the main thread only."""
    from threading import Thread

    metrics: list[dict[str, float]] = []
    thread = Thread(target=lambda: metrics.append(loop(distiller("scratch"), tmp_path, max_steps=2).run()))
    thread.start()
    thread.join()
    assert metrics
    assert torch.isfinite(torch.tensor(metrics[0]["top1"]))
