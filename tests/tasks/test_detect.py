from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.tasks.colours import colours
from stillhouse.tasks.detect import Detect

NAMES = ["car", "person", "tree"]
Boxes = dict[str, Tensor]


def boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows).view(-1, 4).float()


def truth(corners: Tensor, *labels: int, crowd: tuple[bool, ...] = ()) -> Boxes:
    return {"boxes": corners, "labels": torch.tensor(labels, dtype=torch.long)} | ({"iscrowd": torch.tensor(crowd)} if crowd else {})


def answer(corners: Tensor, labels: list[int], scores: list[float]) -> Boxes:
    return {"boxes": corners, "labels": torch.tensor(labels, dtype=torch.long), "scores": torch.tensor(scores)}


NOTHING, NO_ANSWER = truth(boxes()), answer(boxes(), [], [])
BIG, MIDDLE, SMALL = (0.0, 0.0, 100.0, 100.0), (10.0, 10.0, 60.0, 60.0), (5.0, 5.0, 20.0, 20.0)


def measured(answers: list[Boxes], truths: list[Boxes]) -> dict[str, float]:
    metric = Detect(NAMES)
    metric.update(answers, truths)
    return metric.compute()


def scenes(count: int, seed: int = 0) -> tuple[list[Boxes], list[Boxes]]:
    """Images with 0 to 4 objects, and answers that are near them, with scores of which no two are equal."""
    generator = torch.Generator().manual_seed(seed)
    truths, answers = [], []
    for _ in range(count):
        n = int(torch.randint(5, (1,), generator=generator))
        corner = 200 * torch.rand(n, 2, generator=generator)
        corners = torch.cat([corner, corner + 5 + 120 * torch.rand(n, 2, generator=generator)], 1)
        labels = torch.randint(1, 4, (n,), generator=generator)
        near = corners.repeat(2, 1) + 6 * torch.randn(2 * n, 4, generator=generator)
        truths.append({"boxes": corners, "labels": labels})
        answers.append({"boxes": near, "labels": labels.repeat(2), "scores": torch.rand(2 * n, generator=generator)})
    return answers, truths


def sure(truths: list[Boxes]) -> list[Boxes]:
    """The answers of a detector that is right."""
    return [{"boxes": each["boxes"], "labels": each["labels"], "scores": torch.ones(len(each["labels"]))} for each in truths]


def test_a_right_student_is_perfect() -> None:
    truths = [truth(boxes(BIG, MIDDLE, SMALL), 1, 2, 1), NOTHING]
    keys = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "ap/car", "ap/person")
    assert measured(sure(truths), truths) == dict.fromkeys(keys, 1.0)


def test_what_no_object_could_show_is_left_out() -> None:
    truths = [truth(boxes(SMALL), 3)]
    assert measured(sure(truths), truths) == dict.fromkeys(("map", "map_50", "map_75", "map_small", "ap/tree"), 1.0)


def test_a_case_done_by_hand() -> None:
    """Two cars: the surer answer is wrong, the other finds one car with IoU 0.82. Precision is 1/2 up to recall 1/2 (51 of 101 points)."""
    truths = [truth(boxes((0, 0, 100, 100), (200, 0, 300, 100)), 1, 1)]
    found = [answer(boxes((400, 0, 500, 100), (0, 0, 100, 82)), [1, 1], [0.9, 0.8])]
    result = measured(found, truths)
    ap = 0.5 * 51 / 101
    assert result["map_50"] == result["map_75"] == pytest.approx(ap)
    assert result["map"] == result["ap/car"] == pytest.approx(ap * 7 / 10)  # right at 0.50, 0.55, … 0.80


def test_a_student_that_finds_nothing_has_nothing() -> None:
    truths = [truth(boxes(BIG), 1), truth(boxes(SMALL), 2)]
    result = measured([NO_ANSWER, NO_ANSWER], truths)
    assert set(result.values()) == {0.0}
    assert result["map"] == 0.0


