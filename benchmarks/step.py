"""What a step of MaskedKD costs beside what one would use instead: one process, everything in turn, ratios paired by round.

    python benchmarks/step.py --rounds 20 --out step.json      # deit_tiny from deit_base at 224 px; some minutes on two cores
    python benchmarks/step.py --teacher-precision int8         # also with the teacher in int8, or bf16
    python benchmarks/step.py --dense                          # RetinaNet-R50 from R101 at 512 px: ACAM-KD beside plain feature KD
    python benchmarks/step.py --dense --size 800 1333 --batch 1 --rounds 3       # the same on images of COCO's usual size: for the memory
    python benchmarks/step.py --smoke                          # the same on toy networks: does it run?

Beside each other: plain training; timm's LogitDistillationTask; the step of MaskedKD written out by hand on timm's modules;
`stillhouse.distillers.MaskedKD` in a bare loop; the same through Stillhouse's training loop; the teacher's forward pass; the saliency.
Every step trains a student of its own with AdamW; all teachers are the same weights. Weights are random: cost does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.data import Data
from stillhouse.data.transforms import eval_transform, train_transform
from stillhouse.distillers.supervised.masked_kd import MaskedKD
from stillhouse.masks.tokens import class_attention, highest, keep_count
from stillhouse.measure.copies import with_frozen_weights
from stillhouse.measure.dense import batch_of, distiller_of, estimate_dense, step_of
from stillhouse.measure.flops import macs
from stillhouse.measure.timing import Memory, interleaved, peak_memory, ratio, spread, with_quartiles
from stillhouse.models.opening import open_model
from stillhouse.models.precision import lowered
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.models.tokens import OnSomeTokens
from stillhouse.report.terminal import print_estimate
from stillhouse.training.loop import Loop
from stillhouse.training.recipe import Recipe

Step = Callable[[], object]


def main() -> None:
    options = _options()
    console = Console()
    if options.dense:
        dense(options, console)
        return
    make = _toys if options.smoke else _networks
    student, teacher, size = make(options.student, options.teacher)
    device = torch.device(options.device)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, size, size, device=device)
    labels = torch.randint(student().num_classes, (options.batch,), device=device)
    bench = Bench(lambda: student().to(device), teacher().to(device), (images, labels), options.teacher_precision)
    bench.check_equal_losses()
    seconds = interleaved(bench.functions(), options.rounds, warmup=1 if options.smoke else 2)
    result = bench.result(seconds, options)
    _print(result, console)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written: {options.out}")


COCO = 80  # classes
RETINANET = "torchvision/retinanet:backbone={},min_size={},max_size={}"


def dense(options: argparse.Namespace, console: Console) -> None:
    """What ACAM-KD costs a detector beside plain feature distillation and plain training.

    Step times in turn in this process; the memory of each in a new process of its own, where no other has left anything behind.
    """
    size = (64, 64) if options.smoke else (options.size[0], options.size[-1])
    small = ",channels=16" if options.smoke else ""
    backbones = ("resnet18", "resnet18") if options.smoke else ("resnet101", "resnet50")
    specs = [RETINANET.format(backbone, min(size), max(size)) + small for backbone in backbones]
    teacher, student = _detectors(specs, options.device)
    rows = estimate_dense(teacher, student, image_size=size, classes=COCO, batch=options.batch, rounds=options.rounds)
    del teacher, student
    for row in rows:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            memory = alone.submit(_memory, row["name"], specs, size, options.batch, options.device).result()
        row |= {"memory_bytes": memory.bytes, "memory_of": memory.of}
    for row in rows:
        row["above_plain"] = row["memory_bytes"] - rows[0]["memory_bytes"]
    result = {
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "setting": {"teacher": specs[0], "student": specs[1], "size": size, "batch": options.batch, "rounds": options.rounds}
        | {"device": options.device, "threads": torch.get_num_threads(), "smoke": options.smoke},
        "rows": rows,
    }
    console.print(f"{specs[1]} from {specs[0]}, {options.batch} x {size[0]} x {size[1]}, {options.rounds} rounds", soft_wrap=True)
    print_estimate(rows, console)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _detectors(specs: list[str], device: str) -> list[nn.Module]:
    return [open_model(spec, classes=COCO, channels=3, task="detect").to(device) for spec in specs]


def _memory(name: str, specs: list[str], size: tuple[int, int], batch: int, device: str) -> Memory:
    """The peak of a step of one row, after one in which the optimiser has made its state."""
    step = step_of(distiller_of(name, *_detectors(specs, device)).train(), batch_of(True, size, COCO, batch), "fp32")
    step()
    return peak_memory(step)


class Bench:
    """The steps beside each other, on one batch.

    Args:
        make_student: a new student with its first weights, each time the same.
        teacher: frozen; every step has its own modules on these weights.
        batch: images and hard labels.
        precision: another one of the teacher's, for steps beside the others.
    """

    def __init__(self, make_student: Callable[[], Any], teacher: Any, batch: tuple[Tensor, Tensor], precision: str | None = None) -> None:
        self.make_student, self.batch = make_student, batch
        self.low = (precision, lowered(teacher, precision, batch[0].device)[0]) if precision else None
        self.teacher = with_frozen_weights(teacher).eval()
        self.patches = OnSomeTokens(with_frozen_weights(teacher)).patches
        self.half = keep_count(0.5, self.patches)

    def functions(self) -> dict[str, Step]:
        """By name, in the order of the table."""
        return {
            "plain training": self.plain(),
            "timm's distillation": self.timm_task(),
            "by hand, keep=1.0": self.bare(self.patches),
            "by hand, keep=0.5": self.bare(self.half),
            "MaskedKD keep=1.0": self.ours(1.0),
            "MaskedKD keep=0.5": self.ours(0.5),
            "training loop, keep=0.5": self.loop(0.5),
            "teacher forward, all": self.teacher_forward(None),
            "teacher forward, half": self.teacher_forward(self.half),
            "saliency": self.saliency(),
            **self.in_low_precision(),
        }

    def in_low_precision(self) -> dict[str, Step]:
        """The steps whose teacher is in another precision, if one is asked for."""
        if self.low is None:
            return {}
        name, low = self.low
        return {
            f"MaskedKD keep=0.5, {name}": self.ours(0.5, low),
            f"MaskedKD keep=0.25, {name}": self.ours(0.25, low),
            f"teacher forward, all, {name}": self.teacher_forward(None, low),
            f"teacher forward, half, {name}": self.teacher_forward(self.half, low),
        }

    def plain(self) -> Step:
        student = self.make_student().train()
        return _update(student, lambda: F.cross_entropy(student(self.batch[0]), self.batch[1]))

    def timm_task(self) -> Step:
        from timm.task import LogitDistillationTask

        student, teacher = self.make_student(), with_frozen_weights(self.teacher)
        weights = {"task_loss_weight": 0.5, "distill_loss_weight": 0.5, "temperature": 1.0}
        task = LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), device=self.batch[0].device, verbose=False, **weights).train()
        return _update(student, lambda: task(*self.batch)["loss"])

    def bare(self, kept: int) -> Step:
        student = self.make_student().train()
        return _update(student, lambda: bare_loss(student, self.teacher, *self.batch, kept))

    def ours(self, keep: float, teacher: nn.Module | None = None) -> Step:
        distiller = self.distiller(keep, teacher)
        return _update(distiller.student, lambda: sum(distiller(self.batch).values()))

    def loop(self, keep: float) -> Step:
        """Stillhouse's training loop, an update and a row of its log (50 updates share one by default) on the same batch."""
        images, labels = self.batch
        distiller, ids = self.distiller(keep), torch.arange(len(images))
        samples = [(torch.zeros(images.shape[1:], dtype=torch.uint8), 0)] * len(images)
        data = Data("benchmark", samples, samples, [str(label) for label in range(distiller.student.num_classes)], size=images.shape[-1])
        preprocessing = preprocessing_of(distiller.student)
        transforms = train_transform(preprocessing, data), eval_transform(preprocessing, data)
        recipe = Recipe(epochs=10**6, batch=len(images), lr=1e-5, warmup_epochs=0, trackers="none")
        loop = Loop(distiller, data, transforms, preprocessing, recipe, Path(tempfile.gettempdir()))

        def step() -> None:
            loop.update(loop.step, ids, images, labels)
            loop.terms.mean(loop.accelerator)
            loop.step += 1

        return step

    def distiller(self, keep: float, teacher: nn.Module | None = None) -> MaskedKD:
        frozen = with_frozen_weights(self.teacher) if teacher is None else copy.deepcopy(teacher)
        return MaskedKD(self.make_student(), frozen, keep=keep).train()

    def teacher_forward(self, kept: int | None, teacher: nn.Module | None = None) -> Step:
        teacher, images = OnSomeTokens(with_frozen_weights(self.teacher) if teacher is None else copy.deepcopy(teacher)), self.batch[0]
        keep = None if kept is None else torch.rand(len(images), self.patches, device=images.device).topk(kept).indices
        return torch.no_grad()(lambda: teacher(images, keep))

    def saliency(self) -> Step:
        """The class token's row in fp32 and the choice, from the queries and keys that the student's last block has computed anyway."""
        attention, images = self.make_student().blocks[-1].attn, self.batch[0]
        keys = torch.randn(len(images), attention.num_heads, self.patches + 1, attention.head_dim, device=images.device)
        return torch.no_grad()(lambda: highest(class_attention(keys[:, :, 0], keys, attention.scale, 1), self.half))

    def check_equal_losses(self) -> None:
        """What is timed side by side must be the same step: ours, the one by hand and, with all patches, timm's."""
        for keep, kept in ((0.5, self.half), (1.0, self.patches)):
            ours = sum(self.distiller(keep)(self.batch).values())
            torch.testing.assert_close(ours, bare_loss(self.make_student().train(), self.teacher, *self.batch, kept), rtol=1e-4, atol=1e-5)

    def result(self, seconds: dict[str, list[float]], options: argparse.Namespace) -> dict[str, Any]:
        """Times, ratios and checks, as written to JSON."""
        shape = tuple(self.batch[0].shape[1:])
        share = macs(self.teacher, shape, self.half) / macs(self.teacher, shape)
        plain, ours = seconds["plain training"], seconds["MaskedKD keep=0.5"]
        bound = [step + share * forward for step, forward in zip(plain, seconds["teacher forward, all"], strict=True)]
        checks = {
            "keep=0.5 / bound (plain step + kept share of the teacher's forward)": (ratio(ours, bound), 1.05),
            "keep=0.5 / timm's step": (ratio(ours, seconds["timm's distillation"]), None),
            "MaskedKD in a bare loop / the step by hand": (ratio(ours, seconds["by hand, keep=0.5"]), None),
            "training loop / MaskedKD in a bare loop": (ratio(seconds["training loop, keep=0.5"], ours), 1.02),
            "training loop / the step by hand": (ratio(seconds["training loop, keep=0.5"], seconds["by hand, keep=0.5"]), None),
            "saliency / step": (ratio(seconds["saliency"], ours), 0.01),
        }
        if self.low is not None:
            low = seconds[f"MaskedKD keep=0.5, {self.low[0]}"]
            checks[f"keep=0.5 with the teacher in {self.low[0]} / timm's step"] = (ratio(low, seconds["timm's distillation"]), 0.40)
            checks[f"keep=0.5 with the teacher in {self.low[0]} / plain training"] = (ratio(low, plain), 1.6)
        return {
            "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
            "setting": {
                **{
                    "student": options.student,
                    "teacher": options.teacher,
                    "batch": options.batch,
                    "rounds": options.rounds,
                    "smoke": options.smoke,
                },
                **{"device": options.device, "threads": torch.get_num_threads(), "kept": self.half, "patches": self.patches},
            },
            "teacher_share_of_macs": share,
            "seconds": seconds,
            "of_plain": {name: ratio(values, plain) for name, values in seconds.items()},
            "checks": {name: {"ratio": measured, "at_most": limit} for name, (measured, limit) in checks.items()},
        }


