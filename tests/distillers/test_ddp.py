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

from stillhouse.distillers.base import Distiller
from stillhouse.distillers.classics.fitnet import FitNet
from stillhouse.distillers.supervised.masked_kd import MaskedKD
from stillhouse.randomness import samples
from tests.conftest import images, labels, tiny

STEPS, BATCH, RATE = 2, 8, 0.1


def methods() -> dict[str, Distiller]:
    torch.manual_seed(0)
    student, teacher = {"name": "vit_tiny_patch16_224", "seed": 1}, {"name": "deit3_small_patch16_224", "seed": 2, "embed_dim": 48}
    return {
        "soft": MaskedKD(tiny(**student), tiny(**teacher), keep=5, temperature=2.0, hint=1.0),
        "random": MaskedKD(tiny(**student), tiny(**teacher), keep=5, by="random", targets="hard"),
        "hints": FitNet(tiny(**student), tiny(**teacher), beta=1.0),
    }


def train(distiller: Distiller, call: Any, shard: int, shards: int) -> dict[str, Tensor]:
    """Two plain steps on this shard of the batch; the gradients of the first and the weights after the last."""
    found = {}
    part = slice(shard * BATCH // shards, (shard + 1) * BATCH // shards)
    for step in range(STEPS):
        with samples(0, step, torch.arange(BATCH)[part]):
            terms = call((images(BATCH, seed=step)[part], labels(BATCH, seed=step)[part]))
        sum(terms.values()).backward()
        with torch.no_grad():
            for name, parameter in distiller.named_parameters():
                if parameter.grad is not None:
                    if step == 0:
                        found[f"gradient of {name}"] = parameter.grad.clone()
                    parameter -= RATE * parameter.grad
                    parameter.grad = None
    return found | {name: value for name, value in distiller.state_dict().items() if name != "_extra_state"}


def work(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, distiller in methods().items():
        wrapped = torch.nn.parallel.DistributedDataParallel(distiller.train())
        found = train(distiller, wrapped, rank, 2)
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


@pytest.mark.parametrize("name", ["soft", "random", "hints"])
def test_two_processes_are_one(folder: Path, name: str) -> None:
    distiller = methods()[name].train()
    whole = train(distiller, distiller, 0, 1)
    for rank in range(2):
        half = load_file(folder / f"{name}-{rank}.safetensors")
        assert half.keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(half[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
