"""A frozen network on another device than those that learn from it.

Accelerate moves what its forward pass is given, and what it returns. What is heard from inside is moved when it is told
(`stillhouse.models.taps.at_home`). So no distiller knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

from stillhouse.errors import UserError


def device_of_name(name: str) -> torch.device:
    """The device of that name, such as "cuda:1" or "cpu".

    Raises:
        UserError: if there is none, naming those there are.
    """
    known, kind = ["cpu"], torch.accelerator.current_accelerator(check_available=True)
    if kind is not None:
        known += [f"{kind.type}:{number}" for number in range(torch.accelerator.device_count())]
    if name not in known:
        raise UserError(f"there is no device '{name}' here; there is {', '.join(known)}")
    return torch.device(name)


def put_elsewhere(network: nn.Module, device: torch.device, home: torch.device) -> None:
    """Moves a network to `device`, where it stays, whatever becomes of what it is a part of; who asks it is at `home`.

    It may be asked as a whole, and a detector's backbone alone. Who asks other parts of it gets PyTorch's RuntimeError.
    """
    if hasattr(network, "home"):
        return
    network.to(device)
    for module in network.modules():
        module.home = home  # type: ignore[assignment]
    for asked in (network, getattr(network, "backbone", None)):
        if isinstance(asked, nn.Module):
            add_hook_to_module(asked, AlignDevicesHook(device, io_same_device=True))
    network._apply = partial(_stays, network)  # type: ignore[method-assign]


def _stays(network: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `Module.to` and the like do, but where each tensor is."""
    return type(network)._apply(network, lambda tensor: change(tensor).to(tensor.device), recurse)
