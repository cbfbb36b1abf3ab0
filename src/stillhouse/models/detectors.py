"""Detectors by name: torchvision's own, and its RetinaNet, FCOS and Faster R-CNN on any backbone that torchvision or timm has."""

from __future__ import annotations

import inspect
import math
from functools import partial, reduce
from typing import Any, NamedTuple

import torchvision
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from stillhouse.errors import UserError, nearest
from stillhouse.models.backbones import STRIDES, open_body, statistics_of
from stillhouse.models.families import Fit, _told
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.models.published import load_file, load_published, refuse_bare
from stillhouse.models.specs import Spec

COMPOSED: dict[str, dict[str, Any]] = {
    "retinanet": {"backbone": "resnet50", "channels": 256, "levels": 5, "stride": 8, "convs": 4},
    "fcos": {"backbone": "resnet50", "channels": 256, "levels": 5, "stride": 8, "convs": 4},
    "faster_rcnn": {"backbone": "resnet50", "channels": 256, "levels": 5, "stride": 4, "convs": 1, "hidden": 1024},
}
"""Detectors that are put together here, with the defaults of their own options."""

_CLASSES: dict[str, type[nn.Module]] = {
    **{"retinanet": RetinaNet, "fcos": FCOS, "faster_rcnn": FasterRCNN},
    **{"fasterrcnn": FasterRCNN, "ssd300": SSD, "ssdlite320": SSD},
}
_WITHOUT_EPS = ("retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn")
"""torchvision published these with frozen normalisation that adds no epsilon."""


class Frame(NamedTuple):
    """Where a detector put the images of a batch: resized to `sizes`, at the top left of a `canvas` it pads to; heights and widths."""

    canvas: tuple[int, int]
    sizes: list[tuple[int, int]]


def is_detector(network: nn.Module) -> bool:
    """Whether a network follows torchvision's contract: `network(images, targets)` gives losses in train mode, detections in eval mode."""
    return "targets" in inspect.signature(network.forward).parameters


def compiled_part(network: nn.Module) -> nn.Module:
    """What of a network is worth compiling: of a detector its backbone, for what follows has other shapes for other boxes."""
    parts = dict(network.named_modules()) if is_detector(network) else {}
    return parts.get("network.model.backbone") or parts.get("backbone") or network  # transformers', torchvision's


def classes_of(network: nn.Module) -> int | None:
    """How many classes a detector tells apart, the background not counted; None where its head does not say."""
    if hasattr(network, "ids"):  # transformers'
        return len(network.ids)  # type: ignore[arg-type]
    detector: Any = network
    paths = (
        "head.classification_head.num_classes",
        "head.classification_head.num_columns",
        "roi_heads.box_predictor.cls_score.out_features",
    )
    found = (reduce(lambda part, name: getattr(part, name, None), path.split("."), detector) for path in paths)
    outputs = next((each for each in found if each is not None), None)
    return None if outputs is None else int(outputs) - 1


