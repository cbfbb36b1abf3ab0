"""Masked autoencoders: a timm vision transformer that computes on the visible patches only, and a small decoder that paints the rest.

Source: arXiv 2111.06377. The encoder is the network that is kept, so it stays timm's own; the decoder is made of timm's blocks. Positions
are fixed two-dimensional sines and cosines, on both sides, and the class token has none. timm's weights tagged `.mae` are encoders alone;
those of transformers' ViTMAE, with their decoder, are not opened.

    mae/vit_base_patch16_224:decoder_width=512,decoder_depth=8,decoder_heads=16
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from timm.layers.norm import LayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from stillhouse.errors import UserError, nearest
from stillhouse.models.families import Fit, build
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of, set_preprocessing
from stillhouse.models.specs import Spec
from stillhouse.models.tokens import gather_tokens, patch_grid
from stillhouse.models.weights import load_weights

DECODER: dict[str, int] = {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16}
"""The options of a decoder, and MAE's own."""


def through(encoder: Any, images: Tensor, keep: Tensor | None = None) -> Iterator[Tensor]:
    """What each block of a vision transformer returns in turn: tokens [B, prefix + K, D] of the visible patches. Stopping early is cheaper.

    Positions are added before patches are dropped. A distillation token is left out: it belongs to what comes after pre-training.

    Args:
        encoder: see `check_encoder`.
        images: [B, C, H, W].
        keep: the visible patches, int64 [B, K]; None for all.
    """
    tokens = encoder._pos_embed(encoder.patch_embed(images))
    if isinstance(encoder, VisionTransformerDistilled):
        tokens = torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1)
    if keep is not None:
        tokens = gather_tokens(tokens, keep, prefix_of(encoder))
    tokens = encoder.norm_pre(tokens)
    for block in encoder.blocks:
        tokens = block(tokens)
        yield tokens


