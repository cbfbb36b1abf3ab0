"""Would a step be faster if the teacher worked beside the student, or on the images of several steps at once?

    python benchmarks/overlap.py --rounds 9                             # deit_tiny from deit_base at 224 px; some minutes on two cores
    python benchmarks/overlap.py --rounds 9 --teacher-precision int8    # a teacher that takes about as long as its student
    python benchmarks/overlap.py --smoke                                # toy networks: does it run?

KD, whose teacher needs nothing of its student, in turn in one process: one after the other, as Stillhouse does it; the teacher asked about
the images of four steps at once; and the teacher in a thread of its own, on the images of the next step, while the student learns. On a CPU
each of the two then has half of the threads, on CUDA a stream of its own. All ways give the student the same answers.
Weights are random: cost does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import timm
import torch
from rich.console import Console
from torch import Tensor

from stillhouse.losses.logits import cross_entropy, kl_divergence
from stillhouse.measure.timing import interleaved, ratio, spread, with_quartiles
from stillhouse.models.precision import lowered

STEPS = 4
WAYS = ("plain training", "one after the other", f"teacher on {STEPS} steps' images", "teacher beside the student")


def main() -> None:
    options = _options()
    bench = Bench(options)
    bench.check_equal_answers()
    seconds = interleaved(bench.functions(), options.rounds)
    networks, console = f"{options.student} from {options.teacher} in {options.teacher_precision}", Console()
    console.print(f"{networks}, batch {options.batch}, {bench.threads} threads", soft_wrap=True)
    for way, took in seconds.items():
        step = with_quartiles(spread([1000 * each / STEPS for each in took]), 1)
        console.print(f"{way}: {step} ms a step, {with_quartiles(ratio(took, seconds[WAYS[1]]), 3)} of {WAYS[1]}", soft_wrap=True)


class Bench:
    """`STEPS` steps at a time, on as many batches of random images."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.threads = torch.device(options.device), torch.get_num_threads()
        teacher = _network(options.teacher, 48, options.smoke)
        self.teacher = self.lowered(teacher, options.teacher_precision)
        with self.half_of_the_threads():
            self.teacher_beside = self.lowered(teacher, options.teacher_precision)
        student = _network(options.student, 24, options.smoke)
        self.make_student = lambda: _network(options.student, 24, options.smoke).to(self.device).train()
        shape = (options.batch, 3, *student.patch_embed.img_size)
        self.batches = [torch.randn(shape, device=self.device) for _ in range(STEPS)]
        self.labels = torch.arange(options.batch, device=self.device) % student.num_classes
        self.pool = ThreadPoolExecutor(1)
        with self.half_of_the_threads():
            self.pool.submit(torch.set_num_threads, torch.get_num_threads()).result()
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None

    def lowered(self, teacher: Any, precision: str) -> Any:
        """The teacher in that precision, for as many threads as there are now."""
        return lowered(teacher.requires_grad_(False).eval().to(self.device), precision, self.device)[0]

    @contextlib.contextmanager
    def half_of_the_threads(self) -> Iterator[None]:
        """Where the CPU computes."""
        torch.set_num_threads(self.threads if self.device.type == "cuda" else max(1, self.threads // 2))
        try:
            yield
        finally:
            torch.set_num_threads(self.threads)

    def functions(self) -> dict[str, Callable[[], object]]:
        """By name, each with a student of its own."""
        ways = (self.plain, self.in_turn, self.at_once, self.beside)
        return {name: way(self.update()) for name, way in zip(WAYS, ways, strict=True)}

    def update(self) -> Callable[..., None]:
        """A student's step on images, with or without the teacher's logits."""
        student = self.make_student()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

        def step(images: Tensor, logits_T: Tensor | None) -> None:
            logits = student(images)
            loss = cross_entropy(logits, self.labels)
            if logits_T is not None:
                loss = 0.5 * loss + 0.5 * kl_divergence(logits, logits_T)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def plain(self, update: Callable[..., None]) -> Callable[[], object]:
        return lambda: [update(images, None) for images in self.batches]

    def in_turn(self, update: Callable[..., None]) -> Callable[[], object]:
        return lambda: [update(images, ask(self.teacher, images)) for images in self.batches]

    def at_once(self, update: Callable[..., None]) -> Callable[[], object]:
        return lambda: [update(images, logits) for images, logits in zip(self.batches, self.answers_at_once(), strict=True)]

    def answers_at_once(self) -> tuple[Tensor, ...]:
        return ask(self.teacher, torch.cat(self.batches)).chunk(STEPS)

    def beside(self, update: Callable[..., None]) -> Callable[[], object]:
        known = [self.pool.submit(self.ask_beside, self.batches[0]).result()]

        def steps() -> None:
            with self.half_of_the_threads():
                for number, images in enumerate(self.batches):
                    asked = self.pool.submit(self.ask_beside, self.batches[(number + 1) % STEPS])
                    update(images, known.pop())
                    known.append(asked.result())
                    if self.stream is not None:
                        torch.cuda.current_stream().wait_stream(self.stream)

        return steps

    def ask_beside(self, images: Tensor) -> Tensor:
        with torch.cuda.stream(self.stream):  # of None: where one is
            return ask(self.teacher_beside, images)

    def check_equal_answers(self) -> None:
        """What is timed must be the same work."""
        for images, at_once in zip(self.batches, self.answers_at_once(), strict=True):
            ours = ask(self.teacher, images)
            torch.testing.assert_close(at_once, ours, rtol=1e-3, atol=1e-3)
            beside = self.pool.submit(self.ask_beside, images).result()
            torch.testing.assert_close(beside, ours, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def ask(teacher: Any, images: Tensor) -> Tensor:
    """The teacher's logits."""
    logits: Tensor = teacher(images)
    return logits


def _network(name: str, width: int, smoke: bool) -> Any:
    torch.manual_seed(0)
    toy = {"img_size": 32, "patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": 2, "num_classes": 20}
    return timm.create_model(name, **(toy if smoke else {}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="deit_tiny_patch16_224", help="a ViT of timm")
    parser.add_argument("--teacher", default="deit_base_patch16_224", help="a ViT of timm, of the same image size")
    parser.add_argument("--teacher-precision", default="fp32", help="fp32, bf16, int8, …")
    parser.add_argument("--batch", type=int, default=8, help="images in a step")
    parser.add_argument("--rounds", type=int, default=9, help=f"measured times that each way takes {STEPS} steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="toy networks, 2 images, 2 rounds")
    options = parser.parse_args()
    if options.smoke:
        options.student = options.teacher = "vit_tiny_patch16_224"
        options.batch, options.rounds = 2, 2
    return options


if __name__ == "__main__":
    main()
