"""A device that is not the CPU, on any machine: of its tensors only shapes are known, those of the CPU are real.

As on a GPU, tensors of different devices do not mix. What a GPU would make its CPU wait for is noted, and answered as if nobody had asked:
a number with 1, a condition with True, which places are nonzero with all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import stillhouse

FAKE = torch.device("lazy", 0)
"""The only kind of device whose backward pass needs no driver."""
OTHER = torch.device("lazy", 1)
"""Another one, for forward passes."""
OURS = str(Path(stillhouse.__file__).parent)
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Within it and `FakeTensorMode`, notes in `seen` the function of Stillhouse, as "file.py:function", that waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        to = torch.device(kwargs.get("device") or "cpu")
        if to.type == "cpu" and not any(isinstance(each, FakeTensor) for each in tensors):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is aten.lift_fresh.default:
            return args[0]
        if func is aten._local_scalar_dense.default:
            by_stillhouse = self.note(args[0])
            # other libraries ask whether something is wrong
            return by_stillhouse if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten._linalg_check_errors.default:
            self.note(args[0])
            return None
        if func is aten.nonzero.default:
            self.note(args[0])
            return _everywhere(args[0])
        if func is aten.index.Tensor and any(each is not None and each.dtype == torch.bool for each in args[1]):
            self.note(args[0])
            places = [_everywhere(each).unbind(1) if each is not None and each.dtype == torch.bool else (each,) for each in args[1]]
            return func(args[0], [each for several in places for each in several])
        moves = func is aten._to_copy.default and "device" in kwargs and to.type != args[0].device.type
        if moves and not kwargs.get("non_blocking"):
            self.note(args[0])
        return func(*args, **kwargs)

    def note(self, asked: Tensor) -> bool:
        """Whether it is Stillhouse itself that asks, and not a library that it calls."""
        if asked.device.type == "cpu" and isinstance(asked, FakeTensor):  # was waited for when it was copied
            return True
        frames, frame = [], sys._getframe(2)
        while frame is not None:
            frames.append(frame.f_code)
            frame = frame.f_back
        places = [code for code in frames if code.co_filename.startswith(OURS) and code.co_name.isidentifier()]
        where = f"{places[0].co_filename.removeprefix(OURS + '/')}:{places[0].co_name}" if places else "backward"
        self.seen.add(where)
        asks = next(code for code in frames if "/torch/_" not in code.co_filename)
        return asks.co_filename.startswith(OURS)


def _everywhere(mask: Tensor) -> Tensor:
    return torch.zeros(mask.numel(), mask.ndim, dtype=torch.int64, device=mask.device)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """`FAKE` and `OTHER` are there, and modules can be moved to them."""
    autocast = torch.autocast

    def known(kind: str, *args: Any, **settings: Any) -> Any:
        return nullcontext() if kind == FAKE.type else autocast(kind, *args, **settings)

    monkeypatch.setattr(torch, "autocast", known)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)  # a copied tensor has the same
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
            yield waits
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def moved(network: nn.Module, device: torch.device = FAKE) -> nn.Module:
    """`network.to(device)`, also where some of it is there already: fakes cannot be moved to where they are. What is elsewhere stays."""
    for module in network.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not hasattr(module, "home") and any(each.device != device for each in own):
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    return network
