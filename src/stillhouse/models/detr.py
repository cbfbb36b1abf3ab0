"""Transformers' DETR family (DETR, Conditional and Deformable DETR, RT-DETR, D-FINE, …) as detectors with torchvision's contract."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from stillhouse.data import IMAGENET_MEAN, IMAGENET_STD
from stillhouse.errors import UserError, nearest
from stillhouse.models.backbones import statistics_of
from stillhouse.models.detectors import Frame
from stillhouse.models.families import (
    Fit,
    _agree,
    _quick_without_network,
    _refuse_options,
    _told,
    config_of,
    quiet_transformers,
    refuse_head,
    refuse_unknown,
)
from stillhouse.models.preprocessing import Preprocessing
from stillhouse.models.published import _plain, refuse_bare
from stillhouse.models.specs import Spec
from stillhouse.models.weights import LOG, accept

KINDS = {
    "detr": "DetrImageProcessor",
    "conditional_detr": "ConditionalDetrImageProcessor",
    "deformable_detr": "DeformableDetrImageProcessor",
    "dab-detr": "ConditionalDetrImageProcessor",
    "table-transformer": "DetrImageProcessor",
    "rt_detr": "RTDetrImageProcessor",
    "rt_detr_v2": "RTDetrImageProcessor",
    "d_fine": "RTDetrImageProcessor",
}
"""Transformers' names of the kinds of network that are understood here, and the image processor that goes with each."""

_LONGEST = 1333 / 800  # of DETR's longest to its shortest side
_NOT_A_CLASS = "N/A"  # COCO's ids have holes, and published heads an output for each of them
_OURS = ("size", "longest", "backbone", "freeze_backbone_batch_norms")


class _Reached(Exception):
    """The neck is computed and nothing after it is wanted."""

    def __init__(self, levels: list[Tensor]) -> None:
        super().__init__()
        self.levels = levels


