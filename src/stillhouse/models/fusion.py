"""Cross-attention between the feature maps of two networks, place by place, without ever holding the N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from stillhouse.errors import UserError

LIMIT = 2 * 2**30
"""Bytes the attention matrix may take on a device that has no fused attention."""


class CrossAttention(nn.Module):
    """Student-teacher cross-attention feature fusion, STCA-FF (ACAM-KD, arXiv 2503.06307, eq. 1): one map asks, the other answers.

    Q = W_q F_asking, K = W_k F_answering, V = W_v F_answering, F_f = softmax(Q K^T / sqrt(C_q)) V, with C_q = C // 2. A place of F_f
    knows the asking map at that place, and the answering map only as a whole: shuffled places of the latter change nothing.

    Args:
        channels: C of both maps.

    Raises:
        UserError: if C is less than 2, for C_q would be 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 2
        if width < 1:
            raise UserError(
                f"maps of {channels} channel(s) leave C_q = C // 2 = {width} for queries and keys, expected at least 2 channels"
            )
        self.query = nn.Linear(channels, width, bias=False)
        self.key = nn.Linear(channels, width, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)

    def forward(self, asking_BNC: Tensor, answering_BNC: Tensor) -> Tensor:
        """The fused feature F_f [B, N, C]: at each place of the asking map, what the answering one has to say to it."""
        return attention(self.query(asking_BNC), self.key(answering_BNC), self.value(answering_BNC))


def attention(query_BND: Tensor, key_BND: Tensor, value_BNC: Tensor, limit: int = LIMIT) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V: [B, N, C], in O(N) memory, forward and backward, wherever PyTorch has a fused kernel (CPU, CUDA, ...).

    The kernels want queries, keys and values of one width, on CUDA a multiple of 8: zeros fill up the narrower ones, which changes nothing.

    Args:
        limit: bytes the attention matrix may take where there is no such kernel, and the plain formula is computed.

    Raises:
        UserError: if it would take more. Not asked when compiled.
    """
    width = -(-max(query_BND.shape[-1], value_BNC.shape[-1]) // 8) * 8
    query, key, value = (F.pad(each, (0, width - each.shape[-1])).unsqueeze(1).contiguous() for each in (query_BND, key_BND, value_BNC))
    if not torch.compiler.is_compiling() and torch._fused_sdp_choice(query, key, value) == SDPBackend.MATH.value:
        _refuse_beyond(limit, query_BND, key_BND)
    fused = F.scaled_dot_product_attention(query, key, value, scale=query_BND.shape[-1] ** -0.5)
    return fused.squeeze(1)[..., : value_BNC.shape[-1]]


def _refuse_beyond(limit: int, query_BND: Tensor, key_BND: Tensor) -> None:
    batch, places, answers = len(query_BND), query_BND.shape[1], key_BND.shape[1]
    needed = batch * places * answers * 4
    if needed > limit:
        raise UserError(
            f"attention over {places} x {answers} places of {batch} image(s) would take {needed / 2**30:.2f} GiB, as no fused attention "
            f"runs on {query_BND.device.type} here, expected at most {limit / 2**30:.2f} GiB; use coarser levels, smaller images or batches"
        )
