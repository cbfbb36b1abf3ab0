"""Generation of images of a class: what is measured over a pass, in the eyes of a judge."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.outputs import logits_of
from stillhouse.models.preprocessing import Preprocessing, Refeed, preprocessing_of
from stillhouse.models.sampling import FlowNetwork
from stillhouse.tasks.base import Task
from stillhouse.tasks.colours import as_rgb

NEIGHBOURS = 5
MOST = 10_000
"""Images of either kind that nearest neighbours are sought among; their distances are N x N."""
ROWS = 1024


class Generate(Task):
    """How a network's images, one for each validation image and of its class, compare with those, as 8-bit pictures.

    Pictures are compared by the features of a classifier of the same data (what its last linear layer is given), which also says which
    class it sees. torchmetrics' FrechetInceptionDistance would take such features, but runs the judge for itself and keeps only sums; the
    neighbours need the features, so the distance is computed here from the same ones, in fp64. The state grows with the data.

    Args:
        classes: their names.
        judge: a classifier of them, images to logits; it is frozen.
        sync_on_compute: as for `Task`.

    Raises:
        UserError: if the judge has other classes.
    """

    headline: ClassVar[str] = "coverage"
    titles: ClassVar[dict[str, str]] = {
        "coverage": "coverage",
        "precision": "precision",
        "recall": "recall",
        "class_accuracy": "of the class asked for",
        "frechet": "Fréchet distance, squared features",
    }
    per_class: ClassVar[str] = "accuracy"
    judged: ClassVar[bool] = True

    real: list[Tensor]
    made: list[Tensor]
    asked: Tensor
    right: Tensor

    def __init__(self, classes: list[str], *, judge: nn.Module, sync_on_compute: bool = True) -> None:
        super().__init__(classes, sync_on_compute=sync_on_compute)
        self.judge = judge.requires_grad_(False).eval()
        linear = [module for module in judge.modules() if isinstance(module, nn.Linear)]
        if linear and linear[-1].out_features != len(classes):
            raise UserError(
                f"the judge tells {linear[-1].out_features} classes apart and the data has {len(classes)}; train one on these data"
            )
        self.width = linear[-1].in_features if linear else len(classes)
        for images in ("real", "made"):
            self.add_state(images, [], dist_reduce_fx="cat")
        for count in ("asked", "right"):
            self.add_state(count, torch.zeros(len(classes), dtype=torch.int64), dist_reduce_fx="sum")

    def ask(self, network: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`samples`, one of each target class, and `images`: pictures uint8 [B, C, H, W].

        Raises:
            UserError: if the network makes no images.
        """
        generator = next((module for module in network.modules() if isinstance(module, FlowNetwork)), None)
        if generator is None:
            raise UserError(f"a {type(network).__name__} makes no images; name a network that does, such as diffusers/unet2d")
        known = preprocessing_of(generator)
        return {"samples": pictures(generator.sample(targets), known), "images": pictures(images, known)}

    def update(self, output: dict[str, Tensor], targets: Tensor, teacher_output: Any = None) -> None:
        """Add a batch: what `ask` returned, and the classes asked for [B]. What the teacher made elsewhere is not compared."""
        logits, made = self.judged_by(output["samples"])
        self.made.append(made.flatten())
        self.real.append(self.judged_by(output["images"])[1].flatten())
        self.asked += torch.bincount(targets, minlength=len(self.classes))
        self.right += torch.bincount(targets[logits.argmax(1) == targets], minlength=len(self.classes))

    @torch.no_grad()
    def judged_by(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """The judge's logits and features of pictures uint8 [B, C, H, W]."""
        taken: list[Tensor] = []
        linear = [module for module in self.judge.modules() if isinstance(module, nn.Linear)]
        hook = linear[-1].register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0])) if linear else None
        plain = Preprocessing((0.0,) * pictures.shape[1], (1.0,) * pictures.shape[1], pictures.shape[-1])
        feed = Refeed(plain, preprocessing_of(self.judge) or half(pictures.shape[1])).to(pictures.device)
        try:
            logits = logits_of(self.judge(feed(pictures.float() / 255)))
        finally:
            if hook is not None:
                hook.remove()
        return logits.float(), (taken[0] if taken else logits).float().flatten(1)

    def compute(self) -> dict[str, float]:
        """Over all pictures.

        With the ball of a picture reaching to its 5th nearest neighbour of its own kind: `coverage`, the share of real pictures whose ball
        holds a made one (arXiv 2002.09797); `precision`, of made ones in some real one's ball; `recall`, of real ones in some made one's
        (both arXiv 1904.06991). `class_accuracy`: of made ones in which the judge sees the class asked for, `accuracy/NAME` of each class.
        `frechet`: the squared Fréchet distance of both kinds as normal distributions (arXiv 1706.08500).

        Raises:
            UserError: if there are fewer than two pictures.
        """
        real, made = (_rows(state, self.width) for state in (self.real, self.made))
        if len(real) < 2:
            raise UserError(f"{len(real)} pictures were measured, expected at least two; give more validation images")
        shares = neighbourhoods(real[:MOST], made[:MOST])
        asked, right = self.asked.cpu(), self.right.cpu()
        result = {**shares, "class_accuracy": int(right.sum()) / int(asked.sum()), "frechet": frechet_distance(real, made)}
        counts = zip(self.classes, asked.tolist(), right.tolist(), strict=True)
        return result | {f"accuracy/{name}": found / count for name, count, found in counts if count}

    @property
    def chance(self) -> float:
        """0: the coverage of what resembles nothing."""
        return 0.0

    @staticmethod
    def draw(images: Tensor, what: Any, classes: list[str], score: float = 0.3) -> Tensor:
        """What was made in place of the images, or, for targets, the images themselves; with three channels."""
        return as_rgb(what["samples"].cpu() if isinstance(what, dict) else images)


