"""Two students that learn together, in one pass and with an optimiser each; both are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Distiller, Turn, feed
from stillhouse.errors import UserError
from stillhouse.models.outputs import logits_of
from stillhouse.tasks.labels import losses_of

TURN = "students"


class Pair(Distiller):
    """A student and its partner: neither is frozen, and what the one is taught by the other has no gradient to the other.

    Args:
        student: the network to train; batches come as it wants them.
        partner: the other one; images are made ready for it.
        partner_rate: what the run's learning rate is multiplied by for the partner, > 0.
        partner_optimizer: another of timm's optimisers for it, or "".

    Raises:
        UserError: if both are one network, or the rate is out of range.
    """

    frozen: ClassVar[tuple[str, ...]] = ()

    def __init__(self, student: nn.Module, partner: nn.Module, *, partner_rate: float = 1.0, partner_optimizer: str = "") -> None:
        if {id(parameter) for parameter in student.parameters()} & {id(parameter) for parameter in partner.parameters()}:
            raise UserError("student and partner are one network or share weights, expected two networks")
        if not 0 < partner_rate < float("inf"):
            raise UserError(f"partner_rate is {partner_rate}, expected what the learning rate is multiplied by, such as 1 or 0.1")
        super().__init__(student)
        self.partner = partner
        self.for_partner = feed(student, partner)
        self.partner_rate, self.partner_optimizer = partner_rate, partner_optimizer

    def turns(self) -> list[Turn]:
        """One pass, two optimisers: all that is named after the partner is the partner's."""
        own: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                own[name.startswith("partner")].append(parameter)
        return [Turn(TURN, own[False]), Turn(TURN, own[True], optimizer=self.partner_optimizer or None, rate=self.partner_rate)]

    def both(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The logits of both, and what the labels say to each. Both draw the same numbers, those that each would draw alone."""
        images, targets = batch
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            output = self.student(images)
        other = self.partner(self.for_partner(images))
        terms = losses_of(output, targets) | {f"partner_{name}": term for name, term in losses_of(other, targets).items()}
        logits_S, logits_P = logits_of(output), logits_of(other)
        if logits_S.shape[1] != logits_P.shape[1]:
            raise UserError(f"the student knows {logits_S.shape[1]} classes and the partner {logits_P.shape[1]}, expected the same classes")
        return logits_S, logits_P, terms

    @property
    def products(self) -> dict[str, nn.Module]:
        """Both, each alone."""
        return {"student": self.student, "partner": self.partner}

    def examined(self, kept: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Both; validation's images are made ready for the partner as the training's are."""
        return {"student": kept["student"], "partner": nn.Sequential(self.for_partner, kept["partner"])}


def check_weights(temperature: float, **weights: float) -> None:
    """Refuses weights that are negative or not finite, and temperatures that are not positive and finite.

    Raises:
        UserError: naming the value and what was expected.
    """
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise UserError(f"{name} is {value}, expected the weight of a term, a finite number of at least 0")
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature is {temperature}, expected a positive finite number, such as 1 or 4")


def check_choices(choices: Mapping[str, tuple[str, ...]], **chosen: str) -> None:
    """Refuses what is none of the choices there are.

    Raises:
        UserError: naming them.
    """
    for name, value in chosen.items():
        if value not in choices[name]:
            raise UserError(f"{name} is '{value}', expected one of {', '.join(choices[name])}")


def adapter(own: int, others: int) -> nn.Sequential:
    """A map with the other's channels, standardised over channels and places of an image: without a bias it cannot become a constant."""
    return nn.Sequential(nn.Conv2d(own, others, 1, bias=False), nn.GroupNorm(1, others, affine=False))
