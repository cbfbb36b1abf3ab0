"""The kernel's own killer: a run in a memory cgroup whose limit is lowered while it trains loses a process, and nothing else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import stillhouse as sh
from stillhouse.run_folder import status
from stillhouse.training.checkpoint import checkpoints, load_checkpoint
from tests.runs import distil
from tests.test_taken_up import learnt

EVERY_TWO: dict[str, Any] = {"save_every": 2, "log_every": 2, "data": "digits:train=256", "max_steps": 6}
WORK = """
import os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from stillhouse import cli
from stillhouse.data.loading import _Batches
from stillhouse.training.loop import Loop

who, used, limit, grows, *runs = sys.argv[1:]
update, read = Loop.update, _Batches.__getitem__

def grow():
    held = []
    while True:
        held.append(b"x" * 2**24)

def updating(self, step, *batch):
    if self.folder.name == "run" and step == 3 and os.environ.get("RANK") in (None, "1") and not Path(grows).exists():
        Path(limit).write_text(str(int(Path(used).read_text()) + 2**30))
        Path(grows).touch()
        if who == "training":
            grow()
    update(self, step, *batch)

def reading(self, place):
    loader = torch.utils.data.get_worker_info()
    if who == "loader" and loader and loader.id == 0 and Path(grows).exists():
        grow()
    return read(self, place)

Loop.update, _Batches.__getitem__ = updating, reading
command = ["distill", "--resume", "--config", runs[0], "--workers", "2" if who == "loader" else "0"]
sys.exit(max(cli.main([*command, "--out", out]) for out in runs[1:]))
"""


@dataclass(frozen=True)
class Group:
    """A memory cgroup, of version 1 or 2."""

    folder: Path
    limit: str
    used: str
    swap: str
    events: str

    def run(self, who: str, settings: Path, *runs: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """The command in this group, so that all its memory is counted from its beginning."""
        work, grows = (runs[0].parent / name for name in ("work.py", "grows"))
        work.write_text(WORK)
        joined = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs")]
        files = [self.folder / self.used, self.folder / self.limit, grows, settings, *runs]
        there = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command = [*joined, sys.executable, *launcher, str(work), who, *map(str, files)]
        return subprocess.run(command, capture_output=True, text=True, env=there, timeout=600)

    def killed(self) -> int:
        """How many processes of it the kernel has killed for their memory."""
        return int(re.search(r"^oom_kill (\d+)$", (self.folder / self.events).read_text(), re.MULTILINE)[1])  # type: ignore[index]


@pytest.fixture
def group() -> Iterator[Group]:
    root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "memory.swap.max", "memory.events")
    if (root / "memory" / "memory.limit_in_bytes").is_file():
        root /= "memory"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.swappiness", "memory.oom_control")
    group = Group(root / f"stillhouse-{os.getpid()}", *names)
    try:
        group.folder.mkdir()
        (group.folder / group.swap).write_text("0")
        group.killed()
    except (OSError, TypeError) as error:
        if group.folder.is_dir():
            group.folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here, which takes root and a machine that allows it: {error}")
    yield group
    group.folder.rmdir()


def goes_on(folder: Path, whole: sh.Run) -> None:
    """Nothing that was written is lost, and the end is that of a run that nobody killed, to the bit."""
    assert load_checkpoint(checkpoints(folder / "checkpoints")[-1])[1]["step"] == 2
    sh.distill(out=str(folder), resume=True)
    assert status(folder) == "finished"
    assert learnt(folder) == learnt(whole.folder)


def test_the_training_is_killed(group: Group, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It can say nothing; the next command does."""
    whole = distil(tmp_path / "whole", **EVERY_TWO)
    done = group.run("training", whole.folder / "settings.yaml", tmp_path / "run")
    assert (done.returncode, group.killed()) == (-signal.SIGKILL, 1), done.stderr
    assert status(tmp_path / "run") == "running"
    caplog.clear()
    goes_on(tmp_path / "run", whole)
    assert "this run was killed, most often because memory ran out, or its machine stopped; it goes on after step 2" in caplog.messages


def test_a_process_that_loads_images_is_killed(group: Group, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = distil(tmp_path / "whole", **EVERY_TWO | {"max_steps": 14})
    done = group.run("loader", whole.folder / "settings.yaml", tmp_path / "run")
    assert (done.returncode, group.killed()) == (1, 1), done.stderr
    sentence = r"^stillhouse distill: a process that loads images was ended from outside after step \d \(.*\): most often memory ran out"
    assert re.search(rf"{sentence}.*--resume.*--workers.*\n\Z", done.stderr, re.MULTILINE), done.stderr
    assert status(tmp_path / "run") == "failed"
    caplog.clear()
    sh.distill(out=str(tmp_path / "run"), resume=True, workers=0)
    assert learnt(tmp_path / "run") == learnt(whole.folder)
    assert "killed" not in caplog.text, "it has been told already"


def test_one_of_two_processes_is_killed(group: Group, tmp_path: Path) -> None:
    """torchrun starts both again under the same limit."""
    settings = distil(tmp_path / "one", **EVERY_TWO).folder / "settings.yaml"
    launcher = ("-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts=1")
    done = group.run("training", settings, tmp_path / "whole", tmp_path / "run", launcher=launcher)
    assert (done.returncode, group.killed()) == (0, 1), done.stderr
    assert status(tmp_path / "run") == "finished"
    assert learnt(tmp_path / "run") == learnt(tmp_path / "whole")
    assert done.stderr.count("this run was killed, most often because memory ran out") == 1, "process 0 says it"
