"""Networks by name from timm, torchvision and transformers, built to fit the data; what a spec may ask of each library."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
import torchvision
from torch import Tensor, nn

from stillhouse.errors import UserError, nearest
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.models.specs import Spec
from stillhouse.models.weights import LOG, accept, load_weights

# Options that reach files, networks or other code, or that make something else than a classifier.
_REFUSED = re.compile(
    r"_.*|checkpoint_path|cache_dir|pretrained.*|.*_cfg|cfg|features_only|feature_.*|out_indices|pruned|scriptable|exportable|no_jit|device|dtype"
    r"|.*_layer|.*_fn|.*_cls|block|weights.*|progress|auto_map|name_or_path|architectures|torch_dtype|trust_remote_code"
    r"|backbone.*|.*_backbone|id2label|label2id|quantization_config|model_type|transformers_version"
)
_CODE = ("attn_implementation", "experts_implementation", "kernel_config", "use_kernels")
NOBODYS = 997
"""A number of classes by which the heads are found of a network that is to have none."""
_NETWORK_MODULES = ("huggingface_hub", "httpx", "httpx2", "requests", "urllib3", "urllib")


@dataclass(frozen=True)
class Fit:
    """What the data asks of a network: number of classes and image channels, side of the images (None: the network's own).

    `classes` is 0 for an encoder: a network without its head.
    `new_head`: a pretrained network with other classes gets a new random classifier (a student) instead of being refused (a teacher).
    `names`: of the classes, by which a detector's or segmenter's published classes are found.
    `folder`, `known`: the run folder whose weights are taken, and the names of the classes they know.
    """

    classes: int
    channels: int
    image_size: int | None
    new_head: bool
    names: list[str] | None = None
    folder: str | None = None
    known: list[str] | None = None


def build(
    spec: Spec, fit: Fit, pretrained: bool, file: dict[str, Tensor] | None = None, allow_partial: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The network and the resolved options that build it again, its weights random (from torch's generator), published, or those of `file`.

    Raises:
        UserError: for an unknown name or option, one that does not fit the data, or weights that cannot be had.
    """
    _refuse_options(spec)
    if spec.family == "transformers":
        return _transformers(spec, fit, pretrained, file, allow_partial)
    model, options = (_timm if spec.family == "timm" else _torchvision)(spec, fit, pretrained)
    if file is not None:
        load_weights(model, _with_head(spec, model, file, fit), allow_partial)
    return model, options


def refuse_head(spec: object, known: int, classes: int, why: str = "") -> None:
    """Raise the sentence for a teacher that does not know the data's classes."""
    why = why or f"knows {known} classes and the data has {classes}"
    raise UserError(
        f"'{spec}' {why}, but a teacher must know the data's classes; first train it with "
        f"`stillhouse distill --method scratch --student {spec} --student-weights pretrained`, and pass that run folder as the teacher"
    )


def _refuse_options(spec: Spec) -> None:
    refused = next((key for key in spec.options if _REFUSED.fullmatch(key)), None)
    if refused is not None:
        raise UserError(
            f"option '{refused}' of '{spec}' is refused: a spec holds only numbers and words that shape the network, leave it out"
        )


def refuse_unknown(spec: Spec, known: Collection[str]) -> None:
    """Raise the sentence for the first option that is not known."""
    unknown = next((key for key in spec.options if key not in known), None)
    if unknown is not None:
        raise UserError(f"{spec.family} network '{spec.name}' has no option '{unknown}'{nearest(unknown, known) or ', leave it out'}")


def _agree(spec: Spec, key: str, wanted: int) -> None:
    """A number the spec may repeat but not contradict."""
    said = spec.options.get(key, wanted)
    if said != wanted:
        raise UserError(f"'{spec}' says {key}={said} but the data asks for {wanted}, leave {key} out")


def _with_head(spec: Spec, model: nn.Module, weights: dict[str, Tensor], fit: Fit) -> dict[str, Tensor]:
    """The weights, their classifier replaced by the model's own random one if it has another number of classes and a new head is wanted.

    A classifier is recognised by its shape: `classes` rows in the model, another number in the weights, all else equal; where one of the
    two is an encoder, by its name.
    """
    own = model.state_dict()
    if fit.new_head:
        head = _timm_head(model) if spec.family == "timm" else tuple(f"{name}." for name in _heads(model, fit.classes))
        weights = {key: value for key, value in weights.items() if key in own or not key.startswith(head)}
        weights = {key: value for key, value in own.items() if key.startswith(head)} | weights
    shapes = {key: (own[key].shape, value.shape) for key, value in weights.items() if key in own and own[key].shape != value.shape}
    heads = [key for key, (new, old) in shapes.items() if new[:1] == (fit.classes,) and len(new) == len(old) and new[1:] == old[1:]]
    if not heads or len(heads) < len(shapes):
        return weights
    known = weights[heads[0]].shape[0]
    if not fit.new_head:
        refuse_head(spec, known, fit.classes)
    LOG.info("new random classifier (%s): the weights know %d classes, the data has %d", ", ".join(heads), known, fit.classes)
    return {**weights, **{key: own[key] for key in heads}}


def _timm_head(model: nn.Module) -> tuple[str, ...]:
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))