def test_what_is_found_in_an_empty_image_is_wrong() -> None:
    truths = [truth(boxes(BIG), 1), NOTHING]
    wrong = answer(boxes(BIG), [1], [0.99])
    right = answer(boxes(BIG), [1], [0.9])
    assert measured([right, NO_ANSWER], truths)["map"] == 1.0
    assert measured([right, wrong], truths)["map"] == pytest.approx(0.5)


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong() -> None:
    plain = truth(boxes(BIG), 1)
    crowd = truth(boxes(BIG, (200, 200, 400, 400)), 1, 1, crowd=(False, True))
    inside = answer(boxes((210, 210, 260, 260), (300, 300, 350, 350), BIG), [1, 1, 1], [0.99, 0.98, 0.9])
    assert measured([inside], [crowd])["map"] == 1.0
    assert measured([inside], [plain])["map"] < 0.5


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_order_and_batches_do_not_matter(seed: int) -> None:
    answers, truths = scenes(6, seed)
    truths[0] = truth(boxes(BIG), 1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
    pieces = Detect(NAMES)
    for part in (order[:1], order[1:4], [], order[4:]):
        pieces.update([answers[i] for i in part], [truths[i] for i in part])
    assert pieces.compute() == pytest.approx(measured(answers, truths), abs=1e-6)


def test_half_precision_and_reset() -> None:
    truths = [truth(boxes(BIG), 1)]
    metric = Detect(NAMES)
    metric.update([answer(boxes(SMALL), [1], [1.0])], truths)
    metric.reset()
    metric.update([{"boxes": boxes(BIG).bfloat16(), "labels": torch.tensor([1]), "scores": torch.ones(1).bfloat16()}], truths)
    assert metric.compute()["map"] == 1.0


def _process(rank: int, folder: str, shares: list[list[int]]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    answers, truths = scenes(7)
    metric = Detect(NAMES)
    metric.update([answers[i] for i in shares[rank]], [truths[i] for i in shares[rank]])
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs a torch with distributed")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("shares", [[[0, 2, 4, 5, 6], [1, 3]], [list(range(7)), []]], ids=["uneven", "all or nothing"])
def test_processes_agree_on_what_one_alone_would_measure(tmp_path: Path, shares: list[list[int]]) -> None:
    torch.multiprocessing.start_processes(_process, args=(str(tmp_path), shares), nprocs=2, start_method="fork")
    alone = measured(*scenes(7))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == pytest.approx(alone, abs=1e-6)


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(UserError, match="expected at least 1"):
        Detect([])
    with pytest.raises(UserError, match="there is no object in the validation images"):
        measured([answer(boxes(BIG), [1], [0.5])], [NOTHING])
    with pytest.raises(UserError, match="the student has a box with the label 4, expected 1 to 3"):
        measured([answer(boxes(BIG), [4], [0.5])], [truth(boxes(BIG), 1)])
    with pytest.raises(UserError, match="the validation data has a box with the label 0, expected 1 to 3"):
        measured([NO_ANSWER], [truth(boxes(BIG), 0)])
    broken: list[Any] = [{"loss": torch.ones(())}, [NOTHING], [NO_ANSWER, NO_ANSWER]]
    for output in broken:
        with pytest.raises(UserError, match="expected a dict with boxes, labels and scores for each"):
            Detect(NAMES).update(output, [NOTHING])


def test_boxes_have_their_class_colour_and_unsure_ones_are_left_out() -> None:
    images = torch.zeros(2, 1, 40, 40, dtype=torch.uint8)
    found = [answer(boxes((5, 5, 20, 20), (25, 25, 35, 35)), [2, 1], [0.8, 0.2]), NO_ANSWER]
    drawn = Detect.draw(images, found, NAMES)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (2, 3, 40, 40)
    assert not drawn[1].any()
    assert tuple(drawn[0, :, 12, 5].tolist()) == colours(3)[1]
    drawn[0, :, 5:21, 5:21] = 0
    assert not drawn.any()
    assert Detect.draw(images, found, NAMES, score=0.1)[0, :, 30, 25].any()
    assert torch.equal(Detect.draw(images, [truth(boxes(SMALL), 1), NOTHING], NAMES)[1], images[1].expand(3, -1, -1))


def test_a_name_is_written_where_it_can_be_read() -> None:
    images = torch.zeros(1, 3, 160, 160, dtype=torch.uint8)
    inside = (slice(None), slice(24, 60), slice(24, 110))
    wide, narrow = truth(boxes((20, 20, 120, 120)), 2), truth(boxes((20, 20, 50, 120)), 2)
    assert Detect.draw(images, [wide], NAMES)[0][inside].any()
    assert not Detect.draw(images, [narrow], NAMES)[0][(slice(None), slice(24, 60), slice(24, 48))].any()
    large = torch.zeros(1, 3, 800, 800, dtype=torch.uint8)
    drawn = Detect.draw(large, [truth(boxes((80, 80, 480, 480)), 2)], NAMES)[0]
    assert not drawn[:, 96:464, 96:464].any()
    assert drawn[:, 83, 200].any()  # its lines are thick: it is shown smaller


def test_boxes_that_have_no_place_are_not_drawn() -> None:
    images = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    assert not Detect.draw(images, [truth(boxes((20, 20, 10, 10)), 1)], NAMES).any()
