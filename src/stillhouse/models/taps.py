"""Looking into a network while it runs: feature maps by module name, and where its last block attends.

Taps hook the instance, never the class, keep only the last forward pass, and forget it when read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from stillhouse.errors import UserError, nearest
from stillhouse.masks.tokens import class_attention, feature_norm, received_attention
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.models.tokens import pair, patch_grid, prefix_tokens

_LAST_OF_TORCHVISION = ("layer4", "features", "trunk_output", "conv5", "inception5b", "Mixed_7c")
"""What returns the last feature map in torchvision's convolutional networks."""


class Tap:
    """Remembers what one submodule returned in the last forward pass, with its gradient.

    Raises:
        UserError: if the model has no submodule of that name.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self._output: Tensor | None = None
        tap(model, name, self._remember)

    def _remember(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._output = _feature(output)

    def take(self) -> Tensor:
        """The output of the last forward pass; a second call without a forward pass between raises RuntimeError."""
        if self._output is None:
            raise RuntimeError(f"layer '{self.name}' has not run since it was last read")
        output, self._output = self._output, None
        return output


def tap(model: nn.Module, name: str, remember: Callable[[nn.Module, Any, Any], None]) -> None:
    """Hooks a layer, and notes on it who is told: `tapped` finds them.

    Raises:
        UserError: if the model has no submodule of that name.
    """
    layer: Any = layer_of(model, name)
    layer.register_forward_hook(partial(_tell, remember))
    layer.told = [*getattr(layer, "told", []), remember]


def _tell(remember: Callable[[nn.Module, Any, Any], None], layer: nn.Module, inputs: Any, output: Any) -> None:
    remember(layer, inputs, at_home(output, layer))


def at_home(output: Any, layer: nn.Module) -> Any:
    """What a layer returned, where those are who learn from it, if its network is elsewhere (`stillhouse.training.elsewhere`)."""
    home: Any = getattr(layer, "home", None)
    return output if home is None else tree_map_only(Tensor, lambda tensor: tensor.to(home), output)


def tapped(model: nn.Module) -> dict[str, list[Callable[[nn.Module, Any, Any], None]]]:
    """Who is told what a layer returned, by the layer's name."""
    return {name: layer.told for name, layer in model.named_modules() if isinstance(getattr(layer, "told", None), list)}  # type: ignore[misc]