@contextmanager
def _told(spec: Spec, options: dict[str, Any]) -> Iterator[None]:
    """What a library raises while it builds or downloads, in one sentence that names the option when there is one to name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_MODULES:
            raise UserError(
                f"no network, or no such weights or folder, for '{spec}' ({_line(error)}); pass a file of weights instead"
            ) from error
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            raise UserError(f"{spec.family} network '{spec.name}' has no option '{unknown[1]}', leave it out") from error
        said = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UserError(f"{spec.family} cannot make '{spec.name}' with {said or 'its defaults'}: {_line(error)}") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:120] + "…" if len(text) > 120 else text or type(error).__name__


@contextmanager
def _quick_without_network(local: bool = False) -> Iterator[None]:
    """Where the hub's name does not resolve, its client answers from its cache at once instead of trying again for a minute.

    For what is in a local folder nobody is asked at all.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or local or not _reachable(urlsplit(constants.ENDPOINT).hostname)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(host: str | None) -> bool:
    if getproxies():
        return True  # a proxy resolves names for us
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _timm(spec: Spec, fit: Fit, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    _check_timm_name(spec.name)
    cfg = timm.get_pretrained_cfg(spec.name)
    _agree(spec, "num_classes", fit.classes)
    _agree(spec, "in_chans", fit.channels)
    options: dict[str, Any] = {**spec.options, "in_chans": fit.channels}
    if fit.image_size is not None and cfg is not None and cfg.fixed_input_size:
        options.setdefault("img_size", fit.image_size)
    options["num_classes"] = fit.classes
    if not pretrained:
        with _told(spec, spec.options):
            return timm.create_model(spec.name, **options), options
    if cfg is None or not cfg.has_weights:
        raise UserError(f"timm has no published weights for '{spec.name}', pass a file of weights, or start from random ones")
    if cfg.num_classes != fit.classes and not fit.new_head:
        refuse_head(spec, cfg.num_classes, fit.classes)
    with _told(spec, spec.options), _quick_without_network():
        # Built with its own classes first: only then does timm load every key strictly.
        model = timm.create_model(spec.name, pretrained=True, **{**options, "num_classes": cfg.num_classes})
        if cfg.num_classes != fit.classes:
            model.reset_classifier(fit.classes)  # type: ignore[operator]
    return model, options


def _check_timm_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models())
        raise UserError(f"timm has no network '{architecture}'{hint or ', see timm.list_models()'}")
    known = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in known:
        raise UserError(f"timm has no weights '{tag}' of '{architecture}'{nearest(name, known) or ', expected one of ' + ', '.join(known)}")


