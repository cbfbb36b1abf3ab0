"""What holds for every set of scenes that are drawn by their number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stillhouse.data import Data


def fewer_are_the_first_of_more(opener: Callable[..., Data]) -> None:
    """The first scenes of a larger set are those of a smaller one, whatever the order; those of validation do not follow the seed."""
    few, many, other = opener("train=20,val=5"), opener("train=300,val=50"), opener("train=20,val=5", seed=1)
    assert (len(few.train), len(many.train), len(few.val), len(many.val)) == (20, 300, 5, 50)
    assert (few.mean, few.std) == (many.mean, many.std) == (other.mean, other.std)
    many.train[299]  # the order in which scenes are drawn does not matter
    for i in reversed(range(20)):
        assert torch.equal(few.train[i][0], many.train[i][0])
        assert torch.equal(few.train[i][1], many.train[i][1])
        assert not torch.equal(few.train[i][0], other.train[i][0])
    assert all(torch.equal(few.val[i][0], data.val[i][0]) for i in range(5) for data in (many, other))
    assert len({few.fingerprint, many.fingerprint, other.fingerprint}) == 3
    assert opener("train=20,val=5").fingerprint == few.fingerprint
    with pytest.raises(IndexError):
        few.train[20]
