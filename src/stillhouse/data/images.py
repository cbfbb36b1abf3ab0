"""Reading images as they are found in the world, and telling the broken ones."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stillhouse.errors import UserError

Item = TypeVar("Item")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
"""All that Pillow may take a file for, whatever it is called: for EPS it would start Ghostscript, for others rarely used code."""
JPEG_END = b"\xff\xd9"
TAIL = 1024
WHITE = 65535
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples a pixel, by a PNG's colour type."""
ADAM7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
"""First column and every how many, first row and every how many, of an interlaced PNG's passes."""


@contextmanager
def opened(source: str | Path | bytes) -> Iterator[Image.Image]:
    """Pillow's image of a file or of bytes, of one of the `FORMATS`; not decoded yet.

    Raises:
        OSError, SyntaxError, ValueError: if it cannot be read, also of what Pillow's plugins raise besides; or if it has more than twice
            `PIL.Image.MAX_IMAGE_PIXELS` pixels (179 million), as a file that is made to fill the memory would.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            yield image
    except (OSError, SyntaxError, ValueError):
        raise
    except Exception as error:  # they raise whatever the bytes make them stumble over: any of it means unreadable
        raise ValueError(str(error) or type(error).__name__) from error


def open_image(source: str | Path | bytes, channels: int = 3) -> Image.Image:
    """The image in a file or in bytes, upright, RGB (channels=3) or grey (channels=1), 8 bits a channel; the first one of several.

    Raises:
        OSError, SyntaxError, ValueError: if it cannot be read (see `opened`).
    """
    with opened(source) as image:
        return plain(image, channels)


def plain(image: Image.Image, channels: int = 3) -> Image.Image:
    """An image of any mode as RGB or grey, upright by its EXIF tag. 16-bit levels are scaled (Pillow would clip them); white shows
    through what is transparent.

    Raises:
        ValueError: if its pixels are floats, or whole numbers beyond 16 bits: nobody knows how much is white.
    """
    image = ImageOps.exif_transpose(image)
    mode = "RGB" if channels == 3 else "L"
    if image.mode == mode:
        image.load()
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int64)
        if levels.size and not 0 <= levels.min() <= levels.max() <= WHITE:
            raise ValueError(f"its levels go from {levels.min()} to {levels.max()}, expected 0 to {WHITE}: what is white is unknown")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floats, whose white is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def why_broken(source: str | Path | bytes) -> str | None:
    """What is wrong with an image, or None: as sure as decoding it where it matters, at a fraction of the cost.

    Pillow's `verify` does not notice a truncated JPEG, and decoding a million photos takes hours. So: the header is parsed. A PNG's
    checksums are verified to its end, and its data must inflate to just what its header says, in about half the time of decoding it. A
    JPEG must end with its end marker (padding aside), which entropy-coded data cannot contain, so a file that stops early does not.
    Whatever this does not settle (other formats, a JPEG with something after its end) is decoded in full. What is left is a JPEG damaged
    in its middle: most decode with a smear, and one that does not stops the run with its name.
    """
    try:
        if not (source if isinstance(source, bytes) else Path(source).stat().st_size):
            return "it is empty"
        with opened(source) as image:
            if image.format == "PNG":
                image.verify()
                return _png_fault(source)
            if image.format != "JPEG" or not _tail(source).rstrip(b"\0").endswith(JPEG_END):
                plain(image)
    except UnidentifiedImageError:
        return "it is not an image"
    except (OSError, SyntaxError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


def _png_fault(source: str | Path | bytes) -> str | None:
    """What is wrong with a PNG whose chunks are whole: it must hold as many bytes as its header says, or it would be read askew."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        data = _png_data(file)
        width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", next(data)[:13])
        passes = ADAM7 if interlaced else ((0, 1, 0, 1),)
        sides = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, dx, y, dy in passes]
        expected = sum(rows * (1 + (columns * depth * PNG_SAMPLES[colour] + 7) // 8) for columns, rows in sides if columns > 0 < rows)
        inflate, found = zlib.decompressobj(), 0
        for part in data:
            while part and found <= expected:
                found += len(inflate.decompress(part, 1 << 20))
                part = inflate.unconsumed_tail
        return None if found == expected else f"its header says {width} x {height}, which its data are not"


def _png_data(file: BinaryIO) -> Iterator[bytes]:
    """The header and the parts of the compressed data of a PNG."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IHDR", b"IDAT"):
            yield file.read(length)
        else:
            file.seek(length, os.SEEK_CUR)
        file.seek(4, os.SEEK_CUR)


def _tail(source: str | Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[-TAIL:]
    with open(source, "rb") as file:
        file.seek(max(0, Path(source).stat().st_size - TAIL))
        return file.read()


def find_images(folder: str | Path) -> Iterator[str]:
    """The paths of the image files in a folder and all below, links followed, in a fixed order.

    A folder that links lead to again, or that `folder` is in, is not entered: links that go round in circles end there.
    """
    seen = {_identity(above) for above in Path(folder).resolve().parents}
    for where, folders, names in os.walk(folder, followlinks=True):
        here = _identity(where)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                yield os.path.join(where, name)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def find_broken(items: Iterable[Item], source: Callable[[Item], str | Path | bytes]) -> list[str | None]:
    """`why_broken` of each item's source, in threads (reading and decoding release Python's lock)."""
    listed = list(items)
    chunks = [listed[i : i + 256] for i in range(0, len(listed), 256)]  # a task each: one for every file of ImageNet would take a gigabyte
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata: the pixels are there, or it raises
        return [why for whys in pool.map(lambda chunk: [why_broken(source(item)) for item in chunk], chunks) for why in whys]


def refuse_or_skip(broken: list[str], total: int, bad_data: str) -> None:
    """Stop if that is what was asked for.

    Raises:
        UserError: if images are broken and `bad_data` is "refuse", or all of them are.
    """
    if broken and (bad_data == "refuse" or len(broken) == total):
        named = "; ".join(broken[:5]) + ("; …" if len(broken) > 5 else "")
        advice = "repair or delete them, or leave them out with bad_data='skip' (--bad-data skip)"
        advice = "expected at least one that can" if len(broken) == total else advice
        raise UserError(f"{len(broken)} of {total} images cannot be read: {named}; {advice}")
