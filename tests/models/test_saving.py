from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.models import saving
from stillhouse.models.opening import open_model
from stillhouse.models.outputs import logits_of
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of, set_preprocessing
from stillhouse.models.saving import export_student, load_student, save_student
from stillhouse.models.weights import load_weights, weights_hash

TINY = "timm/vit_tiny_patch16_224:img_size=28,patch_size=7,depth=2,embed_dim=48,num_heads=4"
HF = "transformers/vit:hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64,patch_size=7"
OURS = Preprocessing((0.3,), (0.2,), 28, "bilinear")


def outputs(model: nn.Module, channels: int) -> torch.Tensor:
    images = torch.randn(3, channels, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return logits_of(model.eval()(images))


def test_timm_opens_it_without_us(tmp_path: Path) -> None:
    model = open_model(TINY, classes=7, channels=1)
    set_preprocessing(model, OURS)
    save_student(model, tmp_path / "student")
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["config.json", "model.safetensors"]
    theirs = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    assert torch.equal(outputs(theirs, 1), outputs(model, 1))
    cfg = theirs.pretrained_cfg
    assert (tuple(cfg["mean"]), tuple(cfg["std"]), tuple(cfg["input_size"])) == (OURS.mean, OURS.std, (1, 28, 28))
    assert (cfg["interpolation"], cfg["num_classes"]) == ("bilinear", 7)
    assert tuple(timm.data.resolve_model_data_config(theirs)["mean"]) == OURS.mean


@pytest.mark.parametrize(
    ("spec", "channels", "family"),
    [
        (TINY, 1, "timm"),
        ("timm/resnet18", 1, "timm"),
        ("timm/deit_tiny_distilled_patch16_224:img_size=28,patch_size=7,depth=1,global_pool=token", 3, "timm"),
        ("torchvision/mobilenet_v3_small:dropout=0.1", 3, "torchvision"),
        ("torchvision/squeezenet1_1", 3, "torchvision"),
        (HF, 1, "transformers"),
    ],
)
def test_what_is_saved_opens_bit_equal(tmp_path: Path, spec: str, channels: int, family: str) -> None:
    model = open_model(spec, classes=5, channels=channels, image_size=28, seed=3)
    set_preprocessing(model, Preprocessing((0.3,) * channels, (0.2,) * channels, 28, "bilinear"))
    save_student(model, tmp_path / "student")
    again = load_student(tmp_path)  # the run folder
    assert weights_hash(again) == weights_hash(model)
    assert torch.equal(outputs(again, channels), outputs(model, channels))
    assert preprocessing_of(again) == preprocessing_of(model)
    assert again.stillhouse["family"] == family
    save_student(again, tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (tmp_path / "student" / "model.safetensors").read_bytes()
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("student", "twice"))
    assert first == second


def test_transformers_opens_it_without_us(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = open_model(HF, classes=5, channels=3, image_size=28)
    set_preprocessing(model, Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 28))
    save_student(model, tmp_path / "student")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert torch.equal(outputs(theirs, 3), outputs(model, 3))
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    fed = AutoImageProcessor.from_pretrained(tmp_path / "student", backend="pil")(pixels, return_tensors="pt")["pixel_values"]
    expected = (torch.tensor(pixels).permute(2, 0, 1) / 255 - torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1)) / torch.tensor(
        [0.4, 0.5, 0.6]
    ).view(-1, 1, 1)
    assert torch.allclose(fed[0], expected, atol=1e-5)


def test_a_new_head_is_saved_as_it_is(tmp_path: Path) -> None:
    save_student(open_model(TINY, classes=7, channels=1), tmp_path / "a")
    student = open_model(str(tmp_path / "a"), classes=3, channels=1, new_head=True)
    save_student(student, tmp_path / "b")
    assert torch.equal(outputs(timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True), 1), outputs(student, 1))


def test_a_timm_network_made_in_python(tmp_path: Path) -> None:
    model = open_model(timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=7, depth=1, num_classes=4), classes=4, channels=3)
    save_student(model, tmp_path / "a")
    assert torch.equal(outputs(timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True), 3), outputs(model, 3))


