"""Optimisers and learning rates for each turn, made by timm's factories. Nothing here needs saving but the optimisers' own state."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from stillhouse.distillers.base import Distiller, Turn
from stillhouse.errors import UserError, nearest
from stillhouse.training.recipe import Recipe

UNFIT = ("adahessian", "kron")
"""The first needs gradients of gradients; the second keeps more than tensors, and draws its own random numbers."""


@dataclass
class Player:
    """A turn with its optimiser and the schedule of its learning rate."""

    turn: Turn
    optimizer: Any
    schedule: CosineLRScheduler


def players_of(distiller: Distiller, recipe: Recipe, steps: int, warmup_steps: int) -> list[Player]:
    """One player for each of the distiller's turns.

    Raises:
        UserError: if timm has no such optimiser.
    """
    return [_player(distiller, turn, recipe, steps, warmup_steps) for turn in distiller.turns()]


def _player(distiller: Distiller, turn: Turn, recipe: Recipe, steps: int, warmup_steps: int) -> Player:
    name = turn.optimizer or recipe.optimizer
    known = [str(each) for each in list_optimizers() if not str(each).startswith(UNFIT)]
    if name not in known:
        raise UserError(f"there is no optimizer '{name}'{nearest(name, known)}; timm knows {', '.join(known)}")
    try:
        groups, rate = parameter_groups(distiller, turn, recipe), turn.rate * recipe.lr
        optimizer = _made(groups, recipe.fused, opt=name, lr=rate, weight_decay=0.0)
    except (AssertionError, ImportError) as error:
        raise UserError(f"the optimizer {name} does not work here ({error}), use another such as adamw") from error
    return Player(turn, optimizer, cosine(optimizer, rate, recipe.min_lr, steps, warmup_steps))


def _made(groups: list[dict[str, Any]], fused: bool | None, **settings: Any) -> Optimizer:
    """By timm; with a fused update where the optimiser has one (on two CPU cores it took a third of the time), or it is asked for.

    Raises:
        UserError: if it is asked for and there is none.
    """
    if fused is False:
        return create_optimizer_v2(groups, **settings)
    try:
        return create_optimizer_v2(groups, fused=True, **settings)
    except (TypeError, RuntimeError) as error:  # it does not know the word, or has no kernel for this device
        if fused:
            raise UserError(f"the optimizer {settings['opt']} has no fused update here; leave --fused out") from error
        return create_optimizer_v2(groups, **settings)


def cosine(optimizer: Optimizer, rate: float, least: float, steps: int, warmup_steps: int) -> CosineLRScheduler:
    """Linear warm-up to `rate`, then a cosine down to `least`: a function of the step alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CosineLRScheduler(
            optimizer,
            t_initial=max(1, steps),
            lr_min=min(least, rate),
            warmup_t=min(warmup_steps, steps - 1),
            warmup_lr_init=min(1e-6, rate),
            t_in_epochs=False,
        )


def parameter_groups(distiller: Distiller, turn: Turn, recipe: Recipe) -> list[dict[str, Any]]:
    """The turn's parameters in timm's groups: no decay on biases, norms and what a network excludes; layer-wise rates where asked for."""
    wanted = {id(parameter) for parameter in turn.parameters}
    groups: list[dict[str, Any]] = [{"params": list(distiller.parameters(recurse=False)), "weight_decay": 0.0}]
    for network in distiller.children():
        groups += _network_groups(network, recipe)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in wanted]
        wanted -= {id(parameter) for parameter in group["params"]}  # a network may be reached by two names
        group.pop("param_names", None)
    return [group for group in groups if group["params"]]


def _network_groups(network: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    listed: Any = getattr(network, "no_weight_decay", set)
    excluded = listed()
    if recipe.layer_decay is None or not hasattr(network, "group_matcher"):
        return param_groups_weight_decay(network, recipe.weight_decay, no_weight_decay_list=excluded)
    # the schedule multiplies by each group's lr_scale
    return param_groups_layer_decay(network, recipe.weight_decay, no_weight_decay_list=excluded, layer_decay=recipe.layer_decay)
