from __future__ import annotations

import gzip
import io
import pickle
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.data import animal_mnist, installed, open_data
from stillhouse.errors import UserError


def has(package: str) -> bool:
    try:
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


INSTALLED = pytest.mark.skipif(not has("animal-mnist"), reason="needs animal-mnist: pip install --no-deps animal-mnist")


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def shape(top: int, left: int, height: int = 14, width: int = 6) -> torch.Tensor:
    """A white block with a foot on its right."""
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[top : top + height, left : left + width] = 200
    image[top + height - 3 : top + height, left + width : left + width + 8] = 255
    return image


def test_nearly_alike_is_what_shares_its_pixels_as_it_is_mirrored_or_moved() -> None:
    first, nearly = shape(4, 5), shape(4, 5)
    nearly[4, 5:8] = 0  # 3 of 108 pixels
    images = torch.stack([first, shape(10, 12, 6, 6), nearly, first.flip(1), shape(6, 8), shape(6, 8), shape(4, 5) // 2])
    labels = torch.tensor([1, 1, 1, 1, 1, 0, 1])
    leader = animal_mnist.leaders(images, labels)
    assert leader.tolist() == [0, 1, 0, 0, 0, 5, 6], "another class and what is not lit stand alone"


def test_what_hangs_together_by_a_third_has_one_leader() -> None:
    chain = torch.zeros(3, 28, 28, dtype=torch.uint8)
    for image, width in zip(chain, (20, 24, 22), strict=True):
        image[4:20, 2 : 2 + width] = 255
    assert animal_mnist._common(*(chain[:2] > 0).float().split(1)).item() < animal_mnist.ALIKE
    assert animal_mnist.leaders(chain, torch.zeros(3)).tolist() == [0, 0, 0]


def test_a_pickle_may_hold_an_array_and_nothing_else(tmp_path: Path) -> None:
    array, path = np.arange(6, dtype=np.uint8).reshape(2, 3), tmp_path / "array.gz"
    path.write_bytes(gzip.compress(pickle.dumps(array, protocol=4)))
    assert np.array_equal(animal_mnist.read_array(path), array)
    for content in (gzip.compress(pickle.dumps(shutil.rmtree)), gzip.compress(pickle.dumps([1])), b"no gzip", gzip.compress(b"no pickle")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"array.gz' (is damaged|holds a list)"):
            animal_mnist.read_array(path)
    with pytest.raises(pickle.UnpicklingError, match=r"it names shutil.rmtree"):
        animal_mnist.ArrayUnpickler(io.BytesIO(pickle.dumps(shutil.rmtree))).load()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(installed, "distribution", nothing)
    with pytest.raises(UserError, match=r"^animal-mnist needs files of the package 'animal-mnist': pip install --no-deps animal-mnist$"):
        open_data("animal-mnist")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("classes=cat+cwo", "animal-mnist has no class 'cwo', did you mean 'cow'"),
        ("classes=cat", "classes=cat, expected two or more different ones"),
        ("classes=cat+cat", "expected two or more different ones"),
        ("size=4", "size=4 is out of range, expected 8 to 512"),
        ("channels=4", "channels=4 is out of range"),
        ("trian=50", "did you mean 'train'"),
    ],
)
def test_what_cannot_be_is_said_without_the_package(text: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "distribution", None)
    with pytest.raises(UserError, match=says):
        open_data(f"animal-mnist:{text}")


@INSTALLED
def test_the_images_are_all_different_in_two_stratified_parts() -> None:
    data = open_data("animal-mnist")
    assert (data.channels, data.size, data.classes[0], data.classes[-1], len(data.classes)) == (1, 28, "bear", "zebra", 10)
    train, val = rows(data.train.images), rows(data.val.images)
    assert len(train) + len(val) == len(train | val) == len(data.train) + len(data.val) == 9716
    share = torch.bincount(data.val.labels) / (torch.bincount(data.train.labels) + torch.bincount(data.val.labels))
    assert ((share - 0.2).abs() < 0.01).all()


@INSTALLED
def test_nothing_nearly_alike_stands_on_both_sides() -> None:
    data = open_data("animal-mnist")
    parts = [(part.images[:, 0].numpy() > 127, part.labels.numpy()) for part in (data.train, data.val)]
    most = 0.0
    for number in range(10):
        train, val = (lit[labels == number] for lit, labels in parts)
        for each in val[::10]:  # whatever is not a matrix product is slow
            for shown in (each, each[:, ::-1]):
                most = max(most, float(((train & shown).sum((1, 2)) / (train | shown).sum((1, 2))).max()))
    assert 0.85 < most <= animal_mnist.ALIKE


@INSTALLED
def test_options() -> None:
    data = open_data("animal-mnist:classes=zebra+bear,size=16,channels=3,train=100,val=50")
    assert data.classes == ["zebra", "bear"]
    assert data.train.images.shape == (100, 3, 16, 16)
    assert (torch.bincount(data.train.labels) - 50).abs().max() <= 4
    every, other = open_data("animal-mnist"), open_data("animal-mnist:classes=zebra+bear,size=16,channels=3,train=100,val=50", seed=1)
    assert torch.equal(other.val.images, data.val.images)
    assert other.fingerprint != data.fingerprint
    assert data.mean == every.mean * 3
    zebras, bears = (every.train.images[every.train.labels == number] for number in (9, 0))
    whole = open_data("animal-mnist:classes=zebra+bear", seed=1)
    assert torch.equal(whole.train.images[whole.train.labels == 0], zebras)
    assert torch.equal(whole.train.images[whole.train.labels == 1], bears)
