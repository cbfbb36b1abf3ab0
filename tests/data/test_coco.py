from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stillhouse.data import Data, open_data
from stillhouse.data.coco import open_coco
from stillhouse.errors import UserError

Json = dict[str, Any]
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 44, "name": "cup"}]


def content(count: int = 3, start: int = 1) -> Json:
    """Image i is 20 + i by 10 pixels and has i - start boxes."""
    images = [{"id": i, "file_name": f"{i:03}.png", "width": 20 + i, "height": 10} for i in range(start, start + count)]
    owners = [(i, j) for i in range(start, start + count) for j in range(i - start)]
    boxes = [
        {"id": 100 + n, "image_id": i, "category_id": (3, 18)[n % 2], "bbox": [j, 1, 5.5, 4], "area": 22, "iscrowd": n % 2}
        for n, (i, j) in enumerate(owners)
    ]
    return {"images": images, "annotations": boxes, "categories": copy.deepcopy(CATEGORIES), "info": {"year": 2017}}


def write(root: Path, file: str, folder: str, text: Json) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(text))
    for image in text["images"]:
        Image.new("RGB", (image["width"], image["height"]), (image["id"], 0, 0)).save(root / folder / image["file_name"])


def coco(root: Path, **change: Any) -> Path:
    """COCO's layout; `images=lambda images: …` and so on changes a list of the training file after its images are written."""
    text = content()
    write(root, "annotations/instances_train2017.json", "train2017", text)
    write(root, "annotations/instances_val2017.json", "val2017", content(2, 8))
    for name, alter in change.items():
        alter(text[name])
    (root / "annotations/instances_train2017.json").write_text(json.dumps(text))
    return root


def names(data: Data) -> tuple[list[str], list[str]]:
    return data.train.names, data.val.names  # type: ignore[attr-defined]


def test_boxes_and_labels(tmp_path: Path) -> None:
    data = open_data(f"coco:{coco(tmp_path)}")
    assert (data.task, data.classes, data.size, data.skipped) == ("detect", ["car", "dog", "cup"], None, [])
    assert names(data) == ([f"train2017/00{i}.png" for i in (1, 2, 3)], [f"val2017/00{i}.png" for i in (8, 9)])
    image, target = data.train[2]
    assert (image.size, image.getpixel((0, 0))) == ((23, 10), (3, 0, 0))
    assert target["boxes"].tolist() == [[0, 1, 5.5, 5], [1, 1, 6.5, 5]]
    assert target["labels"].tolist() == [2, 1]
    assert target["iscrowd"].tolist() == [True, False]
    assert data.train[0][1]["boxes"].shape == (0, 4)  # nothing on it, and kept


@pytest.mark.parametrize(
    ("train", "train_images", "val", "val_images"),
    [
        ("annotations/instances_train.json", "images/train", "annotations/instances_val.json", "images/val"),
        ("annotations/instances_train2014.json", "images/train2014", "annotations/instances_val2014.json", "images/val2014"),
        ("annotations/instances_train.json", "train", "annotations/instances_val.json", "val"),
        ("annotations/train.json", "images", "annotations/val.json", "images"),
        ("train/_annotations.coco.json", "train", "valid/_annotations.coco.json", "valid"),
        ("train/labels.json", "train", "test/labels.json", "test"),
        ("train.json", ".", "val.json", "."),
    ],
)
def test_layouts(tmp_path: Path, train: str, train_images: str, val: str, val_images: str) -> None:
    write(tmp_path, train, train_images, content())
    write(tmp_path, val, val_images, content(2, 8))
    data = open_coco(str(tmp_path))
    assert [Path(name).name for name in names(data)[0]] == ["001.png", "002.png", "003.png"]
    assert [Path(name).name for name in names(data)[1]] == ["008.png", "009.png"]


