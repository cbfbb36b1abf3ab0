"""The smallest networks and batches that each method can be tried on, by what it is for; a new method's file is enough to get them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse import distillers
from stillhouse.distillers.base import Distiller
from stillhouse.models.mae import Decoder, MaskedAutoencoder
from stillhouse.randomness import samples
from tests.conftest import SIDE, boxes, images, labels, masks, scrambled, tiny, tiny_detector, tiny_segmenter
from tests.generators import tiny_generator


def _of_g2sd(seed: int) -> dict[str, nn.Module]:
    encoder = tiny(seed=seed + 1, num_classes=0, embed_dim=48)
    teacher = scrambled(lambda: MaskedAutoencoder(encoder, Decoder(encoder, 24, 2, 2)), seed)
    specific = tiny("deit3_small_patch16_224", seed=seed + 2, embed_dim=48, proj_drop_rate=0.5)
    return {"student": tiny("deit_tiny_distilled_patch16_224", seed=seed), "teacher": teacher, "specific_teacher": specific}


def _of_meal_v2(seed: int) -> dict[str, nn.Module]:
    teachers = (tiny("deit3_small_patch16_224", seed=seed + number, embed_dim=48, proj_drop_rate=0.5) for number in (1, 2))
    return {"student": tiny(seed=seed), **dict(zip(("teacher", "second_teacher"), teachers, strict=True))}


def _of_self_distill_pretrain(seed: int) -> dict[str, nn.Module]:
    teacher = tiny("deit3_small_patch16_224", seed=seed + 1, embed_dim=32, num_classes=0, proj_drop_rate=0.5)
    return {"student": tiny(seed=seed, num_classes=0), "teacher": teacher}


OF_ITS_OWN: dict[str, Callable[[int], dict[str, nn.Module]]] = {
    "g2sd": _of_g2sd,
    "meal_v2": _of_meal_v2,
    "self_distill_pretrain": _of_self_distill_pretrain,
}
"""The networks of methods that want others than their task says, by name and as a function of a seed."""
DECODER = {"decoder_width": 24, "decoder_depth": 2, "decoder_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "krr_st": {"pairs": 4, "pool": 2, "life": 3, "examined_epochs": 1},
    "barlow_twins": {"width": 32},
    "mae": DECODER,
    "dmae": DECODER,
    "dmjd": DECODER,
    "self_distill_pretrain": DECODER,
}
"""Settings of methods whose defaults are too large for a test."""
NEEDS = {"mirage": "torch_geometric"}
NO_MEAN = {"barlow_twins": "it compares the images of a batch with each other"}
"""Methods whose loss is not the mean over a batch, and why."""


def kind_of(name: str) -> str:
    """What the method is tried on: the first of its tasks."""
    return distillers.find(name).tasks[0]


def student_for(name: str, seed: int = 1, task: str = "") -> nn.Module:
    build = {
        "classify": tiny,
        "regress": tiny,
        "encode": lambda seed: tiny(seed=seed, num_classes=0),
        "detect": tiny_detector,
        "segment": tiny_segmenter,
        "generate": lambda seed: tiny_generator(seed, shape=(3, SIDE, SIDE)),
    }
    return OF_ITS_OWN[name](seed)["student"] if name in OF_ITS_OWN else build[task or kind_of(name)](seed=seed)


def teacher_for(name: str, task: str = "") -> nn.Module:
    """With dropout where it is easily had, to be seen if the teacher is ever in training mode."""
    if name in OF_ITS_OWN:
        return OF_ITS_OWN[name](1)["teacher"]
    task = task or kind_of(name)
    if task in ("classify", "encode"):
        classes = {"num_classes": 0} if task == "encode" else {}
        return tiny("deit3_small_patch16_224", seed=2, embed_dim=48, proj_drop_rate=0.5, **classes)
    if task == "generate":
        return tiny_generator(2, shape=(3, SIDE, SIDE))
    return tiny_detector(seed=2, width=16) if task == "detect" else tiny_segmenter(seed=2, width=16, drop=0.5)


def networks_for(name: str, task: str = "") -> dict[str, nn.Module]:
    """All that the method takes, by default for the first of its tasks."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    if name in OF_ITS_OWN:
        return OF_ITS_OWN[name](1)
    kind = distillers.find(name)
    found = {"student": student_for(name, task=task)}
    if "teacher" in distillers.networks(name):
        found["teacher"] = teacher_for(name, task)
    for number, (other, parameter) in enumerate(distillers.others(name).items()):
        if parameter.default is inspect.Parameter.empty:
            found[other] = teacher_for(name, task) if other in kind.frozen else student_for(name, 3 + number, task)
    return found


def make(name: str, **given: Any) -> Distiller:
    """The method with small networks, or those given, in training mode; also its settings."""
    given = networks_for(name) | SMALL.get(name, {}) | given
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = distillers.find(name)(**given).train()
        made.prepare([batch(task=kind_of(name))])
        return made


def batch(size: int = 8, task: str = "classify") -> tuple[Any, Any]:
    if task == "detect":
        return list(images(size).sigmoid()), boxes(size)
    return images(size), masks(size) if task == "segment" else labels(size)


def data_for(name: str) -> tuple[Any, Any]:
    return batch(task=kind_of(name))


def terms_of(distiller: Distiller, data: tuple[Any, Any], first: int = 0, turn: str | None = None) -> dict[str, Tensor]:
    """The terms of a turn, by default the last, with random choices made as the training loop makes them: by sample, not by batch."""
    torch.manual_seed(0)  # dropout
    with samples(0, 0, torch.arange(first, first + len(data[0]))):
        return distiller(data, turn or distiller.turns()[-1].name)


def gradients(distiller: Distiller, data: tuple[Any, Any], turn: str | None = None) -> dict[str, Tensor]:
    distiller.zero_grad()
    sum(terms_of(distiller, data, turn=turn).values()).backward()
    return {name: parameter.grad.clone() for name, parameter in distiller.named_parameters() if parameter.grad is not None}
