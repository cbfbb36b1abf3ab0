"""What an encoder's features are worth: a linear readout and the nearest neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stillhouse as sh
from stillhouse import tasks
from stillhouse.errors import UserError
from stillhouse.tasks.encode import NEIGHBOURS, Encode
from tests.runs import files

CLASSES = ["a", "b", "c"]


def blobs(count: int, seed: int, spread: float = 0.3, width: int = 6) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = 2 * torch.eye(3, width)
    return centres[labels] + spread * torch.randn(count, width, generator=random), labels


def measured(metric: Encode, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], batch: int = 7) -> dict[str, float]:
    metric.learn(nn.Identity(), zip(train[0].split(batch), train[1].split(batch), strict=True))
    for features, labels in zip(val[0].split(batch), val[1].split(batch), strict=True):
        metric.update(features, labels)
    return metric.compute()


def test_it_is_the_metric_of_the_task() -> None:
    assert tasks.find("encode") is Encode
    assert Encode.wants_examples
    assert Encode.headline in Encode.titles


def test_classes_that_lie_apart_are_read_and_noise_is_not() -> None:
    found = measured(Encode(CLASSES), blobs(90, 0), blobs(60, 1))
    assert found == {"probe": 1.0, "knn": 1.0}
    metric = Encode(CLASSES)
    noise = measured(metric, (torch.randn(300, 6), torch.arange(300) % 3), (torch.randn(600, 6), torch.arange(600) % 3))
    assert max(noise.values()) < metric.chance + 0.05


def test_the_readout_is_ridge_regression() -> None:
    train, val = blobs(40, 0, spread=2.0), blobs(50, 1, spread=2.0)
    sklearn = pytest.importorskip("sklearn.linear_model")
    mean, std = train[0].double().mean(0), train[0].double().std(0, correction=0)
    ridge = sklearn.Ridge(alpha=0.01 * 40).fit(((train[0] - mean) / std).numpy(), nn.functional.one_hot(train[1], 3).numpy())
    guess = torch.from_numpy(ridge.predict(((val[0] - mean) / std).numpy())).argmax(-1)
    assert measured(Encode(CLASSES), train, val)["probe"] == pytest.approx((guess == val[1]).double().mean().item())


def test_the_neighbours_vote_by_their_nearness() -> None:
    train, val = blobs(60, 0, spread=2.0), blobs(50, 1, spread=2.0)
    right = 0
    for feature, label in zip(*val, strict=True):
        cosines = nn.functional.cosine_similarity(feature[None], train[0])
        nearest = cosines.topk(NEIGHBOURS).indices
        votes = [sum(float((cosines[i] / 0.07).exp()) for i in nearest if train[1][i] == c) for c in range(3)]
        right += votes.index(max(votes)) == label
    assert measured(Encode(CLASSES), train, val)["knn"] == pytest.approx(right / 50)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), scale=st.floats(0.01, 1000), batch=st.integers(1, 60))
def test_scale_and_batches_do_not_matter(seed: int, scale: float, batch: int) -> None:
    train, val = blobs(60, seed, spread=1.5), blobs(60, seed + 1, spread=1.5)
    expected = measured(Encode(CLASSES), train, val)
    scaled = measured(Encode(CLASSES), (scale * train[0], train[1]), (scale * val[0], val[1]), batch)
    assert scaled == pytest.approx(expected, abs=0.034), "two images on a border"


def test_few_examples_and_wide_features() -> None:
    found = measured(Encode(CLASSES), blobs(6, 0, width=64), blobs(30, 1, width=64))
    assert found["knn"] > 0.9
    assert 0 <= found["probe"] <= 1, "six images say little about 64 channels, and it is no error"


def test_another_pass_begins_anew() -> None:
    metric = Encode(CLASSES)
    first = measured(metric, blobs(30, 0), blobs(30, 1))
    metric.reset()
    assert measured(metric, blobs(30, 0), blobs(30, 1)) == first
    assert metric.samples == 30


def test_bad_input() -> None:
    metric = Encode(CLASSES)
    with pytest.raises(RuntimeError, match="learn"):
        metric.update(*blobs(3, 0))
    with pytest.raises(UserError, match=r"^there is no labelled training image"):
        metric.learn(nn.Identity(), [])
    with pytest.raises(UserError, match=r"^the encoder returns \(2, 3, 4\) for a batch of images, expected features \(batch, channels\)"):
        metric.learn(nn.Identity(), [(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(UserError, match=r"^nothing was measured"):
        metric.compute()
    with pytest.raises(UserError, match="expected at least 2"):
        Encode(["one"])


def test_it_draws_the_images() -> None:
    assert Encode.draw(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), None, CLASSES).shape == (2, 3, 4, 4)


SHORT: dict[str, Any] = {"data": "digits:train=96", "epochs": 1, "batch": 32, "trackers": "none"}


def test_any_network_is_evaluated_as_an_encoder_and_fine_tuned(tmp_path: Path) -> None:
    run = sh.distill("scratch", student="timm/test_resnet", out=str(tmp_path / "run"), **SHORT)
    assert set(sh.evaluate(run.folder)) == {"top1", "top5", "nll", "ece"}
    read = sh.evaluate(run.folder, task="encode")
    assert set(read) == {"probe", "knn"}
    assert read["probe"] > 0.3, "features without a head, and readers who learnt"
    named = sh.evaluate("timm/test_resnet", "digits:train=96", task="encode", weights=str(run.folder / "student" / "model.safetensors"))
    assert named["probe"] > 0.3, "with images normalised as the name says"
    before = files(tmp_path)
    tuned = sh.evaluate(run.folder, task="encode", fine_tune=2, lr=3e-3, batch=16)
    assert {name: tuned[name] for name in read} == read
    again = {**SHORT, "epochs": 2, "lr": 3e-3, "batch": 16}
    assert files(tmp_path) == before, "it leaves nothing behind"
    assert tuned["fine_tuned"] == sh.distill("scratch", student=str(run.folder), out=str(tmp_path / "again"), **again).metrics["top1"]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"run": "nowhere"}, "'nowhere' is no folder, expected a run folder, or a network named timm/NAME"),
        ({"run": "timm/test_resnet"}, "'timm/test_resnet' is no run folder, so nobody knows its data: name them with --data"),
        (
            {"run": "timm/test_resnet", "data": "digits", "fine_tune": 3},
            "fine_tune is 3 and what is asked for is to classify; expected epochs",
        ),
        ({"run": "timm/test_resnet", "data": "digits", "task": "encode", "fine_tune": -1}, "fine_tune is -1 and"),
        ({"run": "pyg/gin", "data": "motifs", "task": "encode"}, "the data 'motifs' are to classify, not to encode"),
    ],
)
def test_what_cannot_be_evaluated_is_told(named: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sh.evaluate(**{"weights": "random", **named})
