from __future__ import annotations

import random
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stillhouse.data import Data, open_data
from stillhouse.data.voc import CLASSES, open_voc
from stillhouse.errors import UserError

Object = tuple[str, float, float, float, float]


def xml(name: str, objects: list[Object], size: tuple[int, int] = (20, 10), difficult: int = 0) -> str:
    body = "".join(
        f"<object><name>{kind}</name><difficult>{difficult}</difficult><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        f"<bndbox><xmax>{x2}</xmax><xmin>{x1}</xmin><ymin>{y1}</ymin><ymax>{y2}</ymax></bndbox></object>"
        for kind, x1, y1, x2, y2 in objects
    )
    return f"<annotation><filename>{name}</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>{body}</annotation>"


def write(image: Path, annotation: Path, objects: list[Object], size: tuple[int, int] = (20, 10), **how: Any) -> None:
    for path in (image, annotation):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10)).save(image)
    annotation.write_text(xml(image.name, objects, size, **how))


def devkit(root: Path, objects: list[Object], **lists: list[str]) -> Path:
    (root / "ImageSets/Main").mkdir(parents=True)
    for name, stems in lists.items():
        (root / f"ImageSets/Main/{name}.txt").write_text("".join(f"{stem}  1\n" for stem in stems))
        for stem in stems:
            write(root / f"JPEGImages/{stem}.jpg", root / f"Annotations/{stem}.xml", objects)
    return root


def names(data: Data) -> tuple[list[str], list[str]]:
    return [Path(name).stem for name in data.train.names], [Path(name).stem for name in data.val.names]  # type: ignore[attr-defined]


def test_coordinates_count_from_one_and_hold_their_last_pixel(tmp_path: Path) -> None:
    devkit(tmp_path, [("dog", 1, 1, 20, 10), ("cat", 3, 4, 3, 4)], train=["a", "b"], val=["c"])
    data = open_data(f"voc:{tmp_path}")
    assert (data.task, data.classes, data.skipped) == ("detect", list(CLASSES), [])
    assert names(data) == (["a", "b"], ["c"])
    image, target = data.train[0]
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert target["boxes"].tolist() == [[0, 0, 20, 10], [2, 3, 3, 4]]
    assert [data.classes[label - 1] for label in target["labels"]] == ["dog", "cat"]
    as_it_stands = open_voc(f"{tmp_path}:origin=0", bad_data="skip")
    assert as_it_stands.train[0][1]["boxes"].tolist() == [[1, 1, 20, 10]]
    assert as_it_stands.fingerprint != data.fingerprint


