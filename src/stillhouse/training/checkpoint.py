"""Checkpoints: safetensors and JSON, never a pickle; written beside, flushed, and renamed, so that a killed write costs nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.run_folder import flush

LOG = logging.getLogger("stillhouse")
KEPT = 2
"""How many checkpoints a run keeps by default: the last, and the one before in case the last is damaged."""


def save_checkpoint(folder: Path, step: int, parts: dict[str, dict[str, Tensor]], facts: dict[str, Any], keep: int = KEPT) -> Path:
    """Writes `parts` (a safetensors file each) and `facts` as FOLDER/step-00000123, and removes all but the last `keep` ones.

    Whenever the machine stops, the checkpoints that were whole are whole, but for those that were to go anyway.

    Args:
        folder: the run's `checkpoints` folder.
        step: how many updates are done.
        parts: tensors by file name.
        facts: what must hold for a resume (method, hashes, settings), as JSON.
        keep: at least 1.

    Raises:
        UserError: if the disk is full or the folder cannot be written; what was there before stays.
    """
    target, beside = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
    before = target.with_suffix(REPLACED)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):  # by a process that was killed
            shutil.rmtree(left)
        if target.exists() and before.exists():
            _remove(before)
        beside.mkdir()
        for name, tensors in parts.items():
            save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, beside / f"{name}.safetensors")
        state = {"step": step, "files": {path.name: _sha256(path) for path in sorted(beside.iterdir())}, **facts}
        (beside / "state.json").write_text(json.dumps({"sum": _sum(state), **state}, indent=1))
        for path in [*beside.iterdir(), beside]:
            flush(path)
        if target.exists():
            target.rename(before)
        beside.rename(target)
        flush(folder)
        if before.exists():
            _remove(before)
        for old in checkpoints(folder)[:-keep]:
            _remove(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder}: {error}; free space there, then go on with --resume"
        ) from error
    return target


REPLACED = ".old"
"""Ends the name of a checkpoint while another one takes its place."""


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a run's folder, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / "state.json").is_file()]
    return sorted(found, key=lambda path: (path.stem, path.suffix != REPLACED))


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The parts and facts of a checkpoint, every file checked against its sum.

    Raises:
        UserError: if a file is missing, damaged, or no safetensors file.
    """
    try:
        facts = json.loads((path / "state.json").read_text())
        damaged = ["state.json"] if facts.pop("sum") != _sum(facts) else []
        files, facts["step"] = dict(facts["files"]), int(facts["step"])
        damaged += [name for name, digest in files.items() if _sha256(path / Path(name).name) != digest]
        parts = {Path(name).stem: load_file(path / Path(name).name) for name in files if not damaged}
    except (OSError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path} is not a whole checkpoint ({error})") from error
    if damaged:
        raise UserError(f"{path / damaged[0]} is damaged: its contents are not what was written")
    return parts, facts


def last_checkpoint(folder: Path) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The last checkpoint that is whole, with its parts and facts; None where there is none yet. A damaged one is named in a warning.

    Raises:
        UserError: if all are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return path, *load_checkpoint(path)
        except UserError as error:
            LOG.warning("%s; going on from the checkpoint before it", error)
    if found:
        raise UserError(f"no checkpoint in {folder} is whole: begin the run again with --overwrite, or another one with --out")
    return None


def optimizer_tensors(optimizer: Any) -> dict[str, Tensor]:
    """An optimiser's state as tensors, `{"tensor.state.3.exp_avg": …}`, with the numbers some count in, `{"number.group.0.k": …}`."""
    found = optimizer.state_dict()
    slots = [("group", *each) for each in enumerate(found["param_groups"])] + [("state", *each) for each in found["state"].items()]
    tensors = {}
    for where, index, values in slots:
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"tensor.{where}.{index}.{name}"] = value
            elif type(value) in (int, float):
                tensors[f"number.{where}.{index}.{name}"] = torch.tensor(value, dtype=torch.int64 if type(value) is int else torch.float64)
    return tensors


def load_optimizer_tensors(optimizer: Any, tensors: dict[str, Tensor]) -> None:
    """Puts `optimizer_tensors` back."""
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        kind, where, index, name = key.split(".", 3)
        slots = groups[int(index)] if where == "group" else state.setdefault(int(index), {})
        slots[name] = value if kind == "tensor" else value.item()
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, slots in optimizer.state.items():  # a fused update reads memory in order, so moments must lie as their parameter does
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
        )


def _sum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _remove(path: Path) -> None:
    """A kill in the middle of it leaves what the next write removes, and nothing that looks like a checkpoint."""
    gone = path.with_name(f".{path.name}")
    path.rename(gone)
    shutil.rmtree(gone)
