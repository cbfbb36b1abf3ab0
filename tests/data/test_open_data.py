from __future__ import annotations

import pytest
import torch
from PIL import Image

from stillhouse.data import IMAGENET_MEAN, Data, open_data
from stillhouse.data.arrays import Arrays
from stillhouse.data.options import path_and_options, read_options
from stillhouse.errors import UserError


def arrays(count: int = 6, channels: int = 3, classes: int = 2) -> Arrays:
    return Arrays(torch.zeros(count, channels, 8, 8, dtype=torch.uint8), torch.arange(count) % classes)


def own(**changes: object) -> Data:
    return Data(**({"name": "mine", "train": arrays(), "val": arrays(), "classes": ["a", "b"], "size": 8} | changes))  # type: ignore[arg-type]


def test_a_users_data_passes_through_with_defaults_filled_in() -> None:
    data = own()
    assert open_data(data) is data
    assert data.mean == IMAGENET_MEAN
    assert data.skipped == []
    assert len(data.fingerprint) == 64
    assert own(channels=1, train=arrays(channels=1), val=arrays(channels=1)).mean == (0.5,)
    assert own().fingerprint == data.fingerprint != own(train=arrays(7)).fingerprint


class Wrong(Arrays):
    def __init__(self, sample: object, length: int = 1) -> None:
        self.sample, self.length = sample, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.sample  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": ["a"]}, "at least two"),
        ({"train": Wrong(None, length=0)}, "the train set of 'mine' is empty"),
        ({"val": Wrong(torch.zeros(3, 8, 8))}, "expected a pair"),
        ({"val": Wrong((torch.zeros(3, 8, 8), 0))}, r"torch.float32 tensor of shape \(3, 8, 8\), expected PIL images or uint8"),
        ({"train": arrays(channels=1)}, "has 1 channels, expected 3"),
        ({"train": Wrong((Image.new("RGB", (8, 8)), 2))}, "the label 2, expected 0 to 1"),
        ({"train": iter([])}, "has no length"),
    ],
)
def test_what_is_wrong_with_a_users_data_is_said(changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        own(**changes)


def boxed(*corners: float, label: int = 1) -> Wrong:
    return Wrong((Image.new("RGB", (20, 10)), {"boxes": torch.tensor([corners]), "labels": torch.tensor([label])}))


@pytest.mark.parametrize(
    ("task", "sample", "says"),
    [
        ("detect", boxed(0, 0, 8, 8, label=3), r"the labels \[3\], expected 1 to 2"),
        ("detect", boxed(8, 0, 8, 8), "a box without area"),
        ("detect", boxed(0, 0, float("nan"), 8), "a box without area"),
        ("detect", boxed(0, 0, 8, 11.5), r"a box that reaches out of its image of 20 x 10 among .*11\.5.*: cut it to the image"),
        ("detect", boxed(-2, 0, 8, 8), "a box that reaches out of its image of 20 x 10"),
        ("detect", boxed(-0.5, -0.5, 20.5, 10.5), ""),
        ("segment", Wrong((Image.new("RGB", (20, 10)), torch.full((10, 20), 2))), r"the mask values \[2\], expected 0 to 1, or 255"),
        ("segment", Wrong((Image.new("RGB", (20, 10)), torch.zeros(20, 10).byte())), "a mask of 10 x 20 for an image of 20 x 10, expected"),
        ("segment", Wrong((torch.zeros(3, 10, 20).byte(), torch.zeros(10, 20).byte())), ""),
    ],
)
def test_what_is_wrong_with_a_users_boxes_and_masks_is_said(task: str, sample: Wrong, says: str) -> None:
    if not says:
        own(task=task, train=sample, val=sample)
        return
    with pytest.raises(UserError, match=says):
        own(task=task, train=sample, val=sample)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("digit", "unknown data set 'digit', did you mean 'digits'?"),
        ("fashion_mnist:train=3", "did you mean 'fashion-mnist'?"),
        ("xyzzy", "expected one of digits, fashion-mnist, animal-mnist, imagefolder:DIR, hf:DIR_OR_NAME"),
        ("digits:canvs=16", "'digits' has no option 'canvs', did you mean 'canvas'?"),
        ("digits:canvas=big", "canvas='big' is no int"),
        ("digits:canvas=true", "canvas=True is no int"),
        ("digits:canvas=4", "canvas=4 is out of range, expected 8 to 256"),
        ("digits:train=5", "train=5 is out of range, expected 10 to"),
        ("imagefolder:", "there is no folder ''"),
        ("imagefolder:/no/such/folder", "there is no folder '/no/such/folder'"),
        ("hf:/no/such/folder", "there is no folder '/no/such/folder'"),
        ("fashion-mnist:root=/no/such/folder", "no Fashion-MNIST in '/no/such/folder'"),
    ],
)
def test_a_bad_spec_gets_one_sentence(spec: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        open_data(spec)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bare_folder_is_recognised(tmp_path) -> None:
    with pytest.raises(UserError, match=f"did you mean 'imagefolder:{tmp_path}'"):
        open_data(str(tmp_path))


def test_bad_data_is_refuse_or_skip() -> None:
    with pytest.raises(UserError, match="expected 'refuse' or 'skip'"):
        open_data("digits", bad_data="ignore")  # type: ignore[arg-type]


def test_options_follow_the_last_colon_of_a_path(tmp_path) -> None:
    assert path_and_options("/a/b:val=0.1") == ("/a/b", "val=0.1")
    assert path_and_options("C:/a/b") == ("C:/a/b", "")
    (tmp_path / "x:y=1").mkdir()
    assert path_and_options(f"{tmp_path}/x:y=1") == (f"{tmp_path}/x:y=1", "")
    assert read_options("val=1", "here", val=float) == {"val": 1}
    assert read_options("", "here", val=float) == {}
