"""Checkpoints hold everything, in full, or are not there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from stillhouse.errors import UserError
from stillhouse.training import checkpoint
from stillhouse.training.checkpoint import checkpoints, load_checkpoint, load_optimizer_tensors, optimizer_tensors, save_checkpoint
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
    "no step": lambda path: (path / "state.json").write_text('{"files": {}}'),
    "a list of files": lambda path: (path / "state.json").write_text('{"step": 1, "files": [1, 2]}'),
    "a path that leads out": lambda path: (path / "state.json").write_text('{"step": 1, "files": {"../../../etc/passwd": ""}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_and_the_way_out_is_named(damage: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, PARTS, {})
    path = save_checkpoint(tmp_path, 2, PARTS, {})
    DAMAGES[damage](path)
    with pytest.raises(UserError, match=r"remove .*step-00000002 to go on from the one before") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert load_checkpoint(checkpoints(tmp_path)[0])[1]["step"] == 1


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


def test_a_late_column_leaves_earlier_rows_empty_there(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv")
    table.add({"step": 1, "ce": 0.5})
    table.add({"step": 2, "ce": 0.25, "critic": 3.0})
    table.add({"step": 3, "ce": 0.125})
    assert (tmp_path / "t.csv").read_text().split() == ["step,ce,critic", "1,0.5,", "2,0.25,3.0", "3,0.125,"]
    Table(tmp_path / "t.csv", 2).add({"step": 3, "ce": 1.0, "critic": 2.0})
    assert (tmp_path / "t.csv").read_text().split()[-1] == "3,1.0,2.0"
