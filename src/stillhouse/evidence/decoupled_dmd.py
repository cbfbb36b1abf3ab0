"""Evidence for decoupled DMD: its two parts alone, together and on other noise levels, on digits, small enough for one core.

stillhouse reproduce decoupled_dmd
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.data import open_data
from stillhouse.data.loading import eval_batches
from stillhouse.data.transforms import eval_transform
from stillhouse.distillers.generative.decoupled_dmd import DecoupledDMD
from stillhouse.evidence.experiment import SMOKE, Arm, Experiment, Study, finished
from stillhouse.evidence.table import spread
from stillhouse.models.opening import open_model
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.models.sampling import FlowNetwork, Sampling
from stillhouse.models.saving import load_student
from stillhouse.randomness import seeded
from stillhouse.run import Run
from stillhouse.session import trained_judge
from stillhouse.tasks.generate import Generate
from stillhouse.training.evaluation import measured
from stillhouse.training.log import read_table

CLAIM = (
    "The paper (arXiv 2511.22677): of DMD's two parts it is the augmentation by guidance that makes few steps of many, and matching "
    "distributions holds it. SDXL in 4 steps on 10,000 prompts: FID 17.80, CLIP 33.62 (DMD2: 18.95, 33.14). Lumina-Image-2.0: "
    "augmentation at levels cleaner than the generator's input (schedule 4) DPG 85.85, coupled (schedule 1) 83.90. So: augmentation alone "
    "runs away; schedule 4 above 1; levels noisier than the input below both. That matching alone fails, the paper claims only of tasks "
    "that need guidance."
)
SHOWED = (
    "on digits, in two steps: augmentation alone runs away, levels no noisier than the input beat DMD's range, noisier ones lose to it; "
    "not shown: that decoupling adds to the range, nor that matching alone fails (it covers best, if less often with the class asked for)"
)
GUIDANCE = 3.0
LEVELS = (1.0, 0.5)


class Reversed(DecoupledDMD):
    """The control that must be worse: the augmentation's levels are noisier than the input, as if the paper counted time as this code does.

    Above the first step's level, 1, there is nothing: there it keeps the full range, as the method does.
    """

    def noise_levels(self, uniform: tuple[Tensor, Tensor], sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        """sigma_CA uniform in [sigma_t, sigma_max]."""
        sigma_DM, _ = super().noise_levels(uniform, sigma_t)
        low, high = self.range
        least = torch.where(sigma_t < high, sigma_t, torch.full_like(sigma_t, low))
        return sigma_DM, least + (high - least) * uniform[1]


def arm(name: str, method: str | type[DecoupledDMD] = "decoupled_dmd", **settings: Any) -> Arm:
    """With what all share."""
    return Arm(name, method, {"guidance": GUIDANCE, "levels": LEVELS, "ratio": 3, "fake_rate": 2.0} | settings)


ARMS = (
    arm("1 coupled (DMD)", schedule="coupled"),
    arm("2 coupled, cleaner", schedule="coupled-cleaner"),
    arm("3 decoupled, full range", schedule="decoupled"),
    arm("4 decoupled, CA cleaner (the method)"),
    arm("reversed: CA noisier", Reversed),
    arm("DM only", guidance=1.0),
    arm("CA only", regulariser="none"),
)
REFERENCES = {
    "teacher, 16 steps": Sampling(16),
    f"teacher, 16 steps, guidance {GUIDANCE:g}": Sampling(16, GUIDANCE),
    "teacher in 2 steps, not distilled": Sampling(LEVELS, renoise=True),
    f"the same, guidance {GUIDANCE:g}": Sampling(LEVELS, GUIDANCE, renoise=True),
}
"""Ways to draw from the teacher."""


@dataclass(frozen=True)
class Generators(Experiment):
    """Its teacher is trained by flow matching, and drawn from in several ways for comparison."""

    def run(self, out: Path, seeds: Sequence[int], smoke: bool) -> Generated:
        """All arms, and the teacher's images."""
        study = super().run(out, seeds, smoke)
        told = {field.name: getattr(study, field.name) for field in fields(study)}
        return Generated(**told, references=self.references(study.teacher, smoke))

    def _taught(self, out: Path, smoke: bool) -> Run:
        recipe = {"task": self.task} | self.recipe | self.teacher_recipe | (SMOKE if smoke else {})
        return finished("flow", self._folder(out, smoke) / "teacher", student=self.teacher, data=self.teacher_data, **recipe)

    def references(self, teacher: Run, smoke: bool) -> dict[str, dict[str, float]]:
        """What is measured of images drawn from the teacher in other ways, kept beside it."""
        kept = teacher.folder / "references.json"
        if not kept.is_file():
            judge = trained_judge(teacher.folder.parent, self.data, smoke)
            kept.write_text(json.dumps({name: self._measured(teacher, judge, how) for name, how in REFERENCES.items()}, indent=1))
        found: dict[str, dict[str, float]] = json.loads(kept.read_text())
        return found

    def _measured(self, teacher: Run, judge: Path, how: Sampling) -> dict[str, float]:
        data, network = open_data(self.data, task="generate"), load_student(teacher.folder)
        assert isinstance(network, FlowNetwork)
        network.set_sampling(how)
        classifier = open_model(str(judge), classes=len(data.classes), channels=data.channels)
        metric = Generate(data.classes, judge=classifier, sync_on_compute=False)
        batches = eval_batches(data.val, eval_transform(preprocessing_of(network), data), batch=100)
        with seeded("references"):
            found: dict[str, float] = measured(network, batches, torch.device("cpu"), metric).compute()
        return {name: found[name] for name in Generate.titles}


