"""MaskedKD against its formula, written out with timm's own parts; the checks of its paper; what bad input gets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from stillhouse.distillers.base import Clock
from stillhouse.distillers.classics.kd import KD
from stillhouse.distillers.classics.scratch import Scratch
from stillhouse.distillers.supervised.masked_kd import MaskedKD
from stillhouse.errors import UserError
from stillhouse.randomness import samples, uniform
from tests.conftest import CLASSES, PATCHES, images, labels, tiny, tiny_cnn, tiny_transformers

BATCH = images(4), labels(4)


def student() -> nn.Module:
    return tiny(seed=1).train()


def teacher() -> nn.Module:
    return tiny(seed=2, embed_dim=48, num_heads=3)


def gradients(terms: dict[str, Tensor], model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(sum(terms.values()), list(model.parameters())))


def class_rows(model: nn.Module, pictures: Tensor) -> Tensor:
    """The class token's attention to the patches in the last block [B, N], mean over heads, through timm's blocks one by one."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(pictures)))
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    attention = model.blocks[-1].attn
    queries, keys, _ = attention.qkv(model.blocks[-1].norm1(tokens)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (queries @ keys.transpose(-2, -1) * attention.scale).softmax(-1)[:, :, 0, 1:].mean(1)


def on_kept(model: nn.Module, pictures: Tensor, keep: Tensor) -> Tensor:
    """The teacher's logits on the kept patches: positions first, then the choice, image by image."""
    tokens = model._pos_embed(model.patch_embed(pictures))
    rows = [model.blocks(torch.cat([row[:1], row[1 + chosen]])[None]) for row, chosen in zip(tokens, keep, strict=True)]
    return model.forward_head(model.norm(torch.cat(rows)))


@pytest.mark.parametrize("keep", [0.25, 0.5, 11, 1.0])
@pytest.mark.parametrize(("targets", "temperature"), [("soft", 0.5), ("soft", 1.0), ("soft", 4.0), ("hard", 1.0)])
@pytest.mark.parametrize("by", ["student", "teacher", "lowest", "random", "sampled"])
def test_loss_and_gradients_are_the_formula(keep: float, targets: Any, temperature: float, by: Any) -> None:
    s, t, alpha = student(), teacher(), 0.3
    distiller = MaskedKD(s, t, keep=keep, alpha=alpha, temperature=temperature, targets=targets, by=by)
    with samples(0, 0, torch.arange(4)):
        terms = distiller(BATCH)
        ranked = {"random": uniform(4, PATCHES, BATCH[0].device)}
        ranked["sampled"] = class_rows(s, BATCH[0]).log() - (-ranked["random"].log()).log()
    ours = gradients(terms, s)

    count = keep if isinstance(keep, int) else int(keep * PATCHES)
    with torch.no_grad():
        ranked |= {"student": class_rows(s, BATCH[0]), "teacher": class_rows(t, BATCH[0]), "lowest": -class_rows(s, BATCH[0])}
        ranking = ranked[by]
        z_T = on_kept(t, BATCH[0], ranking.argsort(1, descending=True)[:, :count])
    z_S = s(BATCH[0])
    if targets == "soft":
        p = (z_T / temperature).softmax(-1)
        kd = temperature**2 * (p * (p.log() - (z_S / temperature).log_softmax(-1))).sum(-1).mean()
    else:
        kd = F.cross_entropy(z_S, z_T.argmax(-1))
    expected = {"ce": (1 - alpha) * F.cross_entropy(z_S, BATCH[1]), "kd": alpha * kd}
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], rtol=1e-5, atol=1e-5)
    for ours_, theirs in zip(ours, gradients(expected, s), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)


def test_all_patches_are_plain_distillation() -> None:
    masked, plain = MaskedKD(student(), teacher(), keep=1.0, temperature=2.0), KD(student(), teacher(), temperature=2.0)
    ours, theirs = masked(BATCH), plain(BATCH)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for a, b in zip(gradients(ours, masked.student), gradients(theirs, plain.student), strict=True):
        assert torch.equal(a, b)


def test_all_patches_by_a_choice_of_all_is_the_same_within_rounding() -> None:
    distiller = MaskedKD(student(), teacher(), keep=1.0)
    every = torch.rand(4, PATCHES).argsort(1)
    torch.testing.assert_close(distiller.teach(BATCH[0], every), distiller.teach(BATCH[0]), rtol=0, atol=1e-5)


