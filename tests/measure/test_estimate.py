"""The table's arithmetic, what it leaves untouched, and what it refuses; never how fast anything was."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

from stillhouse.errors import UserError
from stillhouse.measure.estimate import estimate
from stillhouse.measure.flops import vit_macs
from stillhouse.measure.timing import Ratio
from stillhouse.report.terminal import print_estimate

SETTING = {"image_size": 16, "channels": 1, "classes": 3, "batch": 4}


def vit(width: int, depth: int, classes: int = 3) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=classes, embed_dim=width, depth=depth, num_heads=2
    )


@pytest.fixture(scope="module")
def measured() -> dict[str, object]:
    teacher, student = vit(32, 3), vit(16, 2).eval()
    before = {name: value.clone() for model in (teacher, student) for name, value in model.state_dict().items()}
    rows = estimate(teacher, student, **SETTING, keeps=(1.0, 4), rounds=3)
    return {"teacher": teacher, "student": student, "before": before, "rows": rows}


def test_rows_and_multiply_adds(measured: dict[str, list[dict[str, object]]]) -> None:
    rows = measured["rows"]
    assert [row["name"] for row in rows] == ["plain training", "full KD", "MaskedKD keep=1.0", "MaskedKD keep=4"]
    assert [row["kept"] for row in rows] == [None, None, 16, 4]
    full, kept = vit_macs(3, 32, 17, 16, 16, 3), vit_macs(3, 32, 5, 4, 16, 3)
    assert [row["teacher_macs"] for row in rows] == [0, full, full, kept]


def test_bounds_and_ratios_are_of_the_same_rounds(measured: dict[str, list[dict[str, object]]]) -> None:
    plain, full, everything, four = measured["rows"]
    assert tuple(plain["of_plain"]) == tuple(plain["of_bound"]) == tuple(full["of_full"]) == (1, 1, 1)
    assert plain["bound_s"] == plain["step_s"].median
    assert everything["bound_s"] == full["bound_s"] > four["bound_s"] > plain["bound_s"]


def test_memory_counts_the_networks_a_row_holds(measured: dict[str, list[dict[str, object]]]) -> None:
    teacher, student = (sum(p.nbytes for p in measured[role].parameters()) for role in ("teacher", "student"))
    plain, full = measured["rows"][:2]
    assert plain["memory_bytes"] >= 3 * student  # the weights, and AdamW's two moments
    assert full["memory_bytes"] >= 3 * student + teacher


def test_networks_are_untouched(measured: dict[str, nn.Module]) -> None:
    teacher, student = measured["teacher"], measured["student"]
    assert all(torch.equal(value, measured["before"][name]) for name, value in student.state_dict().items())
    assert teacher.training
    assert not student.training
    for model in (teacher, student):
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_table_fits_a_terminal(measured: dict[str, list[dict[str, object]]]) -> None:
    slow = Ratio(12.34, 12.0, 12.9)
    figures = {"teacher_macs": 17_563_828_224, "step_s": slow, "of_plain": slow, "of_full": slow, "of_bound": slow, "bound_s": 12.34}
    console = Console(width=80)
    with console.capture() as printed:
        print_estimate([row | figures | {"memory_bytes": 2_230_000_000} for row in measured["rows"]], console)
    line = next(line for line in printed.get().splitlines() if "MaskedKD 4/16" in line)
    assert [line.count(part) for part in ("17.6", "12340", "12.34±0.45", "2.23", "…")] == [1, 2, 3, 1, 0]


def test_a_teacher_without_tokens_still_gets_plain_and_full() -> None:
    cnn = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    rows = estimate(cnn, vit(16, 1), **SETTING, rounds=1, precision="bf16")
    assert [row["name"] for row in rows] == ["plain training", "full KD", "MaskedKD"]
    assert "cannot run on some of its tokens" in rows[2]["refused"]
    console = Console(width=80)
    with console.capture() as printed:
        print_estimate(rows, console)
    assert "MaskedKD cannot be used here:" in printed.get()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"rounds": 0}, "rounds"),
        ({"keeps": (0.5, 1.5)}, r"keep=1\.5"),
        ({"channels": 3}, r"shape \(3, 16, 16\)"),
        ({"classes": 5}, "the student tells 3 classes apart, expected 5"),
    ],
)
def test_what_cannot_work_is_one_sentence(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        estimate(vit(16, 1), vit(16, 1), **(SETTING | change))


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(UserError, match="the teacher tells 4 classes apart"):
        estimate(vit(16, 1, classes=4), vit(16, 1), **SETTING)


def test_importing_it_is_cheap() -> None:
    code = "import sys, stillhouse.measure.estimate; sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
