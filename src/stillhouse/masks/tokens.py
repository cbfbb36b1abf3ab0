"""Which tokens are shown: scores over patches, and the choice of the K that stay. Pure functions, fp32, no gradient needed.

Source of the scores and of the choice: MaskedKD, arXiv 2302.10494, section 3 (the class token's attention in the student's last block).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.randomness import uniform


def class_attention(query_BHD: Tensor, keys_BHND: Tensor, scale: float, prefix: int) -> Tensor:
    """What share of its attention the class token gives to each patch, mean over heads.

    s = 1/H sum_h softmax(q_cls k^T scale), over all tokens including the prefix, whose columns are then left out without renormalising
    (the official code's reading; the paper's formula sums over patches only, which ranks the same within one head).

    Args:
        query_BHD: the class token's query, per head.
        keys_BHND: all keys, the prefix tokens first.
        scale: factor on the dot products, usually 1/sqrt(d).
        prefix: how many leading tokens are not patches.

    Returns:
        fp32 scores [B, N - prefix], each in [0, 1].
    """
    with torch.autocast(query_BHD.device.type, enabled=False):
        logits = torch.einsum("bhd,bhnd->bhn", query_BHD.float(), keys_BHND.float()) * scale
        return logits.softmax(-1).mean(1)[:, prefix:]


def received_attention(queries_BHND: Tensor, keys_BHND: Tensor, scale: float, prefix: int) -> Tensor:
    """What attention a patch receives, mean over queries and heads: fp32 [B, N - prefix]. For students without a class token."""
    with torch.autocast(queries_BHND.device.type, enabled=False):
        logits = queries_BHND[:, :, prefix:].float() @ keys_BHND.float().transpose(-2, -1) * scale
        return logits.softmax(-1).mean((1, 2))[:, prefix:]


def feature_norm(feature_BCHW: Tensor) -> Tensor:
    """The Euclidean norm over channels at each place: for convolutional students. fp32 [B, H * W]."""
    return feature_BCHW.float().norm(dim=1).flatten(1)


def random_scores(batch: int, patches: int, device: torch.device) -> Tensor:
    """Uniform scores [B, N] in [0, 1): a random choice, the baseline any informed one must beat."""
    return uniform(batch, patches, device)


def drawn_scores(scores_BN: Tensor) -> Tensor:
    """Scores whose K highest are K patches drawn without replacement, each time with odds in proportion to `scores` [B, N] >= 0.

    log s - log(-log u) with uniform u (Gumbel top-k, Kool et al. 2019, arXiv 1903.06059). Where all scores are equal: a random choice.
    """
    noise = uniform(len(scores_BN), scores_BN.shape[1], scores_BN.device)
    return scores_BN.log() - (-noise.log()).log()


def resample(scores_BN: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Scores [B, rows * columns] from one grid of places on another, bilinear with antialiasing; unchanged when the grids are equal."""
    if grid == to:
        return scores_BN
    maps = scores_BN.unflatten(1, grid).unsqueeze(1)
    return F.interpolate(maps, size=to, mode="bilinear", antialias=True, align_corners=False).flatten(1)


def keep_count(keep: float | int, patches: int) -> int:
    """How many of `patches` stay: a count as it is, a share in (0, 1] rounded to the nearest whole number.

    The paper's 75 % and 40 % of 196 are 144 and 80; give those counts to reproduce its table.

    Raises:
        UserError: unless it comes to between 1 and `patches`.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise UserError(f"keep is {keep!r}, expected a share in (0, 1] or a whole number of patches")
    count = keep if isinstance(keep, int) else round(keep * patches) if 0 < keep <= 1 else 0
    if not 1 <= count <= patches:
        raise UserError(
            f"keep={keep} does not leave between 1 and {patches} of the teacher's {patches} patches; "
            f"give a share such as 0.5 or a count such as {max(1, patches // 2)}"
        )
    return count


def highest(scores_BN: Tensor, count: int) -> Tensor:
    """The indices [B, count] of the highest scores in each row, highest first."""
    return scores_BN.topk(count, dim=1).indices


def as_mask(keep_BK: Tensor, patches: int) -> Tensor:
    """1.0 where a patch is kept, 0.0 elsewhere: fp32 [B, patches]."""
    return torch.zeros(keep_BK.shape[0], patches, device=keep_BK.device).scatter(1, keep_BK, 1.0)
