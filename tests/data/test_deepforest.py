from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from PIL import Image

from stillhouse.data import deepforest, installed, open_data
from stillhouse.data.deepforest import cut, open_deepforest
from stillhouse.errors import UserError


def present() -> bool:
    try:
        return bool(distribution("deepforest"))
    except PackageNotFoundError:
        return False


real = pytest.mark.skipif(not present(), reason="needs deepforest: pip install --no-deps deepforest")


def test_boxes_are_cut_at_a_tiles_edge_and_kept_from_two_fifths_on() -> None:
    boxes = torch.tensor([[90.0, 10, 110, 30], [92, 0, 112, 10], [93, 0, 113, 10], [200, 200, 220, 220], [10, 10, 20, 20]])
    assert cut(boxes, 0, 0, 100).tolist() == [[90, 10, 100, 30], [92, 0, 100, 10], [10, 10, 20, 20]]
    assert cut(boxes, 100, 0, 100).tolist() == [[0, 10, 10, 30], [0, 0, 12, 10], [0, 0, 13, 10]]
    assert cut(boxes[:0], 0, 0, 100).shape == (0, 4)


def test_a_missing_or_different_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(installed, "distribution", nothing)
    with pytest.raises(UserError, match=r"deepforest needs files of the package 'deepforest': pip install --no-deps deepforest$"):
        open_deepforest("")
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    box = "<bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
    (tmp_path / "a.xml").write_text(f"<annotation>{box.format(1)}</annotation>")
    photograph, boxes = deepforest._read(tmp_path / "a.png", tmp_path / "a.xml")
    assert photograph.size == (60, 60)
    assert boxes.tolist() == [[0, 1, 30, 40]]
    for content in ("<annotation>", "<annotation/>", box.format("x"), box.format(31), box.format(0)):
        (tmp_path / "a.xml").write_text(content)
        with pytest.raises(UserError, match=r"is not as in deepforest 2.1.0"):
            deepforest._read(tmp_path / "a.png", tmp_path / "a.xml")


@real
def test_the_real_photographs() -> None:
    data = open_data("deepforest")
    assert (len(data.train), len(data.val), data.size, data.classes, data.task) == (11 * 12, 6 * 5 + 4, 128, ["tree"], "detect")
    trees = [sum(len(part[i][1]["labels"]) for i in range(len(part))) for part in (data.train, data.val)]
    assert trees == [563, 327]
    for part in (data.train, data.val):
        for i in range(len(part)):
            image, target = part[i]
            assert image.shape == (3, 128, 128)
            assert image.dtype == torch.uint8
            assert target["boxes"].shape == (len(target["labels"]), 4)
            assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
            assert ((target["boxes"] >= 0) & (target["boxes"] <= 128)).all()
            assert (target["labels"] == 1).all()


@real
def test_tiles_are_cut_out_as_they_are() -> None:
    data = open_deepforest("tile=400,size=400")
    names = [f"deepforest/data/OSBS_029{suffix}" for suffix in (".png", ".xml")]
    photograph, boxes = deepforest._read(*installed.installed_files("deepforest", *names, need="a test"))
    image, target = data.val[len(data.val) - 1]
    assert torch.equal(image.permute(1, 2, 0), torch.frombuffer(bytearray(photograph.tobytes()), dtype=torch.uint8).view(400, 400, 3))
    assert torch.equal(target["boxes"], boxes)
    half = open_deepforest("tile=400,size=200").val
    assert torch.equal(half[len(half) - 1][1]["boxes"], boxes / 2)


@real
def test_subsets_and_overlapping_tiles() -> None:
    whole, few, more, other = (
        open_deepforest(text, seed=seed) for text, seed in (("", 0), ("train=20", 0), ("train=50", 0), ("train=20", 1))
    )
    rows = [{image.numpy().tobytes() for image in data.train.images} for data in (whole, few, more, other)]
    assert [len(row) for row in rows] == [132, 20, 50, 20]
    assert rows[1] < rows[2] < rows[0]
    assert rows[1] != rows[3] < rows[0]
    assert torch.equal(whole.val.images, other.val.images)
    assert whole.mean == few.mean == other.mean
    assert len({data.fingerprint for data in (whole, few, more, other)}) == 4
    assert len(open_deepforest("stride=100,size=32").train) == 21 * 23
    assert len(open_deepforest("stride=100,size=32").val) == 34
    for bad, message in (("tile=500", "tile=500"), ("train=133", "expected 1 to 132"), ("stride=300", "stride=300"), ("tiles=5", "'tile'")):
        with pytest.raises(UserError, match=message):
            open_deepforest(bad)
