"""What is fuzzed: each target takes bytes and an empty folder, and raises UserError or nothing."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save as as_safetensors
from torch import Tensor

from stillhouse import cli
from stillhouse.cache.answers import Answers
from stillhouse.data import open_data
from stillhouse.data.animal_mnist import read_array
from stillhouse.data.condensed import read_condensed
from stillhouse.data.fashion_mnist import FILES, _read_idx
from stillhouse.data.images import open_image, why_broken
from stillhouse.data.options import path_and_options, read_options
from stillhouse.fitting import split_settings
from stillhouse.models.forests import is_forests, read_forests
from stillhouse.models.opening import read_saved
from stillhouse.models.specs import parse_options, parse_spec
from stillhouse.models.weights import read_weights
from stillhouse.report import write_report
from stillhouse.report.compare import compare, print_table
from stillhouse.run import Run
from stillhouse.run_folder import open_folder, read_facts, status
from stillhouse.training.checkpoint import load_checkpoint
from stillhouse.training.log import Table
from tests.data.corpus import READ, encoded, flat
from tests.fuzz.spoil import as_json, spoilt

Target = Callable[[bytes, Path], None]
TARGETS: dict[str, Target] = {}


def target(function: Target) -> Target:
    """Names a target by its function."""
    TARGETS[function.__name__] = function
    return function


SAVED = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 3,
    "num_features": 8,
    "global_pool": "token",
    "model_args": {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 3, "in_chans": 1},
    "pretrained_cfg": {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "interpolation": "bilinear", "crop_pct": 1.0},
}
OURS = {
    "stillhouse": {
        "family": "torchvision",
        "spec": "torchvision/resnet18",
        "task": "segment",
        "classes": 3,
        "channels": 3,
        "names": ["a", "b", "c"],
        "preprocessing": {"mean": [0.5], "std": [0.5], "size": 8, "interpolation": "bilinear"},
    }
}
DETR = {"model_type": "detr", "id2label": {"0": "a", "1": "b"}, "num_channels": 3, "architectures": ["DetrForObjectDetection"]}
SEGFORMER = {"model_type": "segformer", "id2label": {"0": "a"}, "num_channels": 3, "architectures": ["SegformerForSemanticSegmentation"]}
PROCESSOR = {"do_normalize": True, "image_mean": [0.5], "image_std": [0.5], "size": {"height": 8, "width": 8}, "resample": 2}
SETTINGS = {
    **{"method": "masked_kd", "teacher": "t", "student": "timm/vit_tiny_patch16_224", "data": "digits", "task": None, "bad_data": "skip"},
    **{"epochs": 2, "max_steps": None, "batch": 8, "lr": 0.1, "precision": "fp32", "trackers": "none", "seed": 0, "smoke": False},
    **{"keep": 0.5, "alpha": 0.5, "temperature": 1.0, "by": "student", "hflip": 0.5, "crop_scale": [0.1, 1.0], "auto_augment": ""},
}
RECORD = {
    **{"status": "finished", "method": "masked_kd", "task": "segment", "title": "MaskedKD", "command": ["stillhouse", "distill"]},
    **{"seed": 0, "versions": {"torch": "2"}, "hashes": {"data": "00"}, "started": "2020-01-01", "seconds": 3.5, "alarms": ["a"]},
    "data": {"name": "d", "classes": ["a", "b"], "train": 5, "val": 2, "skipped": ["x (y)"]},
    "models": {"teacher": {"name": "t", "params": 5, "macs": 7}, "student": {"name": "s", "params": 3}},
    "keep": {"kept": 2, "patches": 4},
    "savings": {"teacher_macs_full": 8, "teacher_macs_kept": 4, "step_ms_full": 3.0, "step_ms_kept": 2.0},
    "metrics": {"miou": 0.5},
    "per_class": {"a": 0.5, "b": 0.1},
    "result": [{"row": "teacher", "miou": 0.5, "params": 5, "per_class": {"a": 1.0}}, {"row": "student", "miou": 0.4, "step_ms": 3.0}],
}
COCO = {
    "images": [{"id": 1, "file_name": "0.png", "width": 12, "height": 12}, {"id": 2, "file_name": "1.png"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 5], "iscrowd": 0, "segmentation": [[1, 2, 3]]},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [0.5, 0, 12, 12]},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
VOC = b"""<annotation><filename>0.png</filename><size><width>12</width><height>12</height></size><object><name>cat</name><difficult>0
</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>5</ymax></bndbox></object></annotation>"""
PIXEL = encoded(flat("RGB", (9, 9, 9)), "PNG")
MASK = encoded(Image.fromarray(np.arange(144, dtype=np.uint8).reshape(12, 12) % 3), "PNG")


@target
def spec(data: bytes, folder: Path) -> None:
    """Names of models and of data with their options."""
    text = data.decode("utf-8", "replace")
    found = parse_spec(text)
    if found.family != "run":
        assert parse_spec(str(found)) == found
    parse_options(path_and_options(text)[1] or text)
    read_options(text, "coco", val=float, classes=int, names=str, values=list)


@target
def settings(data: bytes, folder: Path) -> None:
    """A run's settings.yaml, up to the recipe and the method's own settings."""
    content = data[1:] if data[:1] == b"\0" else yaml.safe_dump(spoilt(SETTINGS, data)).encode()
    (folder / "settings.yaml").write_bytes(content)
    _, stored = open_folder(str(folder), "masked_kd", {"keep": 0.5, "lr": 0.1}, True, False)
    assert stored is not None
    cli.check_settings(stored, folder / "settings.yaml")
    split_settings(stored.get("method") or "masked_kd", stored)


@target
def config(data: bytes, folder: Path) -> None:
    """A file for --config, up to the arguments of `distill`."""
    content = data[1:] if data[:1] == b"\0" else yaml.safe_dump(spoilt(SETTINGS, data)).encode()
    (folder / "config.yaml").write_bytes(content)
    cli._given("distill", _distill(), ["--config", str(folder / "config.yaml")])


@functools.cache
def _distill() -> Any:
    from stillhouse.run import distill

    return distill


@target
def run_folder(data: bytes, folder: Path) -> None:
    """A run's record and its tables, as `compare` and the report read them."""
    (folder / "run.json").write_bytes(as_json(RECORD, data))
    (folder / "val.csv").write_bytes(b"step,epoch,miou,val_ce\n2,1,0.5,1.5\n" + data[-30:])
    (folder / "settings.yaml").write_text("method: kd\n")
    for read in (read_facts, status, lambda folder: Run(folder).metrics, _compared, write_report, _table):
        with _user_errors():
            read(folder)


