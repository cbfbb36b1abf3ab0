"""Running a transformer on some of its tokens, without rewriting its forward pass.

A vision transformer embeds its patches, adds positions, and from there on treats its tokens as a set. Standing right behind that place
and gathering the kept tokens makes all that follows cheaper; dropped patches are *removed*, never zeroed or masked. Where each library
has that place:

| family | place | positions |
|---|---|---|
| timm `VisionTransformer` (ViT, DeiT, distilled DeiT, DeiT III, CLIP, SigLIP, DINOv2, registers) | behind `patch_drop` | added before |
| timm `Eva` (EVA-02, DINOv3, rotary ViTs) | its `patch_drop`, which also selects the rotary angles | rotary, follow the kept tokens |
| timm `Cait` | behind `pos_drop`: the class token joins only in the last blocks (arXiv 2302.10494, CaiT teacher) | added before |
| transformers ViT, DeiT, DINOv2 (with registers), AST | behind `embeddings` | added before |

Where the patch embedding is one convolution whose kernel is its stride, it need not run on all patches either: the kept patches of the
image are gathered, multiplied by the convolution's weight, and given their own positions. Not so where the model computes with the grid of
what it embedded: a resized image or position table (`dynamic_img_size`, transformers' DINOv2), overlapping patches (AST), other layers in
front (hybrids); there the choice is made behind the embedding, as above.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of

# By default a compiled network may run what was compiled for another of its kind without hooks, and so pass ours by in silence.
torch._dynamo.config.skip_nnmodule_hook_guards = False  # type: ignore[attr-defined]

_TRANSFORMERS_EMBEDDINGS = {"ViTEmbeddings", "DeiTEmbeddings", "Dinov2Embeddings", "Dinov2WithRegistersEmbeddings", "ASTEmbeddings"}


def gather_tokens(tokens_BND: Tensor, keep_BK: Tensor, prefix: int) -> Tensor:
    """The `prefix` leading tokens and the kept patches [B, prefix + K, D]; `keep` counts patches from 0, prefix excluded."""
    index = keep_BK.unsqueeze(-1).expand(-1, -1, tokens_BND.shape[-1])
    kept = tokens_BND[:, prefix:].gather(1, index)
    return torch.cat([tokens_BND[:, :prefix], kept], dim=1) if prefix else kept


class _Gate(nn.Module):
    """Stands where tokens are embedded and positioned; lets through the kept ones."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.keep: Tensor | None = None
        self.embeds: _KeptPatches | None = None

    def hook(self, module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
        if self.keep is None or self.embeds is not None:
            return tokens
        return gather_tokens(tokens, self.keep, self.prefix)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """As timm's Eva calls its `patch_drop`: the tokens, and the kept indices for the rotary angles."""
        return self.hook(self, (), tokens), self.keep


class _KeptPatches:
    """Stands for the forward pass of a convolution that embeds patches; where some are kept, only those are gathered and embedded.

    Attributes:
        positions: the name of the model's position table, "" for none.
    """

    def __init__(self, convolution: nn.Conv2d, positions: str, gate: _Gate) -> None:
        self.convolution, self.positions, self.gate = convolution, positions, gate
        self.otherwise = convolution.forward

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, rows, columns] for all patches, or [B, D, K, 1] for the kept ones."""
        keep = self.gate.keep
        if keep is None:
            return self.otherwise(images)
        patches = kept_patches(images, keep, self.convolution.kernel_size)
        tokens = F.linear(patches.flatten(2), self.convolution.weight.flatten(1), self.convolution.bias)
        return tokens.transpose(1, 2).unsqueeze(-1)


def kept_patches(images: Tensor, keep_BK: Tensor, size: tuple[int, ...]) -> Tensor:
    """The chosen patches [B, K, C, h, w] of images [B, C, H, W], counted row by row; what is left over at right and bottom is no patch."""
    height, width = size
    rows, columns = images.shape[2] // height, images.shape[3] // width
    whole = images[:, :, : rows * height, : columns * width]
    grid = whole.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
    batch = torch.arange(len(images), device=images.device).unsqueeze(1)
    return grid[batch, keep_BK // columns, keep_BK % columns]


class OnSomeTokens(nn.Module):
    """A transformer that computes on the patches it is told to keep.

    Args:
        model: one of the families in this module's table. It gains a hook; its weights and its own forward pass stay what they are.

    Raises:
        UserError: if the model cannot run on a subset of its tokens, with the reason.

    Example:
        >>> teacher = OnSomeTokens(timm.create_model("deit_base_patch16_224"))
        >>> teacher(images, keep=scores.topk(98).indices)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        place, prefix = _place_of(model)
        self.model = model
        self.gate = place if isinstance(place, _Gate) else _Gate(prefix)
        if place is None:
            model.patch_drop = self.gate
        elif place is not self.gate:
            place.register_forward_hook(self.gate.hook)
        found = embedding_of(model)
        if found is not None:
            convolution, positions = found
            self.gate.embeds = _KeptPatches(convolution, positions, self.gate)
            self.before = model.get_parameter(positions).shape[1] - self.patches if positions else 0  # rows of that table for prefix tokens
            convolution.forward = self.gate.embeds  # type: ignore[assignment]

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Any:
        """The model's output on `images` [B, C, H, W], computed on the patches `keep` (int64 [B, K], distinct within a row) or on all."""
        self.gate.keep = keep
        try:
            if keep is None or self.gate.embeds is None or not self.gate.embeds.positions:
                return self.model(images)
            return functional_call(self.model, self._positions(self.gate.embeds.positions, keep), (images,))
        finally:
            self.gate.keep = None

    def _positions(self, name: str, keep: Tensor) -> dict[str, Tensor]:
        """The rows of the model's position table, by its name, that belong to the tokens which are embedded."""
        table = self.model.get_parameter(name)
        return {name: gather_tokens(table.expand(len(keep), -1, -1), keep, self.before)}

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What the model was trained on."""
        return preprocessing_of(self.model)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the model's own input size."""
        return patch_grid(self.model)

    @property
    def patches(self) -> int:
        """How many patches there are to choose from."""
        return self.grid[0] * self.grid[1]


