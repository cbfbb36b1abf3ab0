"""Checkpoints hold everything, in full, or are not there."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from stillhouse.errors import UserError
from stillhouse.training import checkpoint
from stillhouse.training.checkpoint import (
    checkpoints,
    last_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from stillhouse.training.log import Table, read_table
from stillhouse.training.optim import UNFIT
from tests.runs import assert_equal, files

PARTS = {"a": {"x": torch.arange(6.0).view(2, 3).T, "y": torch.tensor(3)}, "b": {}}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))


def step(learner: nn.Module, optimizer: Any, number: int) -> None:
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
    learner(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_every_optimiser_goes_on_exactly() -> None:
    tried = 0
    for name in list_optimizers():
        if name.startswith((*UNFIT, "fused", "bnb")):  # the latter two need a CUDA device
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, second = network(), network()
            optimizer, other = (create_optimizer_v2(each, opt=name, lr=1e-2) for each in (first, second))
            for number in range(3):
                step(first, optimizer, number)
            second.load_state_dict(first.state_dict())
            load_optimizer_tensors(other, {key: value.clone() for key, value in optimizer_tensors(optimizer).items()})
            for learner, its in ((first, optimizer), (second, other)):
                step(learner, its, 3)
                step(learner, its, 4)
        for key, value in first.state_dict().items():
            assert torch.equal(second.state_dict()[key], value), name
        tried += 1
    assert tried > 30


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, PARTS, {"facts": {"method": "kd"}})
    parts, facts = load_checkpoint(path)
    assert parts.keys() == PARTS.keys()
    for name, tensors in PARTS.items():
        assert_equal(parts[name], tensors)
    assert (facts["step"], facts["facts"]) == (7, {"method": "kd"})
    assert not [path for path in tmp_path.rglob("*") if path.suffix not in (".safetensors", ".json", "")]


def test_the_last_two_are_kept_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for number in (1, 2, 10, 100_000_000 - 1):
        save_checkpoint(tmp_path, number, PARTS, {})
    assert [load_checkpoint(path)[1]["step"] for path in checkpoints(tmp_path)] == [10, 99_999_999]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), checkpoint.SafetensorError("I/O error: no space left")])
def test_a_full_disk_costs_nothing_that_was_there(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, PARTS, {})
    before, count = files(tmp_path), []

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        count.append(path)
        if len(count) == 2:
            raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step 2 could not be written.*[Nn]o space left.*--resume"):
        save_checkpoint(tmp_path, 2, PARTS, {})
    assert files(tmp_path) == before


def _cut(path: Path) -> None:
    (path / "a.safetensors").write_bytes((path / "a.safetensors").read_bytes()[:-3])


def _lie(path: Path, to: bytes) -> None:
    """A file whose sum is right and whose header lies."""
    (path / "a.safetensors").write_bytes(to)
    state = json.loads((path / "state.json").read_text())
    state["files"]["a.safetensors"] = checkpoint._sha256(path / "a.safetensors")
    state["sum"] = checkpoint._sum({name: value for name, value in state.items() if name != "sum"})
    (path / "state.json").write_text(json.dumps(state))


HEADER = json.dumps({"x": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4_000_000]}}).encode()
DAMAGES = {
    "cut": _cut,
    "missing": lambda path: (path / "a.safetensors").unlink(),
    "other bytes": lambda path: (path / "a.safetensors").write_bytes(b"\x80\x04cos\nsystem\n"),
    "a huge header": lambda path: _lie(path, b"\xff" * 7 + b"\x7f" + b"{}"),
    "lengths that are not there": lambda path: _lie(path, len(HEADER).to_bytes(8, "little") + HEADER),
    "no JSON": lambda path: (path / "state.json").write_text('{"step": 1, "files'),
    "other JSON": lambda path: (path / "state.json").write_text("[1, 2]"),
    "no text": lambda path: (path / "state.json").write_bytes(b"\xff\xfe\x00"),
    "another step": lambda path: (path / "state.json").write_text((path / "state.json").read_text().replace('"step": ', '"step": 3')),
    "no step": lambda path: (path / "state.json").write_text('{"files": {}}'),
    "a list of files": lambda path: (path / "state.json").write_text('{"step": 1, "files": [1, 2]}'),
    "a path that leads out": lambda path: (path / "state.json").write_text('{"step": 1, "files": {"../../../etc/passwd": ""}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_and_the_checkpoint_before_is_taken(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(tmp_path, 1, PARTS, {})
    path = save_checkpoint(tmp_path, 2, PARTS, {})
    DAMAGES[damage](path)
    with pytest.raises(UserError, match=r"step-00000002.* is (damaged|not a whole checkpoint)") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    taken = last_checkpoint(tmp_path)
    assert taken is not None
    assert (taken[0].name, taken[2]["step"]) == ("step-00000001", 1)
    assert [record.message for record in caplog.records] == [f"{caught.value}; going on from the checkpoint before it"]
    DAMAGES[damage](taken[0])
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: begin the run again"):
        last_checkpoint(tmp_path)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_so_many_are_kept(keep: int, tmp_path: Path) -> None:
    for number in range(1, 7):
        save_checkpoint(tmp_path, number, PARTS, {}, keep)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{number:08d}" for number in range(7 - keep, 7)]


class Killed(BaseException):
    """As kill -9: nothing catches it, nothing is tidied up."""


CALLS = [(os, "fsync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"), (checkpoint, "save_file"), (os, "unlink"), (os, "rmdir")]


def killed_at(call: int, after: bool, work: Any) -> bool:
    """Whether `work` was ended just before or after its `call`-th call that touches the disk."""
    seen = [0]

    def counted(original: Any) -> Any:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            seen[0] += 1
            if seen[0] == call and not after:
                raise Killed
            result = original(*arguments, **named)
            if seen[0] == call and after:
                raise Killed
            return result

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_wherever_a_write_is_killed_a_whole_checkpoint_is_there(keep: int, after: bool, tmp_path: Path) -> None:
    """Of the step that was to be written or of the last one before; and the same step written again does not take away the old one."""
    call, ended = 0, True
    while ended:
        call += 1
        folder = tmp_path / str(call)
        save_checkpoint(folder, 1, PARTS, {}, keep)
        save_checkpoint(folder, 2, PARTS, {}, keep)
        for step in (3, 3, 4):
            ended = killed_at(call, after, lambda folder=folder, step=step: save_checkpoint(folder, step, PARTS, {}, keep))
            found = last_checkpoint(folder)
            assert found is not None
            assert found[2]["step"] in ((step,) if step == 3 and not ended else (step - 1, step))
            assert_equal(found[1]["a"], PARTS["a"])
            save_checkpoint(folder, step, PARTS, {}, keep)
            assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
            assert [path.name for path in checkpoints(folder)][-1] == f"step-{step:08d}"
            assert len(checkpoints(folder)) == keep
    assert call > 10


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / ".step-00000002").mkdir()
    assert checkpoints(tmp_path) == []


def test_a_table_forgets_what_lies_behind_its_step(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv")
    for number in range(1, 5):
        table.add({"step": number, "loss": 1 / 3})
    text = (tmp_path / "t.csv").read_bytes()
    Table(tmp_path / "t.csv", 4)
    assert (tmp_path / "t.csv").read_bytes() == text
    Table(tmp_path / "t.csv", 9, writable=False)
    Table(tmp_path / "t.csv", 2)
    assert [row["step"] for row in read_table(tmp_path / "t.csv")] == ["1", "2"]
    assert float(read_table(tmp_path / "t.csv")[0]["loss"]) == 1 / 3
    Table(tmp_path / "t.csv", 0)
    assert read_table(tmp_path / "t.csv") == []


def test_a_line_that_was_cut_short_is_no_row(tmp_path: Path) -> None:
    """`12` of `123`, say, would be taken for an earlier step."""
    path = tmp_path / "t.csv"
    table = Table(path)
    for number in (11, 12, 123):
        table.add({"step": number, "loss": 0.5})
    whole = path.read_bytes()
    last = whole.rindex(b"123,")
    for end in range(last, len(whole) - 1):
        path.write_bytes(whole[:end])
        Table(path, 122)
        assert path.read_bytes() == whole[:last]
        Table(path, 122).add({"step": 123, "loss": 0.5})
        assert path.read_bytes() == whole


def test_a_late_column_leaves_earlier_rows_empty_there(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv")
    table.add({"step": 1, "ce": 0.5})
    table.add({"step": 2, "ce": 0.25, "critic": 3.0})
    table.add({"step": 3, "ce": 0.125})
    assert (tmp_path / "t.csv").read_text().split() == ["step,ce,critic", "1,0.5,", "2,0.25,3.0", "3,0.125,"]
    Table(tmp_path / "t.csv", 2).add({"step": 3, "ce": 1.0, "critic": 2.0})
    assert (tmp_path / "t.csv").read_text().split()[-1] == "3,1.0,2.0"
