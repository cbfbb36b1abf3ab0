"""A transformer on some of its tokens: every family that is supported, built for real; and what is refused, with its reason."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from stillhouse.errors import UserError
from stillhouse.models.outputs import logits_of
from stillhouse.models.taps import SaliencyTap, has_class_token, last_attention
from stillhouse.models.tokens import OnSomeTokens, gather_tokens, kept_patches, patch_grid, prefix_tokens
from tests.conftest import EVERY_FAMILY, FAMILIES, PATCHES, Family, images, permutations, tiny, tiny_transformers

TABLE = Path(__file__).parents[2] / "docs" / "supported_models.md"


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that work on patches: the longest list in transformers, `blocks` in timm."""
    if hasattr(model, "blocks"):
        return list(model.blocks)
    return list(max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len))


def run(model: nn.Module, inputs: Tensor, keep: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return logits_of(model(inputs, keep) if isinstance(model, OnSomeTokens) else model(inputs))


@EVERY_FAMILY
def test_without_keep_it_is_the_model_itself(family: Family) -> None:
    model, inputs = family.build(), family.inputs()
    plain = run(model, inputs)
    assert plain.std() > 0.05, "outputs must depend on something for these tests to say anything"
    wrapped = OnSomeTokens(model)
    assert torch.equal(run(wrapped, inputs), plain)
    run(wrapped, inputs, permutations(2, wrapped.patches)[:, :3])
    assert torch.equal(run(model, inputs), plain), "the model's own forward pass stays what it is"


@EVERY_FAMILY
def test_all_tokens_in_any_order_are_the_plain_model(family: Family) -> None:
    model, inputs = family.build(), family.inputs()
    wrapped = OnSomeTokens(model)
    torch.testing.assert_close(run(wrapped, inputs, permutations(2, wrapped.patches)), run(model, inputs), rtol=0, atol=1e-5)


@EVERY_FAMILY
def test_order_of_kept_tokens_does_not_matter_but_their_choice_does(family: Family) -> None:
    wrapped, inputs = OnSomeTokens(family.build()), family.inputs()
    every = permutations(2, wrapped.patches)
    keep, others = every[:, : wrapped.patches // 2], every[:, wrapped.patches // 2 :]
    output = run(wrapped, inputs, keep)
    torch.testing.assert_close(run(wrapped, inputs, keep.flip(1)), output, rtol=0, atol=1e-5)
    assert (run(wrapped, inputs, others) - output).abs().max() > 1e-3


@EVERY_FAMILY
def test_token_count_inside_every_block(family: Family) -> None:
    wrapped, seen = OnSomeTokens(family.build()), []
    for block in blocks_of(wrapped.model):
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    run(wrapped, family.inputs(), permutations(2, wrapped.patches)[:, :3])
    joins_late = hasattr(wrapped.model, "blocks_token_only")
    assert seen == [(0 if joins_late else prefix_tokens(wrapped.model)) + 3] * 2


@pytest.mark.parametrize("family", [each for each in FAMILIES if each.title != "hybrid ViT"], ids=lambda family: family.title)
def test_pixels_of_dropped_patches_do_not_matter(family: Family) -> None:
    """Bit-identical: they are removed, not zeroed. (A hybrid's convolutions look over a patch's border, so it is left out.)"""
    wrapped, inputs = OnSomeTokens(family.build()), family.inputs()
    keep = permutations(2, wrapped.patches)[:, : wrapped.patches // 2]
    kept = torch.zeros(2, wrapped.patches).scatter(1, keep, 1.0).unflatten(1, wrapped.grid)
    pixels = kept.repeat_interleave(8, 1).repeat_interleave(8, 2).bool()
    if inputs.ndim == 3:  # audio comes as [B, time, frequency], its grid is frequency x time
        pixels = pixels.transpose(1, 2)
    else:
        pixels = pixels.unsqueeze(1)
    output = run(wrapped, inputs, keep)
    assert torch.equal(run(wrapped, torch.where(pixels, inputs, torch.randn_like(inputs)), keep), output)
    assert not torch.equal(run(wrapped, torch.where(pixels, torch.randn_like(inputs), inputs), keep), output)


@EVERY_FAMILY
def test_wrapping_twice_and_copying(family: Family) -> None:
    model, inputs = family.build(), family.inputs()
    first = OnSomeTokens(model)
    keep = permutations(2, first.patches)[:, :3]
    output = run(first, inputs, keep)
    second, copied = OnSomeTokens(model), copy.deepcopy(first)
    for each in (second, copied, OnSomeTokens(copy.deepcopy(model)), first):
        assert torch.equal(run(each, inputs, keep), output)
    copied.gate.keep = keep
    assert torch.equal(run(model, inputs), run(first, inputs)), "a copy has a gate of its own"


def test_a_failed_pass_leaves_no_choice_behind() -> None:
    model = tiny()
    wrapped, plain = OnSomeTokens(model), run(model, images())
    with pytest.raises(RuntimeError):
        wrapped(images(), torch.full((2, 3), PATCHES))
    assert torch.equal(run(model, images()), plain)


MASKABLE = ["ViT, DeiT", "distilled DeiT", "DeiT III", "CLIP", "DINOv2 with registers", "EVA-02", "DINOv3", "rotary ViT"]
ROTARY_BY_HEAD = "rotary ViT, angles by block and head"


@pytest.mark.parametrize(
    "family", [each for each in FAMILIES if each.title in [*MASKABLE, ROTARY_BY_HEAD]], ids=lambda family: family.title
)
def test_equals_a_full_pass_whose_attention_cannot_see_the_dropped_keys(family: Family) -> None:
    """The reference: the model itself at full length under an attention mask. Positions and rotary angles are then right."""
    wrapped, inputs = OnSomeTokens(family.build()), family.inputs()
    model, keep = wrapped.model, permutations(2, PATCHES)[:, :5]
    visible = torch.zeros(2, PATCHES, dtype=torch.bool).scatter(1, keep, True)
    visible = torch.cat([torch.ones(2, model.num_prefix_tokens, dtype=torch.bool), visible], dim=1)
    with torch.no_grad():
        masked = model.forward_features(inputs, attn_mask=visible[:, None, None, :].expand(-1, 1, visible.shape[1], -1))
    last: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, inputs, output: last.append(output))
    run(wrapped, inputs, keep)
    (fewer,) = last
    torch.testing.assert_close(fewer[:, 0], masked[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(fewer, gather_tokens(masked, keep, model.num_prefix_tokens), rtol=0, atol=1e-5)


def test_positions_added_after_the_choice_would_differ() -> None:
    """The negative control: the same tokens, with the positions of the first places instead of their own."""
    wrapped = OnSomeTokens(tiny())
    model, keep = wrapped.model, permutations(2, PATCHES)[:, :5]
    with torch.no_grad():
        patches = model.patch_embed(images()).gather(1, keep.unsqueeze(-1).expand(-1, -1, 32))
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), patches], dim=1) + model.pos_embed[:, :6]
        wrong = model.forward_head(model.norm(model.blocks(tokens)))
    assert (run(wrapped, images(), keep) - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224"])
def test_heads_that_average_do_so_over_the_kept_tokens(name: str) -> None:
    wrapped = OnSomeTokens(tiny(name, global_pool="avg"))
    model, keep, last = wrapped.model, permutations(2, PATCHES)[:, :5], []
    norm = model.norm if isinstance(model.fc_norm if hasattr(model, "fc_norm") else nn.Identity(), nn.Identity) else model.blocks[-1]
    norm.register_forward_hook(lambda module, inputs, output: last.append(output))
    with torch.no_grad():
        output = wrapped(images(), keep)
        pooled = last[0][:, model.num_prefix_tokens :].mean(1)
        expected = model.head(getattr(model, "fc_norm", nn.Identity())(pooled))
    assert last[0].shape[1] == model.num_prefix_tokens + 5
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


def test_a_transformers_head_averages_over_the_kept_tokens() -> None:
    wrapped = OnSomeTokens(tiny_transformers("Dinov2"))
    keep = permutations(2, PATCHES)[:, :5]
    last: list[Tensor] = []
    wrapped.model.dinov2.layernorm.register_forward_hook(lambda module, inputs, output: last.append(output))
    output = run(wrapped, images(), keep)
    features = torch.cat([last[0][:, 0], last[0][:, 1:].mean(1)], dim=1)
    assert last[0].shape[1] == 6
    torch.testing.assert_close(output, wrapped.model.classifier(features), rtol=0, atol=1e-6)


EMBEDS_KEPT_ONLY = {
    *("ViT, DeiT", "ViT with an average head", "ViT with registers and without class token", "distilled DeiT", "DeiT III", "CLIP"),
    *("SigLIP", "DINOv2 with registers", "EVA-02", "rotary ViT", ROTARY_BY_HEAD, "CaiT", "transformers ViT", "transformers DeiT"),
}
"""The families whose patch embedding runs on the kept patches alone."""


@EVERY_FAMILY
def test_only_kept_patches_are_embedded_where_they_can_be_chosen_first(family: Family) -> None:
    """Their tokens are those that the convolution makes of all patches: not bit for bit, as it is a matrix product then."""
    wrapped, inputs, seen = OnSomeTokens(family.build()), family.inputs(), []
    embeds = next(module for name, module in wrapped.named_modules() if name.endswith(("patch_embed", "patch_embeddings")))
    embeds.register_forward_hook(lambda module, given, tokens: seen.append(tokens.flatten(1, -2) if tokens.ndim == 4 else tokens))
    keep = permutations(2, wrapped.patches)[:, :3]
    run(wrapped, inputs)
    run(wrapped, inputs, keep)
    every, kept = seen
    assert every.shape[1] == wrapped.patches
    assert kept.shape[1] == (3 if family.title in EMBEDS_KEPT_ONLY else wrapped.patches)
    if family.title in EMBEDS_KEPT_ONLY:
        torch.testing.assert_close(kept, gather_tokens(every, keep, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_a_model_of_any_image_size_is_embedded_whole(name: str) -> None:
    wrapped, keep = OnSomeTokens(tiny(name, dynamic_img_size=True)), permutations(2, PATCHES)[:, :5]
    fixed = OnSomeTokens(tiny(name))
    torch.testing.assert_close(run(wrapped, images(), keep), run(fixed, images(), keep), rtol=0, atol=1e-5)


SIDES = st.integers(1, 4)


@given(grid=st.tuples(SIDES, SIDES), size=st.tuples(SIDES, SIDES), left=st.integers(0, 2), data=st.data())
def test_kept_patches_are_the_squares_of_the_image(grid: tuple[int, int], size: tuple[int, int], left: int, data: st.DataObject) -> None:
    (rows, columns), (height, width) = grid, size
    picture = torch.randn(2, 3, rows * height + min(left, height - 1), columns * width + min(left, width - 1))
    orders = [data.draw(st.permutations(range(rows * columns))) for _ in range(2)]
    keep = torch.tensor(orders)[:, : data.draw(st.integers(1, rows * columns))]
    found = kept_patches(picture, keep, size)
    for image, chosen, patches in zip(picture, keep, found, strict=True):
        for place, patch in zip(chosen.tolist(), patches, strict=True):
            top, start = place // columns * height, place % columns * width
            assert torch.equal(patch, image[:, top : top + height, start : start + width])


def test_a_student_on_some_of_its_patches_learns_as_if_all_had_been_embedded() -> None:
    model, keep = tiny(), permutations(2, PATCHES)[:, :5]
    ours = torch.autograd.grad(OnSomeTokens(model)(images(), keep).square().sum(), list(model.parameters()))
    tokens = gather_tokens(model._pos_embed(model.patch_embed(images())), keep, 1)
    logits = model.forward_head(model.norm(model.blocks(tokens)))
    for a, b in zip(ours, torch.autograd.grad(logits.square().sum(), list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [tiny, lambda: tiny_transformers("ViT")], ids=["timm", "transformers"])
def test_compiles_once_a_keep_with_static_shapes_and_without_a_break(make: Callable[[], nn.Module]) -> None:
    """A break of the graph, such as for a value that the host has to know, would be an error."""
    torch._dynamo.reset()
    wrapped, counter = OnSomeTokens(make()), CompileCounterWithBackend("aot_eager")
    wrapped.compile(backend=counter, fullgraph=True)
    compiled = []
    for step, count in enumerate((8, 8, 8, 5, 5, 3, 8, 5)):
        keep = permutations(2, PATCHES, seed=step)[:, :count]
        torch._dynamo.mark_static(keep, 1)
        run(wrapped, images(seed=step), keep)
        compiled.append(counter.frame_count)
    assert compiled == [1, 1, 1, 2, 2, 3, 3, 3]
    nodes = [node for graph in counter.graphs for node in graph.graph.nodes]
    assert not [node for node in nodes if isinstance(node.meta.get("example_value"), torch.SymInt)], "a side that may vary"


def test_works_compiled() -> None:
    wrapped, plain = OnSomeTokens(tiny()), OnSomeTokens(tiny())
    wrapped.compile(backend="aot_eager", fullgraph=True)
    for keep in (permutations(2, PATCHES)[:, :5], permutations(2, PATCHES, seed=1)[:, :5], None):
        torch.testing.assert_close(run(wrapped, images(), keep), run(plain, images(), keep), rtol=0, atol=1e-6)


def test_tokens_are_dropped_though_the_model_was_compiled_before() -> None:
    model, plain = tiny(), OnSomeTokens(tiny())
    model.compile(backend="eager")
    run(model, images())
    keep = permutations(2, PATCHES)[:, :5]
    torch.testing.assert_close(run(OnSomeTokens(model), images(), keep), run(plain, images(), keep), rtol=0, atol=1e-6)


REFUSED = {
    "swin_tiny_patch4_window7_224": "relative-position tables",
    "beit_base_patch16_224": "relative-position tables",
    "vit_relpos_small_patch16_224": "relative-position tables",
    "resnet10t": "convolutions need the neighbours",
    "convnext_atto": "convolutions need the neighbours",
    "mixer_s32_224": "mixes places by layers made for all of them",
    "resmlp_12_224": "mixes places by layers made for all of them",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError, match=REFUSED[name]) as refusal:
        OnSomeTokens(model)
    assert type(model).__name__ in str(refusal.value)
    assert "--method kd" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_eva_that_drops_patches_at_random_is_refused() -> None:
    with pytest.raises(UserError, match="patch_drop_rate"):
        OnSomeTokens(tiny("eva02_tiny_patch14_224", patch_drop_rate=0.5))


def test_a_rectangle_of_patches() -> None:
    wrapped = OnSomeTokens(tiny(img_size=(32, 16)))
    assert wrapped.grid == (4, 2)
    assert wrapped.patches == 8
    inputs = images()[..., :16]
    torch.testing.assert_close(run(wrapped, inputs, permutations(2, 8)), run(wrapped, inputs), rtol=0, atol=1e-5)


def _row(family: Family) -> list[Any]:
    model = family.build()
    wrapped, tap = OnSomeTokens(model), SaliencyTap(model)
    run(wrapped, family.inputs())
    assert tap.take()[0].shape == (2, wrapped.patches)
    if has_class_token(model):
        saliency = "class token's row, " + ("last class-attention block" if hasattr(model, "blocks_token_only") else "last block")
    else:
        saliency = "mean attention received, last block"
    attention = f"`{type(last_attention(model)).__name__}`"
    rows, columns = patch_grid(_example(family))
    late = " (joins late)" if hasattr(model, "blocks_token_only") else ""
    prefix, class_token = f"{prefix_tokens(model)}{late}", "yes" if has_class_token(model) else "no"
    return [family.title, f"`{family.example}`", f"{rows} x {columns}", prefix, class_token, attention, saliency]


def _example(family: Family) -> nn.Module:
    """The example at its own size, without memory: transformers' by the defaults of its configuration."""
    with torch.device("meta"):
        if family.example.startswith("timm/"):
            return timm.create_model(family.example.removeprefix("timm/"))
        kind = type(family.build())
        return kind(kind.config_class())


def test_the_table_of_supported_models_is_what_was_built() -> None:
    """Made from the very networks above; UPDATE_DOCS=1 writes it anew."""
    head = ["family", "for example", "patches", "tokens before the patches", "class token", "attention read from", "saliency as a student"]
    rows = [_row(family) for family in FAMILIES]
    lines = [
        "# Transformers that can run on some of their tokens",
        "",
        "These can be MaskedKD's teacher. Made by `tests/models/test_tokens.py`, which builds each one, small and with random weights, and",
        "holds that all tokens in any order give the plain model, that only the kept ones reach every block, and that dropped pixels",
        "change nothing. Patches are counted at the example's own size (transformers: at its configuration's defaults).",
        "",
        *("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]),
        "",
        "Refused, with the reason: "
        + "; ".join(f"`timm/{name}` ({'its ' if 'mixes' not in reason else ''}{reason})" for name, reason in REFUSED.items())
        + ".",
        "",
        "As a *student*, any of the above, and convolutional networks of timm and torchvision, whose saliency is the norm of their last",
        "feature map.",
        "",
    ]
    text = "\n".join(lines)
    if os.environ.get("UPDATE_DOCS"):
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text)
    assert TABLE.is_file(), "run with UPDATE_DOCS=1 to write the table"
    assert TABLE.read_text() == text, "the table is out of date; run with UPDATE_DOCS=1"
