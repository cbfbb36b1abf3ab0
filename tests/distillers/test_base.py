"""The contract itself: clocks, turns, what is frozen, how methods are found."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from stillhouse import distillers
from stillhouse.distillers.base import Clock, Distiller, Turn
from stillhouse.distillers.classics.kd import KD
from stillhouse.errors import UserError
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing


class Small(Distiller):
    """A method with a teacher in two parts and a head that learns along."""

    frozen: ClassVar[tuple[str, ...]] = ("teacher", "critic")

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, *, critic: nn.Module | None = None) -> None:
        super().__init__(student, teacher)
        self.critic = critic
        self.head = nn.Linear(2, 2)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))


@pytest.mark.parametrize(("step", "steps", "progress"), [(0, 10, 0.0), (5, 10, 0.5), (10, 10, 1.0), (12, 10, 1.0), (0, 0, 0.0)])
def test_progress(step: int, steps: int, progress: float) -> None:
    assert Clock(step=step, steps=steps, epoch=0, epochs=1).progress == progress


def test_by_default_everything_that_requires_grad_learns_in_one_turn() -> None:
    distiller = Small(net(), net())
    distiller.student[0].bias.requires_grad_(False)
    (turn,) = distiller.turns()
    assert (turn.name, turn.every, turn.optimizer) == ("student", 1, None)
    expected = [p for name, p in distiller.named_parameters() if not name.startswith("teacher.") and name != "student.0.bias"]
    assert [id(p) for p in turn.parameters] == [id(p) for p in expected]
    assert "Parameter" not in repr(Turn("student", expected)), "a turn's repr fits on a line"


def test_the_product_is_the_student_and_there_is_one_stage() -> None:
    student, teacher = net(), net()
    assert Small(student, teacher).product is student
    (stage,) = KD.stages(student, teacher, 3, temperature=4.0)
    assert (stage.name, stage.epochs) == ("", 3)
    assert isinstance(stage.distiller, KD)
    assert stage.distiller.temperature == 4.0
    (stage,) = Small.stages(student, None, 2)
    assert stage.distiller.teacher is None


def test_every_frozen_network_stays_in_eval_mode_and_out_of_the_state() -> None:
    distiller = Small(net(), net(), critic=net()).train()
    assert distiller.student.training
    assert distiller.head.training
    assert not any(module.training for frozen in (distiller.teacher, distiller.critic) for module in frozen.modules())
    assert {key.split(".")[0] for key in distiller.state_dict()} == {"student", "head"}
    distiller.load_state_dict(distiller.state_dict())


def test_a_state_that_holds_a_teacher_does_not_change_ours() -> None:
    """As a checkpoint of another tool may: the teacher that was opened is the teacher."""
    distiller = Small(net(), net())
    before = distiller.teacher[0].weight.clone()
    distiller.load_state_dict({**distiller.state_dict(), "teacher.0.weight": torch.zeros(2, 2)})
    assert torch.equal(distiller.teacher[0].weight, before)


def test_no_method_no_loss() -> None:
    with pytest.raises(NotImplementedError, match="Small"):
        Small(net())((torch.zeros(1, 2), torch.zeros(1)))


def test_teach_is_without_gradient_and_refed() -> None:
    student, teacher = nn.Sequential(nn.Conv2d(1, 1, 1)), nn.Sequential(nn.Identity())
    set_preprocessing(student, Preprocessing((0.0,), (1.0,)))
    set_preprocessing(teacher, Preprocessing((0.5,), (0.25,)))
    images = torch.rand(1, 1, 2, 2, requires_grad=True)
    output = Small(student, teacher).teach(images)
    assert not output.requires_grad
    torch.testing.assert_close(output, (images.detach() - 0.5) / 0.25)


def test_methods_are_found_by_their_files_and_classes_by_their_names() -> None:
    assert distillers.modules()["masked_kd"] == "stillhouse.distillers.supervised.masked_kd"
    assert "base" not in distillers.modules()
    for name in distillers.modules():
        kind = distillers.find(name)
        assert issubclass(kind, Distiller)
        assert getattr(distillers, kind.__name__) is kind
        assert kind.__name__.lower() == name.replace("_", "")
        keywords = {p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert set(distillers.settings(name)) == keywords


def test_an_unknown_method_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match="no method 'maskd_kd', did you mean 'masked_kd'"):
        distillers.find("maskd_kd")
    with pytest.raises(AttributeError, match="MaskedKDD"):
        _ = distillers.MaskedKDD


def test_finding_out_what_there_is_imports_none_of_it() -> None:
    program = "import sys, stillhouse.distillers as d; d.modules(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_parameters_of_a_teacher_never_get_a_gradient() -> None:
    class Leaky(Small):
        def forward(self, batch: Any, turn: str = "student") -> dict[str, Tensor]:
            return {"loss": self.student(batch).sum() + self.teacher(batch).sum()}

    distiller = Leaky(net(), net())
    distiller(torch.randn(4, 2))["loss"].backward()
    assert all(p.grad is None for p in distiller.teacher.parameters())
