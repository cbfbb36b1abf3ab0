"""DMAE: a small masked autoencoder also learns what a big one's middle block makes of the same few visible patches.

Both networks see the same quarter of a picture's patches. The student paints the rest, as in MAE; beside it a block at three quarters of
its depth is compared with the teacher's at three quarters of its own, through a learned projection. The teacher runs no further than that
block and on a quarter of its tokens, so distilling costs next to nothing; and it is pre-trained only, so there is no fine-tuning before.

Masked: the input patches of student and teacher, one uniform choice by sample for both, fresh in each step. Removed, not zeroed.
Source: Bai et al., "Masked Autoencoders Enable Efficient Knowledge Distillers", CVPR 2023, arXiv 2208.12256.

    stillhouse distill --method dmae --teacher timm/vit_large_patch16_224.mae --student timm/vit_base_patch16_224 --data imagefolder:DIR

The run keeps the encoder; decoder and projection are thrown away. Fine-tune it with `--method scratch --student RUN`. The teacher may be
timm's vision transformer, such as those tagged `.mae`, a run of `mae`, or its RUN/autoencoder.

Sure, from paper and code: masking, blocks, projections, both losses, defaults. Where paper and code differ we follow the code: features are
brought to length 1 before they are compared, except without projection, and pixels are not normalised. Where we depart: the official code
runs the whole teacher and its decoder although nothing reads them; the same numbers come of running less. Our reading: alpha, which the
paper has and the code does not, is 1; blocks of other depths than the official 12 and 24 are round(3/4 depth), counted from 1. Not there:
the code's switches for painting what the teacher paints, which its own forward pass refuses. `mlp2` is as the code means it; there it
stops with a NameError.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.distillers.classics.mae import pixel_loss, shown
from stillhouse.errors import UserError
from stillhouse.losses.pretraining import direction_distance, feature_distance
from stillhouse.masks.patches import random_masking, visible_count
from stillhouse.models.mae import Decoder, begin_pretraining, check_encoder, check_grids, encoder_of, finished, prefix_of, tapped, through


class DMAE(Distiller):
    """MAE + alpha sum_pairs mean |u(T_i) - u(g(S_j))|, with u(z) = z / |z| and g learned along.

    Args:
        student: a vision transformer of timm; it becomes an encoder.
        teacher: a vision transformer of timm that was trained by masking, or a masked autoencoder, with the same grid of patches.
        masked: the share of hidden patches, in (0, 1).
        alpha: weight of the features, >= 0; 0 is MAE.
        student_blocks: which of the student's blocks are compared, from 0, several joined by +; by default the one at 3/4 of its depth.
        teacher_blocks: the teacher's, as many, in the same order.
        distance: "l1", the mean absolute difference; or "l2", the mean square.
        projection: "linear" from the student's channels to the teacher's; "mlp", with one hidden layer; "mlp2", two of those; or "none",
            which compares features as they are, not only their directions.
        norm_pixels: whether the pixels of each patch are normalised before they are compared.
        decoder_width: of the student's decoder, a multiple of decoder_heads and of 4.
        decoder_depth: its blocks.
        decoder_heads: of its attention.

    Raises:
        UserError: if a setting is out of range, blocks do not exist or pair, or the grids of patches differ.
    """

    tasks: ClassVar[tuple[str, ...]] = ("encode",)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        masked: float = 0.75,
        alpha: float = 1.0,
        student_blocks: int | str | None = None,
        teacher_blocks: int | str | None = None,
        distance: Literal["l1", "l2"] = "l1",
        projection: Literal["linear", "mlp", "mlp2", "none"] = "linear",
        norm_pixels: bool = False,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        own, other = check_encoder(student, "student"), check_encoder(encoder_of(teacher), "teacher")
        _check(alpha, distance, projection)
        check_grids(own, other)
        super().__init__(student, teacher)
        self.blocks_S, self.blocks_T = _blocks("student", own, student_blocks), _blocks("teacher", other, teacher_blocks)
        if len(self.blocks_S) != len(self.blocks_T):
            raise UserError(f"student_blocks names {len(self.blocks_S)} and teacher_blocks {len(self.blocks_T)}, expected as many: pairs")
        if prefix_of(own) != prefix_of(other):
            raise UserError(
                f"before its patches the student has {prefix_of(own)} token(s) and the teacher {prefix_of(other)}, expected as many; "
                "name networks with a class token each and no registers"
            )
        if projection == "none" and own.embed_dim != other.embed_dim:
            raise UserError(
                f"projection is 'none', but the student's features have {own.embed_dim} channels and the teacher's {other.embed_dim}; "
                "use projection='linear'"
            )
        self.decoder = Decoder(student, decoder_width, decoder_depth, decoder_heads)
        self.grid = self.decoder.grid
        visible_count(masked, self.grid[0] * self.grid[1])
        self.masked, self.alpha, self.squared, self.norm_pixels = masked, alpha, distance == "l2", norm_pixels
        self.projection = nn.ModuleList(_projection(projection, own.embed_dim, other.embed_dim) for _ in self.blocks_S)
        self.directions = projection != "none"
        begin_pretraining(student)

    def forward(self, batch: tuple[Tensor, Any], turn: str = "student") -> dict[str, Tensor]:
        """`pixels`: MAE's loss; `features`: the blocks' distance."""
        images = batch[0]
        masking = random_masking(len(images), self.grid[0] * self.grid[1], self.masked, images.device)
        outputs = list(through(self.student, images, masking.keep))
        painted = self.decoder.pixels(self.decoder(finished(self.student, outputs[-1]), masking.restore))
        distance = direction_distance if self.directions else feature_distance
        pairs = zip(self.projection, self.blocks_S, self.taught(images, masking.keep), strict=True)
        features = [distance(project(outputs[block]), T, self.squared) for project, block, T in pairs]
        return {
            "pixels": pixel_loss(images, painted, masking.mask, self.grid, self.norm_pixels),
            "features": self.alpha * torch.stack(features).sum(),
        }

    @torch.no_grad()
    def taught(self, images: Tensor, keep: Tensor) -> list[Tensor]:
        """What the teacher's blocks make of the visible patches: [B, prefix + K, D_T] each."""
        return tapped(encoder_of(self.teacher), self.refeed(images), keep, self.blocks_T)

    @torch.no_grad()
    def look(self, batch: tuple[Tensor, Any]) -> dict[str, Tensor]:
        """`visible` [B, rows, columns]: 1 where a patch was visible, to both."""
        return {"visible": shown(batch[0], self.masked, self.grid)}


