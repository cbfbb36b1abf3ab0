"""Two students that teach each other where they are the more reliable one: equations, and the checks of the card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillers.base import Clock
from stillhouse.distillers.classics.dml import DML
from stillhouse.distillers.classics.scratch import Scratch
from stillhouse.distillers.dense.cnn_transformer_collab import CNNTransformerCollab
from stillhouse.errors import UserError
from stillhouse.models.opening import open_model
from stillhouse.models.outputs import logits_of
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.models.saving import load_student, save_student
from stillhouse.run import distill
from stillhouse.training.log import read_table
from tests.conftest import CLASSES, images, masks, tiny_segmenter

BATCH = images(4), masks(4)
TERMS = ("hfd", "region", "pixel", "partner_hfd", "partner_region", "partner_pixel")


def pair(student: nn.Module | None = None, partner: nn.Module | None = None, **settings: Any) -> CNNTransformerCollab:
    """Past the warm-up."""
    torch.manual_seed(0)
    networks = student or tiny_segmenter(seed=1), partner or tiny_segmenter(seed=2, width=16)
    return CNNTransformerCollab(*networks, **{"warmup": 0.0} | settings).train()


def ignoring(batch: tuple[Tensor, Tensor], where: Any = (slice(None), slice(0, 9))) -> tuple[Tensor, Tensor]:
    labels = batch[1].clone()
    labels[where] = 255
    return batch[0], labels


def gradients(distiller: nn.Module, term: Tensor) -> dict[str, bool]:
    """Which part gets any, by the first name of its parameters."""
    named = [(name, parameter) for name, parameter in distiller.named_parameters() if parameter.requires_grad]
    found = torch.autograd.grad(term, [parameter for _, parameter in named], allow_unused=True, retain_graph=True)
    reached: dict[str, bool] = {}
    for (name, _), gradient in zip(named, found, strict=True):
        part = name.split(".")[0]
        reached[part] = reached.get(part, False) or (gradient is not None and bool(gradient.any()))
    return reached


def by_hand(distiller: CNNTransformerCollab, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The card's equations, pixel by pixel and region by region."""
    pictures, labels = batch
    networks: tuple[Any, Any] = distiller.student, distiller.partner
    maps = [network.backbone(pictures) for network in networks]
    logits = [F.interpolate(network.classifier(each), size=(32, 32), mode="bilinear") for network, each in zip(networks, maps, strict=True)]
    known = labels != 255
    errors = [-each.log_softmax(1).gather(1, labels.masked_fill(~known, 0)[:, None])[:, 0] for each in logits]
    adapters = (distiller.adapter[0], distiller.partner_adapter[0])
    projectors, side, found = (distiller.projector, distiller.partner_projector), distiller.regions, {}
    for own, who in ((0, ""), (1, "partner_")):
        other = 1 - own
        found[f"{who}ce"] = errors[own][known].mean()
        adapted = adapters[own](maps[own])
        adapted = (adapted - adapted.mean((1, 2, 3), keepdim=True)) / (adapted.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        share = known.float().unflatten(1, (8, 4)).unflatten(3, (8, 4)).mean((2, 4))
        found[f"{who}hfd"] = 0.1 * ((1 - F.cosine_similarity(adapted, maps[other], dim=1)) * share).sum() / share.sum()
        taught = known & (errors[other] < errors[own])
        divergence = (logits[other].softmax(1) * (logits[other].log_softmax(1) - logits[own].log_softmax(1))).sum(1)
        found[f"{who}pixel"] = divergence[taught].mean()
        costs, regions, step = [torch.tensor(0.0)], 0, 32 // side
        for image in range(len(labels)):
            for row in range(side):
                for column in range(side):
                    cell = image, slice(step * row, step * (row + 1)), slice(step * column, step * (column + 1))
                    regions += bool(known[cell].any())
                    if not known[cell].any() or not errors[other][cell][known[cell]].mean() < errors[own][cell][known[cell]].mean():
                        continue
                    place = step // 4
                    there = image, slice(place * row, place * (row + 1)), slice(place * column, place * (column + 1))
                    weight = share[there]
                    means = [(each[there[0], :, there[1], there[2]] * weight).sum((1, 2)) / weight.sum() for each in maps]
                    costs.append(1 - F.cosine_similarity(projectors[own](means[own]), means[other], dim=0))
        found[f"{who}region"] = 0.1 * torch.stack(costs).sum() / regions
    return found


@pytest.mark.parametrize("regions", [8, 4, 1])
@pytest.mark.parametrize("batch", [BATCH, ignoring(BATCH), ignoring(BATCH, (0,))], ids=["all", "rows ignored", "an image ignored"])
def test_terms_are_the_equations(regions: int, batch: tuple[Tensor, Tensor]) -> None:
    distiller = pair(regions=regions)
    terms, expected = distiller(batch), by_hand(distiller, batch)
    assert set(terms) == set(expected) == {"ce", "partner_ce", *TERMS}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)


