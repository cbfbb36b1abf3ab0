"""Flow matching: how a teacher that makes images of a class is trained, from labelled images and no teacher.

An image and noise are mixed at a random level; the network is asked for the way from one to the other. Some labels are left out, so that
the network also knows images of any class, which guidance pushes away from when images are drawn.

Masked: nothing; a share of the labels is replaced by the null condition.
Source: Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, arXiv 2210.02747, the straight path; labels are left out after
Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598.

    stillhouse distill --method flow --student diffusers/unet2d:channels=(32,64),guidance=2.0 --data digits

Sure: the path, the loss, labels left out (arXiv 2207.12598 tries 10, 20 and 50 %). Noise levels are uniform, as in the paper; large models
now prefer those in the middle. How images are drawn from the network stands in its spec: `levels` and `guidance`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.errors import UserError
from stillhouse.models.sampling import Draws, FlowNetwork, noised


class Flow(Distiller):
    """mean |v(x_sigma, sigma, c) - (eps - x_0)|^2 with x_sigma = (1 - sigma) x_0 + sigma eps, sigma uniform in [0, 1).

    Args:
        student: a network that makes images, such as diffusers/unet2d.
        drop: the share of labels that are left out, in [0, 1); 0 for a network without a null condition.

    Raises:
        UserError: if the share is out of range, or the network makes no images or knows no null condition.
    """

    tasks: ClassVar[tuple[str, ...]] = ("generate",)
    off: ClassVar[dict[str, Any]] = {}

    def __init__(self, student: nn.Module, *, drop: float = 0.1) -> None:
        network = refuse_unless_flow("student", student)
        if not 0 <= drop < 1:
            raise UserError(f"drop is {drop}, expected the share of labels to leave out, in [0, 1)")
        if drop and network.null is None:
            raise UserError(f"drop is {drop}, but the student knows no null condition: build it with null=true, or say drop=0")
        super().__init__(student)
        self.drop = drop

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """`flow`: the squared difference of velocities, mean over values and images."""
        images, labels = batch
        if tuple(images.shape[1:]) != self.student.shape:
            made, given = ("x".join(map(str, shape)) for shape in (tuple(self.student.shape), images.shape[1:]))  # type: ignore[arg-type]
            raise UserError(f"the student makes images of {made} and the data's are {given}; build it for their size")
        draws = Draws(len(images), 2 + images[0].numel(), images.device)
        sigma, dropped, noise = draws.uniform(), draws.uniform() < self.drop, draws.normal(tuple(images.shape[1:]))
        if self.drop:
            labels = torch.where(dropped, self.student.null, labels)  # type: ignore[arg-type]
        velocity = self.student(noised(images, noise, sigma), sigma, labels)
        return {"flow": (velocity.float() - (noise - images).float()).square().mean()}


def refuse_unless_flow(role: str, network: nn.Module) -> FlowNetwork:
    """The network, which makes images.

    Raises:
        UserError: if it does not.
    """
    if not isinstance(network, FlowNetwork):
        raise UserError(
            f"the {role} is a {type(network).__name__}, expected a network that makes images, such as diffusers/unet2d; a velocity of your "
            "own is wrapped in stillhouse.models.sampling.FlowNetwork"
        )
    return network
