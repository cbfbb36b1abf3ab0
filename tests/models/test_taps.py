"""Where a network looked is what its own attention says, computed by hand with fused attention off; and nobody sees another's."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.taps import (
    SaliencyTap,
    Tap,
    as_map,
    as_tokens,
    feature_channels,
    grid_of,
    has_class_token,
    last_attention,
    last_layer,
    middle_layer,
    on_grid,
)
from stillhouse.models.tokens import prefix_tokens
from tests.conftest import EVERY_FAMILY, FAMILIES, PATCHES, Family, images, tiny, tiny_cnn, tiny_transformers


def attention_by_hand(model: nn.Module, inputs: Tensor) -> Tensor:
    """The last block's attention [B, heads, queries, keys] as the library itself computes it, unfused."""
    if hasattr(model, "config"):
        with torch.no_grad():
            return model(inputs, output_attentions=True).attentions[-1]
    attention, seen = last_attention(model), []
    attention.fused_attn = False
    hook = attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(inputs)
    hook.remove()
    attention.fused_attn = True
    return seen[-1]


@EVERY_FAMILY
def test_saliency_equals_the_models_own_attention(family: Family) -> None:
    model, inputs = family.build(), family.inputs()
    tap, prefix = SaliencyTap(model), prefix_tokens(model)
    expected = attention_by_hand(model, inputs)
    if has_class_token(model):
        expected = expected[:, :, 0, prefix:].mean(1)
    else:
        expected = expected[:, :, prefix:, prefix:].mean((1, 2))
    model(inputs)
    scores, grid = tap.take()
    assert expected.std() > 1e-3
    assert scores.shape[1] == grid[0] * grid[1]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_query_and_key_norms_are_seen(name: str) -> None:
    options = {"qk_norm": True} | ({"attn_type": "rope"} if name.startswith("eva") else {})
    model = tiny(name, **options)
    assert not isinstance(last_attention(model).q_norm, nn.Identity)
    tap, expected = SaliencyTap(model), attention_by_hand(model, images())
    model(images())
    torch.testing.assert_close(tap.take()[0], expected[:, :, 0, 1:].mean(1), rtol=0, atol=1e-6)


def test_fp32_without_gradient_and_the_same_ranking_under_bf16() -> None:
    model = tiny().train()
    tap = SaliencyTap(model)
    model(images())
    full = tap.take()[0]
    with torch.autocast("cpu", torch.bfloat16):
        model(images())
        scores = tap.take()[0]
    for each in (full, scores):
        assert each.dtype == torch.float32
        assert not each.requires_grad
    torch.testing.assert_close(scores, full, rtol=0, atol=5e-3)
    assert len(scores[0].unique()) == PATCHES, "bf16 scores would tie"


