"""What the loop's own switches do to a training step: layout, fused updates, activations computed again, torch.compile.

    python benchmarks/student.py --rounds 15          # some minutes on two cores; --compile adds a minute a network
    python benchmarks/student.py --smoke              # two rounds of the smallest network: does it run?

Each switch beside the same step without it, in turn in one process: the ratio of their times, paired by round. Memory: the peak of a step
with activations computed again, over that of one that keeps them. Weights are random: cost does not depend on them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stillhouse.data import Data
from stillhouse.data.transforms import eval_transform, train_transform
from stillhouse.distillers.classics.scratch import Scratch
from stillhouse.measure.timing import interleaved, peak_memory, ratio, spread, with_quartiles
from stillhouse.models.opening import open_model
from stillhouse.models.preprocessing import Preprocessing
from stillhouse.training.loop import Loop
from stillhouse.training.recipe import Recipe

NETWORKS = {
    "timm/test_resnet": (28, 64),
    "torchvision/resnet18": (128, 8),
    "torchvision/resnet50": (128, 8),
    "torchvision/mobilenet_v3_small": (128, 8),
    "timm/convnext_atto": (128, 8),
    "timm/deit_tiny_patch16_224": (224, 8),
}
"""The side of the images and how many there are in a batch."""
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "channels-last": ({"channels_last": False}, {"channels_last": True}),
    "fused update": ({"fused": False}, {"fused": True}),
    "checkpointing": ({}, {"checkpointing": True}),
    "compile": ({}, {"compile": True}),
}
"""Settings without and with it."""


def main() -> None:
    options = _options()
    table = Table(title=f"time with / time without, {torch.get_num_threads()} threads, torch {torch.__version__}")
    switches = [name for name in SWITCHES if name != "compile" or options.compile]
    for column in ("network", "ms a step", *switches, "memory, checkpointing"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for spec, (side, batch) in list(NETWORKS.items())[: 1 if options.smoke else None]:
        cells, memory = [], "–"
        for name in switches:
            without, with_it = (step_of(spec, side, batch, settings) for settings in SWITCHES[name])
            if without is None or with_it is None:
                cells.append("cannot")
                continue
            seconds = interleaved({"without": without, "with": with_it}, options.rounds, warmup=2)
            usual = spread(seconds["without"]).median
            cells.append(with_quartiles(ratio(seconds["with"], seconds["without"]), 2))
            if name == "checkpointing":
                memory = f"{peak_memory(with_it).bytes / max(1, peak_memory(without).bytes):.2f}"
        table.add_row(spec, f"{1000 * usual:.0f}", *cells, memory)
    Console().print(table)


def step_of(spec: str, side: int, batch: int, settings: dict[str, Any]) -> Callable[[], object] | None:
    """An update of plain training through the loop; None where the network cannot."""
    from stillhouse.errors import UserError

    channels = 1 if side < 64 else 3
    network = open_model(spec, classes=100, channels=channels)
    samples = [(torch.zeros(channels, side, side, dtype=torch.uint8), 0)] * batch
    data = Data("benchmark", samples, samples, [str(label) for label in range(100)], channels=channels, size=side)  # type: ignore[arg-type]
    preprocessing = Preprocessing(data.mean, data.std, side)
    transforms = train_transform(preprocessing, data), eval_transform(preprocessing, data)
    recipe = Recipe(epochs=10**6, batch=batch, lr=1e-5, warmup_epochs=0, trackers="none", **settings)
    try:
        loop = Loop(Scratch(network), data, transforms, preprocessing, recipe, Path(tempfile.gettempdir()))
    except UserError:
        return None
    images, labels, ids = torch.randn(batch, channels, side, side), torch.zeros(batch, dtype=torch.long), torch.arange(batch)

    def step() -> Tensor | None:
        loop.update(loop.step, ids, images, labels)
        loop.terms.mean(loop.accelerator)
        loop.step += 1
        return None

    return step


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--smoke", action="store_true", help="the smallest network, 2 rounds")
    options = parser.parse_args()
    options.rounds = 2 if options.smoke else options.rounds
    return options


if __name__ == "__main__":
    main()
