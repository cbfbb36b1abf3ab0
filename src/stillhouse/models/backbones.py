"""Classifiers by name as the bodies of detectors and segmenters: the last feature map at each stride, the head left out."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from stillhouse.data import IMAGENET_MEAN, IMAGENET_STD
from stillhouse.errors import UserError, nearest
from stillhouse.models.families import _check_timm_name, _quick_without_network, _told
from stillhouse.models.specs import Spec

STRIDES = (4, 8, 16, 32)
_SIDE = 64
"""Of the empty image that shows where a network's stages are."""


def open_body(
    spec: Spec, name: object, stages: dict[int, str], pretrained: bool, stride: int = 32, options: dict[str, Any] | None = None
) -> tuple[nn.Module, list[int]]:
    """A network taking images [B, 3, H, W] to a dictionary of maps, and their channels.

    Args:
        spec: of the whole network, for messages.
        name: a classifier of torchvision (`resnet18`), or `timm/NAME`.
        stages: stride -> key of the map, finest first: the last one a stage of that stride makes, as the classifier was published.
        pretrained: with its published ImageNet weights; else random from torch's generator.
        stride: the coarsest that is kept, 8, 16 or 32: stages beyond it lose their stride and are dilated instead (arXiv 1706.05587).
        options: of timm's network, such as `depth`; None where maps of one stride only, a vision transformer's, are of no use. There the
            stages are spread over the blocks, the last of them after the last block, and the body says its `stride`, the patch's side.

    Raises:
        UserError: for an unknown name, one without such maps, or weights that cannot be had.
    """
    if not isinstance(name, str):
        raise UserError(_expected(spec, name, stride))
    if name.startswith("timm/"):
        body = _timm_body(spec, name.removeprefix("timm/"), stages, pretrained, stride, options)
    else:
        body = _torchvision_body(spec, name, stages, pretrained, stride)
    with _told(spec, spec.options):
        maps = _maps(body, 4 * body.stride if isinstance(body, _Plain) else _SIDE)
    if isinstance(body, _Plain):
        return body, [seen.shape[1] for seen in maps.values()]
    for each, (key, seen) in zip(stages, maps.items(), strict=True):
        side = _SIDE // min(each, stride)
        if seen.ndim != 4 or tuple(seen.shape[2:]) != (side, side):
            raise UserError(
                f"the backbone '{name}' of '{spec}' gives {tuple(seen.shape)} for an image of {_SIDE} x {_SIDE}, expected "
                f"[1, C, {side}, {side}] at stride {min(each, stride)} ({key}); take another stride or network, for example timm/resnet18"
            )
    return body, [seen.shape[1] for seen in maps.values()]


def _expected(spec: Spec, name: object, stride: int) -> str:
    return f"'{spec}' asks for backbone={name} of stride {stride}, expected a classifier's name and stride 8, 16 or 32"


def statistics_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation of the channels that the published weights of `name` were trained with, for pixels in [0, 1]."""
    if name.startswith("timm/"):
        cfg = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        return (tuple(cfg.mean), tuple(cfg.std)) if cfg else (IMAGENET_MEAN, IMAGENET_STD)
    how = torchvision.models.get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
    return tuple(how.mean), tuple(how.std)


class _Timm(nn.Module):
    """timm's list of maps as a dictionary, as torchvision's necks and heads take them."""

    def __init__(self, network: nn.Module, keys: list[str]) -> None:
        super().__init__()
        self.network, self.keys = network, keys

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.keys, self.network(images), strict=True))


class _Plain(nn.Module):
    """A vision transformer's blocks as maps [B, D, h, w] of one stride; `blocks.0`, `blocks.1`, ... are there to be looked at."""

    def __init__(self, network: nn.Module, stride: int, depth: int, keys: list[str]) -> None:
        super().__init__()
        self.network, self.stride = network, stride
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(depth))
        self.shown = {depth * number // len(keys) - 1: key for number, key in enumerate(keys, 1)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise UserError(f"the transformer takes sides that its patches of {self.stride} pixels divide, and got {height} x {width}")
        maps = [block(seen) for block, seen in zip(self.blocks, self.network(images), strict=True)]
        return {key: maps[block] for block, key in self.shown.items()}


def _timm_body(spec: Spec, name: str, stages: dict[int, str], pretrained: bool, stride: int, options: dict[str, Any] | None) -> nn.Module:
    _check_timm_name(name)
    cfg = timm.get_pretrained_cfg(name)
    if pretrained and not (cfg and cfg.has_weights):
        raise UserError(f"timm has no published weights for '{name}', the backbone of '{spec}'; start from random ones")
    with torch.device("meta"), _told(spec, spec.options):
        own = options or {}
        depth = {"out_indices": own["depth"]} if "depth" in own else {}  # by default timm asks a transformer for its last three blocks
        probe: Any = timm.create_model(name, features_only=True, **depth, **own)
        strides = probe.feature_info.reduction()
    if options is not None and len(set(strides)) == 1 and len(stages) <= len(getattr(probe, "model", probe).feature_info):
        return _plain(spec, name, list(stages.values()), pretrained, options, len(probe.model.feature_info))
    if stride not in (8, 16, 32):
        raise UserError(_expected(spec, f"timm/{name}", stride))
    missing = next((each for each in stages if each not in strides), None)
    if missing is not None:
        raise UserError(f"'timm/{name}' shows maps of stride {strides}, not {missing}, which '{spec}' needs; take another backbone")
    last = {each: index for index, each in enumerate(strides)}
    dilated: dict[str, Any] = {"output_stride": stride} if stride < max(strides) else {}
    with _told(spec, spec.options), _quick_without_network():
        indices = [last[each] for each in stages]
        network = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=indices, **own, **dilated)
    return _Timm(network, list(stages.values()))


