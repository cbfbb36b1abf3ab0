from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stillhouse.data.images import find_broken, open_image, plain, refuse_or_skip, why_broken
from stillhouse.errors import UserError


def photo(side: int = 48, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image_upright(orientation: int) -> None:
    upright = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(open_image(encoded(stored, "PNG", exif=exif), channels=1)), np.asarray(upright))


def test_every_mode_becomes_rgb_or_grey() -> None:
    base = photo()
    for image in (
        base,
        base.convert("L"),
        base.convert("P"),
        base.convert("1"),
        base.convert("CMYK"),
        base.convert("YCbCr"),
        base.convert("RGBA"),
    ):
        assert plain(image).mode == "RGB"
        assert plain(image, 1).mode == "L"
        assert plain(image).size == base.size
    assert np.array_equal(np.asarray(plain(base.convert("RGBA"))), np.asarray(base))
    red = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert plain(red).getpixel((0, 0)) == (255, 0, 0)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    for image in (
        Image.fromarray(levels),
        Image.fromarray(levels.astype(np.int32)),
        Image.open(io.BytesIO(encoded(Image.fromarray(levels), "PNG"))),
    ):
        assert np.asarray(plain(image, 1)).tolist() == [[0, 1, 128, 255]]


def test_transparency_shows_white() -> None:
    assert plain(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert plain(Image.new("LA", (1, 1), (0, 255)), 1).getpixel((0, 0)) == 0
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert plain(palette).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_whole_images_pass_and_truncated_ones_do_not(kind: str, tmp_path: Path) -> None:
    whole = encoded(photo(), kind)
    assert why_broken(whole) is None
    for length in (1, 8, len(whole) // 2, len(whole) - 40):
        assert why_broken(whole[:length]), length
    file = tmp_path / "half"
    file.write_bytes(whole[: len(whole) // 2])
    assert why_broken(file)
    file.write_bytes(whole)
    assert why_broken(file) is None


def test_a_jpeg_with_a_thumbnail_or_a_tail_is_judged_by_its_own_end() -> None:
    whole = encoded(photo(), "JPEG", exif=b"Exif\x00\x00" + encoded(photo(16), "JPEG"))
    assert why_broken(whole) is None
    assert why_broken(whole + b"\0" * 5000) is None
    assert why_broken(whole[:-100])
    assert why_broken(whole[: len(whole) // 2] + b"\0" * (len(whole) // 2))


def test_what_is_no_image_is_said_to_be_none(tmp_path: Path) -> None:
    assert why_broken(b"") == "it is empty"
    assert why_broken(b"<html>not found</html>") == "it is not an image"
    assert why_broken(tmp_path / "nowhere")
    assert "floats" in str(why_broken(encoded(Image.new("F", (4, 4)), "TIFF")))
    good, bad = encoded(photo(8), "PNG"), b"bad"
    items = [good, bad] * 300  # more than one chunk of a thread
    assert [why is None for why in find_broken(items, lambda item: item)] == [True, False] * 300


def test_broken_images_are_refused_or_skipped_as_asked() -> None:
    broken = [f"{i}.jpg (it is empty)" for i in range(7)]
    with pytest.raises(UserError, match=r"7 of 9 images cannot be read: 0.jpg \(it is empty\);.*; 4.jpg.*; …; repair.*bad_data='skip'"):
        refuse_or_skip(broken, 9, "refuse")
    refuse_or_skip(broken, 9, "skip")
    refuse_or_skip([], 9, "refuse")
    with pytest.raises(UserError, match="expected at least one"):
        refuse_or_skip(broken, 7, "skip")