class Detr(nn.Module):
    """A detector of transformers' DETR family: images and targets in, losses or detections out, as torchvision's detectors do it.

    In training mode `network(images, targets)` gives named, weighted losses that add up to the model's own `.loss`; in eval mode
    `network(images)` gives for each image {"boxes" [m, 4] xyxy in its pixels, "labels" [m] in 1..K, "scores" [m]}, best first.
    Images are float [3, H, W] in [0, 1], each of its own size; they are normalised, resized and padded to one batch here.

    The submodules `backbone` and `neck` pass on the maps [B, C, H, W] of the padded batch as a list of levels (`neck`: the encoder's
    memory), with gradient, so that a forward hook on them sees the features, and may return others for what follows.

    Args:
        network: a `...ForObjectDetection` of transformers, of a kind in `KINDS`.
        size: what images are resized to, in pixels: the shortest side, or (height, width); None leaves them as they are.
        longest: bound on the longest side where `size` is the shortest one; 5/3 of it by default, as for DETR (800 and 1333).
        mean, std: a value a channel, for pixels in [0, 1].
        ids: the outputs that stand for the labels 1..K; by default all but those named "N/A", as the holes in COCO's ids are.

    Raises:
        UserError: for another kind of network, or a size that is no size.
    """

    mean: Tensor
    std: Tensor
    ids: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        size: int | Sequence[int] | None = None,
        longest: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        config: Any = getattr(network, "config", None)
        if getattr(config, "model_type", None) not in KINDS:
            raise UserError(f"{type(network).__name__} is no detector of transformers' DETR family, expected one of {', '.join(KINDS)}")
        inner: Any = network
        self.network: Any = inner
        self.size, self.longest = _checked_size(size, longest)
        # RT-DETR and its kin know nothing of padding: their boxes are fractions of the padded batch, and the grids of their levels nest.
        self.strides: list[int] | None = list(config.feat_strides) if hasattr(config, "feat_strides") else None
        self.preprocessing = Preprocessing((0.0,) * 3, (1.0,) * 3)  # what it wants its images like: plain pixels
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        ids = list(_classes(config.id2label)) if ids is None else ids
        self.register_buffer("ids", torch.tensor(ids, dtype=torch.long), persistent=False)
        self.backbone, self.neck = nn.Identity(), nn.Identity()
        self.frame: Frame | None = None  # of the last batch
        self._grid: torch.Size = torch.Size()
        self._no_further = False
        inner.loss_function = partial(_in_fp32, inner.loss_function)
        inner.model.backbone.register_forward_hook(self._pass_backbone)
        inner.model.encoder.register_forward_hook(self._pass_neck, with_kwargs=True)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training mode, detections in eval mode.

        Raises:
            UserError: in training mode without targets, or for labels outside 1..K.
        """
        if self.training:
            if targets is None:
                raise UserError("a detector in training mode needs targets, pass them or call .eval() first")
            return self.losses(images, targets)
        pixels, mask, frames = self._batch(images)
        output = self.network(pixels, pixel_mask=mask)
        scores, queries, labels = self._best(output.logits.float())
        boxes = output.pred_boxes.float()
        return [
            {"boxes": _clipped(to_corners(boxes[i, queries[i]], *frames[i]), image), "labels": labels[i], "scores": scores[i]}
            for i, image in enumerate(images)
        ]

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The weighted losses by name, in fp32; their sum is the model's `.loss`. In eval mode without dropout and denoising queries.

        `loss_ce` (or `loss_vfl`), `loss_bbox` and `loss_giou` are those of the decoder's output, `loss_aux` sums all those of its
        earlier layers (if the network has auxiliary losses), `loss_denoising` those of the denoising queries (RT-DETR, in training).

        Raises:
            UserError: for labels outside 1..K.
        """
        pixels, mask, frames = self._batch(images)
        wanted = [self._target(target, *frame) for target, frame in zip(targets, frames, strict=True)]
        found = self.network(pixels, pixel_mask=mask, labels=wanted).loss_dict
        return self._weighted(found)

    def features(self, images: Sequence[Tensor]) -> list[Tensor]:
        """The maps of the neck [B, C, H, W], level by level, over the padded batch; neither decoder nor heads are run."""
        pixels, mask, _ = self._batch(images)
        self._no_further = True
        try:
            self.network(pixels, pixel_mask=mask)
        except _Reached as reached:
            return reached.levels
        finally:
            self._no_further = False
        raise RuntimeError(f"{type(self.network).__name__} did not run its encoder")

    def _pass_backbone(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        features = output[0] if isinstance(output, tuple) else output  # some kinds add the position embeddings
        given = [level for level, _ in features]
        levels = self.backbone(given)
        self._grid = levels[-1].shape[-2:]
        if levels is given:
            return None
        others = [(level, mask) for level, (_, mask) in zip(levels, features, strict=True)]
        return (others, *output[1:]) if isinstance(output, tuple) else others

    def _pass_neck(self, module: nn.Module, inputs: Any, kwargs: dict[str, Any], output: Any) -> Any:
        memory = output.last_hidden_state
        tokens = isinstance(memory, Tensor)
        if tokens:  # [B, H x W of every level, C]
            grids = kwargs.get("spatial_shapes_list", [self._grid])
            parts = memory.split([height * width for height, width in grids], dim=1)
            memory = [part.transpose(1, 2).unflatten(2, tuple(grid)) for part, grid in zip(parts, grids, strict=True)]
        given = list(memory)
        levels = self.neck(given)
        if self._no_further:
            raise _Reached(levels)
        if levels is given:
            return None
        output = copy.copy(output)
        output.last_hidden_state = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1) if tokens else levels
        return output

    def _batch(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
        """Pixels [B, 3, H, W], mask [B, H, W] (1: image, 0: padding), and the height and width in each image's pixels that 1.0 means."""
        resized = [self._resized((image.float() - self.mean) / self.std) for image in images]
        height, width = (max(image.shape[side] for image in resized) for side in (1, 2))
        if self.strides is not None:
            coarsest = self.strides[-1]
            height, width = (-(-side // coarsest) * coarsest for side in (height, width))
        self.frame = Frame((height, width), [(image.shape[1], image.shape[2]) for image in resized])
        room = [(0, width - image.shape[2], 0, height - image.shape[1]) for image in resized]
        pixels = torch.stack([F.pad(image, pad) for image, pad in zip(resized, room, strict=True)])
        mask = torch.stack([F.pad(image.new_ones(image.shape[1:]), pad) for image, pad in zip(resized, room, strict=True)])
        frames = [(float(image.shape[1]), float(image.shape[2])) for image in images]
        if self.strides is not None:
            frames = [(h * height / new.shape[1], w * width / new.shape[2]) for (h, w), new in zip(frames, resized, strict=True)]
        return pixels.to(images[0].dtype), mask.long(), frames

    def _resized(self, image: Tensor) -> Tensor:
        size = resized_size(image.shape[1], image.shape[2], self.size, self.longest)
        return image if size == image.shape[1:] else F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]

    def _target(self, target: Mapping[str, Tensor], height: float, width: float) -> dict[str, Tensor]:
        labels = target["labels"].to(self.ids.device)
        if labels.numel() and not 1 <= int(labels.min()) <= int(labels.max()) <= len(self.ids):
            raise UserError(f"labels go from {int(labels.min())} to {int(labels.max())}, expected 1 to {len(self.ids)} (0 is background)")
        return {"class_labels": self.ids[labels - 1], "boxes": to_centres(target["boxes"].to(self.ids.device), height, width)}

    def _weighted(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = self.network.config
        # Where the configuration has coefficients the model's loss applies them, elsewhere (RT-DETR) what it names is weighted already.
        weights = {f"loss_{name}": float(getattr(config, f"{name}_loss_coefficient", 1.0)) for name in ("bbox", "giou")}
        terms: dict[str, Tensor] = {}
        for key, value in found.items():
            kind = re.match(r"(loss_[a-z]+)(_dn_)?(_?.+)?", key)
            if kind is None:  # cardinality_error is no loss
                continue
            name = "loss_denoising" if kind[2] else "loss_aux" if kind[3] else key
            term = weights.get(kind[1], 1.0) * value
            terms[name] = terms[name] + term if name in terms else term
        if self.training and getattr(config, "num_denoising", 0) > 0 and "loss_denoising" not in terms:  # no box to add noise to
            terms["loss_denoising"] = 0.0 * self.network.model.denoising_class_embed.weight.sum()
        return terms

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, the queries they belong to and labels in 1..K, each [B, Q], best first."""
        count = logits.shape[1]
        if logits.shape[-1] > self.network.config.num_labels:  # softmax with a last output for "no object"
            best, labels = logits.softmax(-1)[..., self.ids].max(-1)
            scores, queries = best.sort(stable=True, dim=-1, descending=True)
            return scores, queries, labels.gather(1, queries) + 1
        scores, places = logits.sigmoid()[..., self.ids].flatten(1).topk(count, dim=1)
        return scores, places // len(self.ids), places % len(self.ids) + 1


def to_centres(boxes: Tensor, height: float, width: float) -> Tensor:
    """Boxes [n, 4] as x1, y1, x2, y2 in pixels -> centre x, centre y, width, height as fractions of `width` and `height` (fp32)."""
    x1, y1, x2, y2 = boxes.float().unbind(-1)
    return torch.stack([(x1 + x2) / (2 * width), (y1 + y2) / (2 * height), (x2 - x1) / width, (y2 - y1) / height], dim=-1)


def to_corners(centres: Tensor, height: float, width: float) -> Tensor:
    """The inverse of `to_centres`."""
    x, y, w, h = centres.float().unbind(-1)
    return torch.stack([(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], dim=-1)


def _clipped(boxes: Tensor, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    return torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=-1).flatten(1)


def resized_size(height: int, width: int, size: int | tuple[int, int] | None, longest: int | None) -> tuple[int, int]:
    """Height and width after the resize: `size` itself, the shortest side `size` unless the longest gets too long, or as before (None)."""
    if size is None:
        return height, width
    if not isinstance(size, int):
        return size
    scale = size / min(height, width)
    if longest is not None:
        scale = min(scale, longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _checked_size(size: Any, longest: Any) -> tuple[int | tuple[int, int] | None, int | None]:
    sides: list[Any] = list(size) if isinstance(size, (list, tuple)) else [] if size is None else [size]
    if not all(isinstance(side, int) and side > 0 for side in sides) or len(sides) > 2 or size in ((), []):
        raise UserError(f"size={size!r} is no size, expected the shortest side in pixels or (height, width)")
    if longest is not None and not (isinstance(longest, int) and len(sides) == 1 and longest >= sides[0]):
        raise UserError(f"longest={longest!r} does not fit size={size!r}, expected pixels, at least those of the shortest side")
    if len(sides) == 1:
        return sides[0], longest or round(sides[0] * _LONGEST)
    return ((sides[0], sides[1]) if sides else None), None


def _in_fp32(loss: Callable[..., Any], logits: Tensor, *rest: Any, **named: Any) -> Any:
    """The model's loss outside autocast: its matching and its IoUs are not meant for half precision."""
    with torch.autocast(logits.device.type, enabled=False):
        return loss(_float(logits), *map(_float, rest), **{key: _float(value) for key, value in named.items()})


def _float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(_float, value))
    return {key: _float(item) for key, item in value.items()} if isinstance(value, dict) else value


def _classes(names: Mapping[Any, str]) -> dict[int, str]:
    """The outputs of a head that stand for a class, in order, and what they are called."""
    named = {int(id): name for id, name in names.items()}
    return {id: named[id] for id in sorted(named) if named[id].upper() != _NOT_A_CLASS}


def known_classes(config: Mapping[str, Any]) -> int:
    """How many classes a detector with this `config.json` tells apart."""
    return len(known_names(config))


def known_names(config: Mapping[str, Any]) -> list[str]:
    """The names of the classes, from label 1 on, that a detector with this `config.json` tells apart."""
    return list(_classes(config.get("id2label", {0: "LABEL_0", 1: "LABEL_1"})).values())  # transformers leaves its own default out


def open_detr(
    spec: Spec, fit: Fit, pretrained: bool, file: dict[str, Tensor] | None = None, allow_partial: bool = False
) -> tuple[Detr, dict[str, Any]]:
    """The detector `transformers/KIND`, `transformers/PUBLISHED_NAME` or `transformers/FOLDER`, and the options that build it again.

    Weights are random (from torch's generator), published (ImageNet's for the backbone of a kind, which has no others), or those of
    `file`. The outputs of published weights are found by the names of the data's classes; a student whose data has others gets a new
    head. Beside the options of the kind's configuration there are

    - `size` and `longest` in pixels (see `Detr`; by default `fit.image_size`, else as the weights were trained, else the image's own);
    - `backbone=NAME`: of a kind, timm's network of that name;
    - `freeze_backbone_batch_norms`: false by default for random weights (the normalisation would stay what it starts as, and scale the
      residual branches by zero for good), true for published weights, as they were trained. All parameters are trained either way.

    Raises:
        UserError: for a name or option that is not known, one that does not fit the data, or weights that cannot be had.
    """
    try:
        from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING as DETECTORS
    except ImportError:
        raise UserError(f"'{spec}' needs transformers: pip install 'stillhouse[transformers]'") from None
    if fit.channels != 3:
        raise UserError(f"'{spec}' takes images of 3 channels and the data has {fit.channels}, expected colour images")
    config, published = _config(spec, pretrained)
    if pretrained and not published:
        refuse_bare(spec, fit)
    ids = _fit_classes(spec, config, fit, pretrained and published)
    if file is None and not pretrained and "freeze_backbone_batch_norms" not in spec.options:
        config.freeze_backbone_batch_norms = False  # a published configuration says otherwise, but for published weights
    network: Any = DETECTORS[type(config)]
    with _told(spec, spec.options), _quick_without_network(), quiet_transformers(), _trained_norms(network, config):
        if file is None and not (pretrained and published):
            model = network(config)
        else:
            model, info = network.from_pretrained(
                None if file is not None else spec.name,
                config=config,
                state_dict=None if file is None else _without_wrapper(file),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            _account(spec, info, fit, allow_partial)
        model.model.backbone.requires_grad_(True)  # transformers freezes some kinds of backbone, whole and random ones too
        images = _processing(spec.name) if published else _pretrain(model) if pretrained else {}
    if "size" in spec.options or "longest" in spec.options:
        images = {**images, "longest": None, **{key: spec.options[key] for key in ("size", "longest") if key in spec.options}}
    elif fit.image_size is not None:
        images = {**images, "size": fit.image_size, "longest": None}
    return Detr(model, **images, ids=ids).train(), dict(spec.options)


def _config(spec: Spec, pretrained: bool) -> tuple[Any, bool]:
    """The configuration with the spec's options, and whether weights belong to it (a folder or a published name, not a bare kind)."""
    from transformers import AutoConfig

    bare = spec.name in KINDS and not Path(spec.name, "config.json").is_file()
    if not bare and "/" not in spec.name and not Path(spec.name).is_dir():
        raise UserError(
            f"transformers has no kind of detector '{spec.name}' that is known here{nearest(spec.name, KINDS)}; "
            f"expected one of {', '.join(KINDS)}, a folder or a published name"
        )
    backbone = spec.options.get("backbone")
    _refuse_options(Spec(spec.family, spec.name, {key: value for key, value in spec.options.items() if key not in _OURS}))
    plain = AutoConfig.for_model(spec.name) if bare else config_of(spec)
    if plain.model_type not in KINDS:
        raise UserError(f"'{spec}' is a '{plain.model_type}', expected a detector of a kind among {', '.join(KINDS)}")
    known = set(plain.to_dict()) | {"num_labels"} | set(_OURS)
    refuse_unknown(spec, known)
    options = {key: value for key, value in spec.options.items() if key not in ("size", "longest", "backbone")}
    if not bare and backbone is not None:
        raise UserError(f"'{spec}' comes with its own backbone, leave the option backbone out")
    if not bare:
        return config_of(spec, **options), True
    with _told(spec, spec.options), _quick_without_network():
        return AutoConfig.for_model(spec.name, **_bare_options(spec, plain, options, pretrained)), False


def _bare_options(spec: Spec, plain: Any, options: Mapping[str, Any], pretrained: bool) -> dict[str, Any]:
    name = spec.options.get("backbone")
    if name is not None and not (isinstance(name, str) and timm.is_model(name)):
        raise UserError(f"timm has no network '{name}' for the backbone of '{spec}'{nearest(str(name), timm.list_models())}")
    options = {"freeze_backbone_batch_norms": pretrained, **options}
    if name is not None and options["freeze_backbone_batch_norms"] and _has_active_norms(name):
        if "freeze_backbone_batch_norms" in spec.options:
            raise UserError(
                f"transformers cannot freeze the normalisation of the backbone '{name}' without losing its activations, "
                f"leave freeze_backbone_batch_norms out of '{spec}'"
            )
        options["freeze_backbone_batch_norms"] = False
    if hasattr(plain, "decoder_in_channels"):  # they follow from the encoder's width, and the configuration repeats them
        width = options.get("encoder_hidden_dim", plain.encoder_hidden_dim)
        options.setdefault("decoder_in_channels", [width] * len(plain.decoder_in_channels))
    if name is None:
        return options
    levels = 1 if options.get("num_feature_levels") == 1 else 3 if hasattr(plain, "num_feature_levels") else 4
    backbone = {"model_type": "timm_backbone", "backbone": name, "features_only": True, "out_indices": list(range(-levels, 0))}
    return {**options, "backbone_config": backbone}


def _has_active_norms(name: str) -> bool:
    with torch.device("meta"):
        return any(isinstance(module, BatchNormAct2d) for module in timm.create_model(name).modules())


def _pretrain(model: Any) -> dict[str, Any]:
    """Give a kind's backbone its ImageNet weights; returns the statistics of the images it was trained with."""
    config = model.config.backbone_config
    if config.model_type != "timm_backbone":
        raise UserError(f"'{config.model_type}' has no published weights for a backbone, name one of timm: backbone=NAME")
    published = timm.create_model(config.backbone, pretrained=True, features_only=True, out_indices=config.out_indices)
    body = next(module for module in model.model.backbone.modules() if isinstance(module, type(published)))
    own = body.state_dict()  # where normalisation is frozen it counts no batches
    body.load_state_dict({key: value for key, value in published.state_dict().items() if key in own})
    mean, std = statistics_of(f"timm/{config.backbone}")
    return {"mean": mean, "std": std}


def _fit_classes(spec: Spec, config: Any, fit: Fit, pretrained: bool) -> list[int]:
    """Give the configuration the data's classes, or find them in it; returns the outputs that stand for them."""
    _agree(spec, "num_labels", fit.classes)
    ids = _found(spec, config, fit, pretrained)
    if ids is None:
        ids = list(range(fit.classes))
        names = fit.names if fit.names and not any(name.upper() == _NOT_A_CLASS for name in fit.names) else [f"LABEL_{id}" for id in ids]
        config.id2label = dict(enumerate(names))
    else:
        config.id2label = {id: name if id in ids else _NOT_A_CLASS for id, name in config.id2label.items()}
    config.label2id = {name: id for id, name in config.id2label.items()}
    return ids


def _found(spec: Spec, config: Any, fit: Fit, pretrained: bool) -> list[int] | None:
    """The data's classes among the outputs, in the data's order; None where the head is to be new."""
    known, unknown = _classes(config.id2label), ""
    if fit.names is not None:
        places = {_plain(name): id for id, name in known.items()}
        unknown = next((name for name in fit.names if _plain(name) not in places), "")
        if not unknown:
            return [places[_plain(name)] for name in fit.names]
    if len(known) == fit.classes and not (unknown and all(re.fullmatch(r"LABEL_\d+", name) for name in known.values())):
        if unknown:
            LOG.warning("the weights of '%s' know no class '%s', but as many as the data has: taken in their order", spec, unknown)
        return list(known)
    if pretrained and not fit.new_head and len(known) != fit.classes:
        refuse_head(spec, len(known), fit.classes, f"knows no class '{unknown}' of the data" if unknown else "")
    return None


@contextmanager
def _trained_norms(network: Any, config: Any) -> Iterator[None]:
    """Let the backbone keep its batch normalisation where the configuration says so, for the kinds that freeze it whatever it says."""
    module: Any = sys.modules[network.__module__]
    freeze = module.replace_batch_norm
    if not getattr(config, "freeze_backbone_batch_norms", True):
        module.replace_batch_norm = lambda backbone: None
    try:
        yield
    finally:
        module.replace_batch_norm = freeze


def _without_wrapper(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of the model itself, also of a state dict of a `Detr`."""
    inside = all(key.startswith("network.") for key in weights)
    return {key.removeprefix("network."): value for key, value in weights.items()} if inside else weights


def _account(spec: Spec, info: dict[str, Any], fit: Fit, allow_partial: bool) -> None:
    """Every key that transformers did not load, or had no place for, unless it belongs to a head that is meant to be new."""
    heads = {}
    for key, saved, wanted in info["mismatched_keys"]:
        extra = wanted[0] - fit.classes  # an output for "no object", or an embedding of it
        if extra in (0, 1) and tuple(saved[1:]) == tuple(wanted[1:]):
            heads[key] = saved[0] - extra
    if heads and not fit.new_head:
        refuse_head(spec, next(iter(heads.values())), fit.classes)
    if heads:
        LOG.info("new random classifier (%s) for %d classes", ", ".join(sorted(heads)), fit.classes)
    mismatched = [key for key, *_ in info["mismatched_keys"]]
    names = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "wrongly shaped": mismatched}
    counts = "num_batches_tracked"  # in a file where normalisation was trained, not where it was frozen; nothing depends on it
    found = {what: sorted(key for key in keys if key not in heads and not key.endswith(counts)) for what, keys in names.items()}
    accept(f"the weights and '{spec}'", found, allow_partial, "take the weights of this very network, or allow partial loading")


def _processing(name: str) -> dict[str, Any]:
    """`Detr`'s size, longest, mean and std from the `preprocessor_config.json` beside the weights; nothing where there is none."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        name,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return {}
    told = json.loads(Path(path).read_text())
    size, longest = told.get("size"), told.get("max_size")
    if isinstance(size, dict):
        longest = size.get("longest_edge")
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    images: dict[str, Any] = {"size": size, "longest": longest} if told.get("do_resize", True) and size else {}
    if not told.get("do_normalize", True):
        return {**images, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return {**images, **{key: told[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in told}}


def save_detr(model: Detr, folder: Path) -> None:
    """Write the model as transformers opens it (`from_pretrained(folder)`), and what it does to its images beside it."""
    with quiet_transformers():
        model.network.save_pretrained(folder, max_shard_size="1000GB")
    sides = model.size
    size = {"shortest_edge": sides, "longest_edge": model.longest} if isinstance(sides, int) else None
    if isinstance(sides, tuple):
        size = {"height": sides[0], "width": sides[1]}
    told = {
        "image_processor_type": KINDS[model.network.config.model_type],
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": model.mean.flatten().tolist(),
        "image_std": model.std.flatten().tolist(),
        "do_resize": size is not None,
        "do_pad": True,
        "resample": 2,  # Pillow's number of bilinear
        **({"size": size} if size is not None else {}),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(told, indent=2) + "\n")
