from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from sample_run import write_dense_pictures, write_pictures

from stillhouse.report.pictures import (
    DIFFERENCE_RAMP,
    DRAWN_SIDE,
    LONGEST_SIDE,
    MASK_RAMP,
    MASK_SIDE,
    MOST_CHANNELS,
    MOST_MASKS,
    STUDENT_COLOUR,
    as_rgb,
    channel_strip,
    data_uri,
    drawn,
    heat,
    masks_left_out,
    overlaid,
    own_scale,
    photograph,
    picture_cards,
    read_snapshots,
    what_was_shown,
)


def grey(side: int = 8) -> np.ndarray:
    return np.arange(side * side, dtype=np.uint8).reshape(1, side, side)


def test_a_picture_survives_its_data_uri_exactly() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)
    head, body = data_uri(as_rgb(image)).split(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))), image.transpose(1, 2, 0))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_than_three_are_grey(channels: int) -> None:
    pixels = np.asarray(as_rgb(np.repeat(grey(), channels, axis=0)))
    assert np.array_equal(pixels, np.repeat(grey().transpose(1, 2, 0), 3, axis=2))


def test_exactly_the_hidden_patches_are_blank() -> None:
    shown = np.array([[1.0, 0.0], [0.0, 1.0]])
    pixels = np.asarray(what_was_shown(grey(), shown))
    assert np.array_equal(pixels[..., 3], np.kron(shown, np.full((4, 4), 255)))
    assert np.array_equal(pixels[..., 0], grey()[0])


def test_the_most_salient_patch_has_the_students_colour_and_the_least_none() -> None:
    pixels = np.asarray(overlaid(np.zeros((1, 8, 8), np.uint8), np.array([[0.1, 0.2], [0.3, 0.5]])))
    assert (pixels[:4, :4] == 0).all()
    assert (abs(pixels[4:, 4:].astype(float) - 0.85 * np.array(STUDENT_COLOUR)) <= 1).all()


