"""What came of a run: the table of teacher, student and student without distillation, and what masking saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from stillhouse import tasks
from stillhouse.data import Data
from stillhouse.data.loading import eval_batches
from stillhouse.distillers import name_of
from stillhouse.distillers.base import Distiller
from stillhouse.measure.estimate import estimate
from stillhouse.measure.flops import macs
from stillhouse.models.tokens import OnSomeTokens
from stillhouse.run_folder import read_facts
from stillhouse.training.batches import on_device
from stillhouse.training.evaluation import measured
from stillhouse.training.log import read_table
from stillhouse.training.recipe import Recipe

TIMED_MACS = 2e10
"""Multiply-adds of one timed step on a CPU, so that timing stays a matter of seconds."""


def results(
    folder: Path,
    distiller: Distiller,
    student: nn.Module,
    data: Data,
    transform: Any,
    recipe: Recipe,
    metrics: dict[str, float],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The parts of `run.json` that tell what came of it: `models`, `result`, and for a masked teacher `keep` and `savings`.

    Step times are of the runs themselves (loading included); what masking saved is measured side by side afterwards.
    """
    few: Any = next(iter(eval_batches(data.val, transform, batch=min(32, len(data.val)))))[1]  # type: ignore[arg-type]
    channels, height, width = few[0].shape
    keys = tasks.find(data.task).titles
    models = {"student": {"name": _name(student), "params": _params(student), "macs": macs(student, (channels, height, width))}}
    method_row = {
        "row": f"student ({name_of(type(distiller))})",
        **{key: metrics[key] for key in keys if key in metrics},
        "step_ms": _step_ms(folder, recipe),
        **_cost(models["student"]),
    }
    rows = [method_row]
    facts: dict[str, Any] = {"keep": None, "savings": None}
    if distiller.teacher is not None:
        whole = nn.Sequential(distiller.refeed, distiller.teacher)
        network = distiller.teacher.model if isinstance(distiller.teacher, OnSomeTokens) else distiller.teacher
        fed = tuple(distiller.refeed(on_device(few[:1], accelerator.device))[0].shape)
        kept = getattr(distiller, "kept", None)
        models["teacher"] = {"name": _name(network), "params": _params(network), "macs": macs(network, fed)}
        models["teacher"]["macs_kept"] = macs(network, fed, keep=kept) if kept else models["teacher"]["macs"]
        batches = eval_batches(data.val, transform, batch=recipe.batch, workers=recipe.workers)
        taught: Any = measured(whole, batches, accelerator.device, tasks.find(data.task)(data.classes, sync_on_compute=False))
        found, per_class = tasks.by_class(taught.compute())
        known = {key: value for key, value in found.items() if key in keys}
        rows.insert(0, {"row": "teacher", **known, "per_class": per_class, "step_ms": None, **_cost(models["teacher"])})
        if kept:
            facts["keep"] = {"kept": kept, "patches": distiller.patches}
            facts["savings"] = _savings(network, student, few, len(data.classes), kept, models, accelerator)
    if (folder / "baseline" / "run.json").exists():
        baseline = read_facts(folder / "baseline")["metrics"]
        rows.append(
            {
                "row": "student, labels only",
                **{key: baseline[key] for key in keys if key in baseline},
                "step_ms": _step_ms(folder / "baseline", recipe),
                **_cost(models["student"]),
            }
        )
    return facts | {"models": models, "result": rows}


def _savings(
    teacher: nn.Module, student: nn.Module, images: Tensor, classes: int, kept: int, models: dict[str, Any], accelerator: Accelerator
) -> dict[str, Any]:
    """Multiply-adds and step times with the whole and with the masked teacher, measured in turn in this process."""
    per_image = models["teacher"]["macs"] + 3 * models["student"]["macs"]
    batch = len(images) if accelerator.device.type == "cuda" else max(1, min(len(images), int(TIMED_MACS / per_image)))
    rows = estimate(
        teacher, student, image_size=images.shape[-1], channels=images.shape[1], classes=classes, batch=batch, keeps=(kept,), rounds=7
    )
    full, masked = (next(row for row in rows if row["method"] == name) for name in ("full KD", "MaskedKD"))
    return {
        "teacher_macs_full": models["teacher"]["macs"],
        "teacher_macs_kept": models["teacher"]["macs_kept"],
        "step_ms_full": 1000 * full["step_s"][0] if full["step_s"] else None,
        "step_ms_kept": 1000 * masked["step_s"][0] if masked["step_s"] else None,
        "batch": batch,
    }


def _step_ms(folder: Path, recipe: Recipe) -> float | None:
    rows = read_table(folder / "speed.csv")
    return 1000 * recipe.batch / float(rows[-1]["images_per_second"]) if rows else None


def _cost(model: dict[str, Any]) -> dict[str, Any]:
    return {"params": model["params"], "macs": model["macs"]}


def _params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _name(network: nn.Module) -> str:
    about = getattr(network, "stillhouse", None) or {}
    return about.get("spec") or type(network).__name__