def test_without_weight_it_is_plain_training() -> None:
    masked, plain = MaskedKD(student(), teacher(), alpha=0.0), Scratch(student())
    for a, b in zip(gradients(masked(BATCH), masked.student), gradients(plain(BATCH), plain.student), strict=True):
        assert torch.equal(a, b)


def test_a_student_that_is_its_teacher_at_full_weight_and_sight_has_no_loss() -> None:
    terms = MaskedKD(tiny(), tiny(), keep=1.0, alpha=1.0)(BATCH)
    assert terms["ce"].item() == 0
    assert terms["kd"].item() == pytest.approx(0, abs=1e-6)


def test_the_teacher_computes_on_the_kept_tokens_only_and_sees_every_image_its_own_way() -> None:
    distiller, seen, kept = MaskedKD(student(), teacher(), keep=5), [], []
    distiller.teacher.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[1]))
    for block in distiller.teacher.model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    distiller(BATCH)
    assert seen == [(4, 1 + 5, 48)] * 2
    (keep,) = kept
    assert keep.shape == (4, 5)
    assert all(len(set(row)) == 5 and set(row) <= set(range(PATCHES)) for row in keep.tolist())
    assert len({frozenset(row) for row in keep.tolist()}) > 1, "one choice for the whole batch"


def test_nothing_flows_through_the_choice_or_into_the_teacher() -> None:
    distiller = MaskedKD(student(), teacher())
    sum(distiller(BATCH).values()).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in distiller.teacher.parameters())
    distiller.student(BATCH[0])
    assert not distiller.scores(BATCH[0]).requires_grad


def test_the_choice_follows_the_mixed_image_that_the_student_saw() -> None:
    """A mask from another image is another method: the scores are those of this very forward pass."""
    distiller, kept = MaskedKD(student(), teacher(), keep=4), []
    distiller.teacher.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[1]))
    mixed = 0.7 * BATCH[0] + 0.3 * BATCH[0].flip(0)
    distiller(BATCH)
    distiller((mixed, BATCH[1]))
    assert torch.equal(kept[1], class_rows(distiller.student, mixed).topk(4, dim=1).indices)


def test_the_teacher_ranks_itself_at_full_cost_and_then_sees_what_it_chose() -> None:
    distiller, seen = MaskedKD(student(), teacher(), keep=5, by="teacher"), []
    distiller.teacher.model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    distiller(BATCH)
    assert seen == [1 + PATCHES, 1 + 5]


def test_keep_follows_its_schedule_and_goes_on_from_a_checkpoint() -> None:
    distiller = MaskedKD(student(), teacher(), keep="0:1.0,0.5:0.5,0.75:3")
    counts = []
    for step in range(5):
        distiller.after_update(Clock(step=step, steps=4, epoch=0, epochs=1))
        counts.append(distiller.kept)
    assert counts == [16, 16, 8, 3, 3]
    other = MaskedKD(student(), teacher(), keep={0.0: 1.0, 0.5: 0.5, 0.75: 3})
    assert other.kept == 16
    other.load_state_dict(distiller.state_dict())
    assert other.kept == 3
    assert other.progress == distiller.progress


def test_a_compiled_teacher_is_compiled_once_for_each_keep_and_its_shapes_are_static() -> None:
    torch._dynamo.reset()
    distiller, counter, compiled = (
        MaskedKD(student(), teacher(), keep="0:8,0.25:5,0.5:3,0.75:8"),
        CompileCounterWithBackend("aot_eager"),
        [],
    )
    distiller.teacher.compile(backend=counter, fullgraph=True)
    for step in range(8):
        distiller.after_update(Clock(step=step, steps=8, epoch=0, epochs=1))
        distiller((images(4, seed=step), labels(4)))
        compiled.append(counter.frame_count)
    assert compiled == [1, 1, 2, 2, 3, 3, 3, 3]
    nodes = [node for graph in counter.graphs for node in graph.graph.nodes]
    assert not [node for node in nodes if isinstance(node.meta.get("example_value"), torch.SymInt)], "a side that may vary"


def finding(make_student: Any = student, **settings: Any) -> MaskedKD:
    """MaskedKD whose keep finds itself, prepared."""
    distiller = MaskedKD(make_student(), teacher(), keep="auto", **settings).train()
    distiller.prepare([(images(20, seed=9), labels(20)), (images(20, seed=10), labels(20))])
    return distiller


