from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.segmentation import mean_iou

from stillhouse.errors import UserError
from stillhouse.tasks.colours import colours
from stillhouse.tasks.segment import Segment

NAMES = ["background", "disc", "ring", "square"]


def logits_for(masks: Tensor, classes: int = 4) -> Tensor:
    """Logits [B, K, H, W] whose largest is where the mask says."""
    return F.one_hot(masks.clamp(max=classes - 1), classes).permute(0, 3, 1, 2).float()


def masks(count: int = 3, classes: int = 4, seed: int = 0, side: int = 8) -> Tensor:
    return torch.randint(classes, (count, side, side), generator=torch.Generator().manual_seed(seed))


def measured(guess: Tensor, truth: Tensor, names: list[str] = NAMES) -> dict[str, float]:
    metric = Segment(names)
    metric.update(logits_for(guess, len(names)), truth)
    return metric.compute()


def test_a_case_done_by_hand() -> None:
    truth = torch.tensor([[[0, 0, 0, 0], [1, 1, 1, 2], [2, 2, 255, 255]]])
    guess = torch.tensor([[[0, 0, 0, 1], [1, 1, 2, 2], [2, 2, 3, 0]]])
    iou = {"iou/background": 3 / 4, "iou/disc": 2 / 4, "iou/ring": 3 / 4}  # square: guessed only where nothing counts
    assert measured(guess, truth) == pytest.approx({"miou": 2 / 3, "accuracy": 0.8, **iou})


def test_a_right_student_is_perfect_and_a_wrong_one_has_nothing() -> None:
    truth = masks()
    right = measured(truth, truth)
    assert right == {"miou": 1.0, "accuracy": 1.0, **{f"iou/{name}": 1.0 for name in NAMES}}
    assert measured((truth + 1) % 4, truth)["miou"] == 0.0


def test_a_class_that_is_nowhere_is_left_out_of_the_mean_and_one_that_is_only_answered_is_not() -> None:
    truth = torch.tensor([[[0, 0, 1, 1]]])
    assert measured(truth, truth)["miou"] == 1.0
    assert measured(torch.tensor([[[0, 0, 1, 3]]]), truth) == pytest.approx(
        {"miou": (1 + 0.5 + 0) / 3, "accuracy": 0.75, "iou/background": 1.0, "iou/disc": 0.5, "iou/square": 0.0}
    )


def test_ignored_pixels_change_nothing() -> None:
    truth, guess = masks(seed=1), masks(seed=2)
    truth[:, 0] = 255
    other = guess.clone()
    other[:, 0] = 3 - other[:, 0]
    assert measured(guess, truth) == measured(other, truth) == measured(guess[:, 1:], truth[:, 1:])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 6))
def test_values_are_torchmetrics_own_in_any_batches_and_any_order(seed: int, classes: int) -> None:
    truth, guess = masks(5, classes, seed), masks(5, classes, seed + 1)
    names = [str(i) for i in range(classes)]
    whole, pieces = Segment(names), Segment(names)
    whole.update(logits_for(guess, classes), truth)
    for part in torch.randperm(5, generator=torch.Generator().manual_seed(seed)).split(2):
        pieces.update(logits_for(guess[part], classes), truth[part].to(torch.uint8))
    assert whole.compute() == pieces.compute()
    together, flat = (value.reshape(1, 1, -1) for value in (guess, truth))  # theirs is a mean over images: one image of all pixels
    expected = mean_iou(together, flat, num_classes=classes, input_format="index", per_class=True)[0]
    assert [whole.compute()[f"iou/{name}"] for name in names] == pytest.approx(expected.tolist(), abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(4)), st.integers(0, 100))
def test_renaming_the_classes_renames_the_values(order: list[int], seed: int) -> None:
    truth, guess = masks(seed=seed), masks(seed=seed + 1)
    moved = torch.tensor(order)
    before, after = measured(guess, truth), measured(moved[guess], moved[truth])
    assert after["miou"] == pytest.approx(before["miou"])
    assert after["accuracy"] == before["accuracy"]
    assert all(after[f"iou/{NAMES[order[i]]}"] == before[f"iou/{NAMES[i]}"] for i in range(4))


def test_logits_of_another_size_are_resized_as_torch_does() -> None:
    logits, truth = torch.randn(2, 4, 3, 5), masks(2, side=12)
    whole, resized = Segment(NAMES), Segment(NAMES)
    whole.update(logits, truth)
    resized.update(F.interpolate(logits, size=(12, 12), mode="bilinear", align_corners=False), truth)
    assert whole.compute() == resized.compute()


