"""Batches of any task: tensors, lists of images and of boxes, or graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_device(value: Any, device: torch.device) -> Any:
    """The same on a device: tensors, and lists, tuples and dictionaries of them."""
    if hasattr(value, "to"):  # tensors, and batches of graphs
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: on_device(each, device) for name, each in value.items()}
    return [on_device(each, device) for each in value]


def in_parts(value: Any, parts: int) -> list[Any]:
    """A batch's ids, images or targets, in so many equal parts."""
    if isinstance(value, Tensor):
        return list(value.chunk(parts))
    each = len(value) // parts
    pieces = [value[start : start + each] for start in range(0, len(value), each)]
    return [value.from_data_list(piece) for piece in pieces] if hasattr(value, "from_data_list") else pieces  # graphs
