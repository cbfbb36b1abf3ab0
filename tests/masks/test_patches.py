"""Random masking: as many hidden for each sample, and a way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import UserError
from stillhouse.masks.patches import random_masking, visible_count
from stillhouse.randomness import samples

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=50)
@given(batch=st.integers(1, 5), patches=st.integers(2, 200), masked=st.floats(0.01, 0.99))
def test_the_shuffle_is_taken_back_and_each_sample_hides_as_many(batch: int, patches: int, masked: float) -> None:
    count = int(patches * (1 - masked))
    if not 1 <= count < patches:
        with pytest.raises(UserError, match=r"^masked="):
            visible_count(masked, patches)
        return
    drawn = random_masking(batch, patches, masked, CPU)
    assert drawn.keep.shape == (batch, count)
    assert torch.equal(drawn.mask.sum(1), torch.full((batch,), float(patches - count)))
    assert torch.equal(drawn.mask.gather(1, drawn.keep), torch.zeros(batch, count)), "what is kept is not hidden"
    assert torch.equal(drawn.hidden.flatten(), drawn.mask.nonzero()[:, 1])
    laid = torch.cat([drawn.keep, torch.full((batch, patches - count), -1)], dim=1).gather(1, drawn.restore)
    places = torch.arange(patches).expand(batch, -1)
    assert torch.equal(laid, torch.where(drawn.mask.bool(), -1, places)), "restore lays every visible patch back in its place"


def test_a_sample_has_the_same_choice_in_any_batch_and_another_in_the_next_step() -> None:
    def keep(step: int, *ids: int) -> torch.Tensor:
        with samples(0, step, torch.tensor(ids)):
            return random_masking(len(ids), 49, 0.75, CPU).keep

    both = keep(3, 7, 8)
    assert torch.equal(torch.cat([keep(3, 7), keep(3, 8)]), both)
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(keep(4, 7, 8), both)


@pytest.mark.parametrize("masked", [0.0, 1.0, -0.5, 1.5, float("nan"), 0.99])
def test_nothing_visible_or_nothing_hidden_is_refused(masked: float) -> None:
    with pytest.raises(UserError, match=f"^masked={masked} does not leave both visible and hidden ones of 16 patches; expected"):
        random_masking(2, 16, masked, CPU)