@pytest.mark.parametrize("file", ["labels.json", "annotations/instances_default.json", "annotations/instances_val2017.json"])
def test_a_single_file_is_split_by_image(tmp_path: Path, file: str) -> None:
    write(tmp_path, file, "images", content(10))
    data, again = open_data(f"coco:{tmp_path}"), open_data(f"coco:{tmp_path}", seed=5)
    assert (len(data.train), len(data.val)) == (8, 2)
    assert sorted(names(data)[0] + names(data)[1]) == [f"images/{i:03}.png" for i in range(1, 11)]
    assert (names(again), again.fingerprint) == (names(data), data.fingerprint)
    assert len(open_data(f"coco:{tmp_path}:val=0.5").val) == 5


def test_options_name_files_and_the_images_folder(tmp_path: Path) -> None:
    write(tmp_path, "json/a.json", "pictures", content())
    write(tmp_path, "json/b.json", "pictures", content(2, 8))
    spec = f"coco:{tmp_path}:train=json/a.json,images=pictures"
    data = open_data(f"{spec},val=json/b.json")
    assert names(data)[1] == ["pictures/008.png", "pictures/009.png"]
    assert len(open_data(spec).val) == 1
    assert names(open_data(f"coco:{coco(tmp_path / 'c')}:val=0.4"))[1] != names(open_data(f"coco:{tmp_path / 'c'}"))[1]
    with pytest.raises(UserError, match="to train and to validate, expected two files"):
        open_data(f"{spec},val=json/a.json")
    with pytest.raises(UserError, match=r"no file '.*json/x.json'"):
        open_data(f"{spec},val=json/x.json")
    with pytest.raises(UserError, match=r"no folder '.*x', expected the images' folder"):
        open_data(f"coco:{tmp_path}:train=json/a.json,images=x")
    with pytest.raises(UserError, match="none of the images"):
        open_data(f"coco:{tmp_path}:train=json/a.json")
    with pytest.raises(UserError, match="out of range"):
        open_data(f"{spec},val=2.0")


def test_the_fingerprint_is_of_files_and_boxes_and_not_of_the_place(tmp_path: Path) -> None:
    one, other = coco(tmp_path / "one"), coco(tmp_path / "other")
    before = open_coco(str(one)).fingerprint
    assert before == open_coco(str(other)).fingerprint
    coco(other, annotations=lambda boxes: boxes[0].update(bbox=[0, 1, 5, 4]))
    assert before != open_coco(str(other)).fingerprint
    coco(one, categories=lambda categories: categories[0].update(name="wolf"))
    with pytest.raises(UserError, match=r"differ in the categories \['dog', 'wolf'\]"):
        open_coco(str(one))


def test_categories_of_the_two_files_are_matched_by_name(tmp_path: Path) -> None:
    coco(tmp_path)
    text = content(2, 8)
    for category in text["categories"]:
        category["id"] += 100
    text["annotations"][0]["category_id"] = 103
    write(tmp_path, "annotations/instances_val2017.json", "val2017", text)
    assert open_coco(str(tmp_path)).val[1][1]["labels"].tolist() == [1]


def changed(**values: Any) -> Any:
    return lambda entries: entries[0].update(values)


