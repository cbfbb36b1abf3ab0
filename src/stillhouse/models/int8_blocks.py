"""A frozen transformer whose blocks OpenVINO computes in int8, on CPUs that multiply bytes (VNNI, AMX).

The network stays what it is around its blocks: where tokens are embedded, chosen and read out nothing changes, so it runs on some of its
tokens, and hooks on whole blocks see what they return. Weights have a scale for each output channel. Activations get theirs as they come,
one for each token (several where a layer is wider than the block), so no image depends on the others of its batch and nothing has to be
calibrated. What is not a linear layer is computed in bf16 where the CPU can, else in fp32; between blocks everything is fp32. Where a timm
ViT is asked for its answer alone and that is read from the class token, the last block's MLP runs on the prefix tokens only: nobody looks
at what it would make of the patches.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.taps import empty_image


class _SignalStack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_: ClassVar = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """This thread's stack for signal handlers is afterwards the one it was.

    OpenVINO (2026.4) gives the thread one of its own when a model is compiled or released, and frees it: the next signal, such as Ctrl-C,
    would end the process with a segmentation fault instead of a checkpoint.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    set_stack, before = ctypes.CDLL(None).sigaltstack, _SignalStack()
    set_stack(None, ctypes.byref(before))
    try:
        yield
    finally:
        set_stack(ctypes.byref(before), None)


class Int8Block(nn.Module):
    """A block that takes tokens fp32 [B, ..., D] and nothing else that is a tensor, computed by OpenVINO; without gradient.

    Args:
        compiled: OpenVINO's `CompiledModel` of one input and one output, for any batch and number of tokens.
        shapes: the block on the meta device, for who counts its weights or its arithmetic.
        of_prefix: another one, of the same block's prefix tokens alone, which answers while `whole` is False.
    """

    def __init__(self, compiled: Any, shapes: nn.Module, of_prefix: Any = None) -> None:
        super().__init__()
        self.compiled, self.request = compiled, compiled.create_infer_request()
        self.of_prefix, self.prefix_request = of_prefix, of_prefix.create_infer_request() if of_prefix is not None else None
        self._shapes = (shapes,)  # no submodule: it has no values
        self.whole = True
        self.eval()

    @property
    def shapes(self) -> nn.Module:
        """The block without values."""
        return self._shapes[0]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, tokens: Tensor, *rest: Any, **named: Any) -> Tensor:
        """What the block makes of the tokens, in fp32."""
        if tokens.is_meta:
            answer: Tensor = self.shapes(tokens, *rest, **named)
            return answer
        if tokens.requires_grad:
            raise UserError("no gradient can pass through a teacher in int8; use --teacher-precision fp32 or bf16")
        if _tensors((rest, named)):
            raise UserError("a block in int8 takes tokens alone, but was given a mask or positions too; use --teacher-precision bf16")
        request: Any = self.request if self.whole else self.prefix_request
        found = request.infer([tokens.detach().float().contiguous().numpy()], share_inputs=True)
        return torch.from_numpy(found[0])

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if ending():  # nothing is left to call, and no signal will come
            return
        with signal_stack_kept():
            self.request = self.compiled = self.prefix_request = self.of_prefix = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Block:
        """Another one on the same compiled weights."""
        return Int8Block(self.compiled, self.shapes, self.of_prefix)


def with_int8_blocks(network: nn.Module) -> nn.Module:
    """The network with its blocks in int8, in place.

    Raises:
        UserError: if this CPU, this installation or this network cannot have it.
    """
    if not torch.cpu._is_vnni_supported():
        raise UserError("this CPU has neither VNNI nor AMX, int8 would gain nothing on it; use --teacher-precision bf16")
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise UserError("a teacher in int8 on a CPU is OpenVINO's: pip install 'stillhouse[low-precision]'") from error
    examples = _examples(network)
    held = sum(layer.weight.numel() for name in examples for layer in _linears(network.get_submodule(name)))
    if 2 * held < sum(parameter.numel() for parameter in network.parameters()):
        raise UserError(
            f"{type(network).__name__} cannot be put into int8: most of its weights are not in linear layers of blocks that take tokens "
            "alone (convolutions and rotary positions are not among them); use --teacher-precision bf16"
        )
    last = _read_from_prefix(network)
    for name, (inputs, named) in examples.items():
        block = network.get_submodule(name)
        try:
            with signal_stack_kept():
                compiled = _compiled(_OfTokens(block, inputs[1:], named), inputs[0])
                of_prefix = _compiled(_OfTokens(_OfPrefix(block, network), (), {}), inputs[0]) if block is last else None
        except Exception as error:  # whatever export or OpenVINO cannot do; both have errors of their own
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{name} of {type(network).__name__} cannot be put into int8 ({reason}); use bf16") from error
        network.set_submodule(name, Int8Block(compiled, block.to("meta"), of_prefix))
    if last is not None:
        network.register_forward_pre_hook(_begin_answer)
        network.register_forward_hook(_end_answer, always_call=True)
    return network


