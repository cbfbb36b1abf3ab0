"""Deep mutual learning: two untrained students learn from labels and from each other's probabilities, everywhere and both ways.

Both are kept. Source: Zhang, Xiang, Hospedales and Lu, "Deep Mutual Learning", CVPR 2018, arXiv 1706.00384.

Masked: nothing.

    stillhouse distill --method dml --student timm/resnet18 --partner timm/vit_tiny_patch16_224 --data SPEC

Sure: the loss of each, CE + KL(other || own) with weight 1 and no temperature, the other's probabilities as constants. Our reading: to
segment it holds for each pixel that has a label, as a mean. Departures: two networks, not a cohort; both learn from one pass, where the
paper's second network learns from what the first says after its update; weight and temperature are settings.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from stillhouse.distillers.pair import TURN, Pair, check_weights
from stillhouse.losses.logits import kl_divergence
from stillhouse.losses.mutual import masked_mean, pixel_divergence
from stillhouse.tasks.labels import IGNORED, on_pixels


class DML(Pair):
    """CE(z_S, y) + CE(z_P, y) + alpha tau^2 (KL(p_P || p_S) + KL(p_S || p_P)), p the softmax of z / tau.

    Args:
        student: a classifier or segmenter.
        partner: another of the same classes.
        alpha: weight of what each says to the other, >= 0; 0 is two trainings of their own.
        temperature: tau > 0.
        partner_rate: what the run's learning rate is multiplied by for the partner, > 0.
        partner_optimizer: another of timm's optimisers for the partner, or "".

    Raises:
        UserError: if a setting is out of range, or in the first forward pass if classes differ.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classify", "segment")
    off: ClassVar[dict[str, Any]] = {"alpha": 0.0}

    def __init__(
        self,
        student: nn.Module,
        partner: nn.Module,
        *,
        alpha: float = 1.0,
        temperature: float = 1.0,
        partner_rate: float = 1.0,
        partner_optimizer: str = "",
    ) -> None:
        check_weights(temperature, alpha=alpha)
        super().__init__(student, partner, partner_rate=partner_rate, partner_optimizer=partner_optimizer)
        self.alpha, self.temperature = alpha, temperature

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = TURN) -> dict[str, Tensor]:
        """The labels' terms of both; `kl`, what the partner tells the student, and `partner_kl`."""
        logits_S, logits_P, terms = self.both(batch)
        told, told_partner = (self.told(*pair, batch[1]) for pair in ((logits_S, logits_P), (logits_P, logits_S)))
        return {**terms, "kl": self.alpha * told, "partner_kl": self.alpha * told_partner}

    def told(self, own: Tensor, other: Tensor, labels: Tensor) -> Tensor:
        """tau^2 KL(other || own), mean over the batch, or over the pixels that have labels."""
        if own.ndim == 2:
            return kl_divergence(own, other.detach(), self.temperature)
        own, other = (on_pixels(logits.float(), labels.shape[-2:]) for logits in (own, other.detach()))
        return masked_mean(pixel_divergence(own, other, self.temperature), labels != IGNORED)
