"""Weights of detectors and segmenters, published or in files, made to fit the data: their class heads are read by the names of classes."""

from __future__ import annotations

import re
from typing import Any

import torchvision
from torch import Tensor, nn

from stillhouse.models.families import Fit, _told, refuse_head
from stillhouse.models.specs import Spec
from stillhouse.models.weights import LOG, accept

_CLASS_LAYER = re.compile(
    r"(classification_head\.cls_logits|classification_head\.module_list\.\d+(\.1)?|box_predictor\.(cls_score|bbox_pred)"
    r"|classifier\.4|(low|high)_classifier|segmentation_head\.0)\.(weight|bias)"
)
"""Layers with outputs for each class: torchvision's detectors, its segmenters, segmentation-models-pytorch's."""


def load_published(spec: Spec, model: nn.Module, fit: Fit, background: bool) -> None:
    """Load torchvision's weights of this very network, with the outputs of the data's classes, or a new class head for a student.

    Args:
        background: the head has an output 0 for it which is none of the data's classes.

    Raises:
        UserError: if a teacher's data has classes that the weights do not know (before any download), or they cannot be had.
    """
    weights = torchvision.models.get_model_weights(spec.name).DEFAULT  # type: ignore[attr-defined]
    known = list(weights.meta["categories"])
    rows = _rows(spec, fit, len(known), known, background)
    with _told(spec, spec.options):
        state = weights.get_state_dict(progress=False, check_hash=True)
    _load(spec, model, _with_rows(model, state, rows, len(known)), allow_partial=False)


def refuse_bare(spec: Spec, fit: Fit) -> None:
    """Raise the sentence for a teacher of which only the backbone has published weights."""
    if not fit.new_head:
        refuse_head(spec, 0, fit.classes, "has published weights for its backbone only")


def load_file(spec: Spec, model: nn.Module, file: dict[str, Tensor], fit: Fit, background: bool, allow_partial: bool) -> None:
    """Load a file's weights, with the outputs of the data's classes; of torchvision's published files under today's names of the layers.

    Raises:
        UserError: if a teacher's data has other classes, or keys do not fit and `allow_partial` is False.
    """
    layer = next((key for key in file if key in model.state_dict() and _is_class_layer(key) and "bbox_pred" not in key), None)
    if layer is not None:
        own = model.state_dict()[layer].shape[0]
        count = file[layer].shape[0] * (fit.classes + background) // own
        rows = _rows(spec, fit, count, fit.known or _published_names(spec, count), background)
        file = _with_rows(model, file, rows, count)
    _load(spec, model, file, allow_partial)


def _published_names(spec: Spec, count: int) -> list[str] | None:
    """The names of the classes in a file of so many outputs, if it can be the one that torchvision published for this network."""
    if spec.family != "torchvision" or spec.name not in torchvision.models.list_models():
        return None
    known = list(torchvision.models.get_model_weights(spec.name).DEFAULT.meta["categories"])  # type: ignore[attr-defined]
    return known if len(known) == count else None


def _is_class_layer(key: str) -> bool:
    found = _CLASS_LAYER.search(key)
    return found is not None and found.end() == len(key)


def _rows(spec: Spec, fit: Fit, count: int, known: list[str] | None, background: bool) -> list[int] | None:
    """The data's classes among the `count` outputs of some weights, in the data's order; None where the head is to be new."""
    unknown, source = "", fit.folder or str(spec)
    if known is not None and fit.names is not None:
        places = {_plain(name): row for row, name in enumerate(["background"] * (count - len(known)) + known)}
        wanted = ["background", *fit.names] if background else fit.names
        unknown = next((name for name in wanted if _plain(name) not in places), "")
        if not unknown:
            return [places[_plain(name)] for name in wanted]
    if count == fit.classes + background:
        if unknown:
            LOG.warning("the weights of '%s' know no class '%s', but as many as the data has: taken in their order", source, unknown)
        return list(range(count))
    if not fit.new_head:
        refuse_head(source, count - background, fit.classes, f"knows no class '{unknown}' of the data" if unknown else "")
    LOG.info("new random class head: the weights of '%s' know %s", source, f"no '{unknown}'" if unknown else f"{count} classes")
    return None


def _plain(name: str) -> str:
    return name.strip().strip("_").lower()


def _with_rows(model: nn.Module, weights: dict[str, Tensor], rows: list[int] | None, count: int) -> dict[str, Tensor]:
    """The weights with these rows of their class layers; with the model's own random class layers for `rows=None`."""
    own = model.state_dict()
    layers = [key for key in weights if key in own and _is_class_layer(key)]
    return {**weights, **{key: own[key] if rows is None else _picked(key, weights[key], rows, count) for key in layers}}


def _picked(key: str, layer: Tensor, rows: list[int], count: int) -> Tensor:
    """Faster R-CNN's box layer holds four rows a class; the others a block of all classes for every anchor."""
    if layer.shape[0] % count:
        return layer  # of something else; loading will say so
    if "bbox_pred" in key:
        return layer.unflatten(0, (count, -1))[rows].flatten(0, 1)
    return layer.unflatten(0, (-1, count))[:, rows].flatten(0, 1)


def _load(spec: Spec, model: nn.Module, weights: dict[str, Tensor], allow_partial: bool) -> None:
    """Every key accounted for after torch's own hooks have renamed those of older files (load_weights would look at them before)."""
    own: dict[str, Any] = model.state_dict()
    wrong = [key for key, value in weights.items() if key in own and own[key].shape != value.shape]
    found = model.load_state_dict({key: value for key, value in weights.items() if key not in wrong}, strict=False)
    unaccounted = {
        "missing": [key for key in found.missing_keys if key not in wrong],
        "unexpected": found.unexpected_keys,
        "wrongly shaped": wrong,
    }
    accept(f"the weights and '{spec}'", unaccounted, allow_partial, "use the weights of this very network, or allow partial loading")
