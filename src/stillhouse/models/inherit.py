"""Inheritance: a student that starts with its teacher's neck and head (FGD, arXiv 2111.11837; MGD, 2205.01529; MasKD, 2205.14589)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError


@torch.no_grad()
def inherit(student: nn.Module, source: nn.Module) -> list[str]:
    """Copy into the student whatever lies outside both networks' backbones and agrees in name, shape and dtype; returns the names.

    The backbone of torchvision's detectors is `backbone.body` (its pyramid is the neck), that of segmentation-models-pytorch `encoder`,
    that of other networks what is called `backbone`.

    Raises:
        UserError: if nothing agrees.
    """
    own, given = _outside_backbone(student), _outside_backbone(source)
    agreeing = [name for name, value in own.items() if name in given and _kind(given[name]) == _kind(value)]
    if not agreeing:
        raise UserError(
            f"the student {type(student).__name__} can inherit nothing from {type(source).__name__}: outside their backbones no weights "
            "agree in name and shape; build both with the same neck and head, or leave the inheritance out"
        )
    for name in agreeing:
        own[name].copy_(given[name])
    return agreeing


def _outside_backbone(network: nn.Module) -> dict[str, Tensor]:
    weights = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    body = ".backbone.body." if any(name.startswith("backbone.body.") for name in weights) else ".backbone."
    return {name: value for name, value in weights.items() if body not in f".{name}" and not name.startswith("encoder.")}


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
