"""Inputs and weights that are a function of their index alone, so that other code can be given the very same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

SHAPE = (2, 6, 5, 7)
"""Of the maps: B, C, H, W."""


def wave(*shape: int, by: float, start: float = 0.0) -> Tensor:
    """sin(by i + start), i the index of the element; fp64."""
    count = int(torch.tensor(shape).prod())
    return torch.sin(torch.arange(count, dtype=torch.float64) * by + start).view(shape)


def maps() -> tuple[Tensor, Tensor]:
    """A student's map, with gradient, and a teacher's."""
    return (2 * wave(*SHAPE, by=0.37)).requires_grad_(), 2 * wave(*SHAPE, by=0.23, start=1.0)


def fill(module: nn.Module, start: int = 0) -> nn.Module:
    """The n-th parameter by name is 0.3 sin(0.7 i + n), n from `start` on; fp64."""
    module.double()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(module.named_parameters()), start):
            parameter.copy_(0.3 * wave(*parameter.shape, by=0.7, start=number))
    return module


def check(loss: Tensor, student: Tensor, official: dict[str, Any]) -> None:
    """Loss and gradient are the official ones to 1e-5; runs the backward pass."""
    loss.backward()
    assert float(loss.detach()) == pytest.approx(official["loss"], rel=1e-5)
    gradient = student.grad if student.grad is not None else torch.zeros_like(student)
    assert float(gradient.abs().sum()) == pytest.approx(official["grad"], rel=1e-5)
    assert float((gradient * wave(*SHAPE, by=0.11)).sum()) == pytest.approx(official["grad_wave"], abs=1e-5 * official["grad"])


def gradients(*modules: nn.Module) -> float:
    """The sum of all |gradients|."""
    return sum(float(p.grad.abs().sum()) for module in modules for p in module.parameters() if p.grad is not None)
