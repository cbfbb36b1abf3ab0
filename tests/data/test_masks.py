from __future__ import annotations

import pickle
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stillhouse.data import Data, open_data
from stillhouse.data.masks import UNKNOWN, number_table, open_masks, read_mask
from stillhouse.errors import UserError


def pair(root: Path, image: str, mask: str, values: Any = None, mode: str = "L") -> None:
    """An image of 8 x 6 pixels and its mask, of the classes 0 to 2 if nothing is said."""
    values = np.arange(48, dtype=np.uint8).reshape(6, 8) % 3 if values is None else np.asarray(values, np.uint8)
    for name, picture in ((image, Image.new("RGB", (8, 6), (7, 8, 9))), (mask, Image.fromarray(values))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name == mask and mode == "P":
            picture.putpalette([value for i in range(256) for value in (255 - i, 3, i)])
        (picture if name == image or mode == "P" else picture.convert(mode)).save(root / name)


def fill(root: Path, count: int = 5, **how: Any) -> Path:
    for i in range(count):
        pair(root, f"images/{i}.jpg", f"masks/{i}.png", **how)
    return root


def images(data: Data) -> tuple[list[str], list[str]]:
    return tuple([Path(pair.image).name for pair in part.pairs] for part in (data.train, data.val))  # type: ignore[attr-defined,return-value]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (("images/train", "masks/train"), ("images/val", "masks/val")),
        (("images/training", "annotations/training"), ("images/validation", "annotations/validation")),
        (("train/images", "train/masks"), ("val/images", "val/masks")),
        (("train/images", "train/labels"), ("test/images", "test/labels")),
    ],
)
def test_layouts(tmp_path: Path, train: tuple[str, str], val: tuple[str, str]) -> None:
    for i, end in enumerate(("", "_mask", "_labels", "_gt")):
        pair(tmp_path, f"{train[0]}/{i}.jpg", f"{train[1]}/{i}{end}.png")
    pair(tmp_path, f"{val[0]}/city/a_mask.jpg", f"{val[1]}/city/a_mask.png")
    data = open_data(f"masks:{tmp_path}")
    assert (data.task, data.classes, data.size, data.skipped) == ("segment", ["class 0", "class 1", "class 2"], None, [])
    assert images(data) == (["0.jpg", "1.jpg", "2.jpg", "3.jpg"], ["a_mask.jpg"])
    image, mask = data.val[0]
    assert (image.mode, image.size, mask.shape, mask.dtype) == ("RGB", (8, 6), (6, 8), torch.uint8)
    assert torch.equal(mask.flatten(), torch.arange(48, dtype=torch.uint8) % 3)


def test_one_folder_is_split_and_always_alike(tmp_path: Path) -> None:
    data, again = open_data(f"masks:{fill(tmp_path, 10)}"), open_data(f"masks:{tmp_path}", seed=4)
    assert (len(data.train), len(data.val)) == (8, 2)
    assert (images(data), data.fingerprint) == (images(again), again.fingerprint)
    assert len(open_data(f"masks:{tmp_path}:val=0.5").val) == 5
    assert len(list(pickle.loads(pickle.dumps(data.train)))) == 8


def test_every_kind_of_mask_gives_its_numbers(tmp_path: Path) -> None:
    numbers = number_table(range(3))
    values = np.array([[0, 1], [2, 255]], np.uint8)
    palette = Image.fromarray(values)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    for name, mask in (
        ("grey.png", Image.fromarray(values)),
        ("palette.png", palette),
        ("deep.png", Image.fromarray(values.astype(np.uint16))),
        ("wide.tif", Image.fromarray(values.astype(np.int32))),
        ("grey.bmp", Image.fromarray(values)),
    ):
        mask.save(tmp_path / name)
        assert np.array_equal(read_mask(tmp_path / name, numbers), values), name
    Image.fromarray(values > 0).save(tmp_path / "two.png")
    assert read_mask(tmp_path / "two.png", numbers).tolist() == [[0, 1], [1, 1]]


