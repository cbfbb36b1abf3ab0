"""The error of a teacher in low precision: what is told is what is there, and too much of it is refused. Runs with such a teacher."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import stillhouse as sh
from stillhouse import distillers
from stillhouse.checking import some_of
from stillhouse.data.loading import eval_batches
from stillhouse.errors import UserError
from stillhouse.fitting import input_of, transforms_of
from stillhouse.interrupted import Interrupted
from stillhouse.measure.precision import lowered_within
from stillhouse.models.opening import open_model
from stillhouse.models.precision import lowered
from stillhouse.models.preprocessing import Refeed, preprocessing_of
from stillhouse.models.weights import weights_hash
from stillhouse.session import PROBE
from tests.conftest import images, tiny
from tests.parts import batch, data_for, kind_of, make, networks_for, terms_of
from tests.runs import DATA, RECIPE, STUDENT, data, interrupt, teacher

CPU = torch.device("cpu")
CLASSIFY = sorted(
    name for name in distillers.modules() if "teacher" in distillers.networks(name) and kind_of(name) in ("classify", "segment")
)


def test_the_error_is_that_of_a_direct_computation() -> None:
    network, parts = tiny(), [images(3), images(5)]
    low, error = lowered_within(network, "bf16", 1.0, parts, nn.Identity(), CPU)
    with torch.no_grad():
        p, q = (torch.cat([each(part).double() for part in parts]).softmax(1) for each in (network, low))
    assert error.kl == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-2)
    assert error.agreement == (p.argmax(1) == q.argmax(1)).double().mean()
    assert (error.images, error.by, error.precision) == (8, "torch", "bf16")
    with pytest.raises(UserError, match=rf"KL {error.kl:.2g} nats .*--teacher-error {error.kl / 2:g} is what is accepted"):
        lowered_within(network, "bf16", error.kl / 2, parts, nn.Identity(), CPU)
    assert lowered_within(network, "bf16", error.kl * 1.001, parts, nn.Identity(), CPU)[1] == error


@pytest.mark.parametrize("limit", [-0.1, float("nan"), float("inf")])
def test_limits_that_mean_nothing_are_refused(limit: float) -> None:
    with pytest.raises(UserError, match="teacher_error is"):
        lowered_within(tiny(), "bf16", limit, [images()], nn.Identity(), CPU)


def test_an_answer_that_is_no_number_is_refused() -> None:
    network = tiny()
    network.head.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match="answers too differently"):
        lowered_within(network, "bf16", 1.0, [images()], nn.Identity(), CPU)


@pytest.mark.parametrize("name", CLASSIFY)
def test_every_method_learns_from_a_teacher_in_bf16(name: str) -> None:
    full, learnt_from = make(name), networks_for(name)
    distiller = make(name, teacher=lowered(learnt_from["teacher"], "bf16", CPU)[0])
    terms, expected = terms_of(distiller, data_for(name)), terms_of(full, data_for(name))
    sum(terms.values()).backward()
    assert terms.keys() == expected.keys()
    for key, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, expected[key], rtol=0.1, atol=0.05)


def test_methods_learn_from_a_teacher_in_int8() -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    low, _ = lowered(networks_for("kd")["teacher"], "int8", CPU)
    for name, settings in (("kd", {}), ("masked_kd", {"hint": 1.0, "attention": 1.0}), ("fitnet", {})):
        terms = terms_of(make(name, teacher=copy.deepcopy(low), **settings), batch())
        for key, term in terms_of(make(name, **settings), batch()).items():
            torch.testing.assert_close(terms[key], term, rtol=0.1, atol=0.05)
    with pytest.raises(UserError, match="attention that can be read"):
        make("masked_kd", teacher=copy.deepcopy(low), by="teacher")


def job(**settings: Any) -> dict[str, Any]:
    return {"method": "masked_kd", "student": STUDENT, "teacher": teacher(), "data": DATA, **RECIPE, "epochs": 2, **settings}


def test_a_run_tells_the_error_and_is_taken_up_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precision = "bf16"
    whole = sh.distill(**job(teacher_precision=precision, out=str(tmp_path / "whole")))
    full = open_model(teacher(), classes=10, channels=1)
    facts = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert facts["hashes"]["teacher"] == weights_hash(full)
    found = facts["teacher_precision"]
    preprocessing = input_of(whole.student, data())
    probe = eval_batches(some_of(data().val, PROBE), transforms_of(preprocessing, data(), {})[1], batch=32)
    feed = Refeed(preprocessing, preprocessing_of(full))
    _, error = lowered_within(full, precision, 1.0, (pictures for _, pictures, _ in probe), feed, CPU)
    assert found == vars(error)
    assert 0 < found["kl"] < 0.01
    checkpoint = load_file(next((tmp_path / "whole" / "checkpoints").glob("*/distiller.safetensors")))
    assert not [name for name in checkpoint if name.startswith("teacher")]

    interrupt(monkeypatch, 5)
    with pytest.raises(Interrupted):
        sh.distill(**job(teacher_precision=precision, out=str(tmp_path / "stopped")))
    again = sh.distill(out=str(tmp_path / "stopped"), resume=True)
    assert again.metrics == whole.metrics
    for name, value in whole.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value), name


def test_a_run_in_another_precision_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 5)
    with pytest.raises(Interrupted):
        sh.distill(**job(out=str(tmp_path / "run")))
    with pytest.raises(UserError, match="teacher_precision=fp32, not bf16"):
        sh.distill(out=str(tmp_path / "run"), resume=True, teacher_precision="bf16")


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="answers too differently"):
        sh.distill(**job(teacher_precision="bf16", teacher_error=0.0, out=str(tmp_path / "run")))
    with pytest.raises(UserError, match="has no teacher, but --teacher-precision bf16"):
        sh.distill("scratch", student=STUDENT, data=DATA, teacher_precision="bf16", out=str(tmp_path / "run"), **RECIPE)
    assert not (tmp_path / "run").exists()
