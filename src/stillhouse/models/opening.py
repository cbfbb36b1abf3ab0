"""Opening a network: a spec, a run folder, or the module itself, with random, published or a file's weights, every key accounted for."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torchvision
from torch import nn

from stillhouse.errors import UserError
from stillhouse.models.families import Fit, build, refuse_head, transformers_preprocessing
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.models.specs import FAMILIES, Spec, parse_spec
from stillhouse.models.weights import read_weights
from stillhouse.randomness import seeded

Task = Literal["classify", "detect", "segment", "encode", "generate", "regress"]
OPENERS = {
    **{"mae": "mae.open_mae", "diffusers": "diffusion.open_diffusion", "pyg": "graphs.open_graph_network"},
    **{"detect": "detectors.open_detector", "segment": "segmenters.open_segmenter"},
}
"""Who opens a network: by its family, or else by its task."""
OF_FAMILY = {"timm": "classify", "smp": "segment", "mae": "encode", "diffusers": "generate", "pyg": "classify"}
WITH_ANOTHER_HEAD = ("classify", "encode", "regress")
"""What one network can do by turns: its head names classes, is left out, or answers other numbers."""


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
    task: Task = "classify",
    names: list[str] | None = None,
    inputs: Literal["images", "graphs"] | None = None,
) -> nn.Module:
    """The network that `spec` names, taking images [B, channels, H, W] to logits [B, classes], or what its task asks for.

    A detector follows torchvision's contract (see `is_detector`) and has 1 + `classes` outputs, 0 being the background; a segmenter
    takes images to logits [B, classes, H, W] (see `logits_of`). To encode, a network is opened without its head and takes images to
    features [B, D]; to regress, its outputs are `classes` numbers.

    Args:
        spec: `timm/NAME:OPTIONS`, `torchvision/NAME:OPTIONS`, `transformers/NAME_OR_PATH:OPTIONS`, `smp/NAME:OPTIONS`, `mae/NAME:OPTIONS`,
            `diffusers/NAME:OPTIONS`, `pyg/NAME:OPTIONS`, a run folder or its `student` folder (whose weights are used), or a module, which
            is returned as it is.
        image_size: side in pixels that a network with a fixed input size is built for, or to which a detector resizes its images, unless
            the spec says; None for its own.
        weights: `"random"` (a function of `seed` and the spec alone), `"pretrained"` (published, by name), or a file.
        allow_partial: take weights that fit only in part; what does not is logged.
        new_head: pretrained weights with another number of classes get a new random classifier (for a student) instead of being refused.
        inputs: what it is to be given, if that is known; networks that take something else are refused.
        names: of the classes; a detector's or segmenter's weights that know them all by name give their outputs, whatever else they know.

    The result has an attribute `stillhouse`: `{"spec": str | None, "family": str, "name": str | None, "options": {...}, "weights": str}`,
    the family being one of `FAMILIES` or "object", and of all that is not there to classify also `"task"`, `"classes"`, `"channels"` and
    `"names"` (or None).

    Raises:
        UserError: for an unknown name, option or folder, a network for another task, classes or channels that do not fit, weights that are
            missing or do not fit.
    """
    if isinstance(spec, nn.Module):
        return _as_given(spec, task)
    parsed = parse_spec(spec)
    fit = Fit(classes, channels, image_size, new_head, names)
    found = task_of(spec)
    if found is not None and found != task and not {found, task} <= set(WITH_ANOTHER_HEAD):
        _refuse_task(spec, parsed, found, task)
    file = None if weights in ("random", "pretrained") else read_weights(weights)
    saved = read_saved(parsed.name) if parsed.family == "run" else None
    if saved is not None and {saved.task, task} <= set(WITH_ANOTHER_HEAD) and saved.task != task:
        fit = replace(fit, new_head=True)
    if task == "encode":
        fit = replace(fit, classes=0, new_head=True)
    if saved is not None:
        parsed, fit = saved.fitted(spec, fit), replace(fit, image_size=None, folder=parsed.name, known=saved.names)
        if file is None:
            weights, file = str(saved.file), read_weights(saved.file)
    if inputs is not None and (parsed.family == "pyg") != (inputs == "graphs"):
        instead = "pyg/gin" if inputs == "graphs" else "timm/resnet18"
        raise UserError(
            f"the data has {inputs}, and '{spec}' takes {'images' if inputs == 'graphs' else 'graphs'}; name one such as {instead}"
        )
    with seeded(seed, "weights", parsed.family, parsed.name):
        model, options = _opener(parsed.family, task)(parsed, fit, weights == "pretrained", file, allow_partial)
    if saved is not None:
        saved.describe(model)
    info: dict[str, Any] = {"spec": spec, "family": parsed.family, "name": parsed.name, "options": options, "weights": weights}
    if task != "classify" or parsed.family in OPENERS:
        info |= {"task": task, "classes": classes, "channels": channels, "names": names or fit.known}
    model.stillhouse = info  # type: ignore[assignment]
    return model


def _opener(family: str, task: Task) -> Callable[..., tuple[nn.Module, dict[str, Any]]]:
    path = OPENERS.get(family) or OPENERS.get(task)
    if path is None:
        return build
    module, _, name = path.partition(".")
    opener: Callable[..., tuple[nn.Module, dict[str, Any]]] = getattr(importlib.import_module(f"stillhouse.models.{module}"), name)
    return opener


def task_of(spec: str) -> Task | None:
    """What the network that a spec names is there for; None where its name does not tell.

    Raises:
        UserError: for a spec that cannot be read, or a folder without a network.
    """
    parsed = parse_spec(spec)
    if parsed.family == "run":
        return read_saved(parsed.name).task
    if parsed.family == "transformers":
        from stillhouse.models.detr import KINDS

        return "detect" if parsed.name in KINDS else None
    return OF_FAMILY.get(parsed.family) or _torchvision_task(parsed.name)  # type: ignore[return-value]


def _torchvision_task(name: str) -> Task | None:
    from stillhouse.models import detectors, segmenters

    models = torchvision.models
    if name in detectors.COMPOSED or name in models.list_models(module=models.detection):
        return "detect"
    if name in segmenters.COMPOSED or name in models.list_models(module=models.segmentation):
        return "segment"
    return "classify" if name in models.list_models(module=models) else None


def _refuse_task(spec: str, parsed: Spec, found: Task, task: Task) -> None:
    """Raise the sentence for a network that is there for another task."""
    instead = "name a network for this task, or data for that one"
    if found == "classify" and parsed.family != "run":
        body = f"timm/{parsed.name}" if parsed.family == "timm" else parsed.name
        names = ("fcos", "retinanet") if task == "detect" else ("deeplabv3", "lraspp")
        instead = f"it can be the backbone of one, as in {' or '.join(f'torchvision/{name}:backbone={body}' for name in names)}"
    raise UserError(f"'{spec}' is there to {found} images, and what is asked for is to {task}; {instead}")


def _as_given(model: nn.Module, task: Task) -> nn.Module:
    library = type(model).__module__.partition(".")[0]
    recorded = hasattr(model, "_model_args") if library == "timm" else hasattr(model, "config")  # enough to build it again from a name
    if library == "transformers" and type(model).__name__.endswith("ForObjectDetection"):
        from stillhouse.models.detr import Detr

        model = Detr(model)
    elif type(model).__module__ == "stillhouse.models.detr":
        library, recorded = "transformers", True
    if not hasattr(model, "stillhouse"):
        family = library if library in ("timm", "transformers") and recorded else "object"
        info: dict[str, Any] = {"spec": None, "family": family, "name": None, "options": {}, "weights": "given"}
        model.stillhouse = info | ({"task": task} if task != "classify" else {})  # type: ignore[assignment]
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
    task: Task = "classify"
    names: list[str] | None = None

    def fitted(self, folder: str, fit: Fit) -> Spec:
        """The spec to build, without the numbers that follow from the data.

        Raises:
            UserError: if the saved network has other channels or, without `new_head`, other classes.
        """
        if self.channels != fit.channels:
            raise UserError(
                f"the network in '{folder}' takes {self.channels} channel(s) and the data has {fit.channels}, take another network"
            )
        if self.task in WITH_ANOTHER_HEAD and self.classes != fit.classes and not fit.new_head:  # the others are found by name
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
    except UserError:
        raise
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"'{found / 'config.json'}' is damaged ({type(error).__name__}: {error}), save the network again") from error


def _read_config(folder: Path, config: dict[str, Any]) -> Saved:
    file = folder / "model.safetensors"
    if "architecture" in config:
        cfg = {
            key: value for key, value in config["pretrained_cfg"].items() if key not in ("file", "url", "hf_hub_id", "source", "state_dict")
        }
        spec = Spec("timm", config["architecture"], config.get("model_args", {}))
        if not isinstance(spec.name, str) or not isinstance(spec.options, dict):
            raise TypeError("its architecture is no name, or model_args no object")
        channels = spec.options.get("in_chans", cfg["input_size"][0])
        task: Task = "classify" if config["num_classes"] else "encode"
        return Saved(spec, config["num_classes"], int(channels), None, file, cfg, task)  # type: ignore[call-overload]
    if "model_type" in config:
        from stillhouse.models.detr import KINDS, known_classes, known_names

        if config["model_type"] in KINDS:
            return Saved(Spec("transformers", str(folder)), known_classes(config), 3, None, file, task="detect", names=known_names(config))
        segments = any(name.endswith("ForSemanticSegmentation") for name in config.get("architectures") or [])
        names = known_names(config) if segments else None
        known = len(config["id2label"]) if "id2label" in config else 2  # transformers' own default
        spec, preprocessing = Spec("transformers", str(folder)), transformers_preprocessing(str(folder))
        channels = config.get("num_channels", 3)
        task = "segment" if segments else "classify" if known else "encode"
        return Saved(spec, known, channels, preprocessing, file, task=task, names=names)
    ours = config["stillhouse"]
    if ours["family"] == "object":
        raise UserError(
            f"'{folder}' holds the weights of your own {ours['network']}, which a name cannot build: "
            f"make the object and call stillhouse.models.weights.load_weights(model, '{file}')"
        )
    preprocessing = Preprocessing(**ours["preprocessing"]) if ours["preprocessing"] else None
    task, names = ours.get("task", "classify"), ours.get("names")
    return Saved(parse_spec(ours["spec"]), ours["classes"], ours["channels"], preprocessing, file, task=task, names=names)