def test_reading_does_not_touch_the_students_gradient() -> None:
    plain, tapped = tiny(), tiny()
    tap = SaliencyTap(tapped)
    plain(images()).square().sum().backward()
    output = tapped(images())
    tap.take()
    output.square().sum().backward()
    for a, b in zip(plain.parameters(), tapped.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_works_on_a_compiled_student(backend: str) -> None:
    plain, compiled = tiny(), tiny()
    tap_plain, tap_compiled = SaliencyTap(plain), SaliencyTap(compiled)
    feature = Tap(compiled, "blocks.1")
    compiled.compile(backend=backend)
    for seed in range(3):
        plain(images(seed=seed))
        compiled(images(seed=seed))
        torch.testing.assert_close(tap_compiled.take()[0], tap_plain.take()[0], rtol=0, atol=1e-6)
        assert feature.take().requires_grad


def test_a_tap_is_seen_though_its_like_was_compiled_without() -> None:
    """By default a compiled network shares its code with all others of its class, and does not look whether they have hooks."""
    other, model, plain = tiny(seed=3), tiny(), tiny()
    other.compile(backend="eager")
    other(images())
    model.compile(backend="eager")
    model(images())
    tap, expected = SaliencyTap(model), SaliencyTap(plain)
    model(images()), plain(images())
    torch.testing.assert_close(tap.take()[0], expected.take()[0], rtol=0, atol=1e-6)
    other(images(seed=1))
    with pytest.raises(RuntimeError, match="has not run"):
        tap.take()


def test_a_compiled_convolutional_student() -> None:
    plain, compiled = tiny_cnn(), tiny_cnn()
    tap_plain, tap_compiled = SaliencyTap(plain), SaliencyTap(compiled)
    compiled.compile(backend="eager")
    plain(images())
    compiled(images())
    torch.testing.assert_close(tap_compiled.take()[0], tap_plain.take()[0], rtol=0, atol=1e-6)


def test_two_models_never_share_what_they_see() -> None:
    first, second = tiny(seed=0), tiny(seed=1)
    tap_first, tap_second = SaliencyTap(first), SaliencyTap(second)
    copied = copy.deepcopy(first)
    first(images())
    alone = tap_first.take()[0]
    first(images())
    copied(images(seed=3))
    with pytest.raises(RuntimeError, match="has not run"):
        tap_second.take()
    second(images())
    assert torch.equal(tap_first.take()[0], alone)
    assert not torch.equal(tap_second.take()[0], alone)


@pytest.mark.parametrize("make", [tiny, tiny_cnn], ids=["transformer", "convolutional"])
def test_reading_before_running_or_twice_is_an_error(make: type) -> None:
    model = make()
    tap = SaliencyTap(model)
    with pytest.raises(RuntimeError, match="has not run"):
        tap.take()
    model(images())
    tap.take()
    with pytest.raises(RuntimeError, match="has not run"):
        tap.take()


def test_a_model_can_be_copied_after_it_ran() -> None:
    """An average of the student (EMA) is a deepcopy, taken at any time."""
    model = tiny("vit_small_patch16_rope_mixed_224")
    SaliencyTap(model)
    model(images())
    copy.deepcopy(model)


CONVOLUTIONAL = {
    "timm resnet": lambda: timm.create_model("resnet10t"),
    "timm efficientnet": lambda: timm.create_model("efficientnet_b0"),
    "timm mobilenet": lambda: timm.create_model("mobilenetv3_small_050"),
    "timm convnext": lambda: timm.create_model("convnext_atto"),
    "torchvision resnet": torchvision.models.resnet18,
    "torchvision efficientnet": torchvision.models.efficientnet_b0,
    "torchvision mobilenet": torchvision.models.mobilenet_v3_small,
    "torchvision densenet": torchvision.models.densenet121,
    "torchvision regnet": torchvision.models.regnet_y_400mf,
    "torchvision shufflenet": torchvision.models.shufflenet_v2_x0_5,
}


@pytest.mark.parametrize("make", CONVOLUTIONAL.values(), ids=CONVOLUTIONAL.keys())
def test_convolutional_students_show_the_norm_of_their_last_feature_map(make: type) -> None:
    model, seen = make().eval(), []
    tap = SaliencyTap(model)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.append((name, output)))
    with torch.no_grad():
        model(images(side=96))
    scores, grid = tap.take()
    assert grid == (3, 3)
    feature = dict(seen)[last_layer(model)]
    torch.testing.assert_close(scores, feature.double().square().sum(1).sqrt().float().flatten(1), rtol=1e-6, atol=1e-6)


def test_a_maps_norm_by_hand() -> None:
    model = tiny_cnn()
    tap = SaliencyTap(model)
    with torch.no_grad():
        expected = model.forward_features(images()).square().sum(1).sqrt().flatten(1)
        model(images())
    scores, grid = tap.take()
    assert grid == (4, 4)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",  # windows
        "beit_base_patch16_224",  # relative positions
        "vit_relpos_small_patch16_224",
        "vit_dwee_patch16_reg1_gap_256",  # a difference of two attentions
        "vit_pwee_patch16_reg1_gap_256",  # attention within the block
        "mixer_s32_224",
    ],
)
def test_attention_that_cannot_be_read_is_refused_rather_than_guessed(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError, match="by='random'"):
        SaliencyTap(model)


