"""A few moments of the campaign (`make faults` tries two hundred), and that it would notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.training.checkpoint import save_checkpoint
from tests.faults.campaign import Watched, differing, still_there, table

MOMENTS = 5


def test_runs_that_are_ended_anywhere_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """In a process of its own: it forks, and so must have no threads."""
    command = [sys.executable, "-m", "tests.faults.campaign", "--moments", str(MOMENTS), "--seed", "1", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--runs", "masked_kd, everything on"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    codes = [row["codes"][0] for row in json.loads((tmp_path / "table.json").read_text())]
    assert set(codes) <= {137, 143}, "each is really ended"
    assert (tmp_path / "table.md").read_text().splitlines()[-1] == f"| all | {MOMENTS} | {MOMENTS} | 0 |"


def test_a_lost_checkpoint_is_noticed(tmp_path: Path) -> None:
    assert still_there(None)
    save_checkpoint(tmp_path, 3, {}, {})
    assert still_there((str(tmp_path), 3))
    assert not still_there((str(tmp_path), 4))
    assert not still_there((str(tmp_path / "none"), 1))


def test_what_went_wrong_is_counted() -> None:
    row = {"how": "time", "doing": ["training"], "identical": True, "lost": False}
    rows = [row, row | {"identical": False}, row | {"lost": True, "how": "SIGTERM"}]
    assert table(rows).splitlines()[2:] == [
        "| by SIGTERM, training | 1 | 1 | 1 |",
        "| by kill -9, training | 2 | 1 | 0 |",
        "| all | 3 | 2 | 1 |",
    ]


@pytest.mark.parametrize("content", [b"", b'{"doing": "trai', b"\xff"])
def test_a_child_that_is_ended_while_it_tells_has_told_nothing(content: bytes) -> None:
    watched = Watched()
    watched._memory[:] = content.ljust(4096, b"\0")
    assert watched.said() == {}


def test_what_differs_is_found_and_a_checkpoint_more_is_no_difference() -> None:
    whole = {f"{where}checkpoints/step-0000000{step}/ema": bytes([step]) for where in ("", "baseline/") for step in (6, 8)}
    whole["train.csv"] = b"rows"
    asked_to_stop = {
        path.replace("baseline/checkpoints/step-00000006", "baseline/checkpoints/step-00000007"): each for path, each in whole.items()
    }
    assert differing(whole, whole) == differing(asked_to_stop, whole) == []
    for path in ("train.csv", "checkpoints/step-00000008/ema", "baseline/checkpoints/step-00000008/ema"):
        assert differing({name: each for name, each in whole.items() if name != path}, whole) == [path]
        assert differing(whole | {path: b"other"}, whole) == [path]
    assert differing(whole | {"checkpoints/step-00000006/ema": b"other"}, whole) == ["checkpoints/step-00000006/ema"]
    assert differing(whole | {"val.csv": b""}, whole) == ["val.csv"]