def detection_losses(network: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The detector's own named losses for images [3, H, W] and their {"boxes" [n, 4], "labels" [n]}, in train and in eval mode.

    In eval mode normalisation and dropout stay as they are there; only what decides between losses and detections is switched over, for
    this call. Torch's generator then moves by no more than what the detector samples its boxes with.
    """
    if network.training:
        losses: dict[str, Tensor] = network(images, targets)
        return losses
    if callable(getattr(type(network), "losses", None)):  # transformers' detectors know their losses in either mode
        return network.losses(images, targets)  # type: ignore[operator, no-any-return]
    deciding = [module for name, module in network.named_modules() if not module.training and (not name or _decides(name, module))]
    try:
        for module in deciding:
            module.training = True
        return network(images, targets)  # type: ignore[no-any-return]
    finally:
        for module in deciding:
            module.training = False


def _decides(name: str, module: nn.Module) -> bool:
    """Parts made of other parts may ask whether this is training; layers may not, nor anything in the backbone."""
    inside = "backbone" in name.split(".")
    return not inside and not isinstance(module, nn.modules.batchnorm._NormBase) and next(module.children(), None) is not None


def open_detector(
    spec: Spec, fit: Fit, pretrained: bool, file: dict[str, Tensor] | None = None, allow_partial: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The detector `torchvision/NAME:OPTIONS` or `transformers/NAME`, with 1 + `fit.classes` outputs, and the options that build it again.

    Every torchvision detector takes `min_size` and `max_size` (by default from `fit.image_size`, else torchvision's 800 and 1333; SSD has
    one size), the other numbers of its class (`score_thresh`, `nms_thresh`, `detections_per_img`, ...), and `frozen_bn`: whether the
    backbone's batch normalisation is frozen. As in torchvision, it is with published weights (but for SSD and the `_v2` networks), and is
    not with random ones; all other parameters are trained either way.

    The detectors in `COMPOSED` also take

    - `backbone`: a torchvision classifier such as `resnet18`, or `timm/NAME`; published weights are then ImageNet's, of it alone;
    - `stride` of the finest level (4, 8, 16 or 32), `levels`, and `channels` of the pyramid: levels beyond the backbone's last map are
      pooled (one) or convolved (two: P6 and P7). Anchors follow the strides as torchvision's do: a side of 4 x stride x (1, 2^1/3, 2^2/3)
      for RetinaNet, 1 x for FCOS, 8 x for Faster R-CNN;
    - `convs`: depth of the heads (Faster R-CNN: of its proposal head); `hidden`: width of Faster R-CNN's box head.

    Raises:
        UserError: for an unknown name or option, one that does not fit the data, or weights that cannot be had.
    """
    if spec.family == "transformers":
        from stillhouse.models.detr import open_detr

        return open_detr(spec, fit, pretrained, file, allow_partial)
    _check_name(spec)
    if fit.channels != 3:
        raise UserError(f"'{spec}' takes images of 3 channels and the data has {fit.channels}, expected colour images")
    composed = spec.name in COMPOSED
    options = _options(spec, fit, pretrained)
    numbers = {key: value for key, value in options.items() if key in _numbers(spec.name)}
    made = _composed if composed else _built
    model: Any = made(spec, fit, options, numbers, pretrained)
    if file is not None:
        load_file(spec, model, file, fit, True, allow_partial)
    elif pretrained and not composed:
        load_published(spec, model, fit, True)
    if options.get("frozen_bn"):
        _freeze(model.backbone, spec.name in _WITHOUT_EPS)
    set_preprocessing(model, Preprocessing((0.0,) * 3, (1.0,) * 3, None, "bilinear"))  # it normalises and resizes inside
    return model, options


def _check_name(spec: Spec) -> None:
    names = [*COMPOSED, *torchvision.models.list_models(module=torchvision.models.detection)]
    if spec.name not in names:
        raise UserError(f"torchvision has no detector '{spec.name}'{nearest(spec.name, names) or ', expected one of ' + ', '.join(names)}")
    if spec.name.startswith(("maskrcnn", "keypointrcnn")):
        raise UserError(f"'{spec}' wants masks or keypoints beside boxes, which no data here has; take torchvision/fasterrcnn_resnet50_fpn")


def _options(spec: Spec, fit: Fit, pretrained: bool) -> dict[str, Any]:
    """All options, with defaults and what follows from the data."""
    own = COMPOSED.get(spec.name, {})
    statistics = {"image_mean", "image_std"} if own else set()
    known = {*own, *_numbers(spec.name), "frozen_bn"}
    for key, value in spec.options.items():
        if key not in known | statistics:
            raise UserError(f"torchvision network '{spec.name}' has no option '{key}'{nearest(key, known) or ', leave it out'}")
        if key not in {"backbone", *statistics} and not isinstance(value, int if key in own else (int, float)):
            raise UserError(f"'{spec}' says {key}={value!r}, expected a {'whole ' if key in own else ''}number")
        if key in statistics and not (isinstance(value, (list, tuple)) and len(value) == 3):
            raise UserError(f"'{spec}' says {key}={value!r}, expected three numbers such as (0.5,0.5,0.5)")
    options = {**own, **spec.options}
    if "min_size" in _numbers(spec.name):
        if fit.image_size is not None:
            options.setdefault("min_size", fit.image_size)
        if "min_size" in options:
            options.setdefault("max_size", options["min_size"] * 1333 // 800)
    if pretrained and not spec.name.endswith("_v2") and _class_of(spec.name) is not SSD:
        options.setdefault("frozen_bn", True)
    return options


def _class_of(name: str) -> type[nn.Module]:
    return _CLASSES[name if name in COMPOSED else name.partition("_")[0]]


def _numbers(name: str) -> set[str]:
    """The options of a torchvision detector's class that are plain numbers (its transform takes any other name and ignores it)."""
    parameters = inspect.signature(_class_of(name).__init__).parameters.values()
    return {each.name for each in parameters if isinstance(each.default, (int, float))}


def _built(spec: Spec, fit: Fit, options: dict[str, Any], numbers: dict[str, Any], pretrained: bool) -> nn.Module:
    with _told(spec, spec.options):
        return torchvision.models.get_model(spec.name, weights=None, weights_backbone=None, num_classes=fit.classes + 1, **numbers)


class _Neck(nn.Module):
    """torchvision's BackboneWithFPN for any body, and without a level on top where none is asked for."""

    def __init__(self, body: nn.Module, fpn: FeaturePyramidNetwork, channels: int) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(images))  # type: ignore[no-any-return]


def _composed(spec: Spec, fit: Fit, options: dict[str, Any], numbers: dict[str, Any], pretrained: bool) -> nn.Module:
    if pretrained:
        refuse_bare(spec, fit)
    channels, levels, stride = options["channels"], options["levels"], options["stride"]
    strides = [each for each in STRIDES if each >= stride]
    if stride not in STRIDES or not 1 <= levels <= len(strides) + 2 or channels < 1:
        raise UserError(
            f"'{spec}' asks for {levels} levels of {channels} channels from stride {stride} on, expected at least one channel, stride "
            f"{', '.join(map(str, STRIDES))} and one to {len(strides) + 2} levels from there"
        )
    strides = strides[:levels]
    _check_heads(spec, options)
    body, widths = open_body(spec, options["backbone"], {each: str(i) for i, each in enumerate(strides)}, pretrained)
    if pretrained:
        options["image_mean"], options["image_std"] = statistics_of(options["backbone"])
    statistics: dict[str, Any] = {key: list(options[key]) for key in ("image_mean", "image_std") if key in options}
    neck = _Neck(body, FeaturePyramidNetwork(widths, channels, _extra(levels - len(strides), channels)), channels)
    heads = {"retinanet": _retinanet, "fcos": _fcos, "faster_rcnn": _faster_rcnn}[spec.name]
    with _told(spec, spec.options):
        return heads(neck, fit.classes + 1, [stride * 2**i for i in range(levels)], options, {**numbers, **statistics})


def _check_heads(spec: Spec, options: dict[str, Any]) -> None:
    low, high = {"retinanet": (0, 4), "fcos": (0, 16), "faster_rcnn": (1, 16)}[spec.name]
    if not low <= options["convs"] <= high or options.get("hidden", 1) < 1:
        raise UserError(f"'{spec}' asks for heads of {options['convs']} convolutions, expected {low} to {high} (and hidden at least 1)")


def _extra(levels: int, channels: int) -> LastLevelMaxPool | LastLevelP6P7 | None:
    if levels == 0:
        return None
    return LastLevelMaxPool() if levels == 1 else LastLevelP6P7(channels, channels)


def _retinanet(neck: _Neck, outputs: int, strides: list[int], options: dict[str, Any], others: dict[str, Any]) -> nn.Module:
    sizes = tuple(tuple(int(4 * stride * 2 ** (i / 3)) for i in range(3)) for stride in strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(strides))
    model = RetinaNet(neck, outputs, anchor_generator=anchors, **others)
    for head in (model.head.classification_head, model.head.regression_head):
        head.conv = head.conv[: options["convs"]]
    return model


def _fcos(neck: _Neck, outputs: int, strides: list[int], options: dict[str, Any], others: dict[str, Any]) -> nn.Module:
    channels, convs = neck.out_channels, options["convs"]
    head = FCOSHead(channels, 1, outputs, 0)
    norm = partial(nn.GroupNorm, math.gcd(32, channels))  # torchvision's 32 groups, where the channels allow it
    head.classification_head = FCOSClassificationHead(channels, 1, outputs, convs, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(channels, 1, convs, norm_layer=norm)
    anchors = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
    return FCOS(neck, outputs, anchor_generator=anchors, head=head, **others)


def _faster_rcnn(neck: _Neck, outputs: int, strides: list[int], options: dict[str, Any], others: dict[str, Any]) -> nn.Module:
    anchors = AnchorGenerator(tuple((8 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
    channels, hidden = neck.out_channels, options["hidden"]
    return FasterRCNN(
        neck,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=options["convs"]),
        box_roi_pool=MultiScaleRoIAlign([str(i) for i in range(len(neck.fpn.inner_blocks))], output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(channels * 7 * 7, hidden),
        box_predictor=FastRCNNPredictor(hidden, outputs),
        **others,
    )


def _freeze(backbone: Any, without_eps: bool) -> None:
    body = backbone.body if hasattr(backbone, "body") else backbone
    if without_eps:
        for module in body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    freeze_batch_norm_2d(body)
