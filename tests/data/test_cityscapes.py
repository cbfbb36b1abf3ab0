from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stillhouse.data import open_data
from stillhouse.data.cityscapes import IDS, LABELS, open_cityscapes
from stillhouse.errors import UserError


def frame(root: Path, part: str, name: str, values: np.ndarray, kind: str = "labelIds") -> None:
    city = name.split("_")[0]
    for folder in (f"leftImg8bit/{part}/{city}", f"gtFine/{part}/{city}"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", values.shape[::-1]).save(root / f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png")
    Image.fromarray(values.astype(np.uint8)).save(root / f"gtFine/{part}/{city}/{name}_gtFine_{kind}.png")
    (root / f"gtFine/{part}/{city}/{name}_gtFine_color.png").write_bytes(b"not looked at")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    every = np.append(np.arange(LABELS), 255).reshape(5, 7)
    frame(tmp_path, "train", "aachen_000000_000019", every)
    frame(tmp_path, "train", "zurich_000000_000019", every)
    frame(tmp_path, "val", "munster_000000_000019", every[::-1])
    return tmp_path


def test_the_labels_become_the_nineteen_classes(root: Path) -> None:
    data = open_data(f"cityscapes:{root}")
    assert (data.task, len(data.classes), data.skipped) == ("segment", 19, [])
    assert (len(data.train), len(data.val)) == (2, 1)
    image, mask = data.train[0]
    assert image.size == (7, 5)
    found = mask.flatten().tolist()
    assert [data.classes[number] if number < 19 else None for number in found] == [
        {label: name for name, label in IDS.items()}.get(label) for label in [*range(LABELS), 255]
    ]
    assert sorted(set(found)) == [*range(19), 255]
    assert (data.classes[0], data.classes[10], data.classes[18]) == ("road", "sky", "bicycle")


def test_training_numbers_are_taken_as_they_are(root: Path) -> None:
    with pytest.raises(UserError, match=r"gtFine/train' has no CITY/\*_gtFine_labelTrainIds.png"):
        open_cityscapes(f"{root}:labels=labelTrainIds")
    values = np.append(np.arange(19), 255).reshape(4, 5)
    for part, name in (("train", "aachen_000000_000019"), ("train", "zurich_000000_000019"), ("val", "munster_000000_000019")):
        frame(root, part, name, values, "labelTrainIds")
    assert np.array_equal(open_cityscapes(f"{root}:labels=labelTrainIds").train[0][1].numpy(), values)


def test_what_is_wrong_is_named_and_refused_or_left_out(root: Path) -> None:
    frame(root, "train", "ulm_000000_000001", np.full((5, 7), 34))
    frame(root, "train", "ulm_000000_000002", np.zeros((5, 7)))
    (root / "gtFine/train/ulm/ulm_000000_000002_gtFine_labelIds.png").unlink()
    frame(root, "val", "ulm_000000_000003", np.zeros((5, 7)))
    Image.new("L", (7, 6)).save(root / "gtFine/val/ulm/ulm_000000_000003_gtFine_labelIds.png")
    with pytest.raises(UserError, match="3 things are wrong"):
        open_cityscapes(str(root))
    data = open_cityscapes(str(root), bad_data="skip")
    assert [fault.split("/")[-1].split("(", 1)[1] for fault in data.skipped] == [
        "it has no mask)",
        "it has the value 34, expected 0 to 33, 255)",
        "it is 7 x 5, but annotated as 7 x 6)",
    ]
    assert (len(data.train), len(data.val)) == (2, 1)


def test_folders_and_options_that_cannot_be(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder '.*nowhere', expected cityscapes:DIR"):
        open_cityscapes(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="labels=x, expected labelIds or labelTrainIds"):
        open_cityscapes(f"{root}:labels=x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"leftImg8bit/train' has no CITY/\*_leftImg8bit.png, expected Cityscapes"):
        open_cityscapes(str(tmp_path / "empty"))
