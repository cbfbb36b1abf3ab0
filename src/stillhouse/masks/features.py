"""Which places and channels of a feature map count: soft masks made by learnable units, and how well they hit where two maps differ.

Source: adaptive spatial-channel masking, ASCM (ACAM-KD, arXiv 2503.06307, eq. 2-3). Features are tokens [B, N, C]: places, then channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError

STD = 0.01
"""Of the units at the start: every mask begins near 1/2 (the code of MasKD, arXiv 2205.14589)."""


class SelectionUnits(nn.Module):
    """M units that select places, m_s [M, C], and M that select channels, m_c [M, 1], of one feature map.

    Args:
        channels: C.
        units: M.
        parts: which of the two there are.
        balanced: standardise what units are multiplied with (see `spatial_masks`, `channel_masks`).

    Raises:
        UserError: if M < 1 or `parts` is something else.
    """

    def __init__(self, channels: int, units: int, *, parts: Literal["both", "spatial", "channel"] = "both", balanced: bool = False) -> None:
        super().__init__()
        if units < 1:
            raise UserError(f"units is {units}, expected the number of masks, at least 1")
        if parts not in ("both", "spatial", "channel"):
            raise UserError(f"parts is '{parts}', expected 'both', 'spatial' or 'channel'")
        self.balanced = balanced
        self.spatial = nn.Parameter(STD * torch.randn(units, channels)) if parts != "channel" else None
        self.channel = nn.Parameter(STD * torch.randn(units, 1)) if parts != "spatial" else None

    def forward(self, feature_BNC: Tensor) -> dict[str, Tensor]:
        """`spatial` masks [B, M, N] and `channel` masks [B, M, C], those there are."""
        masks = {}
        if self.channel is not None:
            masks["channel"] = channel_masks(feature_BNC, self.channel, balanced=self.balanced)
        if self.spatial is not None:
            masks["spatial"] = spatial_masks(feature_BNC, self.spatial, balanced=self.balanced)
        return masks


def spatial_masks(feature_BNC: Tensor, units_MC: Tensor, *, balanced: bool = False) -> Tensor:
    """M^s = sigmoid(m_s F): how much each place counts for each unit, fp32 [B, M, N] in (0, 1).

    `balanced` (not published) standardises m_s F over the places first: a mask can then neither vanish nor fill up.
    """
    with torch.autocast(feature_BNC.device.type, enabled=False):
        logits_BMN = units_MC.float() @ feature_BNC.float().transpose(1, 2)
    return (_standardised(logits_BMN) if balanced else logits_BMN).sigmoid()


def channel_masks(feature_BNC: Tensor, units_M1: Tensor, *, balanced: bool = False) -> Tensor:
    """M^c = sigmoid(m_c v), v the mean over places: how much each channel counts for each unit, fp32 [B, M, C] in (0, 1).

    A unit is one scalar, a gain on the same v. `balanced` (not published) standardises v over the channels first.
    """
    mean_B1C = feature_BNC.float().mean(1, keepdim=True)
    return (units_M1.float() * (_standardised(mean_B1C) if balanced else mean_B1C)).sigmoid()


def opposed(masks: Tensor, share: float = 1.0) -> Tensor:
    """The same masks; `share` of their gradient comes back with the other sign: what is minimised is maximised over the masks."""
    return masks.detach() - share * (masks - masks.detach())


def correlation(first_BN: Tensor, second_BN: Tensor) -> Tensor:
    """Pearson's, over the places of each image, mean over the batch, in [-1, 1]; a constant correlates with nothing: 0."""
    return (_standardised(first_BN.float()) * _standardised(second_BN.float())).mean()


def _standardised(values: Tensor) -> Tensor:
    return F.layer_norm(values, values.shape[-1:], eps=1e-12)