@contextlib.contextmanager
def _user_errors() -> Any:
    from stillhouse.errors import UserError

    with contextlib.suppress(UserError):
        yield


def _compared(folder: Path) -> None:
    from rich.console import Console

    print_table(compare([folder]), Console(file=io.StringIO(), width=80))


def _table(folder: Path) -> None:
    Table(folder / "val.csv", last_step=5)


@target
def checkpoint(data: bytes, folder: Path) -> None:
    """A checkpoint's state.json, its sums right or not, and a file of its tensors."""
    path = folder / "step-00000001"
    path.mkdir()
    tensors = as_safetensors({"w": torch.zeros(2)})
    (path / "distiller.safetensors").write_bytes(tensors if data[:1] != b"\1" else data[1:])
    (path / "state.json").write_bytes(as_json({"step": 1, "files": {"distiller.safetensors": _sum(path)}, "method": "kd"}, data))
    load_checkpoint(path)


def _sum(path: Path) -> str:
    return hashlib.sha256((path / "distiller.safetensors").read_bytes()).hexdigest()


@target
def safetensors(data: bytes, folder: Path) -> None:
    """A safetensors file: raw, or a spoilt header before some bytes."""
    content = data[1:]
    if data[:1] > b"\0":
        header = {
            "w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "b": {"dtype": "I64", "shape": [1], "data_offsets": [16, 24]},
        }
        told = json.dumps(spoilt(header, data)).encode()
        content = struct.pack("<Q", len(told) + (data[0] == 7)) + told + bytes(24)
    (folder / "w.safetensors").write_bytes(content)
    for tensor in read_weights(folder / "w.safetensors").values():
        assert isinstance(tensor, Tensor)