@given(st.lists(st.integers(0, 255), min_size=2, max_size=40, unique=True), st.integers(0, 255))
def test_the_table_knows_classes_and_what_is_ignored_and_nothing_else(values: list[int], ignored: int) -> None:
    table = number_table(values)
    assert [int(table[value]) for value in values] == list(range(len(values)))
    assert {value for value in range(256) if table[value] == UNKNOWN} == set(range(255)) - set(values)
    assert number_table(values, ignored)[ignored] == 255


def test_classes_are_named_by_a_file_or_counted_by_an_option(tmp_path: Path) -> None:
    fill(tmp_path)
    assert open_masks(f"{tmp_path}:classes=5").classes == [f"class {i}" for i in range(5)]
    (tmp_path / "classes.txt").write_text("\ufeffsky\n sea \n\nsand\n", encoding="utf-8")
    assert open_masks(f"{tmp_path}").classes == open_masks(f"{tmp_path}:classes=3").classes == ["sky", "sea", "sand"]
    with pytest.raises(UserError, match=r"so many classes: 5 by classes, 3 by classes.txt"):
        open_masks(f"{tmp_path}:classes=5")
    for text, says in (
        ("a\nb\na", "a name twice"),
        ("\n", "no names"),
        ("a", "out of range"),
        ("\n".join(map(str, range(300))), "out of range"),
    ):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=says):
            open_masks(str(tmp_path))
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read"):
        open_masks(str(tmp_path))


