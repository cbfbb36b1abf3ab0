"""Fused attention against the plain formula, and that it never holds the N x N matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stillhouse.errors import UserError
from stillhouse.models.fusion import CrossAttention, attention


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1) @ value


def inputs(batch: int, places: int, answers: int, width: int, channels: int, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = (batch, places, width), (batch, answers, width), (batch, answers, channels)
    return [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]


class Sizes(TorchDispatchMode):
    """The elements of the largest tensor that is computed inside."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(each.numel() for each in tree_leaves(output) if isinstance(each, Tensor))])
        return output


sizes = st.integers(1, 40)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), sizes, sizes, st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
def test_it_is_the_formula(batch: int, places: int, answers: int, width: int, channels: int, seed: int) -> None:
    given_ = inputs(batch, places, answers, width, channels, seed)
    fused, expected = attention(*given_), plain(*given_)
    assert fused.shape == (batch, places, channels)
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((each * weight).sum(), given_) for each in (fused, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("places", "width", "channels"), [(777, 128, 256), (1025, 9, 19), (600, 300, 601)])
def test_it_is_the_formula_on_many_places(places: int, width: int, channels: int) -> None:
    """As a detector's neck and a segmenter's logits have them, in numbers that divide by nothing."""
    given_ = inputs(2, places, places, width, channels)
    fused, expected = attention(*given_), plain(*given_)
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(each.square().sum(), given_) for each in (fused, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [8, 16, 19])
def test_nothing_as_large_as_the_matrix_is_ever_computed(channels: int) -> None:
    layer, places = CrossAttention(channels), 400
    asking, answering = (torch.randn(1, channels, places).transpose(1, 2).requires_grad_() for _ in range(2))
    with Sizes() as seen:
        layer(asking, answering).square().sum().backward()
    assert 0 < seen.largest < places * places / 4
    with Sizes() as seen:
        plain(layer.query(asking), layer.key(answering), layer.value(answering))
    assert seen.largest == places * places, "or the test would see nothing"


def test_rows_of_attention_sum_to_one() -> None:
    query, key, _ = inputs(2, 30, 30, 4, 8)
    torch.testing.assert_close(attention(query, key, torch.ones(2, 30, 3)), torch.ones(2, 30, 3), rtol=0, atol=1e-6)


def test_without_queries_every_place_hears_the_mean() -> None:
    layer = CrossAttention(6)
    torch.nn.init.zeros_(layer.query.weight)
    asking, answering = torch.randn(2, 10, 6), torch.randn(2, 10, 6)
    expected = layer.value(answering).mean(1, keepdim=True).expand(-1, 10, -1)
    torch.testing.assert_close(layer(asking, answering), expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_places_in_another_order_are_fused_in_that_order(seed: int) -> None:
    torch.manual_seed(seed)
    layer, asking, answering, order = CrossAttention(6), torch.randn(2, 12, 6), torch.randn(2, 12, 6), torch.randperm(12)
    expected = layer(asking, answering)
    torch.testing.assert_close(layer(asking[:, order], answering[:, order]), expected[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(asking, answering[:, order]), expected, rtol=1e-5, atol=1e-5)


def test_shapes_of_the_paper() -> None:
    layer = CrossAttention(19)
    assert {name: tuple(value.shape) for name, value in layer.named_parameters()} == {
        "query.weight": (9, 19),
        "key.weight": (9, 19),
        "value.weight": (19, 19),
    }


def test_runs_under_bf16_autocast() -> None:
    layer, asking, answering = CrossAttention(16), torch.randn(2, 50, 16), torch.randn(2, 50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        fused = layer(asking, answering)
    fused.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    torch.testing.assert_close(fused.float(), layer(asking, answering), rtol=0.05, atol=0.02)


def test_compiled_it_is_the_same() -> None:
    layer, asking, answering = CrossAttention(8), torch.randn(2, 20, 8), torch.randn(2, 20, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(asking, answering), layer(asking, answering))


def test_where_there_is_no_fused_attention_a_matrix_too_large_is_refused() -> None:
    given_ = inputs(2, 100, 100, 4, 8)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(attention(*given_), plain(*given_), rtol=1e-5, atol=1e-5)
        with pytest.raises(
            UserError, match=r"^attention over 100 x 100 places of 2 image\(s\) would take 0\.00 GiB, .* use coarser levels"
        ):
            attention(*given_, limit=2 * 100 * 100 * 4 - 1)
        large = torch.zeros(1, 1, 1).expand(1, 30000, 1)
        with pytest.raises(UserError, match=r"would take 3\.35 GiB, as no fused attention runs on cpu here, expected at most 2\.00 GiB"):
            attention(large, large, large)
    attention(*given_, limit=0)


def test_one_channel_leaves_none_for_queries() -> None:
    with pytest.raises(UserError, match=r"^maps of 1 channel\(s\) leave C_q = C // 2 = 0"):
        CrossAttention(1)
