"""No network at import, none in a run whose parts are here, and nothing is ever reported to anybody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.counts import tried

WATCHED = """
import sys
ASKED = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        ASKED.append((event, str(arguments)))
        raise OSError(f"somebody was asked: {event} {arguments}")
sys.addaudithook(watch)
"""
IMPORTED = """
import importlib, pkgutil, stillhouse
count = 0
for module in pkgutil.walk_packages(stillhouse.__path__, "stillhouse."):
    importlib.import_module(module.name)
    count += 1
print(count, ASKED)
"""
RUN = """
import os, stillhouse as sh
from tests.runs import STUDENT, TEACHER, RECIPE
common = {**RECIPE, "data": "digits:train=64", "epochs": 1, "trackers": "tensorboard"}
taught = sh.distill("scratch", student=TEACHER, out="teacher", **common)
run = sh.distill("kd", teacher="teacher", student=STUDENT, out="run", workers=0, allow_weak_teacher=True, baseline=True, **common)
sh.evaluate("run"); sh.compare(["run", "teacher"]); sh.export("run", to="timm", out="exported")
assert run.student is not None and run.report.is_file()
print(len(run.facts["result"]), ASKED)
"""


def _watched(code: str, here: Path) -> str:
    done = subprocess.run([sys.executable, "-c", WATCHED + code], capture_output=True, text=True, cwd=here, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_importing_every_module_asks_nobody(tmp_path: Path) -> None:
    count, asked = _watched(IMPORTED, tmp_path).split(" ", 1)
    assert int(count) > 100
    assert asked == "[]"
    tried("modules imported without network", int(count))


def test_a_run_from_data_to_report_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)) + f":{Path.cwd()}")
    assert _watched(RUN, tmp_path) == "3 []"
    tried("runs without network")


def test_a_network_of_transformers_in_a_folder_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)) + f":{Path.cwd()}")
    code = """
from transformers import ViTConfig, ViTForImageClassification
from stillhouse.models.opening import open_model
small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4, num_labels=3)
ViTForImageClassification(ViTConfig(**small)).save_pretrained("vit")
open_model("transformers/vit", classes=3, channels=3, weights="pretrained")
open_model("transformers/vit:hidden_size=16,num_hidden_layers=1,num_attention_heads=2", classes=3, channels=3)
print(ASKED)
"""
    assert _watched(code, tmp_path) == "[]"
    tried("networks opened without network")
