"""A CNN and a vision transformer learn together from labels, and each teaches the other where it is the more reliable one.

Nobody is trained beforehand and nothing is frozen. Each adapts its low-layer map to the other's (heterogeneous feature distillation, HFD);
region by region, features are taught in the direction of the smaller error, and so are logits pixel by pixel (bidirectional selective
distillation, BSD). Both students are kept, measured and can be used alone; the adapters are in neither.

Masked: the distillation terms, by binary masks over pixels and over regions that say who is taught, made at every step from both students'
errors on the labels. Where both err alike nobody is taught; pixels without a label take no part. No input is masked.
Source: after Zhu et al., "A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic Segmentation",
ICCV 2023, arXiv 2307.12574.

    stillhouse distill --method cnn_transformer_collab --student smp/deeplabv3plus --partner smp/segformer:encoder=mit_b0 --data voc:DIR

Sure, from the abstract: two students of these kinds, online; HFD between low layers; region-wise BSD, whose direction is determined, in
feature space; pixel-wise BSD in logit space. No code was found.
Our reading, all of the rest: reliability is the cross-entropy with the label; regions are cells of a grid; each adapts itself to the
other's map, which is detached (a 1x1 convolution without bias, normalised over the image, so that it cannot become a constant); regions
are compared by cosine behind a linear map; ties teach nobody; the distances, all weights, and a start on labels alone. What one student
makes of the other's low-layer map in its own later layers, another reading of HFD, is not offered.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillers.base import Clock
from stillhouse.distillers.pair import TURN, Pair, adapter, check_choices, check_weights
from stillhouse.errors import UserError
from stillhouse.losses.mutual import affinity_distance, masked_mean, pixel_divergence, place_distance
from stillhouse.masks.reliability import directions, leads, pixel_errors, region_means
from stillhouse.models.levels import OneMap
from stillhouse.tasks.labels import IGNORED, on_pixels

ONE_WAY, ALIKE = 0.98, 0.003
CHOICES = {
    **{"hfd_by": ("cosine", "mse", "kl"), "region_of": ("grid", "classes")},
    **{"region_by": ("cosine", "affinity"), "normalise": ("taught", "all")},
}


class CNNTransformerCollab(Pair):
    """CE^S + CE^P + hfd (D(a(F^S), F^P) + D(a(F^P), F^S)) + region L_reg + pixel (L_pix^S + L_pix^P).

    Args:
        student: a segmenter, in the paper a CNN.
        partner: another of the same classes, in the paper a vision transformer.
        low: where the student's low-layer map is, a role (backbone) or a module; by default the first of its backbone's maps.
        high: where its high-layer map is; by default the last of its backbone's maps.
        partner_low: as `low`, of the partner.
        partner_high: as `high`, of the partner.
        hfd: weight of both HFD terms, >= 0.
        region: weight of region-wise BSD, >= 0.
        pixel: weight of both pixel-wise terms, >= 0.
        temperature: tau > 0 of the pixels' divergence.
        hfd_by: D: "cosine" (1 - cos over channels), "mse" of maps of length 1, "kl" of softmaxed channels; means over places.
        regions: how many cells a side the grid of regions has, at most as many as the smaller high-layer map.
        region_of: "grid", or "classes": the pixels of one class in one image.
        region_by: "cosine", 1 - cos behind a linear map; "affinity", squared differences of how regions are like each other, without one.
        normalise: pixel-wise terms are means over the pixels "taught" this way (a rare direction is loud), or over "all" that have labels.
        warmup: the share of the training in which there are only labels, in [0, 1).
        partner_rate: what the run's learning rate is multiplied by for the partner, > 0.
        partner_optimizer: another of timm's optimisers for the partner, or "".

    Raises:
        UserError: if a setting is out of range; in the first forward pass, if classes differ or there are more regions than places.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segment",)
    off: ClassVar[dict[str, Any]] = {"hfd": 0.0, "region": 0.0, "pixel": 0.0}
    begun: Tensor
    led: Tensor

    def __init__(
        self,
        student: nn.Module,
        partner: nn.Module,
        *,
        low: str = "",
        high: str = "",
        partner_low: str = "",
        partner_high: str = "",
        hfd: float = 0.1,
        region: float = 0.1,
        pixel: float = 1.0,
        temperature: float = 1.0,
        hfd_by: Literal["cosine", "mse", "kl"] = "cosine",
        regions: int = 8,
        region_of: Literal["grid", "classes"] = "grid",
        region_by: Literal["cosine", "affinity"] = "cosine",
        normalise: Literal["taught", "all"] = "taught",
        warmup: float = 0.05,
        partner_rate: float = 1.0,
        partner_optimizer: str = "",
    ) -> None:
        check_weights(temperature, hfd=hfd, region=region, pixel=pixel)
        check_choices(CHOICES, hfd_by=hfd_by, region_of=region_of, region_by=region_by, normalise=normalise)
        if regions < 1:
            raise UserError(f"regions is {regions}, expected how many cells a side the grid has, at least 1")
        if not 0 <= warmup < 1:
            raise UserError(f"warmup is {warmup}, expected the share of the training on labels alone, from 0 to below 1")
        super().__init__(student, partner, partner_rate=partner_rate, partner_optimizer=partner_optimizer)
        places = ((student, low, 0), (partner, partner_low, 0), (student, high, -1), (partner, partner_high, -1))
        self.maps = [OneMap(network, place or "backbone", which) for network, place, which in places]
        low_S, low_P, high_S, high_P = (each.channels for each in self.maps)
        self.adapter, self.partner_adapter = adapter(low_S, low_P), adapter(low_P, low_S)
        by_cosine = region_by == "cosine"
        self.projector = nn.Linear(high_S, high_P, bias=False) if by_cosine else nn.Identity()
        self.partner_projector = nn.Linear(high_P, high_S, bias=False) if by_cosine else nn.Identity()
        self.hfd, self.region, self.pixel, self.temperature, self.warmup = hfd, region, pixel, temperature, warmup
        self.hfd_by, self.regions, self.region_of, self.region_by, self.normalise = hfd_by, regions, region_of, region_by, normalise
        self.register_buffer("begun", torch.tensor(float(warmup == 0)))
        self.register_buffer("led", torch.zeros(IGNORED + 1))  # by class: 1, the student erred less; -1, the partner
        self.figures: dict[str, Tensor] = {}

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = TURN) -> dict[str, Tensor]:
        """The labels' terms of both; `hfd`, `region` and `pixel`, what teaches the student, and the same of the partner."""
        logits_S, logits_P, terms = self.both(batch)
        low_S, low_P, high_S, high_P = (each.take() for each in self.maps)
        labels, counts = batch[1], batch[1] != IGNORED
        z_S, z_P = (on_pixels(logits.float(), labels.shape[-2:]) for logits in (logits_S, logits_P))
        errors_S, errors_P = pixel_errors(z_S, labels), pixel_errors(z_P, labels)
        taught, over = self.directions(errors_S, errors_P, counts), counts if self.normalise == "all" else None
        number = self.regions if self.region_of == "grid" else z_S.shape[1]
        pooled = (torch.stack([errors_S, errors_P], 1), high_S, high_P)
        errors, *highs = (region_means(each, labels, self.region_of, number) for each in pooled)
        taught_regions = self.directions(errors.means_BRC[..., 0], errors.means_BRC[..., 1], errors.counts_BR)
        ways = (
            ("", self.adapter, self.projector, (low_S, low_P), highs, (z_S, z_P)),
            ("partner_", self.partner_adapter, self.partner_projector, (low_P, low_S), highs[::-1], (z_P, z_S)),
        )
        for (who, adapt, project, low, high, z), pixels, regions in zip(ways, taught, taught_regions, strict=True):
            apart = place_distance(on_pixels(adapt(low[0]), low[1].shape[-2:]), low[1].detach(), self.hfd_by)
            share = F.adaptive_avg_pool2d(counts.float(), (apart.shape[-2], apart.shape[-1]))
            apart_R = self.apart(project, high[0].means_BRC, high[1].means_BRC, errors.counts_BR)
            weighted = {
                "hfd": self.hfd * masked_mean(apart, share),
                "region": self.region * masked_mean(apart_R, regions, errors.counts_BR),
                "pixel": self.pixel * masked_mean(pixel_divergence(z[0], z[1].detach(), self.temperature), pixels, over),
            }
            terms |= {f"{who}{name}": self.begun * term for name, term in weighted.items()}
        self.figures = self.seen(errors_S, errors_P, labels, taught, taught_regions)
        return terms

    def directions(self, errors_S: Tensor, errors_P: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Where the student is taught, and where the partner is: for pixels, and for regions."""
        return directions(errors_S, errors_P, counts)

    def apart(self, project: nn.Module, own_BRC: Tensor, others_BRC: Tensor, counts_BR: Tensor) -> Tensor:
        """D_f of every region, [B, R]; the other's features have no gradient."""
        if self.region_by == "affinity":
            return affinity_distance(own_BRC, others_BRC.detach(), counts_BR)
        return 1 - F.cosine_similarity(project(own_BRC).float(), others_BRC.detach(), dim=-1)

    @torch.no_grad()
    def seen(self, errors_S: Tensor, errors_P: Tensor, labels: Tensor, taught: Any, regions: Any) -> dict[str, Tensor]:
        """What `watch` tells; in training mode it also remembers who led in which class."""
        count = (labels != IGNORED).sum().clamp_min(1)
        by_class = leads(errors_S, errors_P, labels)
        flips = (by_class * self.led < 0).sum() / (by_class * self.led != 0).sum().clamp_min(1)
        if self.training:
            self.led.copy_(torch.where(by_class == 0, self.led, by_class))
        figures = {"margin": (errors_S - errors_P).abs().sum() / count, "flips": flips}
        for who, pixels, cells in zip(("student", "partner"), taught, regions, strict=True):
            figures |= {f"taught_{who}": pixels.sum() / count, f"taught_{who}_regions": cells.float().mean()}
        return figures

    def watch(self) -> dict[str, Tensor]:
        """Shares of pixels and regions at which each is `taught`; `margin` of the errors; `flips`, classes whose leader is another now."""
        return self.figures

    def alarm(self, figures: dict[str, float]) -> str:
        """Says when one teaches everywhere, and when both have learnt the training's labels so well that who teaches is chance."""
        if not (self.region or self.pixel):
            return ""
        for who, other in (("student", "partner"), ("partner", "student")):
            if figures.get(f"taught_{who}", 0.5) > ONE_WAY:
                return f"the {other} teaches at {figures[f'taught_{who}']:.1%} of the pixels, one way only: try another partner_rate"
        margin = figures.get("margin", 1.0)
        return f"both students err alike on the training images (by {margin:.4f}): who teaches is chance now" if margin < ALIKE else ""

    def after_update(self, clock: Clock) -> None:
        """Labels alone first: who is the more reliable one is chance before anything is learnt."""
        self.begun.fill_(float(clock.progress >= self.warmup))

    @torch.no_grad()
    def look(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Pixels at which each is taught, and regions of the grid: 1 where the student is taught, 0 the partner, 1/2 neither."""
        labels = batch[1]
        errors = [pixel_errors(on_pixels(z.float(), labels.shape[-2:]), labels) for z in self.both(batch)[:2]]
        taught_S, taught_P = self.directions(errors[0], errors[1], labels != IGNORED)
        drawn = {"student is taught": taught_S.float(), "partner is taught": taught_P.float()}
        if self.region_of == "grid":
            means, counts = region_means(torch.stack(errors, 1), labels, "grid", self.regions)
            taught_S, taught_P = (each.float() for each in self.directions(means[..., 0], means[..., 1], counts))
            drawn["regions"] = ((1 + taught_S - taught_P) / 2).unflatten(1, (self.regions, self.regions))
        return drawn