def _read_from_prefix(network: Any) -> nn.Module | None:
    """The last block of a ViT whose answer follows from its prefix tokens alone, behind that block; None for others."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Block, VisionTransformer

    plain = type(network) in (VisionTransformer, VisionTransformerDistilled) and type(network.blocks[-1]) is Block
    return network.blocks[-1] if plain and network.global_pool == "token" and network.attn_pool is None else None


class _OfPrefix(nn.Module):
    """A last block as far as the prefix tokens go: they attend to all."""

    def __init__(self, block: nn.Module, network: Any) -> None:
        super().__init__()
        self.block, self.prefix = block, int(network.num_prefix_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        block: Any = self.block
        attended = (tokens + block.ls1(block.attn(block.norm1(tokens))))[:, : self.prefix]
        answer: Tensor = attended + block.ls2(block.mlp(block.norm2(attended)))
        return answer


def _begin_answer(network: Any, inputs: Any) -> None:
    """From here to the answer nobody sees the last block's patches, unless they have a hook there."""
    seen = (network.blocks[-1], network.blocks, network.norm)
    network.blocks[-1].whole = any(module._forward_hooks or module._forward_pre_hooks for module in seen)


def _end_answer(network: Any, inputs: Any, output: Any) -> None:
    network.blocks[-1].whole = True


def _examples(network: nn.Module) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each block with linear layers is given, by its name, for two empty images; only blocks of tokens alone."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    hooks = []
    for name, block in _blocks(network):

        def remember(module: nn.Module, inputs: Any, named: Any, output: Any, name: str = name) -> None:
            alone = inputs and isinstance(inputs[0], Tensor) and not _tensors((inputs[1:], named))
            if alone and isinstance(output, Tensor):
                found[name] = (inputs, named)

        hooks.append(block.register_forward_hook(remember, with_kwargs=True))
    image = empty_image(network)
    with torch.no_grad():
        network.eval()(image.expand(2, *image.shape[1:]))
    for hook in hooks:
        hook.remove()
    return found


def _blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The members of the outermost lists of modules that have linear layers, by name."""
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in network.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not name.startswith(inside or "."):
            inside += (f"{name}." if name else "",)
            found += [(f"{name}.{child}".lstrip("."), block) for child, block in module.named_children() if _linears(block)]
    return found


def _linears(block: nn.Module) -> list[nn.Linear]:
    return [module for module in block.modules() if type(module) is nn.Linear]


def _tensors(given: Any) -> bool:
    return any(isinstance(value, Tensor) for value in torch.utils._pytree.tree_leaves(given))


class _OfTokens(nn.Module):
    """A block as a function of its tokens, its linear layers with weights in int8; the block itself stays what it is."""

    def __init__(self, block: nn.Module, rest: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.block, self.rest, self.named = copy.deepcopy(block), rest, named
        for name, module in list(self.named_modules()):
            if type(module) is nn.Linear:
                self.set_submodule(name, _Int8Linear(module))

    def forward(self, tokens: Tensor) -> Any:
        return self.block(tokens, *self.rest, **self.named)


class _Int8Linear(nn.Module):
    """W = q s with q in int8 [out, in] and a scale for each output channel, as OpenVINO looks for it; symmetric, so that 0 stays 0."""

    q: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        self.register_buffer("q", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.q.to(tokens.dtype) * self.scale, self.bias)


def _compiled(block: _OfTokens, tokens: Tensor) -> Any:
    """OpenVINO's `CompiledModel`. By its frontend, not by `convert_model`, which would tell its makers of the conversion unasked."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    sizes = (dict.fromkeys(range(tokens.ndim), torch.export.Dim.AUTO),)
    program = torch.export.export(block.eval(), (tokens,), dynamic_shapes=sizes, strict=False)
    frontend = FrontEndManager().load_by_framework("pytorch")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns, with a traceback, of operators that PyTorch no longer has
    try:
        decoder = TorchFXPythonDecoder.from_exported_program(program)
        model = frontend.convert(frontend.load(decoder))
    finally:
        logging.disable(level)
    widths = [layer.q.shape[1] for layer in block.modules() if isinstance(layer, _Int8Linear)]
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if torch.cpu._is_avx512_bf16_supported() else "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": math.gcd(*widths),
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    return openvino.Core().compile_model(model, "CPU", settings)