def test_values_stand_for_classes_and_are_ignored_as_told(tmp_path: Path) -> None:
    fill(tmp_path, values=np.repeat([[0, 255]], 24, 0).reshape(6, 8))
    with pytest.raises(UserError, match=r"no class number but 0, .* say masks:DIR:values=\[0,255\]"):
        open_masks(str(tmp_path))
    data = open_masks(f"{tmp_path}:values=[0,255]")
    assert data.classes == ["class 0", "class 1"]
    assert data.train[0][1].unique().tolist() == [0, 1]
    assert data.fingerprint != open_masks(f"{tmp_path}:values=[255,0]").fingerprint
    fill(tmp_path, values=np.arange(48).reshape(6, 8) % 4)
    assert open_masks(f"{tmp_path}:ignore=3").classes == ["class 0", "class 1", "class 2"]
    assert open_masks(f"{tmp_path}:ignore=0").train[0][1].unique().tolist() == [1, 2, 3, 255]
    assert open_masks(f"{tmp_path}:ignore=3,classes=3").train[0][1].unique().tolist() == [0, 1, 2, 255]
    assert open_masks(f"{tmp_path}:ignore=0,values=[3,2,1]").train[0][1].flatten()[:4].tolist() == [255, 2, 1, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("values=[0]", "expected the value of each class"),
        ("values=[0,0]", "expected the value of each class"),
        ("values=[0,256]", "expected the value of each class"),
        ("values=[0,[]]", "expected the value of each class"),
        ("values=[0,1],ignore=1", "ignore=1 is among"),
        ("values=[0,1],classes=3", "so many classes: 3 by classes, 2 by values"),
        ("ignore=256", "out of range"),
        ("classes=1", "out of range"),
        ("classes=256", "out of range"),
        ("val=1.5", "out of range"),
        ("labels=3", "no option 'labels'"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_masks(f"{fill(tmp_path)}:{options}")


def test_what_is_wrong_is_named_and_refused_or_left_out(tmp_path: Path) -> None:
    fill(tmp_path, 12)
    (tmp_path / "masks/0.png").unlink()
    (tmp_path / "images/1.jpg").unlink()
    Image.new("L", (8, 7)).save(tmp_path / "masks/2.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "masks/3.png")
    Image.new("L", (8, 6), 9).save(tmp_path / "masks/4.png")
    (tmp_path / "images/5.jpg").write_bytes(b"")
    (tmp_path / "masks/6.png").write_bytes(b"no")
    (tmp_path / "masks/7.png").unlink()
    Image.new("L", (8, 6)).save(tmp_path / "masks/7.jpg")
    Image.new("RGB", (8, 6)).save(tmp_path / "images/8.png")
    faults = {
        "images/0.jpg (it has no mask)",
        "masks/1.png (it has no image)",
        "images/2.jpg (it is 8 x 6, but annotated as 8 x 7)",
        "masks/3.png (its pixels are RGB colours, expected one class number a pixel, a palette or grey image)",
        "masks/4.png (it has the value 9, expected 0 to 2, 255)",
        "images/5.jpg (it is empty)",
        "masks/6.png (it is not an image)",
        "masks/7.jpg (it is a JPEG, which does not keep class numbers, expected PNG)",
        "images/8.jpg, images/8.png, masks/8.png (it cannot be told which mask is of which image)",
    }
    with pytest.raises(UserError, match="9 things are wrong"):
        open_masks(f"{tmp_path}:classes=3")
    data = open_masks(f"{tmp_path}:classes=3", bad_data="skip")
    assert set(data.skipped) == faults
    assert sorted(chain(*images(data))) == ["10.jpg", "11.jpg", "9.jpg"]
    assert set(open_masks(str(tmp_path), bad_data="skip").skipped) == faults - {"masks/4.png (it has the value 9, expected 0 to 2, 255)"}


def test_a_value_outside_the_sample_stops_when_it_is_read(tmp_path: Path) -> None:
    fill(tmp_path, 130)
    Image.new("L", (8, 6), 9).save(tmp_path / "masks/10.png")
    data = open_masks(f"{tmp_path}:classes=3,val=0.1")
    train, val = images(data)
    part, i = (data.train, train.index("10.jpg")) if "10.jpg" in train else (data.val, val.index("10.jpg"))
    with pytest.raises(UserError, match=r"masks/10.png' cannot be used \(it has the value 9, expected 0 to 2, 255\)"):
        part[i]
    assert len(open_masks(f"{tmp_path}:classes=3", bad_data="skip").skipped) == 1
    Image.new("L", (8, 6), 9).save(tmp_path / "masks/0.png")  # the first is in every sample
    with pytest.raises(UserError, match="1 thing is wrong"):
        open_masks(f"{tmp_path}:classes=3")


def test_deep_masks_with_values_that_are_no_classes(tmp_path: Path) -> None:
    fill(tmp_path)
    Image.fromarray(np.full((6, 8), 1000, np.uint16)).save(tmp_path / "masks/0.png")
    for options, says in (
        ("", "it has the values 1000 to 1000, expected class numbers from 0 to 254"),
        (":classes=3", "has the value 1000, exp"),
    ):
        with pytest.raises(UserError, match=says):
            open_masks(f"{tmp_path}{options}")
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) + 10).save(tmp_path / "masks/0.png")
    with pytest.raises(UserError, match="it has the value 10, 11, 12, 13, 14, …, expected"):
        open_masks(f"{tmp_path}:classes=3")


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        ((), "no folders of images and masks to train with"),
        (("images",), "no folders of images and masks to train with"),
        (("images/train", "masks/val"), "there is '.*images/train' but no such folder of masks"),
        (("train/images", "train/masks", "val/masks"), "there is '.*val/masks' but no such folder of images"),
        (("images/val", "masks/val"), "no folders of images and masks to train with"),
        (("images", "masks"), "no class number but 0"),
    ],
)
def test_folders_that_cannot_be(tmp_path: Path, folders: tuple[str, ...], says: str) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=says):
        open_masks(str(tmp_path))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_masks_are_read_back(choice: st.DataObject) -> None:
    classes = choice.draw(st.integers(2, 255))
    mode = choice.draw(st.sampled_from(["L", "P"]))
    written = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3):
            values = choice.draw(st.lists(st.integers(0, classes - 1) | st.just(255), min_size=48, max_size=48))
            written.append(np.array(values, np.uint8).reshape(6, 8))
            pair(Path(folder), f"images/{i}.png", f"masks/{i}.png", written[-1], mode)
        data = open_masks(f"{folder}:classes={classes}", bad_data="skip")
        assert data.skipped == []
        for part in (data.train, data.val):
            for (image, _), (_, mask) in zip(part.pairs, part, strict=True):  # type: ignore[attr-defined]
                assert np.array_equal(mask.numpy(), written[int(Path(image).stem)])