def half(channels: int) -> Preprocessing:
    """Of a network that knows none: pixels in [-1, 1]."""
    return Preprocessing((0.5,) * channels, (0.5,) * channels)


def pictures(images: Tensor, known: Preprocessing | None) -> Tensor:
    """uint8 [B, C, H, W] of images as a network takes them."""
    known = known or half(images.shape[1])
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (known.mean, known.std))
    return ((images.float() * std + mean) * 255).round().clamp(0, 255).byte()


def neighbourhoods(real: Tensor, made: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """`coverage`, `precision` and `recall` in [0, 1] of features [n, D] and [m, D]."""
    around_real, around_made = _radii(real, neighbours), _radii(made, neighbours)
    covered, recalled, precise = [], [], torch.zeros(len(made), dtype=torch.bool, device=made.device)
    for rows, radii in zip(real.split(ROWS), around_real.split(ROWS), strict=True):
        distances = _distances(rows, made)
        inside = distances <= radii[:, None]
        covered.append(inside.any(1))
        precise |= inside.any(0)
        recalled.append((distances <= around_made).any(1))
    shares = {"coverage": torch.cat(covered), "precision": precise, "recall": torch.cat(recalled)}
    return {name: float(share.double().mean()) for name, share in shares.items()}


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance [n] to the k-th nearest other, or to the furthest where there are fewer."""
    count = min(neighbours, len(features) - 1) + 1  # oneself among them
    return torch.cat([_distances(rows, features).topk(count, largest=False).values[:, -1] for rows in features.split(ROWS)])


def _distances(rows: Tensor, features: Tensor) -> Tensor:
    return torch.cdist(rows.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """|mu_r - mu_m|^2 + tr(S_r + S_m - 2 (S_r S_m)^(1/2)) of features [n, D] and [m, D], in fp64."""
    real, made = real.double(), made.double()
    covariances = [
        features.T.cov() if len(features) > 1 else features.new_zeros(features.shape[1], features.shape[1]) for features in (real, made)
    ]
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    mean = (real.mean(0) - made.mean(0)).square().sum()
    return float((mean + sum(each.trace() for each in covariances) - 2 * root).clamp_min(0.0))


def _rows(state: list[Tensor] | Tensor, width: int) -> Tensor:
    """The state as features [n, width]: kept flat, as torchmetrics gathers flat lists even from a process that has none."""
    parts = [state] if isinstance(state, Tensor) else state
    return torch.cat(parts).view(-1, width) if parts else torch.zeros(0, width)