@target
def torch_file(data: bytes, folder: Path) -> None:
    """A file of torch's, read as weights only."""
    (folder / "w.pt").write_bytes(data)
    for tensor in read_weights(folder / "w.pt").values():
        assert isinstance(tensor, Tensor)


@target
def network(data: bytes, folder: Path) -> None:
    """What a student folder says of its network, and of how it is fed."""
    told = (SAVED, OURS, DETR, SEGFORMER)[data[0] % 4 if data else 0]
    (folder / "config.json").write_bytes(as_json(told, data[1:]))
    (folder / "preprocessor_config.json").write_bytes(as_json(PROCESSOR, data[-4:]))
    saved = read_saved(folder)
    str(saved.spec)
    parse_spec(str(saved.spec))


@target
def coco(data: bytes, folder: Path) -> None:
    """A COCO file."""
    (folder / "all.json").write_bytes(as_json(COCO, data))
    _images(folder)
    _sound_boxes(f"coco:{folder}")


@target
def voc(data: bytes, folder: Path) -> None:
    """A VOC file: raw, or a valid one with bytes replaced."""
    content = bytearray(VOC)
    for place, value in zip(data[::2], data[1::2], strict=False):
        content[place * len(content) // 256] = value
    _images(folder)
    (folder / "0.xml").write_bytes(data[1:] if data[:1] == b"\0" else bytes(content))
    (folder / "1.xml").write_bytes(VOC.replace(b"0.png", b"1.png"))
    _sound_boxes(f"voc:{folder}")


def _images(folder: Path) -> None:
    for i in range(3):
        (folder / f"{i}.png").write_bytes(PIXEL)


def _sound_boxes(spec: str) -> None:
    """What is left over when faults are skipped is right."""
    found = open_data(spec, bad_data="skip")
    for part in (found.train, found.val):
        for i in range(len(part)):  # type: ignore[arg-type]
            image, target = part[i]
            boxes, labels = target["boxes"], target["labels"]
            assert boxes.isfinite().all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes >= 0).all()
            assert (boxes[:, ::2] <= image.width).all()
            assert (boxes[:, 1::2] <= image.height).all()
            assert not found.wrong(image, target)
            assert labels.tolist() == [] or 1 <= int(labels.min()) <= int(labels.max()) <= len(found.classes)


