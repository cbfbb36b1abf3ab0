"""What takes a run down from outside: what the user is told, and that the run then goes on to the result it would have had."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import stillhouse as sh
from stillhouse import cli
from stillhouse.errors import UserError
from stillhouse.session import Session
from stillhouse.training.checkpoint import checkpoints, load_checkpoint
from stillhouse.training.failures import undisturbed
from stillhouse.training.loop import Loop
from tests.runs import STUDENT, assert_equal, data, distil, files, weights

EVERY_TWO = {"save_every": 2, "log_every": 2}
STATM = Path("/proc/self/statm")


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, what: Callable[[Loop], Any]) -> None:
    """`what` happens once, before the update of this step (from 0)."""
    update = Loop.update

    def updating(self: Loop, at: int, *batch: Tensor) -> None:
        if at == step:
            monkeypatch.setattr(Loop, "update", update)
            what(self)
        update(self, at, *batch)

    monkeypatch.setattr(Loop, "update", updating)


def goes_on(folder: Path, whole: sh.Run) -> None:
    again = sh.distill(out=str(folder), resume=True, workers=0)
    assert again.facts["status"] == "finished"
    assert_equal(weights(again.student), weights(whole.student))
    for name in ("train.csv", "val.csv"):
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_process_that_loads_images_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distil(tmp_path / "whole", **EVERY_TWO)

    def kill(loop: Loop) -> None:
        worker = loop.batches._loader._iterator._workers[0]  # type: ignore[union-attr]
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        loop.batches._loader._iterator._try_get_data(1.0)  # type: ignore[union-attr]  # sees it now, whatever was loaded ahead

    at_step(monkeypatch, 3, kill)
    with pytest.raises(UserError, match=r"a process that loads images was ended from outside after step 3 \(.*\).*--resume.*--workers"):
        distil(tmp_path / "run", **EVERY_TWO, workers=2)
    assert load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])[1]["step"] == 2
    goes_on(tmp_path / "run", whole)


def test_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distil(tmp_path / "whole", **EVERY_TWO)
    at_step(monkeypatch, 3, lambda loop: torch.empty(2**50, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"memory ran out after step 3 \(.*\): free some and go on with --resume, or .* --batch") as caught:
        distil(tmp_path / "run", **EVERY_TWO)
    assert "\n" not in str(caught.value)
    goes_on(tmp_path / "run", whole)


def test_memory_runs_out_before_and_after_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distil(tmp_path / "whole", **EVERY_TWO)
    for name, step in (("prepare", 0), ("finish", 6)):
        monkeypatch.setattr(Session, name, lambda *_: torch.empty(2**50, dtype=torch.uint8))
        with pytest.raises(UserError, match=rf"^memory ran out after step {step} \(.*\): .*--resume"):
            distil(tmp_path / name, **EVERY_TWO)
        monkeypatch.undo()
    assert not (tmp_path / "prepare").exists()
    goes_on(tmp_path / "finish", whole)


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="this system tells nobody that a child has ended")
def test_a_second_process_that_ends_does_not_disturb_what_is_told_of_the_first() -> None:
    def handler(*_: Any) -> None:
        raise RuntimeError("DataLoader worker is killed")

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with undisturbed():
            subprocess.run(["true"], check=True)
        assert signal.getsignal(signal.SIGCHLD) is handler
        with pytest.raises(RuntimeError, match="is killed"):
            subprocess.run(["true"], check=True)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_memory_limit_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """RLIMIT_AS, which `ulimit -v` and batch systems set: 16 MB are left, and a layer's activations take 36."""
    resource = pytest.importorskip("resource", reason="this system has no such limits")
    if not STATM.is_file():
        pytest.skip(f"how much the process has is not to be read here: there is no {STATM}")
    wide = {"student": f"{STUDENT},mlp_ratio=64.0", "data": "digits:train=1024", "batch": 512, "max_steps": 4}
    whole = distil(tmp_path / "whole", **EVERY_TWO, **wide)
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken: list[Tensor] = []

    def leave(more: int) -> None:
        has = int(STATM.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + more, before[1]))

    def limit(loop: Loop) -> None:
        leave(0)
        with suppress(RuntimeError):  # what the process has freed and not given back would hold the activations
            while True:
                taken.append(torch.empty(2**24, dtype=torch.uint8))
        leave(2**24)

    at_step(monkeypatch, 3, limit)
    try:
        assert cli.main(["distill", "--config", str(whole.folder / "settings.yaml"), "--out", str(tmp_path / "run")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        taken.clear()
    assert re.search(r"^stillhouse distill: memory ran out after step 3 \(.*\): .*--resume.* --batch .*\n\Z", capsys.readouterr().err, re.M)
    assert load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])[1]["step"] == 2
    goes_on(tmp_path / "run", whole)


