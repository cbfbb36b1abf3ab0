"""From a few words to a run folder that others can open."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import stillhouse as sh
from stillhouse import cli
from stillhouse.data.loading import eval_batches, train_batches
from stillhouse.data.transforms import eval_transform, train_transform
from stillhouse.distillers.base import Distiller, Stage
from stillhouse.distillers.classics.scratch import Scratch
from stillhouse.fitting import OWN, input_of
from stillhouse.masks import keep_rate
from stillhouse.models.weights import weights_hash
from stillhouse.training.log import read_table
from tests.runs import DATA, RECIPE, STUDENT, assert_equal, data, distil, distiller, interrupt, loop, network, teacher, weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> sh.Run:
    """A run with everything that a run can leave behind; nobody changes it."""
    return distil(tmp_path_factory.mktemp("run") / "run", baseline=True, trackers="tensorboard", ema=0.5, mixup=0.4, keep=0.5)


def test_the_folder_says_what_was_done(run: sh.Run) -> None:
    facts = run.facts
    assert (facts["status"], facts["method"], facts["title"], facts["seed"]) == ("finished", "masked_kd", "MaskedKD", 0)
    assert facts["hashes"] == {"teacher": weights_hash(sh.open_model(teacher(), classes=10, channels=1)), "data": data().fingerprint}
    assert set(facts["versions"]) >= {"stillhouse", "torch", "timm", "python"}
    assert facts["data"] == {"name": DATA, "classes": [str(n) for n in range(10)], "train": 64, "val": 719, "skipped": []}
    assert facts["keep"] == {"kept": 2, "patches": 4}
    assert [row["row"] for row in facts["result"]] == ["teacher", "student (masked_kd)", "student, labels only"]
    assert facts["metrics"] == run.metrics
    assert facts["result"][1]["top1"] == run.metrics["top1"] == float(read_table(run.folder / "val.csv")[-1]["top1"])
    assert facts["models"]["teacher"]["macs_kept"] < facts["models"]["teacher"]["macs"]
    assert facts["seconds"] > 0


def test_everything_promised_is_there(run: sh.Run) -> None:
    for name in ("settings.yaml", "run.json", "train.csv", "val.csv", "report.html", "student/config.json", "student/model.safetensors"):
        assert (run.folder / name).stat().st_size > 0
        assert (run.folder / "baseline" / name).stat().st_size > 0
    for folder in (run.folder, run.folder / "baseline"):
        assert list(folder.glob("curves/**/events.out.tfevents*"))
        assert [path.name for path in sorted(folder.glob("checkpoints/*"))] == ["step-00000004", "step-00000006"]
        assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]
    assert run.report.read_text().startswith("<!doctype html>")
    with safe_open(run.folder / "pictures" / "step-00000003.safetensors", "pt") as pictures:
        assert set(pictures.keys()) == {"images", "labels", "saliency", "shown"}
        assert pictures.metadata() == {"step": "3", "progress": "0.5"}
        images, expected = pictures.get_tensor("images"), torch.stack([data().val[i][0] for i in range(6)])
    assert torch.equal(images, expected)


def test_no_tensor_of_the_teacher_is_in_any_checkpoint(run: sh.Run) -> None:
    width = {tuple(value.shape) for value in sh.open_model(teacher(), classes=10, channels=1).state_dict().values() if 24 in value.shape}
    for path in run.folder.rglob("*.safetensors"):
        for name, value in load_file(path).items():
            assert "teacher" not in name
            assert tuple(value.shape) not in width, (path, name)


def test_the_student_is_the_average_and_gives_the_metrics(run: sh.Run) -> None:
    averaged = load_file(run.folder / "checkpoints" / "step-00000006" / "ema.safetensors")
    parts = {name.removeprefix("student."): value for name, value in averaged.items()}
    assert_equal(weights(run.student), parts)
    assert sh.evaluate(run.folder)["top1"] == run.metrics["top1"]


def test_timm_opens_the_student_without_stillhouse(run: sh.Run) -> None:
    code = f"""