def test_difficult_objects_count_neither_way(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", tmp_path / "a.xml", [("ant", 1, 1, 5, 5)], difficult=1)
    write(tmp_path / "b.jpg", tmp_path / "b.xml", [("ant", 1, 1, 5, 5)])
    data = open_voc(str(tmp_path))
    both = [bool(target["iscrowd"]) for _, target in (*data.train, *data.val)]
    assert sorted(both) == [False, True]


@pytest.mark.parametrize(
    ("lists", "options", "train", "val"),
    [
        ({"train": "ab", "val": "c", "trainval": "abc"}, "", "ab", "c"),
        ({"trainval": "ab", "test": "c"}, "", "ab", "c"),
        ({"train": "ab", "val": "c", "trainval": "abc", "test": "d"}, ":train=trainval", "abc", "d"),
        ({"train": "ab", "val": "c", "few": "a"}, ":train=few", "a", None),
        ({"train": "ab", "val": "c", "few": "a"}, ":train=few,val=val", "a", "c"),
        ({"train": "abcd"}, ":val=0.5", None, None),
    ],
)
def test_lists(tmp_path: Path, lists: dict[str, str], options: str, train: str | None, val: str | None) -> None:
    devkit(tmp_path, [("dog", 1, 1, 5, 5)], **{name: list(stems) for name, stems in lists.items()})
    if train and not val:
        with pytest.raises(UserError, match="has one image"):
            open_voc(f"{tmp_path}{options}")
        return
    found = names(open_voc(f"{tmp_path}{options}"))
    if train and val:
        assert found == (list(train), list(val))
    assert not set(found[0]) & set(found[1])


def test_lists_that_cannot_be(tmp_path: Path) -> None:
    devkit(tmp_path, [("dog", 1, 1, 5, 5)], train=["a", "b"], trainval=["a", "b", "c"], val=["c"])
    for options, says in (
        ("train=trainval,val=val", "1 images .* are both to train and to validate, such as 'JPEGImages/c.jpg'"),
        ("train=train,val=train", "the list 'train' is to train and to validate"),
        ("train=x", "x.txt' cannot be read"),
        ("task=segment", "ImageSets/Segmentation' has no train.txt"),
        ("task=classify", "the task is classify, expected detect or segment"),
        ("origin=2", "origin=2 is out of range"),
    ):
        with pytest.raises(UserError, match=says):
            open_voc(f"{tmp_path}:{options}")
    with pytest.raises(UserError, match="the task is detect and segment, expected"):
        open_voc(f"{tmp_path}:task=detect", task="segment")
    (tmp_path / "ImageSets/Main/val.txt").write_text("c\n../../c\nnowhere\n")
    with pytest.raises(UserError, match=r"2 things are wrong .*'../../c' \(it is listed, but has no XML file\); 'nowhere' \(it is listed"):
        open_voc(str(tmp_path))
    assert names(open_voc(str(tmp_path), bad_data="skip"))[1] == ["c"]


@pytest.mark.parametrize(("images", "files"), [("", ""), ("images/", "annotations/"), ("JPEGImages/", "Annotations/"), ("images/", "")])
@pytest.mark.parametrize("parts", [("",), ("train/", "valid/")])
def test_plain_folders(tmp_path: Path, images: str, files: str, parts: tuple[str, ...]) -> None:
    for part in parts:
        for i in range(4):
            objects: list[Object] = [(("zebra", "ant")[i % 2], 1, 1, 5, 5)] * i
            write(tmp_path / f"{part}{images}{part[:1]}{i}.png", tmp_path / f"{part}{files}{part[:1]}{i}.xml", objects)
    data = open_voc(str(tmp_path))
    assert data.classes == ["ant", "zebra"]
    assert sum(map(len, names(data))) == 4 * len(parts)
    boxes = [len(target["labels"]) for _, target in (*data.train, *data.val)]
    assert sorted(boxes) == sorted([0, 1, 2, 3] * len(parts))  # the one without objects is kept


def test_an_image_is_found_by_its_xml_files_name_or_by_what_that_says(tmp_path: Path) -> None:
    for stem in "ab":
        write(tmp_path / f"{stem}.png", tmp_path / f"{stem}.xml", [("ant", 1, 1, 5, 5)])
    (tmp_path / "a.xml").write_text(xml("b.png", [("ant", 1, 1, 5, 5)]))  # a renamed pair, the old name inside
    (tmp_path / "b.xml").rename(tmp_path / "other.xml")
    assert sorted(chain(*names(open_voc(str(tmp_path))))) == ["a", "b"]
    (tmp_path / "more.xml").write_text(xml("b.png", []))
    with pytest.raises(UserError, match=r"other.xml \(more.xml has its image 'b.png' too\)"):
        open_voc(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "says", "left"),
    [
        (xml("0.png", [("ant", 5, 5, 3, 6)]), "0.xml: object 1 'ant' (its box from (4, 4) to (3, 6) has no area)", 4),
        (xml("0.png", [("ant", 5, 5, 30, 6)]), "its box from (4, 4) to (30, 6) reaches out of the image of 20 x 10, to which", 4),
        (xml("0.png", [("ant", 50, 5, 60, 6)]), "object 1 'ant' (its box from (49, 4) to (60, 6) has no area in the image", 4),
        (xml("0.png", [("ant", float("nan"), 5, 8, 6)]), "is not of finite numbers", 4),
        (xml("0.png", [("ant", "x", 5, 8, 6)]), "0.xml: object 1 (it has no box of four numbers)", 4),  # type: ignore[list-item]
        (xml("0.png", [("", 1, 1, 2, 2)]), "0.xml: object 1 (it has no name)", 4),
        (xml("0.png", [("ant", 1, 1, 2, 2)], (21, 10)), "0.xml: 0.png (it is 20 x 10, but annotated as 21 x 10)", 3),
        (xml("0.png", [("ant", 1, 1, 2, 2)], (-1, 10)), "0.xml (its size is -1 x 10, expected numbers of pixels)", 3),
        ("<annotation>", "0.xml (no element found", 3),
        ("", "0.xml (no element found", 3),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "0.xml (unknown encoding", 3),
        ("<html/>", "0.xml (it is <html>, expected Pascal VOC's <annotation>)", 3),
        ('<!DOCTYPE a [<!ENTITY a "b">]><annotation>&a;</annotation>', "0.xml (it declares a document type", 3),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "0.xml (it declares a document type", 3),
    ],
)
def test_what_is_wrong_is_named_and_refused_or_left_out(tmp_path: Path, text: str, says: str, left: int) -> None:
    for i in range(4):
        write(tmp_path / f"{i}.png", tmp_path / f"{i}.xml", [("ant", 1, 1, 5, 5)])
    (tmp_path / "0.xml").write_text(text)
    with pytest.raises(UserError, match="wrong in") as caught:
        open_voc(str(tmp_path))
    assert says in str(caught.value)
    data = open_voc(str(tmp_path), bad_data="skip")
    assert says in " ".join(data.skipped)
    assert sum(map(len, names(data))) == left


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_that_would_fill_the_memory_are_not_expanded(tmp_path: Path, encoding: str) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.png", tmp_path / f"{i}.xml", [("ant", 1, 1, 5, 5)])
    entities = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(12))
    bomb = f'<!DOCTYPE a [<!ENTITY e0 "laughter">{entities}]><annotation>&e12;</annotation>'
    (tmp_path / "0.xml").write_bytes(bomb.encode(encoding))
    with pytest.raises(UserError, match="declares a document type, which no annotation needs"):
        open_voc(str(tmp_path))


