"""The student alone, on disk: folders that timm, transformers or Stillhouse open, and ONNX files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from stillhouse.errors import UserError, nearest
from stillhouse.models.families import quiet_transformers
from stillhouse.models.opening import open_model, read_saved
from stillhouse.models.outputs import logits_of
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of
from stillhouse.models.specs import Spec
from stillhouse.run_folder import whole_folder

LOG = logging.getLogger("stillhouse")
FORMATS = ("timm", "transformers", "onnx", "torch")


def save_student(model: nn.Module, folder: str | Path) -> Path:
    """Write `folder/config.json` and `folder/model.safetensors`, all of it or nothing; a network saved there before is replaced.

    A timm network opens with `timm.create_model("local-dir:FOLDER", pretrained=True)`, one of transformers with `from_pretrained(FOLDER)`
    (which finds a `preprocessor_config.json` too), one of torchvision or segmentation-models-pytorch with `load_student`.
    Of a user's own class only the weights are stored.

    Raises:
        UserError: if the folder holds something else, cannot be written, or the network has state that is not a tensor.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))):
        raise UserError(f"'{folder}' exists and holds no saved network, give another folder")
    with _whole(folder) as new:
        _write(model, new)
    return folder


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A network's folder, all of it or nothing."""
    try:
        with whole_folder(folder) as new:
            yield new
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the network to '{folder}' ({error}), free some space or give another folder") from error


def _write(model: nn.Module, folder: Path) -> None:
    info: dict[str, Any] = getattr(model, "stillhouse", {"spec": None, "family": "object", "options": {}})
    if info["family"] == "transformers" and info.get("task") == "detect":
        from stillhouse.models.detr import save_detr

        save_detr(model, folder)  # type: ignore[arg-type]
        return
    if info["family"] == "transformers":
        _write_transformers(model, folder)
        return
    if info["family"] == "timm" and _timm_builds_it(model, info):
        recorded = hasattr(model, "_model_args")  # newer timm records them itself, older ones are told what was asked for
        args = None if recorded else {**info["options"], "num_classes": model.num_classes}
        save_config_for_hf(model, str(folder / "config.json"), model_args=args)
    else:
        (folder / "config.json").write_text(json.dumps({"stillhouse": _our_config(model, info)}, indent=2) + "\n")
    save_file(_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})


def _timm_builds_it(model: nn.Module, info: dict[str, Any]) -> bool:
    """Whether the name and arguments that timm recorded give this network again: a module from Python may have been changed by hand."""
    if info["spec"] is not None:
        return True
    from timm.models._input import get_model_args

    with torch.random.fork_rng(devices=[]):
        try:
            again = timm.create_model(model.pretrained_cfg["architecture"], **get_model_args(model))  # type: ignore
        except Exception as error:
            LOG.warning("timm cannot make this network again (%s), only its weights are saved", error)
            return False
    same = _shapes(again) == _shapes(model)
    if not same:
        LOG.warning("the network was changed after timm made it: only its weights are saved")
    return same


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors wants it: on the CPU, contiguous, tied tensors stored under each of their names."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise UserError(
                f"the network's state '{name}' is no tensor and cannot be stored without pickle, leave it out of its state_dict"
            )
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return tensors


def _our_config(model: nn.Module, info: dict[str, Any]) -> dict[str, Any]:
    preprocessing = preprocessing_of(model)
    told: dict[str, Any] = {"family": "object", "network": type(model).__qualname__}
    if "task" in info and info["family"] != "object":
        spec = Spec(info["family"], info["name"], info["options"])
        told = {"family": info["family"], "spec": str(spec), **{key: info[key] for key in ("task", "classes", "channels", "names")}}
    elif info["family"] == "torchvision":
        spec = Spec("torchvision", info["name"], {key: value for key, value in info["options"].items() if key != "num_classes"})
        told = {"family": "torchvision", "spec": str(spec), "classes": info["options"]["num_classes"], "channels": 3}
    return {**told, "preprocessing": asdict(preprocessing) if preprocessing else None}


def _write_transformers(model: Any, folder: Path) -> None:
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size="1000GB")
    preprocessing = preprocessing_of(model)
    if preprocessing is None:
        return
    size = preprocessing.size
    told = {
        "image_processor_type": "ViTImageProcessor",
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "do_resize": size is not None,
        "resample": 3 if preprocessing.interpolation == "bicubic" else 2,  # Pillow's numbers
        **({"size": {"height": size, "width": size}} if size is not None else {}),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(told, indent=2) + "\n")


def load_student(folder: str | Path) -> nn.Module:
    """The network that `save_student` wrote to `folder`, or to `folder/student` for a run folder.

    Raises:
        UserError: if there is none, it is damaged, or it is of a user's own class (then load its weights into an object).
    """
    saved = read_saved(folder)
    return open_model(str(folder), classes=saved.classes, channels=saved.channels, task=saved.task, names=saved.names)


def export_student(folder: str | Path, to: str, out: str | Path) -> Path:
    """Write the student of a run folder to the new folder `out`: as `save_student` does, or as `out/model.onnx`.

    - `timm`, `transformers`: for these libraries, of a network of theirs;
    - `torch`: any network, its weights in `out/model.safetensors` and how it is built in `out/config.json`;
    - `onnx`: float32 `images` [B, C, H, W] (any B) to `logits` [B, K], or [B, K, H, W] of a segmenter; `out/config.json` says mean, std
      and size (a network that takes any size gets 224 x 224). ONNX Runtime 1.20 to 1.24 was seen to give an FCN other logits than torch
      with its optimisations on: open the file with 1.25 or newer.

    Raises:
        UserError: if `out` exists, the format is unknown, the network is not of that library or a detector, which ONNX cannot hold, or the
            extra for ONNX is not installed.
    """
    if to not in FORMATS:
        raise UserError(f"cannot export to '{to}'{nearest(to, FORMATS)}; expected one of {', '.join(FORMATS)}")
    out = Path(out)
    if out.exists():
        raise UserError(f"'{out}' exists and is not overwritten, give a new folder")
    saved = read_saved(folder)
    family = saved.spec.family
    if to == "onnx" and saved.task == "detect":
        raise UserError(
            f"the student in '{folder}' detects, and torch cannot write to ONNX how it picks boxes, whose number depends on the image; "
            "export it to torch"
        )
    if to == "onnx" and saved.task == "generate":
        raise UserError(f"the student in '{folder}' makes images in several steps, which one ONNX graph does not hold; export it to torch")
    if to not in ("onnx", "torch") and family != to:
        remedy = family if family in FORMATS else "torch" if saved.task == "detect" else "onnx"
        raise UserError(f"the student in '{folder}' is of {family}, which {to} cannot open; export it to {remedy}")
    model = load_student(folder).eval()
    with _whole(out) as new:
        if to == "onnx":
            _write_onnx(model, saved.channels, new)
        else:
            _write(model, new)
    return out


class _Logits(nn.Module):
    """Images to logits, whatever the library wraps them in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def _write_onnx(model: nn.Module, channels: int, folder: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("export to onnx needs onnx: pip install 'stillhouse[onnx]'") from None
    known = preprocessing_of(model)
    size = (known.size if known else None) or 224
    torch.onnx.export(
        _Logits(model).eval(),
        (torch.zeros(2, channels, size, size),),
        str(folder / "model.onnx"),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    told = asdict(known or Preprocessing((0.0,) * channels, (1.0,) * channels, size))
    (folder / "config.json").write_text(json.dumps({"input": "images", "output": "logits", "preprocessing": told}, indent=2) + "\n")
