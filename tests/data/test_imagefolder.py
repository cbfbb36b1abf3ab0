from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from stillhouse.data import open_data
from stillhouse.errors import UserError


def fill(folder: Path, **classes: int) -> Path:
    """A folder of small images, `cat=3` three of a class, each its own grey."""
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (6 + i, 9), (i, label, 7)).save(folder / name / f"{i:02}.png")
    return folder


def names(data: object) -> tuple[set[str], set[str]]:
    return set(data.train.names), set(data.val.names)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("train", "test"), ("training", "validation"), ("train", "valid")])
def test_two_folders(tmp_path: Path, train: str, val: str) -> None:
    fill(tmp_path / train, dog=3, cat=2)
    fill(tmp_path / val, dog=1, cat=1)
    data = open_data(f"imagefolder:{tmp_path}")
    assert (data.classes, data.channels, data.size, data.skipped) == (["cat", "dog"], 3, None, [])
    assert names(data) == (
        {f"{train}/cat/{i:02}.png" for i in range(2)} | {f"{train}/dog/{i:02}.png" for i in range(3)},
        {f"{val}/{c}/00.png" for c in ("cat", "dog")},
    )
    image, label = data.train[4]
    assert (image.mode, image.size, image.getpixel((0, 0)), label) == ("RGB", (8, 9), (2, 0, 7), 1)
    assert open_data(f"imagefolder:{tmp_path}:channels=1").train[0][0].mode == "L"


def test_one_folder_is_split_stratified_disjoint_and_always_alike(tmp_path: Path) -> None:
    fill(tmp_path, a=10, b=20, train=2)
    data, again = open_data(f"imagefolder:{tmp_path}"), open_data(f"imagefolder:{tmp_path}", seed=3)
    train, val = names(data)
    assert not train & val
    assert len(train | val) == 32
    assert names(again) == (train, val)
    assert again.fingerprint == data.fingerprint
    assert [data.val.labels.count(i) for i in range(3)] == [2, 4, 1]
    assert len(open_data(f"imagefolder:{tmp_path}:val=0.5").val) == 5 + 10 + 1


def test_a_train_folder_alone_is_split(tmp_path: Path) -> None:
    fill(tmp_path / "train", a=5, b=5)
    data = open_data(f"imagefolder:{tmp_path}")
    assert data.classes == ["a", "b"]
    assert (len(data.train), len(data.val)) == (8, 2)


def test_a_flat_validation_folder_is_not_passed_over(tmp_path: Path) -> None:
    fill(tmp_path / "train", a=5, b=5)
    fill(tmp_path, val=5)
    with pytest.raises(UserError, match="val' has no sub-folders"):
        open_data(f"imagefolder:{tmp_path}")


def test_the_fingerprint_is_of_names_and_sizes_and_not_of_the_place(tmp_path: Path) -> None:
    one, other = fill(tmp_path / "one", a=4, b=4), fill(tmp_path / "other", a=4, b=4)
    before = open_data(f"imagefolder:{one}").fingerprint
    assert before == open_data(f"imagefolder:{other}").fingerprint
    Image.new("RGB", (60, 60), "red").save(other / "a" / "00.png")
    assert before != open_data(f"imagefolder:{other}").fingerprint
    fill(one, a=5)
    assert before != open_data(f"imagefolder:{one}").fingerprint


def test_broken_images_are_named_and_refused_or_skipped(tmp_path: Path) -> None:
    fill(tmp_path / "train", a=4, b=4)
    fill(tmp_path / "val", a=2, b=2)
    whole = (tmp_path / "train/a/03.png").read_bytes()
    (tmp_path / "train/a/03.png").write_bytes(whole[:-30])
    (tmp_path / "train/b/01.png").write_bytes(b"")
    (tmp_path / "val/b/00.png").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError) as caught:
        open_data(f"imagefolder:{tmp_path}")
    for part in ("3 of 12", "train/a/03.png (", "train/b/01.png (it is empty)", "val/b/00.png (it is not an image)", "--bad-data skip"):
        assert part in str(caught.value)
    data = open_data(f"imagefolder:{tmp_path}", bad_data="skip")
    assert [name.split(" ")[0] for name in data.skipped] == ["train/a/03.png", "train/b/01.png", "val/b/00.png"]
    assert (len(data.train), len(data.val)) == (6, 3)
    assert not {"train/a/03.png", "train/b/01.png"} & names(data)[0]
    for i in range(6):
        data.train[i]


def test_an_image_that_breaks_later_is_named(tmp_path: Path) -> None:
    data = open_data(f"imagefolder:{fill(tmp_path, a=4, b=4)}")
    (tmp_path / data.train.names[0]).write_bytes(b"oops")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=rf"{data.train.names[0]}' cannot be read"):  # type: ignore[attr-defined]
        data.train[0]


def test_other_files_and_hidden_ones_are_no_images(tmp_path: Path) -> None:
    fill(tmp_path, a=3, b=3)
    (tmp_path / "a" / "notes.txt").write_text("hello")
    (tmp_path / "a" / "._00.png").write_bytes(b"what a desktop leaves behind")
    (tmp_path / ".cache").mkdir()
    data = open_data(f"imagefolder:{tmp_path}")
    assert data.classes == ["a", "b"]
    assert len(data.train) + len(data.val) == 6


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        ({}, "has no sub-folders"),
        ({"a": 3, "b": 0}, "class 'b' has no image in"),
        ({"a": 3, "b": 1}, "class 'b' has one image, expected at least two"),
        ({"a": 3}, "expected at least two"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "val/c": 1}, r"differ \(only in the first: b; only in the second: c\)"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 0}, "class 'b' has no image in"),
    ],
)
def test_folders_that_cannot_work_are_refused(tmp_path: Path, folders: dict[str, int], says: str) -> None:
    fill(tmp_path, **folders)
    with pytest.raises(UserError, match=says):
        open_data(f"imagefolder:{tmp_path}")


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    fill(tmp_path, a=2, b=2)
    for file in (tmp_path / "b").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="class 'b' has no readable image left"):
        open_data(f"imagefolder:{tmp_path}", bad_data="skip")
    for file in (tmp_path / "a").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"4 of 4 images cannot be read.*expected at least one"):
        open_data(f"imagefolder:{tmp_path}", bad_data="skip")
