"""Condensed data: written, read, and trained on by any network."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import stillhouse as sh
from stillhouse.data import open_data
from stillhouse.data.condensed import Condensed, read_condensed
from stillhouse.data.loading import train_batches
from stillhouse.data.transforms import Normalise, eval_transform, train_transform
from stillhouse.errors import UserError
from stillhouse.models.opening import open_model
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.run_folder import write_settings

MEAN, STD = (0.3,), (0.5,)


def pairs(count: int = 5, **changes: Any) -> Condensed:
    """Images that go beyond black and white, with 32 features."""
    given = {"images": 2 * torch.rand(count, 1, 8, 8) - 0.5, "targets": torch.randn(count, 32), "mean": MEAN, "std": STD}
    return Condensed(**given | changes)


@cache
def teacher() -> Any:
    return open_model(TEACHER, classes=10, channels=1, task="encode")


TEACHER = "timm/vit_tiny_patch16_224:img_size=8,patch_size=4,embed_dim=32,depth=1,num_heads=2"


def a_run(folder: Path, condensed: Condensed, **changes: Any) -> Path:
    """A run folder as condensation leaves it."""
    condensed.write(folder / "data")
    job = {"data": "digits:train=64", "teacher": TEACHER, "teacher_weights": "random", "allow_partial": False, "seed": 0}
    write_settings(folder, job | changes)
    return folder


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    data = pairs()
    data.write(tmp_path / "data")
    again = read_condensed(tmp_path / "data")
    assert torch.equal(again.images, data.images)
    assert torch.equal(again.targets, data.targets)
    assert torch.equal(again.fed(), data.fed())
    torch.testing.assert_close(data.fed(), (data.images - 0.3) / 0.5)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["about.json", "images.png", "pairs.safetensors"]
    about = json.loads((tmp_path / "data" / "about.json").read_text())
    assert about["bytes"] == {"images": 5 * 64 * 4, "targets": 5 * 32 * 4}, "the targets are part of what is stored"
    with Image.open(tmp_path / "data" / "images.png") as sheet:
        assert sheet.size[0] >= 2 * 64, "large enough to be looked at"


def test_it_is_written_anew_and_leaves_nothing_behind(tmp_path: Path) -> None:
    pairs().write(tmp_path / "data")
    newer = pairs(3)
    newer.write(tmp_path / "data")
    assert len(read_condensed(tmp_path / "data")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_another_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no condensed data"):
        pairs().write(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "dear"


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pairs()
    first.write(tmp_path / "data")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("stillhouse.data.condensed.save_image", full)
    with pytest.raises(UserError, match="No space left"):
        pairs().write(tmp_path / "data")
    assert torch.equal(read_condensed(tmp_path / "data").images, first.images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(5, 1, 8, 8, dtype=torch.uint8)}, "torch.uint8 .* whole numbers cannot be learnt"),
        ({"images": torch.zeros(5, 8, 8)}, "expected floats"),
        ({"images": torch.zeros(0, 1, 8, 8), "targets": torch.zeros(0, 32)}, "there are 0 images and 0 targets"),
        ({"targets": torch.zeros(4, 32)}, "there are 5 images and 4 targets"),
        ({"targets": torch.zeros(5)}, "expected floats .m, D. to regress"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, "torch.int64 .* to regress"),
        ({"targets": torch.zeros(5), "task": "classify"}, "or class numbers .m. to classify"),
    ],
)
def test_pairs_that_are_none_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pairs(**changes)


@pytest.mark.parametrize("damage", ["about.json", "pairs.safetensors"])
def test_damaged_data_are_refused(tmp_path: Path, damage: str) -> None:
    pairs().write(tmp_path / "data")
    (tmp_path / "data" / damage).write_text("{}")
    with pytest.raises(UserError, match="holds no whole condensed data"):
        read_condensed(tmp_path / "data")


def test_classes_are_kept_as_they_are(tmp_path: Path) -> None:
    numbers = torch.arange(5)
    data = pairs(targets=numbers, task="classify")
    assert [name for name, _ in data.named_parameters()] == ["images"]
    opened = open_data(str(a_run(tmp_path, data, teacher=None)))
    assert opened.task == "classify"
    assert opened.classes == [str(digit) for digit in range(10)]
    assert [int(opened.train[i][1]) for i in range(5)] == numbers.tolist()
    soft = pairs(targets=torch.rand(5, 10).softmax(-1), task="classify")
    assert torch.equal(open_data(str(a_run(tmp_path / "soft", soft, teacher=None))).train[2][1], soft.targets[2])


def test_a_run_is_opened_with_the_teachers_answers_to_validate_on(tmp_path: Path) -> None:
    data = pairs()
    opened, source = open_data(str(a_run(tmp_path, data))), open_data("digits:train=64")
    assert (opened.task, opened.channels, opened.size, len(opened.classes)) == ("regress", 1, 8, 32)
    assert (opened.mean, opened.std) == (pytest.approx(MEAN), pytest.approx(STD))
    assert len(opened.train) == 5
    assert torch.equal(opened.train[3][0], data.images[3])
    assert torch.equal(opened.train[3][1], data.targets[3])
    image, answer = opened.val[7]
    assert torch.equal(image, source.val[7][0])
    network = teacher().eval()
    seen = eval_transform(preprocessing_of(network), source)(image)
    with torch.no_grad():
        torch.testing.assert_close(answer, network(seen[None])[0])
    other = open_data(str(a_run(tmp_path / "other", pairs())))
    assert other.fingerprint != opened.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "imagefolder:/nowhere"}, "cannot be judged: .*nowhere"),
        ({"data": None}, "its data were objects in Python"),
        ({"teacher": None}, "its teacher was an object in Python"),
        ({"teacher": "runs/gone"}, "cannot be judged"),
        ({"teacher": TEACHER.replace("32", "16")}, "its teacher answers 16 numbers, and the targets have 32"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_a_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_data(str(a_run(tmp_path, pairs(), **changes)))


class Floats(Dataset[tuple[Tensor, int]]):
    def __init__(self, image: Tensor) -> None:
        self.image = image

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.image, i


def test_floats_are_normalised_as_the_same_picture_in_whole_numbers() -> None:
    picture = torch.randint(256, (1, 8, 8), dtype=torch.uint8)
    normalise = Normalise(8, MEAN, STD, "bilinear")
    torch.testing.assert_close(normalise(picture / 255), normalise(picture))
    assert normalise(torch.full((1, 8, 8), 1.5)).max() == pytest.approx((1.5 - 0.3) / 0.5), "beyond white stays beyond white"
    torch.testing.assert_close(Normalise(4, MEAN, STD, "bilinear")(picture / 255), normalise_small(picture), rtol=0, atol=2e-2)


def normalise_small(picture: Tensor) -> Tensor:
    return Normalise(4, MEAN, STD, "bilinear")(picture)


def test_augmented_floats_end_at_white(tmp_path: Path) -> None:
    data = pairs(targets=torch.arange(5), task="classify", images=torch.full((5, 1, 8, 8), 1.5))
    opened = open_data(str(a_run(tmp_path, data)))
    transform = train_transform(None, opened, hflip=0.5)
    _, _, images, labels = next(train_batches(opened.train, transform, batch=5, epoch=0, seed=0))
    torch.testing.assert_close(images, torch.full((5, 1, 8, 8), (1 - 0.3) / 0.5))
    assert sorted(labels.tolist()) == list(range(5))


def test_any_network_trains_on_a_run_that_left_data(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "condensed", pairs(16))
    student = "timm/vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=16,depth=1,num_heads=2"
    recipe: dict[str, Any] = {"batch": 8, "epochs": 3, "eval_every": 3, "trackers": "none", "lr": 1e-2, "warmup_epochs": 0.0}
    run = sh.distill("scratch", student=student, data=str(folder), out=str(tmp_path / "run"), **recipe)
    assert {"r2", "mse", "val_mse"} <= run.metrics.keys()
    assert run.metrics["val_mse"] == pytest.approx(run.metrics["mse"], rel=1e-4)
    with pytest.raises(UserError, match="leave hflip out"):
        sh.distill("scratch", student=student, data=str(folder), out=str(tmp_path / "other"), hflip=0.5, **recipe)
