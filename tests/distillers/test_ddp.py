"""Two processes on half a batch each learn what one process learns from all of it."""

from __future__ import annotations

import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing

from stillhouse.distillers.base import Clock, Distiller
from stillhouse.distillers.classics.fitnet import FitNet
from stillhouse.distillers.dense.acam_kd import ACAMKD
from stillhouse.distillers.supervised.masked_kd import MaskedKD
from stillhouse.randomness import samples
from tests.conftest import boxes, images, labels, masks, tiny, tiny_detector, tiny_segmenter
from tests.parts import make

STEPS, BATCH = 2, 8
RATES = {"segment": 1e-2, "detect": 1e-3}
"""Of the steps; 0.1 where nothing is said."""
OTHERS = ("mae", "dmae", "dmjd", "g2sd", "self_distill_pretrain", "meal_v2", "dml", "flow", "decoupled_dmd", "krr_st")
"""Methods that are tried with their defaults, on the networks of `parts`."""


def methods() -> dict[str, Distiller]:
    torch.manual_seed(0)
    student, teacher = {"name": "vit_tiny_patch16_224", "seed": 1}, {"name": "deit3_small_patch16_224", "seed": 2, "embed_dim": 48}
    auto = MaskedKD(tiny(**student), tiny(**teacher), keep="auto", tolerance=0.9)
    auto.prepare([(images(8, seed=9), labels(8))])
    assert auto.rate is not None
    auto.rate.looks = 1  # more than two steps would pay for: it looks after the first one
    return {
        "soft": MaskedKD(tiny(**student), tiny(**teacher), keep=5, temperature=2.0, hint=1.0),
        "auto": auto,
        "random": MaskedKD(tiny(**student), tiny(**teacher), keep=5, by="random", targets="hard"),
        "hints": FitNet(tiny(**student), tiny(**teacher), beta=1.0),
        "segment": ACAMKD(tiny_segmenter(1), tiny_segmenter(2, width=16)),
        "detect": ACAMKD(tiny_detector(1), tiny_detector(2, width=16)),
        **{name: make(name) for name in OTHERS},
    }


def batch(name: str, step: int, part: slice) -> tuple[Any, Any]:
    """Images and what is true of them, for one of `methods`."""
    pictures = images(BATCH, seed=step)[part]
    if name == "detect":
        return list(pictures.sigmoid()), boxes(BATCH, seed=step)[part]
    return pictures, (masks if name == "segment" else labels)(BATCH, seed=step)[part]


def train(name: str, distiller: Distiller, call: Any, shard: int, shards: int) -> dict[str, Tensor]:
    """Two plain steps on this shard of the batch; the gradients of the first and the weights after the last."""
    found = {}
    part = slice(shard * BATCH // shards, (shard + 1) * BATCH // shards)
    for step in range(STEPS):
        for turn in dict.fromkeys(turn.name for turn in distiller.turns()):
            with samples(0, step, torch.arange(BATCH)[part]):
                terms = call(batch(name, step, part), turn)
            sum(terms.values()).backward()
            with torch.no_grad():
                for key, parameter in distiller.named_parameters():
                    if parameter.grad is not None:
                        if step == 0:
                            found[f"gradient of {key} in {turn}"] = parameter.grad.clone()
                        parameter -= RATES.get(name, 0.1) * parameter.grad
                        parameter.grad = None
        torch.manual_seed(step)
        distiller.after_update(Clock(step + 1, STEPS, 0, 1))
    return found | {key: value for key, value in distiller.state_dict().items() if key != "_extra_state" or name == "auto"}


def work(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, distiller in methods().items():
        several = len({turn.name for turn in distiller.turns()}) > 1
        wrapped = torch.nn.parallel.DistributedDataParallel(distiller.train(), find_unused_parameters=several)
        found = train(name, distiller, wrapped, rank, 2)
        assert not [key for key in wrapped.state_dict() if "teacher" in key]
        wrapped.load_state_dict(wrapped.state_dict())
        save_file(found, f"{folder}/{name}-{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path_factory.mktemp("ddp")
    multiprocessing.spawn(work, (port, str(path)), nprocs=2)
    return path


@pytest.mark.parametrize("name", ["soft", "auto", "random", "hints", "segment", "detect", *OTHERS])
def test_two_processes_are_one(folder: Path, name: str) -> None:
    distiller = methods()[name].train()
    whole = train(name, distiller, distiller, 0, 1)
    for rank in range(2):
        half = load_file(folder / f"{name}-{rank}.safetensors")
        assert half.keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(half[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_two_processes_look_at_the_same_and_so_keep_the_same(folder: Path) -> None:
    distiller = methods()["auto"].train()
    train("auto", distiller, distiller, 0, 1)
    assert float(distiller.watch()["turned"]) > 0, "it has to look and to keep less for this to say anything"
    one, other = (load_file(folder / f"auto-{rank}.safetensors")["_extra_state"] for rank in range(2))
    assert torch.equal(one, other)
