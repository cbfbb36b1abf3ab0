"""ACAM-KD against its equations written out, where its gradients go, and the checks of its card."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Clock
from stillhouse.distillers.classics.scratch import Scratch
from stillhouse.distillers.dense.acam_kd import ACAMKD
from stillhouse.errors import UserError
from stillhouse.losses.masked import dice
from tests.conftest import CLASSES, boxes, images, masks, tiny_detector, tiny_segmenter

SEGMENT = images(4), masks(4)
DETECT = list(images(4).sigmoid()), boxes(4)
NECK = {"where": "backbone.0", "teacher_where": "backbone.0"}


FORM: dict[str, Any] = {"reading": "b", "mask_grad": "detach", "balanced": False}
"""What the equations are written out for; every choice that differs is named where it is made."""


def segmenting(**settings: Any) -> ACAMKD:
    """With units that have left their start, so that masks matter."""
    torch.manual_seed(0)
    return moved(ACAMKD(tiny_segmenter(seed=1), tiny_segmenter(seed=2, width=16), **FORM | settings).train())


def detecting(**settings: Any) -> ACAMKD:
    torch.manual_seed(0)
    return moved(ACAMKD(tiny_detector(seed=1), tiny_detector(seed=2, width=16), **FORM | settings).train())


def moved(distiller: ACAMKD) -> ACAMKD:
    with torch.no_grad():
        for parameter in distiller.units.parameters():
            parameter.mul_(50)
    return distiller


def gradients(distiller: ACAMKD, *names: str) -> dict[str, Tensor]:
    """Of the sum of these terms, for all that learns."""
    terms = distiller(SEGMENT)
    learning = {name: parameter for name, parameter in distiller.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(sum(terms[name] for name in names), list(learning.values()), allow_unused=True)
    return {name: value if value is not None else torch.zeros(1) for name, value in zip(learning, found, strict=True)}


def of(part: str, found: dict[str, Tensor]) -> list[Tensor]:
    return [value for name, value in found.items() if name.startswith(part)]


def by_hand(distiller: ACAMKD, maps_S: list[Tensor], maps_T: list[Tensor], **settings: Any) -> dict[str, Tensor]:
    """Eq. 1-7, image by image and unit by unit, with the N x N matrix written out."""
    rows: list[dict[str, Tensor]] = []
    for level, (map_S, map_T) in enumerate(zip(maps_S, maps_T, strict=True)):
        conv, fuse, units = distiller.align.levels[level], distiller.fusion[level], distiller.units[level]
        aligned = nn.functional.interpolate(conv(map_S), size=map_T.shape[-2:], mode="bilinear")
        for S, T in zip(aligned.flatten(2), map_T.flatten(2), strict=True):
            if settings.get("normalise", True):
                scale = T.square().mean().sqrt()
                S, T = S / scale, T / scale
            asks, answers = {"cooperative": (T, S), "student_query": (S, T), "teacher": (T, T)}[settings.get("masks", "cooperative")]
            Q, K, V = fuse.query.weight @ asks, fuse.key.weight @ answers, fuse.value.weight @ answers
            F_f = V @ (Q.T @ K / Q.shape[0] ** 0.5).softmax(-1).T
            M_c = torch.sigmoid(units.channel @ F_f.mean(1)[None])
            M_s = torch.sigmoid(units.spatial @ F_f)
            C, N = T.shape
            reading, M = settings.get("reading", "b"), len(M_c)
            row = {"channel": torch.zeros(()), "spatial": torch.zeros(()), "diversity": torch.zeros(())}
            for i in range(M):
                for name, mask, square, count in (
                    ("channel", M_c[i], (M_c[i, :, None] * (T - S)).square().sum(), N),
                    ("spatial", M_s[i], (M_s[i] * (T - S)).square().sum(), C),
                ):
                    share = {"a": mask.sum(), "b": 1 / mask.sum(), "c": 1 / mask.square().sum()}[reading]
                    row[name] = row[name] + share * square / count / M
                for j in range(M):
                    for masks_ in (M_c, M_s) if i != j else ():
                        alike = 2 * masks_[i] @ masks_[j] / (masks_[i] @ masks_[i] + masks_[j] @ masks_[j])
                        row["diversity"] = row["diversity"] + alike / (M * (M - 1))
            rows.append(row)
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


@pytest.mark.parametrize(
    "settings",
    [{}, {"reading": "a"}, {"reading": "c", "mask_grad": "joint"}, {"masks": "student_query"}, {"masks": "teacher"}, {"normalise": False}],
    ids=str,
)
def test_terms_and_gradients_are_the_equations(settings: dict[str, Any]) -> None:
    distiller = segmenting(**NECK, units=3, alpha=0.5, diversity=2.0, **{"mask_grad": "joint", **settings})
    terms = distiller(SEGMENT)
    map_S, map_T = distiller.student.backbone[0](SEGMENT[0]), distiller.teacher.backbone[0](SEGMENT[0])
    expected = by_hand(distiller, [map_S], [map_T], **settings)
    weights = {"channel": 0.5, "spatial": 0.5, "diversity": 2.0}
    learning = [*distiller.student.backbone[0].parameters(), *distiller.align.parameters(), *distiller.fusion.parameters()]
    learning += list(distiller.units.parameters())
    assert set(terms) == {"ce", *weights}
    for name, weight in weights.items():
        torch.testing.assert_close(terms[name], weight * expected[name], rtol=1e-4, atol=1e-6)
        ours = torch.autograd.grad(terms[name], learning, retain_graph=True, allow_unused=True, materialize_grads=True)
        theirs = torch.autograd.grad(weight * expected[name], learning, retain_graph=True, allow_unused=True, materialize_grads=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(1 + b.abs().max()))


def test_levels_of_a_detector_are_the_mean_of_the_levels() -> None:
    distiller = detecting(units=2)
    terms = distiller(DETECT)
    maps_S, maps_T = (levels.of(DETECT[0]) for levels in (distiller.maps_S, distiller.maps_T))
    assert len(maps_S) == len(distiller.units) == len(distiller.fusion) == 3
    for name, value in by_hand(distiller, maps_S, maps_T).items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6)


def test_how_many_masks_there_are() -> None:
    """The paper's: one a class for segmentation, six for detection."""
    assert len(segmenting().units[0].spatial) == CLASSES
    assert len(segmenting(**NECK).units[0].spatial) == 6
    assert len(detecting().units[0].spatial) == 6
    assert len(segmenting(units=2).units[0].channel) == 2


