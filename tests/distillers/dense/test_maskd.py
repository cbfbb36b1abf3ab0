"""MasKD: tokens that the teacher learns alone, and what the student then learns under their masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse import distillers
from stillhouse.distillers.base import Clock
from stillhouse.distillers.dense.maskd import MasKD, TokenLearning
from stillhouse.errors import UserError
from stillhouse.losses.maps import token_distance
from stillhouse.masks.receptive import MaskedNetwork, ReceptiveTokens
from stillhouse.tasks.labels import label_losses
from tests.conftest import CLASSES, SIDE, Segmenter, boxes, images, masks, scrambled, tiny_detector, tiny_segmenter

SEGMENT = images(3), masks(3)
DETECT = list(images(3).sigmoid()), boxes(3)
BOTH = pytest.mark.parametrize(("network", "data"), [(tiny_segmenter, SEGMENT), (tiny_detector, DETECT)], ids=["segment", "detect"])


def first_and_second(network: Any = tiny_segmenter, **settings: Any) -> tuple[TokenLearning, MasKD]:
    second = MasKD(network(1), network(2), **settings)
    return TokenLearning(second.student, second.teacher, second).train(), second


def test_the_methods_class_is_the_second_stage() -> None:
    assert distillers.find("maskd") is MasKD


@BOTH
def test_masks_lie_between_0_and_1_and_begin_in_the_middle(network: Any, data: Any) -> None:
    second = MasKD(network(1), network(2))
    for tokens, maps in zip(second.tokens, second.maps_T.of(data[0]), strict=True):
        drawn = tokens.masks(maps)
        assert drawn.shape == (3, len(tokens.tokens), *maps.shape[-2:])
        assert 0 < drawn.min() < drawn.max() < 1
        with torch.no_grad():
            tokens.tokens.zero_()
        assert torch.equal(tokens.masks(maps), torch.full_like(drawn, 0.5))
        weights = tokens.weights(maps)
        assert (weights is None) == (network is tiny_segmenter)
        if weights is not None:
            torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_two_blind_tokens_leave_a_segmenter_as_it_is() -> None:
    """Two masks of 1/2 everywhere add up to 1."""
    first, second = first_and_second(tokens=2)
    with torch.no_grad():
        second.tokens[0].tokens.zero_()
    terms = first(SEGMENT)
    torch.testing.assert_close(terms["ce"], label_losses(first.teacher, SEGMENT)["ce"])
    assert terms["overlap"].item() == pytest.approx(1), "and are as alike as can be"
    torch.testing.assert_close(first.product(SEGMENT[0])["out"], first.teacher(SEGMENT[0])["out"])


def test_blind_tokens_halve_a_detectors_maps() -> None:
    """Their weights add up to 1, whatever their number."""
    first, second = first_and_second(tiny_detector)
    with torch.no_grad():
        for tokens in second.tokens:
            tokens.tokens.zero_()
    teacher = copy.deepcopy(first.teacher)
    teacher.backbone.register_forward_hook(lambda module, inputs, output: {name: level / 2 for name, level in output.items()})
    expected, terms = label_losses(teacher, DETECT), first(DETECT)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    assert terms["overlap"].item() == pytest.approx(3), "one for each level"


@BOTH
def test_in_the_first_stage_the_tokens_learn_and_nobody_else(network: Any, data: Any) -> None:
    first, second = first_and_second(network)
    before = copy.deepcopy(nn.ModuleDict({"student": first.student, "teacher": first.teacher}).state_dict())
    (turn,) = first.turns()
    assert {id(parameter) for parameter in turn.parameters} == {id(parameter) for parameter in second.tokens.parameters()}
    assert {id(parameter) for parameter in first.parameters() if parameter.requires_grad} == {id(p) for p in turn.parameters}
    optimizer, losses = torch.optim.Adam(turn.parameters, 0.02), []
    for _ in range(25):
        optimizer.zero_grad()
        loss = torch.stack(list(first(data, turn.name).values())).sum()
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(parameter.grad is not None for parameter in turn.parameters), "DDP would wait for it"
        optimizer.step()
    assert losses[-1] < losses[0]
    after = nn.ModuleDict({"student": first.student, "teacher": first.teacher}).state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert not any(key.startswith(("student.", "teacher.")) for key in first.state_dict())


@BOTH
def test_the_teacher_is_masked_in_the_product_only(network: Any, data: Any) -> None:
    first, _ = first_and_second(network)
    plain = network(2)
    plain.load_state_dict(first.teacher.state_dict())
    with torch.no_grad():
        first(data)
        masked, unmasked, expected = first.product.eval()(data[0]), first.teacher(data[0]), plain(data[0])

    def flat(output: Any) -> Tensor:
        return output["out"] if isinstance(output, dict) else torch.cat([each["scores"] for each in output])

    assert torch.equal(flat(unmasked), flat(expected))
    assert flat(masked).shape != flat(expected).shape or not torch.equal(flat(masked), flat(expected))


def test_a_copy_of_the_product_masks_its_own_teacher() -> None:
    """An EMA of the product is a deepcopy."""
    first, second = first_and_second()
    copied = copy.deepcopy(first.product)
    with torch.no_grad():
        second.tokens[0].tokens.add_(1)
        moved, kept = first.product(SEGMENT[0])["out"], copied(SEGMENT[0])["out"]
        second.tokens[0].tokens.sub_(1)
        torch.testing.assert_close(kept, first.product(SEGMENT[0])["out"])
    assert not torch.allclose(moved, kept)
    assert list(copied.state_dict()) == ["tokens.0.tokens"], "only the tokens are its own"


def test_the_stages() -> None:
    student, teacher = tiny_segmenter(1).train(), tiny_segmenter(2)
    student.backbone.requires_grad_(False)
    settings = {"where": "backbone", "tokens": 3, "token_share": 0.3}
    stages = MasKD.stages(student, teacher, 20, **settings)
    first = next(stages)
    assert (first.name, first.epochs, type(first.distiller)) == ("tokens", 6, TokenLearning)
    assert not any(parameter.requires_grad for parameter in student.parameters())
    first.distiller.train()
    assert not student.training
    with torch.no_grad():
        first.distiller.masked.tokens[0].tokens.fill_(0.25)
    second = next(stages)
    assert (second.name, second.epochs, type(second.distiller)) == ("", 20, MasKD)
    assert student.training
    assert {name.split(".")[0] for name, parameter in student.named_parameters() if parameter.requires_grad} == {"classifier"}
    assert torch.equal(second.distiller.tokens[0].tokens, torch.full((3, 12), 0.25)), "with what the tokens have learned"
    assert not any(parameter.requires_grad for parameter in second.distiller.tokens.parameters())
    assert next(stages, None) is None
    assert next(MasKD.stages(student, teacher, 1)).epochs == 1


def test_the_formula_of_the_second_stage() -> None:
    student, teacher = tiny_detector(1), tiny_detector(2, width=16)
    distiller = MasKD(student, teacher, alpha=2.0)
    terms = distiller(DETECT)
    maps_S, maps_T = ([*net.backbone(net.transform(DETECT[0])[0].tensors).values()] for net in (student, teacher))
    expected = torch.zeros(())
    for tokens, S, T in zip(distiller.tokens, distiller.align(maps_S, maps_T), maps_T, strict=True):
        expected = expected + token_distance(S, T, tokens.masks(T), tokens.weights(T))
    torch.testing.assert_close(terms["maskd"], 2.0 * expected)


def test_the_students_own_masks_join_in_after_a_while() -> None:
    student, teacher = tiny_segmenter(1), tiny_segmenter(2)
    distiller = MasKD(student, teacher, alpha=1.0, own_from=0.5)
    with torch.no_grad():
        distiller.tokens[0].tokens.mul_(100)
    logits_S, logits_T = (network.classifier(network.backbone(SEGMENT[0])) for network in (student, teacher))
    tokens = distiller.tokens[0]
    theirs, both = tokens.masks(logits_T), tokens.masks(logits_T) * tokens.masks(logits_S)
    for step, drawn in ((0, theirs), (4, theirs), (5, both), (9, both)):
        distiller.after_update(Clock(step=step, steps=10, epoch=0, epochs=1))
        torch.testing.assert_close(distiller(SEGMENT)["maskd"], token_distance(logits_S, logits_T, drawn.detach()))
        torch.testing.assert_close(distiller.watch()["mask_mean"], drawn.mean().detach())


def test_masks_teach_the_student_nothing_about_themselves() -> None:
    """The student cannot lower its loss by making its own masks small."""
    student, teacher = tiny_segmenter(1), tiny_segmenter(2)
    distiller = MasKD(student, teacher, alpha=1.0, own_from=0.0)
    logits_S, logits_T = (network.classifier(network.backbone(SEGMENT[0])).detach() for network in (student, teacher))
    drawn = distiller.tokens[0].masks(logits_T) * distiller.tokens[0].masks(logits_S)
    logits_S.requires_grad_()
    token_distance(logits_S, logits_T, drawn).backward()
    seen: list[Tensor] = []
    student.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output))
    terms = distiller(SEGMENT)
    torch.testing.assert_close(torch.autograd.grad(terms["maskd"], seen[0])[0], logits_S.grad)


@BOTH
def test_a_student_that_is_its_teacher_has_nothing_to_learn(network: Any, data: Any) -> None:
    student = network(1)
    distiller = MasKD(student, copy.deepcopy(student))
    with torch.no_grad():
        for level in distiller.align.levels:
            if isinstance(level, nn.Conv2d):
                nn.init.dirac_(level.weight)
                nn.init.zeros_(level.bias)
    assert distiller(data)["maskd"].item() == pytest.approx(0, abs=1e-6)


@BOTH
def test_what_is_drawn_are_the_masks_of_the_finest_level(network: Any, data: Any) -> None:
    first, second = first_and_second(network, tokens=4)
    for distiller in (first.eval(), second.eval()):
        drawn = distiller.look(data)
        assert list(drawn) == ["mask 1", "mask 2", "mask 3", "mask 4"]
        assert all(mask.shape == (3, SIDE // 4, SIDE // 4) and not mask.requires_grad for mask in drawn.values())
    first(data)
    assert 0 < first.watch()["mask_mean"] < 1


class Aside(Segmenter):
    """A segmenter with a part nothing depends on."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__(width, drop)
        self.aside = nn.Conv2d(3, 4, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.aside(images)
        return super().forward(images)


def test_masks_that_matter_to_nobody_are_refused() -> None:
    teacher = scrambled(lambda: Aside(12, 0.0), 2)
    second = MasKD(tiny_segmenter(1), teacher, teacher_where="aside")
    with pytest.raises(UserError, match="losses do not depend on its aside"):
        TokenLearning(second.student, teacher, second)(SEGMENT)


def test_what_cannot_be_masked() -> None:
    teacher = tiny_detector(2)
    tokens = nn.ModuleList(ReceptiveTokens(12, 2, False) for _ in range(3))
    with pytest.raises(UserError, match="expected one map of each module"):
        MaskedNetwork(teacher, nn.Identity(), ["backbone", "backbone.fpn"], tokens)
    flat = nn.Sequential(nn.Flatten())
    with pytest.raises(UserError, match=r"the shape \(3, 3072\), expected maps"):
        MaskedNetwork(flat, nn.Identity(), ["0"], tokens[:1])(SEGMENT[0])


def test_modules_one_by_one_get_tokens_of_their_own() -> None:
    second = MasKD(tiny_segmenter(1), tiny_segmenter(2), where="classifier+backbone")
    assert [level.tokens.shape for level in second.tokens] == [(8, CLASSES), (8, 12)]
    first = TokenLearning(second.student, second.teacher, second)
    first(SEGMENT)
    assert {level: tuple(seen.shape) for level, seen in first.masked.seen.items()} == {1: (3, 8, 8, 8), 0: (3, 8, 8, 8)}


@pytest.mark.parametrize(
    ("network", "usual"), [(tiny_detector, (7.0, 6, 0.04)), (tiny_segmenter, (0.5, 8, 1.0))], ids=["detector", "segmenter"]
)
def test_the_published_weights(network: Any, usual: tuple[float, int, float]) -> None:
    distiller = MasKD(network(1), network(2))
    assert (distiller.alpha, len(distiller.tokens[0].tokens), distiller.own_from) == usual


@pytest.mark.parametrize(
    "setting",
    [
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"tokens": 0},
        {"own_from": 1.5},
        {"own_from": -0.1},
        {"token_share": 0.0},
        {"token_share": 2.0},
    ],
)
def test_bad_settings_get_one_sentence(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=f"{name} (is )?{value}.*, expected"):
        MasKD(tiny_segmenter(), tiny_segmenter(), **setting)
