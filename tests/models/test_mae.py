"""Masked autoencoders: an encoder that runs on visible patches, a decoder that lays them back, and how they are opened and saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import UserError
from stillhouse.losses.pretraining import patchify
from stillhouse.masks.patches import random_masking
from stillhouse.models.mae import (
    Decoder,
    MaskedAutoencoder,
    begin_pretraining,
    check_encoder,
    check_grids,
    encode,
    positions,
    prefix_of,
    tapped,
    through,
)
from stillhouse.models.opening import open_model
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of, set_preprocessing
from stillhouse.models.saving import load_student, save_student
from stillhouse.models.tokens import OnSomeTokens
from tests.conftest import images, permutations, tiny, tiny_cnn

SPEC = "mae/vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=16,depth=2,num_heads=2,decoder_width=12,decoder_depth=3,decoder_heads=3"
NAMES = [
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_medium_patch16_gap_240",
    "vit_wee_patch16_reg1_gap_256",
    "deit_tiny_distilled_patch16_224",
]


def autoencoder(**sizes: Any) -> MaskedAutoencoder:
    encoder = tiny(num_classes=0)
    return MaskedAutoencoder(encoder, Decoder(encoder, **{"width": 24, "depth": 2, "heads": 2, **sizes})).eval()


@pytest.mark.parametrize("name", NAMES[:2])
def test_all_visible_it_is_timms_own_pass(name: str) -> None:
    encoder = tiny(name)
    with torch.no_grad():
        assert torch.equal(encode(encoder, images()), encoder.forward_features(images()))
        keep = permutations(2, 16)[:, :4]
        seen: list[Any] = []
        hook = encoder.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
        on_some = OnSomeTokens(encoder)
        on_some(images(), keep)
        hook.remove()
        torch.testing.assert_close(encode(encoder, images(), keep), seen[0], rtol=1e-5, atol=1e-5)  # it embeds the kept patches only


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_encoder(name: str) -> None:
    encoder = tiny(name, num_classes=0)
    whole = MaskedAutoencoder(encoder, Decoder(encoder, 24, 2, 2))
    drawn = random_masking(2, 16, 0.75, torch.device("cpu"))
    assert encode(encoder, images(), drawn.keep).shape == (2, prefix_of(encoder) + 4, 32)
    assert whole.hidden(images(), drawn.keep, drawn.restore).shape == (2, prefix_of(encoder) + 16, 24)
    painted = whole.paint(images(), drawn.keep, drawn.restore)
    assert painted.shape == patchify(images(), whole.grid).shape == (2, 16, 8 * 8 * 3)
    assert whole(images()).shape == (2, 32)
    resting = {id(parameter) for parameter in begin_pretraining(encoder)}
    painted.sum().backward()
    silent = [key for key, parameter in whole.named_parameters() if parameter.grad is None and id(parameter) not in resting]
    assert not silent, "DDP would wait for it"


def test_the_features_are_the_encoders() -> None:
    whole = autoencoder()
    with torch.no_grad():
        assert torch.equal(whole(images()), whole.encoder(images()))
        head = tiny()
        assert torch.equal(MaskedAutoencoder(head, whole.decoder).eval()(images()), head.forward_features(images())[:, 0])


def test_a_distillation_token_is_not_there() -> None:
    distilled = tiny("deit_tiny_distilled_patch16_224")
    with torch.no_grad():
        before = encode(distilled, images())
        distilled.dist_token += 1
        assert torch.equal(encode(distilled, images()), before)
        whole = MaskedAutoencoder(distilled, Decoder(distilled, 24, 1, 2)).eval()
        assert torch.equal(whole(images()), before[:, 0])


def test_a_shorter_run_gives_the_same_blocks() -> None:
    encoder, keep, count = tiny(depth=4), permutations(2, 16)[:, :4], 0

    def counting(*seen: Any) -> None:
        nonlocal count
        count += 1

    for block in encoder.blocks:
        block.register_forward_hook(counting)
    with torch.no_grad():
        full = list(through(encoder, images(), keep))
        assert count == 4
        second, first = tapped(encoder, images(), keep, [1, 0])
        assert count == 6, "no further than it must"
    assert torch.equal(first, full[0])
    assert torch.equal(second, full[1])


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), quarter=st.integers(1, 12), prefix=st.integers(0, 3))
def test_positions(rows: int, columns: int, quarter: int, prefix: int) -> None:
    table = positions(4 * quarter, (rows, columns), prefix + rows * columns)
    assert table.shape == (1, prefix + rows * columns, 4 * quarter)
    assert not table[:, :prefix].any()
    grid = table[0, prefix:].unflatten(0, (rows, columns))
    for row in range(rows):
        for column in range(columns):
            assert grid[row, column, 0] == pytest.approx(torch.tensor(float(column)).sin().item(), abs=1e-6)
            assert grid[row, column, 2 * quarter] == pytest.approx(torch.tensor(float(row)).sin().item(), abs=1e-6)
    torch.testing.assert_close(grid.square().sum(-1), torch.full((rows, columns), 2.0 * quarter))


def test_new_encoders_get_positions_and_learned_ones_keep_theirs() -> None:
    new = open_model("timm/vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=16,depth=1,num_heads=2", classes=3, channels=1)
    stopped = begin_pretraining(new)
    torch.testing.assert_close(new.pos_embed.data, positions(16, (4, 4), 17))
    assert {id(parameter) for parameter in stopped} == {id(new.pos_embed), *map(id, new.head.parameters())}
    assert not any(parameter.requires_grad for parameter in stopped)
    given_one = tiny()
    before = given_one.pos_embed.clone()
    begin_pretraining(given_one)
    assert torch.equal(given_one.pos_embed, before)


def test_what_is_hidden_is_a_mask_token_in_its_place() -> None:
    """With no block between, a place's token is what was embedded there, or the mask token, and its position."""
    whole = autoencoder(depth=1)
    drawn = random_masking(2, 16, 0.75, torch.device("cpu"))
    with torch.no_grad():
        tokens = whole.hidden(images(), drawn.keep, drawn.restore, upto=0) - whole.decoder.positions
        embedded = whole.decoder.embed(encode(whole.encoder, images(), drawn.keep))
        hidden = tokens[:, 1:][drawn.mask.bool()]
    torch.testing.assert_close(hidden, whole.decoder.mask_token[0].expand_as(hidden))
    torch.testing.assert_close(tokens[:, 1:].gather(1, drawn.keep[..., None].expand(-1, -1, 24)), embedded[:, 1:])
    torch.testing.assert_close(tokens[:, 0], embedded[:, 0])