def test_a_student_that_is_its_teacher_has_nothing_to_copy() -> None:
    for reading in ("a", "b", "c"):
        torch.manual_seed(0)
        terms = moved(ACAMKD(tiny_segmenter(), tiny_segmenter(), reading=reading))(SEGMENT)
        assert terms["spatial"].item() == 0
        assert terms["channel"].item() == 0
        assert terms["diversity"].item() > 0


def test_units_of_zero_are_plain_feature_mse() -> None:
    distiller = segmenting(normalise=False)
    with torch.no_grad():
        for parameter in distiller.units.parameters():
            parameter.zero_()
    terms = distiller(SEGMENT)
    logits_S, logits_T = distiller.student.classifier(distiller.student.backbone(SEGMENT[0])), distiller.maps_T.of(SEGMENT[0])[0]
    mse = (logits_S - logits_T).square().mean()
    torch.testing.assert_close(terms["spatial"], mse / 2)
    torch.testing.assert_close(terms["channel"], mse / 2)
    torch.testing.assert_close(terms["diversity"], torch.tensor(2.0))


def test_joint_moves_masks_and_the_student_moves_them_too() -> None:
    found = gradients(segmenting(mask_grad="joint"), "diversity")
    assert any(value.any() for value in of("student.", found))
    assert all(value.any() for value in of("units.", gradients(segmenting(mask_grad="joint"), "channel", "spatial")))


def test_detached_student_cannot_steer_masks() -> None:
    distiller = segmenting(mask_grad="detach_student")
    assert not any(value.any() for value in of("student.", gradients(distiller, "diversity")))
    assert all(value.any() for value in of("units.", gradients(distiller, "channel", "spatial")))
    assert any(value.any() for value in of("fusion.", gradients(distiller, "channel", "spatial")))
    copied = gradients(distiller, "channel", "spatial")
    fixed = gradients(segmenting(mask_grad="detach"), "channel", "spatial")
    for a, b in zip(of("student.", copied), of("student.", fixed), strict=True):
        assert torch.equal(a, b), "the student's gradient is that under masks it has no hand in"


