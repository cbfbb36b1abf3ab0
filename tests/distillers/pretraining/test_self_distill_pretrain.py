"""Self-distillation: from the start, near what further pre-training made of it, and nothing else than MAE beside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.distillers.classics.mae import MAE
from stillhouse.distillers.pretraining.self_distill_pretrain import SelfDistillPretrain
from stillhouse.errors import UserError
from stillhouse.losses.pretraining import squared_length
from stillhouse.models.mae import Decoder, MaskedAutoencoder
from stillhouse.randomness import samples
from tests.conftest import images, tiny

SMALL: dict[str, Any] = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
BATCH = images(3), None


def encoder(seed: int = 1, **options: Any) -> nn.Module:
    return tiny(seed=seed, num_classes=0, **options)


def autoencoder(seed: int = 1) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    network = encoder(seed)
    return MaskedAutoencoder(network, Decoder(network, 24, 1, 2))


def made(teacher: nn.Module | None = None, **settings: Any) -> SelfDistillPretrain:
    return SelfDistillPretrain(autoencoder(), teacher or encoder(2), **settings).train()


def terms_of(distiller: MAE) -> dict[str, Tensor]:
    with samples(0, 3, torch.arange(3)):
        terms: dict[str, Tensor] = distiller(BATCH)
    return terms


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("compared", "tokens"), [("class", slice(0, 1)), ("all", slice(None))])
def test_the_formula(compared: str, tokens: slice) -> None:
    distiller = made(compared=compared, alpha=3.0)
    h_S, h_T = (network.forward_features(BATCH[0])[:, tokens].double() for network in (distiller.student, distiller.teacher))
    expected = 3 * ((h_S - h_T) ** 2).sum() / (len(BATCH[0]) * h_S.shape[1])
    assert terms_of(distiller)["near"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 5), (3, 4, 5), (7, 1, 5)])
def test_a_step_of_length_one_costs_one(shape: tuple[int, ...]) -> None:
    step = torch.zeros(shape)
    step[..., 2] = 1
    assert squared_length(step) == 1


def test_beside_it_is_mae() -> None:
    near, plain = made(alpha=0.0), MAE(autoencoder()).train()
    terms, theirs = terms_of(near), terms_of(plain)
    assert torch.equal(terms["pixels"], theirs["pixels"])
    assert terms["near"] == 0
    sum(terms.values()).backward()
    theirs["pixels"].backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(near.get_parameter(name).grad, parameter.grad), name


def test_at_the_teacher_there_is_nothing_to_learn_from_it() -> None:
    whole = autoencoder()
    distiller = SelfDistillPretrain(whole, copy.deepcopy(whole.encoder)).train()
    near = terms_of(distiller)["near"]
    assert near == 0
    near.backward()
    assert not any(parameter.grad.any() for parameter in distiller.parameters() if parameter.grad is not None)


def test_what_is_compared_sees_all_patches_and_teaches_no_decoder() -> None:
    distiller, seen = made(), []
    distiller.student.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].shape[1]))
    terms = terms_of(distiller)
    assert sorted(seen) == [4 + 1, 16 + 1]
    terms["near"].backward()
    assert all(parameter.grad is None for parameter in distiller.decoder.parameters())
    assert all(parameter.grad is not None for parameter in distiller.student.parameters() if parameter.requires_grad)


def test_an_autoencoder_brings_its_decoder() -> None:
    whole = autoencoder()
    for distiller in (MAE(whole, decoder_width=36), SelfDistillPretrain(copy.deepcopy(whole), encoder(2))):
        assert same(weights(distiller.decoder), weights(whole.decoder))
    assert MAE(whole).decoder is whole.decoder
    assert MAE(whole).student is whole.encoder


def test_both_phases_begin_at_the_start() -> None:
    whole = autoencoder()
    start = weights(whole)
    phases = SelfDistillPretrain.stages(whole, None, 7, alpha=2.0, masked=0.5)
    first = next(phases)
    assert (first.name, first.epochs, type(first.distiller)) == ("teacher", 7, MAE)
    assert first.distiller.masked == 0.5
    assert first.distiller.student is whole.encoder
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.1)
    second = next(phases)
    assert (second.name, second.epochs) == ("", 7)
    assert same(weights(second.distiller.products["autoencoder"]), start)
    assert second.distiller.teacher is whole.encoder
    assert not any(parameter.requires_grad for parameter in second.distiller.teacher.parameters())
    assert next(phases, None) is None


def test_each_round_begins_at_the_start_and_learns_from_the_one_before() -> None:
    whole, given = autoencoder(), encoder(2)
    start = weights(whole)
    phases = SelfDistillPretrain.stages(whole, given, 1, rounds=3)
    teacher = given
    for name in ("round-1", "round-2", ""):
        stage = next(phases)
        assert stage.name == name
        assert stage.distiller.teacher is teacher
        assert same(weights(stage.distiller.products["autoencoder"]), start)
        teacher = stage.distiller.student
        with torch.no_grad():
            teacher.cls_token.add_(0.1)
    assert next(phases, None) is None


def test_an_encoder_gets_a_new_decoder_in_each_phase() -> None:
    phases = SelfDistillPretrain.stages(encoder(), None, 1, **SMALL)
    first, second = next(phases).distiller, next(phases).distiller
    assert first.decoder is not second.decoder
    assert second.student is not first.student
    assert second.teacher is first.student


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": -1.0}, "^alpha is -1.0 and rounds 1, expected a finite weight"),
        ({"rounds": 0}, "^alpha is 1.0 and rounds 0, expected a finite weight"),
        ({"rounds": 1.5}, "^alpha is 1.0 and rounds 1.5, expected a finite weight"),
        ({"compared": "patches"}, "^compared is 'patches', expected one of class, all$"),
        ({"teacher": encoder(2, embed_dim=48)}, r"^the student's tokens have 32 channels, 1 before the patches, the teacher's 48 and 1"),
        ({"teacher": encoder(2, patch_size=16)}, "^the student has 4 x 4 patches and the teacher 2 x 2"),
    ],
)
def test_bad_input(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(**settings)


def test_a_teacher_of_its_own() -> None:
    network = encoder()
    with pytest.raises(UserError, match=r"^student and teacher are one network, expected two"):
        SelfDistillPretrain(network, network, **SMALL)
    with pytest.raises(UserError, match=r"^there is no teacher to stay near: name the network after further pre-training"):
        SelfDistillPretrain(network, **SMALL)


def test_without_a_class_token_all_tokens_are_compared() -> None:
    options: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
    with pytest.raises(UserError, match=r'^the student has no class token to compare, name one that has, or compared="all"$'):
        SelfDistillPretrain(encoder(**options), encoder(2, **options), **SMALL)
    distiller = SelfDistillPretrain(encoder(**options), encoder(2, **options), compared="all", **SMALL).train()
    assert terms_of(distiller)["near"] > 0