@target
def masks(data: bytes, folder: Path) -> None:
    """A mask, its bytes changed, and what is said of the classes."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    _images(folder / "images")
    content = bytearray(MASK)
    for place, value in zip(data[1::2], data[2::2], strict=False):
        content[place * len(content) // 256] = value
    (folder / "masks/0.png").write_bytes(data[1:] if data[:1] == b"\0" else bytes(content))
    for i in (1, 2):
        (folder / f"masks/{i}.png").write_bytes(MASK)
    if data[:1] == b"\1":
        (folder / "classes.txt").write_bytes(data[1:])
    found = open_data(f"masks:{folder}", bad_data="skip")
    for part in (found.train, found.val):
        for i in range(len(part)):  # type: ignore[arg-type]
            image, mask = part[i]
            assert tuple(mask.shape) == (image.height, image.width)
            assert not found.wrong(image, mask)


@target
def image(data: bytes, folder: Path) -> None:
    """An image of any format: raw, or one of the corpus with bytes replaced."""
    content = bytearray(READ[data[0] % len(READ)].content) if data[:1] > b"\0" else bytearray(data[1:])
    if data[:1] > b"\0":
        for i in range(1, len(data) - 2, 3):
            content[(data[i] * 256 + data[i + 1]) % len(content)] = data[i + 2]
    whole = why_broken(bytes(content)) is None
    try:
        found = open_image(bytes(content))
        assert found.mode == "RGB"
        assert min(found.size) > 0
    except (OSError, SyntaxError, ValueError):
        assert not whole or content[:2] == b"\xff\xd8"  # a JPEG damaged in its middle is the only one not noticed


@target
def condensed(data: bytes, folder: Path) -> None:
    """The pairs of a condensed data set."""
    about = {"task": "classify", "images": [2, 1, 4, 4], "targets": [2], "mean": [0.5], "std": [0.5], "bytes": {}}
    (folder / "about.json").write_bytes(as_json(about, data[1:]))
    tensors = {"images": torch.rand(2, 1, 4, 4), "targets": torch.tensor([0, 1])}
    (folder / "pairs.safetensors").write_bytes(as_safetensors(tensors) if data[:1] != b"\1" else data[1:])
    assert len(read_condensed(folder)) > 0


@target
def forests(data: bytes, folder: Path) -> None:
    """The trees of a distilled graph set: the tensors hold whatever the bytes say."""
    (folder / "about.json").write_bytes(as_json({"kind": "forests", "bytes": {}, "classes": ["a"]}, data[:6]))
    names = ("depth", "kind", "member", "size", "support", "label")
    values = [torch.tensor(list(data[6 + i :: 7]) or [0], dtype=torch.int64) - int(data[:1] == b"\2") for i in range(len(names))]
    (folder / "data.safetensors").write_bytes(as_safetensors(dict(zip(names, values, strict=True))))
    is_forests(folder)
    read_forests(folder)


@target
def answers(data: bytes, folder: Path) -> None:
    """A shard of a teacher's cached answers, whose name is its sum, and the manifest."""
    (folder / "manifest.json").write_bytes(as_json({"teacher": "t"}, data[-9:]) if data[:1] == b"\2" else b"{}")
    told = {"about": {"inputs": [[1]], "answers": {"logits": ["float32", [3]]}}, "errors": {"logits": [0.1, 0.2, 3]}}
    tensors = {"id": torch.tensor(list(data[:3] or b"\0")), "logits.values": torch.zeros(len(data[:2]) or 1, 3)}
    metadata = {"told": as_json(told, data[3:]).decode("utf-8", "replace")}
    content = data[1:] if data[:1] == b"\1" else as_safetensors(tensors, metadata)
    (folder / "val").mkdir()
    (folder / "val" / f"{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)
    part = Answers(folder, {}).part("val", 5)
    part.read(torch.arange(5)[[i for i in range(5) if i not in part.missing(torch.arange(5)).tolist()]])


@target
def pictures(data: bytes, folder: Path) -> None:
    """The pictures that a report shows."""
    (folder / "pictures").mkdir()
    kinds = (torch.uint8, torch.float32, torch.int64, torch.bool)
    names = (
        "images",
        "labels",
        "shown",
        "visible",
        "saliency",
        "difference",
        "mask 1",
        "mask 2",
        "channels",
        "drawn/labels",
        "drawn/student",
    )
    tensors = {}
    for i, name in enumerate(names):
        a, b = (data[2 * i : 2 * i + 2] + b"\0\0")[:2]
        if a:
            shape = [(a >> shift) % 4 for shift in (0, 2, 4, 6)][: 1 + b % 4]
            tensors[name] = torch.ones(shape, dtype=kinds[(b >> 2) % 4])
    (folder / "pictures/step-00000001.safetensors").write_bytes(as_safetensors(tensors) if data[:1] != b"\1" else data[1:])
    (folder / "run.json").write_text(json.dumps(RECORD))
    write_report(folder)


@target
def idx(data: bytes, folder: Path) -> None:
    """A file of Fashion-MNIST's."""
    zipped = data[:1] == b"\1"
    content = gzip.compress(data[1:]) if zipped else data[1:]
    (folder / f"{FILES[0]}{'.gz' if zipped or data[:1] == bytes([2]) else ''}").write_bytes(content)
    _read_idx(folder, FILES[0])


@target
def pickled_array(data: bytes, folder: Path) -> None:
    """The pickles of animal-mnist: arrays and nothing else."""
    (folder / "a.gz").write_bytes(gzip.compress(data))
    read_array(folder / "a.gz")
