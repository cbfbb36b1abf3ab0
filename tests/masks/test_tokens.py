"""Which tokens stay: scores against hand-made attention, choices against sorting, and random scores that no batch split changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stillhouse.errors import UserError
from stillhouse.masks.tokens import (
    as_mask,
    class_attention,
    drawn_scores,
    feature_norm,
    highest,
    keep_count,
    random_scores,
    received_attention,
    resample,
)
from stillhouse.randomness import samples


def test_class_attention_of_a_hand_made_attention() -> None:
    """Keys are one-hot, so the class token's logits are the query's entries: the softmax, and the top K of the head mean, are known."""
    logits = torch.tensor([[[0.0, 3.0, 1.0, 2.0, -1.0], [1.0, 0.0, 4.0, 2.0, -2.0]]])  # [1 image, 2 heads, class token + 4 patches]
    keys = torch.eye(5).expand(1, 2, 5, 5)
    scores = class_attention(logits, keys, 1.0, 1)
    by_hand = [
        sum(math.exp(logits[0, h, n].item()) / sum(math.exp(v) for v in logits[0, h].tolist()) for h in range(2)) / 2 for n in range(1, 5)
    ]
    torch.testing.assert_close(scores, torch.tensor([by_hand]), rtol=0, atol=1e-7)
    assert highest(scores, 3).tolist() == [[1, 0, 2]]
    assert scores.sum() < 1, "the class token's own share is left out and not given to the patches"


def test_the_class_tokens_own_column_changes_the_mean_over_heads() -> None:
    """The official code's reading: a head that looks at its class token says less about the patches."""
    keys = torch.eye(3).expand(1, 2, 3, 3)
    with_column = class_attention(torch.tensor([[[0.0, 2.0, 0.0], [9.0, 0.0, 3.0]]]), keys, 1.0, 1)
    without = class_attention(torch.tensor([[[-99.0, 2.0, 0.0], [-99.0, 0.0, 3.0]]]), keys, 1.0, 1)
    assert highest(with_column, 1).item() == 0
    assert highest(without, 1).item() == 1


def test_class_attention_scales_and_skips_every_prefix_token() -> None:
    query, keys = torch.randn(2, 3, 8), torch.randn(2, 3, 11, 8)
    expected = ((keys @ query.unsqueeze(-1)).squeeze(-1) * 0.37).softmax(-1).mean(1)[:, 5:]
    torch.testing.assert_close(class_attention(query, keys, 0.37, 5), expected, rtol=0, atol=1e-6)


def test_received_attention_is_the_mean_over_patch_queries() -> None:
    queries, keys = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    attention = (torch.einsum("bhqd,bhkd->bhqk", queries, keys) * 0.5).softmax(-1)
    torch.testing.assert_close(received_attention(queries, keys, 0.5, 2), attention[:, :, 2:, 2:].mean((1, 2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("score", [lambda q, k: class_attention(q[:, :, 0], k, 1.0, 1), lambda q, k: received_attention(q, k, 1.0, 1)])
def test_scores_are_fp32_whatever_comes_in(score: object) -> None:
    queries, keys = torch.randn(2, 2, 5, 4).bfloat16(), torch.randn(2, 2, 5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(queries, keys)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, score(queries.float(), keys.float()))


def test_feature_norm() -> None:
    feature = torch.zeros(1, 2, 1, 2)
    feature[0, :, 0, 1] = torch.tensor([3.0, 4.0])
    assert feature_norm(feature.bfloat16()).tolist() == [[0.0, 5.0]]


@given(st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.integers(-10, 400)), st.integers(1, 300))
def test_keep_count_is_in_range_or_an_error(keep: float | int, patches: int) -> None:
    try:
        count = keep_count(keep, patches)
    except UserError:
        assert not (isinstance(keep, int) and 1 <= keep <= patches)
        assert not (isinstance(keep, float) and 0.5 / patches < keep <= 1)
    else:
        assert isinstance(count, int)
        assert 1 <= count <= patches
        assert count == keep if isinstance(keep, int) else abs(count - keep * patches) <= 0.5


@pytest.mark.parametrize(
    ("keep", "patches", "count"), [(0.5, 196, 98), (98, 196, 98), (144, 196, 144), (0.25, 196, 49), (1.0, 16, 16), (1, 16, 1)]
)
def test_keep_count_of_the_paper(keep: float | int, patches: int, count: int) -> None:
    assert keep_count(keep, patches) == count


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -1, -0.5, 17, 0.01, float("nan"), float("inf"), True, None, "0.5", [8]])
def test_keep_count_refuses_in_one_sentence(keep: object) -> None:
    with pytest.raises(UserError, match="keep") as refusal:
        keep_count(keep, 16)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


