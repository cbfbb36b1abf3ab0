"""Networks of diffusers: opened by name, saved with how they are drawn from, and what they refuse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.models.opening import open_model
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of, set_preprocessing
from stillhouse.models.sampling import FlowNetwork, Sampling
from stillhouse.models.saving import load_student, save_student

UNET, DIT = "diffusers/unet2d:channels=(8,16)", "diffusers/dit:width=16,depth=2,heads=2"
EITHER = pytest.mark.parametrize("spec", [UNET, DIT], ids=["unet2d", "dit"])
LABELS = torch.tensor([0, 2, 3])


@pytest.fixture
def diffusers() -> Any:
    return pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'stillhouse[generative]'")


def opened(spec: str, **fit: Any) -> FlowNetwork:
    network = open_model(spec, **{"classes": 4, "channels": 1, "image_size": 8, "task": "generate", **fit})
    assert isinstance(network, FlowNetwork)
    return network.eval()


@EITHER
@pytest.mark.parametrize("side", [8, 9, 14])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_fits_the_data(spec: str, side: int, channels: int, diffusers: Any) -> None:
    network = opened(spec, image_size=side, channels=channels)
    assert network.shape == (channels, side, side)
    assert network.null == 4
    assert network.sample(LABELS, sampling=Sampling(2, 2.0)).shape == (3, channels, side, side)


@EITHER
def test_it_hears_the_class_the_null_condition_and_the_level(spec: str, diffusers: Any) -> None:
    network = opened(spec)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # a DiT begins with nothing to say
        x, sigma = torch.randn(1, 1, 8, 8).expand(5, -1, -1, -1), torch.full((5,), 0.5)
        by_class = network(x, sigma, torch.arange(5))
        by_level = network(x, torch.linspace(0, 1, 5), torch.zeros(5, dtype=torch.long))
    for answers in (by_class, by_level):
        for other in range(1, 5):
            assert not torch.allclose(answers[0], answers[other], atol=1e-4)


@EITHER
def test_labels_are_left_out_by_who_trains_and_never_by_the_network(spec: str, diffusers: Any) -> None:
    network = opened(spec).train()
    x, labels = torch.randn(64, 1, 8, 8), torch.zeros(64, dtype=torch.long)
    torch.manual_seed(1)
    first = network(x, torch.ones(64), labels)
    assert torch.equal(first, network(x, torch.ones(64), labels))


def test_the_level_is_told_as_diffusers_counts_time(diffusers: Any) -> None:
    network, seen = opened(UNET), []
    network.body.network.time_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(torch.randn(2, 1, 8, 8), torch.tensor([0.25, 1.0]), LABELS[:2])
    assert seen[0].tolist() == [250.0, 1000.0]


def test_what_is_filled_up_is_cut_off(diffusers: Any) -> None:
    network = opened(UNET, image_size=9)
    x = torch.randn(2, 1, 9, 9)
    padded = nn.functional.pad(x, (0, 1, 0, 1))
    found = network(x, torch.ones(2), LABELS[:2])
    assert torch.equal(found, network.body.network(padded, torch.full((2,), 1000.0), class_labels=LABELS[:2]).sample[..., :9, :9])


def test_a_network_may_do_without_null_condition(diffusers: Any) -> None:
    network = opened(f"{UNET},null=false")
    assert network.null is None
    assert network.sample(LABELS, sampling=Sampling(1)).shape == (3, 1, 8, 8)
    with pytest.raises(UserError, match="no null condition"):
        opened(f"{UNET},null=false,guidance=2.0")


@EITHER
def test_a_saved_network_draws_the_same_images_again(spec: str, tmp_path: Path, diffusers: Any) -> None:
    network = opened(f"{spec},guidance=2.0")
    network.set_sampling(Sampling((1.0, 0.4), 1.5, renoise=True))
    set_preprocessing(network, Preprocessing((0.3,), (0.4,), 8))
    save_student(network, tmp_path / "student")
    again = load_student(tmp_path / "student")
    assert isinstance(again, FlowNetwork)
    assert again.sampling == network.sampling
    assert preprocessing_of(again) == preprocessing_of(network)
    noise = torch.randn(2, 3, 1, 8, 8)
    assert torch.equal(again.eval().sample(LABELS, noise), network.sample(LABELS, noise))
    fitted = opened(str(tmp_path))
    assert torch.equal(fitted.sample(LABELS, noise), network.sample(LABELS, noise))


def test_a_folder_for_other_classes_is_refused(tmp_path: Path, diffusers: Any) -> None:
    save_student(opened(UNET), tmp_path / "student")
    with pytest.raises(UserError, match="of 4 classes and the data has 7; train one on these data"):
        opened(str(tmp_path), classes=7)
    with pytest.raises(UserError, match=r"takes 1 channel\(s\) and the data has 3"):
        opened(str(tmp_path), channels=3)
    with pytest.raises(UserError, match="is there to generate images"):
        opened(str(tmp_path), task="classify")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("diffusers/unet", "no diffusers network 'unet' here, did you mean 'unet2d'"),
        ("diffusers/unet2d:chanels=(8,16)", "has no option 'chanels', did you mean 'channels'"),
        ("diffusers/unet2d:channels=8", "says channels=8, expected for example"),
        ("diffusers/unet2d:channels=(8,0)", "whole numbers of at least 1"),
        ("diffusers/unet2d:layers=0", "whole numbers of at least 1"),
        ("diffusers/unet2d:attention=1", "says attention=1, expected for example attention=false"),
        ("diffusers/unet2d:size=16", "images have a side of 8, leave size out"),
        ("diffusers/unet2d:levels=0", "at least one step"),
        ("diffusers/unet2d:levels=(0.5,0.2)", "fall from 1"),
        ("diffusers/unet2d:guidance=0.5", "guidance is 0.5"),
        ("diffusers/dit:width=16,heads=3", "does not divide into heads=3"),
    ],
)
def test_specs_that_cannot_work_are_refused(spec: str, said: str, diffusers: Any) -> None:
    with pytest.raises(UserError, match=said):
        opened(spec)


def test_there_are_no_published_weights(diffusers: Any) -> None:
    with pytest.raises(UserError, match="train one with --method flow"):
        opened(UNET, weights="pretrained")


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'stillhouse\[generative\]'"):
        opened(UNET)
