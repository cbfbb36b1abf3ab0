"""A few images with features, learnt so that a network trained on them alone answers as a teacher does on all images. No labels.

The pairs are what learns: at each step a network of a pool, which is itself learning the pairs and begins anew now and then, gives its
features of the pairs; the best linear layer from these to the pairs' targets is known in closed form; what that layer says of real images
should be what the teacher says. So the pairs learn through having been learnt from. The run leaves a data set, RUN/data, not a network.

Masked: nothing. The paper's point is to take masks and augmentation out of the inner training, where they bias the gradient.
Source: Lee et al., "Self-Supervised Dataset Distillation for Transfer Learning", ICLR 2024, arXiv 2310.06511.

    stillhouse distill --method krr_st --teacher RUN_OR_SPEC --student SPEC --data imagefolder:DIR --lr 1e-4

Sure, from the official code: the pool, both losses, the relative ridge without gradient, the bias, features that are not pooled, one
augmented view for teacher and network, the defaults. Officially AdamW without decay, its rate falling linearly from 1e-4 or 1e-5 over
160,000 steps of 1,024 images, with random crops and flips; here it is the run's recipe and augmentation. Where we depart: pairs are
normalised as real images are (the official code feeds them raw to the networks, but asks the teacher about normalised ones); a network
that begins anew counts from 0 (officially its counter is not reset, and from then on it is new at every visit); equations are solved in
fp64. Our reading: fresh networks are the student with weights drawn anew by its own layers; the student itself never learns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.data.condensed import Condensed
from stillhouse.distillers.base import Clock, Distiller, Turn
from stillhouse.errors import UserError
from stillhouse.losses.ridge import ridge_distance
from stillhouse.models.imitator import PoolNetwork, imitate, refuse_without_features
from stillhouse.models.preprocessing import preprocessing_of

HELD_OUT = 3
"""How many fresh networks, which the pairs have not seen, say how good they are."""


class KRRST(Distiller):
    """mean |K_rs (K_ss + lambda I)^-1 Y - g(x_r)|^2 over real images x_r, with Y and the images behind K_ss learnt; lambda = ridge tr K_ss.

    In eval mode the networks are fresh ones that are not in the pool: `val_krr` is of networks the pairs have never seen.

    Args:
        student: the architecture of the networks, with `forward_features`, as timm's encoders have it; its weights are not used.
        teacher: an encoder, images to features [B, D].
        pairs: m, how many images are learnt, at least 1 and no more than there are to begin with.
        pool: how many networks are learning the pairs at a time.
        life: steps after which a network of the pool begins anew, at least 2.
        inner_lr: learning rate of the networks, > 0.
        inner_decay: their weight decay, >= 0.
        ridge: lambda as a share of the trace of K_ss, > 0.
        examined_epochs: how often a fresh network sees all pairs before it is measured.
        examined_batch: pairs it sees in one of its steps.

    Raises:
        UserError: if a setting is out of range, or the student's features cannot be told from its head.
    """

    frozen: ClassVar[tuple[str, ...]] = ("teacher", "student", "held_out")
    off: ClassVar[dict[str, Any]] = {}
    tasks: ClassVar[tuple[str, ...]] = ("encode",)
    visited: Tensor
    data: Any
    networks: Any
    held_out: Any

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        pairs: int = 1000,
        pool: int = 10,
        life: int = 1000,
        inner_lr: float = 0.1,
        inner_decay: float = 1e-3,
        ridge: float = 1e-6,
        examined_epochs: int = 1000,
        examined_batch: int = 256,
    ) -> None:
        counts = {"pairs": (pairs, 1), "pool": (pool, 1), "life": (life, 2), "examined_batch": (examined_batch, 1)}
        for name, (value, least) in {**counts, "examined_epochs": (examined_epochs, 0)}.items():
            if value < least:
                raise UserError(f"{name} is {value}, expected a whole number of at least {least}")
        if not 0 < ridge < float("inf"):
            raise UserError(f"ridge is {ridge}, expected a share of the trace above 0: without it the equations need not have an answer")
        if not (0 < inner_lr < float("inf") and 0 <= inner_decay < float("inf")):
            raise UserError(
                f"inner_lr is {inner_lr} and inner_decay {inner_decay}, expected a finite rate above 0 and a decay of at least 0"
            )
        refuse_without_features(student)
        super().__init__(student.requires_grad_(False), teacher)
        self.pairs, self.pool, self.life, self.ridge = pairs, pool, life, ridge
        self.inner = {"lr": inner_lr, "decay": inner_decay}
        self.examining: dict[str, Any] = {"epochs": examined_epochs, "batch": examined_batch, **self.inner}
        self.data = self.networks = self.held_out = None
        self.register_buffer("visited", torch.zeros((), dtype=torch.int64))

    def prepare(self, batches: Iterable[tuple[Any, Any]]) -> None:
        """The pairs begin as random real images with the teacher's features, the pool's networks as having learnt these for a while."""
        images = self.begin_with(batches)
        targets = torch.cat([self.teach(some).float() for some in images.split(256)])
        if targets.ndim != 2:
            raise UserError(
                f"the teacher answers {tuple(targets.shape)} to {len(images)} images, expected features [B, D]; name an encoder"
            )
        known = preprocessing_of(self.student)
        mean, std = (known.mean, known.std) if known else ((0.0,) * images.shape[1], (1.0,) * images.shape[1])
        shift, scale = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
        self.data = Condensed(images * scale + shift, targets, mean, std)
        fresh = [PoolNetwork(self.student, targets.shape[1], images) for _ in range(self.pool + HELD_OUT)]
        self.networks, self.held_out = nn.ModuleList(fresh[: self.pool]), nn.ModuleList(fresh[self.pool :]).eval()
        for network in self.networks:
            for _ in range(int(torch.randint(1, self.life, ()))):
                network.learn(*self.learnt(), **self.inner)
        self.visited.fill_(int(torch.randint(self.pool, ())))

    def begin_with(self, batches: Iterable[tuple[Any, Any]]) -> Tensor:
        """As many images as there are to be pairs, drawn at random in one pass, normalised [m, C, H, W]."""
        keys, kept = torch.zeros(0), torch.zeros(0)
        for images, _ in batches:
            keys = torch.cat([keys, torch.rand(len(images))])
            kept = torch.cat([kept, images]) if len(kept) else images
            first = keys.topk(min(self.pairs, len(keys))).indices
            keys, kept = keys[first], kept[first.to(kept.device)]
        if len(kept) < self.pairs:
            raise UserError(f"there are {len(kept)} training images for {self.pairs} pairs; set --pairs to {len(kept)} or less")
        return kept

    def turns(self) -> list[Turn]:
        """The pairs alone."""
        return [Turn("pairs", [self.data.images, self.data.targets] if self.data is not None else [])]

    def forward(self, batch: tuple[Tensor, Any], turn: str = "pairs") -> dict[str, Tensor]:
        """`krr`: of the pool's network that is visited; in eval mode, the mean of fresh networks."""
        features_T = self.teach(batch[0])
        if features_T.shape[1] != self.data.targets.shape[1]:
            raise UserError(f"the teacher answers {features_T.shape[1]} numbers, and the pairs' targets have {self.data.targets.shape[1]}")
        networks = [self.networks[int(self.visited)]] if self.training else self.held_out
        terms = [self.distance(network.eval(), batch[0], features_T) for network in networks]
        return {"krr": torch.stack(terms).mean().float()}

    def distance(self, network: PoolNetwork, images: Tensor, features_T: Tensor) -> Tensor:
        """How far the best linear layer on this network's features of the pairs is from the teacher on these images."""
        with torch.autocast(images.device.type, enabled=False):  # what half precision rounds away is larger than the ridge
            with torch.no_grad():
                features_r = network.embed(images.float())
            return ridge_distance(network.embed(self.data.fed()), self.data.targets, features_r, features_T, self.ridge)

    def after_update(self, clock: Clock) -> None:
        """The network that was visited learns the new pairs for a step, or begins anew; then the next one is drawn."""
        network = self.networks[int(self.visited)]
        if network.age >= self.life:
            network.begin()
        else:
            network.learn(*self.learnt(), **self.inner)
        self.visited.fill_(int(torch.randint(self.pool, ())))

    def learnt(self) -> tuple[Tensor, Tensor]:
        """What the pool's networks learn: the pairs as they are now."""
        return self.data.fed().detach(), self.data.targets.detach()

    def watch(self) -> dict[str, Tensor]:
        """`pool_age`: how many steps the pool's networks have learnt, on average."""
        return {"pool_age": torch.stack([network.age for network in self.networks]).float().mean()}

    @property
    def product(self) -> nn.Module:
        """The pairs."""
        return self.data  # type: ignore[no-any-return]

    @property
    def products(self) -> dict[str, nn.Module]:
        """A data set."""
        return {"data": self.product}

    def examined(self, kept: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The features of a fresh network that has learnt the pairs: all that its last layer saw of an image, side by side."""
        data: Any = kept["data"]
        network = imitate(self.student, data.fed().detach(), data.targets.detach(), **self.examining)
        network.head = nn.Identity()
        return {"student": network}
