"""Every image of the corpus through every reader: read right, or refused, or left out, with its name; never something else in silence."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import stillhouse as sh
from stillhouse.data import Data, open_data
from stillhouse.data.images import find_images, open_image, why_broken
from stillhouse.errors import UserError
from tests.counts import tried
from tests.data.corpus import NAMES, NOT_TEXT, READ, REFUSED, Case, encoded, flat, photo, tangled
from tests.runs import RECIPE, STUDENT

of_name = {"ids": lambda case: case.name}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", READ, **of_name)
def test_odd_images_are_read_right(case: Case, tmp_path: Path) -> None:
    path = tmp_path / case.name
    path.write_bytes(case.content)
    for source in (path, case.content):
        assert why_broken(source) is None
        image = open_image(source)
        assert (image.mode, image.size) == ("RGB", case.size)
        assert np.abs(np.subtract(image.getpixel((0, 0)), case.pixel)).max() <= case.within
        assert open_image(source, channels=1).mode == "L"
    tried("odd images read right")


@pytest.mark.parametrize("case", REFUSED, **of_name)
def test_broken_images_are_refused_with_the_reason(case: Case, tmp_path: Path) -> None:
    path = tmp_path / case.name
    path.write_bytes(case.content)
    for source in (path, case.content):
        why = why_broken(source)
        assert why
        assert case.says in why
    with contextlib.suppress(OSError, SyntaxError, ValueError):  # where nobody looked before: of these few a reader makes a sentence
        open_image(path)
    assert not (tmp_path / "ran").exists()
    tried("broken images refused")


def _imagefolder(root: Path, files: dict[str, bytes]) -> str:
    for i, (name, content) in enumerate(files.items()):
        folder = root / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return f"imagefolder:{root}"


def _hf(root: Path, files: dict[str, bytes]) -> str:
    datasets = pytest.importorskip("datasets", reason="needs the extra stillhouse[datasets]")
    rows = {"image": [{"bytes": content, "path": name} for name, content in files.items()], "label": [i % 2 for i in range(len(files))]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(root / "saved")
    return f"hf:{root / 'saved'}"


def _coco(root: Path, files: dict[str, bytes]) -> str:
    (root / "images").mkdir()
    for name, content in files.items():
        (root / "images" / name).write_bytes(content)
    images = [{"id": i, "file_name": name} for i, name in enumerate(files)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 1, 1]} for i in range(len(files))]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (root / "all.json").write_text(json.dumps(content))
    return f"coco:{root}"


def _voc(root: Path, files: dict[str, bytes]) -> str:
    (root / "JPEGImages").mkdir()
    (root / "Annotations").mkdir()
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>1</xmax><ymax>1</ymax></bndbox>"
    for i, (name, content) in enumerate(files.items()):
        stem = f"{i:03}-{name}"
        (root / "JPEGImages" / stem).write_bytes(content)
        (root / "Annotations" / f"{os.path.splitext(stem)[0]}.xml").write_text(
            f"<annotation><object><name>cat</name>{box}</object></annotation>"
        )
    return f"voc:{root}"


def _masks(root: Path, files: dict[str, bytes]) -> str:
    return _pairs(root, files, ("images", "masks"), "{}", "{}.png") and f"masks:{root}:classes=2"


def _cityscapes(root: Path, files: dict[str, bytes]) -> str:
    for part in ("train", "val"):
        folders = (f"leftImg8bit/{part}/city", f"gtFine/{part}/city")
        _pairs(root, files, folders, "{}_leftImg8bit.png", "{}_gtFine_labelIds.png", value=7)
        for folder in folders:
            for file in sorted((root / folder).iterdir()):
                file.rename(file.with_name(f"{part}-{file.name}"))
    return f"cityscapes:{root}"


def _pairs(root: Path, files: dict[str, bytes], folders: tuple[str, str], image: str, mask: str, value: int = 1) -> bool:
    for folder in folders:
        (root / folder).mkdir(parents=True)
    for i, (name, content) in enumerate(files.items()):
        known = next((case.size for case in READ if case.name == name), (12, 12))
        key = f"{i:03}-{name}"
        (root / folders[0] / image.format(key)).write_bytes(content)
        stem = os.path.splitext(key)[0] if image == "{}" else key
        Image.new("L", known, value).save(root / folders[1] / mask.format(stem))
    return True


READERS = [_imagefolder, _hf, _coco, _voc, _masks, _cityscapes]
every_reader = pytest.mark.parametrize("build", READERS, ids=lambda build: build.__name__[1:])


def _samples(data: Data) -> list[tuple[Any, Any]]:
    return [part[i] for part in (data.train, data.val) for i in range(len(part))]  # type: ignore[arg-type]


@every_reader
def test_every_reader_refuses_or_leaves_out_what_is_broken_and_reads_the_rest(build: Callable[..., str], tmp_path: Path) -> None:
    cases = [*READ, *REFUSED]
    spec = build(tmp_path, {case.name: case.content for case in cases})
    with pytest.raises(UserError, match="--bad-data skip"):
        open_data(spec)
    data = open_data(spec, bad_data="skip")
    times = 2 if build is _cityscapes else 1
    assert len(data.skipped) == times * len(REFUSED)
    assert len(_samples(data)) == times * len(READ)
    for image, target in _samples(data):
        assert image.mode == "RGB"
        assert not data.wrong(image, target)
    if build is not _hf:  # its images have numbers
        for case in REFUSED:
            assert sum(case.name in each for each in data.skipped) == times, case.name
    tried("damaged images through a reader", times * len(REFUSED))


@every_reader
def test_an_image_that_is_gone_or_cut_while_it_is_read_is_named(build: Callable[..., str], tmp_path: Path) -> None:
    if build is _hf:
        pytest.skip("the images are in the set's own files")
    spec = build(tmp_path, {f"{i}.png": encoded(photo(i), "PNG") for i in range(8)})
    data = open_data(spec)
    for spoil in (lambda path: path.write_bytes(path.read_bytes()[:200]), lambda path: path.write_bytes(b""), Path.unlink):
        path = next(path for path in find_images(tmp_path) if os.path.basename(path).endswith(("3.png", "-3.png_leftImg8bit.png")))
        spoil(Path(path))
        with pytest.raises(UserError, match=f"{os.path.basename(path)}' cannot be read"):
            _samples(data)
        tried("images spoilt after they were looked at")


def test_odd_names_are_read_and_written_down(tmp_path: Path) -> None:
    names = [*NAMES.values(), NOT_TEXT]
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i, name in enumerate(names):
            (tmp_path / "data" / label / name).write_bytes(encoded(flat("L", i), "PNG") if label == "a" or i % 2 else b"broken")
    with pytest.raises(UserError) as caught:
        open_data("imagefolder:data")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    str(caught.value).encode()
    job: dict[str, Any] = {**RECIPE, "epochs": 1, "batch": 4, "data": "imagefolder:data:channels=1", "out": "run"}
    run = sh.distill("scratch", student=STUDENT, bad_data="skip", **job)
    broken = names[::2]
    assert len(run.facts["data"]["skipped"]) == len(broken)
    lines = (run.folder / "skipped.txt").read_text("utf-8").split("\n")[:-1]
    assert len(lines) == len(broken)
    assert all(line.endswith("(it is not an image)") and "\x1b" not in line for line in lines)
    assert f"{len(broken)} files skipped" in run.report.read_text("utf-8")
    tried("odd file names", len(names))


def test_nothing_left_out_leaves_no_list(tmp_path: Path) -> None:
    _imagefolder(tmp_path, {f"{i}.png": encoded(photo(i), "PNG") for i in range(16)})
    run = sh.distill("scratch", student=STUDENT, data=f"imagefolder:{tmp_path}:channels=1", out="run", **RECIPE | {"epochs": 1, "batch": 4})
    assert not (run.folder / "skipped.txt").exists()


def test_links_that_go_round_in_circles_end(tmp_path: Path) -> None:
    counts = [tangled(tmp_path / "data" / name) for name in "ab"]
    data = open_data("imagefolder:data")
    assert len(_samples(data)) == sum(counts)
    assert {name.split("/")[0] for name in data.train.names} == {"a", "b"}  # type: ignore[attr-defined]
    for name, target in (("self.png", "self.png"), ("gone.png", "nowhere"), ("device.png", "/dev/zero")):
        (tmp_path / "data" / "a" / name).symlink_to(target)
    os.mkfifo(tmp_path / "data" / "a" / "pipe.png")
    (tmp_path / "data" / "a" / "folder.png").mkdir()
    found: list[Data] = []
    opening = threading.Thread(target=lambda: found.append(open_data("imagefolder:data", bad_data="skip")), daemon=True)
    opening.start()
    opening.join(60)  # a pipe that nobody writes to would be waited for
    assert found, "still reading"
    assert sorted(each.split(" ")[0] for each in found[0].skipped) == ["a/device.png", "a/gone.png", "a/pipe.png", "a/self.png"]
    for folder in ("images", "masks"):
        tangled(tmp_path / "pairs" / folder)
    assert len(_samples(open_data("masks:pairs:classes=10"))) == 2
    tried("links and other things that are no images", 4 + 6 * len(counts))
