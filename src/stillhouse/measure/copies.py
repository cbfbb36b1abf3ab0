"""Copies of a network for measuring: their own hooks and flags, not their own memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from stillhouse.errors import UserError


def on_meta(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes but no values."""
    return _with_tensors(model, lambda tensor: _like(tensor, tensor.detach().to("meta")))


def with_frozen_weights(model: nn.Module) -> nn.Module:
    """A copy on the same memory, without gradients."""
    return _with_tensors(model, lambda tensor: _like(tensor, tensor.detach()))


def with_same_weights(model: nn.Module) -> nn.Module:
    """A copy that owns the very same parameters and buffers: training one trains both."""
    return _with_tensors(model, lambda tensor: tensor)


def _with_tensors(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """deepcopy takes what its memo already has for an object's id, so no parameter or buffer is copied on the way."""
    tensors = [*model.parameters(), *model.buffers()]
    try:
        return copy.deepcopy(model, {id(tensor): change(tensor) for tensor in tensors})
    except (RuntimeError, TypeError) as fault:
        raise UserError(
            f"{type(model).__name__} cannot be copied to be measured ({fault}); keep in it only what copy.deepcopy takes"
        ) from fault


def _like(tensor: Tensor, changed: Tensor) -> Tensor:
    return nn.Parameter(changed, requires_grad=False) if isinstance(tensor, nn.Parameter) else changed