def tapped(encoder: Any, images: Tensor, keep: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """What these blocks (from 0) return, without the final norm; the network runs no further than the last of them."""
    outputs = list(islice(through(encoder, images, keep), max(blocks) + 1))
    return [outputs[block] for block in blocks]


def finished(encoder: Any, tokens: Tensor) -> Tensor:
    """The last block's tokens behind the final norm (which stands behind the pooling where tokens are averaged)."""
    normed: Tensor = encoder.fc_norm(encoder.norm(tokens))  # one of them is an identity
    return normed


def encode(encoder: Any, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """All of `through`, and the final norm: tokens [B, prefix + K, D]."""
    *_, tokens = through(encoder, images, keep)
    return finished(encoder, tokens)


def prefix_of(encoder: Any) -> int:
    """How many tokens stand before the patches in what `encode` returns."""
    return int(encoder.num_prefix_tokens) - isinstance(encoder, VisionTransformerDistilled)


def encoder_of(network: Any) -> Any:
    """A masked autoencoder's encoder; another network is one itself."""
    return network.encoder if isinstance(network, MaskedAutoencoder) else network


def check_encoder(network: Any, role: str) -> Any:
    """The network, if it can be the encoder of a masked autoencoder.

    Raises:
        UserError: if it cannot.
    """
    if not isinstance(network, VisionTransformer) or network.attn_pool is not None or network.pos_embed is None:
        raise UserError(
            f"the {role} is a {type(network).__name__}, which cannot be the encoder of a masked autoencoder; name a vision transformer of "
            "timm that adds its positions and does not pool by attention, such as timm/vit_small_patch16_224"
        )
    return network


def check_grids(student: Any, teacher: Any) -> None:
    """Refuses networks that do not cut a picture into the same places.

    Raises:
        UserError: naming both grids.
    """
    own, other = patch_grid(student), patch_grid(teacher)
    if own != other:
        raise UserError(
            f"the student has {own[0]} x {own[1]} patches and the teacher {other[0]} x {other[1]}, expected the same places in both; "
            "set img_size or patch_size of one of them"
        )


def begin_pretraining(encoder: Any) -> list[nn.Parameter]:
    """Readies an encoder: positions stay as they are, heads and a distillation token rest. Returns what that stopped from learning.

    An encoder with random weights gets positions of sines and cosines; one that has learned keeps its own.
    """
    if getattr(encoder, "stillhouse", {}).get("weights") == "random":
        with torch.no_grad():
            encoder.pos_embed.copy_(positions(encoder.embed_dim, patch_grid(encoder), encoder.pos_embed.shape[1]))
    resting = [encoder.pos_embed, *encoder.head.parameters()]
    if isinstance(encoder, VisionTransformerDistilled):
        resting += [encoder.dist_token, *encoder.head_dist.parameters()]
    stopped = [parameter for parameter in resting if parameter.requires_grad]
    for parameter in stopped:
        parameter.requires_grad_(False)
    return stopped


def positions(width: int, grid: tuple[int, int], rows: int) -> Tensor:
    """Two-dimensional sines and cosines fp32 [1, rows, width] for a grid of places, behind zeros for what stands before the patches.

    A quarter of the channels each: sine and cosine of the column, then of the row, times 10000^(-i / (width / 4)).

    Raises:
        UserError: if the width is no multiple of 4.
    """
    if width % 4:
        raise UserError(f"a width of {width} has no positions of sines and cosines in two dimensions, expected a multiple of 4")
    rates = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (column, row)]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([table.new_zeros(rows - len(table), width), table])[None].float()


class Decoder(nn.Module):
    """What follows an encoder in pre-training: mask tokens join at their places, blocks, and a linear map to the pixels of each patch.

    Args:
        encoder: whose tokens come in.
        width: of its tokens, a multiple of 4 and of `heads`.
        depth: its blocks.
        heads: of its attention.
        pixels: whether there is a final norm and a map to pixels; without, only `forward` can be asked.

    Raises:
        UserError: if the numbers do not fit.
    """

    positions: Tensor

    def __init__(self, encoder: Any, width: int = 512, depth: int = 8, heads: int = 16, *, pixels: bool = True) -> None:
        super().__init__()
        numbers = (width, depth, heads)
        if not all(isinstance(number, int) and number >= 1 for number in numbers) or width % heads or width % 4:
            raise UserError(
                f"a decoder of width {width}, depth {depth} and {heads} heads cannot be made, expected whole numbers of at least 1, "
                "the width a multiple of the heads and of 4"
            )
        grid = patch_grid(encoder)
        self.prefix, self.grid, places = prefix_of(encoder), grid, grid[0] * grid[1]
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", positions(width, grid, self.prefix + places), persistent=False)
        norm: Any = partial(LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        if pixels:
            patch = encoder.patch_embed.patch_size
            self.norm = norm(width)
            self.head = nn.Linear(width, patch[0] * patch[1] * encoder.patch_embed.proj.in_channels)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(_begin)

    def forward(self, latent: Tensor, restore: Tensor, upto: int | None = None) -> Tensor:
        """The tokens [B, prefix + N, width] behind the last block, or behind the `upto`-th, without the final norm.

        Args:
            latent: an encoder's tokens [B, prefix + K, D].
            restore: see `stillhouse.masks.patches.Masking`.
        """
        tokens = self.embed(latent)
        visible = tokens[:, self.prefix :]
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), restore.shape[1] - visible.shape[1], -1)
        places = torch.cat([visible, hidden], dim=1).gather(1, restore[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens[:, : self.prefix], places], dim=1) + self.positions
        for block in self.blocks[:upto]:
            tokens = block(tokens)
        return tokens

    def pixels(self, tokens: Tensor) -> Tensor:
        """What `forward` returned, as the pixels of every patch [B, N, p q C]."""
        pixels: Tensor = self.head(self.norm(tokens))
        return pixels[:, self.prefix :]


