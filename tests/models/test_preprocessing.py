from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stillhouse.errors import UserError
from stillhouse.models.preprocessing import Preprocessing, Refeed, preprocessing_of, set_preprocessing

IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 8)
HALF = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 8)
means = st.tuples(*[st.floats(0, 1)] * 3)
stds = st.tuples(*[st.floats(0.05, 1)] * 3)


def normalised(pixels: torch.Tensor, to: Preprocessing) -> torch.Tensor:
    return (pixels - torch.tensor(to.mean).view(-1, 1, 1)) / torch.tensor(to.std).view(-1, 1, 1)


@settings(deadline=None)
@given(means, stds, means, stds)
def test_equal_sizes_are_one_affine_map_to_fp32_rounding(mean_s: tuple, std_s: tuple, mean_t: tuple, std_t: tuple) -> None:
    student, teacher = Preprocessing(mean_s, std_s, 4), Preprocessing(mean_t, std_t, 4)
    pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    images = normalised(pixels, student).float()
    s_mean, s_std, t_mean, t_std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean_s, std_s, mean_t, std_t))
    exact = (images.double() * s_std + s_mean - t_mean) / t_std
    bound = 4 * torch.finfo(torch.float32).eps * ((images.double() * s_std / t_std).abs() + ((s_mean - t_mean) / t_std).abs() + 1e-30)
    assert ((Refeed(student, teacher)(images).double() - exact).abs() <= bound).all()


def test_there_and_back_is_the_image() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert torch.allclose(Refeed(HALF, IMAGENET)(Refeed(IMAGENET, HALF)(images)), images, atol=1e-6)


@pytest.mark.parametrize("pair", [(IMAGENET, IMAGENET), (None, IMAGENET), (IMAGENET, None), (None, None)])
def test_where_nothing_differs_the_same_object_comes_back(pair: tuple) -> None:
    images = torch.randn(2, 3, 8, 8)
    assert Refeed(*pair)(images) is images


def test_another_size_is_an_antialiased_resize_then_the_affine_map() -> None:
    images = torch.randn(2, 3, 8, 8)
    for mode in ("bicubic", "bilinear"):
        teacher = Preprocessing(HALF.mean, HALF.std, 4, mode)
        resized = F.interpolate(images, (4, 4), mode=mode, antialias=True)
        expected = (resized * torch.tensor(IMAGENET.std).view(-1, 1, 1) + torch.tensor(IMAGENET.mean).view(-1, 1, 1) - 0.5) / 0.5
        assert torch.allclose(Refeed(IMAGENET, teacher)(images), expected, atol=1e-6)
        assert torch.equal(Refeed(HALF, teacher)(images), resized)


def test_a_constant_image_stays_constant_through_a_resize() -> None:
    grey = normalised(torch.full((1, 3, 8, 8), 0.3), IMAGENET)
    fed = Refeed(IMAGENET, Preprocessing(HALF.mean, HALF.std, 20))(grey)
    assert fed.shape == (1, 3, 20, 20)
    assert torch.allclose(fed, normalised(torch.full((1, 3, 20, 20), 0.3), HALF), atol=1e-5)


def test_what_is_not_square_keeps_its_shape_where_that_is_asked() -> None:
    teacher = Preprocessing(IMAGENET.mean, IMAGENET.std, 4)
    wide, padded = torch.randn(1, 3, 8, 12), torch.randn(2, 3, 12, 12)
    assert Refeed(IMAGENET, teacher)(wide).shape[-2:] == (4, 4)
    keeping = Refeed(IMAGENET, teacher, keep_shape=True)
    assert torch.equal(keeping(wide), F.interpolate(wide, (4, 6), mode="bicubic", antialias=True))
    assert keeping(padded).shape[-2:] == (6, 6)  # of 8 x 12 and 12 x 8, padded
    assert Refeed(IMAGENET, IMAGENET, keep_shape=True)(padded) is padded
    any_size = Preprocessing(IMAGENET.mean, IMAGENET.std)
    assert Refeed(any_size, teacher, keep_shape=True)(wide).shape[-2:] == (4, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept_and_rounded_once(dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, 8, 8).to(dtype)
    teacher = Preprocessing(HALF.mean, HALF.std, 4)
    fed = Refeed(IMAGENET, teacher)(images)
    assert fed.dtype == dtype
    assert torch.equal(fed, Refeed(IMAGENET, teacher)(images.float()).to(dtype))


def test_gradients_pass_and_nothing_is_saved() -> None:
    refeed = Refeed(IMAGENET, HALF)
    assert not refeed.state_dict()
    assert not list(refeed.parameters())
    assert len(list(refeed.buffers())) == 2  # they follow the module's device
    images = torch.randn(1, 3, 8, 8, requires_grad=True)
    refeed(images).sum().backward()
    assert torch.allclose(images.grad, torch.tensor(IMAGENET.std).view(-1, 1, 1).expand(1, 3, 8, 8) / 0.5)


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(UserError, match=r"teacher sees 3 channel\(s\) and the student 1"):
        Refeed(Preprocessing((0.5,), (0.5,), 8), IMAGENET)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": (0.5,), "std": (0.5, 0.5)},
        {"mean": (), "std": ()},
        {"mean": (0.5,), "std": (0.0,)},
        {"mean": (0.5,), "std": (float("nan"),)},
        {"mean": (0.5,), "std": (0.5,), "size": 0},
        {"mean": (0.5,), "std": (0.5,), "interpolation": "cubist"},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Preprocessing(**wrong)


def test_timm_tells_what_its_weights_want() -> None:
    assert preprocessing_of(timm.create_model("resnet18.tv_in1k")) == Preprocessing(IMAGENET.mean, IMAGENET.std, 224, "bilinear")
    assert preprocessing_of(timm.create_model("vit_tiny_patch16_224")) == Preprocessing(HALF.mean, HALF.std, 224, "bicubic")


def test_a_network_built_for_another_size_or_channels_says_so() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=4, depth=1, in_chans=1)
    assert preprocessing_of(model) == Preprocessing((0.5,), (0.5,), 28)
    grey = preprocessing_of(timm.create_model("resnet18", in_chans=1))
    assert grey is not None
    assert grey.mean == (pytest.approx(0.449),)


def test_what_is_set_wins_and_reaches_timm() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=4, depth=1, in_chans=1)
    other = timm.create_model("vit_tiny_patch16_224", depth=1)
    wanted = Preprocessing((0.1,), (0.2,), 28, "bilinear")
    set_preprocessing(model, wanted)
    assert preprocessing_of(model) == wanted
    cfg = model.pretrained_cfg
    assert (cfg["mean"], cfg["std"], cfg["input_size"], cfg["interpolation"]) == ((0.1,), (0.2,), (1, 28, 28), "bilinear")
    assert other.pretrained_cfg["mean"] == HALF.mean  # not shared between networks


def test_plain_modules() -> None:
    model = nn.Linear(1, 1)
    assert preprocessing_of(model) is None
    set_preprocessing(model, HALF)
    assert preprocessing_of(model) == HALF