def _torchvision(spec: Spec, fit: Fit, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    names = torchvision.models.list_models(module=torchvision.models)
    if spec.name not in names:
        raise UserError(
            f"torchvision has no classifier '{spec.name}'{nearest(spec.name, names) or ', see torchvision.models.list_models()'}"
        )
    if fit.channels != 3:
        raise UserError(
            f"'{spec}' takes images of 3 channels and the data has {fit.channels}, take a network of timm, which fits any number"
        )
    _agree(spec, "num_classes", fit.classes)
    options: dict[str, Any] = {**spec.options, "num_classes": fit.classes}
    if not pretrained:
        if spec.name.startswith("vit_") and fit.image_size is not None:
            options.setdefault("image_size", fit.image_size)
        with _told(spec, spec.options):
            model = torchvision.models.get_model(spec.name, weights=None, **options | {"num_classes": fit.classes or NOBODYS})
        if not fit.classes:
            _replace_heads(model, NOBODYS, 0)
        return model, options
    weights = torchvision.models.get_model_weights(spec.name).DEFAULT  # type: ignore[attr-defined]
    known = len(weights.meta["categories"])
    if known != fit.classes and not fit.new_head:
        refuse_head(spec, known, fit.classes)
    with _told(spec, spec.options):
        model = torchvision.models.get_model(spec.name, weights=weights, **spec.options)
    if known != fit.classes:
        _replace_heads(model, known, fit.classes)
    how = weights.transforms()
    set_preprocessing(model, Preprocessing(tuple(how.mean), tuple(how.std), how.crop_size[0], how.interpolation.value))
    return model, options


def _replace_heads(model: nn.Module, known: int, classes: int) -> None:
    """New random layers with `classes` outputs, or none for 0, in place of torchvision's heads with `known`."""
    for name in _heads(model, known):
        parent, _, leaf = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        fresh: nn.Module = nn.Identity()
        if classes:
            fresh = nn.Linear(layer.in_features, classes) if isinstance(layer, nn.Linear) else nn.Conv2d(layer.in_channels, classes, 1)
        setattr(model.get_submodule(parent), leaf, fresh)


def _heads(model: nn.Module, known: int) -> list[str]:
    """The names of the linear or convolutional layers with `known` outputs; with 0, of what stands in their place in an encoder."""
    return [
        name
        for name, layer in model.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == known)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == known and layer.kernel_size == (1, 1))
        or (not known and isinstance(layer, nn.Identity))
    ]


