"""A folder of answers: a manifest that says whose they are and about what, and shards that are there whole or not at all.

    DIR/manifest.json
    DIR/view-0/<sha256 of its content>.safetensors, …    about the training images, augmented as in epoch 0
    DIR/val/<sha256 of its content>.safetensors, …       about the validation images

A shard's name is its checksum. It is written beside, flushed and renamed, so a process that is killed loses only what it had not written
yet, and any number of processes and runs may read and write one folder: nobody ever changes a file. A damaged one is removed, and what it
held is asked again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.run_folder import whole_file, writing

LOG = logging.getLogger("stillhouse")
SHARD = 64 * 2**20
"""Bytes that are held in memory before they are written."""


class Answers:
    """What a teacher said about some images, in a folder that may have been begun by another run.

    Args:
        folder: where; made when the first shard is written.
        facts: all that the answers follow from, as JSON has it. It must be what the folder's manifest says, if it has one.

    Raises:
        UserError: if the folder holds answers that follow from something else, naming what differs, or something that is no answers.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, json.loads(json.dumps(facts))
        self.parts: dict[str, Part] = {}
        path = folder / "manifest.json"
        try:
            known = json.loads(path.read_text()) if path.is_file() else None
            if not isinstance(known, dict | None):
                raise ValueError(f"it holds a {type(known).__name__}")
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({error}); name another folder with --teacher-cache, or remove {folder}") from error
        # a manifest that was never finished is none
        others = (each for each in folder.glob("*") if not each.name.startswith(".manifest.json."))
        if known is None and (folder.is_file() or any(others)):
            raise UserError(f"{folder} holds something else than a teacher's answers; name another folder with --teacher-cache")
        if known is not None and known != self.facts:
            raise UserError(f"the answers in {folder} {_differing(known, self.facts)}; name another folder, or --teacher-cache auto")

    def part(self, name: str, count: int) -> Part:
        """The answers about the images of one view, of which there are `count`, with all that other processes have written by now."""
        if name not in self.parts:
            self.parts[name] = Part(self.folder / name, count, self)
        self.parts[name].refresh()
        return self.parts[name]

    def write_manifest(self) -> None:
        """Says in the folder whose answers these are, once."""
        if not (self.folder / "manifest.json").is_file():
            _write_whole(self.folder / "manifest.json", json.dumps(self.facts, indent=1).encode())

    @property
    def bytes(self) -> int:
        """The size on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))


class Part:
    """The answers about the images of one view: numbers by sample id, read where they lie on disk.

    Args:
        folder: where its shards are.
        count: how many images there are; ids are below.
        whole: the answers it is a part of; None for one that only lives in memory.

    Attributes:
        about: what was asked and answered, {"inputs": shapes, "answers": {name: [dtype, shape]}}, without the batch's axis.
        errors: of each answer the greatest and the summed error of keeping it, and how many numbers that is.
    """

    def __init__(self, folder: Path, count: int, whole: Answers | None = None) -> None:
        self.folder, self.whole = folder, whole
        self.about: dict[str, Any] = {}
        self.errors: dict[str, tuple[float, float, int]] = {}
        self._where = torch.full((count, 2), -1, dtype=torch.int32)  # shard and row of each sample
        self._shards: list[dict[str, Tensor]] = []
        self._known: set[str] = set()
        self._pending: list[int] = []
        self._pending_errors: dict[str, tuple[Tensor, int]] = {}

    def missing(self, ids: Tensor) -> Tensor:
        """The places among `ids` [B] that nothing is known of."""
        return (self._where[ids, 0] < 0).nonzero().squeeze(1)

    def read(self, ids: Tensor) -> dict[str, Tensor]:
        """The numbers of these samples [B, …], on the CPU, from where a GPU can fetch them."""
        shards, rows = self._where[ids].unbind(1)
        found: dict[str, Tensor] = {}
        for number in shards.unique().tolist():
            places = (shards == number).nonzero().squeeze(1)
            for name, kept in self._shards[number].items():
                if name not in found:
                    found[name] = torch.empty(len(ids), *kept.shape[1:], dtype=kept.dtype, pin_memory=torch.cuda.is_available())
                found[name][places] = kept[rows[places].to(kept.device)].cpu()
        return found

    def add(self, ids: Tensor, numbers: dict[str, Tensor], errors: dict[str, tuple[Tensor, int]]) -> None:
        """Holds numbers [B, …] of new samples until there are enough for a shard; where they are computed, so that nothing waits for them.

        Args:
            errors: of each answer [greatest, sum] of the error of keeping it, and how many numbers that is.
        """
        self._pending.append(len(self._shards))
        for name, (found, number) in errors.items():
            before, count = self._pending_errors.get(name, (torch.zeros_like(found), 0))
            self._pending_errors[name] = torch.stack([torch.maximum(before[0], found[0]), before[1] + found[1]]), count + number
        self._index({"id": ids.int().to(next(iter(numbers.values())).device), **numbers}, ids)
        if self.held >= SHARD:
            self.flush()

    @property
    def held(self) -> int:
        """Bytes that are in memory only."""
        return sum(tensor.numel() * tensor.element_size() for number in self._pending for tensor in self._shards[number].values())

    def flush(self) -> None:
        """Writes what is held as a shard.

        Raises:
            UserError: if it cannot be written, or a number is too large for how it is kept.
        """
        if not self._pending or self.whole is None:
            return
        batches = [self._shards[number] for number in self._pending]
        numbers = {name: torch.cat([batch[name] for batch in batches]).cpu().contiguous() for name in batches[0]}
        errors = self.check()
        told = json.dumps({"about": self.about, "errors": errors})  # one entry: of several the order would be by chance, and so the name
        content = save(numbers, metadata={"told": told})
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        self.whole.write_manifest()
        _write_whole(path, content)
        for number in self._pending:
            self._shards[number] = {}
        self._pending, self._pending_errors = [], {}
        self._take_in(path)

    def check(self) -> dict[str, tuple[float, float, int]]:
        """The errors of what is held.

        Raises:
            UserError: if a number is too large for how it is kept.
        """
        errors = {name: (*found.tolist(), count) for name, (found, count) in self._pending_errors.items()}
        for name, (_, total, _) in errors.items():
            if not total < float("inf"):
                raise UserError(
                    f"the teacher's answers of '{name}' are not finite or too large for how they are kept; use --cache-storage bf16 or fp32"
                )
        return errors

    def refresh(self) -> None:
        """Takes in the shards that were not seen yet; warns of damaged ones and removes them."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.stem in self._known:
                continue
            try:
                whole = hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
            except FileNotFoundError:  # another process found it damaged
                continue
            if whole:
                self._take_in(path)
            else:
                LOG.warning("%s is damaged: it is removed, and the teacher asked again", path)
                path.unlink(missing_ok=True)

    def _take_in(self, path: Path) -> None:
        self._known.add(path.stem)
        try:
            with safe_open(path, framework="pt") as file:  # tensors that lie in the file until they are touched
                told, numbers = json.loads(file.metadata()["told"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            about, errors = told["about"], _summed([self.errors, told["errors"]])
            ids = numbers["id"].long()
            known = next(filter(None, self._shards), numbers)  # what was held before it was written left an empty place
            kinds = [{name: (each.dtype, each.shape[1:]) for name, each in shard.items()} for shard in (numbers, known)]
            alike = {len(each) for each in numbers.values()} == {ids.numel()} and kinds[0] == kinds[1] and isinstance(about, dict)
            if not alike or not len(ids) or not 0 <= int(ids.min()) <= int(ids.max()) < len(self._where):
                raise ValueError("its parts do not fit together, or it is about other images")
        except (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, SafetensorError) as error:
            raise UserError(f"{path} holds no answers of a teacher ({error}): remove it") from error
        self.about, self.errors = about, errors
        self._index(numbers, ids)

    def _index(self, numbers: dict[str, Tensor], ids: Tensor) -> None:
        self._where[ids, 0] = len(self._shards)
        self._where[ids, 1] = torch.arange(len(ids), dtype=torch.int32)
        self._shards.append(numbers)


def _summed(errors: list[dict[str, Any]]) -> dict[str, tuple[float, float, int]]:
    """Errors of several batches or shards as those of one."""
    names = dict.fromkeys(name for each in errors for name in each)
    of = {name: list(zip(*(each[name] for each in errors if name in each), strict=True)) for name in names}
    return {name: (max(greatest), sum(total), sum(count)) for name, (greatest, total, count) in of.items()}


def _differing(known: dict[str, Any], now: dict[str, Any]) -> str:
    """What two manifests do not share, in words."""
    names = [name for name in dict.fromkeys([*known, *now]) if known.get(name) != now.get(name)]
    return "have another " + ", ".join(f"{name.replace('_', ' ')} ({known.get(name)}, now {now.get(name)})" for name in names)


def _write_whole(path: Path, content: bytes) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, shared=True) as beside:
        beside.write_bytes(content)
