"""Multiply-adds of a forward pass: counted by torch, and for a ViT by the closed form that papers' tables follow."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stillhouse.errors import UserError
from stillhouse.masks.tokens import keep_count
from stillhouse.measure.copies import on_meta, with_frozen_weights
from stillhouse.models.tokens import OnSomeTokens


def macs(model: nn.Module, image_shape: tuple[int, int, int], keep: float | int | None = None) -> int:
    """Multiply-adds of one forward pass in eval mode, for one image.

    Matrix products, convolutions and attention count, as in papers; additions, norms, activations and resampling do not.
    The pass runs on the meta device, where it costs neither arithmetic nor memory; only a network that cannot run there
    (one that looks at values, or keeps tensors outside its parameters and buffers) is run where it is. Either way it is a
    copy that runs, on the same weights: the network itself gets no hook, flag or statistic.

    Args:
        model: a network from images to anything.
        image_shape: (C, H, W) of one image.
        keep: number or share of the patches a transformer runs on (prefix tokens come on top); None for all.

    Raises:
        UserError: if the network does not accept such an image, or cannot run on `keep` of its tokens.
    """
    try:
        return _count(on_meta(model), image_shape, keep)
    except UserError:
        raise
    except Exception:  # whatever meta tensors cannot do; a real fault comes up again on the real device
        pass
    try:
        return _count(with_frozen_weights(model), image_shape, keep)
    except UserError:
        raise
    except Exception as fault:
        raise UserError(
            f"{type(model).__name__} does not run on images of shape {tuple(image_shape)}; give the (channels, height, width) "
            f"it was made for ({type(fault).__name__}: {fault})"
        ) from fault


def vit_macs(depth: int, width: int, tokens: int, patches: int, patch_dim: int, classes: int, mlp_ratio: float = 4) -> int:
    """Multiply-adds of a ViT's forward pass, for one image: L ((4 + 2 r) n D² + 2 n² D) + N P D + D C.

    At the usual MLP ratio r = 4 this is L (12 n D² + 2 n² D) + N P D + D C, by which the "FLOPs" of MaskedKD's tables
    (arXiv 2302.10494) come out. There the patch embedding is paid for all N patches, the blocks for the n tokens that run; where only the
    kept patches are embedded, as `OnSomeTokens` does with a plain ViT, `patches` is their number.

    Args:
        depth: L, number of blocks.
        width: D, channels of a token.
        tokens: n, tokens inside a block, prefix tokens included.
        patches: N, patches that are embedded.
        patch_dim: P, values in a patch (channels x side²).
        classes: C, outputs of the head; 0 without a head.
        mlp_ratio: r, hidden width of the MLP over D.
    """
    hidden = int(width * mlp_ratio)
    block = 4 * tokens * width**2 + 2 * tokens * width * hidden + 2 * tokens**2 * width
    return depth * block + patches * patch_dim * width + width * classes


def _count(model: nn.Module, image_shape: tuple[int, int, int], keep: float | int | None) -> int:
    """One forward pass of one image where the network's tensors are. Puts the network in eval mode and may hook it."""
    somewhere = next(model.parameters(), torch.empty(0))
    inputs = [torch.zeros(1, *image_shape, device=somewhere.device, dtype=somewhere.dtype)]
    if keep is not None:
        model = OnSomeTokens(model)
        inputs.append(torch.arange(keep_count(keep, model.patches), device=somewhere.device)[None])
    # Fused attention counts as nothing on CPU, its written-out products count everywhere.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(*inputs)
    return int(counter.get_total_flops()) // 2
