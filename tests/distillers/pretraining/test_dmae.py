"""DMAE: one choice of patches for both, blocks that are compared, and who learns from what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse import distillers
from stillhouse.distillers.classics.mae import MAE
from stillhouse.distillers.pretraining.dmae import DMAE
from stillhouse.errors import UserError
from stillhouse.losses.pretraining import direction_distance, feature_distance
from stillhouse.masks.patches import random_masking
from stillhouse.models.mae import Decoder, MaskedAutoencoder
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.randomness import samples
from tests.conftest import images, tiny, tiny_cnn

SMALL: dict[str, Any] = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
BATCH = images(3), None


def encoder(seed: int = 1, **options: Any) -> nn.Module:
    return tiny(seed=seed, num_classes=0, **{"depth": 4, **options})


def dmae(student: nn.Module | None = None, teacher: nn.Module | None = None, **settings: Any) -> DMAE:
    torch.manual_seed(5)
    return DMAE(student or encoder(1), teacher or encoder(2, embed_dim=48, depth=8), **{**SMALL, **settings}).train()


def run(distiller: Any, step: int = 0) -> dict[str, Tensor]:
    with samples(0, step, torch.arange(3)):
        terms: dict[str, Tensor] = distiller(BATCH)
    return terms


def outputs(network: Any) -> list[Tensor]:
    """What each block of a network returns, filled by its next pass."""
    seen: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


def test_it_is_found() -> None:
    assert distillers.find("dmae") is DMAE
    assert DMAE.tasks == ("encode",)


def test_the_formula_on_the_blocks_at_three_quarters() -> None:
    distiller = dmae(alpha=2.0)
    assert (distiller.blocks_S, distiller.blocks_T) == ([2], [5])
    seen_S, seen_T = outputs(distiller.student), outputs(distiller.teacher)
    terms = run(distiller)
    assert len(seen_T) == 6, "the teacher runs no further"
    assert seen_T[5].shape == (3, 1 + 4, 48), "the class token and a quarter of the patches"
    torch.testing.assert_close(terms["features"], 2.0 * direction_distance(distiller.projection[0](seen_S[2]), seen_T[5]))


def test_both_see_the_same_patches() -> None:
    """With the first block of a copy, the tokens agree one by one, in order."""
    student = encoder(1)
    distiller = dmae(student, copy.deepcopy(student), student_blocks=0, teacher_blocks="0", projection="none")
    seen_S, seen_T = outputs(distiller.student), outputs(distiller.teacher)
    for step in range(3):
        run(distiller, step)
        assert torch.equal(seen_S[0], seen_T[-1])
        seen_S.clear()


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_a_copy_has_no_distance(distance: str) -> None:
    student = encoder(1)
    distiller = dmae(student, copy.deepcopy(student), projection="none", distance=distance)
    assert run(distiller)["features"].item() == 0
    with torch.no_grad():
        distiller.teacher.blocks[0].mlp.fc1.weight.add_(0.1)
    assert run(distiller)["features"].item() > 0


def test_several_pairs_add_up() -> None:
    pairs = dmae(student_blocks="1+3", teacher_blocks="2+7", projection="mlp", distance="l2")
    seen_S, seen_T = outputs(pairs.student), outputs(pairs.teacher)
    features = run(pairs)["features"]
    expected = [direction_distance(pairs.projection[n](seen_S[i]), seen_T[j], squared=True) for n, (i, j) in enumerate([(1, 2), (3, 7)])]
    torch.testing.assert_close(features, torch.stack(expected).sum())


def test_the_teachers_scale_matters_only_without_projection() -> None:
    def features(scale: float, projection: str) -> Tensor:
        teacher = encoder(2)
        teacher.blocks[2].register_forward_hook(lambda module, inputs, output: scale * output)  # type: ignore[index,operator,union-attr]
        return run(dmae(teacher=teacher, projection=projection))["features"]

    torch.testing.assert_close(features(7.0, "linear"), features(1.0, "linear"))
    assert abs(features(7.0, "none") - features(1.0, "none")) > 0.1


def test_without_projection_features_are_compared_as_they_are() -> None:
    distiller = dmae(teacher=encoder(2), projection="none")
    seen_S, seen_T = outputs(distiller.student), outputs(distiller.teacher)
    torch.testing.assert_close(run(distiller)["features"], feature_distance(seen_S[2], seen_T[2]))


def test_who_learns_from_what() -> None:
    distiller = dmae()
    terms = run(distiller)
    terms["features"].backward(retain_graph=True)

    def touched(*modules: Any) -> bool:
        return any(parameter.grad is not None and parameter.grad.any() for module in modules for parameter in module.parameters())

    student = distiller.student
    for part in (student.patch_embed, student.blocks[0], student.blocks[2], distiller.projection):
        assert touched(part)
    assert student.cls_token.grad.any()
    assert not touched(student.blocks[3], student.norm, distiller.decoder)
    distiller.zero_grad(set_to_none=True)
    terms["pixels"].backward()
    for part in (student.patch_embed, student.blocks[3], student.norm, distiller.decoder):
        assert touched(part)
    assert not touched(distiller.projection)
    assert not any(parameter.grad is not None for parameter in distiller.teacher.parameters())


def test_without_its_weight_it_is_mae_bit_for_bit() -> None:
    ours = dmae(alpha=0.0)
    torch.manual_seed(5)
    theirs = MAE(encoder(1), norm_pixels=False, **SMALL).train()
    theirs.decoder.load_state_dict(ours.decoder.state_dict())
    for distiller in (ours, theirs):
        torch.stack(list(run(distiller).values())).sum().backward()
    assert torch.equal(run(ours)["pixels"], run(theirs)["pixels"])
    for network in ("student", "decoder"):
        for mine, other in zip(getattr(ours, network).parameters(), getattr(theirs, network).parameters(), strict=True):
            assert (mine.grad is None and other.grad is None) or torch.equal(mine.grad, other.grad)


def test_a_masked_autoencoder_teaches_as_its_encoder_does() -> None:
    teacher = encoder(2)
    whole = MaskedAutoencoder(teacher, Decoder(teacher, 24, 1, 2))
    assert torch.equal(run(dmae(teacher=whole))["features"], run(dmae(teacher=teacher))["features"])


def test_the_teacher_is_fed_as_it_was_trained() -> None:
    student, teacher, other = encoder(1), encoder(2), encoder(2)
    for network, mean, std in ((student, 0.5, 0.5), (teacher, 0.5, 0.5), (other, 0.1, 0.2)):
        set_preprocessing(network, Preprocessing((mean,) * 3, (std,) * 3, 32))
    seen: list[Tensor] = []
    other.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))  # type: ignore[union-attr]
    run(dmae(student, other))
    torch.testing.assert_close(seen[0], ((BATCH[0] * 0.5 + 0.5) - 0.1) / 0.2)


def test_the_mask_is_the_samples() -> None:
    distiller = dmae()
    with samples(0, 0, torch.arange(3)):
        keep = random_masking(3, 16, 0.75, torch.device("cpu")).mask
        assert torch.equal(distiller.look(BATCH)["visible"], (1 - keep).view(3, 4, 4))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"student_blocks": 4}, r"^student_blocks is 4, expected numbers from 0 to 3 joined by \+: the student has 4 blocks"),
        ({"teacher_blocks": "8"}, r"^teacher_blocks is 8, expected numbers from 0 to 7"),
        ({"teacher_blocks": "1+x"}, r"^teacher_blocks is 1\+x, expected numbers"),
        ({"student_blocks": "-1"}, r"^student_blocks is -1, expected numbers"),
        ({"student_blocks": "1+2"}, r"^student_blocks names 2 and teacher_blocks 1, expected as many: pairs"),
        ({"masked": 1.0}, r"^masked=1.0 does not leave both"),
        ({"masked": 0.95}, r"^masked=0.95 does not leave both visible and hidden ones of 16 patches"),
        ({"alpha": -1.0}, r"^alpha is -1.0, expected the weight of the features"),
        ({"alpha": float("nan")}, r"^alpha is nan, expected"),
        ({"distance": "l3"}, r"^distance is 'l3', expected 'l1' or 'l2'"),
        ({"projection": "fc"}, r"^projection is 'fc', expected 'linear'"),
        ({"projection": "none"}, r"^projection is 'none', but the student's features have 32 channels and the teacher's 48"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dmae(**settings)


def test_networks_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"^the student has 4 x 4 patches and the teacher 8 x 8, expected the same places in both"):
        dmae(teacher=encoder(2, patch_size=4))
    with pytest.raises(UserError, match=r"^before its patches the student has 1 token\(s\) and the teacher 0, expected as many"):
        dmae(teacher=encoder(2, class_token=False, global_pool="avg"))
    with pytest.raises(UserError, match=r"^the teacher is a ResNet, which cannot be the encoder"):
        dmae(teacher=tiny_cnn())
    with pytest.raises(UserError, match=r"^the student is a ResNet, which cannot be the encoder"):
        dmae(tiny_cnn())
