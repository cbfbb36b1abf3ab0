"""What a user can ask for beside `distill`: the same names and arguments in Python and on the command line. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from stillhouse.errors import UserError
from stillhouse.run import default_method, distill

if TYPE_CHECKING:
    from torch import nn

    from stillhouse.catalogue import Card
    from stillhouse.checking import Finding
    from stillhouse.data import Data

__all__ = ["check", "compare", "distill", "estimate", "evaluate", "export", "methods", "reproduce"]


def methods(name: str | None = None) -> list[Card]:
    """What there is.

    Args:
        name: one method; all by default.
    """
    from stillhouse.catalogue import cards

    return cards(name)


def check(
    teacher: str | nn.Module,
    student: str | nn.Module,
    data: str | Data,
    *,
    method: str | None = None,
    task: Literal["classify", "detect", "segment", "encode", "generate", "regress"] | None = None,
    teacher_weights: str = "pretrained",
    student_weights: str = "random",
    teacher_precision: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "fp32",
    teacher_error: float = 0.01,
    teacher_device: str | None = None,
    allow_weak_teacher: bool = False,
    seed: int = 0,
) -> list[Finding]:
    """Looks, in seconds, at everything that makes a distillation silently useless; refuses at the first thing that cannot work.

    Args:
        teacher: a spec, run folder or module.
        student: likewise.
        data: a spec or `stillhouse.data.Data`.
        method: what they would be trained by, with its default settings; masked_kd to classify, acam_kd to detect or segment.
        task: where the data allow several.
        teacher_weights: pretrained, or a file.
        student_weights: random, pretrained, or a file.
        teacher_precision: as `distill` has it.
        teacher_error: the largest KL divergence from full precision that is accepted, in nats.
        teacher_device: as `distill` has it.
        allow_weak_teacher: go on although the teacher is no better than chance.
        seed: of the student's random weights.
    """
    from stillhouse.fitting import OWN
    from stillhouse.session import Session

    given: dict[str, Any] = {
        "method": method or default_method(task, data),
        "task": task,
        "teacher": teacher,
        "student": student,
        "data": data,
    }
    given |= {"teacher_weights": teacher_weights, "student_weights": student_weights, "allow_weak_teacher": allow_weak_teacher}
    given |= {"teacher_precision": teacher_precision, "teacher_error": teacher_error, "teacher_device": teacher_device}
    given |= {"allow_partial": False, "bad_data": "skip", "seed": seed}
    return Session(Path(), dict.fromkeys(OWN) | given).check()


def estimate(
    teacher: str | nn.Module,
    student: str | nn.Module,
    *,
    classes: int = 1000,
    channels: int = 3,
    batch: int = 8,
    keeps: list[float] | None = None,
    rounds: int = 5,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    task: Literal["classify", "detect", "segment"] | None = None,
    size: int | None = None,
    profile: bool = False,
    method: str | None = None,
    data: str | Data | None = None,
    teacher_precision: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "fp32",
) -> list[dict[str, Any]]:
    """Measures what a step costs here: of plain training, full distillation and MaskedKD to classify; of plain training, plain feature
    distillation and ACAM-KD to detect or segment. Weights do not matter and stay random.

    With `profile` one method's step is taken apart instead: data, student, saliency, teacher, losses, backward, optimiser, logging, each
    beside the time of its multiply-adds alone at the speed this machine reaches on their shapes.

    Args:
        teacher: a spec or module.
        student: likewise.
        classes: how many classes.
        channels: channels of an image.
        batch: images in a step.
        keeps: shares of the patches that the teacher sees; 1, 0.75, 0.5 and 0.25 by default.
        rounds: measured steps of each row.
        precision: fp32, or bf16 or fp16 under autocast.
        task: what the networks are for; by default what the student's name tells, else to classify.
        size: side of the images; by default the student's own, 224 to classify and 512 to detect or segment.
        profile: where the time of a step goes.
        method: whose step is taken apart, with its default settings; masked_kd to classify, acam_kd to detect or segment.
        data: what its batches are made of; by default random images, which cost less to read than real ones.
        teacher_precision: of a teacher that classifies, as `distill` has it; its error on random weights would say nothing.
    """
    from stillhouse.fitting import DENSE, task_of_network

    found = task or task_of_network(student)
    if teacher_precision != "fp32" and (profile or found in DENSE):
        raise UserError("--teacher-precision is for the steps of classifiers: leave it out with --profile, to detect and to segment")
    if profile:
        images = _images(data, found, classes, channels, size)
        named = method or default_method(found, data)
        return _profile(named, teacher, student, images, batch=batch, rounds=rounds, precision=precision)
    if method is not None or data is not None:
        raise UserError("--method and --data are for taking a step apart: add --profile, or leave them out")
    from stillhouse.measure.dense import estimate_dense
    from stillhouse.measure.estimate import estimate as measure
    from stillhouse.models.opening import open_model
    from stillhouse.models.precision import lowered
    from stillhouse.models.preprocessing import preprocessing_of

    dense: dict[str, Any] = {"task": found, "image_size": size or 512} if found in DENSE else {}
    networks = [open_model(spec, classes=classes, channels=channels, new_head=True, **dense) for spec in (teacher, student)]
    if dense:
        return estimate_dense(*networks, image_size=size or 512, classes=classes, batch=batch, rounds=rounds, precision=precision)
    networks[0], _ = lowered(networks[0], teacher_precision, next(networks[0].parameters()).device)
    known = preprocessing_of(networks[1])
    size = size or (known.size if known else None) or 224
    keeps = keeps or [1.0, 0.75, 0.5, 0.25]
    return measure(
        *networks, image_size=size, channels=channels, classes=classes, batch=batch, keeps=keeps, rounds=rounds, precision=precision
    )


def _images(data: str | Data | None, task: str | None, classes: int, channels: int, size: int | None) -> Data:
    """What a step is profiled on: the data that are named, or random images to classify."""
    import torch

    from stillhouse.data import Data, open_data

    if data is not None:
        return open_data(data, bad_data="skip", task=task)  # type: ignore[arg-type]
    if task not in (None, "classify"):
        raise UserError(f"there are no random images to {task}: name data with --data, such as scenes")
    side = size or 224
    images = torch.randint(256, (64, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples: Any = [(image, number % classes) for number, image in enumerate(images)] * 16
    return Data("random images", samples, samples, [str(each) for each in range(classes)], channels, side)


def _profile(method: str, teacher: str | nn.Module, student: str | nn.Module, data: Data, **asked: Any) -> list[dict[str, Any]]:
    """A step of a method with its default settings, taken apart."""
    from stillhouse import distillers
    from stillhouse.fitting import fit_of, input_of, open_student, refuse_other_task, transforms_of
    from stillhouse.measure.profile import profile
    from stillhouse.models.opening import open_model
    from stillhouse.training.recipe import Recipe

    refuse_other_task(method, data)
    further = [name for name in distillers.needed(method) if name in distillers.others(method)]
    if further:
        raise UserError(f"method {method} has further networks ({', '.join(further)}), which estimate does not open")
    learner = open_student(student, data, weights="random", allow_partial=False, seed=0)
    networks = {"teacher": open_model(teacher, **fit_of(data), new_head=True)} if "teacher" in distillers.networks(method) else {}
    preprocessing = input_of(learner, data)
    stage = next(distillers.find(method).stages(learner, networks.get("teacher"), 1))
    recipe = Recipe(epochs=10**6, batch=asked["batch"], precision=asked["precision"], trackers="none", warmup_epochs=0)
    with TemporaryDirectory() as folder:
        transforms = transforms_of(preprocessing, data, {})
        return profile(stage.distiller, data, transforms, preprocessing, recipe, Path(folder), asked["rounds"])


def evaluate(
    run: str | Path,
    data: str | Data | None = None,
    *,
    task: Literal["encode"] | None = None,
    weights: str = "pretrained",
    fine_tune: int = 0,
    lr: float = 1e-3,
    batch: int = 128,
    bad_data: Literal["refuse", "skip"] | None = None,
) -> dict[str, float]:
    """The metrics of a network on the validation images of a data set.

    Args:
        run: a run folder, or the folder of another network in it, such as RUN/partner; or, with data, a spec such as timm/NAME.
        data: a spec or `stillhouse.data.Data`; by default what the run was trained on.
        task: encode takes any network without its head, and asks what its features are worth to a linear probe and to nearest neighbours;
            by default what the run was for.
        weights: of a spec: pretrained, random, or a file.
        fine_tune: of an encoder, so many epochs in which a copy of it with a new head learns the labelled training images by the method
            scratch; then `fine_tuned` is that copy's top-1. 0: none.
        lr: learning rate of the fine-tuning.
        batch: images at a time.
        bad_data: refuse or skip unreadable images; by default as the run did with its own data, and refuse with others.
    """
    from accelerate import Accelerator

    from stillhouse.data import open_data
    from stillhouse.data.loading import eval_batches
    from stillhouse.fitting import fit_of, input_of, transforms_of
    from stillhouse.models.opening import open_model, task_of
    from stillhouse.run_folder import read_facts, read_settings
    from stillhouse.session import metric_of
    from stillhouse.training.evaluation import evaluate as measure
    from stillhouse.training.evaluation import learnt
    from stillhouse.training.processes import on_cpu, processes

    folder = next((each for each in (Path(run), Path(run).parent) if (each / "settings.yaml").is_file()), None)
    if folder is not None and (folder / "data").is_dir():
        raise UserError(f"the run in {run} made a data set, not a network: train one on it with --method scratch --data {run}")
    settings = read_settings(folder / "settings.yaml") if folder else {}
    if data is None and not folder:
        task_of(str(run))  # refuses what is neither
        raise UserError(f"'{run}' is no run folder, so nobody knows its data: name them with --data")
    bad_data = bad_data or (settings.get("bad_data", "refuse") if data is None else "refuse")
    data = data or settings["data"]
    if data is None:
        raise UserError(f"the run in {run} was trained on data made in Python, which no file names; name the data with --data")
    if task is None and folder:
        task = read_facts(folder).get("task")
    opened = open_data(data, bad_data=bad_data, task=task)
    if fine_tune and (opened.task != "encode" or fine_tune < 0):
        raise UserError(f"fine_tune is {fine_tune} and what is asked for is to {opened.task}; expected epochs, for encoders: --task encode")
    processes()
    accelerator = Accelerator(cpu=on_cpu())
    student = open_model(str(run), **fit_of(opened), weights=weights).to(accelerator.device)
    preprocessing = input_of(student, opened)
    _, transform = transforms_of(preprocessing, opened, {})
    metric = metric_of(opened, settings.get("judge"), data, folder.parent if folder else Path("runs"))()
    metric = learnt(metric, student, opened, transform, accelerator.device, batch)
    metrics = measure(student, eval_batches(opened.val, transform, batch=batch, wrong=opened.wrong), accelerator, metric)
    return metrics | ({"fine_tuned": _fine_tuned(run, data, weights, fine_tune, lr, batch, bad_data)} if fine_tune else {})


def _fine_tuned(run: str | Path, data: str | Data, weights: str, epochs: int, lr: float, batch: int, bad_data: Any) -> float:
    """The top-1 of a network with a new head, after a training of all processes that leaves nothing behind."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    with TemporaryDirectory() as own:
        (folder,) = broadcast_object_list([own])
        named: dict[str, Any] = {"student": str(run), "student_weights": weights, "data": data, "task": "classify", "bad_data": bad_data}
        recipe: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch": batch, "eval_every": epochs, "trackers": "none"}
        tuned = distill("scratch", out=f"{folder}/run", **named, **recipe)
        (top1,) = broadcast_object_list([tuned.metrics["top1"] if PartialState().is_main_process else 0.0])
    return float(top1)


