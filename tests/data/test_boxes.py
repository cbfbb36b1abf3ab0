from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stillhouse.data.boxes import Box, BoxFiles, Picture, box_data, cut, look, read_image, side_of, two_parts
from stillhouse.errors import UserError

ORIENTATION = 0x0112
numbers = st.floats() | st.floats(-20, 60) | st.integers(-3, 40).map(float)


def photo(path: Path, size: tuple[int, int] = (8, 6), turn: int = 1, kind: str = "PNG") -> Path:
    """A picture whose every pixel is another, stored so that `turn` (EXIF) sets it upright."""
    pixels = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[1], size[0])
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, kind, exif=exif)
    return path


@given(st.tuples(numbers, numbers, numbers, numbers), st.integers(1, 40), st.integers(1, 40))
def test_what_cut_leaves_is_inside_with_area_and_what_is_inside_is_left_alone(
    corners: tuple[float, float, float, float], width: int, height: int
) -> None:
    inside, fault = cut(corners, (width, height))
    x1, y1, x2, y2 = corners
    if inside is None:
        assert fault
        assert not (0 <= x1 <= x2 - 1e-3 < x2 <= width and 0 <= y1 <= y2 - 1e-3 < y2 <= height)
        return
    assert np.array_equal(np.float32(inside), inside)
    assert 0 <= inside[0] < inside[2] <= width
    assert 0 <= inside[1] < inside[3] <= height
    if min(x1, y1) >= 0 and x2 <= width and y2 <= height:
        assert np.array_equal(np.float32(corners), inside)
        assert not fault
    assert bool(fault) == (x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1)


@pytest.mark.parametrize(
    ("corners", "says"),
    [
        ((0, 0, float("nan"), 3), "is not of finite numbers"),
        ((0, 0, 3, float("inf")), "is not of finite numbers"),
        ((3, 0, 3, 3), "has no area"),
        ((5, 0, 3, 3), "has no area"),
        ((8, 0, 8.5, 3), "has no area in the image of 8 x 6"),
        ((5, 5, 5 + 1e-9, 6), "has no area in the image of 8 x 6"),
    ],
)
def test_boxes_that_are_none(corners: tuple[float, float, float, float], says: str) -> None:
    assert cut(corners, (8, 6)) == (None, says)


def test_a_picture_is_taken_as_it_was_annotated(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG"):
        path = photo(tmp_path / f"a.{kind}", (8, 6), turn=6, kind=kind)
        assert look(path) == look(path, (6, 8)) == (6, 8)
        assert look(path, (8, 6)) == (8, 6)
        assert look(path, (8, 7)) == "it is 6 x 8, but annotated as 8 x 7"
        upright, stored = read_image(path, (6, 8)), read_image(path, (8, 6))
        assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(stored), -1))
        assert stored.convert("L").getexif().get(ORIENTATION) is None  # or it would be turned later
        with pytest.raises(UserError, match="it is 8 x 6, but annotated as 8 x 7"):
            read_image(path, (8, 7))
        assert read_image(path).size == (6, 8)


def test_looking_at_a_png_does_not_decode_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = photo(tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
    assert look(path) == (8, 6)


def test_a_file_that_is_missing_or_broken_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"what")
    assert look(tmp_path / "a.png") == "it is not an image"
    assert look(tmp_path / "b.png") == look(tmp_path / "\0") == look(tmp_path / ("x" * 5000)) == "there is no such file"
    with pytest.raises(UserError, match=r"a\.png' cannot be read"):
        read_image(tmp_path / "a.png")


