"""A teacher on another device: the one it would have anyway changes nothing, and what cannot be is refused.

All methods with theirs on a device that is really another: tests/distillers/test_devices.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import stillhouse as sh
from stillhouse import session
from stillhouse.errors import UserError
from stillhouse.interrupted import Interrupted
from stillhouse.training.elsewhere import put_elsewhere
from tests.conftest import tiny_cnn
from tests.fake_device import FAKE, Waits, fake
from tests.parts import batch, make, terms_of
from tests.runs import DATA, RECIPE, STUDENT, interrupt, teacher

__all__ = ["fake"]

CPU = torch.device("cpu")


def job(out: Path, method: str = "kd", **settings: Any) -> dict[str, Any]:
    return {"method": method, "student": STUDENT, "teacher": teacher(), "data": DATA, "out": str(out), **RECIPE, "epochs": 2, **settings}


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("masked_kd", {"hint": 1.0, "attention": 1.0, "epochs": 1}),
        ("kd", {"teacher_precision": "bf16", "baseline": True, "epochs": 1}),
        ("fitnet", {"views": 1, "teacher_cache": "auto", "cache_storage": "fp32"}),
    ],
)
def test_the_device_that_it_would_have_anyway_changes_nothing(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    plain = sh.distill(**job(tmp_path / "plain", method, **settings))
    there = sh.distill(**job(tmp_path / "there", method, teacher_device="cpu", **settings))
    assert same(plain.student, there.student)
    assert plain.metrics == there.metrics


def test_a_run_is_taken_up_with_the_teacher_somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sh.distill(**job(tmp_path / "whole"))
    interrupt(monkeypatch, 5)
    with pytest.raises(Interrupted):
        sh.distill(**job(tmp_path / "stopped"))
    with pytest.raises(UserError, match="no device 'cuda:7'"):
        sh.distill(out=str(tmp_path / "stopped"), resume=True, teacher_device="cuda:7")
    again = sh.distill(out=str(tmp_path / "stopped"), resume=True, teacher_device="cpu")
    assert same(whole.student, again.student)


def test_it_stays_where_it_was_put_whatever_it_is_a_part_of(fake: Waits) -> None:
    """Its precision and its order in memory may change."""
    whole = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": tiny_cnn()})
    put_elsewhere(whole["teacher"], CPU, FAKE)
    whole["teacher"].to(torch.float64, memory_format=torch.channels_last)
    whole.to(FAKE)
    assert {each.device for each in whole["student"].parameters()} == {FAKE}
    assert {(each.device, each.dtype) for each in whole["teacher"].parameters()} == {(CPU, torch.float64)}
    assert whole["teacher"].layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_it_may_be_compiled() -> None:
    plain, there = make("fitnet"), make("fitnet")
    put_elsewhere(there.teacher, CPU, CPU)
    there.teacher.compile(backend="eager")
    for name, term in terms_of(there, batch()).items():
        torch.testing.assert_close(term, terms_of(plain, batch())[name], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"no device 'gpu' here; there is cpu"):
        sh.distill(**job(out, teacher_device="gpu"))
    with pytest.raises(UserError, match="scratch has no teacher, but --teacher-device cpu"):
        sh.distill(**job(out, "scratch", teacher_device="cpu") | {"teacher": None})

    def mixed(*args: Any, **settings: Any) -> Any:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!\nand more")

    with monkeypatch.context() as patched:
        patched.setattr(session, "check_distiller", mixed)
        with pytest.raises(UserError, match=r"kd does not run with its teacher on cpu.*cuda:0 and cpu!\); leave --teacher-device out"):
            sh.distill(**job(out, teacher_device="cpu"))
        with pytest.raises(RuntimeError):
            sh.distill(**job(out))
    monkeypatch.setattr(session, "processes", lambda *_: SimpleNamespace(num_processes=2, is_main_process=True))
    with pytest.raises(UserError, match="--teacher-device cpu is for one process"):
        sh.distill(**job(out, teacher_device="cpu"))
    assert not out.exists()
