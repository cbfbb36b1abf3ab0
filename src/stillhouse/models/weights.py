"""Weights in and out of networks: no pickle that runs code, no key left unaccounted for, and a hash that says which weights these are."""

from __future__ import annotations

import hashlib
import logging
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stillhouse.errors import UserError

LOG = logging.getLogger("stillhouse")
_TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys under which trainers put the state dict
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_SHOWN = 3


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict, on the CPU, in a `.safetensors` file or in torch's `.pt`, `.pth`, `.bin`, `.ckpt`, `.tar`, read as weights only.

    A state dict below the key `model`, `state_dict` or `model_state_dict` is taken out, the prefix `module.` or `_orig_mod.` is dropped,
    and the log says so.

    Raises:
        UserError: if the file is missing, of another kind, damaged, holds no state dict, or is a pickle that wants to run code (not run).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weights file '{path}', expected a .safetensors, .pt, .pth or .bin file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in _TORCH_FILES:
        raise UserError(f"cannot read weights from '{path}', expected a .safetensors, .pt, .pth or .bin file")
    return _unwrap(_read_torch(path), path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, OSError, RuntimeError) as error:
        raise UserError(f"the weights file '{path}' is damaged ({error}), make or download it again") from error


def _read_torch(path: Path) -> object:
    if zipfile.is_zipfile(path) and _unpacked(path) > path.stat().st_size:
        raise UserError(f"refused: the file '{path}' unpacks to more than it holds, which torch never writes; save the weights again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say of it is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported" not in str(error).lower():
            raise UserError(f"the weights file '{path}' is damaged, make or download it again") from error
        raise UserError(
            f"refused: the file '{path}' wants to run code or holds more than tensors, save only its state dict "
            "(safetensors.torch.save_file, or torch.save(model.state_dict(), …)) where you trust it"
        ) from error
    except Exception as error:  # an unpickler raises whatever odd bytes make it stumble over
        raise UserError(
            f"the weights file '{path}' is damaged ({str(error).splitlines()[0] if str(error) else 'it ends too early'})"
        ) from error


def _unpacked(path: Path) -> int:
    """The bytes that a zip file says it holds; torch stores its tensors as they are."""
    try:
        with zipfile.ZipFile(path) as file:
            return sum(entry.file_size for entry in file.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return 0  # torch will say what is wrong with it


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    wrapper = next((key for key in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    if wrapper is not None:
        LOG.info("took the weights under the key '%s' of %s", wrapper, path)
        content = content[wrapper]  # type: ignore[index]
    if not isinstance(content, dict) or not content:
        raise UserError(f"the file '{path}' holds no state dict, expected names and tensors, bare or under {', '.join(_WRAPPERS)}")
    strange = next((key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)), None)
    if strange is not None:
        raise UserError(
            f"the file '{path}' holds '{strange}', which is not a tensor, expected a state dict with nothing but names and tensors"
        )
    return _without_prefix(content, path)


def _without_prefix(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in weights):
            LOG.info("dropped the prefix '%s' from the names of all weights of %s", prefix, path)
            weights = {key[len(prefix) :]: value for key, value in weights.items()}
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor] | str | Path, allow_partial: bool = False) -> None:
    """Copy a state dict (or the one in a file) into `model` in place, every key accounted for; on an error the model is left as it was.

    Args:
        allow_partial: take what fits by name and shape, and log what does not as a warning.

    Raises:
        UserError: if keys are missing, unexpected or of another shape and `allow_partial` is False; or if nothing fits at all.
    """
    source = f"the file '{weights}'" if isinstance(weights, (str, Path)) else "the weights"
    given = read_weights(weights) if isinstance(weights, (str, Path)) else dict(weights)
    expected = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    fitting = {key: value for key, value in given.items() if key in expected and expected[key].shape == value.shape}
    remedy = "use the weights of this very network, or allow partial loading" if fitting else "nothing fits"
    accept(f"{source} and the network {type(model).__name__}", _unaccounted(expected, given), allow_partial and bool(fitting), remedy)
    model.load_state_dict(fitting, strict=False)


def accept(what: str, unaccounted: Mapping[str, Iterable[str]], allow_partial: bool, remedy: str) -> None:
    """Raise a UserError with the number and the first few of the unaccounted keys of each kind, or log them if `allow_partial`."""
    found = "; ".join(f"{len(list(keys))} {kind} ({_first(keys)})" for kind, keys in unaccounted.items() if keys)
    if found and not allow_partial:
        raise UserError(f"{what} do not fit: {found}; {remedy}")
    if found:
        LOG.warning("%s fit in part only: %s", what, found)


def _unaccounted(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, list[str]]:
    loaded = {_memory(expected[key]) for key in given if key in expected}
    return {
        "missing": [key for key in expected if key not in given and _memory(expected[key]) not in loaded],  # a tied weight is stored once
        "unexpected": [key for key in given if key not in expected],
        "wrongly shaped": [
            f"{key} is {_shape(value)} instead of {_shape(expected[key])}"
            for key, value in given.items()
            if key in expected and value.shape != expected[key].shape
        ],
    }


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """The same for two names of one tensor, different for everything else (empty and meta tensors have no address)."""
    pointer = tensor.data_ptr() if tensor.device.type != "meta" else 0
    return (pointer, tensor.shape, tensor.stride()) if pointer else (id(tensor),)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _first(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")


def weights_hash(model: nn.Module) -> str:
    """sha256 (64 hex digits) over the sorted names, dtypes, shapes and bytes of all parameters and buffers that `state_dict` saves.

    The same on every device; different for another name, dtype, shape or bit.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{len(name)}:{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
