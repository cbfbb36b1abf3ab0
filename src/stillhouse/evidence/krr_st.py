"""Evidence for KRR-ST: the card's comparison and ablations on digits and on silhouettes without labels, small enough for two cores.

stillhouse reproduce krr_st
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.data import Data, open_data
from stillhouse.data.condensed import Condensed, read_condensed
from stillhouse.data.loading import eval_batches
from stillhouse.data.splits import subset
from stillhouse.data.transforms import eval_transform
from stillhouse.distillers.base import Clock, Distiller, Turn
from stillhouse.distillers.condensation.krr_st import KRRST
from stillhouse.evidence.experiment import finished
from stillhouse.evidence.table import spread
from stillhouse.losses.ridge import ridge_prediction
from stillhouse.models.imitator import Imitator, imitate
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.randomness import seeded
from stillhouse.run import Run
from stillhouse.run_folder import slug
from stillhouse.tasks.encode import Encode
from stillhouse.tasks.regress import Regress

LOG = logging.getLogger("stillhouse")
CLAIM = (
    "The paper (arXiv 2310.06511): from CIFAR-100, TinyImageNet or ImageNet at 64 pixels, without labels, 1,000 to 2,000 learnt pairs "
    "are a better start for 6 to 7 other data sets than random or k-means images and than condensation by labels, also for other kinds "
    "of networks. Its reasons: features as targets, learnt with the images; a pool of networks; no augmentation in the inner training."
)
SHOWED = (
    "on digits fresh networks learn the teacher's features better from its pairs than from random images, also other kinds of networks, "
    "and than from k-means images, for a ViT within noise; on silhouettes of animals ConvNets do better than from random images but hardly "
    "than from k-means images, a ViT no better than from random ones; on both a linear layer on random networks explains more; targets "
    "that stay and a network that never begins anew are worse, on silhouettes by little; not shown: that shifts in the inner training "
    "harm, that a reader of the features gains, nor fine-tuning on other animals, where untrained ones do as well; on digits classes teach "
    "ConvNets no worse than features"
)


class TargetsStay(KRRST):
    """Ablation: images learn, targets stay what the teacher said of the images they began as."""

    def turns(self) -> list[Turn]:
        """The images."""
        if self.data is None:
            return super().turns()
        self.data.targets.requires_grad_(False)
        return [Turn("pairs", [self.data.images])]


class NeverAnew(KRRST):
    """Ablation: the pool's networks go on learning and never begin anew."""

    def after_update(self, clock: Clock) -> None:
        """Always a step."""
        self.networks[int(self.visited)].age.clamp_(max=self.life - 1)
        super().after_update(clock)


class ShiftedInside(KRRST):
    """Ablation: what the pool's networks learn from is moved at random by up to a pixel each way; the targets are not."""

    def learnt(self) -> tuple[Tensor, Tensor]:
        """Each image at one of nine places, its border repeated."""
        images, targets = super().learnt()
        height, width = images.shape[-2:]
        padded, corners = F.pad(images, (1, 1, 1, 1), mode="replicate"), torch.randint(3, (len(images), 2)).tolist()
        moved = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
        return torch.stack(moved), targets


class Chosen(KRRST):
    """Baseline: random images with the teacher's features, from which the method begins."""

    def turns(self) -> list[Turn]:
        """Nothing is learnt."""
        return []


class KMeansChosen(Chosen):
    """Baseline: the images nearest to the centres of k-means of the pixels."""

    def begin_with(self, batches: Iterable[tuple[Any, Any]]) -> Tensor:
        """As many as there are to be pairs, each another image."""
        images = torch.cat([each for each, _ in batches])
        pixels = images.flatten(1).double().cpu()
        found = KMeans(self.pairs, n_init=4, random_state=int(torch.randint(2**31, ()))).fit(pixels.numpy())
        taken: list[int] = []
        for distances in torch.cdist(torch.from_numpy(found.cluster_centers_).double(), pixels):
            distances[taken] = torch.inf
            taken.append(int(distances.argmin()))
        return images[taken]


class ConvNet(nn.Module):
    """The network of condensation papers: convolution, batch normalisation, ReLU, mean of 2 x 2, over and over; features are not pooled."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((channels, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.AvgPool2d(2)]
        self.layers = nn.Sequential(*layers)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to the last map."""
        maps: Tensor = self.layers(images)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images).flatten(1)


@dataclass(frozen=True)
class Way:
    """A way to come by pairs."""

    name: str
    method: str | type[Distiller]
    settings: dict[str, Any] = field(default_factory=dict)


