"""How networks lie in memory and what they keep of a forward pass: it changes how fast a step is and how much memory it needs, no more."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stillhouse.errors import UserError


def is_convolutional(network: nn.Module) -> bool:
    """Whether it has more convolutions than the one that embeds patches."""
    return sum(isinstance(module, nn.Conv2d) for module in network.modules()) > 1


def channels_last(network: nn.Module, asked: bool | None) -> nn.Module:
    """The network with its convolutions' weights in channels-last order, which their inputs and outputs then follow.

    By default (None) those of convolutional networks: there a training step took 0.72 to 0.94 of the time in five of six networks and as
    long in one; a transformer's took as long (`benchmarks/student.py`).
    """
    wanted = is_convolutional(network) if asked is None else asked
    return network.to(memory_format=torch.channels_last) if wanted else network  # type: ignore[call-overload, no-any-return]


def checkpointed(student: nn.Module) -> None:
    """Lets a student forget its activations and compute them again in the backward pass.

    Raises:
        UserError: if its library has no such switch for it.
    """
    switch: Any = getattr(student, "set_grad_checkpointing", None) or getattr(student, "gradient_checkpointing_enable", None)
    try:
        if switch is None:
            raise NotImplementedError
        switch()
    except (NotImplementedError, ValueError, AssertionError) as error:
        raise UserError(
            f"{type(student).__name__} cannot compute its activations again; leave --checkpointing out, or take a student of timm or "
            "transformers that can"
        ) from error