@pytest.mark.parametrize("settings", [{"mask_grad": "detach"}, {"masks": "fixed", "mask_grad": "joint"}], ids=str)
def test_detached_masks_learn_from_diversity_only(settings: dict[str, Any]) -> None:
    distiller = segmenting(**settings)
    copied, diverse = gradients(distiller, "channel", "spatial"), gradients(distiller, "diversity")
    assert not any(value.any() for value in of("units.", copied) + of("fusion.", copied))
    assert all(value.any() for value in of("units.", diverse))
    assert not any(value.any() for value in of("student.", diverse))
    assert any(value.any() for value in of("student.", copied))


def test_alpha_weighs_the_student_and_not_what_opposed_masks_seek() -> None:
    weak, strong = (gradients(segmenting(mask_grad="oppose", alpha=alpha), "channel", "spatial") for alpha in (0.5, 4.0))
    for name, value in weak.items():
        times = 1 if name.startswith(("units", "fusion")) else 8
        torch.testing.assert_close(strong[name], times * value, rtol=1e-4, atol=1e-7)


def test_opposed_masks_ascend_what_the_student_descends() -> None:
    up, down = (gradients(segmenting(mask_grad=route), "channel", "spatial") for route in ("oppose", "detach_student"))
    for name, value in up.items():
        masks_ = name.startswith(("units.", "fusion."))
        torch.testing.assert_close(value, -down[name] if masks_ else down[name], msg=name)
    assert any(value.any() for value in of("units.", up))