def test_decoding_stops_where_it_is_told() -> None:
    whole = autoencoder(depth=3)
    drawn = random_masking(2, 16, 0.5, torch.device("cpu"))
    with torch.no_grad():
        part = whole.hidden(images(), drawn.keep, drawn.restore, upto=2)
        assert torch.equal(whole.decoder.blocks[2](part), whole.hidden(images(), drawn.keep, drawn.restore))
        for parameter in whole.decoder.blocks[2].parameters():
            parameter.add_(1)
        assert torch.equal(whole.hidden(images(), drawn.keep, drawn.restore, upto=2), part)


def test_opened_saved_and_opened_again(tmp_path: Path) -> None:
    whole = open_model(SPEC, classes=10, channels=1, task="encode", seed=3)
    assert isinstance(whole, MaskedAutoencoder)
    assert (len(whole.decoder.blocks), whole.decoder.mask_token.shape[-1]) == (3, 12)
    torch.testing.assert_close(whole.encoder.pos_embed.data, positions(16, (4, 4), 17))
    assert all(parameter.requires_grad for parameter in whole.parameters())
    set_preprocessing(whole, Preprocessing((0.3,), (0.2,), 16))
    save_student(whole, tmp_path / "autoencoder")
    for again in (
        load_student(tmp_path / "autoencoder"),
        open_model(str(tmp_path / "autoencoder"), classes=4, channels=1, task="encode"),
        open_model(str(tmp_path / "autoencoder"), classes=4, channels=1, task="classify"),
    ):
        assert isinstance(again, MaskedAutoencoder)
        assert preprocessing_of(again) == Preprocessing((0.3,), (0.2,), 16)
        for key, value in whole.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key


def test_put_together_around_an_opened_encoder_it_is_saved_by_name(tmp_path: Path) -> None:
    spec = "timm/vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=16,depth=2,num_heads=2"
    encoder = open_model(spec, classes=10, channels=1, task="encode")
    whole = MaskedAutoencoder(encoder, Decoder(encoder, 12, 1, 3))
    save_student(whole, tmp_path / "autoencoder")
    again = load_student(tmp_path / "autoencoder")
    assert isinstance(again, MaskedAutoencoder)
    assert torch.equal(again.encoder.blocks[1].mlp.fc1.weight, encoder.blocks[1].mlp.fc1.weight)  # type: ignore[union-attr,index,operator]
    copied = copy.deepcopy(whole)
    assert torch.equal(copied.eval()(images()[:, :1, :16, :16]), again.eval()(images()[:, :1, :16, :16]))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (SPEC.replace("decoder_width=12", "decoder_width=10"), "^a decoder of width 10, depth 3 and 3 heads cannot be made, expected"),
        (SPEC.replace("decoder_depth=3", "decoder_depth=0"), "^a decoder of width 12, depth 0 and 3 heads cannot be made, expected"),
        (SPEC.replace("decoder_heads=3", "decoder_heads=5"), "^a decoder of width 12, depth 3 and 5 heads cannot be made, expected"),
        (SPEC.replace("decoder_heads", "decoder_head"), "^a masked autoencoder has no option 'decoder_head', did you mean 'decoder_heads'"),
        ("mae/vit_tinny_patch16_224", "^timm has no network 'vit_tinny_patch16_224'"),
        ("mae/resnet18", "^the network is a ResNet, which cannot be the encoder of a masked autoencoder; name a vision transformer"),
        ("mae/vit_base_patch16_siglip_224", "^the network is a VisionTransformer, which cannot be the encoder"),
    ],
)
def test_what_cannot_be_opened(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_model(spec, classes=10, channels=3, task="encode")


def test_there_are_no_published_weights() -> None:
    with pytest.raises(
        UserError, match=r"^there are no published weights of 'mae/vit_tiny_patch16_224:.*' with its decoder: name what a run"
    ):
        open_model(SPEC, classes=10, channels=1, task="encode", weights="pretrained")


def test_other_networks_are_refused() -> None:
    with pytest.raises(UserError, match=r"^the student is a ResNet, which cannot be the encoder of a masked autoencoder"):
        check_encoder(tiny_cnn(), "student")
    with pytest.raises(UserError, match=r"^the teacher is a Eva, which cannot be"):
        check_encoder(tiny("eva02_tiny_patch14_224"), "teacher")
    with pytest.raises(UserError, match=r"^the student has 4 x 4 patches and the teacher 8 x 8, expected the same places in both"):
        check_grids(tiny(), tiny(patch_size=4))
    with pytest.raises(UserError, match=r"^a width of 6 has no positions"):
        positions(6, (2, 2), 4)