import sys
sys.modules["stillhouse"] = None
import timm, torch
model = timm.create_model("local-dir:{run.folder}/student", pretrained=True).eval()
images, labels = torch.load("{run.folder.parent}/images.pt", weights_only=True)
config = timm.data.resolve_data_config(model=model)
mean, std = config["mean"][0], config["std"][0]
with torch.no_grad():
    print((model((images.float() / 255 - mean) / std).argmax(1) == labels).double().mean().item())
"""
    images = [data().val[i] for i in range(719)]
    torch.save(
        (torch.stack([image for image, _ in images]), torch.tensor([int(label) for _, label in images])), run.folder.parent / "images.pt"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(run.metrics["top1"], abs=1.5 / 719)


def test_settings_are_a_config_that_gives_the_same_student(run: sh.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_show_log", lambda *_: None)
    assert cli.main(["distill", "--config", str(run.folder / "settings.yaml"), "--out", str(tmp_path / "again")]) == 0
    for name in ("student/model.safetensors", "train.csv", "val.csv", "settings.yaml", "baseline/student/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (run.folder / name).read_bytes(), name


def test_the_baseline_is_the_run_without_its_teacher(run: sh.Run, tmp_path: Path) -> None:
    alone = sh.distill("scratch", student=STUDENT, data=DATA, out=str(tmp_path / "alone"), **RECIPE, max_steps=6, ema=0.5, mixup=0.4)
    assert_equal(weights(alone.student), weights(sh.distill(out=str(run.folder / "baseline"), resume=True).student))
    assert not (tmp_path / "alone" / "baseline").exists()


def test_a_resume_in_the_middle_gives_the_same_folder(run: sh.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of workers too."""
    interrupt(monkeypatch, 3)
    with pytest.raises(sh.Interrupted):
        distil(tmp_path / "run", baseline=True, ema=0.5, mixup=0.4, keep=0.5)
    so_far = sh.export(tmp_path / "run", to="timm", out=tmp_path / "so-far")
    averaged = load_file(tmp_path / "run/checkpoints/step-00000003/ema.safetensors")
    assert_equal(load_file(so_far / "model.safetensors"), {name.removeprefix("student."): value for name, value in averaged.items()})
    again = sh.distill(out=str(tmp_path / "run"), resume=True, workers=2)
    for name in ("student/model.safetensors", "train.csv", "val.csv", "baseline/train.csv"):
        assert (again.folder / name).read_bytes() == (run.folder / name).read_bytes(), name
    pictures = [load_file(folder / "pictures" / "step-00000006.safetensors") for folder in (again.folder, run.folder)]
    assert_equal(*pictures)
    assert again.facts["hashes"] == run.facts["hashes"]


def test_objects_are_as_good_as_words(run: sh.Run, tmp_path: Path) -> None:
    student = network()
    named = distil(tmp_path / "named", keep=0.5)
    given = distil(tmp_path / "given", keep=0.5, teacher=sh.open_model(teacher(), classes=10, channels=1), student=student, data=data())
    assert_equal(weights(given.student), weights(named.student))
    assert_equal(weights(student), weights(named.student))
    stored = yaml.safe_load((given.folder / "settings.yaml").read_text())
    assert stored["student"] is stored["teacher"] is stored["data"] is None
    path = distil(tmp_path / "path", "kd", teacher=run.folder.parent / "run", max_steps=1, allow_weak_teacher=True)
    assert yaml.safe_load((path.folder / "settings.yaml").read_text())["teacher"] == str(run.folder)


def test_the_distiller_works_in_anyones_loop() -> None:
    student, its_teacher = network(), sh.open_model(teacher(), classes=10, channels=1)
    learner = sh.distillers.MaskedKD(student, its_teacher, keep=0.5).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    transform = train_transform(input_of(student, data()), data())
    totals = []
    for epoch in range(4):
        for _, _, images, labels in train_batches(data().train, transform, batch=32, epoch=epoch, seed=0):
            total = sum(learner((images, labels)).values())
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            totals.append(total.item())
    assert totals[-1] < totals[0]


class First(Scratch):
    """The first part of a training in two."""


