"""What fuzzing found, for good; and every target on a few inputs, so that it does not rot. Needs no atheris."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from stillhouse.data import open_data
from stillhouse.errors import UserError
from stillhouse.models.opening import open_model
from tests.counts import tried
from tests.fuzz.targets import TARGETS

FOUND = {
    "spec": [b'"' * 300 + b":a=", b"runs/" + b"a" * 300],
    "settings": [b"\x03\x8b\x01\x1e\x01\x84\xb5=\xa8\x01\x02\x03\rP\x02\x03\x86.\x03\t", b"\0keep: " + b"[" * 9000],
    "config": [b"\0a: &a [*a]\n", b"\0keep: " + b"{a: " * 9000],
    "run_folder": [b"\x05", b"\x09\x00\x00\x21\x07", b"\0" + b"[" * 100_000, b'\0{"result": [{"miou": 1}]}'],
    "checkpoint": [b"\x01\x00\x9e", b"\0" + b"[" * 100_000],
    "torch_file": [b"G\xf4\x00", b"\x80\x04\x96\0\0\0\0\0\0\0\x10."],
    "network": [b"\0\0" + b"[" * 100_000, b"\0aL\xcc\xcc"],
    "pictures": [b"\x05", b"\x89S\x02\x01~\x01\x00\xb3\x00\x02\xf6\xbe\x02\x02\x00\x01\x00\x03hN"],
    "pickled_array": [b"\x96Y'\x03b\x00\x00\x00\x01\x01\xc1\xbc"],
}
"""By target: inputs at which something else than a sentence came out, once."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_a_target_gives_a_sentence_or_nothing(name: str, tmp_path: Path) -> None:
    chance = random.Random(name)
    inputs = [b"", *FOUND.get(name, []), *(chance.randbytes(length) for length in (1, 2, 3, 6, 6, 9, 40))]
    for number, data in enumerate(inputs):
        folder = tmp_path / str(number)
        folder.mkdir()
        with contextlib.suppress(UserError):
            TARGETS[name](data, folder)
    tried("inputs of fuzz targets", len(inputs))


def test_every_finding_is_of_a_target() -> None:
    assert FOUND.keys() <= TARGETS.keys()


def test_names_that_no_file_can_have_are_a_sentence() -> None:
    long = "a" * 300
    with pytest.raises(UserError, match="longer than a file's can be"):
        open_model(f"runs/{long}", classes=2, channels=3)
    for form in ("imagefolder", "coco", "voc", "masks", "hf"):
        with pytest.raises(UserError, match="longer than a file's can be"):
            open_data(f"{form}:./{long}")
    with pytest.raises(UserError, match="unknown data set"):
        open_data(long)