def _plain(spec: Spec, name: str, keys: list[str], pretrained: bool, options: dict[str, Any], depth: int) -> nn.Module:
    """All blocks of a vision transformer, which takes images of any size that its patches divide: its positions are resampled."""
    with _told(spec, spec.options), _quick_without_network():
        try:
            network: Any = timm.create_model(
                name, pretrained=pretrained, features_only=True, out_indices=depth, dynamic_img_size=True, **options
            )
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            raise UserError(
                f"'timm/{name}' takes images of one size only and cannot be the backbone of '{spec}'; take a vision transformer that "
                "resamples its positions, such as timm/vit_tiny_patch16_224"
            ) from error
    return _Plain(network, network.feature_info.reduction()[-1], depth, keys)


def _torchvision_body(spec: Spec, name: str, stages: dict[int, str], pretrained: bool, stride: int) -> nn.Module:
    if stride not in (8, 16, 32):
        raise UserError(_expected(spec, name, stride))
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(f"torchvision has no classifier '{name}' to be the backbone of '{spec}'{nearest(name, names) or '; or timm/NAME'}")
    weights = torchvision.models.get_model_weights(name).DEFAULT if pretrained else None  # type: ignore[attr-defined]
    with _told(spec, spec.options):
        network = torchvision.models.get_model(name, weights=weights)
    trunk = next((part for part in (getattr(network, key, None) for key in ("features", "layers")) if part is not None), network)
    last = _stages(trunk)
    missing = next((each for each in stages if each not in last), None)
    if missing is not None:
        raise UserError(f"the backbone '{name}' of '{spec}' shows no map of stride {missing} between its modules; name one of timm/NAME")
    _dilate(trunk, last, stride)
    return IntermediateLayerGetter(trunk, {last[each]: key for each, key in stages.items()})


def _stages(trunk: nn.Module) -> dict[int, str]:
    """Stride -> the last module that gives a map of that stride, as the modules run one after the other."""
    last: dict[int, str] = {}
    seen: Any = torch.zeros(1, 3, _SIDE, _SIDE)
    trunk.eval()
    with torch.no_grad():
        for name, module in trunk.named_children():
            try:
                seen = module(seen)
            except (RuntimeError, ValueError, TypeError):
                break  # a classifier's head, behind a flattening that is no module
            if isinstance(seen, Tensor) and seen.ndim == 4 and seen.shape[2] == seen.shape[3] and _SIDE % seen.shape[2] == 0:
                last[_SIDE // seen.shape[2]] = name
    trunk.train()
    return last


def _dilate(trunk: nn.Module, last: dict[int, str], stride: int) -> None:
    """Take the stride out of the stages beyond `stride`; their later convolutions see as far as before (torchvision's ResNet does so)."""
    children = dict(trunk.named_children())
    names, rate = list(children), 1
    for beyond in (each for each in STRIDES if each > stride and each in last and each // 2 in last):
        for child in names[names.index(last[beyond // 2]) + 1 : names.index(last[beyond]) + 1]:
            for conv in (module for module in children[child].modules() if isinstance(module, nn.Conv2d)):
                reach = rate if max(conv.stride) > 1 else 2 * rate
                conv.stride = (1, 1)
                if max(conv.kernel_size) > 1:
                    conv.dilation = (reach, reach)
                    conv.padding = tuple(reach * (size // 2) for size in conv.kernel_size)
        rate *= 2


def _maps(body: nn.Module, side: int) -> dict[str, Tensor]:
    """What the body makes of an empty image, its statistics untouched. What has no part in it learns nothing: DDP would wait for it."""
    learning = [parameter for parameter in body.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        maps: dict[str, Tensor] = body.eval()(torch.zeros(1, 3, side, side))
        total = torch.stack([each.sum() for each in maps.values()]).sum()
        gradients = torch.autograd.grad(total, learning, allow_unused=True)
    body.train()
    for parameter, gradient in zip(learning, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    return {key: each.detach() for key, each in maps.items()}
