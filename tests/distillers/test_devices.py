"""No way to distil mixes devices up, and none waits for its device in a step but where it says so here. No GPU is needed.

Finds all methods by itself. What is not seen: whether a library's own kernel waits, and what other kinds of networks do.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse import distillers
from stillhouse.distillers.base import Clock, Distiller
from stillhouse.distillers.supervised.masked_kd import MaskedKD
from stillhouse.randomness import samples
from stillhouse.training.batches import on_device
from stillhouse.training.elsewhere import put_elsewhere
from tests.fake_device import FAKE, OTHER, Waits, fake, moved
from tests.parts import SMALL, batch, networks_for

__all__ = ["fake"]

SIZE = 2
WAITS: dict[str, dict[str, str]] = {
    "detect": {
        "tasks/labels.py:without_crowds": "how many boxes are left is part of the next shapes; torchvision's losses wait in any case",
        "models/detectors.py:detection_losses": "torchvision's resizing, its checks of boxes, and its matching with anchors",
        "models/levels.py:of": "torchvision's resizing and normalising, image by image",
    },
    "acam_kd": {"distillers/dense/acam_kd.py:_refuse_unless_finite": "once, in the first step"},
    "decoupled_dmd": {
        "distillers/generative/decoupled_dmd.py:simulated": "samples that need no further step are left out, which is worth more"
    },
    "krr_st": {
        "distillers/condensation/krr_st.py:forward": "which network is visited is a checkpoint's, as a buffer",
        "distillers/condensation/krr_st.py:after_update": "likewise, and its age",
        "losses/ridge.py:ridge_prediction": "torch.linalg.solve looks whether there is an answer",
    },
}
"""By task and by method, what waits for the device, as "file.py:function", and why. A method's own must wait, a task's may."""
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *(("masked_kd", {"by": by}) for by in ("sampled", "teacher", "random", "lowest")),
    ("masked_kd", {"hint": 1.0, "attention": 1.0, "targets": "hard", "keep": "0:1.0,0.5:0.5"}),
    ("g2sd", {"supervise": "hidden"}),
    ("acam_kd", {"reading": "b", "mask_grad": "joint", "masks": "fixed", "normalise": False, "balanced": False}),
    ("decoupled_dmd", {"schedule": "coupled", "regulariser": "moments", "normalise": "joint"}),
    ("cnn_transformer_collab", {"hfd_by": "kl", "region_of": "classes", "region_by": "affinity", "normalise": "all"}),
    ("dmae", {"distance": "l2", "projection": "mlp2"}),
    ("meal_v2", {"discriminator": "against"}),
    ("self_distill_pretrain", {"compared": "all", "rounds": 2}),
]
TRAINED = [name for name in sorted(distillers.modules()) if name != "mirage"]  # which learns nothing
EVERY = [
    *((name, task, {}) for name in TRAINED for task in distillers.find(name).tasks),
    *((name, distillers.find(name).tasks[-1], settings) for name, settings in SETTINGS),
]
TAUGHT = [(name, task, settings) for name, task, settings in EVERY if "teacher" in distillers.networks(name)]
ASK_PARTS = ("dmae", "g2sd", "maskd", "self_distill_pretrain")
"""Methods that run parts of their teacher, or reach into it: it cannot be on another device."""


def waits_of(waits: Waits, name: str, task: str, settings: dict[str, Any], teacher_at: torch.device | None = None) -> set[str]:
    """What waited while each stage learnt for a step."""
    found: set[str] = set()
    networks: dict[str, Any] = {"teacher": None} | networks_for(name, task)
    for stage in distillers.find(name).stages(**networks, epochs=2, **(SMALL.get(name, {}) | settings)):
        if teacher_at is not None:
            put_elsewhere(stage.distiller.teacher, teacher_at, FAKE)
        distiller, data = moved(stage.distiller), on_device(batch(SIZE, task), FAKE)
        if "student" not in distiller.frozen:  # moved parameters are others than those that the stage before let rest
            distiller.student.requires_grad_()
        distiller.prepare([data, data])
        distiller.train()
        waits.seen.clear()
        step(distiller, data)
        found |= waits.seen
        refuse_unless_there(distiller.look(data))
    return found


def step(distiller: Distiller, data: Any) -> None:
    """All turns, and what is left behind."""
    for turn, _ in groupby(distiller.turns(), key=lambda turn: turn.name):
        with samples(0, 0, torch.arange(SIZE)):
            terms = distiller(data, turn)
        refuse_unless_there(terms | distiller.watch())
        torch.stack(list(terms.values())).sum().backward()
        distiller.zero_grad()
    distiller.after_update(Clock(step=1, steps=2, epoch=0, epochs=1))
    for module in distiller.modules():
        if not hasattr(module, "home"):
            refuse_unless_there(dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False)))


def refuse_unless_there(tensors: dict[str, Tensor]) -> None:
    assert not {name: each.device for name, each in tensors.items() if each.device != FAKE}


@pytest.mark.parametrize(("name", "task", "settings"), EVERY, ids=[" ".join(map(str, each)) for each in EVERY])
def test_devices_are_not_mixed_up_and_nobody_waits(name: str, task: str, settings: dict[str, Any], fake: Waits) -> None:
    own, of_task = WAITS.get(name, {}).keys(), WAITS.get(task, {}).keys()
    assert own <= waits_of(fake, name, task, settings) <= own | of_task


@pytest.mark.parametrize(("name", "task", "settings"), TAUGHT, ids=[" ".join(map(str, each)) for each in TAUGHT])
def test_a_teacher_may_be_on_another_device(name: str, task: str, settings: dict[str, Any], fake: Waits) -> None:
    own, of_task = WAITS.get(name, {}).keys(), WAITS.get(task, {}).keys()
    if name in ASK_PARTS:
        with pytest.raises(RuntimeError, match=r"same device|different devices"):
            waits_of(fake, name, task, settings, OTHER)
    else:
        assert own <= waits_of(fake, name, task, settings, OTHER) <= own | of_task


def test_a_teacher_may_be_on_the_cpu(fake: Waits) -> None:
    """Then its student's device is waited for: there is nothing to compute on before."""
    assert waits_of(fake, "masked_kd", "classify", {"hint": 1.0}, torch.device("cpu"))


def test_keep_auto_waits_only_when_it_looks(fake: Waits) -> None:
    """Once, for the figures by which it chooses."""
    distiller, data = moved(MaskedKD(**networks_for("masked_kd"), keep="auto")), on_device(batch(SIZE), FAKE)
    distiller.prepare([data])
    distiller.train()
    fake.seen.clear()
    for looks in (0, 2):
        distiller.rate.looks = looks
        step(distiller, data)
        assert fake.seen == ({"distillers/keeping.py:revise"} if looks else set())


def test_mistakes_are_seen(fake: Waits) -> None:
    there = torch.ones(3, device=FAKE)
    with pytest.raises(RuntimeError, match=r"same device|different devices"):
        there + torch.ones(3)
    assert not fake.seen
    for waits in (lambda: there.sum().item(), lambda: bool((there > 0).any()), there.nonzero, lambda: there[there > 0], there.cpu):
        fake.seen.clear()
        waits()
        assert fake.seen, waits