@pytest.mark.skipif(not STATM.is_file(), reason="this system has no such limits")
def test_a_memory_limit_too_small_to_import_anything_is_one_sentence(tmp_path: Path) -> None:
    command = ["sh", "-c", 'ulimit -v 300000 && exec "$@"', "sh", sys.executable, "-m", "stillhouse", "distill", "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    assert re.fullmatch(r"stillhouse distill: memory ran out \(.*\): free some, or raise the limit, which `ulimit -v` shows\n", done.stderr)
    assert not (tmp_path / "run").exists()


def test_another_error_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of the code must not be told as if the machine had failed."""

    def mistake(loop: Loop) -> None:
        raise RuntimeError("shapes do not meet")

    at_step(monkeypatch, 3, mistake)
    with pytest.raises(RuntimeError, match=r"^shapes do not meet$"):
        distil(tmp_path / "run", **EVERY_TWO)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixty-four images of ten classes on the disk, as many to validate."""
    for part, samples in (("train", data().train), ("val", data().val)):
        for number in range(64):
            image, label = samples[number]
            folder = tmp_path / "data" / part / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy(), "L").save(folder / f"{number}.png")
    return tmp_path / "data"


def test_an_image_vanishes_or_is_cut_short_on_the_way(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and the run goes on when it is back. To leave it out from here on would be another run."""
    settings = {**EVERY_TWO, "data": f"imagefolder:{pictures}", "hflip": 0.0, "allow_weak_teacher": True, "max_steps": 8}
    whole = distil(tmp_path / "whole", "scratch", teacher=None, **settings)
    kept = tmp_path / "kept"
    shutil.copytree(pictures / "train", kept)

    def vanish(loop: Loop) -> None:
        for path in (pictures / "train").rglob("*.png"):
            path.unlink()

    def cut(loop: Loop) -> None:
        for path in (pictures / "train").rglob("*.png"):
            path.write_bytes(path.read_bytes()[:40])

    for number, what in enumerate((vanish, cut)):
        at_step(monkeypatch, 3, what)
        with pytest.raises(UserError, match=r"'.*/train/\d/\d+\.png' cannot be read \(.*\): repair or delete it"):
            distil(tmp_path / f"run-{number}", "scratch", teacher=None, **settings)
        monkeypatch.undo()
        shutil.copytree(kept, pictures / "train", dirs_exist_ok=True)
        goes_on(tmp_path / f"run-{number}", whole)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no disk of its own can be mounted here: it takes root, and a machine that allows it")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def mounted_again(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def test_a_disk_that_is_full(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever the space ends, it is one sentence; with more space the run goes on."""
    whole = distil(tmp_path / "whole", **EVERY_TWO)
    needed = sum(len(content) for content in files(whole.folder).values())
    told = []
    for share in (0.05, 0.3, 0.6, 0.9):
        mounted_again(disk, f"size={int(needed * share) // 4096 * 4}k")
        command = ["distill", "--config", str(whole.folder / "settings.yaml"), "--resume", "--out", str(disk / "run")]
        if cli.main(command) == 0:
            break
        told.append(capsys.readouterr().err)
        assert re.fullmatch(r"stillhouse distill: .*No space left on device.*--resume.*\n", told[-1]), told[-1]
    assert told
    mounted_again(disk, f"size={4 * needed // 4096 * 4}k")
    assert cli.main(command) == 0
    goes_on(disk / "run", whole)


def test_a_folder_that_cannot_be_written(disk: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mounted_again(disk, "ro")
    settings = distil(tmp_path / "whole", max_steps=1).folder / "settings.yaml"
    assert cli.main(["distill", "--config", str(settings), "--out", str(disk / "run")]) == 1
    assert re.fullmatch(r"stillhouse distill: .*run cannot be written \(.*Read-only file system.*\).*--out\n", capsys.readouterr().err)
    mounted_again(disk, "rw")


def test_sigterm_ends_the_command_with_143(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = distil(tmp_path / "whole", **EVERY_TWO).folder / "settings.yaml"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        at_step(monkeypatch, 3, lambda loop, number=number: signal.raise_signal(number))
        out = tmp_path / str(code)
        assert cli.main(["distill", "--config", str(settings), "--out", str(out)]) == code
        assert capsys.readouterr().err.endswith(f"interrupted after step 4; go on with: stillhouse distill --resume --out {out}\n")
        goes_on(out, sh.Run(tmp_path / "whole"))
