"""What a teacher in low precision is worth: how far its answers are from those of the same network in full precision."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.losses.logits import kl_divergence
from stillhouse.models.outputs import logits_of
from stillhouse.models.precision import lowered


@dataclass(frozen=True)
class PrecisionError:
    """What a network lost.

    Attributes:
        precision: of bf16, fp16, int8 and fp8.
        by: what computes it: torch, openvino or torchao.
        kl: KL(softmax(z) || softmax(z of low precision)) in nats, mean over images (and places, of a segmenter).
        agreement: the share in [0, 1] of images (places) with the same most likely class.
        images: how many were looked at.
    """

    precision: str
    by: str
    kl: float
    agreement: float
    images: int

    def __str__(self) -> str:
        """A sentence without its full stop."""
        return (
            f"{self.precision} by {self.by}: KL {self.kl:.2g} nats from full precision, the same first class in {self.agreement:.1%} "
            f"({self.images} validation images, all tokens)"
        )


def lowered_within(
    teacher: nn.Module, precision: str, limit: float, batches: Iterable[Tensor], feed: nn.Module, device: torch.device
) -> tuple[nn.Module, PrecisionError]:
    """The teacher in low precision on `device`, and what it lost by that.

    Args:
        teacher: a network that returns logits [B, K] or [B, K, H, W]; it stays as it is.
        precision: bf16, fp16, int8 or fp8.
        limit: the largest KL in nats that is accepted, at least 0.
        batches: images as the student wants them; at least one.
        feed: makes them ready for the teacher.
        device: where the teacher will run.

    Raises:
        UserError: if the teacher or the device cannot have this precision, or the error is above the limit.
    """
    if not 0 <= limit < math.inf:
        raise UserError(f"teacher_error is {limit}, expected a KL divergence in nats, a finite number of at least 0")
    fed = [feed(images) for images in batches]
    network, by = lowered(teacher, precision, device)
    full = _logits(teacher.eval().to(device), fed, device)
    low = _logits(network, fed, device)
    agreement = (full.argmax(1) == low.argmax(1)).float().mean().item()
    error = PrecisionError(precision, by, kl_divergence(low, full).item(), agreement, sum(map(len, fed)))
    if not error.kl <= limit:  # also when it is no number
        raise UserError(
            f"the teacher answers too differently in {error}; --teacher-error {limit:g} is what is accepted: "
            "take a higher --teacher-precision, or accept more"
        )
    return network, error


@torch.no_grad()
def _logits(network: nn.Module, fed: list[Tensor], device: torch.device) -> Tensor:
    """[images, K] or [images x places, K] in fp32."""
    found = torch.cat([logits_of(network(images.to(device))).float().cpu() for images in fed])
    return found if found.ndim == 2 else found.movedim(1, -1).flatten(0, -2)
