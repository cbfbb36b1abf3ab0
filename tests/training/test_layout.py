"""What makes a step faster or smaller changes nothing that is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from stillhouse.distillers.classics.scratch import Scratch
from stillhouse.errors import UserError
from stillhouse.training.layout import channels_last, checkpointed
from stillhouse.training.log import read_table
from tests.runs import assert_equal, distiller, interrupt, loop, weights


def cnn() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(24, 10))


def lies_channels_last(network: nn.Module) -> bool:
    kernels = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)]
    return all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels if kernel.shape[1] > 1)


def test_convolutional_networks_lie_channels_last_and_transformers_as_they_were() -> None:
    network, vit = cnn(), timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=1)
    images = torch.randn(2, 1, 16, 16)
    before = network.eval()(images)
    assert lies_channels_last(channels_last(network, None))
    torch.testing.assert_close(network(images), before)
    assert not lies_channels_last(channels_last(cnn(), False))
    assert not lies_channels_last(channels_last(vit, None))
    assert lies_channels_last(channels_last(vit, True))


def run(folder: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    learner = Scratch(cnn())
    loop(learner, folder, optimizer="sgd", max_steps=2, epochs=1, log_every=1, **settings).run()
    return weights(learner), [float(row["total"]) for row in read_table(folder / "train.csv")]


def test_a_run_that_lies_otherwise_learns_the_same(tmp_path: Path) -> None:
    plain, losses = run(tmp_path / "plain", channels_last=False, fused=False)
    fused, _ = run(tmp_path / "fused", channels_last=False, fused=True)
    assert_equal(fused, plain)
    assert run(tmp_path / "now")[1] == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("channels_last", [None, False])
def test_a_convolutional_run_is_taken_up_exactly(channels_last: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused update reads parameters and moments side by side: they must lie alike after a resume too."""
    whole = Scratch(cnn())
    loop(whole, tmp_path / "whole", channels_last=channels_last).run()
    interrupt(monkeypatch, 3)
    with pytest.raises(Exception, match="interrupted after step 3"):
        loop(Scratch(cnn()), tmp_path / "parts", channels_last=channels_last).run()
    again = Scratch(cnn())
    loop(again, tmp_path / "parts", channels_last=channels_last, resume=True).run()
    assert_equal(weights(again), weights(whole))


@pytest.mark.parametrize("name", ["masked_kd", "fitnet"])
def test_activations_computed_again_are_the_same(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"hint": 0.5} if name == "masked_kd" else {}
    runs = []
    for again in (False, True):
        learner = distiller(name, **settings)
        loop(learner, tmp_path / str(again), checkpointing=again, max_steps=3).run()
        runs.append(weights(learner))
    assert_equal(runs[1], runs[0])


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ResNet cannot compute its activations again; leave --checkpointing out"):
        checkpointed(torchvision.models.resnet18())
    with pytest.raises(UserError, match="the optimizer lamb has no fused update here; leave --fused out"):
        loop(distiller("scratch"), tmp_path, optimizer="lamb", fused=True)