class TwoStages(Distiller):
    """Labels, then labels again with a louder voice."""

    begun: list[dict[str, Tensor]] = []  # noqa: RUF012

    def __init__(self, student: nn.Module, *, loudness: float = 2.0) -> None:
        super().__init__(student)
        self.loudness = loudness

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        return {"ce": self.loudness * nn.functional.cross_entropy(self.student(batch[0]), batch[1])}

    @classmethod
    def stages(cls, student: nn.Module, teacher: nn.Module | None, epochs: int, **settings: Any) -> Iterator[Stage]:
        cls.begun.append(weights(student))
        yield Stage("first", First(student), 1)
        cls.begun.append(weights(student))
        yield Stage("second", cls(student, **settings), epochs)


def test_stages_follow_each_other_and_go_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(folder: Path, **more: Any) -> sh.Run:
        TwoStages.begun.clear()
        settings = {"student": STUDENT, "data": DATA, "out": str(folder), **RECIPE, "epochs": 2, "loudness": 3.0}
        return sh.distill(TwoStages, **({"out": str(folder)} if more else settings), **more)

    whole = begin(tmp_path / "whole")
    before, between = TwoStages.begun
    assert_equal(before, weights(network()))
    end = load_file(whole.folder / "first" / "checkpoints" / "step-00000004" / "distiller.safetensors")
    assert_equal(between, {name.removeprefix("student."): value for name, value in end.items()})
    assert [row["step"] for row in read_table(whole.folder / "first" / "train.csv")] == ["3", "4"]
    assert [row["step"] for row in read_table(whole.folder / "second" / "train.csv")] == ["3", "6", "8"]
    assert whole.metrics["top1"] == float(read_table(whole.folder / "second" / "val.csv")[-1]["top1"])
    for stop in (3, 7):
        folder = tmp_path / f"stopped-{stop}"
        interrupt(monkeypatch, stop)
        with pytest.raises(sh.Interrupted, match=rf"--out {folder}$"):
            begin(folder)
        again = begin(folder, resume=True)
        assert_equal(weights(again.student), weights(whole.student))
        for name in ("first/train.csv", "second/train.csv", "second/val.csv"):
            assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_compiled_run_has_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the real compiler, which gives the same to 1e-5 too but takes a minute to build."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    runs = [distil(tmp_path / str(each), compile=each, max_steps=3, log_every=1, ema=0.5) for each in (False, True)]
    totals = [[float(row["total"]) for row in read_table(run.folder / "train.csv")] for run in runs]
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)
    assert runs[1].facts["result"][1]["macs"] == runs[0].facts["result"][1]["macs"]
    assert weights(runs[1].student).keys() == weights(runs[0].student).keys()