def test_a_network_changed_by_hand_or_of_ones_own_keeps_its_weights(tmp_path: Path) -> None:
    changed = open_model(timm.create_model("resnet18", num_classes=4), classes=4, channels=3)
    changed.fc = nn.Sequential(nn.Linear(512, 8), nn.Linear(8, 4))
    own = open_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), classes=2, channels=3)
    for model, name in ((changed, "ResNet"), (own, "Sequential")):
        save_student(model, tmp_path / name)
        with pytest.raises(UserError, match=f"your own {name}.*load_weights"):
            load_student(tmp_path / name)
        before = weights_hash(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        load_weights(model, tmp_path / name / "model.safetensors")
        assert weights_hash(model) == before


def test_tied_and_strided_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last))
    model[1].weight = model[0].weight
    model.register_buffer("view", model[0].bias.detach()[1:])
    save_student(model, tmp_path / "a")
    before = weights_hash(model)
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.zero_()
    load_weights(model, tmp_path / "a" / "model.safetensors")
    assert weights_hash(model) == before
    assert model[1].weight is model[0].weight


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> dict:
            return {"a": 1}

    with pytest.raises(UserError, match="_extra_state"):
        save_student(Extra(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces_the_network_and_nothing_else(tmp_path: Path) -> None:
    first, second = (open_model(TINY, classes=2, channels=1, seed=seed) for seed in (0, 1))
    save_student(first, tmp_path / "a")
    save_student(second, tmp_path / "a")
    assert weights_hash(load_student(tmp_path / "a")) == weights_hash(second)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds no saved network"):
        save_student(first, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_full_disk_leaves_the_last_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_model(TINY, classes=2, channels=1)
    save_student(first, tmp_path / "a")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_student(open_model(TINY, classes=2, channels=1, seed=1), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert weights_hash(load_student(tmp_path / "a")) == weights_hash(first)


def test_a_rename_that_fails_puts_the_last_network_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_model(TINY, classes=2, channels=1)
    save_student(first, tmp_path / "a")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="Input/output error"):
        save_student(open_model(TINY, classes=2, channels=1, seed=1), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert weights_hash(load_student(tmp_path / "a")) == weights_hash(first)


def test_weights_damaged_after_saving(tmp_path: Path) -> None:
    save_student(open_model(TINY, classes=2, channels=1), tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_student(tmp_path / "a")


@pytest.mark.parametrize(("spec", "to"), [(TINY, "timm"), (HF, "transformers")])
def test_export_to_the_library_it_came_from(tmp_path: Path, spec: str, to: str) -> None:
    model = open_model(spec, classes=5, channels=1, image_size=28)
    save_student(model, tmp_path / "run" / "student")
    assert export_student(tmp_path / "run", to, tmp_path / "out") == tmp_path / "out"
    assert weights_hash(load_student(tmp_path / "out")) == weights_hash(model)
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(UserError, match="exists and is not overwritten"):
        export_student(tmp_path / "run", to, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == before


def test_export_that_cannot_be(tmp_path: Path) -> None:
    save_student(open_model("torchvision/mobilenet_v3_small", classes=5, channels=3), tmp_path / "run" / "student")
    with pytest.raises(UserError, match="is of torchvision, which timm cannot open; export it to onnx"):
        export_student(tmp_path / "run", "timm", tmp_path / "out")
    with pytest.raises(UserError, match="did you mean 'onnx'"):
        export_student(tmp_path / "run", "onx", tmp_path / "out")
    with pytest.raises(UserError, match="is no folder"):
        export_student(tmp_path / "walk", "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "task"),
    [
        (TINY, "classify"),
        ("torchvision/fcos:backbone=timm/test_resnet,channels=8,levels=2,convs=0", "detect"),
        ("smp/unet:encoder=timm/test_resnet,encoder_depth=3,decoder_channels=(8,8,8)", "segment"),
    ],
)
def test_every_student_is_exported_alone_as_it_is(tmp_path: Path, spec: str, task: str) -> None:
    model = open_model(spec, classes=3, channels=3, task=task)
    save_student(model, tmp_path / "run" / "student")
    export_student(tmp_path / "run", "torch", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    again = load_student(tmp_path / "out")
    assert weights_hash(again) == weights_hash(model)
    assert list(again.state_dict()) == list(model.state_dict())  # and nothing more


def test_a_detr_is_saved_as_transformers_opens_it(tmp_path: Path) -> None:
    small = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=16,decoder_ffn_dim=16,num_queries=5"
    heads = "encoder_attention_heads=2,decoder_attention_heads=2"
    model = open_model(f"transformers/detr:{small},{heads},backbone=test_resnet,size=64", classes=3, channels=3, task="detect")
    save_student(model, tmp_path / "student")
    again, images = load_student(tmp_path), [torch.rand(3, 64, 64)]
    assert weights_hash(again) == weights_hash(model)
    (found,), (expected,) = again.eval()(images), model.eval()(images)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(UserError, match="is there to detect images, and what is asked for is to classify"):
        open_model(str(tmp_path), classes=3, channels=3)


def test_a_detector_is_not_exported_to_onnx(tmp_path: Path) -> None:
    spec = "torchvision/fcos:backbone=timm/test_resnet,channels=8,levels=2,convs=0"
    save_student(open_model(spec, classes=3, channels=3, task="detect"), tmp_path / "run" / "student")
    with pytest.raises(UserError, match=r"detects, and torch cannot write to ONNX .* export it to torch"):
        export_student(tmp_path / "run", "onnx", tmp_path / "out")
    with pytest.raises(UserError, match="is of torchvision, which timm cannot open; export it to torch"):
        export_student(tmp_path / "run", "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_gives_a_segmenters_logits_for_any_batch(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    model = open_model("torchvision/fcn:backbone=timm/test_resnet,aux=true", classes=5, channels=3, task="segment")
    set_preprocessing(model, Preprocessing((0.3,) * 3, (0.2,) * 3, 32))
    save_student(model, tmp_path / "run" / "student")
    export_student(tmp_path / "run", "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            expected = logits_of(model.eval()(images)).numpy()
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        assert logits.shape == (batch, 5, 32, 32)
        assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize(("spec", "channels"), [(TINY, 1), (HF, 3)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_gives_the_same_logits_for_any_batch(tmp_path: Path, spec: str, channels: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    model = open_model(spec, classes=5, channels=channels, image_size=28)
    set_preprocessing(model, Preprocessing((0.3,) * channels, (0.2,) * channels, 28))
    save_student(model, tmp_path / "run" / "student")
    export_student(tmp_path / "run", "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        images = torch.randn(batch, channels, 28, 28)
        with torch.no_grad():
            expected = logits_of(model.eval()(images)).numpy()
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        assert logits.shape == (batch, 5)
        assert np.abs(logits - expected).max() < 1e-4
    told = json.loads((tmp_path / "out" / "config.json").read_text())["preprocessing"]
    assert (told["mean"], told["std"], told["size"]) == ([0.3] * channels, [0.2] * channels, 28)