def looked(make_student: Any = student, **settings: Any) -> MaskedKD:
    """The same after its first look, halfway, at a student that has learnt nothing."""
    distiller = finding(make_student, **settings)
    distiller.after_update(Clock(0, 2, 0, 1))
    distiller.rate.looked = 1
    distiller.revise(distiller.rate, 1, 2)
    return distiller


def trained(distiller: Any, steps: range, of: int = 400) -> list[int]:
    """What was kept in each of these steps of plain gradient descent."""
    kept = []
    for step in steps:
        sum(distiller((images(64, seed=step), labels(64, seed=step))).values()).backward()
        with torch.no_grad():
            for parameter in distiller.student.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        kept.append(distiller.kept)
        distiller.after_update(Clock(step + 1, of, 0, 1))
    return kept


def test_without_tolerance_it_is_plain_distillation_and_without_limit_it_keeps_the_least() -> None:
    strict, lenient, plain = finding(tolerance=0.0), finding(tolerance=float("inf")), KD(student(), teacher())
    assert all(torch.equal(strict(BATCH)[name], plain(BATCH)[name]) for name in ("ce", "kd"))
    strict.rate.looks = lenient.rate.looks = 20
    assert trained(strict, range(12)) == [PATCHES] * 12
    assert trained(lenient, range(4)) == [PATCHES, 2, 2, 2], "it does not ask a student that has learnt nothing"


def test_too_short_a_training_keeps_all_patches_and_says_so() -> None:
    lenient = finding(tolerance=float("inf"))
    assert trained(lenient, range(4), of=4) == [PATCHES] * 4
    assert lenient.news() == "keep 1, to the end: so short a training does not pay for finding another"
    assert set(lenient.watch()) == {"keep"}


@pytest.mark.parametrize("make_student", [student, lambda: tiny_cnn(1)], ids=["transformer", "convolutional"])
@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_keep_follows_from_where_the_masked_teacher_pulls(make_student: Any, targets: Any) -> None:
    """By closed form, on the first 32 images, from a student in eval mode whose batch norms take the images' statistics."""
    distiller = looked(make_student, tolerance=1.2, temperature=2.0 if targets == "soft" else 1.0, targets=targets)
    pictures = torch.cat([images(20, seed=9), images(20, seed=10)])[:32]
    s, t, tau = copy.deepcopy(distiller.student).eval(), teacher(), distiller.temperature
    for module in s.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    with torch.no_grad():
        rows = class_rows(s, pictures) if make_student is student else s.forward_features(pictures).norm(dim=1).flatten(1)
        p_S, pulls = (s(pictures) / tau).softmax(-1), []
        for count in distiller.rate.counts:
            z_T = on_kept(t, pictures, rows.topk(count, dim=1).indices)
            p_T = (z_T / tau).softmax(-1) if targets == "soft" else F.one_hot(z_T.argmax(-1), CLASSES).float()
            pulls.append((p_S - p_T).flatten())
    turned = [1 - F.cosine_similarity(pull, pulls[0], dim=0).item() for pull in pulls]
    within = [count for count, each in zip(distiller.rate.counts, turned, strict=True) if each < 1.2]
    assert distiller.kept == min(within)
    assert float(distiller.watch()["turned"]) == pytest.approx(turned[distiller.rate.rung], abs=1e-3)
    assert max(turned) > 0.1


def test_looking_leaves_the_student_as_it_was() -> None:
    distiller = finding(lambda: tiny_cnn(1))
    before = copy.deepcopy(distiller.student.state_dict())
    distiller.revise(distiller.rate, 1, 2)
    assert distiller.student.training
    assert all(module.training for module in distiller.student.modules())
    assert not distiller.teacher.training
    assert all(torch.equal(value, before[name]) for name, value in distiller.student.state_dict().items())


def test_a_keep_that_finds_itself_goes_on_exactly() -> None:
    whole, stopped, resumed = (finding(tolerance=0.0, budget=0.8) for _ in range(3))
    whole.rate.looks = stopped.rate.looks = 20  # more than so few steps would pay for; what was not spent is spent at the end
    kept = trained(whole, range(18), of=20)
    trained(stopped, range(5), of=20)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert trained(resumed, range(5, 18), of=20) == kept[5:]
    assert len(set(kept)) > 1, "it must change for this to say anything"
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_keep_that_finds_itself_says_why_and_shows_what_it_found() -> None:
    distiller = looked(tolerance=float("inf"))
    assert distiller.news().startswith("keep 1 -> 0.15: that turns the teacher's pull by ")
    assert distiller.news() == ""
    assert set(distiller.watch()) == {"keep", "turned", "student_distance"}
    assert float(distiller.watch()["keep"]) == pytest.approx(0.15)
    assert MaskedKD(student(), teacher()).watch() == {}