_rows = st.tuples(st.integers(1, 4), st.integers(1, 30))


@given(arrays.arrays("float32", _rows, elements=st.floats(-100, 100, width=32), unique=True), st.data())
def test_highest_are_the_first_of_the_sorted(scores: object, data: st.DataObject) -> None:
    scores_BN = torch.tensor(scores)
    count = data.draw(st.integers(1, scores_BN.shape[1]))
    keep = highest(scores_BN, count)
    assert keep.dtype == torch.int64
    assert torch.equal(keep, scores_BN.argsort(1, descending=True)[:, :count])
    assert torch.equal(as_mask(keep, scores_BN.shape[1]).sum(1), torch.full((len(scores_BN),), float(count)))


def test_highest_are_distinct_among_ties() -> None:
    keep = highest(torch.zeros(3, 10), 4)
    assert all(len(set(row)) == 4 for row in keep.tolist())


def test_as_mask() -> None:
    assert as_mask(torch.tensor([[2, 0]]), 4).tolist() == [[1.0, 0.0, 1.0, 0.0]]


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.floats(-5, 5))
def test_resample_keeps_a_constant(grid: tuple[int, int], to: tuple[int, int], value: float) -> None:
    scores = torch.full((2, grid[0] * grid[1]), value)
    torch.testing.assert_close(resample(scores, grid, to), torch.full((2, to[0] * to[1]), value), rtol=1e-5, atol=1e-6)


def test_resample_to_the_same_grid_is_the_same_tensor() -> None:
    scores = torch.randn(2, 12)
    assert resample(scores, (3, 4), (3, 4)) is scores


def test_resample_halves_by_a_weighted_mean_that_stays_in_place() -> None:
    """Antialiased: each coarse place hears of all the fine places under it, and the peak stays where it was."""
    scores = torch.zeros(1, 64)
    scores[0, 2 * 8 + 5] = 1.0  # row 2, column 5 of 8 x 8
    coarse = resample(scores, (8, 8), (4, 4))
    assert coarse.argmax().item() == 1 * 4 + 2
    torch.testing.assert_close(coarse.sum() * 4, torch.tensor(1.0), rtol=0.1, atol=0)  # but for the borders


def test_resample_overlooks_no_place() -> None:
    """Without antialiasing most of the places would not be heard at all."""
    scores = torch.zeros(1, 36)
    scores[0, 0] = 1.0
    coarse = resample(scores, (6, 6), (2, 2))
    assert coarse.argmax().item() == 0
    assert coarse[0, 0] > 0.02


def test_random_scores_do_not_depend_on_the_split() -> None:
    ids, device = torch.tensor([7, 3, 10**12, 5]), torch.device("cpu")
    with samples(0, 12, ids):
        whole = random_scores(4, 16, device)
    parts = []
    for part in ids.split(1):
        with samples(0, 12, part):
            parts.append(random_scores(1, 16, device))
    assert torch.equal(torch.cat(parts), whole)
    for seed, step in ((1, 12), (0, 13)):
        with samples(seed, step, ids):
            assert not torch.equal(random_scores(4, 16, device), whole)


def test_drawn_scores_are_draws_without_replacement_with_these_odds() -> None:
    """Of every ordered pair (i, j): p_i p_j / (1 - p_i), as one draw after the other would give."""
    odds = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 40_000
    torch.manual_seed(1)
    pairs = highest(drawn_scores(7.0 * odds.expand(draws, -1)), 2)
    found = torch.zeros(4, 4).index_put((pairs[:, 0], pairs[:, 1]), torch.tensor(1.0), accumulate=True) / draws
    expected = odds[:, None] * odds[None] / (1 - odds[:, None])
    expected.fill_diagonal_(0)
    assert (found - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


@given(st.integers(1, 6), st.integers(0, 2**31))
def test_what_has_no_odds_is_only_drawn_when_nothing_else_is_left(count: int, seed: int) -> None:
    torch.manual_seed(seed)
    drawn = highest(drawn_scores(torch.tensor([[0.0, 0.4, 0.0, 0.3, 0.2, 0.1]])), count)[0].tolist()
    assert len(set(drawn)) == count
    assert set(drawn[:4]) <= {1, 3, 4, 5}


def test_drawn_scores_do_not_depend_on_the_split() -> None:
    odds = torch.rand(4, 16)
    with samples(0, 3, torch.arange(4)):
        whole = drawn_scores(odds)
    for sample in range(4):
        with samples(0, 3, torch.tensor([sample])):
            assert torch.equal(drawn_scores(odds[sample : sample + 1])[0], whole[sample])
