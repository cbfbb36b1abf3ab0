"""Evidence for CNN-transformer collaboration: who teaches whom, where, small enough for one core.

stillhouse reproduce cnn_transformer_collab, after pip install --no-deps histolytics
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import distillers
from stillhouse.data import open_data
from stillhouse.data.contexts import GLOBAL, LOCAL
from stillhouse.data.dense_transforms import dense_transforms
from stillhouse.data.loading import eval_batches
from stillhouse.distillers.dense.cnn_transformer_collab import CNNTransformerCollab
from stillhouse.evidence.experiment import SMOKE, Arm, Search, finished
from stillhouse.evidence.table import spread
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.models.saving import load_student
from stillhouse.run import Run
from stillhouse.run_folder import slug
from stillhouse.tasks.segment import Segment
from stillhouse.training.evaluation import measured
from stillhouse.training.log import read_table

LOG = logging.getLogger("stillhouse")
CLAIM = (
    "The paper (arXiv 2307.12574) says that a CNN and a vision transformer which learn together, in low-layer features and selectively, "
    "region by region and pixel by pixel, in the direction of the more reliable one, beat earlier online distillation by a large margin on "
    "three benchmarks for segmentation. So: all terms above deep mutual learning above each alone, most of all on what each is weak in; "
    "inverted directions below deep mutual learning; a fixed direction helps one of the two only."
)
SHOWED = (
    "not shown: on made-up scenes (weights not searched for) no way of teaching each other beats both students alone, and all together "
    "cost 3 to 4 points; HFD and regions change nothing; inverted directions are the worst for the ViT (10 points below alone). On real "
    "nuclei (a factor of 1 or 0.1 on the weights chosen for each arm) nothing, DML and inverted directions (at 1, all at 0.1) included, "
    "differs from each alone by more than its own spread over 3 seeds, 0.3 to 2 points"
)
OFF = {"hfd": 0.0, "region": 0.0, "pixel": 0.0}


class Inverted(CNNTransformerCollab):
    """The control that must be worst: the less reliable one teaches."""

    def directions(self, errors_S: Tensor, errors_P: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Where the student is taught, and where the partner is."""
        return super().directions(errors_P, errors_S, counts)