def test_a_keep_that_finds_itself_needs_images_and_its_settings_need_it() -> None:
    distiller = MaskedKD(student(), teacher(), keep="auto")
    assert distiller.kept == PATCHES
    with pytest.raises(UserError, match="call prepare"):
        distiller.after_update(Clock(1, 10, 0, 1))
    with pytest.raises(UserError, match=r"are for keep='auto', but keep is 0\.5"):
        MaskedKD(student(), teacher(), keep=0.5, budget=0.5)
    with pytest.raises(UserError, match=r"budget is 0\.01, expected"):
        MaskedKD(student(), teacher(), keep="auto", budget=0.01)


@pytest.mark.parametrize("keep", [6, 1.0])
def test_hint_and_attention_transfer_on_the_kept_places(keep: float) -> None:
    s, t = student(), teacher()
    distiller = MaskedKD(s, t, keep=keep, hint=2.0, attention=3.0)
    terms = distiller(BATCH)
    chosen = class_rows(s, BATCH[0]).topk(6 if keep == 6 else PATCHES, dim=1).indices

    def at_kept(tokens: Tensor) -> Tensor:
        return torch.stack([row[places] for row, places in zip(tokens, chosen, strict=True)])

    f_S = at_kept(s.get_intermediate_layers(BATCH[0], n=[1])[0])
    tokens_T = t._pos_embed(t.patch_embed(BATCH[0]))
    f_T = t.blocks(torch.cat([tokens_T[:, :1], at_kept(tokens_T[:, 1:])], dim=1))[:, 1:]
    torch.testing.assert_close(terms["hint"], 2.0 * (distiller.regressor(f_S) - f_T).square().mean(), rtol=1e-4, atol=1e-5)
    maps = [F.normalize(f.square().mean(-1)) for f in (f_S, f_T)]
    torch.testing.assert_close(terms["attention"], 3.0 * (maps[0] - maps[1]).square().mean(), rtol=1e-4, atol=1e-6)
    sum(terms.values()).backward()
    assert distiller.regressor.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in t.parameters())
    assert list(MaskedKD(student(), teacher(), hint=1.0)(BATCH)) == ["ce", "kd", "hint"]
    assert list(MaskedKD(student(), teacher(), attention=1.0)(BATCH)) == ["ce", "kd", "attention"]


STUDENTS = {
    "finer grid": lambda: tiny(seed=1, patch_size=4),
    "coarser grid": lambda: tiny(seed=1, patch_size=16),
    "without class token": lambda: tiny("vit_base_patch16_siglip_224", seed=1),
    "registers": lambda: tiny("vit_wee_patch16_reg1_gap_256", seed=1),
    "convolutional": lambda: tiny_cnn(1).train(),
    "rotary": lambda: tiny("vit_small_patch16_dinov3", seed=1),
    "CaiT": lambda: tiny("cait_xxs24_224", seed=1),
    "transformers": lambda: tiny_transformers("ViT").train(),
}
TEACHERS = {
    "ViT": teacher,
    "distilled": lambda: tiny("deit_tiny_distilled_patch16_224", seed=2),
    "DINOv3": lambda: tiny("vit_small_patch16_dinov3", seed=2),
    "CaiT": lambda: tiny("cait_xxs24_224", seed=2),
    "transformers": lambda: tiny_transformers("DeiT"),
}


@pytest.mark.parametrize("make_student", STUDENTS.values(), ids=STUDENTS.keys())
@pytest.mark.parametrize("make_teacher", TEACHERS.values(), ids=TEACHERS.keys())
def test_any_student_with_any_teacher(make_student: Any, make_teacher: Any) -> None:
    distiller = MaskedKD(make_student(), make_teacher(), keep=5, hint=1.0, attention=1.0)
    kept: list[Tensor] = []
    distiller.teacher.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[1]))
    terms = distiller(BATCH)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    (keep,) = kept
    assert all(len(set(row)) == 5 and max(row) < PATCHES for row in keep.tolist())
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in distiller.student.parameters())


def test_a_convolutional_student_points_where_its_map_is_strongest() -> None:
    s = tiny_cnn(1)
    distiller = MaskedKD(s, teacher(), keep=4)
    drawn = distiller.look(BATCH)
    with torch.no_grad():
        strongest = s.forward_features(BATCH[0]).norm(dim=1).flatten(1).topk(4, dim=1).indices
    assert torch.equal(drawn["shown"].flatten(1), torch.zeros(4, PATCHES).scatter(1, strongest, 1.0))