def test_identical_students_teach_each_other_nothing() -> None:
    """Card, 1."""
    for choices in ({}, {"region_by": "affinity"}, {"region_of": "classes"}, {"normalise": "all"}):
        distiller = pair(partner=tiny_segmenter(seed=1), **choices)
        terms, figures = distiller(BATCH), distiller.watch()
        for name in TERMS:
            if "hfd" not in name:
                assert terms[name].item() == 0, name
                assert not gradients(distiller, terms[name])["student"]
        assert all(value.item() == 0 for name, value in figures.items())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["taught", "all"]), st.sampled_from(["grid", "classes"]))
def test_swapping_the_students_swaps_all_terms(seed: int, normalise: str, region_of: str) -> None:
    """Card, 2."""
    one = pair(normalise=normalise, region_of=region_of)
    two = CNNTransformerCollab(one.partner, one.student, warmup=0.0, normalise=normalise, region_of=region_of)
    for name in ("adapter", "projector"):
        getattr(two, name).load_state_dict(getattr(one, f"partner_{name}").state_dict())
        getattr(two, f"partner_{name}").load_state_dict(getattr(one, name).state_dict())
    batch = ignoring((images(2, seed=seed), masks(2, seed=seed)))
    ours, drawn = one(batch), one.look(batch)
    swapped, drawn_swapped = two(batch), two.look(batch)
    for name in ("ce", "hfd", "region", "pixel"):
        torch.testing.assert_close(ours[name], swapped[f"partner_{name}"])
        torch.testing.assert_close(ours[f"partner_{name}"], swapped[name])
    taught = drawn["student is taught"] + drawn["partner is taught"]
    assert taught.max() <= 1
    assert not taught[batch[1] == 255].any()
    assert torch.equal(drawn["student is taught"], drawn_swapped["partner is taught"])


@pytest.mark.parametrize("region_by", ["cosine", "affinity"])
def test_a_perfect_student_is_taught_nothing(region_by: str) -> None:
    """Card, 3: logits that are certain of the label, and of nothing else."""
    distiller = pair(region_by=region_by)
    labels = torch.ones(4, 32, 32, dtype=torch.int64)
    with torch.no_grad():
        distiller.partner.classifier[2].weight.mul_(0.0)
        distiller.partner.classifier[2].bias.copy_(torch.tensor([-200.0, 200.0, -200.0, -200.0, -200.0]))
    terms = distiller((BATCH[0], labels))
    assert terms["partner_ce"].item() == 0
    for name in ("region", "pixel"):
        assert terms[f"partner_{name}"].item() == 0
        reached = gradients(distiller, terms[name] + terms[f"partner_{name}"])
        assert reached["student"], name
        assert not reached["partner"], name
    figures = distiller.watch()
    assert figures["taught_student"].item() == figures["taught_student_regions"].item() == 1


def test_who_teaches_gets_no_gradient() -> None:
    distiller = pair()
    terms = distiller(BATCH)
    for who, other in (("", "partner_"), ("partner_", "")):
        networks = {"": "student", "partner_": "partner"}
        for name in ("hfd", "region", "pixel"):
            reached = gradients(distiller, terms[f"{who}{name}"])
            assert reached[networks[who]], name
            assert not reached[networks[other]], name
        assert gradients(distiller, terms[f"{who}hfd"])[f"{who}adapter"]
        assert gradients(distiller, terms[f"{who}region"])[f"{who}projector"]