@pytest.mark.parametrize("values", [np.full((2, 2), 0.25), np.full((2, 2), np.nan)])
def test_a_flat_or_broken_saliency_adds_no_colour(values: np.ndarray) -> None:
    pixels = np.asarray(overlaid(grey(), values))
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_large_pictures_are_stored_small_and_keep_their_shape() -> None:
    assert as_rgb(np.zeros((3, 224, 448), np.uint8)).size == (LONGEST_SIDE, LONGEST_SIDE // 2)


def test_first_middle_and_last_snapshots_are_taken_and_broken_files_named(tmp_path: Path) -> None:
    for step in (10, 20, 60, 90, 110):
        write_pictures(tmp_path, step)
    (tmp_path / "pictures" / "step-00000130.safetensors").write_bytes(b"half a file")
    snapshots, notes = read_snapshots(tmp_path)
    assert [snapshot.step for snapshot in snapshots] == [10, 60, 110]
    assert len(notes) == 1
    assert notes[0].startswith("pictures/step-00000130.safetensors was left out: ")


def test_cards_name_the_class_or_its_number(tmp_path: Path) -> None:
    write_pictures(tmp_path, 10, count=2)
    cards = picture_cards(read_snapshots(tmp_path)[0], ["zero"])
    assert [card["label"] for card in cards] == ["zero", "1"]
    assert [[row["name"] for row in card["rows"]] for card in cards] == [["saliency", "shown"]] * 2


@pytest.mark.parametrize("name", ["shown", "visible"])
def test_what_is_hidden_is_cut_out(name: str) -> None:
    image, half = np.full((3, 8, 8), 200, np.uint8), np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    alpha = np.asarray(drawn(image, name, half))[..., 3]
    assert (alpha[:, :4] == 255).all()
    assert (alpha[:, 4:] == 0).all()


def test_a_run_without_pictures_has_no_cards(tmp_path: Path) -> None:
    assert picture_cards(read_snapshots(tmp_path)[0], []) == []


def rgb(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def test_masks_have_one_scale_so_that_a_collapsed_one_is_dark() -> None:
    assert (rgb(heat(np.zeros((4, 6)), MASK_RAMP)) == MASK_RAMP[0]).all()
    assert (rgb(heat(np.ones((4, 6)), MASK_RAMP)) == MASK_RAMP[-1]).all()
    dark = rgb(heat(np.array([[0.01, 0.02, 0.03]]), MASK_RAMP)).astype(int)
    assert abs(dark - np.array(MASK_RAMP[0])).max() <= 0.03 * 3 * 92 + 1
    assert heat(np.zeros((4, 6)), MASK_RAMP).size == (6, 4)


def test_a_difference_has_its_own_scale() -> None:
    pixels = rgb(heat(own_scale(np.array([[2.0, 2.5], [2.5, 3.0]])), DIFFERENCE_RAMP))
    assert (pixels[0, 0] == DIFFERENCE_RAMP[0]).all()
    assert (pixels[1, 1] == DIFFERENCE_RAMP[-1]).all()


@pytest.mark.parametrize("values", [np.full((2, 2), np.nan), np.full((2, 2), np.inf), np.full((2, 2), 7.0)])
def test_broken_and_flat_differences_are_dark(values: np.ndarray) -> None:
    assert (rgb(heat(own_scale(values), DIFFERENCE_RAMP)) == DIFFERENCE_RAMP[0]).all()


def test_large_masks_are_averaged_and_keep_their_shape() -> None:
    board = np.indices((8 * MASK_SIDE, 4 * MASK_SIDE)).sum(0) % 2
    picture = heat(board.astype(float), MASK_RAMP)
    assert picture.size == (MASK_SIDE // 2, MASK_SIDE)
    assert abs(np.asarray(picture).astype(int) - 127.5).max() <= 1


def test_a_strip_has_a_row_a_mask_and_a_column_a_channel_until_there_are_too_many() -> None:
    few = np.random.default_rng(0).random((3, 5))
    assert np.array_equal(np.asarray(channel_strip(few)), (255 * few.astype(np.float32)).round().astype(np.uint8))
    many = np.repeat(np.arange(MOST_CHANNELS) / MOST_CHANNELS, 2)[None, :-1]
    assert np.array_equal(np.asarray(channel_strip(many)), np.asarray(channel_strip(many[:, ::2])))


def test_dense_pictures_need_no_labels_and_hold_labels_once_and_the_student_at_every_moment(tmp_path: Path) -> None:
    for step in (0, 450, 900):
        write_dense_pictures(tmp_path, "detect", step, masks=3, count=2)
    snapshots, notes = read_snapshots(tmp_path)
    cards = picture_cards(snapshots, ["car"])
    assert not notes
    assert [card["label"] for card in cards] == ["", ""]
    whens = [("labels", None), ("teacher", None), ("student", 0), ("student", 1), ("student", 2)]
    assert [(title, moment) for title, moment, _ in cards[0]["answers"]] == whens
    assert cards[0]["columns"] == ["difference", "mask 1", "mask 2", "mask 3"]
    assert [len(row["pictures"]) for row in cards[0]["masks"]] == [4, 4, 4]
    assert cards[0]["rows"] == []


def test_masks_are_in_the_order_of_their_numbers_and_only_so_many(tmp_path: Path) -> None:
    write_dense_pictures(tmp_path, "segment", 900, masks=19, count=1)
    snapshots, _ = read_snapshots(tmp_path)
    assert len(snapshots[0].masks) == 19
    assert picture_cards(snapshots, [])[0]["columns"] == ["difference", *(f"mask {i + 1}" for i in range(MOST_MASKS))]
    assert masks_left_out(snapshots) == 19 - MOST_MASKS
    assert masks_left_out([]) == 0


def test_only_photographs_are_pressed() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 400, 200), dtype=np.uint8)
    assert photograph(as_rgb(image, DRAWN_SIDE)).startswith("data:image/jpeg;base64,")
    assert photograph(as_rgb(image[:, :64, :64], DRAWN_SIDE)) == data_uri(as_rgb(image[:, :64, :64]))
    assert as_rgb(image, DRAWN_SIDE).size == (DRAWN_SIDE // 2, DRAWN_SIDE)


def test_a_file_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    save_file({"labels": np.zeros(1)}, tmp_path / "pictures" / "step-00000001.safetensors")
    assert read_snapshots(tmp_path) == ([], ["pictures/step-00000001.safetensors was left out: it holds no images"])


def test_maps_of_other_methods_are_laid_over_dense_pictures_too(tmp_path: Path) -> None:
    write_dense_pictures(tmp_path, "detect", 900, masks=0, count=1)
    path = tmp_path / "pictures" / "step-00000900.safetensors"
    tensors = load_file(path)
    kept = {name: values for name, values in tensors.items() if name in ("images", "drawn/labels")}
    save_file({**kept, "attention": np.ones((1, 4, 4), np.float32)}, path)
    card = picture_cards(read_snapshots(tmp_path)[0], [])[0]
    assert [row["title"] for row in card["rows"]] == ["attention"]
    assert (card["masks"], card["columns"]) == ([], [])
