from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from stillhouse.data import fashion_mnist, open_data
from stillhouse.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as the real ones, gzipped and not, of 40 and 20 images."""
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = bytes(i % 251 for i in range(count * 28 * 28))
        images = struct.pack(">iiii", 2051, count, 28, 28) + pixels
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + bytes(i % 10 for i in range(count)))
    return tmp_path


def test_idx_files_are_read_as_they_are(folder: Path) -> None:
    data = open_data(f"fashion-mnist:root={folder}")
    assert (len(data.train), len(data.val), data.size, data.channels) == (40, 20, 28, 1)
    assert data.train.images.flatten()[:300].tolist() == [i % 251 for i in range(300)]
    assert data.val.labels.tolist() == [i % 10 for i in range(20)]


def test_size_channels_and_subsets(folder: Path) -> None:
    data = open_data(f"fashion-mnist:root={folder},size=32,channels=3,train=20,val=10")
    image, label = data.train[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    assert torch.equal(image[0], image[2])
    assert isinstance(label, int)
    assert torch.bincount(data.train.labels).tolist() == [2] * 10
    assert torch.bincount(data.val.labels).tolist() == [1] * 10
    assert len(data.mean) == len(data.std) == 3
    other = open_data(f"fashion-mnist:root={folder},size=32,channels=3,train=20,val=10", seed=1)
    assert torch.equal(other.val.images, data.val.images)
    assert other.fingerprint != data.fingerprint


def test_missing_and_damaged_files_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "t10k-images-idx3-ubyte.gz"
    whole = (folder / name).read_bytes()
    labels = struct.pack(">ii", 2049, 2) + b"ab"
    for bad in (b"", whole[:-9], whole[:40], b"no gzip at all", gzip.compress(labels), gzip.compress(gzip.decompress(whole)[:-1])):
        (folder / name).write_bytes(bad)
        with pytest.raises(UserError, match=f"{name}' is damaged"):
            open_data(f"fashion-mnist:root={folder}")
    monkeypatch.setattr(fashion_mnist, "DEBIAN", folder / "nowhere")
    monkeypatch.setenv("TORCH_HOME", str(folder / "nowhere" / "torch"))
    with pytest.raises(UserError, match=r"apt-get install dataset-fashion-mnist.*root=DIR.*download=true"):
        open_data("fashion-mnist")


def test_a_finished_download_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", folder / "nowhere")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "home" / "hub"))
    raw = folder / "home" / "datasets" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in list(folder.glob("*ubyte*")):
        file.rename(raw / file.name)
    assert len(open_data("fashion-mnist").train) == 40


@pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_real_set() -> None:
    data = open_data("fashion-mnist")
    assert (len(data.train), len(data.val)) == (60_000, 10_000)
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10
    assert round(float(data.train.images.double().mean() / 255), 4) == data.mean[0]
    assert round(float(data.train.images.double().std() / 255), 4) == data.std[0]