@pytest.mark.parametrize(
    "choices", [{}, {"region_by": "affinity"}, {"region_of": "classes"}, {"normalise": "all"}, {"hfd_by": "kl"}], ids=str
)
def test_without_labels_every_term_is_0_and_finite(choices: dict[str, Any]) -> None:
    """Card, 4."""
    distiller = pair(**choices)
    terms = distiller(ignoring(BATCH, ...))
    assert all(term.item() == 0 for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in distiller.parameters())
    assert all(figure.isfinite() for figure in distiller.watch().values())
    partly = distiller(ignoring(BATCH, (slice(None), slice(0, 4), slice(0, 4))))
    assert all(term.isfinite() for term in partly.values())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_off_is_two_trainings_of_their_own_bit_for_bit(optimizer: type[torch.optim.Optimizer]) -> None:
    """Card, 5: with dropout in both, each drawing what it would draw alone."""

    def networks() -> tuple[nn.Module, nn.Module]:
        return tiny_segmenter(seed=1, drop=0.3), tiny_segmenter(seed=2, width=16, drop=0.5)

    def train(distiller: Any) -> None:
        optimizers = [optimizer(turn.parameters, lr=0.01 * turn.rate) for turn in distiller.turns()]
        for step in range(4):
            torch.manual_seed(step)
            distiller.zero_grad()
            sum(distiller((images(4, seed=step), masks(4, seed=step))).values()).backward()
            for each in optimizers:
                each.step()

    together = pair(*networks(), **CNNTransformerCollab.off, partner_rate=0.5)
    alone = [Scratch(network).train() for network in networks()]
    alone[1].turns = lambda turns=alone[1].turns: [type(turn)(turn.name, turn.parameters, rate=0.5) for turn in turns()]  # type: ignore
    for distiller in (together, *alone):
        train(distiller)
    for ours, theirs in zip(together.products.values(), alone, strict=True):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.student.state_dict()[name]), name


def test_constants_added_to_logits_change_nothing() -> None:
    """Card, 6: a constant a student and image on all its classes."""
    one = pair()
    two = copy.deepcopy(one)
    with torch.no_grad():
        two.student.classifier[2].bias.add_(4.0)
        two.partner.classifier[2].bias.sub_(2.0)
    ours, theirs = one(BATCH), two(BATCH)
    for name, term in ours.items():
        torch.testing.assert_close(theirs[name], term, rtol=1e-4, atol=1e-5)
    for name, drawn in one.look(BATCH).items():
        torch.testing.assert_close(two.look(BATCH)[name], drawn)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.5, 1.0, 4.0]))
def test_over_all_pixels_it_is_at_most_deep_mutual_learning(seed: int, tau: float) -> None:
    """Card, 7."""
    batch = ignoring((images(2, seed=seed), masks(2, seed=seed)))
    ours = pair(normalise="all", temperature=tau)
    theirs = DML(ours.student, ours.partner, temperature=tau)
    taught, everywhere = ours(batch), theirs(batch)
    for who in ("", "partner_"):
        assert 0 <= taught[f"{who}pixel"].item() <= everywhere[f"{who}kl"].item() + 1e-6
        assert taught[f"{who}ce"] == everywhere[f"{who}ce"]


VIT = "torchvision/fcn:backbone=timm/vit_tiny_patch16_224,patch_size=8,embed_dim=16,depth=2,num_heads=2"
UNET = "smp/unet:encoder=timm/test_resnet,encoder_depth=3,decoder_channels=(16,8,8)"
CNN = "torchvision/deeplabv3:backbone=timm/test_resnet,channels=8,stride=8"


def test_each_is_saved_alone_and_without_adapters(tmp_path: Path) -> None:
    """Card, 8; and that a transformer and a CNN by name go together, each with low-layer maps of its own size."""
    known = {"classes": CLASSES, "channels": 3, "task": "segment", "image_size": 32}
    student, partner = open_model(CNN, **known), open_model(VIT, **known, seed=1)
    places = {"low": "backbone.network.layer1", "partner_low": "backbone.blocks.0"}
    for each in (student, partner):
        set_preprocessing(each, Preprocessing((0.5,) * 3, (0.5,) * 3, 32))
    keys = student.state_dict().keys(), partner.state_dict().keys()
    distiller = CNNTransformerCollab(student, partner, **places, regions=4, warmup=0.0).train()
    assert [each.channels for each in distiller.maps] == [32, 16, 96, 16]
    terms = distiller(BATCH)
    sum(terms.values()).backward()
    assert all(terms[name].item() > 0 for name in TERMS)
    assert distiller.product is student
    assert list(distiller.products) == ["student", "partner"]
    for (name, product), expected in zip(distiller.products.items(), keys, strict=True):
        assert product.state_dict().keys() == expected
        save_student(product, tmp_path / name)
        again = load_student(tmp_path / name)
        product.eval()
        assert torch.equal(again.eval()(BATCH[0])["out"], product(BATCH[0])["out"])


def test_an_encoder_that_hands_on_its_image_gives_its_first_own_map() -> None:
    known = {"classes": CLASSES, "channels": 3, "task": "segment", "image_size": 32}
    unet = open_model(UNET, **known)
    segformer = open_model("smp/segformer:encoder=mit_b0,encoder_depth=4", **known)
    for network in (unet, segformer):
        set_preprocessing(network, Preprocessing((0.5,) * 3, (0.5,) * 3, 32))
    distiller = CNNTransformerCollab(unet, segformer, regions=4)
    assert [each.channels for each in distiller.maps] == [32, 32, 48, 160]