def compare(runs: list[str]) -> list[dict[str, Any]]:
    """Runs side by side, a row each.

    Args:
        runs: run folders.
    """
    from stillhouse.report.compare import compare as read

    return read(list(runs))


def reproduce(name: str, *, out: str = "runs/reproduce", seeds: int | None = None, smoke: bool = False) -> Path:
    """Runs a method's evidence: method, baselines and ablation on the same data, budget and paired seeds. Goes on where it was stopped.

    Args:
        name: a method that has evidence.
        out: folder for the runs and the table.
        seeds: how many paired seeds; by default as many as the evidence asks for, 3 or more.
        smoke: everything, tiny.

    Returns:
        The table, as Markdown.
    """
    from stillhouse.evidence import reproduce as run

    return run(name, out=Path(out), seeds=seeds, smoke=smoke)


def export(run: str | Path, *, to: Literal["timm", "transformers", "onnx", "torch"], out: str | Path) -> Path:
    """Writes a run's student alone, without any part of the distillation. Also in the middle of a run: then from its last checkpoint.

    Args:
        run: a run folder.
        to: who shall open it.
        out: a new folder.
    """
    from stillhouse.models.saving import export_student
    from stillhouse.unfinished import student_so_far

    student_so_far(Path(run))
    return export_student(run, to, out)
