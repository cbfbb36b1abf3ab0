"""What an epoch costs whose teacher is asked, kept or read: one process, everything in turn, ratios paired by round.

    python benchmarks/cache.py --rounds 10 --out cache.json      # deit_tiny from deit_base at 224 px; about half an hour on two cores
    python benchmarks/cache.py --smoke                           # the same on toy networks: does it run?

Beside each other, through Stillhouse's training loop, on the same images without augmentation: plain training; `kd`; `kd` in an epoch that
keeps the teacher's answers; `kd` that reads them, in fp32, fp16 and as the largest ten logits in int8; `fitnet`, asked and read (fp16).
Weights are random: cost does not depend on them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

from stillhouse import distillers
from stillhouse.cache.answers import Answers
from stillhouse.cache.teacher import CachedTeacher
from stillhouse.data import Data
from stillhouse.data.arrays import Arrays
from stillhouse.data.transforms import eval_transform, train_transform
from stillhouse.measure.copies import with_frozen_weights
from stillhouse.measure.timing import interleaved, ratio, spread, with_quartiles
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.training.loop import Loop
from stillhouse.training.recipe import Recipe

READ: dict[str, tuple[str, str, int | None]] = {
    "kd, read (fp32)": ("kd", "fp32", None),
    "kd, read (fp16)": ("kd", "fp16", None),
    "kd, read (int8, top 10)": ("kd", "int8", 10),
    "fitnet, read (fp16)": ("fitnet", "fp16", None),
}
"""Method, storage and top_k of the epochs without a teacher."""


def main() -> None:
    options = _options()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        seconds = interleaved(bench.epochs(), options.rounds)
        result = bench.result(seconds)
    _print(result, Console())
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


class Bench:
    """Epochs of `options.steps` steps on images that are the same for all."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.teacher, student = self.network(options.teacher, 48), self.network(options.student, 24)
        self.preprocessing, self.classes = preprocessing_of(student), student.num_classes
        side, count = self.preprocessing.size, options.batch * options.steps
        random = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=random)
        samples = Arrays(images, torch.arange(count) % self.classes)
        self.data = Data("benchmark", samples, samples, [str(label) for label in range(self.classes)], size=side)
        self.bytes: dict[str, float] = {}

    def network(self, name: str, width: int) -> Any:
        torch.manual_seed(0)
        toy = {"img_size": 32, "patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": 2, "num_classes": 20}
        return timm.create_model(name, **(toy if self.options.smoke else {})).eval()

    def epochs(self) -> dict[str, Callable[[], object]]:
        """By name, in the order of the table."""
        asked = {
            "plain training": self.epoch(self.loop("scratch")),
            "kd": self.epoch(self.loop("kd")),
            "kd, kept (fp16)": self.keeping(self.loop("kd", "fp16")),
            "fitnet": self.epoch(self.loop("fitnet")),
        }
        return asked | {name: self.reading(name, self.loop(*settings)) for name, settings in READ.items()}

    def loop(self, method: str, storage: Any = None, top_k: int | None = None) -> Loop:
        networks = {"student": self.network(self.options.student, 24)}
        if method != "scratch":
            networks["teacher"] = with_frozen_weights(self.teacher)
        learner = distillers.find(method)(**networks)
        still: dict[str, Any] = {"hflip": 0.0, "crop_scale": (1.0, 1.0), "auto_augment": "", "random_erasing": 0.0}
        transforms = train_transform(self.preprocessing, self.data, **still), eval_transform(self.preprocessing, self.data)
        recipe = Recipe(epochs=10**6, batch=self.options.batch, lr=1e-5, warmup_epochs=0, views=1, trackers="none")
        cache = CachedTeacher(learner.teacher, storage, top_k) if storage else None
        return Loop(learner.train(), self.data, transforms, self.preprocessing, recipe, self.folder, cache=cache)

    def epoch(self, loop: Loop) -> Callable[[], object]:
        """One more epoch of a loop, its log included."""

        def run() -> None:
            for step, *batch in itertools.islice(loop.to_do(), len(loop.batches)):
                loop.update(step, *batch)
                loop.step += 1
            loop.terms.mean(loop.accelerator)

        return run

    def keeping(self, loop: Loop) -> Callable[[], object]:
        """Each epoch begins with an empty folder."""
        epoch, numbers = self.epoch(loop), itertools.count()

        def run() -> None:
            self.answers(loop, f"kept-{next(numbers)}")
            epoch()
            loop.cache.flush()

        return run

    def reading(self, name: str, loop: Loop) -> Callable[[], object]:
        """Once asked, all is there."""
        self.answers(loop, name)
        epoch = self.epoch(loop)
        epoch()
        loop.cache.flush()
        self.bytes[name] = loop.cache.answers.bytes / len(self.data.train)
        return epoch

    def answers(self, loop: Loop, name: str) -> None:
        loop.cache.part, loop.cache.answers = None, Answers(self.folder / name, {})

    def result(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        """Times, ratios and sizes, as written to JSON."""
        of = {"plain training": seconds["plain training"], "asking": seconds["kd"], "asking for layers": seconds["fitnet"]}
        return {
            "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
            "setting": {name: value for name, value in vars(self.options).items() if name != "out"} | {"threads": torch.get_num_threads()},
            "seconds": seconds,
            "of_plain": {name: ratio(values, of["plain training"]) for name, values in seconds.items()},
            "of_asking": {
                name: ratio(values, of["asking for layers" if "fitnet" in name else "asking"]) for name, values in seconds.items()
            },
            "bytes_an_image": self.bytes,
        }


def _print(result: dict[str, Any], console: Console) -> None:
    setting = result["setting"]
    table = Table(title=f"{setting['student']} from {setting['teacher']}, batch {setting['batch']}, {setting['threads']} threads")
    for column in ("", "ms a step", "x plain training", "x asking the teacher", "bytes an image"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in result["seconds"].items():
        ratios = [with_quartiles(result[of][name], 3) for of in ("of_plain", "of_asking")]
        size = result["bytes_an_image"].get(name)
        milliseconds = spread([1000 * value / setting["steps"] for value in values])
        table.add_row(name, with_quartiles(milliseconds, 1), *ratios, f"{size:,.0f}" if size else "")
    console.print(table)
    console.print(f"median (quartiles) of {setting['rounds']} rounds, an epoch of {setting['steps']} steps each")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="deit_tiny_patch16_224", help="a classifier of timm")
    parser.add_argument("--teacher", default="deit_base_patch16_224", help="a classifier of timm, of the same size")
    parser.add_argument("--batch", type=int, default=16, help="images in a step")
    parser.add_argument("--steps", type=int, default=4, help="steps in an epoch")
    parser.add_argument("--rounds", type=int, default=10, help="measured epochs of each")
    parser.add_argument("--out", type=Path, help="write all times and ratios here, as JSON")
    parser.add_argument("--smoke", action="store_true", help="toy networks, 2 images, 2 rounds")
    options = parser.parse_args()
    if options.smoke:
        options.student = options.teacher = "vit_tiny_patch16_224"
        options.batch, options.rounds = 2, 2
    return options


if __name__ == "__main__":
    main()