def test_both_are_examined_with_images_made_ready_for_them() -> None:
    student, partner = tiny_segmenter(seed=1), tiny_segmenter(seed=2)
    set_preprocessing(student, Preprocessing((0.1, 0.2, 0.3), (0.5, 0.4, 0.3), 32))
    set_preprocessing(partner, Preprocessing((0.4, 0.5, 0.6), (0.2, 0.25, 0.5), 32))
    distiller, seen = pair(student, partner), []
    partner.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    distiller(BATCH)
    examined = distiller.examined(distiller.products)
    assert list(examined) == ["student", "partner"]
    assert examined["student"] is student
    examined["partner"](BATCH[0])
    pixels = BATCH[0] * torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    expected = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    assert len(seen) == 2
    for each in seen:
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)


def test_two_optimisers_share_a_pass_and_all_that_learns() -> None:
    distiller = pair(partner_rate=0.1, partner_optimizer="sgd")
    first, second = distiller.turns()
    assert first.name == second.name
    assert (first.rate, first.optimizer, second.rate, second.optimizer) == (1.0, None, 0.1, "sgd")
    own = [{id(p) for p in turn.parameters} for turn in (first, second)]
    assert not own[0] & own[1]
    assert own[0] | own[1] == {id(p) for p in distiller.parameters()}
    assert {id(p) for p in [*distiller.partner.parameters(), *distiller.partner_adapter.parameters()]} < own[1]


def test_labels_alone_come_first_and_a_resume_knows() -> None:
    distiller = pair(warmup=0.3)
    assert all(distiller(BATCH)[name].item() == 0 for name in TERMS)
    sum(distiller(BATCH).values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters()), "DDP would wait for it"
    for step, begun in ((2, False), (3, True), (9, True)):
        distiller.after_update(Clock(step, 10, 0, 1))
        again = pair(warmup=0.3)
        again.load_state_dict(distiller.state_dict())
        assert all((again(BATCH)[name].item() > 0) is begun for name in TERMS)