def test_look() -> None:
    distiller = MaskedKD(student(), teacher(), keep=5)
    rows = class_rows(distiller.student, BATCH[0])
    drawn = distiller.look(BATCH)
    assert {name: drawing.shape for name, drawing in drawn.items()} == {"saliency": (4, 4, 4), "shown": (4, 4, 4)}
    scaled = (rows - rows.amin(1, keepdim=True)) / (rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True))
    torch.testing.assert_close(drawn["saliency"].flatten(1), scaled, rtol=0, atol=1e-4)
    assert torch.equal(drawn["shown"].flatten(1).nonzero()[:, 1].view(4, 5), rows.topk(5, dim=1).indices.sort(1).values)


def test_look_draws_who_looked() -> None:
    """The student's own saliency also where the lowest are shown; the teacher's under its name; a random choice looks nowhere."""
    drawn = {by: MaskedKD(student(), teacher(), keep=5, by=by).look(BATCH) for by in ("student", "lowest", "sampled", "teacher", "random")}
    assert [set(maps) - {"shown"} for maps in drawn.values()] == [{"saliency"}] * 3 + [{"teacher looks"}, set()]
    for by in ("lowest", "sampled"):
        torch.testing.assert_close(drawn[by]["saliency"], drawn["student"]["saliency"])
    assert not torch.equal(drawn["sampled"]["shown"], drawn["student"]["shown"])
    assert not (drawn["lowest"]["shown"] * drawn["student"]["shown"]).any()


@pytest.mark.parametrize("make_student", [student, lambda: tiny_cnn(1).train()], ids=["transformer", "convolutional"])
def test_looking_changes_nothing(make_student: Any) -> None:
    distiller = MaskedKD(make_student(), teacher(), keep=5).eval()
    before, terms = copy.deepcopy(distiller.state_dict()), distiller(BATCH)
    distiller.look(BATCH)
    assert all(torch.equal(value, before[key]) for key, value in distiller.state_dict().items())
    assert all(torch.equal(term, terms[name]) for name, term in distiller(BATCH).items())


def test_the_state_is_the_student_and_the_schedule() -> None:
    state = MaskedKD(student(), teacher()).state_dict()
    assert {key.split(".")[0] for key in state} == {"student", "_extra_state"}
    assert state["_extra_state"].shape == ()


BAD = [
    *({"keep": keep} for keep in (0, 0.0, 1.5, -1, -0.5, 17, True, "abc", "0.5:1", float("nan"), float("inf"), None, "0:1.0,0.5:0", 0.01)),
    *({"temperature": temperature} for temperature in (0, -1.0, float("inf"), float("nan"))),
    *({"alpha": alpha} for alpha in (2, -0.1, float("nan"), True, "half", None)),
    *({"targets": targets} for targets in ("Soft", "", None)),
    *({"by": by} for by in ("attention", "", None)),
    *({"hint": hint} for hint in (-1.0, float("inf"), float("nan"))),
    *({"attention": attention} for attention in (-1.0, float("nan"))),
]


@pytest.mark.parametrize("setting", BAD, ids=str)
def test_bad_settings_get_one_sentence(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(UserError) as refusal:
        MaskedKD(student(), teacher(), **setting)
    text = str(refusal.value)
    assert "\n" not in text
    assert name in text or "schedule" in text
    assert str(value).split(":")[-1] in text


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet10t", "beit_base_patch16_224"])
def test_a_teacher_that_needs_all_its_places_is_refused(name: str) -> None:
    with torch.device("meta"):
        swin = timm.create_model(name)
    with pytest.raises(UserError, match="cannot run on some of its tokens: its"):
        MaskedKD(student(), swin)


def test_a_student_without_saliency_is_refused_but_may_be_given_random_patches() -> None:
    with torch.device("meta"):
        mixer = timm.create_model("mixer_s32_224")
    with pytest.raises(UserError, match="by='random'"):
        MaskedKD(mixer, teacher())
    assert MaskedKD(mixer, teacher(), by="random").saliency is None


def test_images_that_are_no_grid_for_the_student_are_refused() -> None:
    s = tiny(seed=1, dynamic_img_size=True)
    distiller = MaskedKD(s, teacher(), keep=5)
    with pytest.raises(UserError, match="do not form a grid"):
        distiller((torch.randn(2, 3, 32, 56), labels()))
