from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy, multiclass_calibration_error

from stillhouse.errors import UserError
from stillhouse.tasks.classify import Classify


def names(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


def batch(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, count, classes, generator=generator)
    return logits[0], torch.randint(0, classes, (count,), generator=generator), logits[1]


def test_a_case_done_by_hand() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.5, 0.3], [0.25, 0.35, 0.4]])
    teacher = torch.tensor([[5.0, 0, 0], [5.0, 0, 0], [0, 0, 5.0], [0, 0, 5.0]])
    metric = Classify(names(3))
    metric.update(probs.log(), torch.tensor([0, 1, 2, 0]), teacher)
    result = metric.compute()
    gaps = [1 - 0.7, 1 - 0.6, 0 - 0.5, 0 - 0.4]  # each alone in its bin of fifteenths
    assert result == pytest.approx(
        {
            "top1": 0.5,
            "top5": 1.0,
            "nll": -(math.log(0.7) + math.log(0.6) + math.log(0.3) + math.log(0.25)) / 4,
            "ece": sum(map(abs, gaps)) / 4,
            "agreement": 0.5,
            "teacher_top1": 0.5,
        }
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 200), st.integers(2, 12), st.integers(0, 100))
def test_values_are_torchmetrics_own_in_any_batches(count: int, classes: int, seed: int) -> None:
    student, labels, teacher = batch(count, classes, seed)
    whole, pieces = Classify(names(classes)), Classify(names(classes))
    whole.update(student, labels, teacher)
    for part in torch.arange(count).split(7):
        pieces.update(student[part], labels[part], teacher[part])
    result = whole.compute()
    assert pieces.compute() == pytest.approx(result, abs=1e-5)
    assert ("auroc" in result) == (classes == 2)
    result.pop("auroc", None)
    top5 = multiclass_accuracy(student, labels, classes, average="micro", top_k=min(5, classes))
    expected = {
        "top1": multiclass_accuracy(student, labels, classes, average="micro"),
        "top5": top5,
        "nll": torch.nn.functional.cross_entropy(student, labels),
        "ece": multiclass_calibration_error(student.softmax(-1), labels, classes, n_bins=15),
        "agreement": (student.argmax(1) == teacher.argmax(1)).float().mean(),
        "teacher_top1": multiclass_accuracy(teacher, labels, classes, average="micro"),
    }
    assert result == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)


@pytest.mark.parametrize("spread", [0.1, 1.0, 20.0])
def test_auroc_of_two_classes(spread: float) -> None:
    student, labels, _ = batch(2000, 2)
    student[:, 1] += labels
    metric = Classify(names(2))
    for part in torch.arange(2000).split(300):
        metric.update(spread * student[part], labels[part])
    assert metric.compute()["auroc"] == pytest.approx(
        binary_auroc((student[:, 1] - student[:, 0]).double().sigmoid(), labels).item(), abs=2e-3
    )
    one = Classify(names(2))
    one.update(student[labels == 0], labels[labels == 0])
    assert one.compute()["auroc"] == 0.5
    three = Classify(names(2))
    three.update(torch.tensor([[1.0, 0], [0, 1.0], [0.5, 0.5], [0.5, 0.5]]), torch.tensor([0, 1, 0, 1]))
    assert three.compute()["auroc"] == (1 + 1 + 1 + 0.5) / 4


def test_a_certain_and_right_student_is_perfect() -> None:
    labels = torch.arange(4)
    metric = Classify(names(4))
    metric.update(1000 * torch.eye(4), labels, 1000 * torch.eye(4))
    assert metric.compute() == {"top1": 1.0, "top5": 1.0, "nll": 0.0, "ece": 0.0, "agreement": 1.0, "teacher_top1": 1.0}


def test_without_a_teacher_nothing_is_said_of_one_and_reset_forgets() -> None:
    student, labels, teacher = batch(20, 6)
    metric = Classify(names(6))
    metric.update(student, labels, teacher)
    metric.reset()
    metric.update(student, labels)
    assert set(metric.compute()) == {"top1", "top5", "nll", "ece"}
    assert int(metric.samples) == 20


def test_half_precision_logits_are_measured_in_fp32() -> None:
    student, labels, _ = batch(64, 10)
    half, full = Classify(names(10)), Classify(names(10))
    half.update(student.bfloat16(), labels)
    full.update(student.bfloat16().float(), labels)
    assert half.compute() == full.compute()


def test_no_gradient_and_no_graph_is_kept() -> None:
    student, labels, _ = batch(8, 3)
    metric = Classify(names(3))
    metric.update(student.requires_grad_(), labels)
    assert not metric.nll.requires_grad
    assert not metric.bin_gap.requires_grad


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    student, labels, teacher = batch(10, 4)
    metric = Classify(names(4))
    mine = slice(0, 7) if rank == 0 else slice(7, 10)
    metric.update(student[mine], labels[mine], teacher[mine])
    result = metric.compute()
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs a torch with distributed")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_agree_on_what_one_alone_would_measure(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_process, args=(str(tmp_path),), nprocs=2, start_method="fork")
    student, labels, teacher = batch(10, 4)
    alone = Classify(names(4))
    alone.update(student, labels, teacher)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == pytest.approx(alone.compute(), abs=1e-6)


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(UserError, match="expected at least 2"):
        Classify(names(1))
    student, labels, teacher = batch(4, 3)
    with pytest.raises(UserError, match=r"the student's logits have the shape \(4, 3\), expected \(4, 5\)"):
        Classify(names(5)).update(student, labels)
    with pytest.raises(UserError, match=r"the teacher's logits have the shape \(4, 2\), expected \(4, 3\)"):
        Classify(names(3)).update(student, labels, teacher[:, :2])
    empty = Classify(names(3))
    empty.update(student[:0], labels[:0])
    with pytest.raises(UserError, match="gave no sample"):
        empty.compute()


def test_wrapped_logits_are_unwrapped() -> None:
    class Output:
        logits = torch.eye(3)

    metric = Classify(names(3))
    metric.update(Output(), torch.arange(3), Output())
    assert metric.compute()["top1"] == metric.compute()["agreement"] == 1.0


def test_chance_is_a_guess_and_two_standard_errors() -> None:
    metric = Classify(names(4))
    metric.update(torch.zeros(300, 4), torch.zeros(300, dtype=torch.long))
    assert metric.chance == pytest.approx(0.25 + 2 * math.sqrt(0.25 * 0.75 / 300))
