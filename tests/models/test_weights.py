from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from stillhouse.errors import UserError
from stillhouse.models.weights import load_weights, read_weights, weights_hash


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", ["bare", "model", "state_dict", "module.", "_orig_mod.", "both"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_torch_files_in_their_usual_wrappings(tmp_path: Path, layout: str, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    weights = network().state_dict()
    prefix = {"module.": "module.", "_orig_mod.": "_orig_mod.", "both": "module._orig_mod."}.get(layout, "")
    content: object = {prefix + key: value for key, value in weights.items()}
    if layout in ("model", "state_dict", "both"):
        content = {"model" if layout == "both" else layout: content, "epoch": 3}
    torch.save(content, tmp_path / f"w{suffix}")
    with caplog.at_level(logging.INFO, "stillhouse"):
        assert same(read_weights(tmp_path / f"w{suffix}"), weights)
    assert bool(caplog.records) == (layout != "bare")  # what was unwrapped is said


def test_safetensors(tmp_path: Path) -> None:
    weights = network().state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    assert same(read_weights(tmp_path / "w.safetensors"), weights)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "owned"
    if zipped:
        buffer = io.BytesIO()
        torch.save({"w": torch.zeros(1)}, buffer)
        with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(tmp_path / "w.pt", "w") as bad:
            for name in good.namelist():
                bad.writestr(name, pickle.dumps(RunsCode(mark), protocol=2) if name.endswith("data.pkl") else good.read(name))
    else:
        torch.save({"model": RunsCode(mark)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"refused: .* wants to run code"):
        read_weights(tmp_path / "w.pt")
    assert not mark.exists()
    pickle.loads(pickle.dumps(RunsCode(mark)))  # the same object, loaded as it should not be, does run
    assert mark.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"w{suffix}"
    save_file(network().state_dict(), path) if suffix == ".safetensors" else torch.save(network().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="damaged"):
        read_weights(path)


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4000]}},
        {"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        "no table",
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(UserError, match="damaged"):
        read_weights(tmp_path / "w.safetensors")


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(UserError, match="damaged"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "content", [{}, [1, 2], {"epoch": 3}, {"a": torch.zeros(1), "b": 2}, {"model": {}}, torch.zeros(2), {1: torch.zeros(1)}]
)
def test_files_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"holds"):
        read_weights(tmp_path / "w.pt")


def test_missing_files_and_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights file"):
        read_weights(tmp_path / "w.pt")
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"expected a \.safetensors"):
        read_weights(tmp_path / "w.npz")


def test_loading_accounts_for_every_key() -> None:
    model, weights = network(0), network(1).state_dict()
    before = weights_hash(model)
    wrong = {**weights, "0.weight": torch.zeros(5, 3), "extra": torch.zeros(1)}
    del wrong["2.bias"]
    with pytest.raises(UserError) as error:
        load_weights(model, wrong)
    assert "1 missing (2.bias)" in str(error.value)
    assert "1 unexpected (extra)" in str(error.value)
    assert "1 wrongly shaped (0.weight is 5x3 instead of 4x3)" in str(error.value)
    assert weights_hash(model) == before  # nothing was touched


def test_many_keys_are_counted_and_the_first_named() -> None:
    with pytest.raises(UserError, match=r"9 missing \(0\.weight, 0\.bias, 1\.weight, …\)"):
        load_weights(network(), {"x": torch.zeros(1)})


def test_partial_loading_takes_what_fits_and_says_what_does_not(caplog: pytest.LogCaptureFixture) -> None:
    model, weights = network(0), network(1).state_dict()
    kept = model[2].bias.detach().clone()
    load_weights(model, {**{k: v for k, v in weights.items() if k != "2.bias"}, "extra": torch.zeros(1)}, allow_partial=True)
    assert torch.equal(model[0].weight, weights["0.weight"])
    assert torch.equal(model[2].bias, kept)
    assert "1 missing (2.bias)" in caplog.text
    assert "1 unexpected (extra)" in caplog.text


def test_partial_loading_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="nothing fits"):
        load_weights(network(), {"x": torch.zeros(1)}, allow_partial=True)


def test_a_tied_weight_may_be_stored_once_but_not_never() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    weights = dict(model.state_dict())
    del weights["1.weight"]
    load_weights(model, weights)
    del weights["0.weight"]
    with pytest.raises(UserError, match="2 missing"):
        load_weights(model, weights)


def test_loading_from_a_file_copies_bits(tmp_path: Path) -> None:
    save_file(network(1).state_dict(), tmp_path / "w.safetensors")
    model = network(0)
    load_weights(model, tmp_path / "w.safetensors")
    assert same(model.state_dict(), network(1).state_dict())


@settings(deadline=None, max_examples=16)
@given(st.integers(0, 3), st.integers(0, 3))
def test_hash_is_equal_exactly_when_weights_are(a: int, b: int) -> None:
    assert (weights_hash(network(a)) == weights_hash(network(b))) == (a == b)


def test_hash_sees_names_dtypes_shapes_buffers_and_every_bit() -> None:
    class One(nn.Module):
        def __init__(self, tensor: torch.Tensor, name: str = "w") -> None:
            super().__init__()
            self.register_buffer(name, tensor)

    zero = torch.zeros(4)
    others = [
        One(zero, "v"),
        One(zero.bfloat16()),
        One(zero.half()),
        One(torch.zeros(2, 2)),
        One(-zero),
        One(torch.zeros(4, dtype=torch.int32)),
        One(torch.tensor(0.0)),
        One(torch.zeros(0)),
    ]
    hashes = {weights_hash(module) for module in [One(zero), *others]}
    assert len(hashes) == len(others) + 1  # -0.0 and 0.0 differ in a bit
    assert weights_hash(One(torch.zeros(4, 2)[:, 0])) == weights_hash(One(zero))  # strides are not weights


def test_hash_closed_form_and_mode() -> None:
    module = nn.Linear(1, 1, bias=False)
    expected = hashlib.sha256(b"6:weight:torch.float32:(1, 1);" + struct.pack("<f", module.weight.item())).hexdigest()
    assert weights_hash(module) == expected
    assert weights_hash(module.eval().requires_grad_(False)) == expected
