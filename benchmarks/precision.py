"""Which library should compute a frozen teacher in low precision on this CPU? One process, all in turn, ratios paired by round.

    python benchmarks/precision.py                                       # deit_base at 224 px, random weights: what each costs
    python benchmarks/precision.py --teacher RUN --data fashion-mnist    # a trained teacher: also how far the answers are
    python benchmarks/precision.py --smoke                               # a toy: does it run?

Beside PyTorch: torchao's int8 compiled by Inductor, ONNX Runtime's dynamic int8, OpenVINO on the whole network in bf16, and what
`--teacher-precision` takes: PyTorch in bf16, and OpenVINO block by block in int8. Nothing is calibrated on images. Whole graphs cannot
leave patches out; where the network stays PyTorch's around its blocks, half of its patches are timed as well.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stillhouse.data import open_data
from stillhouse.data.loading import eval_batches
from stillhouse.data.transforms import eval_transform
from stillhouse.losses.logits import kl_divergence
from stillhouse.masks.tokens import keep_count
from stillhouse.measure.timing import interleaved, ratio, spread, with_quartiles
from stillhouse.models.opening import open_model
from stillhouse.models.precision import lowered
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.models.taps import empty_image
from stillhouse.models.tokens import OnSomeTokens
from stillhouse.run import Run

Forward = Callable[[Tensor], Tensor]
FP32 = "PyTorch, fp32"
BF16, INT8 = "PyTorch, bf16 (--teacher-precision bf16)", "OpenVINO, blocks, int8 (--teacher-precision int8)"
LOOKED_AT = 512
"""Images by which answers are compared."""


def main() -> None:
    options = _options()
    run = Path(options.teacher)
    teacher = Run(run).student if run.is_dir() else open_model(options.teacher, classes=1000, channels=3)
    teacher.eval().requires_grad_(False)
    probes = _probes(teacher, options.data) if options.data else None
    shape = empty_image(teacher).shape[1:]
    images = probes[: options.batch] if probes is not None else torch.randn(options.batch, *shape)
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        forwards = runtimes(teacher, images, Path(folder), console)
        halves = on_half(teacher, images)
        calls = {name: (lambda forward=forward: forward(images)) for name, forward in forwards.items()} | halves
        seconds = interleaved(calls, options.rounds, warmup=2)
        machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        table = Table(title=f"{options.teacher}, {options.batch} images of {shape[1]} px, {machine}")
        for column in ("who computes", "ms", "× PyTorch's fp32", "on half of the patches", "KL, nats", "same first class"):
            table.add_column(column, justify="left" if column == "who computes" else "right")
        plain = seconds[FP32]
        for name, forward in forwards.items():
            half = f"{name}, half"
            table.add_row(
                name,
                f"{1000 * spread(seconds[name]).median:.0f}",
                with_quartiles(ratio(seconds[name], plain), 2),
                with_quartiles(ratio(seconds[half], plain), 2) if half in seconds else "–",
                *(apart(forward, teacher, probes, options.batch) if probes is not None else ("–", "–")),
            )
    console.print(table)


def runtimes(teacher: nn.Module, images: Tensor, folder: Path, console: Console) -> dict[str, Forward]:
    """By name, functions from images to logits; those that this machine cannot have are named and left out."""
    ways: dict[str, Callable[[], Forward]] = {
        FP32: lambda: teacher,
        "PyTorch compiled, fp32": lambda: torch.compile(copy.deepcopy(teacher)),
        BF16: lambda: lowered(teacher, "bf16", images.device)[0],
        "torchao compiled, int8": lambda: by_torchao(teacher),
        "ONNX Runtime, fp32": lambda: by_onnx_runtime(exported(teacher, images, folder)),
        "ONNX Runtime, int8": lambda: by_onnx_runtime(quantized(exported(teacher, images, folder))),
        "OpenVINO, whole, bf16": lambda: by_openvino(exported(teacher, images, folder)),
        INT8: lambda: lowered(teacher, "int8", images.device)[0],
    }
    found: dict[str, Forward] = {}
    for name, make in ways.items():
        try:
            forward = make()
            forward(images)
        except Exception as error:  # a benchmark of others' code goes on without those that fail
            console.print(f"{name}: cannot ({type(error).__name__}: {str(error).splitlines()[0]})", soft_wrap=True)
        else:
            found[name] = forward
    return found


def on_half(teacher: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    """The forward passes on half of the patches."""
    found: dict[str, Callable[[], Any]] = {}
    for precision, name in {"fp32": FP32, "bf16": BF16, "int8": INT8}.items():
        some = OnSomeTokens(copy.deepcopy(teacher) if precision == "fp32" else lowered(teacher, precision, images.device)[0])
        keep = torch.rand(len(images), some.patches).topk(keep_count(0.5, some.patches)).indices
        found[f"{name}, half"] = lambda some=some, keep=keep: some(images, keep)
    return found


def by_torchao(teacher: nn.Module) -> Forward:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    network = copy.deepcopy(teacher)
    quantize_(network, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return torch.compile(network)


def exported(teacher: nn.Module, images: Tensor, folder: Path) -> Path:
    path = folder / "teacher.onnx"
    if not path.is_file():
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(copy.deepcopy(teacher), (images,), str(path), input_names=["images"], output_names=["logits"], dynamo=True)
    return path


def quantized(path: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    low = path.with_name("int8.onnx")
    quantize_dynamic(str(path), str(low), per_channel=True)
    return low


def by_onnx_runtime(path: Path) -> Forward:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def by_openvino(path: Path) -> Forward:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    return lambda images: torch.from_numpy(request.infer([images.numpy()])[0])


def apart(forward: Forward, teacher: nn.Module, probes: Tensor, batch: int) -> tuple[str, str]:
    """KL from the same network in full precision, and the share of images with the same first class."""
    several = probes[: len(probes) // batch * batch].split(batch)
    low, full = (torch.cat([each(images).float() for images in several]) for each in (forward, teacher))
    return f"{kl_divergence(low, full).item():.1e}", f"{(low.argmax(1) == full.argmax(1)).float().mean():.1%}"


def _probes(teacher: nn.Module, spec: str) -> Tensor:
    data = open_data(spec)
    batches = eval_batches(data.val, eval_transform(preprocessing_of(teacher), data), batch=min(LOOKED_AT, len(data.val)))
    _, images, _ = next(iter(batches))
    return images


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="timm/deit_base_patch16_224", help="a spec, or the folder of a run")
    parser.add_argument("--data", help="validation images by which answers are compared; sensible for trained teachers only")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10, help="measured passes of each")
    parser.add_argument("--smoke", action="store_true", help="a toy, 2 rounds")
    options = parser.parse_args()
    if options.smoke:
        options.teacher, options.rounds, options.batch = "timm/vit_tiny_patch16_224:img_size=32,depth=2", 2, 2
    return options


if __name__ == "__main__":
    main()
