"""Two processes: one is killed, one is told to stop, one hangs; and a run goes on with another number of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import stillhouse as sh
from stillhouse.training.log import read_table
from tests.runs import DATA, RECIPE, STUDENT, files, teacher

WORK = """
import json, os, signal, sys, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import stillhouse as sh
from stillhouse.training import processes
from stillhouse.training.loop import Loop

update, rank, first = Loop.update, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
processes.HOURGLASS = 3.0

def ended(self, step, *batch):
    update(self, step, *batch)
    if rank == "1" and step == 6:
        if "killed" in str(self.folder) and first:
            os.kill(os.getpid(), signal.SIGKILL)
        if "told" in str(self.folder):
            signal.raise_signal(signal.SIGTERM)
        if "hangs" in str(self.folder):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(600)

Loop.update = ended
for name, job in json.loads(sys.argv[1]):
    try:
        sh.distill(out=name, resume=True, **job)
    except sh.Interrupted as error:
        os.write(1, f"{rank}: {error}, {error.signal}\\n".encode())  # torchrun's Python would write the line's end for itself
    except sh.UserError as error:
        sys.exit(f"{rank}: {error}")
"""


def job(**more: Any) -> dict[str, Any]:
    recipe = RECIPE | {"optimizer": "sgd", "lr": 0.05, "log_every": 2, "save_every": 5, "by": "random", "mixup": 0.8, "ema": 0.5}
    return {"method": "masked_kd", "teacher": teacher(), "student": STUDENT, "data": DATA, **recipe, **more}


def launched(folder: Path, names: list[str], restarts: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    (folder / "work.py").write_text(WORK)
    jobs = json.dumps([(str(folder / name), job(**more)) for name in names])
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [f"--max-restarts={restarts}", str(folder / "work.py"), jobs]
    there = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=there, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three runs: nothing ends one, of one a process is killed and all are started again, one is told to stop and left so."""
    folder = tmp_path_factory.mktemp("processes")
    done = launched(folder, ["whole", "killed", "told"], restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "said").write_text(done.stdout)
    return folder


def learnt(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if re.search(r"(train|val)\.csv$|student/.*safetensors$", name)}


def test_a_process_is_killed_and_torchrun_starts_all_again(folder: Path) -> None:
    assert learnt(folder / "killed") == learnt(folder / "whole")
    assert sh.Run(folder / "killed").facts["status"] == "finished"


def test_a_signal_to_one_stops_all_and_another_number_goes_on(folder: Path) -> None:
    """The samples, their augmentation, what is mixed and the random masks are the same for one process as for two."""
    said = sorted((folder / "said").read_text().splitlines())
    step = 8  # the next row of the log after step 7, where they wait for each other
    remedy = f"go on with: stillhouse distill --resume --out {folder / 'told'}"
    assert said == [f"{rank}: interrupted after step {step}; {remedy}, 15" for rank in range(2)]
    again = sh.distill(out=str(folder / "told"), resume=True)
    for table in ("train.csv", "val.csv"):
        ours, theirs = read_table(again.folder / table), read_table(folder / "whole" / table)
        assert len(ours) == len(theirs)
        for one, two in zip(ours, theirs, strict=True):
            assert {k: float(v) for k, v in one.items()} == pytest.approx({k: float(v) for k, v in two.items()}, rel=2e-5, abs=2e-5)


def test_a_process_that_hangs_is_named(tmp_path: Path) -> None:
    done = launched(tmp_path, ["hangs"], timeout=20.0)
    assert done.returncode != 0
    sentence = r"^0: process 0 waited after step \d+ for process 1 of 2, which is gone or does not answer \(.*\): look there first"
    assert re.search(sentence, done.stderr, re.MULTILINE), done.stderr[-3000:]
    assert sh.Run(tmp_path / "hangs").facts["status"] == "failed"
