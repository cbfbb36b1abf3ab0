"""Decoupled DMD: a teacher of many guided steps becomes a generator of few, by what guidance adds, held by matching distributions.

The generator draws an image in one of its few steps. It is noised again and shown to the frozen teacher and to a fake score, a copy of the
teacher that learns along what the generator makes. Where the two differ, the image moves to where the teacher sees more (distribution
matching, DM); and it moves as the teacher's guidance would move it (CFG augmentation, CA). In DMD both share one noise level. Here each has
its own, and the augmentation's is never noisier than the generator's input was, so that it works on what is still to be decided.

Masked: nothing.
Source: "Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield", ICLR 2026, arXiv 2511.22677; from
DMD2, arXiv 2405.14867, come backward simulation and several steps of the fake score for one of the generator.

    stillhouse distill --method decoupled_dmd --teacher RUN --student diffusers/unet2d:channels=(32,64) --data digits

Sure: the two parts, the schedules "coupled" and "decoupled-hybrid", no guidance in the fake score, no real images: only labels are taken
from the data. Level 1 is noise here and 0 the image; the paper counts the other way, so its "tau > t" is sigma < sigma_t. No training code
is published. After third-party code: both normalisers (the paper's own was not seen); after DMD2: five steps of the fake score for one.
Our reading: the other two schedules. Ours: guidance 3, for small data (SD3.5: 4, SDXL: 8); each sample has its own step, not the batch; one
optimiser's settings for both. The student begins as a copy of the teacher, whatever it knew, and is drawn in few steps from then on.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Distiller, Turn
from stillhouse.distillers.generative.flow import refuse_unless_flow
from stillhouse.errors import UserError
from stillhouse.losses.distribution_matching import SCHEDULES, augmentation, matching, moments, noise_levels, normaliser, surrogate
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.models.sampling import Draws, FlowNetwork, Sampling, clean, guided, noised

GROWN = 1.5
CHOICES = {"schedule": tuple(SCHEDULES), "regulariser": ("dm", "moments", "none"), "normalise": ("branch", "joint", "none")}


class DecoupledDMD(Distiller):
    """1/2 mean (x - sg[x - Delta_DM / n_DM])^2 + 1/2 mean (x - sg[x - Delta_CA / n_CA])^2 for the generator, and for the fake score flow
    matching on what the generator makes; Delta_DM = X_fake - X_c at sigma_DM, Delta_CA = -(guidance - 1) (X_c - X_null) at sigma_CA.

    Args:
        student: the generator, of the teacher's architecture; its weights become the teacher's.
        teacher: a network that makes images in many steps, with a null condition.
        guidance: the teacher's scale that the generator learns without guidance, at least 1 (then there is no augmentation).
        levels: the noise levels of the generator's steps, from 1 down, as [1, 0.75, 0.5, 0.25].
        schedule: "coupled" (DMD); "coupled-cleaner", both no noisier than the input; "decoupled", each its own over the full range;
            "decoupled-hybrid", the method.
        regulariser: what holds the augmentation: "dm"; "moments", mean and variance of each image as in the batch's real ones (an ablation
            of the paper); "none".
        normalise: "branch", each part by the teacher's distance at its level; "joint", both by the guided teacher's at DM's; "none".
        sigma_min: the least noise that is added again.
        sigma_max: the most.
        ratio: K, steps of the fake score for one of the generator: it learns in every K-th step, the fake score in every one.
        fake_rate: what the fake score's learning rate is of the generator's.

    Raises:
        UserError: if a setting is out of range, or the networks do not fit it or each other.
    """

    tasks: ClassVar[tuple[str, ...]] = ("generate",)
    off: ClassVar[dict[str, Any]] = {}
    student: FlowNetwork

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        guidance: float = 3.0,
        levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25),
        schedule: Literal["coupled", "coupled-cleaner", "decoupled", "decoupled-hybrid"] = "decoupled-hybrid",
        regulariser: Literal["dm", "moments", "none"] = "dm",
        normalise: Literal["branch", "joint", "none"] = "branch",
        sigma_min: float = 0.02,
        sigma_max: float = 0.98,
        ratio: int = 5,
        fake_rate: float = 1.0,
    ) -> None:
        _check(guidance, schedule, regulariser, normalise, ratio, fake_rate)
        few = Sampling(tuple(levels), renoise=True)
        if not 0 <= sigma_min < min(few.steps[-1], sigma_max) <= sigma_max <= 1:
            raise UserError(
                f"sigma_min is {sigma_min} and sigma_max {sigma_max}, expected 0 <= sigma_min < sigma_max <= 1, and sigma_min below the "
                f"last level, {few.steps[-1]}: the augmentation works below it"
            )
        _refuse_unless_alike(refuse_unless_flow("student", student), refuse_unless_flow("teacher", teacher), guidance)
        super().__init__(student, teacher)
        self.student.load_state_dict(teacher.state_dict())
        self.fake = copy.deepcopy(self.student)
        self.student.set_sampling(few)
        self.guidance, self.levels, self.schedule, self.regulariser = guidance, few.steps, schedule, regulariser
        self.normalise, self.range, self.ratio, self.fake_rate = normalise, (sigma_min, sigma_max), ratio, fake_rate
        self.figures: dict[str, Tensor] = {}

    def turns(self) -> list[Turn]:
        """The generator in every K-th step, the fake score in every one, each on images made for it."""
        student, fake = (list(network.parameters()) for network in (self.student, self.fake))
        return [Turn("student", student, every=self.ratio), Turn("fake", fake, rate=self.fake_rate)]

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """`dm`, or `moments`, and `ca`, for the generator; `fake` for the fake score."""
        images, labels = batch
        values = (len(self.levels) + 2) * images[0].numel() + 3
        if turn == "fake":
            self.figures = {}
            return {"fake": self.denoising(labels, Draws(len(labels), values, images.device, skip=values))}
        draws = Draws(len(labels), values, images.device)
        noisy, sigma_t = self.simulated(labels, draws)
        made = clean(noisy, self.student(noisy, sigma_t, labels), sigma_t).float()
        matched, augmented = self.deltas(made.detach(), sigma_t, labels, draws)
        rms = [each.detach().square().mean().sqrt() for each in (made, images.float(), matched, augmented)]
        self.figures = {"size": rms[0] / rms[1], "dm_size": rms[2], "ca_size": rms[3]}
        terms = {"dm": surrogate(made, matched)} if self.regulariser == "dm" else {}
        terms |= {"moments": moments(made, images)} if self.regulariser == "moments" else {}
        return terms | ({"ca": surrogate(made, augmented)} if self.guidance != 1 else {})

    @torch.no_grad()
    def simulated(self, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """What the generator is given at a step drawn for each sample, as it comes about when images are drawn; and its noise level."""
        step = (draws.uniform() * len(self.levels)).long()
        noisy = draws.normal(self.student.shape)
        for number, (level, below) in enumerate(zip(self.levels, self.levels[1:], strict=False)):
            further, fresh = step > number, draws.normal(self.student.shape)
            if further.any():
                x, sigma = noisy[further], labels.new_full((int(further.sum()),), level, dtype=noisy.dtype)
                expected = self.student.expected(x, sigma, labels[further]).to(noisy.dtype)
                noisy[further] = noised(expected, fresh[further], torch.full_like(sigma, below))
        return noisy, torch.tensor(self.levels, device=noisy.device)[step]

    @torch.no_grad()
    def deltas(self, made: Tensor, sigma_t: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Delta_DM and Delta_CA at the made images, each divided by its normaliser. Both, or neither, share noise and level."""
        coupled = SCHEDULES[self.schedule][0]
        sigma_DM, sigma_CA = self.noise_levels((draws.uniform(), draws.uniform()), sigma_t)
        noises = [draws.normal(self.student.shape) for _ in range(2)]
        x_DM, x_CA = noised(made, noises[0], sigma_DM), noised(made, noises[0 if coupled else 1], sigma_CA)
        real_DM = self.real(x_DM, sigma_DM, labels)
        matched = matching(self.fake.expected(x_DM, sigma_DM, labels).float(), real_DM)
        divisor = normaliser if self.normalise != "none" else lambda *_: 1.0
        if self.guidance == 1:
            return matched / divisor(made, real_DM), torch.zeros_like(made)
        none = torch.full_like(labels, self.student.null)  # type: ignore[arg-type]
        real_CA, null_CA = real_DM if coupled else self.real(x_CA, sigma_CA, labels), self.real(x_CA, sigma_CA, none)
        augmented = augmentation(real_CA, null_CA, self.guidance)
        if self.normalise == "joint":
            null_DM = null_CA if coupled else self.real(x_DM, sigma_DM, none)
            size = divisor(made, guided(real_DM, null_DM, self.guidance))
            return matched / size, augmented / size
        return matched / divisor(made, real_DM), augmented / divisor(made, real_CA)

    def noise_levels(self, uniform: tuple[Tensor, Tensor], sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        """sigma_DM and sigma_CA, by the schedule."""
        return noise_levels(self.schedule, uniform, sigma_t, *self.range)

    def real(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """The image that the teacher expects."""
        return clean(x, self.teach(x, sigma, labels), sigma).float()

    def denoising(self, labels: Tensor, draws: Draws) -> Tensor:
        """The fake score's flow matching on fresh images of the generator, over the full range, always with their class."""
        noisy, sigma_t = self.simulated(labels, draws)
        with torch.no_grad():
            made = self.student.expected(noisy, sigma_t, labels).float()
        sigma, noise = self.range[0] + (self.range[1] - self.range[0]) * draws.uniform(), draws.normal(self.student.shape)
        velocity: Tensor = self.fake(noised(made, noise, sigma), sigma, labels)
        return (velocity.float() - (noise - made)).square().mean()

    def watch(self) -> dict[str, Tensor]:
        """`size`, the generator's images by the data's (root mean squares); `dm_size` and `ca_size`, of what moves them."""
        return self.figures

    def alarm(self, figures: dict[str, float]) -> str:
        """Says when the augmentation drives images out of the data."""
        size, remedy = figures.get("size", 1.0), "lower guidance or the learning rate, or raise ratio, so that the fake score follows"
        return f"the student's images are {size:.1f} times as strong as the data's: {remedy}" if size > GROWN else ""


def _check(guidance: float, schedule: str, regulariser: str, normalise: str, ratio: int, fake_rate: float) -> None:
    if not 1 <= guidance < float("inf"):
        raise UserError(f"guidance is {guidance}, expected the teacher's scale, a finite number of at least 1")
    if not (isinstance(ratio, int) and ratio >= 1 and 0 < fake_rate < float("inf")):
        raise UserError(f"ratio is {ratio} and fake_rate {fake_rate}, expected a whole number of at least 1 and a positive factor")
    for name, value in (("schedule", schedule), ("regulariser", regulariser), ("normalise", normalise)):
        if value not in CHOICES[name]:
            raise UserError(f"{name} is '{value}', expected one of {', '.join(CHOICES[name])}")
    if regulariser == "none" and guidance == 1:
        raise UserError("regulariser is 'none' and guidance 1: nothing would be learnt")


def _refuse_unless_alike(student: FlowNetwork, teacher: FlowNetwork, guidance: float) -> None:
    if guidance != 1 and teacher.null is None:
        raise UserError(f"guidance is {guidance}, but the teacher knows no null condition: train one with null=true, or say guidance=1")
    shapes = [{name: tensor.shape for name, tensor in network.state_dict().items()} for network in (student, teacher)]
    if shapes[0] != shapes[1] or (student.shape, student.null) != (teacher.shape, teacher.null):
        raise UserError("the student begins as a copy of the teacher and must be built like it: give --student the teacher's own spec")
    if preprocessing_of(student) != preprocessing_of(teacher):
        raise UserError("student and teacher see images normalised differently: train on the data the teacher was trained on")
