"""Reading images as they are found in the world, and telling the broken ones."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stillhouse.errors import UserError

Item = TypeVar("Item")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
JPEG_END = b"\xff\xd9"
TAIL = 1024


def open_image(source: str | Path | bytes, channels: int = 3) -> Image.Image:
    """The image in a file or in bytes, upright, RGB (channels=3) or grey (channels=1), 8 bits a channel.

    Raises:
        OSError, SyntaxError, ValueError: Pillow's, if it cannot be read.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return plain(image, channels)


def plain(image: Image.Image, channels: int = 3) -> Image.Image:
    """An image of any mode as RGB or grey, upright by its EXIF tag. 16-bit levels are scaled (Pillow would clip them); white shows
    through what is transparent.

    Raises:
        ValueError: if its pixels are floats: nobody knows how much is white.
    """
    image = ImageOps.exif_transpose(image)
    mode = "RGB" if channels == 3 else "L"
    if image.mode == mode:
        image.load()
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floats, whose white is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def why_broken(source: str | Path | bytes) -> str | None:
    """What is wrong with an image, or None: as sure as decoding it where it matters, at a fraction of the cost.

    Pillow's `verify` does not notice a truncated JPEG, and decoding a million photos takes hours. So: the header is parsed; a PNG's
    checksums are verified to its end; a JPEG must end with its end marker (padding aside), which entropy-coded data cannot contain, so a
    file that stops early does not. Whatever this does not settle (other formats, a JPEG with something after its end) is decoded in full.
    What is left is a JPEG damaged in its middle: most decode with a smear, and one that does not stops the run with its name.
    """
    try:
        if not (source if isinstance(source, bytes) else Path(source).stat().st_size):
            return "it is empty"
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format == "PNG":
                image.verify()
            elif image.format != "JPEG" or not _tail(source).rstrip(b"\0").endswith(JPEG_END):
                plain(image)
    except UnidentifiedImageError:
        return "it is not an image"
    except Exception as error:  # Pillow's plugins raise whatever the bytes make them stumble over: any of it means unreadable
        return str(error) or type(error).__name__
    return None


def _tail(source: str | Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[-TAIL:]
    with open(source, "rb") as file:
        file.seek(max(0, Path(source).stat().st_size - TAIL))
        return file.read()


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
