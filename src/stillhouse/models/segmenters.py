"""Segmenters by name: torchvision's own, its DeepLabV3, FCN and LR-ASPP on any backbone, segmentation-models-pytorch's, transformers'."""

from __future__ import annotations

import inspect
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.fcn import FCNHead

from stillhouse.data import IMAGENET_MEAN, IMAGENET_STD
from stillhouse.errors import UserError, nearest
from stillhouse.models.backbones import open_body, statistics_of
from stillhouse.models.families import (
    Fit,
    _account,
    _check_timm_name,
    _quick_without_network,
    _refuse_options,
    _told,
    config_of,
    quiet_transformers,
    refuse_unknown,
)
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.models.published import load_file, load_published, refuse_bare
from stillhouse.models.specs import Spec

COMPOSED: dict[str, dict[str, Any]] = {
    "deeplabv3": {"backbone": "resnet50", "stride": 16, "channels": 256, "aux": False},
    "fcn": {"backbone": "resnet50", "stride": 16, "aux": False},
    "lraspp": {"backbone": "mobilenet_v3_large", "stride": 16, "channels": 128},
}
"""Segmenters that are put together here, with the defaults of their options."""

_SMP_REFUSED = ("self", "encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params", "kwargs")


def open_segmenter(
    spec: Spec, fit: Fit, pretrained: bool, file: dict[str, Any] | None = None, allow_partial: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The segmenter `torchvision/NAME:OPTIONS` or `smp/NAME:OPTIONS`, with `fit.classes` outputs, and the options that build it again.

    torchvision's own take `aux`: whether there is an auxiliary head. Those in `COMPOSED` also take

    - `backbone`: a torchvision classifier such as `resnet18`, or `timm/NAME`; published weights are then ImageNet's, of it alone;
    - `stride` of the last map: 8, 16 or 32; below 32 the backbone's last stages are dilated instead, and DeepLabV3's rates follow
      (arXiv 1706.05587); a vision transformer's is the side of its patches;
    - `channels` of DeepLabV3's and LR-ASPP's head;
    - what `timm/NAME` takes itself, such as a vision transformer's `patch_size`, `embed_dim` and `depth`; its blocks are the modules
      `backbone.blocks.0`, `backbone.blocks.1`, ... for methods that look at maps.

    Of transformers a kind (`transformers/segformer`) takes the numbers of its configuration, with random weights; those that were saved,
    as a run's student is, are opened with theirs; published ones are passed in Python.

    Those of segmentation-models-pytorch take `encoder` (its names, or `timm/NAME`) and the numbers and words of their class
    (`encoder_depth`, `decoder_channels`, `psp_out_channels`, ...); published weights are those of the encoder alone.

    Raises:
        UserError: for an unknown name or option, one that does not fit the data, or weights that cannot be had.
    """
    if spec.family == "transformers":
        return _transformers(spec, fit, file, pretrained, allow_partial), dict(spec.options)
    if spec.family == "smp":
        model, options = _smp(spec, fit, pretrained)
    else:
        model, options = _torchvision(spec, fit, pretrained)
    if file is not None:
        load_file(spec, model, file, fit, False, allow_partial)
    return model, options


def _torchvision(spec: Spec, fit: Fit, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    names = [*COMPOSED, *torchvision.models.list_models(module=torchvision.models.segmentation)]
    if spec.name not in names:
        raise UserError(f"torchvision has no segmenter '{spec.name}'{nearest(spec.name, names) or ', expected one of ' + ', '.join(names)}")
    if fit.channels != 3:
        raise UserError(f"'{spec}' takes images of 3 channels and the data has {fit.channels}, take one of smp, which fits any number")
    options = _options(spec)
    _refuse_options(Spec(spec.family, spec.name, {key: value for key, value in spec.options.items() if key != "backbone"}))
    model = _composed(spec, fit, options, pretrained) if spec.name in COMPOSED else _built(spec, fit, options, pretrained)
    if pretrained:
        mean, std = statistics_of(options["backbone"]) if spec.name in COMPOSED else (IMAGENET_MEAN, IMAGENET_STD)
        set_preprocessing(model, Preprocessing(mean, std, None, "bilinear"))
    return model, options


def _options(spec: Spec) -> dict[str, Any]:
    known = COMPOSED.get(spec.name, {} if spec.name.startswith("lraspp") else {"aux": False})
    timms = spec.name in COMPOSED and str(spec.options.get("backbone")).startswith("timm/")
    for key, value in spec.options.items():
        if timms and key not in known:
            continue
        if key not in known:
            raise UserError(f"torchvision network '{spec.name}' has no option '{key}'{nearest(key, known) or ', leave it out'}")
        if key != "backbone" and type(value) is not type(known[key]):
            raise UserError(f"'{spec}' says {key}={value!r}, expected for example {key}={str(known[key]).lower()}")
    return {**known, **spec.options}


def _built(spec: Spec, fit: Fit, options: dict[str, Any], pretrained: bool) -> nn.Module:
    aux = {"aux_loss": options["aux"]} if "aux" in options else {}
    if pretrained and aux:
        aux["aux_loss"] = True  # published with it
    with _told(spec, spec.options):
        model = torchvision.models.get_model(spec.name, weights=None, weights_backbone=None, num_classes=fit.classes, **aux)
    if pretrained:
        load_published(spec, model, fit, False)
    if aux and not options["aux"]:
        model.aux_classifier = None
    return model


def _composed(spec: Spec, fit: Fit, options: dict[str, Any], pretrained: bool) -> nn.Module:
    if pretrained:
        refuse_bare(spec, fit)
    if options.get("channels", 1) < 1:
        raise UserError(f"'{spec}' asks for a head of {options['channels']} channels, expected at least one")
    stride, aux = options["stride"], options.get("aux", False)
    stages = {8: "low", 32: "high"} if spec.name == "lraspp" else {**({16: "aux"} if aux else {}), 32: "out"}
    own = {key: value for key, value in options.items() if key not in COMPOSED[spec.name]}
    if fit.image_size is not None and _of_fixed_size(options["backbone"]):
        own = {"img_size": fit.image_size} | own
    body, widths = open_body(spec, options["backbone"], stages, pretrained, stride, own)
    found = getattr(body, "stride", stride)  # of a vision transformer: its patches'
    if found != spec.options.get("stride", found):
        raise UserError(
            f"'{spec}' asks for stride {stride}, but the patches of '{options['backbone']}' have a side of {found}; leave it out"
        )
    stride = options["stride"] = found
    options |= own
    with _told(spec, spec.options):
        if spec.name == "lraspp":
            return LRASPP(body, widths[0], widths[1], fit.classes, options["channels"])
        auxiliary = FCNHead(widths[0], fit.classes) if aux else None
        if spec.name == "fcn":
            return FCN(body, FCNHead(widths[-1], fit.classes), auxiliary)
        return DeepLabV3(body, _deeplab_head(widths[-1], options["channels"], fit.classes, stride), auxiliary)


def _of_fixed_size(backbone: object) -> bool:
    cfg = timm.get_pretrained_cfg(str(backbone).removeprefix("timm/")) if str(backbone).startswith("timm/") else None
    return bool(cfg and cfg.fixed_input_size)


def _deeplab_head(width: int, channels: int, classes: int, stride: int) -> nn.Sequential:
    """torchvision's DeepLabHead, of any width; the same reach in pixels at any stride."""
    return nn.Sequential(
        ASPP(width, [max(1, rate * 8 // stride) for rate in (12, 24, 36)], channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, classes, 1),
    )


def _transformers(spec: Spec, fit: Fit, file: dict[str, Any] | None, pretrained: bool, allow_partial: bool) -> nn.Module:
    try:
        from transformers import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING as SEGMENTERS
    except ImportError:
        raise UserError(f"'{spec}' needs transformers: pip install 'stillhouse[transformers]'") from None
    if file is None:
        return _made(spec, fit, pretrained)
    with _told(spec, spec.options), quiet_transformers():
        config = config_of(spec)
        config.num_labels = fit.classes
        network: Any = SEGMENTERS[type(config)]
        model, info = network.from_pretrained(
            None, config=config, state_dict=file, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    _account(spec, info, fit, allow_partial)
    return model.train()  # type: ignore[no-any-return]


def _made(spec: Spec, fit: Fit, pretrained: bool) -> nn.Module:
    """One of transformers' kinds, its weights random."""
    from transformers import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING as SEGMENTERS
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES as KINDS

    if spec.name not in KINDS:
        hint = nearest(spec.name, KINDS) or ", expected a kind such as segformer"
        raise UserError(f"transformers has no kind of segmenter '{spec.name}'{hint}; a published one is made in Python and passed")
    if pretrained:
        raise UserError(f"'{spec}' is a kind of network and has no published weights; start from random ones, or pass the object")
    _refuse_options(spec)
    with _told(spec, spec.options), quiet_transformers():
        known = AutoConfig.for_model(spec.name).to_dict()
        refuse_unknown(spec, known)
        config = AutoConfig.for_model(spec.name, **{**spec.options, "num_labels": fit.classes, "num_channels": fit.channels})
        kind: Any = SEGMENTERS[type(config)]
        network: nn.Module = kind(config)
    return network.train()


def _smp(spec: Spec, fit: Fit, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        raise UserError(f"'{spec}' needs segmentation-models-pytorch: pip install 'stillhouse[smp]'") from None
    network = smp.MODEL_ARCHITECTURES_MAPPING.get(spec.name.lower())
    if network is None:
        names = list(smp.MODEL_ARCHITECTURES_MAPPING)
        hint = nearest(spec.name, names) or ", expected one of " + ", ".join(names)
        raise UserError(f"segmentation-models-pytorch has no network '{spec.name}'{hint}")
    known = {"encoder", *inspect.signature(network.__init__).parameters} - set(_SMP_REFUSED)
    unknown = next((key for key in spec.options if key not in known), None)
    if unknown is not None:
        raise UserError(f"smp network '{spec.name}' has no option '{unknown}' here{nearest(unknown, known) or ', leave it out'}")
    options = {"encoder": "resnet34", **spec.options}
    encoder = _encoder(spec, options["encoder"])
    if pretrained:
        refuse_bare(spec, fit)
    weights = (True if encoder.startswith("tu-") else "imagenet") if pretrained else None
    others = {key: value for key, value in options.items() if key != "encoder"}
    with _told(spec, spec.options), _quick_without_network():
        model = network(encoder_name=encoder, encoder_weights=weights, in_channels=fit.channels, classes=fit.classes, **others)
        if pretrained:
            set_preprocessing(model, _smp_preprocessing(smp.encoders.get_preprocessing_params(encoder), fit.channels))
    return model, options


def _encoder(spec: Spec, name: object) -> str:
    """A name of segmentation-models-pytorch's encoders; timm's have a prefix there."""
    from segmentation_models_pytorch.encoders import get_encoder_names

    if isinstance(name, str) and name.startswith(("timm/", "tu-")):
        name = name.removeprefix("timm/").removeprefix("tu-")
        _check_timm_name(name)
        return f"tu-{name}"
    if name not in get_encoder_names():
        hint = nearest(str(name), get_encoder_names()) or ", or timm/NAME"
        raise UserError(f"segmentation-models-pytorch has no encoder '{name}' for '{spec}'{hint}")
    return str(name)


def _smp_preprocessing(told: dict[str, Any], channels: int) -> Preprocessing:
    scale = max(told["input_range"])
    mean, std = ([value / scale for value in told[key]] for key in ("mean", "std"))
    if channels != len(mean):
        mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
    return Preprocessing(tuple(mean), tuple(std), None, "bilinear")
