"""Runs of every shape, stopped in each stage and between any two turns, and taken up again by the command: they end as if never stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import stillhouse as sh
from stillhouse.interrupted import Interrupted
from stillhouse.training.loop import Loop
from tests.runs import files

VIT = "timm/vit_tiny_patch16_224:img_size=8,patch_size=2,num_heads=2"
SHORT: dict[str, Any] = {
    **{"data": "digits:train=64", "batch": 16, "epochs": 2, "lr": 1e-3, "trackers": "none", "log_every": 3, "warmup_epochs": 0.0},
    **{"save_every": 3, "eval_every": 2, "ema": 0.8, "allow_weak_teacher": True},
}
DECODER: dict[str, Any] = {"decoder_width": 12, "decoder_depth": 2, "decoder_heads": 3}
DIT = "diffusers/dit:width=16,depth=1,heads=2,patch=4,levels=3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("taken-up")


@cache
def taught(folder: Path, method: str) -> str:
    """The folder of a teacher, trained if it is not there."""
    if (folder / f"teacher-{method}" / "report.html").is_file():
        return str(folder / f"teacher-{method}")
    student = {"flow": DIT, "mae": f"{VIT},embed_dim=24,depth=3"}.get(method, f"{VIT},embed_dim=24,depth=2")
    settings = DECODER if method == "mae" else {}
    return str(sh.distill(method, student=student, out=str(folder / f"teacher-{method}"), **SHORT | {"ema": None}, **settings).folder)


def dmae(folder: Path) -> dict[str, Any]:
    return {"student": f"{VIT},embed_dim=16,depth=2", "teacher": taught(folder, "mae"), **DECODER}


def dmjd(folder: Path) -> dict[str, Any]:
    return {"student": f"{VIT},embed_dim=16,depth=2", **DECODER}


def self_distill_pretrain(folder: Path) -> dict[str, Any]:
    return {"student": f"{taught(folder, 'mae')}/autoencoder", "rounds": 2}


def meal_v2(folder: Path) -> dict[str, Any]:
    student = f"{VIT},embed_dim=16,depth=1"
    return {"student": student, "teacher": taught(folder, "scratch"), "second_teacher": taught(folder, "scratch")}


def g2sd(folder: Path) -> dict[str, Any]:
    student = "timm/deit_tiny_distilled_patch16_224:img_size=8,patch_size=2,embed_dim=16,depth=2,num_heads=2"
    teachers = {"teacher": f"{taught(folder, 'mae')}/autoencoder", "specific_teacher": taught(folder, "scratch")}
    return {"student": student, **teachers, "unlabelled": "digits:train=80", **DECODER}


def decoupled_dmd(folder: Path) -> dict[str, Any]:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'stillhouse[generative]'")
    judge = taught(folder, "scratch")
    return {"student": DIT, "teacher": taught(folder, "flow"), "levels": (1.0, 0.5), "ratio": 2, "judge": judge}


def krr_st(folder: Path) -> dict[str, Any]:
    small = {"pairs": 8, "pool": 2, "life": 3, "examined_epochs": 2}
    return {"student": f"{VIT},embed_dim=16,depth=1", "teacher": taught(folder, "scratch"), **small}


def cnn_transformer_collab(folder: Path) -> dict[str, Any]:
    smp = "smp/unet:encoder=timm/test_resnet,encoder_depth=3,decoder_channels=(16,8,8)"
    vit = "torchvision/fcn:backbone=timm/vit_tiny_patch16_224,patch_size=8,embed_dim=16,depth=1,num_heads=2"
    pytest.importorskip("segmentation_models_pytorch", reason="pip install 'stillhouse[smp]'")
    return {"student": smp, "partner": vit, "data": "contexts:train=64,val=32", "regions": 4}


def mirage(folder: Path) -> dict[str, Any]:
    pytest.importorskip("torch_geometric", reason="torch-geometric is not installed: pip install 'stillhouse[graphs]'")
    return {"student": "pyg/gin:hidden=8,layers=2", "data": "motifs:train=64", "steps": 5, "ema": None}


SHAPES: dict[str, tuple[Callable[[Path], dict[str, Any]], tuple[int, ...]]] = {
    "dmae": (dmae, (2, 5)),
    "dmjd": (dmjd, (2, 5)),
    "g2sd": (g2sd, (2, 12)),
    "self_distill_pretrain": (self_distill_pretrain, (2, 12, 21)),
    "meal_v2": (meal_v2, (2, 5)),
    "decoupled_dmd": (decoupled_dmd, (3, 6)),
    "krr_st": (krr_st, (2, 5)),
    "cnn_transformer_collab": (cnn_transformer_collab, (2, 5)),
    "mirage": (mirage, ()),
}
"""What is run, and after how many updates in all it is stopped: of several stages in each of them."""


def stop_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """The signal arrives when this process has made so many updates, in whichever stage that is."""
    update, done = Loop.update, [0]

    def stopping(self: Loop, *where: Any) -> None:
        update(self, *where)
        done[0] += 1
        if done[0] == updates:
            monkeypatch.setattr(Loop, "update", update)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Loop, "update", stopping)


def learnt(folder: Path) -> dict[str, bytes]:
    """What must be equal: networks and data that are kept, tables, checkpoints' tensors."""
    return {
        name: content
        for name, content in files(folder).items()
        if name.endswith((".safetensors", "train.csv", "val.csv", "watch.csv", "images.png")) and "pictures/" not in name
    }


@pytest.mark.parametrize("name", SHAPES)
def test_it_ends_as_if_it_had_never_stopped(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, stops = SHAPES[name]
    job = SHORT | make(folder)
    whole = sh.distill(name, out=str(folder / f"{name}-whole"), **job)
    stopped = folder / f"{name}-stopped"
    before = 0
    for stop in stops:
        stop_after(monkeypatch, stop - before)
        with pytest.raises(Interrupted):
            sh.distill(name, out=str(stopped), resume=stopped.exists(), **job)
        before = stop
    again = sh.distill(name, out=str(stopped), **job) if not stops else sh.distill(out=str(stopped), resume=True)
    assert again.facts["status"] == "finished"
    ours, theirs = learnt(again.folder), learnt(whole.folder)
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if ours[key] != theirs[key]] == []


def test_every_family_with_a_shape_of_its_own_is_here() -> None:
    from stillhouse import distillers

    shaped = {name for name, path in distillers.modules().items() if path.split(".")[2] in ("pretraining", "generative", "condensation")}
    assert shaped - {"flow"} <= set(SHAPES)