def patch_grid(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches of a transformer at its own input size.

    Raises:
        UserError: if the model has no patches.
    """
    backbone = _transformers_backbone(model)
    if backbone is not None:
        embeddings = backbone.embeddings
        if hasattr(embeddings, "get_shape"):  # audio spectrogram: frequency x time
            frequency, time = embeddings.get_shape(backbone.config)
            return int(frequency), int(time)
        size, patch = pair(backbone.config.image_size), pair(backbone.config.patch_size)
        return size[0] // patch[0], size[1] // patch[1]
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None:
        raise UserError(f"{type(model).__name__} has no patch grid; expected a vision transformer of timm or transformers")
    return int(grid[0]), int(grid[1])


def prefix_tokens(model: nn.Module) -> int:
    """How many tokens (class, distillation, registers) stand before the patches where attention is computed."""
    backbone = _transformers_backbone(model)
    if backbone is None:
        return int(getattr(model, "num_prefix_tokens", 0))
    kind = type(backbone.embeddings).__name__
    registers = int(getattr(backbone.config, "num_register_tokens", 0))
    return 2 if kind in {"DeiTEmbeddings", "ASTEmbeddings"} else 1 + registers


def _place_of(model: nn.Module) -> tuple[nn.Module | None, int]:
    """The module behind which tokens may be dropped (None: it must be put there), and how many tokens before the patches stay."""
    from timm.models.cait import Cait
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    backbone = _transformers_backbone(model)
    if backbone is not None:
        return backbone.embeddings, prefix_tokens(model)
    if isinstance(model, Cait):
        return model.pos_drop, 0
    if isinstance(model, Eva):
        if model.patch_drop is not None and not isinstance(model.patch_drop, _Gate):
            raise UserError("the Eva model already drops patches at random (patch_drop_rate > 0); create it without that option")
        return model.patch_drop, model.num_prefix_tokens
    if isinstance(model, VisionTransformer):
        return model.patch_drop, model.num_prefix_tokens
    raise UserError(
        f"{type(model).__name__} cannot run on some of its tokens: {_reason(model)}. "
        "Supported are timm's ViT, DeiT, CLIP, SigLIP, DINOv2, EVA, DINOv3 and CaiT, and transformers' ViT, DeiT, DINOv2 and AST; "
        "or keep all tokens with --method kd"
    )


def embedding_of(model: nn.Module) -> tuple[nn.Conv2d, str] | None:
    """The convolution that embeds patches one by one, and the name of the table of positions added to them; None where there is none."""
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.eva import Eva

    backbone = _transformers_backbone(model)
    if backbone is not None:
        owner, convolution = backbone.embeddings, getattr(backbone.embeddings.patch_embeddings, "projection", None)
        plain, table = type(owner).__name__ in {"ViTEmbeddings", "DeiTEmbeddings"}, getattr(owner, "position_embeddings", None)
    else:
        embed: Any = getattr(model, "patch_embed", None)
        convolution, table = getattr(embed, "proj", None), getattr(model, "pos_embed", None)
        plain = type(embed) is PatchEmbed and embed.flatten and not embed.dynamic_img_pad and not getattr(model, "dynamic_img_size", False)
        plain = plain and (table is not None or isinstance(model, Eva))
    if not (plain and type(convolution) is nn.Conv2d and convolution.kernel_size == convolution.stride):
        return None
    if convolution.padding != (0, 0) or convolution.dilation != (1, 1) or convolution.groups != 1:
        return None
    return convolution, next((name for name, parameter in model.named_parameters() if parameter is table), "")


def _transformers_backbone(model: nn.Module) -> Any | None:
    """transformers' backbone (the module that owns `embeddings`), if this is one of the families whose positions are added there."""
    for module in (model, *model.children()):
        embeddings = type(getattr(module, "embeddings", None))
        if embeddings.__module__.startswith("transformers.") and embeddings.__name__ in _TRANSFORMERS_EMBEDDINGS:
            return module
    return None


def _reason(model: nn.Module) -> str:
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    if any("relative_position" in name or "rel_pos" in name for name in names):
        return "its attention reads relative-position tables of the full grid"
    if any(hasattr(module, "window_size") for module in model.modules()):
        return "its attention works in windows of the full grid"
    if any("_tokens." in name for name in names):
        return "it mixes places by layers made for all of them"
    if any(isinstance(module, nn.Conv2d) and max(module.kernel_size) > max(module.stride) for module in model.modules()):
        return "its convolutions need the neighbours of every place"
    return "it is not known where its tokens are embedded and positioned"


def pair(value: Any) -> tuple[int, int]:
    """Rows and columns from one number for both, or from two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
