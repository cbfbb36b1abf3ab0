"""Networks that imitate another's features, and begin anew: an encoder with a linear layer on all of its last map, trained by plain SGD."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError

MOMENTUM = 0.9


@torch.no_grad()
def redraw(network: nn.Module) -> nn.Module:
    """The same network with new random weights and statistics, from torch's generator: every layer's own, then those its library draws.

    A parameter that belongs to no layer (a class token, say) and that the network's own `init_weights` does not draw stays as it is.
    """
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
    draw = getattr(network, "init_weights", None)
    if callable(draw) and all(each.default is not inspect.Parameter.empty for each in inspect.signature(draw).parameters.values()):
        draw()
    return network


def refuse_without_features(network: nn.Module) -> None:
    """Refuses a network whose features cannot be told from its head.

    Raises:
        UserError: saying so.
    """
    if not callable(getattr(network, "forward_features", None)):
        raise UserError(
            f"{type(network).__name__} has no forward_features, by which its features are told from its head; name a network of timm's"
        )


class Imitator(nn.Module):
    """Images [B, C, H, W] -> numbers [B, D]: a linear layer on the features of an encoder before they are pooled.

    Args:
        encoder: a network whose architecture is taken (with `forward_features`, as timm's have it); its weights are drawn anew.
        outputs: D.
        images: some images [n, C, H, W] as the encoder takes them, to see how many features it has.

    Raises:
        UserError: if the encoder has no such part.
    """

    head: Any

    def __init__(self, encoder: nn.Module, outputs: int, images: Tensor) -> None:
        super().__init__()
        refuse_without_features(encoder)
        self.encoder = redraw(copy.deepcopy(encoder)).requires_grad_(True)
        self.encoder.eval()
        with torch.no_grad():
            width = self.embed(images[:1]).shape[1]
        self.head = nn.Linear(width, outputs, device=images.device)
        self.train()

    def embed(self, images: Tensor) -> Tensor:
        """The features of every place, side by side [B, d]."""
        features: Tensor = self.encoder.forward_features(images)  # type: ignore[operator]
        return features.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.head(self.embed(images))
        return answers


class PoolNetwork(Imitator):
    """An imitator that learns step by step and begins anew; its age and its momentum are buffers, so that a checkpoint has them.

    Its parameters require no gradient: nobody else trains them.

    Args:
        encoder, outputs, images: as for `Imitator`.
    """

    age: Tensor

    def __init__(self, encoder: nn.Module, outputs: int, images: Tensor) -> None:
        super().__init__(encoder, outputs, images)
        self.requires_grad_(False)
        self.register_buffer("age", torch.zeros((), dtype=torch.int64, device=images.device))
        for number, parameter in enumerate(self.parameters()):
            self.register_buffer(f"momentum_{number}", torch.zeros_like(parameter))

    @torch.no_grad()
    def begin(self) -> None:
        """Becomes a fresh network: new weights and statistics, no momentum, age 0."""
        redraw(self.encoder)
        self.head.reset_parameters()
        self.age.zero_()
        for number, _ in enumerate(self.parameters()):
            self.get_buffer(f"momentum_{number}").zero_()

    def learn(self, images: Tensor, targets: Tensor, lr: float, decay: float) -> None:
        """A step of SGD with momentum on the mean squared error of all the images at once, in training mode."""
        self.train()
        parameters = list(self.parameters())
        with torch.enable_grad():
            self.requires_grad_(True)
            gradients = torch.autograd.grad(F.mse_loss(self(images), targets), parameters, allow_unused=True)
            self.requires_grad_(False)
        with torch.no_grad():
            for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                if gradient is None:  # such as the last norm of a network that is asked for its features before it
                    continue
                momentum = self.get_buffer(f"momentum_{number}")
                momentum.mul_(MOMENTUM).add_(gradient).add_(parameter, alpha=decay)
                parameter.sub_(momentum, alpha=lr)
        self.age += 1
        self.eval()


def imitate(encoder: nn.Module, images: Tensor, targets: Tensor, *, epochs: int, batch: int, lr: float, decay: float) -> Imitator:
    """A fresh network of the encoder's architecture, trained on these images alone: SGD with momentum, squared error, no augmentation.

    What is random follows from torch's generator.

    Args:
        encoder: a network whose architecture is taken.
        images: as it takes them [m, C, H, W].
        targets: what it is to answer [m, D].
        epochs: how often all are seen.
        batch: images a step, at most.
        lr, decay: learning rate, constant, and weight decay.
    """
    with torch.enable_grad():
        network = Imitator(encoder, targets.shape[1], images)
        optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=decay)
        for _ in range(epochs):
            for some in torch.randperm(len(images)).to(images.device).split(batch):
                optimizer.zero_grad()
                F.mse_loss(network(images[some]), targets[some]).backward()
                optimizer.step()
    return network.eval()
