"""Masked autoencoding: no teacher. Most patches of a picture are taken away, the student encodes the rest, a small decoder paints them.

What the student learns is how pictures look; labels it sees none. It is an encoder, without a head: give it one with
`stillhouse distill --method scratch --student RUN`. The run also keeps encoder and decoder together, in RUN/autoencoder: the teacher that
`dmae` and `g2sd` learn from; and, as the student of another run, what goes on with the decoder it has.

Masked: the student's input patches, a uniform choice by sample, fresh in each step. Removed, not zeroed.
Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.

    stillhouse distill --method mae --student timm/vit_small_patch16_224 --data imagefolder:DIR

Sure, from paper and code: masking, decoder, loss on hidden patches alone, fixed positions of sines and cosines on both sides. Where we
depart: the encoder's weights begin as timm makes them (`weight_init=moco` in its spec is nearest to the official), and an encoder that
has learned already keeps the positions it has. The paper's random crops keep 0.2 to 1 of a picture (`crop_scale`), and it has no other
augmentation but flips.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.losses.pretraining import hidden_pixels_loss, normalised_pixels, patchify
from stillhouse.masks.patches import random_masking, visible_count
from stillhouse.models.mae import Decoder, MaskedAutoencoder, begin_pretraining, check_encoder, encode, encoder_of


class MAE(Distiller):
    """sum_hidden mean_pixels (painted - true)^2 / number of hidden patches.

    Args:
        student: a vision transformer of timm; it becomes an encoder, images [B, C, H, W] to features [B, D]. Or a masked autoencoder,
            which brings its decoder along.
        masked: the share of hidden patches, in (0, 1).
        norm_pixels: whether the pixels of each patch are brought to mean 0 and variance 1 before they are compared.
        decoder_width: of a new decoder's tokens, a multiple of decoder_heads and of 4.
        decoder_depth: its blocks.
        decoder_heads: of its attention.

    Raises:
        UserError: if a setting is out of range, or the student cannot run on some of its patches.
    """

    tasks: ClassVar[tuple[str, ...]] = ("encode",)
    off: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        student: nn.Module,
        *,
        masked: float = 0.75,
        norm_pixels: bool = True,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        encoder = check_encoder(encoder_of(student), "student")
        super().__init__(encoder)
        known = student.decoder if isinstance(student, MaskedAutoencoder) else None
        self.decoder = known or Decoder(encoder, decoder_width, decoder_depth, decoder_heads)
        self.grid = self.decoder.grid
        visible_count(masked, self.grid[0] * self.grid[1])
        self.masked, self.norm_pixels = masked, norm_pixels
        begin_pretraining(encoder)

    def forward(self, batch: tuple[Tensor, Any], turn: str = "student") -> dict[str, Tensor]:
        """`pixels`: how far what was painted is from what was hidden."""
        images = batch[0]
        masking = random_masking(len(images), self.grid[0] * self.grid[1], self.masked, images.device)
        latent = encode(self.student, images, masking.keep)
        painted = self.decoder.pixels(self.decoder(latent, masking.restore))
        return {"pixels": pixel_loss(images, painted, masking.mask, self.grid, self.norm_pixels)}

    @property
    def products(self) -> dict[str, nn.Module]:
        """The encoder, and encoder and decoder together."""
        return {"student": self.student, "autoencoder": MaskedAutoencoder(self.student, self.decoder)}

    @torch.no_grad()
    def look(self, batch: tuple[Tensor, Any]) -> dict[str, Tensor]:
        """`visible` [B, rows, columns]: 1 where a patch was visible."""
        return {"visible": shown(batch[0], self.masked, self.grid)}


def pixel_loss(images: Tensor, painted: Tensor, mask: Tensor, grid: tuple[int, int], normalised: bool) -> Tensor:
    """MAE's: painted pixels [B, N, p q C] against the images', where the mask [B, N] is 1."""
    target = patchify(images, grid)
    return hidden_pixels_loss(painted, normalised_pixels(target) if normalised else target, mask)


def shown(images: Tensor, masked: float, grid: tuple[int, int]) -> Tensor:
    """1.0 where a patch is left visible, [B, rows, columns]."""
    return 1 - random_masking(len(images), grid[0] * grid[1], masked, images.device).mask.unflatten(1, grid)
