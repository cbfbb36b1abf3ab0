"""DMJD: each picture is shown twice in a step, so masked that every patch is hidden once, and what is visible is asked about as well.

A masked picture teaches by what is hidden; most of a step is spent on what is visible. Here the second view hides what the first one shows,
and a second head has to say of the visible patches, too, what the decoder says of the hidden ones: which edges there are, as histograms of
oriented gradients. Nobody is the teacher; what is distilled from is made of the pixels.

Masked: the student's input patches, in blocks, by two choices for each sample that leave nothing out. Removed, not zeroed.
Source: Ma et al., "Disjoint Masking with Joint Distillation for Efficient Masked Image Modeling", arXiv 2301.00230.

    stillhouse distill --method dmjd --student timm/vit_small_patch16_224 --data imagefolder:DIR

The run keeps the encoder. A batch of images is encoded twice; the paper's rate is that of a usual one times predicted / masked.

Sure, from the code: both masks, the targets and their whitening, both heads and losses. As we read that code, it asks of a visible patch
the edges of another one, for answers lie in the shuffle's order and targets row by row; here each is asked its own. Our reading: how much
the second view hides of the first is rounded so that with predicted=1 nothing is left out. Where we depart: the encoder is timm's vision
transformer, theirs has convolutions in front; the paper's other targets, such as CLIP's features, and more than two views are not here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillers.base import Distiller
from stillhouse.errors import UserError
from stillhouse.losses.gradients import edges_of_patches
from stillhouse.losses.pretraining import hidden_pixels_loss
from stillhouse.masks.patches import Masking, disjoint_maskings
from stillhouse.models.mae import Decoder, begin_pretraining, check_encoder, encode
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of

BINS = 9


class DMJD(Distiller):
    """sum_hidden mean (g(S) - t)^2 / number of hidden patches + theta mean_visible smooth_L1(h(S), t), t the edges of a patch.

    Args:
        student: a vision transformer of timm; it becomes an encoder, images [B, C, H, W] to features [B, D].
        masked: the share of patches that each view hides, in (0, 1).
        predicted: the share that both hide between them, from `masked` to 1, which leaves nothing out.
        block: patches are hidden in blocks of block x block; 1 for each by itself.
        theta: weight of the visible patches, >= 0.
        cell: pixels of a histogram's side; by default half a patch's.
        decoder_width: of the decoder's tokens, and of the visible patches' head; a multiple of decoder_heads and of 4.
        decoder_depth: its blocks.
        decoder_heads: of its attention.

    Raises:
        UserError: if a setting is out of range, or the student cannot run on some of its patches.
    """

    tasks: ClassVar[tuple[str, ...]] = ("encode",)
    off: ClassVar[dict[str, Any]] = {}
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        student: nn.Module,
        *,
        masked: float = 0.6,
        predicted: float = 1.0,
        block: int = 2,
        theta: float = 1.0,
        cell: int | None = None,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        if not 0 <= theta < float("inf"):
            raise UserError(f"theta is {theta}, expected the weight of the visible patches, a finite number of at least 0")
        super().__init__(check_encoder(student, "student"))
        self.cell = _cell(student, cell)
        self.decoder = Decoder(student, decoder_width, decoder_depth, decoder_heads, pixels=False)
        self.grid = self.decoder.grid
        disjoint_maskings(1, self.grid, masked, torch.device("cpu"), predicted, block)  # refuses what cannot be
        self.masked, self.predicted, self.block, self.theta = masked, predicted, block, theta
        edges = _edges(student, self.cell)
        self.of_hidden = nn.Sequential(nn.LayerNorm(decoder_width, eps=1e-6), nn.Linear(decoder_width, edges))
        self.of_visible = visible_head(student.embed_dim, decoder_width, edges)  # type: ignore[arg-type]
        known = preprocessing_of(student) or Preprocessing((0.0,), (1.0,), None)
        self.register_buffer("mean", torch.tensor(known.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(known.std).view(-1, 1, 1), persistent=False)
        begin_pretraining(student)

    def forward(self, batch: tuple[Tensor, Any], turn: str = "student") -> dict[str, Tensor]:
        """`hidden`: what the decoder says of hidden patches; `visible`: what the other head says of visible ones. Means over both views."""
        images = batch[0]
        target = edges_of_patches(255 * (images * self.std + self.mean), self.grid, self.cell, BINS)
        both = [self.view(images, target, masking) for masking in self.views(len(images), images.device)]
        hidden, visible = (torch.stack(terms).mean() for terms in zip(*both, strict=True))
        return {"hidden": hidden, "visible": self.theta * visible}

    def views(self, batch: int, device: torch.device) -> tuple[Masking, ...]:
        """What the student is shown, view by view."""
        return disjoint_maskings(batch, self.grid, self.masked, device, self.predicted, self.block)

    def view(self, images: Tensor, target: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        """Both terms of one view."""
        latent = encode(self.student, images, masking.keep)
        prefix = self.decoder.prefix
        hidden = hidden_pixels_loss(self.of_hidden(self.decoder(latent, masking.restore)[:, prefix:]), target, masking.mask)
        visible = F.smooth_l1_loss(self.of_visible(latent[:, prefix:]).float(), self.asked(target, masking.keep), beta=2.0)
        return hidden, visible

    def asked(self, target: Tensor, keep: Tensor) -> Tensor:
        """The edges [B, K, D] of the visible patches, in the order in which they are encoded."""
        return target.gather(1, keep[..., None].expand(-1, -1, target.shape[-1]))

    @torch.no_grad()
    def look(self, batch: tuple[Tensor, Any]) -> dict[str, Tensor]:
        """`visible` [B, rows, columns]: 1 where a patch was visible in the first view."""
        return {"visible": 1 - self.views(len(batch[0]), batch[0].device)[0].mask.unflatten(1, self.grid)}


def visible_head(channels: int, width: int, edges: int) -> nn.Sequential:
    """A projector of three layers, whose last norm learns nothing, and a predictor."""
    first, second, third = nn.Linear(channels, width), nn.Linear(width, width), nn.Linear(width, width)
    norms = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width, elementwise_affine=False)
    projector = nn.Sequential(first, norms[0], nn.GELU(), second, norms[1], nn.GELU(), third, norms[2])
    return nn.Sequential(projector, nn.Linear(width, edges))


def _edges(student: Any, cell: int) -> int:
    """How many numbers tell of a patch's edges."""
    height, width = student.patch_embed.patch_size
    return (height // cell) * (width // cell) * int(student.patch_embed.proj.in_channels) * BINS


def _cell(student: Any, cell: int | None) -> int:
    height, width = student.patch_embed.patch_size
    side = height // 2 if cell is None else cell
    if side < 1 or height % side or width % side:
        raise UserError(f"cell is {cell}, expected the side of a square of which a patch of {height} x {width} pixels has a whole number")
    return side