def test_an_adapter_has_no_bias_and_cannot_become_a_constant() -> None:
    distiller = pair()
    assert {name for name, _ in distiller.adapter.named_parameters()} == {"0.weight"}
    adapted = distiller.adapter(torch.randn(3, 12, 8, 8))
    torch.testing.assert_close(adapted.std((1, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(distiller.adapter(100 * torch.ones(1, 12, 8, 8).normal_()).mean(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_weights_weigh_their_terms() -> None:
    plain, heavy = pair(hfd=1.0, region=1.0, pixel=1.0)(BATCH), pair(hfd=2.0, region=3.0, pixel=4.0)(BATCH)
    for who in ("", "partner_"):
        for name, times in (("ce", 1), ("hfd", 2), ("region", 3), ("pixel", 4)):
            torch.testing.assert_close(heavy[f"{who}{name}"], times * plain[f"{who}{name}"])


def test_what_it_watches() -> None:
    distiller = pair()
    batch = ignoring(BATCH)
    distiller(batch)
    seen, drawn = distiller.watch(), distiller.eval().look(batch)
    known = (batch[1] != 255).sum()
    for who in ("student", "partner"):
        torch.testing.assert_close(seen[f"taught_{who}"], drawn[f"{who} is taught"].sum() / known)
    torch.testing.assert_close(seen["taught_student_regions"], (drawn["regions"] == 1).float().mean())
    torch.testing.assert_close(seen["taught_partner_regions"], (drawn["regions"] == 0).float().mean())
    assert seen["margin"] > 0
    assert seen["flips"] == 0, "nobody led before"


def test_flips_are_classes_whose_leader_changed() -> None:
    distiller = pair()
    distiller(BATCH)
    led = distiller.led.clone()
    assert led[:CLASSES].abs().sum() == CLASSES
    distiller(BATCH)
    assert distiller.watch()["flips"] == 0
    distiller.led[:2].neg_()
    distiller(BATCH)
    assert distiller.watch()["flips"].item() == pytest.approx(2 / CLASSES)
    assert torch.equal(distiller.led, led)
    distiller.led[:2].neg_()
    before = distiller.led.clone()
    distiller.eval()(BATCH)
    distiller.look(BATCH)
    assert torch.equal(distiller.led, before), "validation is no part of it"


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        ({}, ""),
        ({"taught_student": 0.7, "taught_partner": 0.3, "margin": 0.1}, ""),
        ({"taught_student": 0.99, "margin": 0.1}, "the partner teaches at 99.0% of the pixels, one way only"),
        ({"taught_partner": 0.995, "margin": 0.1}, "the student teaches at 99.5% of the pixels"),
        ({"margin": 0.001}, "both students err alike on the training images (by 0.0010)"),
    ],
)
def test_alarm(figures: dict[str, float], sentence: str) -> None:
    assert pair().alarm(figures).startswith(sentence)
    assert bool(pair().alarm(figures)) is bool(sentence)
    assert pair(region=0.0, pixel=0.0).alarm(figures) == "", "directions that steer nothing alarm nobody"


def test_pictures() -> None:
    drawn = pair().eval().look(BATCH)
    assert {name: tuple(each.shape) for name, each in drawn.items()} == {
        "student is taught": (4, 32, 32),
        "partner is taught": (4, 32, 32),
        "regions": (4, 8, 8),
    }
    assert set(drawn["regions"].unique().tolist()) <= {0.0, 0.5, 1.0}
    assert "regions" not in pair(region_of="classes").look(BATCH)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": 0.0}, "^temperature is 0.0, expected a positive finite number"),
        ({"temperature": float("nan")}, "^temperature is nan"),
        ({"hfd": -1.0}, "^hfd is -1.0, expected the weight of a term"),
        ({"region": float("inf")}, "^region is inf"),
        ({"pixel": -0.5}, "^pixel is -0.5"),
        ({"regions": 0}, "^regions is 0, expected how many cells"),
        ({"warmup": 1.0}, "^warmup is 1.0, expected the share of the training"),
        ({"hfd_by": "l1"}, "^hfd_by is 'l1', expected one of cosine, mse, kl"),
        ({"region_of": "boxes"}, "^region_of is 'boxes', expected one of grid, classes"),
        ({"region_by": "dot"}, "^region_by is 'dot', expected one of cosine, affinity"),
        ({"normalise": "none"}, "^normalise is 'none', expected one of taught, all"),
        ({"partner_rate": 0.0}, "^partner_rate is 0.0, expected what the learning rate is multiplied by"),
        ({"low": "backbone.7"}, "no layer 'backbone.7'"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refusal:
        pair(**wrong)
    assert "\n" not in str(refusal.value)


def test_what_does_not_go_together_is_refused_at_first_sight() -> None:
    with pytest.raises(UserError, match=r"^regions is 9 and a high-layer map has 8 x 8 places"):
        pair(regions=9)(BATCH)
    other = tiny_segmenter(seed=2)
    other.classifier[2] = nn.Conv2d(12, CLASSES + 1, 1)
    with pytest.raises(UserError, match=r"^the student knows 5 classes and the partner 6, expected the same classes"):
        pair(partner=other)(BATCH)
    one = tiny_segmenter(seed=1)
    with pytest.raises(UserError, match=r"^student and partner are one network or share weights"):
        pair(one, one)


def test_logits_of_other_sizes_are_brought_to_the_labels() -> None:
    """So there is nothing to refuse: torchvision's answer on the images' pixels, smp's and transformers' on coarser ones."""

    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.classifier = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, CLASSES, 1)

        def forward(self, pictures: Tensor) -> Tensor:
            logits: Tensor = self.classifier(self.backbone(pictures))
            return logits

    terms = pair(partner=Coarse())(BATCH)
    assert all(term.isfinite() and term > 0 for term in terms.values())


def test_a_run_keeps_and_measures_both(tmp_path: Path) -> None:
    known: dict[str, Any] = {"student": UNET, "partner": VIT, "data": "contexts:train=16,val=8", "regions": 4, "trackers": "none"}
    recipe: dict[str, Any] = {"epochs": 2, "batch": 4, "lr": 1e-3, "partner_rate": 0.5, "partner_optimizer": "sgd", "log_every": 2}
    run = distill("cnn_transformer_collab", out=str(tmp_path / "whole"), **known, **recipe)
    assert {"miou", "partner_miou", "accuracy", "partner_accuracy"} <= set(run.metrics)
    for name in ("student", "partner"):
        assert logits_of(load_student(run.folder / name)(images(1))).shape == (1, 5, 32, 32)
    rows = read_table(run.folder / "watch.csv")
    assert {"taught_student", "taught_partner", "flips", "margin"} <= set(rows[-1])
    terms = read_table(run.folder / "train.csv")
    assert float(terms[-1]["pixel"]) > 0
    assert run.facts["hashes"]["teacher"] is None