WAYS = (
    Way("random images, the teacher's features", Chosen, {"life": 2}),
    Way("k-means images, the teacher's features", KMeansChosen, {"life": 2}),
    Way("KRR-ST", "krr_st"),
    Way("targets stay", TargetsStay),
    Way("one network, never anew", NeverAnew, {"pool": 1}),
    Way("shifts in the inner training", ShiftedInside),
)
UNTRAINED, LABELLED = "fresh networks, untrained", "random images, their classes"
"""Rows beside those of `WAYS`: nothing is learnt, and the baseline that knows labels."""
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "the pool's ConvNet": lambda channels, size: ConvNet(channels, (16, 32)),
    "ConvNet of another width": lambda channels, size: ConvNet(channels, (48,)),
    "ViT": lambda channels, size: timm.create_model(
        "vit_tiny_patch16_224", in_chans=channels, num_classes=0, img_size=size, patch_size=2, embed_dim=32, depth=2, num_heads=2
    ),
}
"""What is trained on the pairs; the first is what they are learnt with."""
LABELS, DRAWS, STEPS, RATE = 5, 5, 50, 1e-3
"""Of fine-tuning by AdamW: labels a class, how many times others are drawn, steps on all of them at once, learning rate."""


@dataclass(frozen=True)
class Condensation:
    """Several ways to make as many pairs; fresh networks that learn nothing else are measured.

    Attributes:
        name: also the folder's name.
        title: what it is, in a sentence for the table.
        data: a spec.
        teacher: a spec; trained once, without labels.
        teacher_recipe: of its training.
        recipe: of the condensation.
        learning: how the fresh networks learn the pairs.
        others: a spec of like images of classes that neither the teacher nor the pairs have seen; then fresh networks that learnt the
            pairs are also fine-tuned on a few of these with labels.
    """

    name: str
    title: str
    data: str
    teacher: str
    teacher_recipe: dict[str, Any]
    recipe: dict[str, Any]
    learning: dict[str, Any]
    others: str = ""
    ways: Sequence[Way] = WAYS
    drawn: Sequence[str] = ()

    def run(self, out: Path, seeds: Sequence[int], smoke: bool) -> Found:
        """All ways, seed by seed."""
        folder = out / (f"{self.name}-smoke" if smoke else self.name)
        tiny = {"smoke": True, "life": 4} if smoke else {}
        recipe = self.teacher_recipe | ({"smoke": True} if smoke else {})
        teacher = finished("barlow_twins", folder / "teacher", student=self.teacher, data=self.data, **recipe)
        judge = Judge(self.data, teacher, self.learning | ({"epochs": 2} if smoke else {}), self.others)
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in (UNTRAINED, *(way.name for way in self.ways), LABELLED)}
        for seed in seeds:
            rows[UNTRAINED].append(judge.untrained(seed))
            for way in self.ways:
                place = folder / f"{slug(way.name.lower())}-{seed}"
                settings = {**self.recipe, **way.settings, **tiny, "seed": seed, "allow_weak_teacher": True}
                networks = {"student": judge.network(next(iter(NETWORKS))), "teacher": str(teacher.folder)}
                run = finished(way.method, place, **networks, data=self.data, **settings)
                rows[way.name].append(judge.measured(run, seed))
                LOG.info("%s: %s", place.name, rows[way.name][-1])
                if way.method is Chosen:
                    rows[LABELLED].append(judge.measured(run, seed, labelled=True))
        return Found(self, teacher, seeds, rows)