def test_the_teacher_is_compared_pixel_by_pixel() -> None:
    truth, guess, teacher = masks(seed=1), masks(seed=2), masks(seed=3)
    truth[0] = 255
    metric = Segment(NAMES)
    metric.update(logits_for(guess), truth, logits_for(teacher))
    result = metric.compute()
    assert result["agreement"] == pytest.approx((guess == teacher)[1:].float().mean().item())
    assert result["teacher_miou"] == measured(teacher, truth)["miou"]
    assert not {"agreement", "teacher_miou"} & measured(guess, truth).keys()


def test_chance_is_the_most_frequent_class_everywhere() -> None:
    truth = torch.tensor([[[0, 0, 0, 0, 0, 0, 1, 1, 2, 255]]])
    metric = Segment(NAMES)
    metric.update(logits_for(torch.zeros_like(truth)), truth)
    assert metric.chance == pytest.approx(metric.compute()["miou"]) == pytest.approx(6 / 9 / 3)


def test_the_state_does_not_grow() -> None:
    metric = Segment(NAMES)
    for seed in range(3):
        metric.update(logits_for(masks(seed=seed)).requires_grad_(), masks())
    assert metric.pixels.shape == (4, 4)
    assert int(metric.pixels.sum()) == 3 * 3 * 64
    metric.reset()
    assert not metric.pixels.any()


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = slice(0, 4) if rank == 0 else slice(4, 5)
    metric = Segment(NAMES)
    metric.update(logits_for(masks(5, seed=1))[mine], masks(5, seed=2)[mine], logits_for(masks(5, seed=3))[mine])
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    if rank == 0:  # one process on its own does not wait for the other
        by_itself = Segment(NAMES, sync_on_compute=False)
        by_itself.update(logits_for(masks()), masks())
        assert by_itself.compute()["miou"] == 1.0
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs a torch with distributed")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_agree_on_what_one_alone_would_measure(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_process, args=(str(tmp_path),), nprocs=2, start_method="fork")
    alone = Segment(NAMES)
    alone.update(logits_for(masks(5, seed=1)), masks(5, seed=2), logits_for(masks(5, seed=3)))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == alone.compute()


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(UserError, match="expected at least 2"):
        Segment(["all"])
    with pytest.raises(UserError, match=r"the student's logits have the shape \(3, 3, 8, 8\), expected \(3, 4, height, width\)"):
        Segment(NAMES).update(logits_for(masks(classes=3), 3), masks())
    with pytest.raises(UserError, match=r"the teacher's logits have the shape \(3, 5, 8, 8\), expected \(3, 4, height, width\)"):
        Segment(NAMES).update(logits_for(masks()), masks(), logits_for(masks(), 5))
    with pytest.raises(UserError, match="no pixel that counts"):
        measured(masks(), torch.full((3, 8, 8), 255))
    strange = masks()
    strange[0, 0, 0], strange[0, 0, 1] = 7, -1
    with pytest.raises(UserError, match="2 pixels of the validation masks are neither one of the 4 classes nor 255"):
        measured(masks(), strange)


def test_exactly_the_objects_are_painted() -> None:
    images, truth = torch.full((1, 1, 4, 4), 100, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8)
    truth[0, 0, 0], truth[0, 1, 1], truth[0, 2, 2] = 1, 2, 255
    drawn = Segment.draw(images, truth, NAMES)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (1, 3, 4, 4)
    palette = torch.tensor(colours(4), dtype=torch.float)
    for y, x, number in ((0, 0, 1), (1, 1, 2)):
        assert drawn[0, :, y, x].float().sub(0.4 * 100 + 0.6 * palette[number]).abs().max() <= 1
    drawn[0, :, 0, 0] = drawn[0, :, 1, 1] = 100
    assert (drawn == 100).all()


def test_an_answer_is_drawn_as_the_mask_it_stands_for() -> None:
    images, truth = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8), masks()
    assert torch.equal(Segment.draw(images, logits_for(truth), NAMES), Segment.draw(images, truth, NAMES))
    small = torch.zeros(3, 4, 2, 2)
    small[:, 2] = 1
    assert torch.equal(Segment.draw(images, small, NAMES), Segment.draw(images, torch.full((3, 8, 8), 2), NAMES))
