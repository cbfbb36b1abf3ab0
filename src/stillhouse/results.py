"""What came of a run: the table of teacher, student and student without distillation, and what masking saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stillhouse import tasks
from stillhouse.data.loading import eval_batches
from stillhouse.distillers import name_of, others
from stillhouse.distillers.base import is_data
from stillhouse.measure.estimate import estimate
from stillhouse.measure.flops import macs
from stillhouse.models.precision import count_parameters
from stillhouse.models.tokens import OnSomeTokens
from stillhouse.run_folder import read_facts
from stillhouse.training.batches import on_device
from stillhouse.training.evaluation import measured
from stillhouse.training.log import read_table
from stillhouse.training.loop import Loop
from stillhouse.training.recipe import Recipe

TIMED_MACS = 2e10
"""Multiply-adds of one timed step on a CPU, so that timing stays a matter of seconds."""


def results(folder: Path, loop: Loop, metrics: dict[str, float]) -> dict[str, Any]:
    """The parts of `run.json` that tell what came of it: `models`, `result`, and for a masked teacher `keep` and `savings`.

    Step times are of the runs themselves (loading included); what masking saved is measured side by side afterwards.
    """
    distiller, data, recipe, method = loop.distiller, loop.data, loop.recipe, name_of(type(loop.distiller))
    few: Any = next(iter(eval_batches(data.val, loop.eval_transform, batch=min(32, len(data.val)))))[1]  # type: ignore[arg-type]
    shape = tuple(few[0].shape) if data.inputs == "images" and data.task != "generate" else None
    models = {name: _model(product, shape) for name, product in loop.kept.items()}
    rows = []
    for name, found in _measured(loop, metrics).items():
        who, cost = ("trained on the data", {}) if is_data(loop.kept[name]) else (name, models[name])
        rows.append({"row": f"{who} ({method})", **found, "step_ms": _step_ms(folder, recipe), **_cost(cost)})
    facts: dict[str, Any] = {"keep": None, "savings": None}
    if distiller.teacher is not None:
        network = distiller.teacher.model if isinstance(distiller.teacher, OnSomeTokens) else distiller.teacher
        fed = tuple(distiller.refeed(on_device(few[:1], loop.accelerator.device))[0].shape) if shape else None
        kept = getattr(distiller, "kept", None)
        models["teacher"] = _model(network, fed)
        models["teacher"]["macs_kept"] = macs(network, fed, keep=kept) if kept and fed else models["teacher"]["macs"]
        rows.insert(0, {"row": "teacher", **_of_teacher(loop), "step_ms": None, **_cost(models["teacher"])})
        if kept:
            facts["keep"] = {"kept": kept, "patches": distiller.patches}
            facts["savings"] = _savings(network, loop.kept["student"], few, len(data.classes), kept, models, loop.accelerator)
    further = {name: getattr(distiller, name, None) for name in others(type(distiller)) if name in distiller.frozen}
    models |= {name: _model(network, None) for name, network in further.items() if network not in (None, distiller.teacher)}
    if (folder / "baseline" / "run.json").exists():
        found = _of_task(loop, read_facts(folder / "baseline")["metrics"])
        cost = {"step_ms": _step_ms(folder / "baseline", recipe), **_cost(models["student"])}
        rows.append({"row": "student, labels only", **found, **cost})
    return facts | {"models": models, "result": rows}


def _measured(loop: Loop, metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """The metrics of each product that was measured, by itself or through a network trained on it; all but the first have their names."""
    first, *more = loop.kept
    named = {name: {key.removeprefix(f"{name}_"): value for key, value in metrics.items()} for name in more}
    return {first: _of_task(loop, metrics)} | {
        name: _of_task(loop, named[name]) for name in more if f"{name}_{loop.task.headline}" in metrics
    }


def _of_task(loop: Loop, metrics: dict[str, float]) -> dict[str, float]:
    return {key: metrics[key] for key in loop.task.titles if key in metrics}


def _of_teacher(loop: Loop) -> dict[str, Any]:
    """What the teacher reaches on the validation set."""
    device = loop.accelerator.device
    whole = nn.Sequential(loop.distiller.refeed, loop.distiller.teacher)
    metric = loop.learnt(loop.metric(sync_on_compute=False), whole)
    batches = eval_batches(loop.data.val, loop.eval_transform, batch=loop.recipe.batch, workers=loop.recipe.workers)
    loop.turn_to("val")
    with loop.answering():
        found, per_class = tasks.by_class(measured(whole, batches, device, metric).compute())
    return {**_of_task(loop, found), "per_class": per_class}


def _model(network: nn.Module, shape: tuple[int, ...] | None) -> dict[str, Any]:
    """A network's or a data set's name and size, and what a network multiplies for one image."""
    counted = shape is not None and not is_data(network)
    return {"name": _name(network), "params": count_parameters(network), "macs": macs(network, shape) if counted else None}  # type: ignore[arg-type]


def _savings(
    teacher: nn.Module, student: nn.Module, images: Tensor, classes: int, kept: int, models: dict[str, Any], accelerator: Any
) -> dict[str, Any]:
    """Multiply-adds and, where student and teacher are on one device, step times with the whole and with the masked teacher, measured in
    turn in this process.
    """
    per_image = models["teacher"]["macs"] + 3 * models["student"]["macs"]
    batch = len(images) if accelerator.device.type == "cuda" else max(1, min(len(images), int(TIMED_MACS / per_image)))
    settings: dict[str, Any] = {"channels": images.shape[1], "classes": classes, "batch": batch, "keeps": (kept,), "rounds": 7}
    together = next(teacher.parameters()).device == next(student.parameters()).device
    rows = estimate(teacher, student, image_size=images.shape[-1], **settings) if together else []
    full, masked = (next((row["step_s"] for row in rows if row["method"] == name), None) for name in ("full KD", "MaskedKD"))
    return {
        "teacher_macs_full": models["teacher"]["macs"],
        "teacher_macs_kept": models["teacher"]["macs_kept"],
        "step_ms_full": 1000 * full[0] if full else None,
        "step_ms_kept": 1000 * masked[0] if masked else None,
        "batch": batch,
    }


def _step_ms(folder: Path, recipe: Recipe) -> float | None:
    rows = read_table(folder / "speed.csv")
    return 1000 * recipe.batch / float(rows[-1]["images_per_second"]) if rows else None


def _cost(model: dict[str, Any]) -> dict[str, Any]:
    return {"params": model.get("params"), "macs": model.get("macs")}


def _name(network: nn.Module) -> str:
    about = getattr(network, "stillhouse", None) or {}
    return about.get("spec") or type(network).__name__
