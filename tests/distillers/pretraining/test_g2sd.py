"""G2SD: what is predicted in the generic stage, who teaches in the specific one, and what goes from the one to the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse import distillers
from stillhouse.distillers.base import Clock
from stillhouse.distillers.classics.scratch import Scratch
from stillhouse.distillers.pretraining.g2sd import G2SD, Generic
from stillhouse.errors import UserError
from stillhouse.losses.logits import cross_entropy
from stillhouse.losses.pretraining import normalised_kd, whitened_smooth_l1
from stillhouse.masks.patches import random_masking
from stillhouse.models.mae import Decoder, MaskedAutoencoder, encode
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.randomness import samples
from tests.conftest import CLASSES, images, labels, tiny, tiny_cnn

BATCH = images(3), labels(3)
CPU = torch.device("cpu")


def student(seed: int = 1, name: str = "deit_tiny_distilled_patch16_224", **options: Any) -> nn.Module:
    network = tiny(name, seed=seed, **options)
    set_preprocessing(network, Preprocessing((0.5,) * 3, (0.5,) * 3, 32))  # as the teachers want their images
    return network


def autoencoder(seed: int = 2, depth: int = 4, **options: Any) -> MaskedAutoencoder:
    encoder = tiny(seed=seed, num_classes=0, embed_dim=48, **options)
    torch.manual_seed(seed)
    return MaskedAutoencoder(encoder, Decoder(encoder, 40, depth, 4)).eval()


def generic(learner: nn.Module | None = None, teacher: nn.Module | None = None, **settings: Any) -> Generic:
    torch.manual_seed(5)
    given = {"masked": 0.75, "block": None, "supervise": "all", "decoder": (24, 2, 2), **settings}
    return Generic(learner or student(), teacher or autoencoder(), **given).train()


def g2sd(learner: nn.Module | None = None, **settings: Any) -> G2SD:
    return G2SD(learner or student(), autoencoder(), tiny(seed=3), **settings).train()


def run(distiller: Any) -> Tensor:
    with samples(0, 0, torch.arange(3)):
        term: Tensor = distiller(BATCH)["hidden"]
    return term


def mask() -> Any:
    with samples(0, 0, torch.arange(3)):
        return random_masking(3, 16, 0.75, CPU)


def test_the_methods_class_is_the_specific_stage() -> None:
    assert distillers.find("g2sd") is G2SD
    assert G2SD.tasks == ("classify",)


@pytest.mark.parametrize("block", [None, 1, 4])
def test_the_formula_of_the_generic_stage(block: int | None) -> None:
    distiller, drawn = generic(block=block), mask()
    teacher = distiller.teacher
    tokens = teacher.decoder(encode(teacher.encoder, BATCH[0], drawn.keep), drawn.restore, upto=block or 2)
    own = distiller.predictor(distiller.decoder(encode(distiller.student, BATCH[0], drawn.keep), drawn.restore))
    assert own.shape == tokens.shape == (3, 17, 40)
    torch.testing.assert_close(run(distiller), whitened_smooth_l1(own, tokens))


def test_hidden_places_alone() -> None:
    seen: list[Tensor] = []
    distiller, drawn = generic(supervise="hidden"), mask()
    distiller.predictor.register_forward_hook(lambda module, inputs, output: seen.append(output))
    loss = run(distiller)
    tokens = distiller.teacher.hidden(BATCH[0], drawn.keep, drawn.restore, 2)
    hidden = drawn.mask.bool()
    assert hidden.sum() == 3 * (16 - 4)
    torch.testing.assert_close(loss, whitened_smooth_l1(seen[0][:, 1:][hidden], tokens[:, 1:][hidden]))


def test_what_lies_behind_the_block_does_not_matter() -> None:
    distiller = generic(block=2)
    before = run(distiller)
    with torch.no_grad():
        for module in (*distiller.teacher.decoder.blocks[2:], distiller.teacher.decoder.norm, distiller.teacher.decoder.head):
            for parameter in module.parameters():
                parameter.normal_()
    assert torch.equal(run(distiller), before)


def test_the_student_has_no_norm_and_no_pixels_and_all_that_learns_has_a_gradient() -> None:
    distiller = generic()
    assert not hasattr(distiller.decoder, "norm")
    assert not hasattr(distiller.decoder, "head")
    run(distiller).backward()
    learning = {id(parameter) for turn in distiller.turns() for parameter in turn.parameters}
    for key, parameter in distiller.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in learning) == parameter.requires_grad, key
    resting = {key for key, parameter in distiller.student.named_parameters() if not parameter.requires_grad}
    assert resting == {"pos_embed", "dist_token", "head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_the_generic_stage_is_judged_by_features() -> None:
    distiller = generic().eval()
    (name, network), *others = distiller.examined(distiller.products).items()
    assert (name, others) == ("student", [])
    with torch.no_grad():
        assert torch.equal(network(BATCH[0]), encode(distiller.student, BATCH[0])[:, 0])


def test_the_stages() -> None:
    learner, specific_teacher = student(), tiny(seed=3)
    settings = {"decoder_width": 24, "decoder_depth": 2, "decoder_heads": 2, "generic": 1.5}
    stages = G2SD.stages(learner, autoencoder(), 10, specific_teacher=specific_teacher, **settings)
    first = next(stages)
    assert (first.name, first.epochs, first.task, type(first.distiller)) == ("generic", 15, "encode", Generic)
    assert first.distiller.student is learner
    with torch.no_grad():
        learner.blocks[0].mlp.fc1.weight.fill_(0.25)  # type: ignore[index,operator,union-attr]
        learner.head.weight.fill_(1)  # type: ignore[union-attr,operator]
    second = next(stages)
    assert (second.name, second.epochs, second.task, type(second.distiller)) == ("", 10, "", G2SD)
    assert second.distiller.student is learner
    assert second.distiller.teacher is specific_teacher
    assert all(parameter.requires_grad for parameter in learner.parameters()), "what rested learns"
    assert (learner.blocks[0].mlp.fc1.weight == 0.25).all(), "with what the generic stage has made"  # type: ignore[index,union-attr,operator]
    assert 0 < learner.head.weight.abs().max() < 1e-4, "and a new head"  # type: ignore[union-attr,operator]
    assert next(stages, None) is None


def test_the_specific_stage_alone() -> None:
    (only,) = G2SD.stages(student(), autoencoder(), 7, specific_teacher=tiny(seed=3), generic=0)
    assert (only.name, only.epochs, only.task) == ("", 7, "")


def test_the_formula_of_the_specific_stage() -> None:
    distiller = g2sd(alpha=0.3)
    terms = distiller(BATCH)
    distiller.student.set_distilled_training()
    by_class, by_token = distiller.student(BATCH[0])
    answer = distiller.specific_teacher(BATCH[0]).argmax(-1)
    torch.testing.assert_close(terms["ce"], 0.7 * F.cross_entropy(by_class, BATCH[1]))
    torch.testing.assert_close(terms["kd"], 0.3 * F.cross_entropy(by_token, answer))
    with torch.no_grad():
        torch.testing.assert_close(distiller.student.eval()(BATCH[0]), (by_class + by_token) / 2)


def test_a_teacher_that_is_right_and_tokens_that_agree_give_cross_entropy() -> None:
    distiller = g2sd()
    heads = distiller.student
    with torch.no_grad():  # one token's direction is the other's, and so is its head
        heads.head_dist.load_state_dict(heads.head.state_dict())
        heads.dist_token.copy_(heads.cls_token + heads.pos_embed[:, :1])
    targets = distiller.teacher(BATCH[0]).argmax(-1)
    terms = distiller((BATCH[0], targets))
    torch.testing.assert_close(terms["ce"] + terms["kd"], cross_entropy(heads.eval()(BATCH[0]), targets))


def test_soft_labels_and_the_mixed_picture() -> None:
    distiller, seen = g2sd(), []
    distiller.teacher.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    mixed, soft = 0.6 * BATCH[0] + 0.4 * BATCH[0].flip(0), torch.randn(3, CLASSES).softmax(-1)
    distiller((mixed, soft))
    assert torch.equal(seen[0], mixed), "the teacher sees what the student sees"


def test_the_distillation_token_has_no_position() -> None:
    learner = student()
    with torch.no_grad():
        before = learner(BATCH[0])
    distiller = g2sd(learner)
    with torch.no_grad():
        torch.testing.assert_close(learner.eval()(BATCH[0]), before, msg="the same function")
    assert not distiller.student.pos_embed[:, 1].any()
    optimizer = torch.optim.AdamW(distiller.turns()[0].parameters, 0.1)
    sum(distiller(BATCH).values()).backward()
    optimizer.step()
    assert distiller.student.pos_embed[:, 1].any()
    distiller.after_update(Clock(1, 2, 0, 1))
    assert not distiller.student.pos_embed[:, 1].any()
    assert distiller.student.pos_embed[:, 2:].any()


def test_it_is_as_if_the_token_were_the_last() -> None:
    """Attention does not know an order."""
    distiller = g2sd().eval()
    network = distiller.student
    with torch.no_grad():
        patches = network.patch_embed(BATCH[0]) + network.pos_embed[:, 2:]
        first = (network.cls_token + network.pos_embed[:, :1]).expand(3, -1, -1)
        tokens = torch.cat([first, patches, network.dist_token.expand(3, -1, -1)], dim=1)
        tokens = network.norm(network.blocks(tokens))
        expected = (network.head(tokens[:, 0]) + network.head_dist(tokens[:, -1])) / 2
        torch.testing.assert_close(network(BATCH[0]), expected, rtol=1e-4, atol=1e-5)


def test_nkd_takes_the_place_of_both_terms() -> None:
    distiller = g2sd(student(name="vit_tiny_patch16_224"), targets="nkd")
    terms = distiller(BATCH)
    target, rest = normalised_kd(distiller.student(BATCH[0]), distiller.teacher(BATCH[0]), BATCH[1])
    torch.testing.assert_close(terms, {"target": target, "rest": rest})
    soft = 0.9 * F.one_hot(BATCH[1], CLASSES) + 0.1 / CLASSES
    torch.testing.assert_close(distiller((BATCH[0], soft)), terms)


def test_without_the_teacher_it_is_plain_training() -> None:
    learner = student()
    ours, plain = g2sd(learner, alpha=0.0), Scratch(copy.deepcopy(learner)).train()
    assert torch.equal(ours(BATCH)["ce"], plain(BATCH)["ce"])


def test_only_the_student_is_stored() -> None:
    distiller = g2sd()
    assert {key.split(".")[0] for key in distiller.state_dict()} == {"student"}
    other = g2sd(student(seed=9))
    other.load_state_dict(distiller.state_dict())
    assert torch.equal(other.student.dist_token, distiller.student.dist_token)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 1.5}, r"^alpha is 1.5 and generic 1.5, expected a weight in \[0, 1\]"),
        ({"generic": -1.0}, r"^alpha is 0.5 and generic -1.0, expected"),
        ({"targets": "soft"}, r"^targets is 'soft' and supervise 'all', expected"),
        ({"supervise": "some"}, r"^targets is 'hard' and supervise 'some', expected"),
        ({"targets": "nkd"}, r"^targets is 'nkd' and the student has a distillation token, name a plain one"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        g2sd(**settings)


def test_networks_that_do_not_fit_the_specific_stage() -> None:
    with pytest.raises(UserError, match=r"^targets is 'hard' and the student has no distillation token, name timm/deit"):
        g2sd(student(name="vit_tiny_patch16_224"))
    with pytest.raises(
        UserError, match=r"^the specific teacher knows 7 classes and the student 5, expected the same; train it on this data"
    ):
        G2SD(student(), autoencoder(), tiny(seed=3, num_classes=7))
    with pytest.raises(UserError, match=r"^the student is a ResNet, which cannot be the encoder"):
        g2sd(tiny_cnn())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block": 5}, r"^block is 5, expected one of the 4 blocks of the teacher's decoder, from 1 to 4"),
        ({"block": 0}, r"^block is 0, expected one of the 4 blocks"),
        ({"masked": 0.99}, r"^masked=0.99 does not leave both"),
        ({"decoder": (25, 2, 2)}, r"^a decoder of width 25, depth 2 and 2 heads cannot be made"),
        ({"teacher": tiny(seed=3)}, r"^the teacher is a VisionTransformer, expected a masked autoencoder: RUN/autoencoder of a run of mae"),
        ({"teacher": autoencoder(patch_size=4)}, r"^the student has 4 x 4 patches and the teacher 8 x 8, expected the same places"),
        (
            {"teacher": autoencoder(class_token=False, global_pool="avg")},
            r"^student and teacher have other numbers of class tokens and registers, expected as many",
        ),
    ],
)
def test_what_does_not_fit_the_generic_stage(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        generic(**settings)
