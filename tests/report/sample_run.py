"""A run folder like those that `stillhouse distill` writes, with made-up numbers: for the tests of the report."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.datasets import load_digits, load_sample_images
from torchvision.ops import masks_to_boxes

from stillhouse.tasks import find

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


CLASSES = {"segment": ["background", "disc", "ring", "square"], "detect": ["car", "person", "<b>tree</b>"]}
METRICS: dict[str, dict[str, float]] = {
    "segment": {"miou": 0.612, "accuracy": 0.874, "agreement": 0.853},
    "detect": {"map": 0.347, "map_50": 0.561, "map_75": 0.372, "map_small": 0.192, "map_medium": 0.381},
}
ALARM = "the spatial masks have collapsed: their mean is 0.031, and nearly nothing is copied from the teacher; use reading='c'"


def write_dense_run(
    folder: Path,
    task: str,
    *,
    masks: int = 6,
    channels: int = 64,
    side: tuple[int, int] = (192, 256),
    pictures: int = 4,
    collapsed: bool = False,
    **changes: Any,
) -> Path:
    """Write a run folder of "detect" or "segment"; `changes` replace top-level keys of its run.json."""
    names, metrics = CLASSES[task], METRICS[task]
    headline = next(iter(metrics))
    costs = {"params": 1_204_331, "macs": 2.1e9, "step_ms": 131.0}
    per_class = {name: metrics[headline] + 0.1 * math.cos(i) for i, name in enumerate(names)}
    record = {
        **{name: value for name, value in RECORD.items() if name not in ("keep", "savings")},
        "task": task,
        "method": "acam_kd",
        "title": "ACAMKD",
        "data": {"name": "scenes", "classes": names, "train": 2000, "val": 500, "skipped": []},
        "metrics": metrics,
        "per_class": per_class,
        "alarms": [ALARM] if collapsed else [],
        "result": [
            {"row": "teacher", headline: metrics[headline] + 0.12, "params": 41_700_000, "macs": 26e9, "step_ms": None},
            {"row": "student (acam_kd)", **metrics, **costs},
            {"row": "student, labels only", headline: metrics[headline] - 0.024, **costs, "step_ms": 84.0},
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**record, **changes}), encoding="utf-8")
    (folder / "settings.yaml").write_text("method: acam_kd\nreading: c\n", encoding="utf-8")
    rng = np.random.default_rng(0)
    _write_dense_curves(folder, rng, headline, metrics[headline], collapsed)
    _write_dense_curves(folder / "baseline", rng, headline, metrics[headline] - 0.024, collapsed)
    (folder / "baseline" / "watch.csv").unlink()
    baseline = {"per_class": {name: value - 0.02 for name, value in per_class.items()}}
    (folder / "baseline" / "run.json").write_text(json.dumps(baseline), encoding="utf-8")
    for step in (0, 450, STEPS) if pictures else ():
        write_dense_pictures(folder, task, step, masks=masks, channels=channels, side=side, count=pictures, collapsed=collapsed)
    return folder


def _write_dense_curves(folder: Path, rng: np.random.Generator, headline: str, final: float, collapsed: bool) -> None:
    train, val, watch = [], [], []
    for step in range(5, STEPS + 1, 5):
        gone, noise = 1 - math.exp(-step / 220), 0.02 * rng.standard_normal(4)
        terms = {"ce": 1.6 - 1.2 * gone + noise[0], "channel": 0.5 - 0.3 * gone + noise[1], "diversity": 0.9 - 0.5 * gone}
        train.append({"step": step, "epoch": step // 30, "lr": 0.01, "total": sum(terms.values()), **terms})
        mean = 0.5 - (0.47 if collapsed else 0.15) * gone
        dice = {"dice_spatial": 1 - 0.6 * gone + noise[2], "dice_channel": 1 - 0.3 * gone}
        means = {"mask_mean_spatial": mean + 0.1 * noise[3], "mask_mean_channel": 0.5 - 0.05 * gone}
        watch.append({"step": step, "epoch": step // 30, **means, **dice, "corr": 0.4 * gone - 0.05 + noise[0]})
    for step in range(30, STEPS + 1, 30):
        gone = (1 - math.exp(-step / 170)) / (1 - math.exp(-STEPS / 170))
        val.append({"step": step, "epoch": step // 30, headline: final * gone, "val_ce": 1.7 - 1.1 * gone, "val_channel": 0.5 - 0.2 * gone})
    for name, rows in (("train", train), ("val", val), ("watch", watch)):
        write_rows(folder / f"{name}.csv", rows)


def write_dense_pictures(
    folder: Path,
    task: str,
    step: int,
    *,
    masks: int = 6,
    channels: int = 64,
    side: tuple[int, int] = (192, 256),
    count: int = 4,
    collapsed: bool = False,
) -> None:
    """Parts of a photograph with shapes on them, answers that come nearer, and masks that are blobs of their own."""
    height, width = side
    rng = np.random.default_rng(2)
    photograph = load_sample_images().images[0]
    images = np.stack([_part(photograph, rng, side) for _ in range(count)])
    learned = step / STEPS
    y, x = np.mgrid[:height, :width]
    truths, answers = [], []
    for i in range(count):
        truth, answer = (np.zeros(side, np.int64) for _ in range(2))
        for label in range(1, len(CLASSES[task]) + (task == "detect")):
            cy, cx, r = height * rng.uniform(0.25, 0.75), width * rng.uniform(0.2, 0.8), height * rng.uniform(0.08, 0.2)
            off = r * (1 - learned)
            inside = (y - cy) ** 2 + (x - cx) ** 2 < r * r
            images[i][:, inside] = images[i][:, inside] // 2 + 40 * label
            truth[inside] = label
            answer[(y - cy - off) ** 2 + (x - cx + off) ** 2 < r * r] = label
        truths.append(truth)
        answers.append(answer)
    found = np.random.default_rng(3)
    grid = (height // 8, width // 8)
    gy, gx = np.mgrid[: grid[0], : grid[1]] / np.array(grid)[:, None, None]
    mean = 0.5 - (0.47 if collapsed else 0.15) * learned
    tensors: dict[str, NDArray[Any]] = {"images": images, "channels": np.zeros((count, masks, channels), np.float32)}
    for m in range(masks):
        cy, cx = found.random(2)
        blob = np.exp(-((gy - cy) ** 2 + (gx - cx) ** 2) / 0.05)
        shape = np.clip(mean * (1 + learned * (2 * blob - 0.5)), 0.001, 0.999)
        tensors[f"mask {m + 1}"] = np.repeat(shape[None], count, 0).astype(np.float32)
        tensors["channels"][:, m] = 1 / (1 + np.exp(-3 * learned * found.standard_normal(channels)))
    tensors["difference"] = (3 - 2 * learned) * found.random((count, *grid)).astype(np.float32)
    for name, what in (("labels", truths), ("student", answers), ("teacher", truths)):
        tensors[f"drawn/{name}"] = _draw(task, images, what, sure=name == "labels")
    (folder / "pictures").mkdir(exist_ok=True)
    save_file(tensors, folder / "pictures" / f"step-{step:08d}.safetensors", metadata={"step": str(step), "progress": str(learned)})


def _part(photograph: NDArray[np.uint8], rng: np.random.Generator, side: tuple[int, int]) -> NDArray[np.uint8]:
    top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(photograph.shape, side, strict=False))
    return photograph[top : top + side[0], left : left + side[1]].transpose(2, 0, 1).copy()


def _draw(task: str, images: NDArray[np.uint8], masks: list[NDArray[np.int64]], sure: bool) -> NDArray[np.uint8]:
    """Masks as the task draws them: as boxes around them to detect."""
    pictures, labels = torch.from_numpy(images), torch.from_numpy(np.stack(masks))
    if task == "segment":
        return find(task).draw(pictures, labels, CLASSES[task]).numpy()
    answers = []
    for mask in labels:
        present = [int(label) for label in mask.unique() if label]
        boxes = masks_to_boxes(torch.stack([mask == label for label in present]))
        scores = {} if sure else {"scores": torch.linspace(0.9, 0.5, len(present))}
        answers.append({"boxes": boxes, "labels": torch.tensor(present), **scores})
    return find(task).draw(pictures, answers, CLASSES[task]).numpy()
