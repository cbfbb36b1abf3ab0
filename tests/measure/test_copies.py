"""What a copy for measuring shares with the network, and what it does not."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.measure.copies import on_meta, with_frozen_weights, with_same_weights


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())


def test_same_weights_are_the_same_objects_in_other_modules() -> None:
    model = network()
    copied = with_same_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), copied.buffers(), strict=True))
    assert not set(model.modules()) & set(copied.modules())


def test_frozen_weights_share_memory_but_not_gradients_flags_or_hooks() -> None:
    model = network()
    copied = with_frozen_weights(model).eval()
    copied.register_forward_hook(lambda *_: None)
    assert all(
        a.data_ptr() == b.data_ptr() and a.requires_grad and not b.requires_grad
        for a, b in zip(model.parameters(), copied.parameters(), strict=True)
    )
    assert isinstance(copied[0].weight, nn.Parameter)
    assert model.training
    assert not model._forward_hooks


def test_meta_keeps_shapes_types_and_ties() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(torch.bfloat16)
    model[1].weight = model[0].weight
    copied = on_meta(model)
    assert copied[1].weight is copied[0].weight
    assert [(p.device.type, p.shape, p.dtype) for p in copied.parameters()] == [("meta", p.shape, p.dtype) for p in model.parameters()]
    assert model[0].weight.device.type == "cpu"


def test_what_cannot_be_copied_is_one_sentence() -> None:
    model = network()
    model.lock = threading.Lock()
    with pytest.raises(UserError, match="Sequential cannot be copied"):
        on_meta(model)