def test_a_tap_names_the_nearest_layer() -> None:
    with pytest.raises(UserError, match=r"no layer 'block\.1'.*did you mean 'blocks\.1'"):
        Tap(tiny(), "block.1")
    with pytest.raises(UserError, match="no layer ''"):
        Tap(tiny(), "")


def test_a_tap_remembers_the_last_pass_with_its_gradient() -> None:
    model = tiny()
    tap = Tap(model, "blocks.0")
    with pytest.raises(RuntimeError, match=r"'blocks\.0' has not run"):
        tap.take()
    model(images(seed=1))
    model(images())
    feature = tap.take()
    with torch.no_grad():
        expected = model.blocks[0](model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images())))))
    assert torch.equal(feature, expected)
    feature.sum().backward()
    assert model.patch_embed.proj.weight.grad is not None


@EVERY_FAMILY
def test_layers_and_channels_are_found_in_every_family(family: Family) -> None:
    model = family.build()
    assert feature_channels(model, last_layer(model)) == 32
    assert feature_channels(model, middle_layer(model)) == 32
    tap = Tap(model, last_layer(model))
    model(family.inputs())
    feature = tap.take()
    tokens = as_tokens(feature, model)
    feature_map = as_map(feature, model)
    assert torch.equal(feature_map.flatten(2).transpose(1, 2), tokens)
    assert torch.equal(tokens, feature[:, feature.shape[1] - tokens.shape[1] :])
    assert tokens.shape[1] == feature_map.shape[2] * feature_map.shape[3]
    torch.testing.assert_close(on_grid(feature, model, (4, 4)).shape, torch.Size([2, 16, 32]))


def test_finding_channels_leaves_the_model_as_it_was() -> None:
    model = tiny_cnn().train()
    model.layer1.eval()  # frozen batch norms
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    assert feature_channels(model, "layer2") == 8
    assert [module.training for module in model.modules()] == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert not any(module._forward_hooks for module in model.modules()), "a hook left behind would keep every feature alive"


def test_a_rectangular_model_finds_its_channels() -> None:
    assert feature_channels(tiny(img_size=(32, 16)), "blocks.1") == 32
    assert feature_channels(tiny(in_chans=1), "blocks.1") == 32


def test_a_network_of_unknown_size_is_told_what_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UserError, match="does not run on an image of"):
        feature_channels(model, "0")


def test_another_grid_is_bilinear_and_its_own_is_untouched() -> None:
    model = tiny()
    constant = torch.full((2, 1 + PATCHES, 3), 0.25)
    torch.testing.assert_close(on_grid(constant, model, (7, 3)), torch.full((2, 21, 3), 0.25))
    feature = torch.randn(2, 1 + PATCHES, 3)
    assert torch.equal(on_grid(feature, model, (4, 4)), feature[:, 1:])


@pytest.mark.parametrize(
    ("places", "like", "grid"), [(196, (14, 14), (14, 14)), (98, (14, 7), (14, 7)), (392, (7, 14), (14, 28)), (1, (4, 4), (1, 1))]
)
def test_grid_of(places: int, like: tuple[int, int], grid: tuple[int, int]) -> None:
    assert grid_of(places, like) == grid


def test_grid_of_refuses_what_is_no_grid() -> None:
    with pytest.raises(UserError, match="7 places"):
        grid_of(7, (2, 2))


def test_middle_layers() -> None:
    assert middle_layer(tiny(depth=4)) == "blocks.1"
    assert middle_layer(tiny_cnn()) == "layer2"
    assert middle_layer(tiny_transformers("ViT")) == "vit.layers.0"
    with pytest.raises(UserError, match="student_layer"):
        middle_layer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)))


def test_families_without_class_token_are_among_those_tested() -> None:
    assert sum(not has_class_token(family.build()) for family in FAMILIES) >= 3
