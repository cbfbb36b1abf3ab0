"""KRR-ST: pairs that learn through having been learnt from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stillhouse as sh
from stillhouse.data.condensed import read_condensed
from stillhouse.distillers.base import Clock
from stillhouse.distillers.condensation.krr_st import KRRST
from stillhouse.errors import UserError
from stillhouse.fitting import OWN
from stillhouse.interrupted import Interrupted
from stillhouse.losses.ridge import ridge_distance
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.session import Session
from tests.conftest import SIDE, images, labels, scrambled, tiny, tiny_segmenter
from tests.runs import interrupt

PAIRS, CLOCK = 6, Clock(step=1, steps=10, epoch=0, epochs=1)
BATCHES = [(images(8, seed=1), labels(8)), (images(8, seed=2), labels(8))]
BATCH = images(5, seed=3), labels(5)


def encoder(seed: int = 1, **options: Any) -> nn.Module:
    """A small residual network with batch normalisation, without a head."""
    small = {"num_classes": 0, "output_stride": 8, "channels": (8, 8, 12, 12), "stem_width": 8, **options}
    network = scrambled(lambda: timm.create_model("resnet10t", **small), seed)
    set_preprocessing(network, Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), SIDE))
    return network


def made(prepared: bool = True, **settings: Any) -> KRRST:
    small = {"pairs": PAIRS, "pool": 2, "life": 3, "examined_epochs": 2, "ridge": 1e-3}
    distiller = KRRST(encoder(1), encoder(2), **small | settings).train()
    if prepared:
        torch.manual_seed(7)
        distiller.prepare(BATCHES)
    return distiller


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_pairs_begin_as_real_images_with_the_teachers_features() -> None:
    distiller = made()
    fed, real = distiller.data.fed(), torch.cat([each for each, _ in BATCHES])
    distances = torch.cdist(fed.detach().flatten(1), real.flatten(1))
    assert distances.min(1).values.max() < 1e-3
    assert len(set(distances.argmin(1).tolist())) == PAIRS, "each another image"
    torch.testing.assert_close(distiller.data.targets.detach(), distiller.teach(fed), rtol=1e-3, atol=1e-4)
    pixels = fed * torch.tensor([0.2, 0.25, 0.3]).view(-1, 1, 1) + torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1)
    torch.testing.assert_close(distiller.data.images, pixels)


def test_what_is_prepared_follows_from_the_images_and_the_generator() -> None:
    assert same(state(made()), state(made()))
    other = made(prepared=False)
    torch.manual_seed(8)
    other.prepare(BATCHES)
    assert not torch.equal(other.data.images, made().data.images)


def test_the_pool_begins_at_different_ages_below_its_life() -> None:
    distiller = made(pool=8, life=6)
    ages = [int(network.age) for network in distiller.networks]
    assert 1 <= min(ages) < max(ages) <= 5
    assert distiller.watch()["pool_age"].item() == pytest.approx(sum(ages) / 8)


def test_the_loss_is_the_formula() -> None:
    distiller = made()
    network = distiller.networks[int(distiller.visited)].eval()
    with torch.no_grad():
        fitted, asked = (network.encoder.forward_features(each).flatten(1).double() for each in (distiller.data.fed(), BATCH[0]))
        fitted, asked = (F.pad(each, (0, 1), value=1.0) for each in (fitted, asked))
        kernel = fitted @ fitted.T
        solved = torch.linalg.inv(kernel + 1e-3 * kernel.trace() * torch.eye(PAIRS)) @ distiller.data.targets.double()
        expected = (asked @ fitted.T @ solved - distiller.teacher(BATCH[0])).square().mean()
    torch.testing.assert_close(distiller(BATCH)["krr"], expected.float())


def test_a_step_moves_the_pairs_and_nothing_else() -> None:
    distiller = made()
    (turn,) = distiller.turns()
    assert [id(parameter) for parameter in turn.parameters] == [id(distiller.data.images), id(distiller.data.targets)]
    before, teacher, images_before = state(distiller.networks), state(distiller.teacher), distiller.data.images.detach().clone()
    distiller(BATCH)["krr"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in turn.parameters)
    assert {id(p) for p in distiller.parameters() if p.grad is not None} == {id(p) for p in turn.parameters}
    torch.optim.AdamW(turn.parameters, lr=0.01).step()
    assert not torch.equal(distiller.data.images, images_before)
    assert same(state(distiller.networks), before), "weights and statistics, until the inner update"
    distiller.after_update(CLOCK)
    assert not same(state(distiller.networks), before)
    assert same(state(distiller.teacher), teacher)


def test_only_the_network_that_was_visited_learns() -> None:
    distiller = made()
    visited = int(distiller.visited)
    before = [state(network) for network in distiller.networks]
    distiller.after_update(CLOCK)
    for number, network in enumerate(distiller.networks):
        assert same(state(network), before[number]) == (number != visited)


def test_the_inner_update_is_full_batch_sgd_on_the_pairs() -> None:
    distiller = made(pool=1, life=100, inner_lr=0.03, inner_decay=0.01)
    network = distiller.networks[0]
    network.begin()
    reference = copy.deepcopy(network).train().requires_grad_(True)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.03, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(reference(distiller.data.fed().detach()), distiller.data.targets.detach()).backward()
        optimizer.step()
        distiller.after_update(CLOCK)
    for (name, value), expected in zip(network.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)
    torch.testing.assert_close(network.encoder.bn1.running_mean, reference.encoder.bn1.running_mean)
    assert network.age == 3
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_network_that_begins_anew_is_fresh_for_one_visit() -> None:
    distiller = made(pool=1, life=3)
    network = distiller.networks[0]
    while network.age < 3:
        distiller.after_update(CLOCK)
    before = state(network)
    distiller.after_update(CLOCK)
    assert network.age == 0
    assert not any(value.any() for name, value in network.named_buffers() if name.startswith("momentum"))
    assert not torch.equal(network.head.weight, before["head.weight"])
    assert not torch.equal(network.encoder.conv1[0].weight, before["encoder.conv1.0.weight"])
    assert not network.encoder.bn1.running_mean.any()
    begun = state(network)
    distiller(BATCH)["krr"].backward()
    assert same(state(network), begun), "untrained while it is asked"
    distiller.after_update(CLOCK)
    assert network.age == 1


def test_the_order_of_the_pairs_does_not_matter_and_scale_counts_squared() -> None:
    distiller = made()
    loss = distiller(BATCH)["krr"]
    order = torch.randperm(PAIRS)
    with torch.no_grad():
        for tensor in (distiller.data.images, distiller.data.targets):
            tensor.copy_(tensor[order].clone())
    torch.testing.assert_close(distiller(BATCH)["krr"], loss, rtol=1e-4, atol=0)
    distiller.teacher.register_forward_hook(lambda module, inputs, output: 3 * output)
    with torch.no_grad():
        distiller.data.targets.mul_(3)
    torch.testing.assert_close(distiller(BATCH)["krr"], 9 * loss, rtol=1e-4, atol=0)


def test_in_eval_mode_fresh_networks_outside_the_pool_are_asked() -> None:
    distiller = made().eval()
    with torch.no_grad():
        found = distiller(BATCH)["krr"]
        fed, truth = distiller.data.fed(), distiller.teach(BATCH[0])
        each = [ridge_distance(net.embed(fed), distiller.data.targets, net.embed(BATCH[0]), truth, 1e-3) for net in distiller.held_out]
        for network in distiller.networks:
            network.begin()
        assert torch.equal(distiller(BATCH)["krr"], found), "whatever the pool knows"
    torch.testing.assert_close(found, torch.stack(each).mean().float())
    assert not [key for key in distiller.state_dict() if key.startswith(("held_out", "student", "teacher"))]
    assert not any(network.age for network in distiller.held_out)


def test_steps_make_fresh_networks_answer_better() -> None:
    distiller = made(pool=2, life=4)
    (turn,) = distiller.turns()
    optimizer = torch.optim.AdamW(turn.parameters, lr=0.02, weight_decay=0.0)

    def held_out() -> float:
        distiller.eval()
        with torch.no_grad():
            return float(distiller(BATCHES[0])["krr"] + distiller(BATCHES[1])["krr"])

    before = held_out()
    for step in range(30):
        distiller.train()(BATCHES[step % 2])["krr"].backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.after_update(CLOCK)
    assert held_out() < 0.95 * before


def test_what_is_examined_is_a_fresh_network_that_learnt_the_pairs() -> None:
    distiller = made(examined_epochs=0)
    with torch.no_grad():
        torch.manual_seed(1)
        ((name, fresh),) = distiller.examined(distiller.products).items()
        distiller.examining["epochs"] = 3
        torch.manual_seed(1)
        learnt = distiller.examined(distiller.products)["student"]
    assert name == "student"
    assert list(distiller.products) == ["data"]
    assert learnt(BATCH[0]).shape == fresh(BATCH[0]).shape == (5, 12 * 4 * 4)
    weight, begun = (network.encoder.conv1[0].weight for network in (learnt, fresh))
    assert not torch.equal(weight, begun)
    assert not torch.equal(begun, distiller.student.conv1[0].weight), "the student's own weights are not used"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 0}, "pairs is 0"),
        ({"pool": 0}, "pool is 0"),
        ({"life": 1}, "life is 1"),
        ({"ridge": 0.0}, "ridge is 0.0"),
        ({"ridge": -1e-6}, "ridge is"),
        ({"inner_lr": 0.0}, "inner_lr is 0.0"),
        ({"inner_decay": -1.0}, "inner_decay -1.0"),
        ({"examined_epochs": -1}, "examined_epochs is -1"),
        ({"examined_batch": 0}, "examined_batch is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(prepared=False, **settings)


def test_more_pairs_than_images_are_refused() -> None:
    with pytest.raises(UserError, match="there are 16 training images for 17 pairs; set --pairs to 16 or less"):
        made(pairs=17)


def test_a_student_whose_features_cannot_be_told_from_its_head_is_refused() -> None:
    with pytest.raises(UserError, match="Sequential has no forward_features"):
        KRRST(nn.Sequential(nn.Flatten()), encoder(2))


def test_a_teacher_that_is_no_encoder_is_refused() -> None:
    class Maps(nn.Module):
        def forward(self, pictures: Tensor) -> Tensor:
            return tiny_segmenter()(pictures)["out"]

    distiller = KRRST(encoder(1), Maps(), pairs=2, pool=1, life=2)
    with pytest.raises(UserError, match=r"the teacher answers \(2, 5, 32, 32\) to 2 images"):
        distiller.prepare(BATCHES)


def test_targets_of_another_width_than_the_teachers_are_refused() -> None:
    distiller = made()
    distiller.data.targets = nn.Parameter(torch.zeros(PAIRS, 5))
    with pytest.raises(UserError, match="the teacher answers 12 numbers, and the pairs' targets have 5"):
        distiller(BATCH)


SMALL: dict[str, Any] = {
    **{"student": "timm/test_resnet", "teacher_weights": "random", "data": "digits:train=64", "allow_weak_teacher": True},
    **{"teacher": "timm/test_resnet", "pairs": 10, "pool": 2, "life": 3, "examined_epochs": 1, "batch": 16, "epochs": 2, "lr": 1e-2},
    **{"trackers": "none", "warmup_epochs": 0.0, "save_every": 3, "eval_every": 2},
}


def test_a_run_goes_on_exactly_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sh.distill("krr_st", out=str(tmp_path / "whole"), **SMALL)
    interrupt(monkeypatch, 5)
    with pytest.raises(Interrupted):
        sh.distill("krr_st", out=str(tmp_path / "parts"), **SMALL)
    parts = sh.distill("krr_st", out=str(tmp_path / "parts"), resume=True)
    one, other = (read_condensed(run.folder / "data") for run in (whole, parts))
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.targets, other.targets)
    assert whole.metrics == parts.metrics
    assert {"probe", "knn", "val_krr"} <= whole.metrics.keys()


def test_it_can_be_checked_and_no_network_is_trained_on_pairs_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.distillers.condensation.krr_st.imitate", None)
    vit = "timm/vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=16,depth=1,num_heads=2"
    job = {
        "method": "krr_st",
        "student": vit,
        "teacher": tiny(img_size=8, patch_size=2, in_chans=1, num_classes=0),
        "data": "digits:train=40",
    }
    small = {"student_weights": "random", "bad_data": "refuse", "seed": 0, "batch": 8, "pairs": 12, "pool": 2, "life": 3}
    found = Session(tmp_path / "run", dict.fromkeys(OWN) | job | small).check()
    assert [finding.what for finding in found][-1] == "one step"
    assert "16 of each image" in next(finding.seen for finding in found if finding.what == "features")
    assert not (tmp_path / "run").exists()
