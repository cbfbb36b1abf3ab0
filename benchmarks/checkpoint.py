"""What a checkpoint costs, and what writing it in the background could save.

    python benchmarks/checkpoint.py --student timm/deit_small_patch16_224 --rounds 5

Prints the median seconds of the parts of one write, of a student with AdamW's state and a moving average: the copy in memory, which a write
in the background would still have to wait for, and the rest (files, sums, waiting for the disk), which it would not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from stillhouse.models.opening import open_model
from stillhouse.training.checkpoint import optimizer_tensors, save_checkpoint


def seconds(work: Callable[[], object]) -> float:
    """How long it took."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Measures in turn, in one process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--student", default="timm/deit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; a temporary folder by default")
    asked = parser.parse_args()
    student = open_model(asked.student, classes=1000, channels=3, weights="random")
    optimizer = torch.optim.AdamW(student.parameters())
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    networks = {name: {key: value.detach() for key, value in student.state_dict().items()} for name in ("distiller", "ema")}
    parts = {**networks, "optimizer": optimizer_tensors(optimizer)}
    copying, writing = [], []
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        for number in range(asked.rounds + 1):
            copying.append(seconds(lambda: [tensor.clone() for part in parts.values() for tensor in part.values()]))
            writing.append(seconds(lambda number=number: save_checkpoint(Path(folder), number, parts, {})))  # type: ignore[misc]
    size = sum(tensor.nbytes for part in parts.values() for tensor in part.values()) / 1e6
    copy, write = (statistics.median(each[1:]) for each in (copying, writing))
    print(f"{asked.student}: {size:.0f} MB a checkpoint; a write takes {write:.2f} s, the copy alone {copy:.2f} s")


if __name__ == "__main__":
    main()
