"""The step benchmark runs, and what it times side by side is the same step (it compares the losses itself)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BENCHMARK = BENCHMARKS / "step.py"


def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    command = [sys.executable, BENCHMARK, "--smoke", "--teacher-precision", "bf16", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert all(len(seconds) == 2 for seconds in result["seconds"].values())
    assert result["of_plain"]["plain training"] == [1, 1, 1]
    assert len(result["checks"]) == 8


def test_smoke_of_the_detectors(tmp_path: Path) -> None:
    out = tmp_path / "dense.json"
    done = subprocess.run([sys.executable, BENCHMARK, "--dense", "--smoke", "--out", out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["plain training", "plain feature KD", "ACAM-KD"]
    assert rows["plain training"]["of_plain"] == rows["plain feature KD"]["of_features"] == [1, 1, 1]
    assert rows["plain training"]["above_plain"] == 0
    assert all(row["memory_bytes"] > 0 for row in rows.values())


def test_smoke_of_how_a_step_grows(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "scaling.py", "--smoke", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scaling.md").read_text().count("| plain training |") == 3
    assert "<svg" in (tmp_path / "scaling.svg").read_text()


def test_smoke_of_the_students_switches() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "student.py", "--smoke"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "timm/test" in done.stdout


def test_smoke_of_a_teacher_beside_its_student() -> None:
    """It compares the answers itself."""
    done = subprocess.run([sys.executable, BENCHMARKS / "overlap.py", "--smoke"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "teacher beside the student: " in done.stdout
