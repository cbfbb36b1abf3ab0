"""Masked generative distillation: what is hidden, what is made of the rest, and by how much it counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN

from stillhouse.distillers.classics.mgd import MGD, generation, kind_of, visible
from stillhouse.errors import UserError
from stillhouse.losses.maps import squared_distance
from stillhouse.randomness import samples
from tests.conftest import CLASSES, boxes, images, masks, tiny_detector, tiny_segmenter

SEGMENT = images(3), masks(3)
DETECT = list(images(3).sigmoid()), boxes(3)
LEVELS = [torch.zeros(4, 2, 20, 30), torch.zeros(4, 2, 10, 15), torch.zeros(4, 2, 10, 15)]


def test_the_formula() -> None:
    student, teacher = tiny_detector(1), tiny_detector(2, width=16)
    distiller = MGD(student, teacher, alpha=0.5, masked=0.4)
    with samples(0, 0, torch.arange(3)):
        terms = distiller(DETECT)
        maps_S, maps_T = ([*net.backbone(net.transform(DETECT[0])[0].tensors).values()] for net in (student, teacher))
        shown = visible(maps_T, 0.4)
    aligned = distiller.align(maps_S, maps_T)
    made = [block(S * left) for block, S, left in zip(distiller.generation, aligned, shown, strict=True)]
    torch.testing.assert_close(terms["mgd"], 0.5 * sum(squared_distance(G, T) for G, T in zip(made, maps_T, strict=True)))


@pytest.mark.parametrize("share", [0.0, 0.45, 0.75, 1.0])
def test_as_many_places_are_hidden_as_asked_for(share: float) -> None:
    for shown in visible(LEVELS, share):
        assert shown.unique().tolist() in ([0.0], [1.0], [0.0, 1.0])
        hidden, places = int((shown == 0).sum()), shown.numel()
        assert abs(hidden - share * places) <= 5 * (share * (1 - share) * places) ** 0.5


def test_levels_and_images_are_hidden_each_for_itself() -> None:
    first, second, third = visible(LEVELS, 0.5)
    assert first.shape == (4, 1, 20, 30)
    assert not torch.equal(second, third), "levels of one size are not hidden alike"
    assert not torch.equal(first[0], first[1])


def test_what_is_hidden_is_a_function_of_seed_step_and_sample() -> None:
    def shown(seed: int, step: int, ids: list[int]) -> torch.Tensor:
        with samples(seed, step, torch.tensor(ids)):
            return visible([level[: len(ids)] for level in LEVELS], 0.5)[0]

    whole = shown(0, 3, [5, 6, 7, 8])
    assert torch.equal(shown(0, 3, [7, 8]), whole[2:]), "in any split of the batch"
    assert not torch.equal(shown(0, 4, [5, 6, 7, 8]), whole)
    assert not torch.equal(shown(1, 3, [5, 6, 7, 8]), whole)


def test_nothing_hidden_and_a_block_that_changes_nothing_compares_the_maps() -> None:
    student, teacher = tiny_segmenter(1), tiny_segmenter(2)
    distiller = MGD(student, teacher, alpha=1.0, masked=0.0)
    with torch.no_grad():
        for network in (student, teacher):  # positive logits pass the ReLU
            network.classifier[2].bias.add_(50)
        for block in (distiller.generation[0][0], distiller.generation[0][2]):
            nn.init.dirac_(block.weight)
            nn.init.zeros_(block.bias)
    logits_S, logits_T = (network.classifier(network.backbone(SEGMENT[0])) for network in (student, teacher))
    assert min(logits_S.min(), logits_T.min()) > 0
    torch.testing.assert_close(distiller(SEGMENT)["mgd"], squared_distance(logits_S, logits_T), rtol=1e-4, atol=1e-4)


def test_all_hidden_teaches_the_block_and_not_the_student() -> None:
    student = tiny_segmenter(1)
    distiller = MGD(student, tiny_segmenter(2), alpha=1.0, masked=1.0)
    distiller(SEGMENT)["mgd"].backward()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())
    assert distiller.generation[0][2].bias.grad.abs().sum() > 0


def test_the_block_sees_all_around_a_hidden_place() -> None:
    """Two 3x3 convolutions reach two places far."""
    block, map_ = generation(3), torch.zeros(1, 3, 9, 9, requires_grad=True)
    block(map_ + 1)[0, :, 4, 4].sum().backward()
    reached = map_.grad[0].abs().sum(0).nonzero()
    assert (reached.amin().item(), reached.amax().item()) == (2, 6)


def test_what_is_drawn_is_what_was_shown() -> None:
    distiller = MGD(tiny_segmenter(1), tiny_segmenter(2), masked=0.25).eval()
    shown = distiller.look(SEGMENT)["visible"]
    assert shown.shape == (3, 8, 8)
    assert shown.unique().tolist() == [0.0, 1.0]


def test_the_published_weights_go_by_the_kind_of_network() -> None:
    detector = tiny_detector(1)
    kinds = [copy.deepcopy(detector) for _ in range(2)]
    for network, kind in zip(kinds, (FCOS, FasterRCNN), strict=True):
        network.__class__ = kind
    kinds[1].roi_heads = nn.Identity()
    assert [kind_of(each) for each in (detector, *kinds, tiny_segmenter())] == ["anchors", "anchor-free", "two-stage", "segmenter"]
    assert [(each.alpha, each.masked) for each in (MGD(detector, tiny_detector(2)), MGD(tiny_segmenter(), tiny_segmenter()))] == [
        (2e-5, 0.65),
        (2e-5, 0.75),
    ]
    assert MGD(tiny_segmenter(), tiny_segmenter()).generation[0][0].weight.shape == (CLASSES, CLASSES, 3, 3)


@pytest.mark.parametrize("setting", [{"alpha": -1.0}, {"alpha": float("nan")}, {"masked": 1.5}, {"masked": -0.1}, {"masked": float("nan")}])
def test_bad_settings_get_one_sentence(setting: dict[str, float]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=f"^{name} is {value}, expected"):
        MGD(tiny_segmenter(), tiny_segmenter(), **setting)