class SaliencyTap:
    """Where a network looked in its last forward pass, as scores [B, N] over its grid of places.

    With a class token: the class token's row of the last block's attention, softmax over all tokens, mean over heads. Without: the mean
    attention a patch receives. A convolutional network: the norm of its last feature map. Always fp32 and without gradient. Only the
    queries and keys are read where the block computes them, so fused attention stays on and one row costs N x D multiply-adds.

    Args:
        model: a timm or transformers vision transformer, or a timm or torchvision convolutional network.

    Raises:
        UserError: if the model shows neither attention nor a last feature map.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: dict[str, Any] = {}
        self._attention = last_attention(model)
        if self._attention is None:
            if not any(isinstance(module, nn.Conv2d) and max(module.kernel_size) > max(module.stride) for module in model.modules()):
                raise UserError(
                    f"{type(model).__name__} shows neither attention that can be read nor feature maps; "
                    "let the patches be chosen by='random' or by='teacher'"
                )
            self._feature = Tap(model, last_layer(model))
            return
        patch_grid(model)
        queries, keys = _queries_and_keys(self._attention)
        self._attention.register_forward_pre_hook(self._remember_rope, with_kwargs=True)
        queries.register_forward_hook(self._remember_queries)
        keys.register_forward_hook(self._remember_keys)

    def _remember_rope(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rope = kwargs.get("rope")
        self._seen["rope"] = None if rope is None else rope.detach()

    def _remember_queries(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen["queries"] = output.detach()

    def _remember_keys(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen["keys"] = output.detach()

    @torch.no_grad()
    def take(self) -> tuple[Tensor, tuple[int, int]]:
        """Scores [B, N] in fp32 and the grid (rows, columns) they lie on, of the last forward pass."""
        if self._attention is None:
            feature = _channels_first(self._feature.take().detach())
            return feature_norm(feature), (feature.shape[-2], feature.shape[-1])
        if "keys" not in self._seen:
            raise RuntimeError("the network has not run since its saliency was last read")
        queries, keys, rope = self._seen.pop("queries"), self._seen.pop("keys"), self._seen.pop("rope", None)
        prefix = prefix_tokens(self._model)
        attention: Any = self._attention
        queries, keys = _by_head(queries, attention), _by_head(keys, attention)
        if rope is not None:
            queries, keys = _rotate(attention, queries, rope), _rotate(attention, keys, rope)
        scale = float(getattr(attention, "scale", keys.shape[-1] ** -0.5))
        if has_class_token(self._model):
            scores = class_attention(queries[:, :, 0], keys, scale, prefix)
        else:
            scores = received_attention(queries, keys, scale, prefix)
        scores = at_home(scores, attention)
        return scores, grid_of(scores.shape[1], patch_grid(self._model))


@contextmanager
def looking(network: nn.Module) -> Iterator[None]:
    """Without gradient and in eval mode, but for batch norms: they take the statistics of the batch and leave their own as they are.

    So what is seen is a function of weights and images: running statistics differ between processes.
    """
    modes = {module: module.training for module in network.modules()}
    norms = [module for module in modes if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats]
    try:
        network.eval()
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        with torch.no_grad():
            yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for module, mode in modes.items():
            module.training = mode


def has_class_token(model: nn.Module) -> bool:
    """Whether the first token is a class token (transformers' vision models here always have one)."""
    if hasattr(model, "num_prefix_tokens"):
        return getattr(model, "cls_token", None) is not None
    return prefix_tokens(model) > 0


def last_attention(model: nn.Module) -> nn.Module | None:
    """The attention module of the last block whose queries and keys can be read; None for a network without attention."""
    if not (hasattr(model, "patch_embed") or prefix_tokens(model)):
        return None
    blocks: Any = getattr(model, "blocks_token_only", None)  # CaiT: the class token joins in its last blocks
    last = blocks[-1] if blocks else layer_of(model, last_layer(model))
    return next((module for module in last.modules() if _queries_and_keys(module) is not None), None)


def _queries_and_keys(module: nn.Module) -> Any:
    """The two submodules that return an attention's queries and keys; None where it is not known that nothing else shapes the attention."""
    from timm.layers.attention import Attention, AttentionRope
    from timm.models.cait import ClassAttn
    from timm.models.eva import EvaAttention

    if isinstance(module, (Attention, AttentionRope, EvaAttention)):
        return module.q_norm, module.k_norm  # identities when there is no norm
    if isinstance(module, ClassAttn):
        return module.q, module.k
    if type(module).__module__.startswith("transformers.") and hasattr(module, "q_proj") and hasattr(module, "k_proj"):
        return module.q_proj, module.k_proj
    return None


def _by_head(tokens: Tensor, attention: Any) -> Tensor:
    """[B, heads, N, d] from what queries and keys come as: by head already, [B, N, D], or CaiT's single class query [B, D]."""
    if tokens.ndim == 4:
        return tokens
    heads = getattr(attention, "num_heads", None) or attention.num_attention_heads
    if tokens.ndim == 2:
        tokens = tokens.unsqueeze(1)
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotate(attention: Any, tokens_BHND: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys with the rotary angles the attention module itself applies to its patches."""
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    prefix = attention.num_prefix_tokens
    patches = apply_rot_embed_cat(tokens_BHND[:, :, prefix:], rope, half=getattr(attention, "rotate_half", False))
    return torch.cat([tokens_BHND[:, :, :prefix], patches.to(tokens_BHND.dtype)], dim=2)


def last_layer(model: nn.Module) -> str:
    """The name of the last layer that still has places: a transformer's last block, or what returns a CNN's last feature map.

    Raises:
        UserError: if it is not known for this network.
    """
    info = getattr(model, "feature_info", None)
    if info:
        return str(info[-1]["module"])
    for name in _LAST_OF_TORCHVISION:
        if hasattr(model, name):
            return name
    return _longest_stack(model)[-1]


def middle_layer(model: nn.Module) -> str:
    """The layer half-way through a network, where a hint is given: a transformer's middle block, or a CNN's middle stage.

    Raises:
        UserError: if it is not known for this network.
    """
    info = getattr(model, "feature_info", None)
    if info:
        return str(info[(len(info) - 1) // 2]["module"])
    if hasattr(model, "layer2"):
        return "layer2"
    stack = _longest_stack(model)
    return stack[(len(stack) - 1) // 2]


def _longest_stack(model: nn.Module) -> list[str]:
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential)) and name]
    if not stacks:
        raise UserError(f"no blocks were found in {type(model).__name__}; name its layer with student_layer or teacher_layer")
    name, stack = max(stacks, key=lambda each: len(each[1]))
    return [f"{name}.{child}" for child, _ in stack.named_children()]


def feature_channels(model: nn.Module, layer: str) -> int:
    """How many channels a layer returns, by running the network once on an empty image of its own input size.

    Raises:
        UserError: if there is no such layer, or the network does not run on that image.
    """
    channels: list[int] = []
    hook = layer_of(model, layer).register_forward_hook(lambda *seen: channels.append(as_tokens(_feature(seen[-1]), model).shape[-1]))
    training = {module: module.training for module in model.modules()}
    image = empty_image(model)
    try:
        with torch.no_grad():
            model.eval()(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{type(model).__name__} does not run on an image of {tuple(image.shape[1:])}: {error}; tell its size by set_preprocessing"
        ) from error
    finally:
        hook.remove()
        for module, mode in training.items():
            module.training = mode
    return channels[-1]


def empty_image(model: nn.Module) -> Tensor:
    """Zeros [1, C, H, W] of the network's own input size; for an audio spectrogram [1, time, frequency]."""
    weight = next(model.parameters())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "num_mel_bins"):
        return weight.new_zeros(1, config.max_length, config.num_mel_bins)
    if hasattr(config, "image_size"):
        return weight.new_zeros(1, config.num_channels, *pair(config.image_size))
    preprocessing = preprocessing_of(model)
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = built or (preprocessing.size if preprocessing else None) or 224
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    return weight.new_zeros(1, channels, *pair(size))


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """A submodule by its name.

    Raises:
        UserError: if the model has none of that name.
    """
    modules = dict(model.named_modules())
    if name not in modules or not name:
        raise UserError(f"{type(model).__name__} has no layer '{name}'{nearest(name, modules)}")
    return modules[name]


def _feature(output: Any) -> Tensor:
    """What a layer returned; transformers' layers may return a tuple that starts with it."""
    feature: Tensor = output[0] if isinstance(output, tuple) else output
    return feature


def as_tokens(feature: Tensor, model: nn.Module) -> Tensor:
    """A feature as patch tokens [B, N, D]: maps [B, C, H, W] are flattened, a transformer's prefix tokens are left out."""
    if feature.ndim == 4:
        return _channels_first(feature).flatten(2).transpose(1, 2)
    joins_late = hasattr(model, "blocks_token_only")  # CaiT: no class token among the patches
    return feature if joins_late else feature[:, prefix_tokens(model) :]


def as_map(feature: Tensor, model: nn.Module) -> Tensor:
    """A feature as a map [B, C, H, W]; a transformer's tokens are laid out on its grid."""
    if feature.ndim == 4:
        return _channels_first(feature)
    tokens = as_tokens(feature, model)
    return tokens.transpose(1, 2).unflatten(2, grid_of(tokens.shape[1], patch_grid(model)))


def on_grid(feature: Tensor, model: nn.Module, grid: tuple[int, ...]) -> Tensor:
    """A feature's tokens [B, rows * columns, D] on another grid, bilinear with antialiasing; unchanged when the grids are equal."""
    feature_map = as_map(feature, model)
    if feature_map.shape[-2:] != grid:
        feature_map = F.interpolate(feature_map, size=grid, mode="bilinear", antialias=True, align_corners=False)
    return feature_map.flatten(2).transpose(1, 2)


def grid_of(places: int, like: tuple[int, int]) -> tuple[int, int]:
    """The grid of so many places with the aspect ratio of `like`: networks run at other sizes than their own keep its shape."""
    rows = round((places * like[0] / like[1]) ** 0.5)
    if rows == 0 or places % rows:
        raise UserError(
            f"{places} places do not form a grid shaped like {like[0]} x {like[1]}; use images of the network's own aspect ratio"
        )
    return rows, places // rows


def channels_last(feature: Tensor) -> bool:
    """Whether the map of a square image is [B, H, W, C], as Swin-like networks return it: two equal axes before a different last one."""
    return feature.ndim == 4 and feature.shape[1] == feature.shape[2] != feature.shape[3]


def _channels_first(feature: Tensor) -> Tensor:
    return feature.permute(0, 3, 1, 2) if channels_last(feature) else feature