WORK = """
import atexit, glob, json, os, sys, warnings
warnings.simplefilter("ignore")
import torch

@atexit.register  # the first to be registered is the last to be called
def at_the_end():
    threads = [open(name).read().strip() for name in glob.glob("/proc/self/task/*/comm")]
    left = [name for name in threads if "gloo" in name] + ["group"] * torch.distributed.is_initialized()
    with open(sys.argv[2] + os.environ["RANK"], "w") as file:
        json.dump(left, file)

torch.set_num_threads(1)
import stillhouse as sh
for name, method, job in json.loads(sys.argv[1]):
    sh.distill(method, out=name, **job)
"""
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "masked": ("masked_kd", {"by": "student", "clip": 1.0, "ema": 0.5, "baseline": True}),
    "random": ("masked_kd", {"by": "random", "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "accumulate": 2}),
    "cached": ("kd", {"views": 1, "teacher_cache": "auto", "cache_storage": "fp32"}),
}


def test_two_processes_are_one(tmp_path: Path) -> None:
    """The same global batch, also with masks and mixing drawn at random; everything is written once."""
    common = {"teacher": teacher(), "student": STUDENT, "data": DATA, **RECIPE, "optimizer": "sgd", "lr": 0.05, "log_every": 2, "epochs": 2}
    jobs = [(str(tmp_path / "two" / name), method, common | job) for name, (method, job) in JOBS.items()]
    (tmp_path / "work.py").write_text(WORK)
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    there = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(tmp_path / "work.py"), json.dumps(jobs), str(tmp_path / "left-")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=there)
    for name, (method, job) in JOBS.items():
        sh.distill(method, out=str(tmp_path / "one" / name), **common | job)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    assert [json.loads((tmp_path / f"left-{rank}").read_text()) for rank in range(2)] == [[], []]  # gloo's threads could abort Python's end
    for folder in [Path(name) for name in JOBS] + [Path("masked/baseline")]:
        one, two = tmp_path / "one" / folder, tmp_path / "two" / folder
        for table in ("train.csv", "val.csv"):
            rows = [read_table(each / table) for each in (one, two)]
            assert [[*row] for row in rows[0]] == [[*row] for row in rows[1]]
            for ours, theirs in zip(*rows, strict=True):
                assert {k: float(v) for k, v in theirs.items()} == pytest.approx({k: float(v) for k, v in ours.items()}, rel=2e-5, abs=2e-5)
        found, expected = (load_file(each / "student" / "model.safetensors") for each in (two, one))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        assert {path.relative_to(two) for path in two.rglob("*") if "tfevents" not in path.name} == {
            path.relative_to(one) for path in one.rglob("*") if "tfevents" not in path.name
        }
        assert sh.Run(two).facts["status"] == "finished"
    kept = [sh.Run(tmp_path / each / "cached").facts["teacher_cache"] for each in ("one", "two")]
    for name in ("images_asked", "images_read", "steps", "steps_without_teacher"):
        assert kept[0][name] == kept[1][name] > 0, name
    again = sh.distill("kd", out=str(tmp_path / "two" / "again"), **common | JOBS["cached"][1])  # what both have written
    assert (again.facts["teacher_cache"]["folder"], again.facts["teacher_cache"]["images_asked"]) == (kept[1]["folder"], 0)


def test_validation_is_of_every_image_once(tmp_path: Path) -> None:
    learner = distiller("kd")
    made = loop(learner, tmp_path, max_steps=1)
    metrics = made.evaluate()
    transform = eval_transform(input_of(learner.student, data()), data())
    learner.eval()
    with torch.no_grad():
        _, images, labels = next(iter(eval_batches(data().val, transform, batch=719)))
        student, its_teacher = learner.student(images), learner.teach(images)
        terms = learner((images, labels))
    assert metrics["top1"] == pytest.approx((student.argmax(1) == labels).double().mean().item())
    assert metrics["agreement"] == pytest.approx((student.argmax(1) == its_teacher.argmax(1)).double().mean().item())
    assert metrics["teacher_top1"] == pytest.approx((its_teacher.argmax(1) == labels).double().mean().item())
    assert metrics["val_kd"] == pytest.approx(terms["kd"].item(), rel=1e-5)


def test_the_session_knows_distills_own_settings() -> None:
    named = [name for name, each in inspect.signature(sh.distill).parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    assert set(OWN) == set(named) - {"out", "resume", "overwrite"}


def test_a_keep_that_finds_itself_is_told_kept_and_taken_up_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep_rate, "OVERHEAD", 1.0)  # so few steps would not pay for a look
    settings = {"keep": "auto", "tolerance": 2.5, "save_every": 2, "log_every": 1}
    whole = distil(tmp_path / "whole", **settings)
    (told,) = whole.facts["news"]
    assert told.startswith("step 1: keep 1 -> 0.15: that turns the teacher's pull by ")
    assert told.replace("->", "-&gt;").replace("'", "&#39;") in (whole.folder / "report.html").read_text()
    rows = read_table(whole.folder / "watch.csv")
    assert [round(float(row["keep"]), 6) for row in rows] == [1.0, *[0.15] * (len(rows) - 1)]
    assert [bool(row["turned"]) for row in rows] == [False, *[True] * (len(rows) - 1)]
    interrupt(monkeypatch, 3)
    with pytest.raises(sh.Interrupted):
        distil(tmp_path / "stopped", **settings)
    again = sh.distill(out=str(tmp_path / "stopped"), resume=True)
    assert again.facts["news"] == whole.facts["news"]
    assert_equal(weights(again.student), weights(whole.student))
    assert read_table(again.folder / "watch.csv") == rows
