"""Weights, checkpoints and configurations of networks from strangers."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from stillhouse.data.animal_mnist import read_array
from stillhouse.data.fashion_mnist import FILES, LARGEST, _read_idx
from stillhouse.errors import UserError
from stillhouse.models.opening import open_model, read_saved
from stillhouse.models.saving import save_student
from stillhouse.models.weights import read_weights
from stillhouse.training.checkpoint import _sum, load_checkpoint, save_checkpoint
from tests.counts import tried
from tests.data.corpus import Payload
from tests.runs import STUDENT, network

GOOD = {"w": torch.zeros(2, 2)}


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists()


def torch_file(content: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def packed(content: bytes) -> bytes:
    """The files of a zip, compressed, as torch never does."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def tarred(content: bytes) -> bytes:
    """A tar with a file that wants to be somewhere else."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("../ran", "storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def lying(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file whose header says what it likes."""
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(told) if length is None else length) + told + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _forge(path: Path, facts: dict[str, Any]) -> None:
    """A checkpoint's facts with a sum that is right."""
    told = {name: value for name, value in facts.items() if name != "sum"}
    (path / "state.json").write_text(json.dumps(told | {"sum": _sum(told)}))


class Reduced:
    """A tensor's twin that names a builtin."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("open('ran', 'w')",)


FILES_OF_WEIGHTS: dict[str, Callable[[], bytes]] = {
    "payload.pt": lambda: pickle.dumps(Payload(), protocol=2),
    "payload.pth": lambda: torch_file(Payload()),
    "payload.bin": lambda: torch_file({"w": torch.zeros(2), "x": Payload()}),
    "eval.ckpt": lambda: torch_file({"state_dict": Reduced()}),
    "whole-module.pt": lambda: torch_file(torch.nn.Linear(2, 2)),
    "old-format.pt": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(Payload(), protocol=2),
    "archive.tar": lambda: tarred(pickle.dumps(Payload(), protocol=2)),
    "bomb.pt": lambda: packed(torch_file({"w": torch.zeros(8_000_000)})),
    "overlapping.pt": lambda: packed(torch_file({"w": torch.zeros(500_000), "v": torch.zeros(500_000)})),
    "script.pt": lambda: _scripted(),
    "huge-bytes.pt": lambda: b"\x80\x04\x96" + struct.pack("<Q", 1 << 60) + b".",
    "pickle.safetensors": lambda: pickle.dumps(Payload(), protocol=2),
    "renamed.safetensors": lambda: torch_file({"w": torch.zeros(2)}),
    "empty.safetensors": lambda: b"",
    "no-header.safetensors": lambda: struct.pack("<Q", 50),
    "header-beyond-the-file.safetensors": lambda: lying({}, length=1 << 40),
    "header-of-all-ones.safetensors": lambda: lying({}, length=(1 << 64) - 1),
    "not-json.safetensors": lambda: lying(b"\xff" * 64),
    "deep.safetensors": lambda: lying(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "overlap.safetensors": lambda: lying({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24)),
    "same-bytes-twice.safetensors": lambda: lying({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, bytes(16)),
    "hole.safetensors": lambda: lying({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "shape-too-large.safetensors": lambda: lying({"a": entry([1000, 1000], 0, 16)}, bytes(16)),
    "shape-overflows.safetensors": lambda: lying({"a": entry([1 << 32, 1 << 32, 4], 0, 16)}, bytes(16)),
    "negative-shape.safetensors": lambda: lying({"a": entry([-4], 0, 16)}, bytes(16)),
    "backwards.safetensors": lambda: lying({"a": entry([4], 16, 0)}, bytes(16)),
    "beyond-the-end.safetensors": lambda: lying({"a": entry([1 << 40], 0, 1 << 42)}, bytes(16)),
    "more-than-told.safetensors": lambda: lying({"a": entry([4], 0, 16)}, bytes(64)),
    "unknown-type.safetensors": lambda: lying({"a": entry([4], 0, 16, "OBJECT")}, bytes(16)),
    "code-as-type.safetensors": lambda: lying({"a": entry([4], 0, 16, "__import__('os').system('touch ran')")}, bytes(16)),
    "cut.safetensors": lambda: save(GOOD)[:-3],
}


def _scripted() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in (
            ("m/code/__torch__.py", b"x"),
            ("m/constants.pkl", pickle.dumps(Payload())),
            ("m/data.pkl", b"x"),
            ("m/version", b"3"),
        ):
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("name", FILES_OF_WEIGHTS)
def test_hostile_weights_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES_OF_WEIGHTS[name]())
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path / name)
    assert name in str(caught.value)
    with pytest.raises(UserError):
        open_model(STUDENT, classes=10, channels=1, weights=str(tmp_path / name))
    tried("hostile weights refused")


@pytest.mark.parametrize("name", FILES_OF_WEIGHTS)
def test_hostile_files_in_a_checkpoint_are_refused(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 1, {"distiller": GOOD}, {"method": "kd"})
    content = FILES_OF_WEIGHTS[name]()
    (path / "distiller.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(path)
    import hashlib

    facts = json.loads((path / "state.json").read_text())  # the sum is right: whoever made the file made it too
    for file in ("distiller.safetensors", f"optimizer{Path(name).suffix}"):
        (path / file).write_bytes(content)
        facts["files"] = {file: hashlib.sha256(content).hexdigest()}
        _forge(path, facts)
        with pytest.raises(UserError, match="is not a whole checkpoint"):
            load_checkpoint(path)
    tried("hostile files in a checkpoint refused", 2)


@pytest.mark.parametrize("named", ["../../secret.safetensors", "/etc/passwd", "..", ".", "", "a\0b"])
def test_a_checkpoint_reads_only_files_of_its_own(named: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "run/checkpoints", 1, {"distiller": GOOD}, {})
    save_file(GOOD, tmp_path / "secret.safetensors")
    facts = json.loads((path / "state.json").read_text())
    facts["files"] = {named: "0" * 64}
    _forge(path, facts)
    with pytest.raises(UserError):
        load_checkpoint(path)
    tried("paths out of a folder refused")


def test_deep_json_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 1, {"distiller": GOOD}, {})
    (path / "state.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        load_checkpoint(path)
    tried("hostile JSON refused")


TIMM = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": {}, "pretrained_cfg": {"input_size": [1, 8, 8]}}


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "hf-hub:somebody/network"},
        {"architecture": "local-dir:/etc"},
        {"architecture": "../../network"},
        {"architecture": "os.system"},
        {"architecture": ["vit_tiny_patch16_224"]},
        {"model_args": {"act_layer": "os.system"}},
        {"model_args": {"norm_layer": "builtins.eval"}},
        {"model_args": {"checkpoint_path": "payload.pt"}},
        {"model_args": {"pretrained": True}},
        {"model_args": {"pretrained_cfg_overlay": {"url": "http://example.com/payload.pt"}}},
        {"model_args": {"img_size": 10**9}},
        {"model_args": "os.system"},
        {"num_classes": "ten"},
        {"pretrained_cfg": None},
    ],
    ids=str,
)
def test_what_a_saved_timm_network_may_not_ask_for(changes: dict[str, Any], tmp_path: Path) -> None:
    save_student(network(), tmp_path / "student")
    (tmp_path / "student/config.json").write_text(json.dumps(TIMM | changes))
    with pytest.raises(UserError):
        open_model(str(tmp_path), classes=10, channels=1)
    tried("hostile configurations of networks refused")


def test_addresses_in_a_saved_configuration_are_forgotten(tmp_path: Path) -> None:
    save_student(network(), tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    config["pretrained_cfg"] |= {"url": "http://example.com/x.pt", "file": "/etc/passwd", "hf_hub_id": "a/b", "source": "hf-hub"}
    (tmp_path / "student/config.json").write_text(json.dumps(config))
    model = open_model(str(tmp_path), classes=10, channels=1)
    assert not {"example", "passwd", "a/b"} & {str(model.pretrained_cfg.get(key)) for key in ("url", "file", "hf_hub_id")}  # type: ignore
    tried("hostile configurations of networks made harmless")


VIT = {
    **{"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8},
    **{"patch_size": 4, "num_channels": 3, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "payload.Config", "AutoModel": "payload.Model"}},
            "auto_map.*trust_remote_code=True",
        ),
        ({"attn_implementation": "somebody/kernels"}, "attn_implementation"),
        ({"_attn_implementation": "somebody/kernels@main:attention"}, "attn_implementation"),
        ({"backbone_config": {"model_type": "vit", "attn_implementation": "somebody/kernels"}}, "attn_implementation"),
        ({"experts_implementation": "somebody/kernels"}, "experts_implementation"),
        ({"use_kernels": True}, "use_kernels"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_code_that_a_transformers_network_asks_for_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = _transformers(tmp_path, VIT | changes)
    for spec in (f"transformers/{folder}", str(tmp_path)):
        with pytest.raises(UserError, match=says):
            open_model(spec, classes=2, channels=3, weights="pretrained" if "/student" in spec else "random")
    tried("hostile configurations of networks refused")


def _transformers(tmp_path: Path, config: dict[str, Any]) -> Path:
    """A network's folder as one might download it, with a program beside."""
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "payload.py").write_text("open('ran', 'w')\n")
    save_file(GOOD, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_program_beside_a_known_kind_of_network_is_not_run(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    own = {"auto_map": {"AutoConfig": "payload.Config", "AutoModelForImageClassification": "payload.Model"}}
    folder = _transformers(tmp_path, VIT | own)
    transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(VIT | own))
    model = open_model(f"transformers/{folder}", classes=2, channels=3, weights="pretrained")
    assert type(model) is transformers.ViTForImageClassification
    tried("hostile configurations of networks made harmless")


def test_a_pickle_in_a_transformers_folder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = _transformers(tmp_path, VIT)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(torch_file({"w": Payload()}))
    with pytest.raises(UserError):
        open_model(f"transformers/{folder}", classes=2, channels=3, weights="pretrained")
    tried("hostile weights refused")


@pytest.mark.parametrize("spec", ["timm/hf-hub:somebody/network", "timm/local-dir:/etc", "timm/../../network", "torchvision/os.system"])
def test_specs_name_networks_and_nothing_else(spec: str) -> None:
    with pytest.raises(UserError):
        open_model(spec, classes=2, channels=3, weights="pretrained")
    tried("specs refused")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"architecture":' * 50_000, "null", "[]", "{}", '"vit"', "\0", "NaN"], ids=lambda text: text[:9]
)
def test_a_configuration_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        read_saved(tmp_path)
    tried("hostile JSON refused")


def test_a_packed_idx_file_that_never_ends_is_refused(tmp_path: Path) -> None:
    import gzip

    (tmp_path / f"{FILES[0]}.gz").write_bytes(gzip.compress(bytes(LARGEST + 100)))
    with pytest.raises(UserError, match="larger than the largest"):
        _read_idx(tmp_path, FILES[0])
    tried("bombs refused")


@pytest.mark.parametrize("protocol", range(6))
def test_the_pickles_of_animal_mnist_run_nothing(protocol: int, tmp_path: Path) -> None:
    import gzip

    for content in (Payload(), [Payload()], Reduced(), {"a": 1}):
        (tmp_path / "a.gz").write_bytes(gzip.compress(pickle.dumps(content, protocol)))
        with pytest.raises(UserError):
            read_array(tmp_path / "a.gz")
        tried("pickles refused")