@pytest.mark.parametrize(
    ("change", "says", "left"),
    [
        ({"annotations": changed(image_id=77)}, "annotation 100 (no image has its image_id 77)", 2),
        ({"annotations": changed(image_id=None)}, "annotation 100 (no image has its image_id None)", 2),
        ({"annotations": changed(category_id=1)}, "annotation 100 (no category has its category_id 1)", 2),
        ({"annotations": changed(bbox=[0, 0, float("nan"), 2])}, "annotation 100 (its box from (0, 0) to (nan, 2) is not of finite", 2),
        ({"annotations": changed(bbox=[0, 0, 1e400, 2])}, "is not of finite numbers", 2),
        ({"annotations": changed(bbox=[0, 0, 10**400, 2])}, "is not of finite numbers", 2),
        ({"annotations": changed(bbox=[4, 0, -2, 2])}, "image 2 '002.png': annotation 100 (its box from (4, 0) to (2, 2) has no area)", 2),
        ({"annotations": changed(bbox=[4, 0, 2, 0])}, "annotation 100 (its box from (4, 0) to (6, 0) has no area)", 2),
        ({"annotations": changed(bbox=[30, 0, 2, 2])}, "annotation 100 (its box from (30, 0) to (32, 2) has no area in the image", 2),
        ({"annotations": changed(bbox=[18, 0, 9, 2])}, "(its box from (18, 0) to (27, 2) reaches out of the image of 22 x 10, to which", 3),
        ({"annotations": changed(bbox="none")}, "annotation 100 (its bbox is 'none', expected [x, y, width, height])", 2),
        ({"annotations": changed(iscrowd="0")}, "annotation 100 (its iscrowd is '0', expected 0 or 1)", 2),
        ({"annotations": changed(id=101)}, "annotation 101 (an earlier annotation has its id)", 2),
        ({"annotations": lambda entries: entries.append(7)}, "annotation at place 3 (it is 7, expected an object)", 3),
        ({"images": changed(id=2)}, "image 2 '001.png' (another image has its id); ", 2),
        ({"images": changed(id=[2])}, "image None '001.png' ({'file_name': '001.png', 'height': 10, 'id': [2], 'width': 21} has no id)", 3),
        ({"images": changed(file_name="002.png", width=22)}, "image 2 '002.png' (another image has its file)", 2),
        ({"images": changed(file_name="gone.png")}, "image 1 'gone.png' (there is no such file)", 3),
        ({"images": changed(file_name="../val2017/008.png")}, "image 1 (its file_name is '../val2017/008.png', expected one below", 3),
        ({"images": changed(file_name="/etc/passwd")}, "its file_name is '/etc/passwd', expected", 3),
        ({"images": changed(file_name="C:\\secret.png")}, "expected one below the images' folder", 3),
        ({"images": changed(file_name="..\\a.png")}, "expected one below the images' folder", 3),
        ({"images": changed(file_name=3)}, "its file_name is 3, expected", 3),
        ({"images": changed(width=22)}, "image 1 '001.png' (it is 21 x 10, but annotated as 22 x 10)", 3),
        ({"images": changed(width=-1)}, "image 1 '001.png' (it is -1 x 10, expected positive numbers)", 3),
        ({"images": lambda entries: entries.append("x")}, "image None ('x' has no id)", 3),
    ],
)
def test_what_is_wrong_is_named_and_refused_or_left_out(tmp_path: Path, change: dict[str, Any], says: str, left: int) -> None:
    coco(tmp_path, **change)
    with pytest.raises(UserError, match="wrong in") as caught:
        open_coco(str(tmp_path))
    assert says in str(caught.value)
    assert "annotations/instances_train2017.json: " in str(caught.value)
    data = open_coco(str(tmp_path), bad_data="skip")
    assert says.rstrip("; ") in " ".join(data.skipped)
    assert sum(len(target["boxes"]) for _, target in data.train) == left


@pytest.mark.parametrize(
    "change",
    [
        {"images": lambda entries: [entry.pop("width") for entry in entries]},
        {"annotations": lambda boxes: [box.pop("id") for box in boxes]},
    ],
)
def test_what_can_be_missing(tmp_path: Path, change: dict[str, Any]) -> None:
    data = open_coco(str(coco(tmp_path, **change)))
    assert [len(target["boxes"]) for _, target in data.train] == [0, 1, 2]


def test_a_box_may_reach_out_by_a_pixel(tmp_path: Path) -> None:
    data = open_coco(str(coco(tmp_path, annotations=changed(bbox=[-0.9, 0, 23.8, 10.9]))))
    assert data.train[1][1]["boxes"].tolist() == [[0, 0, 22, 10]]


def test_broken_images_are_named(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "train2017/003.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 thing is wrong in .*image 3 '003.png' \(it is empty\)"):
        open_coco(str(tmp_path))
    assert len(open_coco(str(tmp_path), bad_data="skip").train) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("9" * 5000, "cannot be read as JSON"),
        ("[]", "no COCO file of instances: it has no list 'images' and no list 'annotations' and no list 'categories'"),
        ('{"images": [], "annotations": {}, "categories": []}', "it has no list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": "1", "name": "a"}]}', "has the category {'id': '1', 'name': 'a'}"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "2 categories with the id 1"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}', "with the name 'a'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no image of '.*' can be used to train"),
    ],
)
def test_files_that_are_not_cocos(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=says.replace("{", r"\{")):
        open_coco(str(tmp_path), bad_data="skip")


