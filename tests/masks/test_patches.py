"""Random masking: as many hidden for each sample, and a way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import UserError
from stillhouse.masks.patches import disjoint_maskings, random_masking, visible_count
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


@settings(deadline=None, max_examples=80)
@given(
    batch=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    block=st.integers(1, 3),
    masked=st.floats(0.05, 0.95),
    more=st.floats(0, 1),
)
def test_two_views_hide_as_many_each_and_a_share_between_them(
    batch: int, grid: tuple[int, int], block: int, masked: float, more: float
) -> None:
    units, patches = grid[0] * grid[1], (grid[0] * block, grid[1] * block)
    shown = int(units * (1 - masked))
    predicted = min(1.0, masked + more * (1 - masked))
    if not 1 <= shown < units:
        return
    one, other = disjoint_maskings(batch, patches, masked, CPU, predicted, block)
    hidden = units - shown
    between = hidden + max(0, min(int(predicted * units + 1e-9) - hidden, hidden))
    assert torch.equal((one.mask + other.mask > 0).sum(1), torch.full((batch,), between * block**2))
    for view in (one, other):
        assert view.keep.shape == (batch, shown * block**2)
        assert torch.equal(view.mask.sum(1), torch.full((batch,), float(hidden * block**2)))
        assert not view.mask.gather(1, view.keep).any()
        whole = view.mask.view(batch, grid[0], block, grid[1], block).transpose(2, 3).flatten(3)
        assert torch.equal(whole.amin(-1), whole.amax(-1)), "a block is shown or hidden as a whole"
        laid = torch.cat([view.keep, torch.full((batch, hidden * block**2), -1)], dim=1).gather(1, view.restore)
        places = torch.arange(units * block**2).expand(batch, -1)
        assert torch.equal(laid, torch.where(view.mask.bool(), -1, places))


def test_with_all_predicted_nothing_is_shown_twice() -> None:
    one, other = disjoint_maskings(3, (14, 14), 0.6, CPU, block=2)
    assert not ((1 - one.mask) * (1 - other.mask)).any()
    assert ((one.mask + other.mask) > 0).all()


def test_with_no_more_predicted_than_masked_both_show_the_same() -> None:
    one, other = disjoint_maskings(3, (7, 7), 0.6, CPU, predicted=0.6)
    assert torch.equal(one.mask, other.mask)


def test_what_the_second_view_shows_of_the_rest_is_any_of_it() -> None:
    """Each patch is as likely to be shown by it."""
    _, other = disjoint_maskings(20_000, (3, 4), 0.5, CPU, predicted=0.75)
    assert (1 - other.mask).mean(0).sub(0.5).abs().max() < 0.02


@pytest.mark.parametrize(
    ("grid", "settings_", "said"),
    [
        ((7, 7), {"block": 2}, r"^a grid of 7 x 7 patches does not divide into blocks of 2 x 2; expected another block$"),
        ((4, 4), {"predicted": 0.5}, r"^predicted is 0.5, expected a share of the patches from masked=0.6 to 1$"),
        ((4, 4), {"predicted": 1.5}, r"^predicted is 1.5, expected"),
        ((2, 2), {"block": 2}, r"^masked=0.6 does not leave both visible and hidden ones of 1 patches"),
    ],
)
def test_views_that_cannot_be(grid: tuple[int, int], settings_: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        disjoint_maskings(2, grid, 0.6, CPU, **settings_)  # type: ignore[arg-type]
