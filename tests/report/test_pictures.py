from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_run import write_pictures

from stillhouse.report.pictures import (
    LONGEST_SIDE,
    STUDENT_COLOUR,
    as_rgb,
    data_uri,
    overlaid,
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


def test_a_run_without_pictures_has_no_cards(tmp_path: Path) -> None:
    assert picture_cards(read_snapshots(tmp_path)[0], []) == []