def test_which_file_is_meant_is_asked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder ''"):
        open_coco("")
    with pytest.raises(UserError, match="has no JSON file, expected"):
        open_coco(str(tmp_path))
    for name in ("a", "b"):
        write(tmp_path, f"{name}.json", ".", content())
    with pytest.raises(UserError, match="has 2 JSON files, none of them clearly to train with"):
        open_coco(str(tmp_path))
    coco(tmp_path)
    write(tmp_path, "annotations/instances_train2014.json", "train2014", content())
    with pytest.raises(UserError, match=r"several files that may be meant \(annotations/instances_train2014.json, .*train2017.json\)"):
        open_coco(str(tmp_path))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["..", "/", "\ud800", "\0", 10**400, [], {}, [[]], {"id": 1}, [1, 2, 3, 4]]),
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(tree[key], (*path, key))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_corruption_is_said_or_left_out_and_nothing_else(choice: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, text = Path(folder), content(4)
        write(root, "a.json", "images", text)
        for _ in range(choice.draw(st.integers(1, 4))):
            *path, key = choice.draw(st.sampled_from(list(places(text))))
            owner = text
            for step in path:
                owner = owner[step]
            owner[key] = choice.draw(JUNK)
            if not text:
                break
        (root / "a.json").write_text(json.dumps(text))
        for bad_data in ("refuse", "skip"):
            try:
                data = open_coco(str(root), bad_data=bad_data)  # type: ignore[arg-type]
            except UserError:
                continue
            assert bad_data == "skip" or not data.skipped
            for image, target in (*data.train, *data.val):
                boxes, (width, height) = target["boxes"], image.size
                assert (boxes[:, :2] < boxes[:, 2:]).all()
                assert (boxes >= 0).all()
                assert (boxes <= torch.tensor([width, height, width, height])).all()
                assert ((target["labels"] >= 1) & (target["labels"] <= len(data.classes))).all()


sides = st.tuples(st.integers(1, 30), st.integers(1, 30))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(sides, min_size=2, max_size=6),
    st.lists(st.tuples(st.integers(), st.integers(), *[st.floats(0, 1)] * 4, st.booleans()), max_size=12),
)
def test_a_valid_file_is_read_back(sizes: list[tuple[int, int]], drawn: list[tuple[Any, ...]]) -> None:
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes)]
    expected: dict[int, list[Any]] = {i: [] for i in range(len(sizes))}
    annotations = []
    for n, (owner, category, a, b, c, d, crowd) in enumerate(drawn):
        owner, label = owner % len(sizes), category % 3
        w, h = sizes[owner]
        x1, y1, width, height = a * 0.9 * w, b * 0.9 * h, (0.01 + c * 0.08) * w, (0.01 + d * 0.08) * h
        ids = sorted(entry["id"] for entry in CATEGORIES)
        annotations.append({"id": n, "image_id": owner, "category_id": ids[label], "bbox": [x1, y1, width, height], "iscrowd": int(crowd)})
        expected[owner].append(([x1, y1, x1 + width, y1 + height], label + 1, crowd))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), "a.json", ".", {"images": images, "annotations": annotations, "categories": CATEGORIES})
        data = open_coco(folder)
        for part in (data.train, data.val):
            for name, (image, target) in zip(part.names, part, strict=True):  # type: ignore[attr-defined]
                i = int(Path(name).stem)
                assert image.size == sizes[i]
                assert torch.equal(target["boxes"], torch.tensor([box for box, _, _ in expected[i]]).reshape(-1, 4))
                assert target["labels"].tolist() == [label for _, label, _ in expected[i]]
                assert target["iscrowd"].tolist() == [crowd for _, _, crowd in expected[i]]
