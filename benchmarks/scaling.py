"""How a step's time grows with the batch, with the image and with the teacher: log-log, with the exponent.

    python benchmarks/scaling.py --rounds 9 --out docs/benchmarks      # scaling.md and scaling.svg; some minutes on two cores
    python benchmarks/scaling.py --smoke                               # toy sizes: does it run?

Plain training, KD with the whole teacher, and MaskedKD with half of its patches, all in turn in one process. One size grows while the
others stay: a ViT student of width 192 and a ViT teacher of width 384, both of depth 6 with 16-pixel patches, batch 8, 160 pixels. The
exponent is the slope of the least-squares line through the logarithms of the medians, of all and of the two largest sizes, where least of
the time does not depend on the size. Weights are random: cost does not depend on them.
Needs matplotlib for the picture: pip install '.[benchmarks]'.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import Tensor

from stillhouse.distillers.classics.kd import KD
from stillhouse.distillers.classics.scratch import Scratch
from stillhouse.distillers.supervised.masked_kd import MaskedKD
from stillhouse.measure.dense import step_of
from stillhouse.measure.timing import interleaved, spread

WAYS = ("plain training", "KD, all patches", "MaskedKD, half of them")
USUAL = {"batch": 8, "side": 160, "width": 384}
SIZES = {"batch": (2, 4, 8, 16, 32), "side": (96, 128, 192, 256, 384), "width": (192, 384, 512, 768, 1024)}
TITLES = {"batch": "images in the batch", "side": "patches of an image", "width": "teacher's width"}
SMOKE = {"batch": (1, 2), "side": (32, 64), "width": (64, 128)}

Point = tuple[float, dict[str, list[float]]]


def main() -> None:
    options = _options()
    console, sizes = Console(), SMOKE if options.smoke else SIZES
    curves: dict[str, list[Point]] = {}
    for axis, values in sizes.items():
        curves[axis] = []
        for value in values:
            seconds = interleaved(steps(**{**USUAL, axis: value}, device=options.device), options.rounds)
            curves[axis].append(((value // 16) ** 2 if axis == "side" else value, seconds))
            console.print(f"{axis} {value}: " + ", ".join(f"{way} {1000 * spread(each).median:.0f} ms" for way, each in seconds.items()))
    text = table(curves, options)
    console.print(text, markup=False, soft_wrap=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.md").write_text(text)
    draw(curves, options.out / "scaling.svg")
    console.print(f"written: {options.out / 'scaling.md'}, {options.out / 'scaling.svg'}")


def steps(batch: int, side: int, width: int, device: str) -> dict[str, Callable[[], None]]:
    """A whole update each way, on one batch of random images."""
    torch.manual_seed(0)

    def vit(wide: int) -> Any:
        size = {"img_size": side, "embed_dim": wide, "depth": 6, "num_heads": wide // 64, "num_classes": 100}
        return timm.create_model("vit_tiny_patch16_224", **size).to(device)

    examples: tuple[Tensor, Tensor] = torch.randn(batch, 3, side, side), torch.arange(batch) % 100
    ways = {
        WAYS[0]: Scratch(vit(192)),
        WAYS[1]: KD(vit(192), vit(width)),
        WAYS[2]: MaskedKD(vit(192), vit(width), keep=0.5),
    }
    return {name: step_of(each.train(), examples, "fp32") for name, each in ways.items()}


def exponent(points: list[Point], way: str) -> float:
    """b in time = a size^b."""
    sizes = [math.log(size) for size, _ in points]
    return statistics.linear_regression(sizes, [math.log(spread(seconds[way]).median) for _, seconds in points]).slope


def table(curves: dict[str, list[Point]], options: argparse.Namespace) -> str:
    """Milliseconds, median (quartiles), and the exponents, as Markdown."""
    lines = [
        f"# How a step grows\n\n`python benchmarks/scaling.py --rounds {options.rounds}`, torch {torch.__version__}, {options.device}, "
    ]
    lines[0] += f"{torch.get_num_threads()} threads. Milliseconds, median (quartiles).\n\n![log-log curves](scaling.svg)"
    for axis, points in curves.items():
        head = [TITLES[axis], *(f"{size:g}" for size, _ in points), "exponent", "of the last two"]
        ends = {way: [f"{exponent(some, way):.2f}" for some in (points, points[-2:])] for way in WAYS}
        rows = [[way, *(_text(seconds[way]) for _, seconds in points), *ends[way]] for way in WAYS]
        lines.append("\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)))
    return "\n\n".join(lines) + "\n"


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """A panel for each size that grows."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "stillhouse"  # so that the same curves are the same file
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3.6), layout="constrained")
    for panel, (axis, points) in zip(panels, curves.items(), strict=True):
        for way in WAYS:
            middles = [1000 * spread(seconds[way]).median for _, seconds in points]
            panel.loglog([size for size, _ in points], middles, marker="o", label=f"{way}: {exponent(points, way):.2f}")
        ticks = [size for size, _ in points]
        panel.set_xticks(ticks, [f"{size:g}" for size in ticks])
        panel.minorticks_off()
        panel.set(xlabel=TITLES[axis], ylabel="ms a step")
        panel.legend(title="exponent", fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def _text(seconds: list[float]) -> str:
    median, low, high = (f"{1000 * value:.0f}" for value in spread(seconds))
    return f"{median} ({low}, {high})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a folder for scaling.md and scaling.svg")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, 2 rounds")
    options = parser.parse_args()
    options.out = options.out or Path(tempfile.mkdtemp())
    options.rounds = 2 if options.smoke else options.rounds
    return options


if __name__ == "__main__":
    main()