def bare_loss(student: Any, teacher: Any, images: Tensor, labels: Tensor, kept: int) -> Tensor:
    """MaskedKD's loss written out on timm's modules, as a user without Stillhouse would."""
    tokens = student.norm_pre(student._pos_embed(student.patch_embed(images)))
    for block in student.blocks[:-1]:
        tokens = block(tokens)
    last = student.blocks[-1]
    attention, (count, length, _) = last.attn, tokens.shape
    queries, keys, values = attention.qkv(last.norm1(tokens)).reshape(count, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    with torch.no_grad():
        row = (queries[:, :, :1] @ keys.transpose(-2, -1) * attention.scale).softmax(-1)
        keep = row.mean(1)[:, 0, 1:].topk(kept).indices
    mixed = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).reshape(count, length, -1)
    tokens = tokens + last.drop_path1(last.ls1(attention.proj(mixed)))
    tokens = tokens + last.drop_path2(last.ls2(last.mlp(last.norm2(tokens))))
    logits_S = student.forward_head(student.norm(tokens))
    with torch.no_grad():
        seen = teacher._pos_embed(teacher.patch_embed(images))
        seen = torch.cat([seen[:, :1], seen[:, 1:].gather(1, keep[..., None].expand(-1, -1, seen.shape[-1]))], 1)
        logits_T = teacher.forward_head(teacher.norm(teacher.blocks(teacher.norm_pre(seen))))
    kd = F.kl_div(logits_S.log_softmax(-1), logits_T.log_softmax(-1), reduction="batchmean", log_target=True)
    return 0.5 * F.cross_entropy(logits_S, labels) + 0.5 * kd


