"""What cannot work is answered with one sentence, before any work is spent, and nothing is written or removed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import stillhouse as sh
from stillhouse import cli, run_folder
from stillhouse.errors import UserError
from stillhouse.interrupted import Interrupted
from stillhouse.models.saving import save_student
from stillhouse.run_folder import read_facts
from stillhouse.training import checkpoint
from stillhouse.training.checkpoint import checkpoints, load_checkpoint
from stillhouse.training.log import Diverged, read_table
from stillhouse.training.loop import Loop
from tests.runs import DATA, STUDENT, TEACHER, data, distil, files, interrupt, network, teacher

SMALL = {"batch": "16", "max-steps": "2", "trackers": "none"}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    teacher()  # trained before a test gets in the way of training
    monkeypatch.setattr(cli, "_show_log", lambda *_: None)
    monkeypatch.chdir(tmp_path)


def words(**flags: str) -> list[str]:
    named = {"teacher": teacher(), "student": STUDENT, "data": DATA, "out": "out", **SMALL}
    named |= {name.replace("_", "-"): value for name, value in flags.items()}
    return [
        "distill",
        *(word for name, value in named.items() if value is not None for word in ((f"--{name}", value) if value else (f"--{name}",))),
    ]


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, exit code 1, and everything below the folder as it was."""
    before = files(Path.cwd())
    code, said = cli.main(arguments), capsys.readouterr()
    assert code == 1, said.err
    assert said.err.startswith("stillhouse distill: ")
    assert said.err.count("\n") == 1, said.err
    assert re.search(message, said.err), said.err
    assert files(Path.cwd()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep": "0"}, "keep"),
        ({"keep": "1.5"}, "keep"),
        ({"keep": "-1"}, "keep"),
        ({"keep": "nan"}, "keep"),
        ({"keep": "0.01"}, "keep"),
        ({"keep": "17"}, "keep"),
        ({"keep": "0.5:0.5"}, "first at 0"),
        ({"temperature": "0"}, "temperature is 0"),
        ({"temperature": "-2"}, "temperature is -2"),
        ({"temperature": "nan"}, "temperature.*nan"),
        ({"temperature": ".inf"}, "temperature is inf"),
        ({"alpha": "2"}, "alpha is 2"),
        ({"by": "nobody"}, "by"),
        ({"targets": "medium"}, "targets"),
        ({"epochs": "-1"}, "epochs is -1, expected a whole number of at least 1"),
        ({"epochs": "0"}, "epochs is 0"),
        ({"batch": "0"}, "batch is 0"),
        ({"batch": "65"}, "64 images, fewer than a batch of 65"),
        ({"batch": "15", "mixup": "0.8"}, "batch of 15 does not divide"),
        ({"accumulate": "3"}, "accumulate=3"),
        ({"lr": "0"}, "lr is 0"),
        ({"lr": "nan"}, "lr.*nan"),
        ({"smoothing": "1"}, "smoothing is 1"),
        ({"ema": "1"}, "ema is 1"),
        ({"layer_decay": "0"}, "layer_decay is 0"),
        ({"warmup_epochs": "-1"}, "warmup_epochs is -1"),
        ({"workers": "-1"}, "workers is -1"),
        ({"hflip": "2"}, "hflip is 2"),
        ({"optimizer": "adamv"}, r"no optimizer 'adamv', did you mean 'adam\w*'\?"),
        ({"optimizer": "kron"}, "no optimizer 'kron'"),
        ({"trackers": "tensorbord"}, r"no tracker 'tensorbord', did you mean 'tensorboard'\?"),
        ({"trackers": "comet_ml"}, "comet_ml is not installed"),
        ({"method": "masked_k"}, r"no method 'masked_k', did you mean 'masked_kd'\?"),
        ({"student": "timm/vit_tiny_patch16_22"}, r"did you mean"),
        ({"student": "tim/vit_tiny_patch16_224"}, r"tim"),
        ({"teacher": "nowhere"}, "nowhere"),
        ({"teacher": None}, "needs a teacher: name it with --teacher"),
        ({"student": None}, "name the student with --student"),
        ({"data": None}, "name the data with --data"),
        ({"data": "digitz"}, r"did you mean 'digits'\?"),
        ({"data": "digits:train=9999"}, "train"),
        ({"data": "imagefolder:missing"}, "missing"),
        ({"data": "imagefolder:empty"}, "empty"),
        ({"data": "imagefolder:hollow"}, "cat"),
        ({"data": "imagefolder:broken"}, "broken|cannot be read|unreadable"),
        ({"teacher_weights": "code.pt"}, "wants to run code"),
        ({"teacher_weights": "lies.safetensors"}, "damaged"),
        ({"teacher_weights": "none.safetensors"}, "none.safetensors"),
        ({"teacher_weights": "other.safetensors"}, "do not fit"),
        ({"teacher": "five"}, "5"),
        ({"config": "unknown.yaml"}, "nonsense"),
        ({"config": "tags.yaml"}, "tags.yaml|python/object"),
        ({"config": "class.yaml"}, "class_path|keep"),
        ({"config": "list.yaml"}, "list.yaml|config"),
        ({"config": "missing.yaml"}, "missing.yaml"),
        ({"out": "full"}, "full already holds something; go on with it with --resume"),
        ({"out": "full", "overwrite": ""}, "full is no run folder"),
        ({"out": "full", "resume": ""}, "no run to resume in full"),
        ({"out": "file"}, "file is a file"),
        ({"out": "file/below"}, "file/below cannot be written"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_one_sentence_and_nothing_written(flags: dict[str, str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _surroundings(tmp_path)
    refused(words(**flags), message, capsys)
    assert not (tmp_path / "ran").exists()


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def _surroundings(here: Path) -> None:
    """Folders and files that cannot work."""
    for folder in ("empty", "full", "hollow/cat", "hollow/dog", "broken/cat", "broken/dog"):
        (here / folder).mkdir(parents=True)
    (here / "full" / "thesis.txt").write_text("years of work")
    (here / "file").write_text("")
    Image.new("L", (8, 8)).save(here / "hollow" / "dog" / "1.png")
    for name in ("cat", "dog"):
        (here / "broken" / name / "1.png").write_bytes(b"no picture")
    (here / "code.pt").write_bytes(pickle.dumps({"head.weight": _Code()}, protocol=2))
    header = json.dumps({"head.weight": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4_000_000]}}).encode()
    (here / "lies.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    save_file({"x": torch.zeros(1)}, here / "other.safetensors")
    (here / "unknown.yaml").write_text("nonsense: 1\n")
    (here / "tags.yaml").write_text("keep: !!python/object/apply:os.system ['touch ran']\n")
    (here / "class.yaml").write_text("keep:\n  class_path: os.system\n  init_args:\n    command: touch ran\n")
    (here / "list.yaml").write_text("- 1\n- 2\n")
    five = network(TEACHER)
    five.reset_classifier(5)
    save_student(five, here / "five")


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted after its third step."""
    interrupt(monkeypatch, 3)
    with pytest.raises(Interrupted, match=r"after step 3; go on with: stillhouse distill --resume --out \S+/run$"):
        distil(tmp_path / "run", keep=0.5, save_every=2)
    assert read_facts(tmp_path / "run")["status"] == "interrupted"
    return tmp_path / "run"


def test_a_resume_of_something_else_is_refused(stopped: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(teacher(), tmp_path / "other-teacher")
    for flags, message in [
        (["--method", "kd"], "has method=masked_kd, not kd"),
        (["--keep", "0.25"], "has keep=0.5, not 0.25"),
        (["--lr", "1"], "has lr=0.01, not 1.0"),
        (["--epochs", "5"], "has epochs=3, not 5"),
        (["--student", f"{STUDENT},depth=2"], "has student="),
        (["--teacher", "other-teacher"], "has teacher="),
        (["--data", "digits"], "has data="),
    ]:
        refused(["distill", "--resume", "--out", "run", *flags], message, capsys)
    with pytest.raises(UserError, match="already holds something"):
        distil(stopped)


def test_a_run_of_another_method_is_not_taken_up_as_masked_kd(tmp_path: Path) -> None:
    distil(tmp_path / "run", "kd", max_steps=1)
    with pytest.raises(UserError, match="has method=kd, not masked_kd"):
        sh.distill("masked_kd", out="run", resume=True)
    assert sh.distill(out="run", resume=True).facts["method"] == "kd"


@pytest.mark.parametrize("what", ["teacher", "settings"])
def test_a_checkpoint_of_something_else_is_refused_and_nothing_changes(
    what: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names are the same, but not what they stand for."""
    settings = (stopped / "settings.yaml").read_text()
    differs = {"teacher": r"\w+, now \w+", "settings": r"alpha was 0\.5, now 0\.25, hint was 0\.0, now 1\.0"}[what]
    if what == "teacher":
        shutil.copytree(teacher(), "changed")
        path = Path("changed/student/model.safetensors")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        settings = settings.replace(f"teacher: {teacher()}", "teacher: changed")
    else:
        settings = settings.replace("alpha: 0.5", "alpha: 0.25").replace("hint: 0.0", "hint: 1.0")
    (stopped / "settings.yaml").write_text(settings)
    refused(["distill", "--resume", "--out", "run"], rf"step-00000003 is of another {what} \({differs}\); start anew", capsys)


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    last = checkpoints(stopped / "checkpoints")[-1]
    content = (last / "distiller.safetensors").read_bytes()
    (last / "distiller.safetensors").write_bytes(content[:-5])
    assert cli.main(["distill", "--resume", "--out", "run"]) == 0
    assert "step-00000003/distiller.safetensors is damaged: its contents are not what was written; going on from the" in caplog.text
    assert read_facts(stopped)["status"] == "finished"
    whole = distil(stopped.parent / "whole", keep=0.5, save_every=2)
    for name in ("student/model.safetensors", "train.csv", "val.csv"):
        assert (stopped / name).read_bytes() == (whole.folder / name).read_bytes(), name


HOLDER = """
from pathlib import Path
from stillhouse.run_folder import locked
with locked(Path("run")):
    print("held", flush=True)
    input()
"""


def test_two_runs_in_one_folder_are_one_too_many(
    stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE", 0.1)
    before = files(stopped)
    other = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    sentence = "another process is training in run: wait for it, stop it, or choose another folder with --out"
    refused(["distill", "--resume", "--out", "run"], sentence, capsys)
    refused(words(out="run", overwrite=""), sentence, capsys)
    assert files(stopped) == before
    other.kill()
    other.communicate()
    assert cli.main(["distill", "--resume", "--out", "run"]) == 0


def test_resume_begins_what_has_not_begun_when_it_is_told_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So one command does, on a cluster that starts it again whenever a machine is lost."""
    refused(["distill", "--resume", "--out", "out"], "no run to resume in out", capsys)
    Path("out").mkdir()
    for left in (".lock", ".settings.yaml"):  # by a process killed before it wrote anything else
        Path("out", left).touch()
    assert cli.main(words(resume="", max_steps="2")) == 0
    before = files(tmp_path / "out")
    assert cli.main(words(resume="", max_steps="2")) == 0
    assert files(tmp_path / "out") == before


def test_a_run_that_was_killed_while_writing_its_report_gets_one(tmp_path: Path) -> None:
    run = distil(tmp_path / "run", max_steps=1)
    run.report.unlink()
    assert sh.distill(out=str(run.folder), resume=True).report.is_file()


def test_a_run_that_was_removed_by_half_can_be_removed_again(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = shutil.rmtree

    def cut_short(path: Path, *rest: Any, **more: Any) -> None:
        remove(path, *rest, **more)
        if Path(path).name == "checkpoints":
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        distil(stopped, overwrite=True, max_steps=1)
    monkeypatch.undo()
    assert distil(stopped, overwrite=True, max_steps=1).facts["status"] == "finished"


def test_overwrite_removes_the_run_only_once_everything_is_known_to_work(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ({"optimizer": "adamv"}, {"accumulate": "3"}, {"batch": "65"}, {"trackers": "nothing"}, {"teacher": "nowhere"}):
        refused(words(out="run", overwrite="", **flags), ".", capsys)
    distil(stopped, overwrite=True, max_steps=1)
    assert [row["step"] for row in read_table(stopped / "train.csv")] == ["1"]
    assert [path.name for path in checkpoints(stopped / "checkpoints")] == ["step-00000001"]


def _poison(monkeypatch: pytest.MonkeyPatch, at: int, what: float) -> None:
    update = Loop.update

    def poisoned(self: Loop, step: int, ids: Tensor, images: Tensor, labels: Tensor) -> None:
        update(self, step, ids, images * what if step == at else images, labels)

    monkeypatch.setattr(Loop, "update", poisoned)


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(
    what: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _poison(monkeypatch, 4, what)
    assert cli.main(words(max_steps="8", save_every="2", log_every="3")) == 1
    said = capsys.readouterr().err
    assert re.search(r"the loss is not finite at step 5: ce = nan, kd = nan; .*--lr", said)
    assert said.count("\n") == 1
    assert read_facts(tmp_path / "out")["status"] == "failed"
    parts, facts = load_checkpoint(checkpoints(tmp_path / "out" / "checkpoints")[-1])
    assert facts["step"] == 4
    assert all(value.isfinite().all() for tensors in parts.values() for value in tensors.values())
    assert [row["step"] for row in read_table(tmp_path / "out" / "train.csv")] == ["3"]
    assert not (tmp_path / "out" / "student").exists()


def test_weights_that_an_update_spoilt_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the step was finite, its gradient was not."""
    learn = Loop.learn

    def spoilt(self: Loop, turn: str, step: int, *rest: Any) -> dict[str, Tensor]:
        terms = learn(self, turn, step, *rest)
        if step == 1:
            self.distiller.student.head.bias.grad.fill_(float("inf"))
        return terms

    monkeypatch.setattr(Loop, "learn", spoilt)
    with pytest.raises(Diverged, match=r"the update of step 2 made student\.head\.bias NaN or infinite"):
        distil(tmp_path / "run", save_every=1)
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000001"]


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(tensors: Any, path: Path) -> None:
        if "00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert cli.main(words(max_steps="6", save_every="2")) == 1
    said = capsys.readouterr().err
    assert re.search("step 4 could not be written.*No space left on device.*--resume", said)
    assert said.count("\n") == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["distill", "--resume", "--out", "out"]) == 0
    whole = distil(tmp_path / "whole", lr=1e-3, epochs=100, warmup_epochs=5.0, log_every=50, save_every=2)
    assert (tmp_path / "out/train.csv").read_bytes() == (whole.folder / "train.csv").read_bytes()


@pytest.mark.parametrize("name", ["settings.yaml", "run.json", "train.csv", "step-00000000.safetensors", "model.safetensors"])
def test_every_file_may_meet_a_full_disk(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.models import saving
    from stillhouse.training import loop

    error = OSError(errno.ENOSPC, "No space left on device")
    write, opened = Path.write_text, Path.open

    def written(self: Path, *rest: Any, **more: Any) -> int:
        if self.name == f".{name}":
            raise error
        return write(self, *rest, **more)

    def opening(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if self.name in (name, f".{name}") and mode in ("a", "w"):
            raise error
        return opened(self, mode, *rest, **more)

    def saved(tensors: Any, path: Any, *rest: Any, **more: Any) -> None:
        if Path(path).name in (name, f".{name}"):
            raise error
        save_file(tensors, path, *rest, **more)

    monkeypatch.setattr(Path, "write_text", written)
    monkeypatch.setattr(Path, "open", opening)
    monkeypatch.setattr(loop, "save_file", saved)
    monkeypatch.setattr(saving, "save_file", saved)
    assert cli.main(words()) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert "No space left on device" in said


def test_a_signal_ends_a_real_run_cleanly(tmp_path: Path) -> None:
    arguments = words(max_steps="2000", epochs="1000", eval_every="1000", log_every="1")
    process = subprocess.Popen([sys.executable, "-m", "stillhouse", *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "train.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    step = int(re.search(r"interrupted after step (\d+); go on with: stillhouse distill --resume --out out$", said.strip())[1])
    assert read_facts(tmp_path / "out")["status"] == "interrupted"
    assert load_checkpoint(checkpoints(tmp_path / "out" / "checkpoints")[-1])[1]["step"] == step


def test_a_signal_in_the_baseline_names_the_run_which_then_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distil(tmp_path / "whole", baseline=True)
    update = Loop.update

    def stopping(self: Loop, step: int, *batch: Tensor) -> None:
        update(self, step, *batch)
        if self.folder.name == "baseline" and step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Loop, "update", stopping)
    with pytest.raises(Interrupted, match=r"after step 3; go on with: stillhouse distill --resume --out \S+/run$"):
        distil(tmp_path / "run", baseline=True)
    assert read_facts(tmp_path / "run")["status"] == "interrupted"
    assert read_facts(tmp_path / "run" / "baseline")["status"] == "interrupted"
    monkeypatch.undo()
    again = sh.distill(out=str(tmp_path / "run"), resume=True)
    for name in (
        "train.csv",
        "val.csv",
        "baseline/train.csv",
        "baseline/val.csv",
        "student/model.safetensors",
        "baseline/student/model.safetensors",
    ):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert again.facts["status"] == read_facts(again.folder / "baseline")["status"] == "finished"
    assert [(row["row"], row["top1"]) for row in again.facts["result"]] == [(row["row"], row["top1"]) for row in whole.facts["result"]]


def test_disagreeing_objects_are_refused(tmp_path: Path) -> None:
    other = network(TEACHER)
    other.reset_classifier(7)
    with pytest.raises(UserError, match="the teacher knows 7 classes, the data has 10"):
        distil(tmp_path / "run", teacher=other)
    with pytest.raises(UserError, match=r"'keeep' is no setting of masked_kd.*did you mean 'keep'"):
        distil(tmp_path / "run", keeep=0.5)
    with pytest.raises(UserError, match=r"epochs is 1\.5, expected a whole number"):
        distil(tmp_path / "run", epochs=1.5)
    with pytest.raises(UserError, match="lr is x, expected"):
        distil(tmp_path / "run", lr="x")
    assert files(tmp_path) == {}
    assert len(data().classes) == 10