class Judge:
    """Fresh networks trained on pairs, and what they are worth on images that nobody learnt from."""

    def __init__(self, data: str, teacher: Run, learning: dict[str, Any], others: str = "") -> None:
        self.data: Data = open_data(data, task="encode")
        self.others = open_data(others, task="encode") if others else None
        self.learning, self.known = learning, Preprocessing(self.data.mean, self.data.std, self.data.size)
        self.teacher = teacher.student.eval()

    def network(self, name: str) -> nn.Module:
        """One of `NETWORKS` for these data."""
        made = NETWORKS[name](self.data.channels, self.data.size)
        set_preprocessing(made, self.known)
        return made

    @cached_property
    def images(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Images and class numbers of both parts, and of those of other classes."""
        transform, parts = eval_transform(self.known, self.data), {"train": self.data.train, "val": self.data.val}
        parts |= {"other train": self.others.train, "other val": self.others.val} if self.others else {}
        batches = {name: list(eval_batches(part, transform, batch=512)) for name, part in parts.items()}
        return {name: (torch.cat([x for _, x, _ in each]), torch.cat([y for _, _, y in each])) for name, each in batches.items()}

    @cached_property
    @torch.no_grad()
    def truth(self) -> Tensor:
        """What the teacher says of the validation images."""
        answers: Tensor = self.teacher(self.images["val"][0])
        return answers

    def measured(self, run: Run, seed: int, labelled: bool = False) -> dict[str, float]:
        """The figures of a run's pairs, or of its images with classes for targets, kept beside them."""
        kept, of = run.folder / ("labelled.json" if labelled else "measured.json"), self.of_labelled if labelled else self.of
        if not kept.is_file():
            data = read_condensed(run.folder / "data")
            kept.write_text(json.dumps({f"{name}/{key}": v for name in NETWORKS for key, v in of(data, name, seed).items()}, indent=1))
        figures: dict[str, float] = json.loads(kept.read_text())
        return figures

    def of(self, data: Condensed, name: str, seed: int) -> dict[str, float]:
        """What one kind of network is worth that learnt these pairs: the same draws for all ways to make them."""
        images, targets = data.fed().detach(), data.targets.detach()
        with seeded(seed, "krr_st", name):
            learnt = imitate(self.network(name), images, targets, **self.learning)
        with torch.no_grad():
            r2 = self.explained(torch.cat([learnt(some) for some in self.images["val"][0].split(256)]))
        heads = []
        for number in range(5):
            with seeded(seed, "krr_st", name, "fresh", number), torch.no_grad():
                fresh = Imitator(self.network(name), targets.shape[1], images).eval()
                asked = torch.cat([fresh.embed(some) for some in self.images["val"][0].split(256)])
                heads.append(self.explained(ridge_prediction(fresh.embed(images), targets, asked).float()))
        return {"r2": r2, "ridge_r2": statistics.mean(heads), **self.read(learnt), **self.tuned(learnt, seed)}

    def of_labelled(self, data: Condensed, name: str, seed: int) -> dict[str, float]:
        """`of` what learnt the class of each image, one of K, by the same squared error; images are training images or near to them."""
        images, (known, labels) = data.fed().detach(), self.images["train"]
        classes = labels[torch.cdist(images.flatten(1), known.flatten(1)).argmin(1)]
        with seeded(seed, "krr_st", name):
            learnt = imitate(self.network(name), images, F.one_hot(classes, len(self.data.classes)).float(), **self.learning)
        return {**self.read(learnt), **self.tuned(learnt, seed)}

    def untrained(self, seed: int) -> dict[str, float]:
        """What fresh networks are worth as they are."""
        found: dict[str, float] = {}
        for name in NETWORKS:
            with seeded(seed, "krr_st", name):
                fresh = Imitator(self.network(name), self.truth.shape[1], self.images["val"][0][:1])
            found |= {f"{name}/{key}": value for key, value in (self.read(fresh.eval()) | self.tuned(fresh, seed)).items()}
        return found

    def explained(self, answers: Tensor) -> float:
        """The share of the variance of the teacher's features that these answers explain."""
        metric = Regress([str(number) for number in range(self.truth.shape[1])], sync_on_compute=False)
        metric.update(answers, self.truth)
        return metric.compute()["r2"]

    @torch.no_grad()
    def read(self, network: Imitator) -> dict[str, float]:
        """Linear probe and nearest neighbours on what the network's last layer sees, with all labels of the training images."""
        encoder = copy.deepcopy(network)
        encoder.head = nn.Identity()
        metric = Encode(self.data.classes, sync_on_compute=False)
        metric.learn(encoder, [self.images["train"]])
        images, labels = self.images["val"]
        metric.update(torch.cat([encoder(some) for some in images.split(256)]), labels)
        return metric.compute()

    def tuned(self, network: Imitator, seed: int) -> dict[str, float]:
        """The share of images of other classes named right after fine-tuning on a few with labels; the same few for all, several times."""
        if self.others is None:
            return {}
        (images, labels), (asked, truth) = self.images["other train"], self.images["other val"]
        classes, right = len(self.others.classes), []
        for number in range(DRAWS):
            with seeded(seed, "krr_st", "tuned", number):
                few = subset(labels, LABELS * classes, seed, "krr_st", "few", number)
                learner = copy.deepcopy(network).train()
                learner.head = nn.Linear(learner.head.in_features, classes)
                optimizer = torch.optim.AdamW(learner.parameters(), RATE)
                for _ in range(STEPS):
                    optimizer.zero_grad()
                    F.cross_entropy(learner(images[few]), labels[few]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            with torch.no_grad():
                learner.eval()
                right.append(float((torch.cat([learner(some) for some in asked.split(256)]).argmax(1) == truth).float().mean()))
        return {"tuned": statistics.mean(right)}


@dataclass(frozen=True)
class Found:
    """What came of it: a row of figures a way and seed."""

    experiment: Condensation
    teacher: Run
    seeds: Sequence[int]
    rows: dict[str, list[dict[str, float]]]
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def table(self) -> list[str]:
        """A table a kind of network, as Markdown."""
        told, facts = self.experiment, self.teacher.facts
        settings = {key: value for key, value in told.recipe.items() if key not in ("eval_every", "save_every", "trackers")}
        parts = [
            f"{told.title}. Teacher `{told.teacher}`, trained by `barlow_twins` without labels: linear probe "
            f"{100 * self.teacher.metrics['probe']:.1f} %, nearest neighbours {100 * self.teacher.metrics['knn']:.1f} %. "
            f"{', '.join(f'{key} {value}' for key, value in settings.items())}. Fresh networks then learn the pairs alone: "
            f"{', '.join(f'{key} {value}' for key, value in told.learning.items())}. Mean ± standard deviation over seeds "
            f"{', '.join(map(str, self.seeds))}; {facts['data']['val']} validation images. Variance of the teacher's features that is "
            "explained: by a network that learnt the pairs, and by the best linear layer on 5 random networks. Readers of the features "
            "that the network learnt have all labels of the training images." + (f" Fine-tuned: {self.tuning()}" if told.others else "")
        ]
        titles = {"r2": "explained, %", "ridge_r2": "by a layer on random networks, %", "probe": "linear probe, %", "knn": "neighbours, %"}
        titles |= {"tuned": "fine-tuned on other classes, %"} if told.others else {}
        first = told.ways[0].name
        for name in NETWORKS:
            columns = ["pairs", titles["r2"], f"minus {first}, paired", *list(titles.values())[1:]]
            lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            for way, rows in self.rows.items():
                cells = {key: [100 * row[f"{name}/{key}"] for row in rows] for key in titles if f"{name}/{key}" in rows[0]}
                against = [100 * row[f"{name}/r2"] for row in self.rows[first]]
                difference = [a - b for a, b in zip(cells["r2"], against, strict=True)] if "r2" in cells and way != first else []
                shown = [spread(cells.get(key, [])) for key in titles]
                lines.append(f"| {' | '.join([way, shown[0], spread(difference, sign=True), *shown[1:]])} |")
            parts += [f"Trained on the pairs: {name}.", "\n".join(lines)]
        return parts

    def tuning(self) -> str:
        """How networks were fine-tuned on other classes, in a sentence."""
        return (
            f"all weights and a new last layer, on {LABELS} labels a class of `{self.experiment.others}`, classes that neither "
            f"teacher nor pairs have seen ({STEPS} steps of AdamW at {RATE:g}, mean of {DRAWS} draws of labels)."
        )


SHARED: dict[str, Any] = {"trackers": "none", "save_every": 10_000}
EXPERIMENTS = (
    Condensation(
        name="digits",
        title="40 pairs of 8 x 8 digits, made from 1,078 images without their labels",
        data="digits",
        teacher="timm/convnext_atto:depths=(1,1,1,1),dims=(16,32,48,64),patch_size=1",
        teacher_recipe={
            **{"epochs": 40, "batch": 128, "lr": 3e-3, "width": 128, "crop": 0.5, "flip": 0.0, "jitter": 0.2, "eval_every": 40},
            **SHARED,
        },
        recipe={
            **{"epochs": 200, "batch": 256, "lr": 1e-2, "weight_decay": 0.0, "warmup_epochs": 0.0, "eval_every": 200, **SHARED},
            **{"pairs": 40, "pool": 4, "life": 60, "examined_epochs": 100},
        },
        learning={"epochs": 200, "batch": 40, "lr": 0.1, "decay": 1e-3},
    ),
    Condensation(
        name="animal_mnist",
        title="60 pairs of silhouettes of animals, 16 x 16, made from 3,000 images of five classes without their labels",
        data="animal-mnist:classes=bear+bird+cat+cow+dog,train=3000,size=16",
        teacher="timm/convnext_atto:depths=(1,1,1,1),dims=(16,32,48,64),patch_size=1",
        teacher_recipe={
            **{"epochs": 30, "batch": 128, "lr": 3e-3, "width": 128, "crop": 0.5, "flip": 0.5, "jitter": 0.2, "eval_every": 30},
            **SHARED,
        },
        recipe={
            **{"epochs": 40, "batch": 256, "lr": 1e-2, "weight_decay": 0.0, "warmup_epochs": 0.0, "eval_every": 40, **SHARED},
            **{"pairs": 60, "pool": 4, "life": 60, "examined_epochs": 100},
        },
        learning={"epochs": 200, "batch": 60, "lr": 0.03, "decay": 1e-3},
        others="animal-mnist:classes=elephant+giraffe+horse+sheep+zebra,size=16",
    ),
)
