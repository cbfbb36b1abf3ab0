from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.data import animal_mnist, composed, fashion_mnist, installed, open_data, scenes, sprites
from stillhouse.data.scenes import Scenes, open_scenes
from stillhouse.errors import UserError
from tests.composed import fewer_are_the_first_of_more

# of image, mask and boxes: scenes are the same on every machine
SHA256 = {
    ("train", 0, 0): "dc3ddfdac1512894bc14e534fd50e966dec237e390373b580f5c645a9fe27ea5",
    ("train", 0, 149): "9b4e57416cc3c1d6593be3b1f7dd26d5caf90414acc783e1cd655c2cab231b0c",
    ("train", 1, 0): "4e9e04cc1661bb2bc76a692ba3176f6b72f88791b3c17767259672531ccd7d3f",
    ("val", 0, 0): "9fdd64a6db291f9388babd0df9ec1aaf027a67f0577290eb94ea94f3b2419c61",
    ("val", 5, 7): "57a40575a7fb865d9349976fd4557ebf78f1cca057f9afbc5ef9a4b30fc6374c",
}


def digest(part: str, seed: int, i: int) -> str:
    masks, boxes = (getattr(open_scenes("train=150,val=8", seed=seed, task=task), part)[i] for task in ("segment", "detect"))
    assert torch.equal(masks[0], boxes[0])
    tensors = [masks[0], masks[1], boxes[1]["boxes"].int(), boxes[1]["labels"].int()]
    return hashlib.sha256(b"".join(tensor.numpy().astype("<i4").tobytes() for tensor in tensors)).hexdigest()


def rows(shapes: np.ndarray) -> set[bytes]:
    return {shape.tobytes() for shape in shapes}


def has(package: str) -> bool:
    try:
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


@pytest.mark.parametrize("place", SHA256)
def test_scenes_are_these_everywhere(place: tuple[str, int, int]) -> None:
    assert digest(*place) == SHA256[place]


def test_fewer_scenes_are_the_first_of_more_and_val_is_always_the_same() -> None:
    fewer_are_the_first_of_more(open_scenes)


def test_nothing_of_a_validation_scene_is_in_a_training_scene() -> None:
    assert not set(scenes.PHOTOGRAPHS["train"]) & set(scenes.PHOTOGRAPHS["val"])
    digits = sprites.open_sprites("digits")
    assert not rows(digits.train[0]) & rows(digits.val[0])
    assert len(digits.train[0]) + len(digits.val[0]) == 1797


def test_boxes_are_tight_around_what_is_seen_and_masks_hold_nothing_else() -> None:
    data, masks = open_scenes("objects=6,train=60", task="detect"), open_scenes("objects=6,train=60,task=segment")
    counts = set()
    for i in range(60):
        image, owner, labels = data.train.compose(i)
        target, mask = data.train[i][1], masks.train[i][1]
        assert torch.equal(torch.from_numpy(image).permute(2, 0, 1), masks.train[i][0])
        assert target["labels"].tolist() == labels
        assert (target["boxes"].dtype, mask.dtype) == (torch.float32, torch.uint8)
        for number, (label, box) in enumerate(zip(labels, target["boxes"].long().tolist(), strict=True)):
            pixels = np.argwhere(owner == number)
            assert [*pixels.min(0)[::-1], *(pixels.max(0)[::-1] + 1)] == box
            assert (mask[torch.from_numpy(owner == number)] == label).all()
        assert torch.equal(mask == 0, torch.from_numpy(owner == -1))
        counts.add(len(labels))
    assert min(counts) >= 1
    assert 3 < max(counts) <= 6
    assert (masks.classes, data.classes) == (["background", "0", "1", "2", "3"], ["0", "1", "2", "3"])


def test_an_object_is_there_with_two_fifths_of_it_or_not_at_all() -> None:
    owner = np.array([[0, 0, -1], [1, -1, -1]], np.int32)
    assert scenes._enough(owner, [5, 2])
    assert not scenes._enough(owner, [6, 2])
    assert not scenes._enough(owner, [2, 1, 1])  # the third is nowhere
    crowded = open_scenes("objects=16,size=32,train=30", task="detect")
    assert all(1 <= len(crowded.train[i][1]["labels"]) <= 16 for i in range(30))