def _update(student: nn.Module, loss: Callable[[], Any]) -> Step:
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _networks(student: str, teacher: str) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    asked = timm.create_model(student).pretrained_cfg

    def make(name: str) -> Any:
        torch.manual_seed(0)
        network = timm.create_model(name)
        network.pretrained_cfg = asked  # mean and std too, for by hand and in timm's task both networks get the same images
        return network

    return lambda: make(student), lambda: make(teacher), asked["input_size"][-1]


def _toys(student: str, teacher: str) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    def make(width: int, depth: int) -> Any:
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=width, depth=depth, num_heads=2, num_classes=10
        )

    return lambda: make(16, 2), lambda: make(32, 3), 32


def _print(result: dict[str, Any], console: Console) -> None:
    setting = result["setting"]
    table = Table(title=f"{setting['student']} from {setting['teacher']}, batch {setting['batch']}, {setting['threads']} threads")
    for column in ("", "ms", "x plain training"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in result["seconds"].items():
        milliseconds = spread([1000 * value for value in values])
        table.add_row(name, with_quartiles(milliseconds, 1), with_quartiles(result["of_plain"][name], 4 if name == "saliency" else 3))
    console.print(table)
    console.print(
        f"median (quartiles) of {setting['rounds']} rounds; half the patches are {result['teacher_share_of_macs']:.3f} of the teacher"
    )
    for name, check in result["checks"].items():
        judged = check["at_most"] is not None and not setting["smoke"]
        verdict = f"  at most {check['at_most']}: {'yes' if check['ratio'][0] <= check['at_most'] else 'NO'}" if judged else ""
        console.print(f"{name}: {with_quartiles(check['ratio'], 4)}{verdict}", soft_wrap=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="deit_tiny_patch16_224", help="a ViT of timm with a class token")
    parser.add_argument("--teacher", default="deit_base_patch16_224", help="a ViT of timm with a class token, of the same size")
    parser.add_argument("--batch", type=int, help="images in a step; 16, or 2 with --dense")
    parser.add_argument("--dense", action="store_true", help="detectors instead of classifiers")
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="with --dense: side of the images, or height and width")
    parser.add_argument("--teacher-precision", help="steps with the teacher in bf16, int8, … beside the others")
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write all times and ratios here, as JSON")
    parser.add_argument("--smoke", action="store_true", help="toy networks, 2 images, 2 rounds, no verdicts")
    options = parser.parse_args()
    options.batch = options.batch or (2 if options.dense else 16)
    if options.smoke:
        options.student = options.teacher = "toy"
        options.batch, options.rounds = 2, 2
    return options


if __name__ == "__main__":
    main()