def _check(alpha: float, distance: str, projection: str) -> None:
    if not 0 <= alpha < float("inf"):
        raise UserError(f"alpha is {alpha}, expected the weight of the features, a finite number of at least 0")
    if distance not in ("l1", "l2"):
        raise UserError(f"distance is '{distance}', expected 'l1' or 'l2'")
    if projection not in ("linear", "mlp", "mlp2", "none"):
        raise UserError(f"projection is '{projection}', expected 'linear', 'mlp', 'mlp2' or 'none'")


def _blocks(role: str, encoder: Any, named: int | str | None) -> list[int]:
    """The blocks that are compared, from 0: those named, or the one at 3/4 of the depth."""
    depth = len(encoder.blocks)
    if named is None:
        return [max(0, round(0.75 * depth) - 1)]
    parts = str(named).split("+")
    blocks = [int(part) for part in parts if part.strip().isdecimal()]
    if len(blocks) < len(parts) or max(blocks) >= depth:
        raise UserError(f"{role}_blocks is {named}, expected numbers from 0 to {depth - 1} joined by +: the {role} has {depth} blocks")
    return blocks


def _projection(kind: str, student: int, teacher: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(student, teacher)
    first, second = (Mlp(width, teacher, teacher) for width in (student, teacher))
    return first if kind == "mlp" else nn.Sequential(first, second)
