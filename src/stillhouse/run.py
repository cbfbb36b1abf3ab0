"""From a few words to a run folder. Imports nothing heavy: the command line is made from this signature."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stillhouse.distillers import name_of
from stillhouse.errors import UserError
from stillhouse.interrupted import Interrupted
from stillhouse.report import write_report
from stillhouse.run_folder import FREE, is_main_process, open_folder, read_facts, status

if TYPE_CHECKING:
    from torch import nn

    from stillhouse.data import Data
    from stillhouse.distillers.base import Distiller


@dataclass(frozen=True)
class Run:
    """What a distillation leaves behind, read from its folder."""

    folder: Path

    @cached_property
    def student(self) -> nn.Module:
        """The student."""
        from stillhouse.models.saving import load_student

        return load_student(self.folder / "student")

    @property
    def facts(self) -> dict[str, Any]:
        """The contents of `run.json`: status, versions, hashes, models, results."""
        return read_facts(self.folder)

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation: top1, top5, nll, ece; with a teacher agreement, teacher_top1 (on what it was shown), and each loss term."""
        metrics: dict[str, float] | None = self.facts.get("metrics")
        if metrics is None:
            raise UserError(f"the run in {self.folder} has not been evaluated to its end; go on with it with --resume")
        return metrics

    @property
    def report(self) -> Path:
        """The page to open in a browser."""
        return self.folder / "report.html"


def distill(
    method: str | type[Distiller] | None = None,
    *,
    teacher: str | nn.Module | None = None,
    student: str | nn.Module | None = None,
    data: str | Data | None = None,
    unlabelled: str | Data | None = None,
    task: Literal["classify", "detect", "segment", "encode", "generate", "regress"] | None = None,
    out: str | None = None,
    teacher_weights: str = "pretrained",
    student_weights: str = "random",
    teacher_precision: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "fp32",
    teacher_error: float = 0.01,
    teacher_device: str | None = None,
    inherit: str | nn.Module | None = None,
    judge: str | nn.Module | None = None,
    allow_partial: bool = False,
    allow_weak_teacher: bool = False,
    baseline: bool = False,
    bad_data: Literal["refuse", "skip"] = "refuse",
    resume: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> Run:
    """Distil a student from a teacher. Without networks and data: the embedded job, about a minute on two cores.

    Args:
        method: a name from `stillhouse methods`, or in Python a `Distiller` class of your own; by default masked_kd to classify and acam_kd
            to detect or segment, or what the resumed run has.
        teacher: timm/NAME, torchvision/NAME, transformers/NAME_OR_PATH or smp/NAME, each with options (timm/NAME:img_size=28,depth=4); a
            run folder; or in Python a module.
        student: likewise.
        data: digits, fashion-mnist, animal-mnist, imagefolder:DIR or hf:DIR_OR_NAME to classify, coco:DIR or voc:DIR to detect, masks:DIR
            or cityscapes:DIR to segment, scenes for either, each with options; a run whose product is a data set; or in Python a
            `stillhouse.data.Data`.
        unlabelled: more images, for a method with a stage that needs no labels; by default those of the data.
        task: classify, detect or segment (encode, generate, regress), where data and method allow several; by default what they are for.
            Alone it names the embedded job.
        out: the run folder; by default the next free runs/METHOD-N.
        teacher_weights: pretrained, or a file of weights (safetensors, or a state dict that needs no pickle).
        student_weights: random, pretrained, or a file.
        teacher_precision: fp32; bf16; int8 on CUDA or on a CPU with VNNI or AMX; fp16 or fp8 on CUDA. Its error is measured before the
            training.
        teacher_error: the largest error of a teacher in low precision that is accepted: KL divergence from the same teacher in full
            precision, in nats, mean over validation images.
        teacher_device: where the teacher computes, such as cuda:1, or cpu; by default where the student does. For one process.
        inherit: a detector or segmenter whose neck and head the student begins with where shapes agree; "teacher" for the teacher.
        judge: a classifier of the same data, in whose eyes generated images are measured; by default one that is trained first, once for
            all runs in a folder.
        allow_partial: accept weights with missing or unexpected keys; they are logged.
        allow_weak_teacher: go on although the teacher is no better than chance on this data.
        baseline: also train the same student on labels only, same recipe and seed, into OUT/baseline; always done in the embedded job.
        bad_data: refuse stops at unreadable images and names them; skip leaves them out and lists them in the run folder.
        resume: go on with the run in OUT, exactly; its settings are read from there. With student and data named it is begun if there is
            none yet, so that a cluster can start the same command again and again.
        overwrite: remove the run in OUT first.
        settings: of the loop (`stillhouse.training.recipe.Recipe`), of the augmentation
            (`stillhouse.data.transforms.train_transform`), and of the method.

    Returns:
        The run: `.student`, `.metrics`, `.report`.

    Raises:
        UserError: for what cannot work, in one sentence, before any work is spent; or a loss that is not finite.
        Interrupted: when stopped by Ctrl-C or SIGTERM, after writing a checkpoint.
    """
    asked = {name: _text(value) for name, value in locals().items() if name not in ("settings", "out", "resume", "overwrite")}
    given = {name: value for name, value in asked.items() if value != _DEFAULTS[name]} | settings
    chosen = method or default_method(task, data)
    folder, stored = open_folder(out, name_of(chosen), given, resume, overwrite)
    if stored is not None and status(folder) == "finished":
        if is_main_process() and not (folder / "report.html").is_file():  # killed while writing it
            write_report(folder)
        return Run(folder)
    method = asked["method"] = method or (stored or {}).get("method") or chosen
    if stored is not None:
        from stillhouse.cli import check_settings

        check_settings(stored, folder / "settings.yaml")
        job = {**asked, **stored, **{name: value for name, value in given.items() if name in FREE or stored.get(name) is None}}
    elif teacher is None and student is None and data is None:
        from stillhouse.embedded import embedded_job

        job = asked | embedded_job(method, task or "classify", given, folder.parent, train=distill)
    else:
        job = asked | settings
    from stillhouse.session import Session

    try:
        Session(folder, job, resume, overwrite).run()
    except Interrupted as error:
        raise Interrupted(f"{error}; go on with: stillhouse distill --resume --out {folder}", error.signal) from None
    return Run(folder)


DENSE_SOURCES = ("scenes", "coco", "voc", "masks", "cityscapes", "deepforest", "histolytics")


def default_method(task: str | None, data: str | Data | None) -> str:
    """The method where none is named: that of the paper for the task, as far as task or data tell it."""
    dense = str(data).partition(":")[0] in DENSE_SOURCES if isinstance(data, str) else getattr(data, "task", "classify") != "classify"
    return "acam_kd" if task in ("detect", "segment") or (task is None and dense) else "masked_kd"


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


_DEFAULTS: dict[str, Any] = {"method": None, **(distill.__kwdefaults__ or {})}
