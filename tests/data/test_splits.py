from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.data.splits import split, subset
from stillhouse.errors import UserError

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(lambda some: some + some)  # every class at least twice


@given(LABELS, st.floats(0.01, 0.99), st.integers(0, 3))
def test_a_split_is_disjoint_complete_and_stratified(labels: list[int], share: float, seed: int) -> None:
    first, second = split(labels, share, seed)
    assert sorted(first.tolist() + second.tolist()) == list(range(len(labels)))
    for label in set(labels):
        size, got = labels.count(label), sum(labels[i] == label for i in second)
        assert 1 <= got < size
        assert abs(got - share * size) <= max(0.5001, 1 - share * size, share * size - size + 1)
    assert torch.equal(split(labels, share, seed)[1], second)


@given(LABELS, st.data(), st.integers(0, 3))
def test_a_subset_has_each_class_in_proportion(labels: list[int], data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, len(labels)))
    chosen = subset(labels, count, seed).tolist()
    assert len(set(chosen)) == count
    assert chosen == sorted(chosen)
    for label in set(labels):
        assert abs(sum(labels[i] == label for i in chosen) - count * labels.count(label) / len(labels)) <= 3


def test_the_seed_decides_which() -> None:
    labels = [0, 1] * 50
    assert not torch.equal(split(labels, 0.5, 0)[0], split(labels, 0.5, 1)[0])
    assert not torch.equal(subset(labels, 20, 0), subset(labels, 20, 1))


def test_a_class_of_one_cannot_be_split() -> None:
    with pytest.raises(UserError, match="class number 7 has one image"):
        split([3, 3, 7], 0.5, 0)
