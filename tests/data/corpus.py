"""Images as they are found in the world and as somebody might send them, made here, each with what is to come of it."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stillhouse.data.images import ADAM7

SIDE = 12
Pixel = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """An image file. `says`: a part of the sentence why it is refused; or it is read, and `pixel` is its top left one, `size` its size."""

    name: str
    content: bytes
    says: str = ""
    pixel: Pixel = (0, 0, 0)
    size: tuple[int, int] = (SIDE, SIDE)
    within: int = 0


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def png(pixels: NDArray[Any], size: tuple[int, int] | None = None, *, interlaced: bool = False, more: bytes = b"") -> bytes:
    """A PNG of grey [H, W] or RGB [H, W, 3], uint8 or uint16, whose header may say another size; `more` chunks before its data."""
    height, width = pixels.shape[:2]
    passes = ADAM7 if interlaced else ((0, 1, 0, 1),)
    big = pixels.astype(pixels.dtype.newbyteorder(">"))
    data = b"".join(b"\0" + row.tobytes() for x, dx, y, dy in passes for row in big[y::dy, x::dx] if row.size)
    header = struct.pack(">IIBBBBB", *(size or (width, height)), 8 * pixels.itemsize, 2 if pixels.ndim == 3 else 0, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG's chunk, its checksum right."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def photo(seed: int = 0, side: int = SIDE) -> Image.Image:
    """Noise, which no format makes small."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def flat(mode: str, colour: Any) -> Image.Image:
    """One colour."""
    return Image.new(mode, (SIDE, SIDE), colour)