def _begin(module: nn.Module) -> None:
    """MAE's: Xavier's uniform weights, no bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class MaskedAutoencoder(nn.Module):
    """An encoder and its decoder. As a network, images [B, C, H, W] to the encoder's features [B, D]: the decoder is for its training.

    Args:
        encoder: a vision transformer of timm.
        decoder: one that was made for it.

    Raises:
        UserError: if the network cannot be an encoder.
    """

    def __init__(self, encoder: nn.Module, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = check_encoder(encoder, "encoder"), decoder
        about = getattr(encoder, "stillhouse", None) or {"family": "object", "options": {}}
        sizes = {
            "decoder_width": decoder.mask_token.shape[-1],
            "decoder_depth": len(decoder.blocks),
            "decoder_heads": decoder.blocks[0].attn.num_heads,  # type: ignore[union-attr]
        }
        options = {key: value for key, value in about["options"].items() if key not in ("num_classes", "in_chans")}
        known = about["family"] == "timm" and about.get("name") is not None
        self.stillhouse: dict[str, Any] = {
            "spec": None,
            "family": "mae" if known else "object",
            "name": about.get("name"),
            "options": options | sizes,
            "weights": about.get("weights", "given"),
            "task": "encode",
            "classes": 0,
            "channels": self.encoder.patch_embed.proj.in_channels,
            "names": None,
        }

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What the encoder was trained on."""
        return preprocessing_of(self.encoder)

    @preprocessing.setter
    def preprocessing(self, value: Preprocessing) -> None:
        set_preprocessing(self.encoder, value)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.decoder.grid

    def forward(self, images: Tensor) -> Tensor:
        """The features of whole images [B, D], as the encoder gives them to a classifier."""
        if isinstance(self.encoder, VisionTransformerDistilled):
            class_token: Tensor = encode(self.encoder, images)[:, 0]
            return class_token
        features: Tensor = self.encoder.forward_head(self.encoder.forward_features(images), pre_logits=True)
        return features

    def hidden(self, images: Tensor, keep: Tensor, restore: Tensor, upto: int | None = None) -> Tensor:
        """The decoder's tokens [B, prefix + N, width] behind its `upto`-th block (its last), of images of which `keep` is visible."""
        tokens: Tensor = self.decoder(encode(self.encoder, images, keep), restore, upto)
        return tokens

    def paint(self, images: Tensor, keep: Tensor, restore: Tensor) -> Tensor:
        """The pixels [B, N, p q C] that it sees or thinks behind every patch, laid out as `losses.pretraining.patchify` does."""
        return self.decoder.pixels(self.hidden(images, keep, restore))


def open_mae(
    spec: Spec, fit: Fit, pretrained: bool, file: dict[str, Tensor] | None = None, allow_partial: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The masked autoencoder `mae/TIMM_NAME:OPTIONS`: options are timm's of the encoder, and those of `DECODER`.

    Raises:
        UserError: for an unknown name or option, one that does not fit the data, or published weights, of which there are none.
    """
    if pretrained:
        raise UserError(
            f"there are no published weights of '{spec}' with its decoder: "
            "name what a run of --method mae has made, RUN/autoencoder, or a file of weights"
        )
    sizes = {**DECODER, **{key: value for key, value in spec.options.items() if key in DECODER}}
    unknown = next((key for key in spec.options if key.startswith("decoder_") and key not in DECODER), None)
    if unknown is not None:
        raise UserError(f"a masked autoencoder has no option '{unknown}'{nearest(unknown, DECODER)}")
    own = {key: value for key, value in spec.options.items() if key not in DECODER}
    encoder, options = build(Spec("timm", spec.name, own), replace(fit, classes=0), False)
    about: dict[str, Any] = {"spec": str(Spec("timm", spec.name, own)), "family": "timm", "name": spec.name, "options": options}
    encoder.stillhouse = about | {"weights": "random"}  # type: ignore[assignment]
    width, depth, heads = (sizes[key] for key in DECODER)
    model = MaskedAutoencoder(encoder, Decoder(check_encoder(encoder, "network"), width, depth, heads))  # type: ignore[arg-type]
    for stopped in begin_pretraining(encoder):
        stopped.requires_grad_(True)
    if file is not None:
        load_weights(model, file, allow_partial)
    return model, model.stillhouse["options"]