def test_opposed_masks_find_where_the_difference_is() -> None:
    """The teacher sees something in one half of the image, the student does not: balanced masks that ascend go there."""
    distiller = segmenting(mask_grad="oppose", balanced=True, units=2, parts="spatial", diversity=0.0)
    map_S = torch.randn(4, 64, CLASSES)
    map_T = map_S.clone()
    map_T[:, :32] += 2.0
    learning = [*distiller.units.parameters(), *distiller.fusion.parameters()]
    optimizer = torch.optim.Adam(learning, lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        mask = distiller.masks(0, map_S, map_T)["spatial"]
        distiller.copied((map_T - map_S).square(), "spatial", mask).backward()
        optimizer.step()
    mask = distiller.masks(0, map_S, map_T)["spatial"]
    assert mask[..., :32].mean() > mask[..., 32:].mean() + 0.3


def test_teacher_only_masks_do_not_depend_on_the_student() -> None:
    map_S, other, map_T = (torch.randn(2, 16, CLASSES) for _ in range(3))
    for made_from, follows in (("cooperative", True), ("student_query", True), ("teacher", False), ("fixed", False)):
        distiller = segmenting(masks=made_from)
        same = torch.equal(distiller.masks(0, map_S, map_T)["spatial"], distiller.masks(0, other, map_T)["spatial"])
        assert same is not follows, made_from


def test_fixed_masks_read_the_teachers_map_and_need_no_fusion() -> None:
    distiller = segmenting(masks="fixed", normalise=False)
    assert not list(distiller.fusion.parameters())
    map_T = torch.randn(2, 16, CLASSES)
    expected = torch.sigmoid(torch.einsum("mc,bnc->bmn", distiller.units[0].spatial, map_T))
    torch.testing.assert_close(distiller.masks(0, map_T, map_T)["spatial"], expected)


@pytest.mark.parametrize(("part", "other"), [("spatial", "channel"), ("channel", "spatial")])
def test_one_part_alone(part: Any, other: str) -> None:
    both, alone = segmenting(), segmenting(parts=part)
    alone.load_state_dict(both.state_dict(), strict=False)
    whole, terms = both(SEGMENT), alone(SEGMENT)
    assert set(terms) == {"ce", part, "diversity"}
    assert torch.equal(terms[part], whole[part])
    assert 0 < terms["diversity"] < whole["diversity"]
    assert not [name for name in alone.watch() if other in name]


def test_one_mask_has_no_diversity_but_gradients_for_all() -> None:
    distiller = segmenting(units=1)
    terms = distiller(SEGMENT)
    assert terms["diversity"].item() == 0
    sum(terms.values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters() if parameter.requires_grad)


def test_normalised_losses_do_not_mind_the_size_of_the_maps() -> None:
    distiller = segmenting(**NECK)
    terms = distiller(SEGMENT)
    with torch.no_grad():
        for module in (distiller.teacher.backbone[0], distiller.align.levels[0]):
            module.weight.mul_(10)
            module.bias.mul_(10)
    for name, value in distiller(SEGMENT).items():
        torch.testing.assert_close(value, terms[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_off_is_the_undistilled_trajectory_bit_for_bit(clip: float | None) -> None:
    """All along a training, and where the gradient's norm is clipped as well."""
    trained = []
    for distiller in (segmenting(**ACAMKD.off), Scratch(tiny_segmenter(seed=1)).train()):
        (turn,) = distiller.turns()
        optimizer = torch.optim.AdamW(turn.parameters, lr=0.01)
        for step in range(5):
            batch = images(4, seed=step), masks(4, seed=step)
            optimizer.zero_grad()
            sum(distiller(batch).values()).backward()
            if clip:
                nn.utils.clip_grad_norm_(turn.parameters, clip)
            optimizer.step()
        trained.append(distiller.product.state_dict())
    ours, theirs = trained
    assert ours.keys() == theirs.keys(), "nothing of ACAM is in the product"
    start = tiny_segmenter(seed=1).state_dict()
    for name, value in ours.items():
        if clip is None:
            assert torch.equal(value, theirs[name]), name
        torch.testing.assert_close(value, theirs[name])
        assert not torch.equal(value, start[name])


def test_the_teacher_gets_no_gradient() -> None:
    distiller = detecting(mask_grad="joint")
    sum(distiller(DETECT).values()).backward()
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


def test_what_it_watches() -> None:
    distiller = segmenting(**NECK, units=3)
    terms = distiller(SEGMENT)
    seen = distiller.watch()
    assert set(seen) == {"mask_mean_spatial", "mask_mean_channel", "dice_spatial", "dice_channel", "corr"}
    torch.testing.assert_close(seen["dice_spatial"] + seen["dice_channel"], terms["diversity"].detach())
    ((map_S, map_T),) = distiller.pairs(distiller.maps_S.of(SEGMENT[0]), distiller.maps_T.of(SEGMENT[0]))
    made = distiller.masks(0, map_S, map_T)
    torch.testing.assert_close(seen["mask_mean_spatial"], made["spatial"].mean().detach())
    stacked = zip(made["spatial"].mean(1).detach(), (map_T - map_S).square().mean(2).sqrt().detach(), strict=True)
    torch.testing.assert_close(seen["corr"], torch.stack([torch.corrcoef(torch.stack(each))[0, 1] for each in stacked]).mean())


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        ({}, ""),
        ({"mask_mean_spatial": 0.5, "dice_spatial": 0.5}, ""),
        ({"mask_mean_spatial": 0.01}, "the spatial masks have closed (mean 0.010)"),
        ({"mask_mean_channel": 0.04}, "the channel masks have closed (mean 0.040)"),
        ({"mask_mean_spatial": 0.99}, "the spatial masks are wide open (mean 0.990)"),
        ({"dice_channel": 0.995}, "the channel masks are all alike (Dice 0.995)"),
    ],
)
def test_alarm(figures: dict[str, float], sentence: str) -> None:
    distiller = segmenting()
    distiller.after_update(Clock(step=100, steps=200, epoch=0, epochs=1))
    assert distiller.alarm(figures).startswith(sentence)
    assert bool(distiller.alarm(figures)) is bool(sentence)
    assert segmenting(alpha=0.0).alarm(figures) == "", "masks that weigh nothing alarm nobody"


def test_masks_are_alike_when_they_start() -> None:
    distiller, alike = segmenting(), {"dice_spatial": 1.0, "mask_mean_spatial": 0.5}
    for step, steps in ((0, 200), (99, 200), (100, 201), (4, 4)):  # before half of the training, and in a training of a few steps
        distiller.after_update(Clock(step=step, steps=steps, epoch=0, epochs=1))
        assert distiller.alarm(alike) == ""


def test_the_published_form_closes_its_masks_and_that_is_said() -> None:
    """As printed, with joint gradients; the default keeps them open on the same maps."""
    means, alarms = {}, {}
    defaults = {name: inspect.signature(ACAMKD.__init__).parameters[name].default for name in FORM}
    for name, settings in {"printed": {"reading": "a", "mask_grad": "joint"}, "default": defaults}.items():
        distiller = segmenting(diversity=1.0, **settings)
        learning = [*distiller.units.parameters(), *distiller.fusion.parameters()]
        optimizer = torch.optim.Adam(learning, lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            sum(distiller(SEGMENT).values()).backward()
            optimizer.step()
        figures = {key: value.item() for key, value in distiller.watch().items()}
        means[name], alarms[name] = figures["mask_mean_spatial"], distiller.alarm(figures)
    assert means["printed"] < 0.05
    assert "have closed" in alarms["printed"]
    assert 0.2 < means["default"] < 0.8
    assert alarms["default"] == ""


def test_pictures() -> None:
    distiller = segmenting(**NECK, units=2).eval()
    drawn = distiller.look(SEGMENT)
    assert {name: tuple(value.shape) for name, value in drawn.items()} == {
        "mask 1": (4, 8, 8),
        "mask 2": (4, 8, 8),
        "difference": (4, 8, 8),
        "channels": (4, 2, 16),
    }
    assert torch.equal(drawn["difference"].amax((1, 2)), torch.ones(4))
    ((map_S, map_T),) = distiller.pairs(distiller.maps_S.of(SEGMENT[0]), distiller.maps_T.of(SEGMENT[0]))
    made = distiller.masks(0, map_S, map_T)
    assert torch.equal(drawn["mask 2"].flatten(1), made["spatial"][:, 1])
    assert torch.equal(drawn["channels"], made["channel"])
    assert set(detecting(parts="channel", units=2).eval().look(DETECT)) == {"difference", "channels"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"units": -1}, "^units is -1, expected the number of masks"),
        ({"alpha": -1.0}, "^alpha is -1.0 and diversity is 1.0, expected finite weights"),
        ({"diversity": float("nan")}, "diversity is nan, expected finite weights"),
        ({"reading": "d"}, "^reading is 'd', expected one of a, b, c"),
        ({"mask_grad": "none"}, "^mask_grad is 'none', expected one of joint, detach_student, detach, oppose"),
        ({"masks": "both"}, "^masks is 'both', expected one of cooperative, student_query, teacher, fixed"),
        ({"parts": "neither"}, "^parts is 'neither', expected"),
        ({"where": "backbone.7"}, "no layer 'backbone.7'"),
        ({"where": "backbone.0+backbone.2", "teacher_where": "logits"}, r"the student has 2 level\(s\) and the teacher 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refusal:
        ACAMKD(tiny_segmenter(seed=1), tiny_segmenter(seed=2), **settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_maps_that_are_not_finite_are_refused_at_first_sight_and_later_seen_in_the_loss(who: str) -> None:
    fresh, running = segmenting(), segmenting()
    running(SEGMENT)
    for distiller in (fresh, running):
        with torch.no_grad():
            getattr(distiller, who).classifier[2].bias[3] = float("inf")
    with pytest.raises(UserError, match=f"^the {who}'s map at level 1 of 1 holds values that are not finite"):
        fresh(SEGMENT)
    terms = running(SEGMENT)
    assert not terms["spatial"].isfinite()
    assert not terms["channel"].isfinite()


def test_what_is_kept_for_the_backward_pass_grows_with_the_places_and_not_with_their_square() -> None:
    """So much that the finest level of a detector's image of 800 x 1333, 100 x 167 places of 256 channels, stays far below 2 GB."""
    distiller = segmenting(**NECK, mask_grad="oppose", balanced=True)
    channels = distiller.maps_T.channels[0]

    def kept(places: int) -> int:
        seen: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        map_S, map_T = torch.randn(1, places, channels, requires_grad=True), torch.randn(1, places, channels)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            masks_ = distiller.masks(0, map_S, map_T)
            squares = (map_T - map_S).square()
            loss = sum(distiller.copied(squares, part, mask) + dice(mask) for part, mask in masks_.items())
        loss.backward()
        return sum(seen.values())

    once, twice = kept(1000), kept(2000)
    assert twice < 2.01 * once
    assert twice / (2000 * channels) * 100 * 167 * 256 < 1e9


def test_nothing_random_is_drawn_in_a_step() -> None:
    distiller = copy.deepcopy(segmenting())
    before = torch.get_rng_state()
    distiller(SEGMENT)
    assert torch.equal(torch.get_rng_state(), before)