def test_a_shape_is_turned_exactly_where_pixels_fall_on_pixels() -> None:
    shape = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    for quarters in range(-1, 3):
        alpha, grey = scenes._turned(shape, 8, 90 * quarters, 64)
        expected = np.rot90(np.pad(shape, 1), -quarters).astype(np.int32)
        assert np.array_equal(grey, expected)
        assert np.array_equal(alpha, ((expected - 64) * 4).clip(0, 256))
    assert scenes._turned(np.full((8, 8), 200, np.uint8), 24, 30, 64)[0].max() == 256


def test_only_a_shape_itself_changes_the_ground_and_not_by_a_colour_like_it() -> None:
    train = open_scenes("train=1").train
    for seed in range(20):
        draws = composed.Draws(seed)
        ground = train._ground(draws)
        stencil, corner = train._stencil(train._sprite(draws)[0], draws), (60, -5)
        canvas = ground.copy()
        train._paint(canvas, draws, stencil, corner)
        there, part = scenes._window(96, len(stencil[0]), corner)
        covered = np.zeros((96, 96), np.int32)
        covered[there] = stencil[0][part]
        assert np.array_equal(canvas[covered == 0], ground[covered == 0])
        assert np.abs(canvas[covered == 256].mean(0) - ground[covered == 256].mean(0)).sum() > 40


def test_a_window_is_what_of_a_square_lies_on_the_canvas() -> None:
    whole, corners = np.arange(36).reshape(6, 6), [(0, 0), (-4, 2), (7, -5), (9, 9), (2, 3)]
    for corner in corners:
        canvas, wide = np.full((10, 10), -1), np.full((30, 30), -1)
        there, part = scenes._window(10, 6, corner)
        canvas[there] = whole[part]
        wide[10 + corner[0] : 16 + corner[0], 10 + corner[1] : 16 + corner[1]] = whole
        assert np.array_equal(canvas, wide[10:20, 10:20])


def test_options() -> None:
    data = open_scenes("size=48,classes=10,noise=0,clutter=0,objects=1,train=40,val=3")
    assert data.train[0][0].shape == (3, 48, 48)
    assert data.train[0][0].dtype == torch.uint8
    assert (data.size, data.channels, len(data.classes), data.task) == (48, 3, 11, "segment")
    assert all(len(data.train[i][1].unique()) == 2 for i in range(40))  # one object, so one class and the background
    assert {int(data.train[i][1].max()) for i in range(40)} >= set(range(2, 10))
    assert open_data("scenes:train=2,val=2", task="detect").task == "detect"
    assert open_data("scenes:train=2,val=2,task=detect").name == "scenes:train=2,val=2,task=detect"


@pytest.mark.parametrize(
    ("text", "task", "message"),
    [
        ("sprites=digit", None, "no sprites 'digit', did you mean 'digits'"),
        ("size=16", None, "size=16 is out of range, expected 32 to 256"),
        ("objects=0", None, "objects=0 is out of range"),
        ("train=0", None, "train=0 is out of range"),
        ("task=classify", None, "no task 'classify', expected task=detect or task=segment"),
        ("task=segment", "detect", "scenes:task=segment are asked to detect"),
        ("trian=5", None, "did you mean 'train'"),
    ],
)
def test_what_cannot_be_is_said(text: str, task: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_scenes(text, task=task)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(installed, "distribution", nothing)
    with pytest.raises(UserError, match=r"sprites=animals needs files of the package 'animal-mnist': pip install --no-deps animal-mnist$"):
        open_scenes("sprites=animals")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"needs '.*skimage/data/nebula.png', which the installed 'scikit-image' has not"):
        installed.installed_files("scikit-image", "skimage/data/nebula.png", need="a scene's ground")
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        open_scenes("sprites=fashion-mnist")


@pytest.mark.skipif(not has("animal-mnist"), reason="needs animal-mnist: pip install --no-deps animal-mnist")
def test_animals_are_all_different() -> None:
    animals = sprites.open_sprites("animals")
    shapes = np.concatenate([animals.train[0], animals.val[0]])
    assert len(shapes) == len(rows(shapes)) == 9716
    assert set(np.unique(animals.val[1])) == set(range(10))
    data = open_scenes("sprites=animals,classes=10,train=5,val=5", task="detect")
    assert data.classes == animal_mnist.CLASSES
    assert isinstance(data.val, Scenes)


@pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_clothes() -> None:
    data = open_scenes("sprites=fashion-mnist,classes=10,train=5,val=5")
    assert data.classes == ["background", *fashion_mnist.CLASSES]
    assert int(data.train[0][1].max()) > 0