def test_images_and_files_without_each_other_are_named(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / f"{i}.png", tmp_path / f"{i}.xml", [("ant", 1, 1, 5, 5)])
    (tmp_path / "0.xml").unlink()
    (tmp_path / "1.png").unlink()
    data = open_voc(str(tmp_path), bad_data="skip")
    assert data.skipped == ["1.xml (it has no image, neither '1' nor '1.png')", "0.png (it has no XML file)"]
    for i in range(4):
        (tmp_path / f"{i}.xml").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no XML files, expected"):
        open_voc(str(tmp_path))


def test_sizes_of_nought_and_images_without_objects(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.png", tmp_path / f"{i}.xml", [], (0, 0))
    with pytest.raises(UserError, match="has no objects"):
        open_voc(str(tmp_path))
    write(tmp_path / "3.png", tmp_path / "3.xml", [("ant", 1, 1, 25, 5)], (0, 0))
    with pytest.raises(UserError, match="reaches out of the image of 20 x 10"):
        open_voc(str(tmp_path))


def test_masks_are_read_when_the_task_is_to_segment(tmp_path: Path) -> None:
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    for name, stems in (("train", "ab"), ("val", "c")):
        (tmp_path / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(stems))
        for stem in stems:
            write(tmp_path / f"JPEGImages/{stem}.jpg", tmp_path / f"Annotations/{stem}.xml", [])
            mask = Image.fromarray(np.full((10, 20), 12, np.uint8), "L") if stem != "b" else Image.new("L", (20, 10), 255)
            (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
            mask.convert("P").save(tmp_path / f"SegmentationClass/{stem}.png")
    for data in (open_data(f"voc:{tmp_path}:task=segment"), open_data(f"voc:{tmp_path}", task="segment")):
        assert (data.task, data.classes) == ("segment", ["background", *CLASSES])
        assert [mask.unique().tolist() for _, mask in (*data.train, *data.val)] == [[12], [255], [12]]
    Image.new("L", (20, 10), 21).save(tmp_path / "SegmentationClass/b.png")
    with pytest.raises(UserError, match=r"SegmentationClass/b.png \(it has the value 21, expected 0 to 20, 255\)"):
        open_voc(f"{tmp_path}:task=segment")
    (tmp_path / "SegmentationClass/b.png").unlink()
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("c\nd")
    skipped = open_voc(f"{tmp_path}:task=segment", bad_data="skip").skipped
    assert skipped == ["JPEGImages/b.jpg (it has no mask)", "val.txt: 'd' (there is no such image)"]


@settings(max_examples=60, deadline=None)
@given(st.integers(), st.integers(1, 30))
def test_any_corruption_is_said_or_left_out_and_nothing_else(seed: int, changes: int) -> None:
    noise = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3):
            write(Path(folder, f"{i}.png"), Path(folder, f"{i}.xml"), [("ant", 1, 1, 5, 5), ("bee", 3, 3, 9, 9)])
        text = bytearray(Path(folder, "0.xml").read_bytes())
        for _ in range(changes):
            text[noise.randrange(len(text))] = noise.choice([*b"<>/&;09-.e", 0, 255, noise.randrange(256)])
        Path(folder, "0.xml").write_bytes(text)
        data = open_voc(folder, bad_data="skip")
        for image, target in (*data.train, *data.val):
            assert (target["boxes"][:, :2] < target["boxes"][:, 2:]).all()
            assert (target["boxes"] >= 0).all()
            assert (target["boxes"][:, 2] <= image.width).all()
        if data.skipped:
            with pytest.raises(UserError):
                open_voc(folder)
        else:
            assert open_voc(folder).fingerprint == data.fingerprint