class Payload:
    """Makes the file `ran` where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def _read() -> list[Case]:
    red, blue = flat("RGB", (255, 0, 0)), flat("RGB", (0, 0, 255))
    levels = np.full((SIDE, SIDE), 128 * 257, np.uint16)
    palette = flat("P", 0)
    palette.putpalette([10, 20, 30])
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: stored on its side
    wide = Image.new("RGB", (16, 8), (0, 0, 255))
    wide.paste((255, 0, 0), (0, 0, 8, 8))
    rgb16 = np.broadcast_to(np.array([200, 100, 50], np.uint16) * 257, (SIDE, SIDE, 3))
    many = {"save_all": True, "append_images": [blue]}
    return [
        Case("plain.jpg", encoded(red, "JPEG"), pixel=(254, 0, 0), within=2),
        Case("cmyk.jpg", encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG"), pixel=(255, 0, 0), within=3),
        Case("cmyk.tif", encoded(flat("CMYK", (0, 255, 255, 0)), "TIFF"), pixel=(255, 0, 0)),
        Case("grey-16-bit.png", encoded(Image.fromarray(levels), "PNG"), pixel=(128, 128, 128)),
        Case("grey-16-bit.tif", encoded(Image.fromarray(levels), "TIFF"), pixel=(128, 128, 128)),
        Case("grey-32-bit-of-16.tif", encoded(Image.fromarray(levels.astype(np.int32)), "TIFF"), pixel=(128, 128, 128)),
        Case("rgb-16-bit.png", png(rgb16), pixel=(200, 100, 50)),
        Case("rgb-16-bit-interlaced.png", png(rgb16, interlaced=True), pixel=(200, 100, 50)),
        Case("interlaced.png", png(np.asarray(red), interlaced=True), pixel=(255, 0, 0)),
        Case("interlaced-one-column.png", png(np.asarray(red)[:, :1], interlaced=True), pixel=(255, 0, 0), size=(1, SIDE)),
        Case("bilevel.png", encoded(flat("1", 1), "PNG"), pixel=(255, 255, 255)),
        Case("grey.png", encoded(flat("L", 70), "PNG"), pixel=(70, 70, 70)),
        Case("palette.png", encoded(palette, "PNG"), pixel=(10, 20, 30)),
        Case("palette-transparent.png", encoded(palette, "PNG", transparency=0), pixel=(255, 255, 255)),
        Case("alpha.png", encoded(flat("RGBA", (255, 0, 0, 0)), "PNG"), pixel=(255, 255, 255)),
        Case("half-alpha.png", encoded(flat("RGBA", (255, 0, 0, 128)), "PNG"), pixel=(255, 127, 127)),
        Case("grey-alpha.png", encoded(flat("LA", (0, 255)), "PNG"), pixel=(0, 0, 0)),
        Case("animated.gif", encoded(red, "GIF", **many), pixel=(255, 0, 0)),
        Case("animated.webp", encoded(red, "WEBP", lossless=True, **many), pixel=(255, 0, 0)),
        Case("animated.png", encoded(red, "PNG", **many), pixel=(255, 0, 0)),
        Case("pages.tif", encoded(red, "TIFF", **many), pixel=(255, 0, 0)),
        Case("two-lenses.jpg", encoded(red, "MPO", **many), pixel=(254, 0, 0), within=2),
        Case("turned.jpg", encoded(wide, "JPEG", exif=turned, quality=95), pixel=(254, 0, 0), size=(8, 16), within=4),
        Case("turned.png", encoded(wide, "PNG", exif=turned), pixel=(255, 0, 0), size=(8, 16)),
        Case("png-called-jpg.jpg", encoded(red, "PNG"), pixel=(255, 0, 0)),
        Case("padded.jpg", encoded(red, "JPEG") + b"\0" * 3000, pixel=(254, 0, 0), within=2),
        Case("thumbnailed.jpg", encoded(red, "JPEG", exif=b"Exif\0\0" + encoded(blue, "JPEG")), pixel=(254, 0, 0), within=2),
    ]


def _refused() -> list[Case]:
    jpg, pixels = encoded(photo(), "JPEG"), np.asarray(photo())
    whole = {"gif": "GIF", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM", "png": "PNG", "jpg": "JPEG"}
    askew = "which its data are not"
    spoilt = bytearray(png(pixels))
    spoilt[19] ^= 7  # of the width, not of its checksum
    ended = png(pixels)[:-12]
    bomb = "decompression bomb"
    bmp = bytearray(encoded(photo(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 80_000_000, 9))
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(b"\0" * 80_000_000, 9))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\n(ran) (w) file closefile\nshowpage\n%%EOF\n"
    none = "it is not an image"
    return [
        *(Case(f"truncated.{end}", encoded(photo(), kind)[:-60]) for end, kind in whole.items()),
        *(Case(f"half.{end}", encoded(photo(), kind)[: len(encoded(photo(), kind)) // 2]) for end, kind in whole.items()),
        Case("no-end.png", ended),
        Case("cut-then-padded.jpg", jpg[: len(jpg) // 2] + b"\0" * (len(jpg) // 2)),
        Case("start-and-end.jpg", b"\xff\xd8\xff\xd9"),
        Case("wider-than-it-is.png", png(pixels, (SIDE + 3, SIDE)), says=askew),
        Case("taller-than-it-is.png", png(pixels, (SIDE, SIDE + 3)), says=askew),
        Case("narrower-than-it-is.png", png(pixels, (SIDE - 3, SIDE)), says=askew),
        Case("lower-than-it-is.png", png(pixels, (SIDE, SIDE - 3)), says=askew),
        Case("interlaced-of-another-size.png", png(pixels, (SIDE + 1, SIDE), interlaced=True), says=askew),
        Case("flipped-bit.png", bytes(spoilt)),
        Case("no-width.png", png(pixels, (0, SIDE))),
        Case("bomb.png", png(pixels, (60_000, 60_000)), says=bomb),
        Case("bomb-of-zeros.png", png(np.zeros((1, 200_000_000), np.uint8)), says=bomb),
        Case("bomb.bmp", bytes(bmp), says=bomb),
        Case("bomb.ppm", b"P6 60000 60000 255\n" + b"\0" * 100, says=bomb),
        Case("bomb-in-its-text.png", png(pixels, more=text)),
        Case("bomb-in-its-profile.png", png(pixels, more=profile)),
        Case("beyond-16-bit.tif", encoded(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), says="what is white is unknown"),
        Case("below-0.tif", encoded(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"), says="what is white is unknown"),
        Case("floats.tif", encoded(Image.new("F", (4, 4)), "TIFF"), says="floats"),
        Case("empty.jpg", b"", says="it is empty"),
        Case("nothing.png", b"\0" * 4096, says=none),
        Case("words.png", b"a few words", says=none),
        Case("page.jpg", b"<html><script>alert(1)</script></html>", says=none),
        Case("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', says=none),
        Case("program.png", b"\x7fELF" + b"\0" * 200, says=none),
        Case("postscript.png", eps, says=none),
        Case("pickle.png", pickle.dumps(Payload()), says=none),
        Case("icon.png", encoded(photo(), "ICO"), says=none),
    ]


READ, REFUSED = _read(), _refused()
NAMES = {
    "unicode": "Ærøskøbing 写真 🐈.png",
    "long": "n" * 251 + ".png",
    "line break": "first\nsecond.png",
    "terminal": "\x1b[2J\x1b]0;owned\x07.png",
    "markup": "<img src=x onerror=alert(1)>.png",
    "formula": "=cmd|' 'A1.png",
    "spaces": "  a  b .png",
    "right to left": "a\u202egnp.png",
}
"""Names that a file may have."""
NOT_TEXT = os.fsdecode(b"\xff\xfe latin.png")
"""A name of bytes that are no text, as archives of other systems leave them; on Linux."""


def tangled(folder: Path) -> int:
    """A class's folder with links that go nowhere, to themselves and round in circles; how many images count in it."""
    deep = folder / "deep"
    deep.mkdir(parents=True)
    for where in (folder, deep):
        (where / "image.png").write_bytes(encoded(flat("L", 9), "PNG"))
        (where / "up").symlink_to("..", target_is_directory=True)
        (where / "here").symlink_to(".", target_is_directory=True)
        (where / "round").symlink_to(folder, target_is_directory=True)
    return 2