def test_boxes_of_each_image_survive_pickling(tmp_path: Path) -> None:
    pictures = [
        Picture("a.png", "a", (8, 6), [Box("1", (0, 1, 2.5, 3), "cat"), Box("2", (1, 1, 8, 6), "ant", True)]),
        Picture("b.png", "b", (8, 6)),
        Picture("c.png", "c", (8, 6), [Box("3", (2, 2, 3, 3), "ant")]),
    ]
    for picture in pictures:
        photo(tmp_path / picture.path)
    files = pickle.loads(pickle.dumps(BoxFiles(tmp_path, pictures, ["ant", "cat"])))
    assert len(files) == len(list(files)) == 3
    (image, first), (_, second), (_, third) = files[0], files[1], files[-1]
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert first["boxes"].tolist() == [[0, 1, 2.5, 3], [1, 1, 8, 6]]
    assert (first["labels"].tolist(), first["iscrowd"].tolist()) == ([2, 1], [False, True])
    assert (second["boxes"].shape, second["labels"].shape, second["iscrowd"].shape) == ((0, 4), (0,), (0,))
    assert [first[name].dtype for name in ("boxes", "labels", "iscrowd")] == [torch.float32, torch.int64, torch.bool]
    assert [second[name].dtype for name in ("boxes", "labels", "iscrowd")] == [torch.float32, torch.int64, torch.bool]
    assert third["boxes"].tolist() == [[2, 2, 3, 3]]
    first["boxes"].zero_()
    assert files[0][1]["boxes"].sum() > 0  # a sample is its own


def test_faults_are_counted_and_the_first_named(tmp_path: Path) -> None:
    photo(tmp_path / "a.png"), photo(tmp_path / "b.png")

    def pictures() -> list[Picture]:
        bad = [Box(f"box {i}", (i, 0, i, 1), "ant") for i in range(6)]
        return [Picture("b.png", "b.png", None, [Box("box 9", (-3, 0, 4, 4), "ant"), *bad]), Picture("a.png", "a.png"), Picture("c", "c")]

    how = {"share": 0.5, "faults": ["before"]}
    with pytest.raises(UserError) as caught:
        box_data("x", tmp_path, [pictures()], ["ant"], bad_data="refuse", **how)
    for part in (
        "9 things are wrong in",
        "before; b.png: box 9 (its box from (-3, 0) to (4, 4) reaches out of",
        "box 2",
        "…",
        "--bad-data skip",
    ):
        assert part in str(caught.value)
    assert "box 4" not in str(caught.value)
    data = box_data("x", tmp_path, [pictures()], ["ant"], bad_data="skip", **how)
    assert len(data.skipped) == 9
    assert data.skipped[1] == "b.png: box 9 (its box from (-3, 0) to (4, 4) reaches out of the image of 8 x 6, to which it can be cut)"
    assert data.skipped[-1] == "c (there is no such file)"
    assert sorted(data.train.names + data.val.names) == ["a.png", "b.png"]  # type: ignore[attr-defined]
    assert how["faults"] == ["before"]


def test_parts_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can be used to validate"):
        two_parts([[1], []], 0.2, tmp_path)
    with pytest.raises(UserError, match="can be used to train"):
        two_parts([[]], 0.2, tmp_path)
    with pytest.raises(UserError, match="at least two to split"):
        two_parts([[1]], 0.2, tmp_path)
    photo(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"1 images .* both to train and to validate, such as 'a.png'"):
        box_data("x", tmp_path, [[Picture("a.png", "a")], [Picture("a.png", "a")]], ["ant"], share=0.2, faults=[], bad_data="skip")


@given(st.integers(2, 200), st.floats(0.01, 0.99))
def test_a_split_is_a_partition_and_always_the_same(count: int, share: float) -> None:
    train, val = two_parts([list(range(count))], share, Path())
    assert sorted(train + val) == list(range(count))
    assert abs(len(val) - count * share) <= 1 or len(val) == 1 or len(train) == 1
    assert [train, val] == two_parts([list(range(count))], share, Path())


def test_the_side_of_square_images() -> None:
    assert side_of([(8, 8), (8, 8)]) == 8
    assert side_of([(8, 8), (9, 9)]) is None
    assert side_of([(8, 6)]) is None


def test_an_encoded_tail_is_no_picture(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    (tmp_path / "half.jpg").write_bytes(buffer.getvalue()[:-100])
    assert isinstance(look(tmp_path / "half.jpg"), str)
