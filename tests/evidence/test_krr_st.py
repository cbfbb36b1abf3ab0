"""KRR-ST's evidence: the ablations are what they are called, and the experiment tells all that came of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from torch import Tensor, nn

from stillhouse.data.condensed import Condensed
from stillhouse.distillers.base import Clock
from stillhouse.distillers.condensation.krr_st import KRRST
from stillhouse.evidence import krr_st
from stillhouse.evidence.krr_st import (
    EXPERIMENTS,
    LABELLED,
    NETWORKS,
    UNTRAINED,
    WAYS,
    Chosen,
    Condensation,
    ConvNet,
    Judge,
    KMeansChosen,
    NeverAnew,
    ShiftedInside,
    TargetsStay,
)
from stillhouse.models.imitator import Imitator
from tests.conftest import images, labels

CLOCK = Clock(step=1, steps=10, epoch=0, epochs=1)
BATCHES = [(images(8, side=8, seed=1), labels(8)), (images(8, side=8, seed=2), labels(8))]


def made(kind: type[KRRST], **settings: Any) -> KRRST:
    torch.manual_seed(2)
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    distiller = kind(ConvNet(3, (4, 8)), teacher, **{"pairs": 5, "pool": 2, "life": 3} | settings).train()
    torch.manual_seed(3)
    distiller.prepare(BATCHES)
    return distiller


def test_its_network_is_convolution_norm_relu_and_mean() -> None:
    network = ConvNet(3, (4, 8)).eval()
    pictures = images(2, side=8)
    assert network(pictures).shape == (2, 8 * 2 * 2)
    expected = nn.functional.avg_pool2d(network.layers[1](network.layers[0](pictures)).relu(), 2)
    torch.testing.assert_close(network.layers[:4](pictures), expected)


def test_targets_that_stay_do() -> None:
    distiller = made(TargetsStay)
    (turn,) = distiller.turns()
    assert [id(parameter) for parameter in turn.parameters] == [id(distiller.data.images)]
    distiller(BATCHES[0])["krr"].backward()
    assert distiller.data.targets.grad is None


def test_what_never_begins_anew_grows_old() -> None:
    distiller = made(NeverAnew, pool=1)
    weight = distiller.networks[0].head.weight.clone()
    for _ in range(8):
        distiller.after_update(CLOCK)
    assert distiller.networks[0].age == 3
    assert (distiller.networks[0].head.weight - weight).abs().max() < 1, "it went on from what it was"


def test_shifts_move_images_by_a_pixel_and_leave_targets() -> None:
    distiller = made(ShiftedInside)
    images_moved, targets = distiller.learnt()
    fed = distiller.data.fed().detach()
    assert torch.equal(targets, distiller.data.targets)
    assert not torch.equal(images_moved, fed)
    for image, moved in zip(fed, images_moved, strict=True):
        inner = [image[:, y : y + 6, x : x + 6] for y in range(3) for x in range(3)]
        assert any(torch.equal(moved[:, 1:7, 1:7], each) for each in inner)


def test_what_is_chosen_is_what_the_method_begins_with() -> None:
    chosen, method = made(Chosen), made(KRRST)
    assert chosen.turns() == []
    assert torch.equal(chosen.data.images, method.data.images)
    assert torch.equal(chosen.data.targets, method.data.targets)


def test_k_means_images_are_real_and_each_another() -> None:
    data = made(KMeansChosen).data
    nearest = torch.cdist(data.fed().detach().flatten(1), torch.cat([each for each, _ in BATCHES]).flatten(1))
    assert nearest.min(1).values.max() < 1e-3
    assert len(set(nearest.argmin(1).tolist())) == 5


@pytest.fixture(scope="module")
def tiny() -> Condensation:
    """Two ways, few digits, small everything."""
    full = EXPERIMENTS[0]
    recipe = full.recipe | {"epochs": 1, "batch": 16, "pairs": 4, "life": 2, "examined_epochs": 1, "eval_every": 1}
    taught = full.teacher_recipe | {"epochs": 1, "batch": 16, "eval_every": 1, "width": 8}
    learning = full.learning | {"epochs": 1}
    return replace(
        full, data="digits:train=64", recipe=recipe, teacher_recipe=taught, learning=learning, ways=(WAYS[0], WAYS[2]), others="digits"
    )


def test_the_experiment_tells_every_way_and_is_not_run_again(tiny: Condensation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krr_st, "DRAWS", 2)
    monkeypatch.setattr(krr_st, "STEPS", 2)
    found = tiny.run(tmp_path, range(2), smoke=False)
    text = "\n".join(found.table())
    for name in (*NETWORKS, "KRR-ST", UNTRAINED, LABELLED, WAYS[0].name):
        assert name in text
    assert "seeds 0, 1" in text
    assert "on 5 labels a class of `digits`, classes that neither" in text
    assert text.count("| fine-tuned on other classes, % |") == len(NETWORKS)
    assert all(0 < row[f"{name}/tuned"] < 1 for rows in found.rows.values() for row in rows for name in NETWORKS)
    assert [len(rows) for rows in found.rows.values()] == [2, 2, 2, 2]
    assert f"| {LABELLED} |  |  |  | " in text, "classes explain no features"
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert tiny.run(tmp_path, range(2), smoke=False).rows == found.rows
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}


def test_labelled_images_are_those_that_were_chosen_each_with_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge("digits:train=64", Mock(student=nn.Identity()), EXPERIMENTS[0].learning)
    pictures, labels = judge.images["train"]
    data = Condensed(pictures[[5, 9, 2]] * 0.3 + 0.5, torch.zeros(3, 7), (0.5,), (0.3,))
    learnt: list[Any] = []

    def imitate(network: nn.Module, images: Tensor, targets: Tensor, **learning: Any) -> Imitator:
        learnt.append((images, targets))
        return Imitator(network, targets.shape[1], images).eval()

    monkeypatch.setattr(krr_st, "imitate", imitate)
    figures = judge.of_labelled(data, "ViT", seed=0)
    assert set(figures) == {"probe", "knn"}, "features are not asked for"
    ((images, targets),) = learnt
    torch.testing.assert_close(images, pictures[[5, 9, 2]])
    assert torch.equal(targets, nn.functional.one_hot(labels[[5, 9, 2]], 10).float())