class Tossed(CNNTransformerCollab):
    """Ablation: a coin says who teaches, pixel by pixel and region by region, anew at every step."""

    def directions(self, errors_S: Tensor, errors_P: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Where the student is taught, and where the partner is."""
        heads = torch.rand_like(errors_S) < 0.5
        return heads & counts, ~heads & counts


class StudentTaught(CNNTransformerCollab):
    """Ablation: the partner teaches everywhere."""

    def directions(self, errors_S: Tensor, errors_P: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Where the student is taught, and where the partner is."""
        return counts, torch.zeros_like(counts)


class PartnerTaught(CNNTransformerCollab):
    """Ablation: the student teaches everywhere."""

    def directions(self, errors_S: Tensor, errors_P: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Where the student is taught, and where the partner is."""
        return torch.zeros_like(counts), counts


METHOD = "cnn_transformer_collab"
ARMS = (
    Arm("each alone", METHOD, OFF),
    Arm("DML", "dml", weights=("alpha",)),
    Arm("CNN taught by ViT", StudentTaught, {"hfd": 0.0}, ("region", "pixel")),
    Arm("ViT taught by CNN", PartnerTaught, {"hfd": 0.0}, ("region", "pixel")),
    Arm("HFD only", METHOD, OFF | {"hfd": 0.1}, ("hfd",)),
    Arm("region-wise BSD only", METHOD, OFF | {"region": 0.1}, ("region",)),
    Arm("pixel-wise BSD only", METHOD, OFF | {"pixel": 1.0}, ("pixel",)),
    Arm("all", METHOD, {}, tuple(OFF)),
    Arm("all, over all pixels", METHOD, {"normalise": "all"}, tuple(OFF)),
    Arm("all, inverted", Inverted, {}, tuple(OFF)),
    Arm("all, tossed", Tossed, {}, tuple(OFF)),
)
BOTH = {"student": "CNN", "partner": "ViT"}


@dataclass(frozen=True)
class Together:
    """Several ways for two students to learn together; both are measured.

    Attributes:
        name: also the folder's name.
        title: what it is, in a sentence for the table.
        data: a spec.
        student, partner: specs, of the CNN and of the ViT.
        recipe: settings of the loop and of the students, the same for all arms.
        places: settings of the method, the same for all arms that have them.
        arms: the first one is what differences are taken from.
        kinds: names of groups of classes that the table tells of; by default none.
        drawn: the arms whose masks are drawn over the training.
        search: the factor on each arm's weights, the best of 1 and its scales by the mean of both students; rates stay the recipe's. By
            default all arms have their own weights.
    """

    name: str
    title: str
    data: str
    student: str
    partner: str
    recipe: dict[str, Any]
    places: dict[str, Any]
    arms: Sequence[Arm]
    kinds: dict[str, Sequence[str]] = field(default_factory=dict)
    drawn: Sequence[str] = ()
    search: Search | None = None

    def run(self, out: Path, seeds: Sequence[int], smoke: bool) -> Learnt:
        """All arms, seed by seed, so that an interrupted experiment has whole seeds."""
        folder, tiny = out / (f"{self.name}-smoke" if smoke else self.name), SMOKE if smoke else {}
        found = {arm.name: self.found(arm, folder, tiny) for arm in self.arms}
        runs: dict[str, list[Run]] = {arm.name: [] for arm in self.arms}
        figures: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in self.arms}
        for seed in seeds:
            for arm in self.arms:
                settings = self.settings(arm, found[arm.name]) | {"seed": seed, **tiny}
                run = finished(arm.method, folder / f"{slug(arm.name.lower())}-{seed}", **settings)
                runs[arm.name].append(run)
                figures[arm.name].append(self.measured(run))
                LOG.info("%s: %s", run.folder.name, {key: round(value, 3) for key, value in figures[arm.name][-1].items()})
        return Learnt(self, seeds, runs, figures, found)

    def settings(self, arm: Arm, scale: float) -> dict[str, Any]:
        """An arm's settings, with its weights times a factor."""
        networks = {"student": self.student, "partner": self.partner, "data": self.data, "task": "segment"}
        places, defaults = self.places if arm.method != "dml" else {}, distillers.settings(arm.method)
        weights = {name: scale * arm.settings.get(name, defaults[name].default) for name in arm.weights}
        return {**networks, **self.recipe, **places, **arm.settings, **weights}

    def found(self, arm: Arm, folder: Path, tiny: dict[str, Any]) -> float:
        """The factor on an arm's weights that did best in short runs."""
        search = self.search
        if search is None or not arm.weights:
            return 1.0
        epochs = max(1, round(self.recipe["epochs"] * search.share))

        def score(scale: float) -> float:
            settings = self.settings(arm, scale) | {"epochs": epochs, "eval_every": epochs, "seed": search.seed, **tiny}
            run = finished(arm.method, folder / f"search-{slug(arm.name.lower())}-{scale:g}", **settings)
            mean = statistics.mean(run.metrics[key] for key in ("miou", "partner_miou"))
            LOG.info("%s: %.4f", run.folder.name, mean)
            return mean

        return max((1.0, *search.scales), key=score)

    def measured(self, run: Run) -> dict[str, float]:
        """mIoU of both students, and the mean IoU of each kind of class, kept beside the run."""
        kept = run.folder / "measured.json"
        if not kept.is_file():
            kept.write_text(
                json.dumps({f"{who}/{key}": value for who in BOTH for key, value in self.of(run.folder / who).items()}, indent=1)
            )
        figures: dict[str, float] = json.loads(kept.read_text())
        return figures

    def of(self, folder: Path) -> dict[str, float]:
        """The figures of one saved student."""
        network: nn.Module = load_student(folder)
        data, known = open_data(self.data), preprocessing_of(network)
        assert known is not None
        transform: Any = dense_transforms(known, data)[1]
        device = torch.device("cpu")
        found = measured(
            network, eval_batches(data.val, transform, batch=50), device, Segment(data.classes, sync_on_compute=False)
        ).compute()
        kinds = {kind: statistics.mean(found.get(f"iou/{name}", 0.0) for name in names) for kind, names in self.kinds.items()}
        return {"miou": found["miou"], **kinds}


@dataclass(frozen=True)
class Learnt:
    """What came of it: `runs[arm]` and `figures[arm]` have one entry a seed; `found[arm]` is the factor on its weights."""

    experiment: Together
    seeds: Sequence[int]
    runs: dict[str, list[Run]]
    figures: dict[str, list[dict[str, float]]]
    found: dict[str, float]

    def table(self) -> list[str]:
        """The setting and the table, as Markdown."""
        told, first = self.experiment, self.experiment.arms[0].name
        val = self.runs[first][0].facts["data"]["val"]
        recipe = {key: value for key, value in (told.recipe | told.places).items() if key not in ("eval_every", "save_every", "trackers")}
        setting = (
            f"{told.title}. CNN `{told.student}`; ViT `{told.partner}`. {', '.join(f'{key} {value}' for key, value in recipe.items())}. "
            f"Mean ± standard deviation over seeds {', '.join(map(str, self.seeds))}; {val} validation images; the last epoch, never the "
            "best. Taught: the share of labelled pixels at which this one is taught, and flips: the share of classes in which the more "
            f"reliable one changed between batches; first → last.{self.searched()}"
        )
        columns = ["arm"]
        for who in BOTH.values():
            columns += [f"{who}: mIoU, %", f"minus {first}, paired", *(f"{who}: {kind}" for kind in told.kinds)]
        lines = [self.row(arm.name) for arm in told.arms]
        columns += [*(f"{who} taught, %" for who in BOTH.values()), "flips, %", *(["× weight"] if told.search else [])]
        return [setting, "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines])]

    def searched(self) -> str:
        """How each arm's weights came about, if not by default."""
        search = self.experiment.search
        if search is None:
            return ""
        scales = ", ".join(f"{scale:g}" for scale in (1.0, *search.scales))
        return (
            f" The factor on every arm's weights is the best of {{{scales}}} by the mean of both students' mIoU, each tried once with seed "
            f"{search.seed} in {search.share:.0%} of the epochs."
        )

    def row(self, arm: str) -> str:
        """An arm's figures."""
        cells, first = [arm], self.experiment.arms[0].name
        for who in BOTH:
            values, against = ([100 * each[f"{who}/miou"] for each in self.figures[name]] for name in (arm, first))
            cells += [spread(values), "" if arm == first else spread([a - b for a, b in zip(values, against, strict=True)], sign=True)]
            cells += [spread([100 * each[f"{who}/{kind}"] for each in self.figures[arm]]) for kind in self.experiment.kinds]
        for key in (*(f"taught_{who}" for who in BOTH), "flips"):
            tables = [read_table(run.folder / "watch.csv") for run in self.runs[arm]]
            moments = [[float(table[end].get(key, "nan")) for table in tables if table] for end in (0, -1) if all(tables)]
            cells.append(" → ".join(f"{100 * statistics.mean(each):.0f}" for each in moments))
        if self.experiment.search:
            cells.append(f"{self.found[arm]:g}" if any(each.name == arm and each.weights for each in self.experiment.arms) else "")
        return f"| {' | '.join(cells)} |"


EXPERIMENTS = (
    Together(
        name="contexts",
        title="Striped discs, told by what is near, and grey discs named by the colour of a marker in a corner; 32 x 32; 400 scenes to "
        "train with. The CNN sees a neighbourhood only, the ViT sees all",
        data="contexts",
        student="smp/unet:encoder=timm/test_efficientnet,encoder_depth=2,decoder_channels=(16,8)",
        partner="torchvision/fcn:backbone=timm/vit_tiny_patch16_224,patch_size=4,embed_dim=64,depth=3,num_heads=4",
        recipe={
            **{"epochs": 12, "batch": 8, "lr": 5e-3, "warmup_epochs": 1, "hflip": 0.0, "partner_rate": 0.4},
            **{"eval_every": 12, "save_every": 5000, "trackers": "none"},
        },
        places={"partner_low": "backbone.blocks.0", "regions": 8},
        arms=ARMS,
        kinds={"near": LOCAL, "far": GLOBAL},
    ),
    Together(
        name="nuclei",
        title="Nuclei of three kinds on one stained section (the package histolytics: `pip install --no-deps histolytics`), 96 px tiles at "
        "48 x 48; 60 training tiles. Regions are compared in the CNN's decoder, at a quarter of the image's size. Both "
        "rates were picked by hand from four pairs tried on each alone (seed 1000, the same validation tiles, a ViT of four blocks); no "
        "arm has rates of its own",
        data="histolytics:size=48,train=60",
        student="smp/unet:encoder=timm/test_efficientnet,encoder_depth=4,decoder_channels=(32,24,16,12)",
        partner="torchvision/fcn:backbone=timm/vit_tiny_patch16_224,patch_size=4,embed_dim=64,depth=3,num_heads=4",
        recipe={
            **{"epochs": 20, "batch": 4, "lr": 5e-3, "warmup_epochs": 2, "partner_rate": 0.4},
            **{"eval_every": 20, "save_every": 5000, "trackers": "none"},
        },
        places={"high": "decoder.blocks.1", "partner_low": "backbone.blocks.0", "regions": 6},
        arms=[arm for arm in ARMS if arm.method not in (StudentTaught, PartnerTaught)],
        search=Search(rates=(), scales=(0.1,), share=0.4),
    ),
)