@dataclass(frozen=True)
class Generated(Study):
    """What came of it."""

    references: dict[str, dict[str, float]]

    def table(self) -> list[str]:
        """The setting and the table, as Markdown."""
        told, first = self.experiment, self.experiment.arms[0].name
        recipe = {key: value for key, value in told.recipe.items() if key not in ("eval_every", "save_every", "trackers")}
        setting = (
            f"{told.title}. Network `{told.student}`. {', '.join(f'{key} {value}' for key, value in recipe.items())}. Mean ± standard "
            f"deviation over seeds {', '.join(map(str, self.seeds))}; one image for each of the {self.teacher.facts['data']['val']} "
            "validation images, compared with these in the eyes of one classifier; the last epoch, never the best. Strength: root mean "
            "square of the generator's images by that of the data's, first → last; 1 is right."
        )
        shares = [title for key, title in Generate.titles.items() if key != "frechet"]
        columns = ["arm", *(f"{title}, %" for title in shares), f"coverage minus {first}, paired", Generate.titles["frechet"], "strength"]
        rows = [f"| {name} | {' | '.join(_cells([figures]))} | |" for name, figures in self.references.items()]
        rows += [self.row(arm.name) for arm in told.arms]
        return [setting, "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows])]

    def row(self, arm: str) -> str:
        """An arm's figures."""
        runs, first = self.runs[arm], self.runs[self.experiment.arms[0].name]
        gains = [100 * (a.metrics["coverage"] - b.metrics["coverage"]) for a, b in zip(runs, first, strict=True)]
        tables = [[float(row["size"]) for row in read_table(run.folder / "watch.csv") if row.get("size")] for run in runs]
        strength = " → ".join(f"{statistics.mean(each[end] for each in tables):.2f}" for end in (0, -1)) if all(tables) else ""
        return f"| {arm} | {' | '.join(_cells([run.metrics for run in runs], gains if runs is not first else None))} | {strength} |"


def _cells(figures: Sequence[dict[str, float]], gains: list[float] | None = None) -> list[str]:
    shares = [spread([100 * each[key] for each in figures]) for key in Generate.titles if key != "frechet"]
    return [*shares, spread(gains or [], sign=True), spread([each["frechet"] for each in figures], digits=2)]


NETWORK = "diffusers/dit:width=64,depth=3,heads=2,patch=4,levels=16"

EXPERIMENTS = (
    Generators(
        name="digits",
        title=f"8 x 8 digits, a class each; the student draws in {len(LEVELS)} steps, at noise levels {', '.join(map(str, LEVELS))}, what "
        f"the teacher draws in 16; guidance {GUIDANCE:g}, but for DM only; three steps of the fake score for one of the generator",
        task="generate",
        data="digits",
        teacher_data="digits",
        student=NETWORK,
        teacher=NETWORK,
        recipe={
            "epochs": 27,
            "batch": 64,
            "lr": 5e-4,
            "warmup_epochs": 2,
            "weight_decay": 0.0,
            "ema": 0.98,
            **{"eval_every": 1000, "save_every": 5000, "log_every": 12, "trackers": "none"},
        },
        teacher_recipe={"epochs": 120, "lr": 2e-3, "ema": 0.99, "warmup_epochs": 5, "log_every": 200},
        arms=ARMS,
    ),
)
