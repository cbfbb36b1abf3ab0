"""A run folder like those that `stillhouse distill` writes, with made-up numbers: for the tests of the report."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

STEPS = 900
RECORD: dict[str, Any] = {
    "status": "finished",
    "method": "masked_kd",
    "title": "MaskedKD",
    "command": ["stillhouse", "distill", "--method", "masked_kd", "--keep", "0.5", "--out", "runs/demo"],
    "seed": 0,
    "versions": {"stillhouse": "0.1.0", "torch": "2.14.1", "timm": "1.0.31", "python": "3.11.7"},
    "hashes": {"teacher": "9f2c" * 16, "data": "41ab" * 16},
    "data": {
        "name": "digits",
        "classes": [str(i) for i in range(10)],
        "train": 1078,
        "val": 719,
        "skipped": ["train/7/scan 0031.png", "train/2/broken.jpg"],
    },
    "started": "2026-11-21T22:50:03+00:00",
    "seconds": 83.4,
    "keep": {"kept": 8, "patches": 16},
    "models": {
        "teacher": {
            "name": "timm/vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=48",
            "params": 87514,
            "macs": 1491168,
            "macs_kept": 775392,
        },
        "student": {"name": "timm/vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=24", "params": 15178, "macs": 261960},
    },
    "result": [
        {"row": "teacher", "top1": 0.964, "nll": 0.131, "ece": 0.012, "params": 87514, "macs": 1491168, "step_ms": None},
        {
            "row": "student (masked_kd)",
            "top1": 0.921,
            "nll": 0.284,
            "ece": 0.031,
            "agreement": 0.934,
            "params": 15178,
            "macs": 261960,
            "step_ms": 12.4,
        },
        {
            "row": "student, labels only",
            "top1": 0.891,
            "nll": 0.402,
            "ece": 0.047,
            "agreement": 0.902,
            "params": 15178,
            "macs": 261960,
            "step_ms": 8.1,
        },
    ],
    "savings": {"teacher_macs_full": 1491168, "teacher_macs_kept": 775392, "step_ms_full": 15.9, "step_ms_kept": 12.4},
}
SETTINGS = """\
method: masked_kd
teacher: timm/vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=48
student: timm/vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=24
data: digits
epochs: 30
batch: 64
lr: 0.002
keep: 0.5  # a share or a count
alpha: 0.5
temperature: 1.0
targets: soft
seed: 0
"""


def write_sample_run(
    folder: Path, *, size: int = 16, channels: int = 1, baseline: bool = True, pictures: bool = True, **changes: Any
) -> Path:
    """Write a whole run folder; `changes` replace top-level keys of its run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**RECORD, **changes}), encoding="utf-8")
    (folder / "settings.yaml").write_text(SETTINGS, encoding="utf-8")
    rng = np.random.default_rng(0)
    _write_curves(folder, rng, final=0.921, distilled=True)
    if baseline:
        _write_curves(folder / "baseline", rng, final=0.891, distilled=False)
    if pictures:
        for step in (0, 450, STEPS):
            write_pictures(folder, step, size=size, channels=channels)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of one set of keys as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_curves(folder: Path, rng: np.random.Generator, *, final: float, distilled: bool) -> None:
    train, val = [], []
    for step in range(5, STEPS + 1, 5):
        labels = 0.25 + 2.05 * math.exp(-step / 190) + 0.05 * rng.standard_normal()
        teacher = 0.18 + 1.5 * math.exp(-step / 220) + 0.03 * rng.standard_normal()
        terms = {"labels": 0.5 * labels, "teacher": 0.5 * teacher} if distilled else {"labels": labels}
        row = {"step": step, "epoch": step // 30, "lr": 0.002, "images_per_second": 4100, "total": sum(terms.values()), **terms}
        train.append(row)
    for step in range(30, STEPS + 1, 30):
        gone = 1 - math.exp(-step / 170)
        top1 = 0.1 + (final - 0.1) * gone / (1 - math.exp(-STEPS / 170)) - 0.008 * abs(rng.standard_normal()) * (step < STEPS)
        row = {"step": step, "epoch": step // 30, "top1": top1, "top5": 1 - (1 - top1) / 6, "nll": 2.3 - 2 * gone, "ece": 0.03}
        if distilled:
            row |= {"agreement": top1 + 0.01, "teacher_top1": 0.66 + 0.24 * gone + 0.006 * rng.standard_normal()}
            row |= {"val_labels": 0.14 + 1.02 * (1 - gone), "val_teacher": 0.1 + 0.72 * (1 - gone)}
        val.append(row)
    write_rows(folder / "train.csv", train)
    write_rows(folder / "val.csv", val)


def write_pictures(folder: Path, step: int, *, size: int = 16, channels: int = 1, count: int = 4) -> None:
    """Digits on a noisy canvas, a saliency that finds them as the steps go by, and the 8 of 16 patches it ranks highest."""
    rng = np.random.default_rng(1)
    digits = load_digits()
    images = np.zeros((count, channels, size, size), np.uint8)
    truth = np.zeros((count, 4, 4))
    for i in range(count):
        canvas = 30 * rng.random((size, size))
        digit = np.kron(digits.images[i], np.ones((size // 16, size // 16))) * 15
        y, x = rng.integers(0, size - len(digit) + 1, 2)
        canvas[y : y + len(digit), x : x + len(digit)] += digit
        tint = rng.uniform(0.4, 1, (channels, 1, 1)) if channels > 1 else 1.0
        images[i] = np.clip(canvas * tint, 0, 255).astype(np.uint8)
        truth[i] = canvas.reshape(4, size // 4, 4, size // 4).mean((1, 3)) / 255
    learned = step / STEPS
    saliency = learned * truth + (1 - learned) * 0.4 * np.random.default_rng(step).random((count, 4, 4))
    saliency /= saliency.sum((1, 2), keepdims=True)
    shown = saliency >= np.sort(saliency.reshape(count, -1))[:, 8][:, None, None]
    tensors: dict[str, NDArray[Any]] = {
        "images": images,
        "labels": digits.target[:count].astype(np.int64),
        "saliency": saliency.astype(np.float32),
        "shown": shown.astype(np.float32),
    }
    (folder / "pictures").mkdir(exist_ok=True)
    metadata = {"step": str(step), "progress": str(learned)}
    save_file(tensors, folder / "pictures" / f"step-{step:08d}.safetensors", metadata=metadata)
