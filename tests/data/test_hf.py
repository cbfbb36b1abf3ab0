from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stillhouse.data import open_data
from stillhouse.errors import UserError

datasets = pytest.importorskip("datasets", reason="needs the extra stillhouse[datasets]")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("L", (5, 4), value).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table(labels: list[Any], kind: Any, images: list[Any] | None = None, **more: list[Any]) -> Any:
    features = {"image": datasets.Image(), "label": kind} | {name: datasets.Value("int64") for name in more}
    return datasets.Dataset.from_dict(
        {"image": images or [png(i) for i in range(len(labels))], "label": labels, **more}, features=datasets.Features(features)
    )


NAMED = None if datasets is None else datasets.ClassLabel(names=["cat", "dog"])


def test_a_saved_folder_with_two_splits(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": table([0, 1, 1], NAMED), "validation": table([1, 0], NAMED)})
    both.save_to_disk(tmp_path / "saved")
    data = open_data(f"hf:{tmp_path / 'saved'}")
    assert (data.classes, len(data.train), len(data.val), data.channels) == (["cat", "dog"], 3, 2, 3)
    image, label = data.train[2]
    assert (image.mode, image.size, image.getpixel((0, 0)), label) == ("RGB", (5, 4), (2, 2, 2), 1)
    assert data.fingerprint == open_data(f"hf:{tmp_path / 'saved'}").fingerprint
    assert open_data(f"hf:{tmp_path / 'saved'}:channels=1").train[0][0].mode == "L"


def test_one_split_is_split_and_values_become_classes(tmp_path: Path) -> None:
    table(["b", "a"] * 10, datasets.Value("string")).save_to_disk(tmp_path / "saved")
    data = open_data(f"hf:{tmp_path / 'saved'}:val=0.3")
    assert data.classes == ["a", "b"]
    assert (len(data.train), data.val.labels.count(0), data.val.labels.count(1)) == (14, 3, 3)
    seen = [part[i][0].getpixel((0, 0))[0] for part in (data.train, data.val) for i in range(len(part))]
    labels = [part[i][1] for part in (data.train, data.val) for i in range(len(part))]
    assert sorted(seen) == list(range(20))
    assert labels == [1 - value % 2 for value in seen]


def test_parquet_and_image_folders(tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    table([0, 1] * 5, NAMED).to_parquet(tmp_path / "parquet" / "train.parquet")
    data, again = open_data(f"hf:{tmp_path / 'parquet'}"), open_data(f"hf:{tmp_path / 'parquet'}")
    assert len(data.train) == 8
    assert data.fingerprint == again.fingerprint
    for name in ("x", "y"):
        (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "train" / name / f"{i}.png")
    assert open_data(f"hf:{tmp_path / 'pictures'}").classes == ["x", "y"]


def test_broken_images_are_named(tmp_path: Path) -> None:
    images = [png(0), {"bytes": b"junk", "path": None}, png(2), png(3), None, png(5)]
    table([0, 1] * 3, NAMED, images).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        UserError, match=r"2 of 6 images cannot be read: image 1 of train \(it is not an image\); image 4 of train \(it is empty\)"
    ):
        open_data(f"hf:{tmp_path / 'saved'}")
    data = open_data(f"hf:{tmp_path / 'saved'}", bad_data="skip")
    assert len(data.skipped) == 2
    assert len(data.train) + len(data.val) == 4


def test_columns_that_cannot_be_told_are_asked_for(tmp_path: Path) -> None:
    two = table([0, 1] * 3, NAMED, coarse=[0, 1] * 3).cast_column("coarse", datasets.ClassLabel(names=["p", "q"]))
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"several label columns \(label, coarse\).*hf:.*:label=COLUMN"):
        open_data(f"hf:{tmp_path / 'two'}")
    assert open_data(f"hf:{tmp_path / 'two'}:label=coarse").classes == ["p", "q"]
    with pytest.raises(UserError, match="no column 'coarze', did you mean 'coarse'"):
        open_data(f"hf:{tmp_path / 'two'}:label=coarze")
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).save_to_disk(tmp_path / "text")
    with pytest.raises(UserError, match="no column that is clearly the image among text, label"):
        open_data(f"hf:{tmp_path / 'text'}")
    with pytest.raises(UserError, match="expected images"):
        open_data(f"hf:{tmp_path / 'text'}:image=text")


def test_a_label_unknown_to_training_is_refused(tmp_path: Path) -> None:
    strings = datasets.Value("string")
    datasets.DatasetDict({"train": table(["a", "b"], strings), "test": table(["a", "c"], strings)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="the label 'c' at image 1"):
        open_data(f"hf:{tmp_path / 'saved'}")


def test_what_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be read as a data set"):
        open_data(f"hf:{tmp_path / 'empty'}")

    def no_network(*_: object) -> None:
        raise ConnectionError("could not reach the hub.\nmore\nlines")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(
        UserError, match=r"could not be had from the hub \(could not reach the hub\): check the name and the network"
    ) as caught:
        open_data("hf:somebody/something")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'stillhouse\[datasets\]'"):
        open_data("hf:somebody/something")
