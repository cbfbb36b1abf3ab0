"""A frozen network in low precision: a copy that answers nearly the same for less arithmetic.

| precision | on | what computes |
|---|---|---|
| bf16, fp16 | CPU, CUDA; CUDA | PyTorch; weights and activations of that type |
| int8 | CPU with VNNI or AMX | OpenVINO, block by block (`stillhouse.models.int8_blocks`); patches are embedded in bf16 where the CPU can |
| int8, fp8 | CUDA | torchao: weights a scale a channel, activations a scale a token, sums in int32 or fp32; the rest in bf16 |

Hooks on whole blocks see what they return in every precision. Inside of blocks there is nothing to hook where OpenVINO computes them.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.int8_blocks import Int8Block, with_int8_blocks
from stillhouse.models.tokens import embedding_of

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")


def lowered(network: nn.Module, precision: str, device: torch.device) -> tuple[nn.Module, str]:
    """A copy of a frozen network in low precision on `device`, and the name of what computes it; fp32 is the network itself.

    Raises:
        UserError: if the precision is not known, or this device or network cannot have it, with the reason.
    """
    if precision not in PRECISIONS:
        raise UserError(f"teacher_precision is '{precision}', expected one of {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return network, "torch"
    on_cuda = device.type == "cuda"
    if precision in ("fp16", "fp8") and not on_cuda:
        raise UserError(
            f"a teacher in {precision} needs a CUDA GPU, the device here is {device.type}; use bf16, or int8 on a CPU with VNNI"
        )
    network = copy.deepcopy(network).requires_grad_(False).eval().to(device)
    if precision == "int8" and not on_cuda:
        embedding = embedding_of(with_int8_blocks(network))
        if embedding is not None and torch.cpu._is_avx512_bf16_supported():
            cast(embedding[0], torch.bfloat16).register_forward_hook(lambda layer, inputs, output: output.float())
        return network, "openvino"
    if precision in ("int8", "fp8"):
        return with_torchao(network, precision), "torchao"
    return cast(network, torch.float16 if precision == "fp16" else torch.bfloat16), "torch"


def cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in `dtype`, in place; each module with weights casts what it is given, so that it may be entered anywhere."""
    network.to(dtype)
    for module in network.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(partial(_cast_inputs, dtype))
    return network


def _cast_inputs(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(given.to(dtype) if isinstance(given, Tensor) and given.is_floating_point() else given for given in inputs)


def with_torchao(network: nn.Module, precision: str) -> nn.Module:
    """The network in bf16, in place, whose linear layers multiply in int8 or fp8 by torchao, scales found for each token as it comes.

    Raises:
        UserError: if torchao is missing, or this GPU or network cannot have it.
    """
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise UserError(f"a teacher in {precision} on a GPU is torchao's: pip install 'stillhouse[low-precision]'") from error
    if not any(_multiplies(module, "") for module in network.modules()):
        raise UserError(f"{type(network).__name__} has no linear layers that could multiply in {precision}; use bf16")
    cast(network, torch.bfloat16)
    # The other setting of Inductor's options holds for the process, the student's compilation included.
    int8 = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    try:
        config = int8 if precision == "int8" else Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        quantize_(network, config, filter_fn=_multiplies)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"torchao cannot put {type(network).__name__} into {precision} on this GPU: {error}; use bf16") from error
    return network


def _multiplies(module: nn.Module, name: str) -> bool:
    """Linear layers whose sides the GPU's low-precision kernels take: multiples of 16."""
    return isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0


def count_parameters(network: nn.Module) -> int:
    """How many weights a network has, also where they are no longer parameters."""
    blocks = [module for module in network.modules() if isinstance(module, Int8Block)]
    return sum(parameter.numel() for each in (network, *(block.shapes for block in blocks)) for parameter in each.parameters())
