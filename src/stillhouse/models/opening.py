"""Opening a network: a spec, a run folder, or the module itself, with random, published or a file's weights, every key accounted for."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from stillhouse.errors import UserError
from stillhouse.models.families import Fit, build, refuse_head, transformers_preprocessing
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.models.specs import FAMILIES, Spec, parse_spec
from stillhouse.models.weights import read_weights
from stillhouse.randomness import seeded


def open_model(
    spec: str | nn.Module,
    *,
    classes: int,
    channels: int,
    image_size: int | None = None,
    weights: str = "random",
    allow_partial: bool = False,
    seed: int = 0,
    new_head: bool = False,
) -> nn.Module:
    """The network that `spec` names, taking images [B, channels, H, W] to logits [B, classes].

    Args:
        spec: `timm/NAME:OPTIONS`, `torchvision/NAME:OPTIONS`, `transformers/NAME_OR_PATH:OPTIONS`, a run folder or its `student` folder
            (whose weights are used), or a module, which is returned as it is.
        image_size: side in pixels that a network with a fixed input size is built for, unless the spec says; None for its own.
        weights: `"random"` (a function of `seed` and the spec alone), `"pretrained"` (published, by name), or a file.
        allow_partial: take weights that fit only in part; what does not is logged.
        new_head: pretrained weights with another number of classes get a new random classifier (for a student) instead of being refused.

    The result has an attribute `stillhouse`: `{"spec": str | None, "family": "timm|torchvision|transformers|object", "name": str | None,
    "options": {...}, "weights": str}`.

    Raises:
        UserError: for an unknown name, option or folder, classes or channels that do not fit, weights that are missing or do not fit.
    """
    if isinstance(spec, nn.Module):
        return _as_given(spec)
    parsed = parse_spec(spec)
    fit = Fit(classes, channels, image_size, new_head)
    file = None if weights in ("random", "pretrained") else read_weights(weights)
    saved = read_saved(parsed.name) if parsed.family == "run" else None
    if saved is not None:
        parsed, fit = saved.fitted(spec, fit), replace(fit, image_size=None)
        if file is None:
            weights, file = str(saved.file), read_weights(saved.file)
    with seeded(seed, "weights", parsed.family, parsed.name):
        model, options = build(parsed, fit, weights == "pretrained", file, allow_partial)
    if saved is not None:
        saved.describe(model)
    info = {"spec": spec, "family": parsed.family, "name": parsed.name, "options": options, "weights": weights}
    model.stillhouse = info  # type: ignore[assignment]
    return model


def _as_given(model: nn.Module) -> nn.Module:
    if not hasattr(model, "stillhouse"):
        library = type(model).__module__.partition(".")[0]
        recorded = hasattr(model, "_model_args") if library == "timm" else hasattr(model, "config")  # enough to build it again from a name
        family = library if library in ("timm", "transformers") and recorded else "object"
        info: dict[str, Any] = {"spec": None, "family": family, "name": None, "options": {}, "weights": "given"}
        model.stillhouse = info  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class Saved:
    """What a student folder says: the network, the data it was made for, the file of its weights."""

    spec: Spec
    classes: int
    channels: int
    preprocessing: Preprocessing | None
    file: Path
    timm_cfg: dict[str, Any] | None = None

    def fitted(self, folder: str, fit: Fit) -> Spec:
        """The spec to build, without the numbers that follow from the data.

        Raises:
            UserError: if the saved network has other channels or, without `new_head`, other classes.
        """
        if self.channels != fit.channels:
            raise UserError(
                f"the network in '{folder}' takes {self.channels} channel(s) and the data has {fit.channels}, take another network"
            )
        if self.classes != fit.classes and not fit.new_head:
            refuse_head(folder, self.classes, fit.classes)
        data = ("num_classes", "in_chans", "num_labels")
        return Spec(self.spec.family, self.spec.name, {key: value for key, value in self.spec.options.items() if key not in data})

    def describe(self, model: nn.Module) -> None:
        """Give the network built again what it knew of its images."""
        if self.timm_cfg is not None:
            model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **self.timm_cfg}  # type: ignore
        if self.preprocessing is not None:
            set_preprocessing(model, self.preprocessing)


def read_saved(folder: str | Path) -> Saved:
    """Read the `config.json` of a run folder's student, or of such a folder itself.

    Raises:
        UserError: if there is no such folder, no network in it, its configuration is damaged, or it holds a user's own class.
    """
    found = next((path for path in (Path(folder, "student"), Path(folder)) if (path / "config.json").is_file()), None)
    if found is None:
        there = "has no student/config.json" if Path(folder).is_dir() else "is no folder"
        raise UserError(
            f"'{folder}' {there}, expected a run folder, or a network named {', '.join(f'{family}/NAME' for family in FAMILIES)}"
        )
    try:
        config = json.loads((found / "config.json").read_text())
        return _read_config(found, config)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{found / 'config.json'}' is damaged ({type(error).__name__}: {error}), save the network again") from error


def _read_config(folder: Path, config: dict[str, Any]) -> Saved:
    file = folder / "model.safetensors"
    if "architecture" in config:
        cfg = {
            key: value for key, value in config["pretrained_cfg"].items() if key not in ("file", "url", "hf_hub_id", "source", "state_dict")
        }
        spec = Spec("timm", config["architecture"], config.get("model_args", {}))
        channels = spec.options.get("in_chans", cfg["input_size"][0])
        return Saved(spec, config["num_classes"], int(channels), None, file, cfg)  # type: ignore[call-overload]
    if "model_type" in config:
        known = len(config["id2label"]) if "id2label" in config else 2  # transformers' own default
        return Saved(Spec("transformers", str(folder)), known, config.get("num_channels", 3), transformers_preprocessing(str(folder)), file)
    ours = config["stillhouse"]
    if ours["family"] == "object":
        raise UserError(
            f"'{folder}' holds the weights of your own {ours['network']}, which a name cannot build: "
            f"make the object and call stillhouse.models.weights.load_weights(model, '{file}')"
        )
    preprocessing = Preprocessing(**ours["preprocessing"]) if ours["preprocessing"] else None
    return Saved(parse_spec(ours["spec"]), ours["classes"], ours["channels"], preprocessing, file)