def _transformers(
    spec: Spec, fit: Fit, pretrained: bool, file: dict[str, Tensor] | None, allow_partial: bool
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as CLASSIFIERS
    except ImportError:
        raise UserError(f"'{spec}' needs transformers: pip install 'stillhouse[transformers]'") from None
    config, published = _transformers_config(spec)
    if pretrained and not published:
        raise UserError(
            f"'{spec.name}' is a kind of network without weights, name a folder or a published network such as microsoft/resnet-50"
        )
    _fit_config(spec, config, fit, pretrained)
    kinds = CLASSIFIERS[type(config)]
    network: Any = kinds[0] if isinstance(kinds, (tuple, list)) else kinds
    if not pretrained and file is None:
        with _told(spec, spec.options), quiet_transformers():
            return _without_head(network(config)), dict(spec.options)
    local = (file is not None and not published) or Path(spec.name).is_dir()
    with _told(spec, spec.options), _quick_without_network(local), quiet_transformers():
        # Its own loader, for a file too, because it knows the names that earlier versions gave to the keys.
        model, info = network.from_pretrained(
            None if file is not None else spec.name,
            config=config,
            state_dict=file,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        preprocessing = transformers_preprocessing(spec.name) if published else None
    _account(spec, info, fit, allow_partial)
    if preprocessing is not None:
        set_preprocessing(model, preprocessing)
    return _without_head(model.train()), dict(spec.options)  # like any new module; their loader leaves it in eval mode


def _without_head(model: Any) -> nn.Module:
    """A classifier of no classes answers with what its head would have been given, as a tensor."""
    if not model.config.num_labels:
        model.register_forward_hook(lambda module, inputs, output: output.logits.flatten(1))
    return model  # type: ignore[no-any-return]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and tables of transformers in the middle of ours: every key is accounted for in our own words."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _fit_config(spec: Spec, config: Any, fit: Fit, pretrained: bool) -> None:
    """Give the configuration the data's classes, and if nothing is learnt yet its channels and size."""
    _agree(spec, "num_labels", fit.classes)
    if pretrained and config.num_labels != fit.classes and not fit.new_head:
        refuse_head(spec, config.num_labels, fit.classes)
    for key, value in (("num_channels", fit.channels), ("image_size", fit.image_size)):
        if hasattr(config, key) and value is not None and not pretrained and key not in spec.options:
            setattr(config, key, value)
    channels = getattr(config, "num_channels", fit.channels)
    if channels != fit.channels:
        raise UserError(f"'{spec}' takes images of {channels} channel(s) and the data has {fit.channels}, take another network")
    if config.num_labels != fit.classes:
        config.num_labels = fit.classes


def _transformers_config(spec: Spec) -> tuple[Any, bool]:
    """The configuration with the spec's options, and whether weights belong to it (a folder or a published name, not a bare model type)."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

    bare = spec.name in CONFIG_MAPPING and not Path(spec.name, "config.json").is_file()
    if not bare and "/" not in spec.name and not Path(spec.name).is_dir():
        raise UserError(
            f"transformers has no kind of network '{spec.name}'{nearest(spec.name, CLASSIFIERS) or ', and there is no such folder'}"
        )
    plain = AutoConfig.for_model(spec.name) if bare else config_of(spec)
    if plain.model_type not in CLASSIFIERS:
        raise UserError(f"transformers' '{plain.model_type}' does not classify images, expected for example vit, deit, dinov2 or resnet")
    known = set(plain.to_dict()) | {"num_labels"}
    refuse_unknown(spec, known)
    if not bare:
        return config_of(spec, **spec.options), True
    with _told(spec, spec.options):
        return AutoConfig.for_model(spec.name, **spec.options), False


def config_of(spec: Spec, **options: Any) -> Any:
    """The configuration of one of transformers' networks in a folder or on the hub. Nothing that it names is run or loaded.

    Raises:
        UserError: if it cannot be had, or asks for code of its own or for kernels from the hub, which are code as well.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    with _told(spec, options), _quick_without_network(Path(spec.name).is_dir()):
        told, _ = PretrainedConfig.get_config_dict(spec.name)
        foreign = _foreign(told) or ("auto_map" if "auto_map" in told and told.get("model_type") not in CONFIG_MAPPING else "")
        if foreign:
            raise UserError(
                f"refused: the configuration of '{spec.name}' asks for code that is not transformers' own ({foreign}); "
                "if you trust it, open it in Python with trust_remote_code=True and pass the object"
            )
        return AutoConfig.from_pretrained(spec.name, trust_remote_code=False, **options)


def _foreign(told: Any) -> str:
    """The first entry, at any depth, by which a configuration would fetch kernels: an attention named as a repository."""
    if isinstance(told, (list, tuple)):
        return next(filter(None, map(_foreign, told)), "")
    if not isinstance(told, dict):
        return ""
    named = (key for key, value in told.items() if key.strip("_").startswith(_CODE) and ("/" in str(value) or value is True))
    return next(named, "") or _foreign(list(told.values()))


def _account(spec: Spec, info: dict[str, Any], fit: Fit, allow_partial: bool) -> None:
    """Every key that transformers did not load, or had no place for, unless it belongs to a head that is meant to be new."""

    def head(key: str) -> bool:
        return key.split(".")[0] in ("classifier", "cls_classifier", "distillation_classifier", "head", "score")

    mismatched = sorted(info["mismatched_keys"])
    for key, saved, _ in mismatched:
        if head(key) and not fit.new_head:
            refuse_head(spec, saved[0], fit.classes)
    names = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "wrongly shaped": [key for key, *_ in mismatched]}
    found = {what: sorted(key for key in keys if not (head(key) and fit.new_head)) for what, keys in names.items()}
    new = sorted(key for keys in names.values() for key in keys if head(key) and fit.new_head)
    if new:
        LOG.info("new random classifier (%s) for %d classes", ", ".join(new), fit.classes)
    accept(f"the weights and '{spec}'", found, allow_partial, "take the weights of this very network, or allow partial loading")


def transformers_preprocessing(name: str) -> Preprocessing | None:
    """From `preprocessor_config.json` beside the weights, when there is one."""
    try:
        from transformers.utils.hub import cached_file
    except ImportError:
        raise UserError(f"'{name}' needs transformers: pip install 'stillhouse[transformers]'") from None

    path = cached_file(
        name,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return None
    told = json.loads(Path(path).read_text())
    size = told.get("crop_size") if told.get("do_center_crop") else told.get("size")
    side = next((size[key] for key in ("height", "shortest_edge") if key in size), None) if isinstance(size, dict) else size
    if not told.get("do_normalize", True):
        return Preprocessing((0.0,) * 3, (1.0,) * 3, side)
    if "image_mean" not in told or "image_std" not in told:
        return None
    return Preprocessing(tuple(told["image_mean"]), tuple(told["image_std"]), side, "bilinear" if told.get("resample") == 2 else "bicubic")
