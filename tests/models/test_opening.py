from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from stillhouse.errors import UserError
from stillhouse.models import families
from stillhouse.models.opening import open_model
from stillhouse.models.outputs import logits_of
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of, set_preprocessing
from stillhouse.models.saving import save_student
from stillhouse.models.weights import weights_hash

TINY = "timm/vit_tiny_patch16_224:img_size=28,patch_size=7,depth=1,embed_dim=48"
HF = "transformers/vit:hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64,patch_size=7"


@pytest.fixture
def without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No name resolves, no cache holds anything."""

    def unknown(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr(families, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("spec", "channels"),
    [
        (TINY, 1),
        ("timm/resnet18", 4),
        ("timm/vit_tiny_patch16_224.augreg_in21k:img_size=28,patch_size=7,depth=1", 3),
        ("torchvision/mobilenet_v3_small", 3),
        (HF, 1),
    ],
)
def test_random_weights_are_a_function_of_the_seed(spec: str, channels: int) -> None:
    state = torch.get_rng_state()
    a, b, c = (open_model(spec, classes=5, channels=channels, image_size=28, seed=seed) for seed in (0, 0, 1))
    assert weights_hash(a) == weights_hash(b) != weights_hash(c)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's draws go on as if nothing had happened
    assert a.training
    assert logits_of(a.eval()(torch.randn(2, channels, 28, 28))).shape == (2, 5)
    assert set(a.stillhouse) == {"spec", "family", "name", "options", "weights"}
    assert (a.stillhouse["spec"], a.stillhouse["family"], a.stillhouse["weights"]) == (spec, spec.split("/")[0], "random")


def test_options_shape_the_network_and_images_the_rest() -> None:
    model = open_model("timm/vit_tiny_patch16_224:patch_size=4,depth=2,num_heads=2,global_pool=avg", classes=7, channels=1, image_size=32)
    assert (len(model.blocks), model.blocks[0].attn.num_heads, model.global_pool) == (2, 2, "avg")
    assert (model.patch_embed.img_size, model.patch_embed.patch_size, model.in_chans, model.num_classes) == ((32, 32), (4, 4), 1, 7)
    assert open_model(TINY, classes=7, channels=1, image_size=56).patch_embed.img_size == (28, 28)  # the spec's own word wins
    assert open_model("timm/resnet18", classes=7, channels=1, image_size=32).num_classes == 7  # a CNN takes any size


def test_a_module_is_returned_as_it_is() -> None:
    module = nn.Linear(2, 2)
    assert open_model(module, classes=2, channels=1) is module
    assert module.stillhouse["family"] == "object"
    network = timm.create_model("resnet18", num_classes=3)
    before = weights_hash(network)
    assert open_model(network, classes=3, channels=3) is network
    assert (network.stillhouse["family"], network.stillhouse["spec"], weights_hash(network)) == ("timm", None, before)
    opened = open_model(TINY, classes=2, channels=1)
    told = dict(opened.stillhouse)
    assert open_model(opened, classes=2, channels=1).stillhouse == told


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("timm/vit_tiny_patch16_225", "did you mean 'vit_tiny_patch16_224'?"),
        ("timm/vit_tiny_patch16_224.augreg", "did you mean 'vit_tiny_patch16_224.augreg_in21k'?"),
        ("timm/vit_tiny_patch16_224:foo=1", "timm network 'vit_tiny_patch16_224' has no option 'foo'"),
        ("timm/resnet18:img_size=28", "timm network 'resnet18' has no option 'img_size'"),
        ("timm/vit_tiny_patch16_224:depth=1,num_heads=7", "num_heads=7"),
        ("timm/vit_tiny_patch16_224:num_classes=9", "says num_classes=9 but the data asks for 5"),
        ("timm/vit_tiny_patch16_224:in_chans=1", "says in_chans=1 but the data asks for 3"),
        ("torchvision/resnet19", "did you mean 'resnet18'?"),
        ("torchvision/resnet18:foo=1", "torchvision network 'resnet18' has no option 'foo'"),
        ("torchvision/raft_small", "torchvision has no classifier"),
        ("transformers/vitt", "did you mean 'vit'?"),
        ("transformers/bert", "does not classify images"),
        ("transformers/vit:hiden_size=8", "did you mean 'hidden_size'?"),
        ("transformers/vit:hidden_size=-12", "transformers cannot make 'vit' with hidden_size=-12"),
        ("nowhere", "'nowhere' is no folder"),
        ("tim/vit_tiny_patch16_224", "expected a run folder, or a network named timm/NAME"),
    ],
)
def test_what_does_not_exist_is_named(spec: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        open_model(spec, classes=5, channels=3)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "option",
    [
        "timm/resnet18:checkpoint_path=x",
        "timm/resnet18:pretrained=true",
        "timm/resnet18:pretrained_cfg=x",
        "timm/resnet18:pretrained_cfg_overlay={'url':'x'}",
        "timm/resnet18:features_only=true",
        "timm/resnet18:scriptable=true",
        "timm/resnet18:exportable=true",
        "timm/resnet18:norm_layer=layernorm",
        "timm/resnet18:act_layer=relu",
        "timm/resnet18:cache_dir=x",
        "torchvision/resnet18:weights=DEFAULT",
        "torchvision/resnet18:norm_layer=x",
        "transformers/vit:auto_map={'AutoModel':'x.y'}",
        "transformers/vit:trust_remote_code=true",
        "transformers/vit:_name_or_path=x",
        "transformers/vit:backbone=x",
    ],
)
def test_options_that_reach_files_networks_or_code_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=r"option '\w+' of .* is refused"):
        open_model(option, classes=5, channels=3)


@pytest.mark.usefixtures("without_network")
@pytest.mark.parametrize("spec", ["timm/vit_tiny_patch16_224", "torchvision/resnet18", "transformers/nobody/nothing"])
def test_published_weights_without_a_network_are_a_sentence(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("it tries again instead of answering")

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(UserError, match="no network, or no such weights"):
        open_model(spec, classes=1000, channels=3, weights="pretrained")


def test_offline_mode_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(families, "_reachable", lambda host: False)
    before = constants.HF_HUB_OFFLINE
    with families._quick_without_network():
        assert constants.HF_HUB_OFFLINE
    assert before == constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("spec", ["timm/vit_tiny_patch16_224", "torchvision/resnet18"])
def test_a_teacher_that_does_not_know_the_classes_is_refused_before_any_download(spec: str) -> None:
    with pytest.raises(UserError) as error:
        open_model(spec, classes=5, channels=3, weights="pretrained")
    assert "knows 1000 classes and the data has 5" in str(error.value)
    assert f"--method scratch --student {spec} --student-weights pretrained" in str(error.value)


def test_published_weights_get_a_new_head_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    published = timm.create_model("resnet18", num_classes=1000)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(published.state_dict()))
    teacher = open_model("timm/resnet18", classes=1000, channels=3, weights="pretrained")
    assert weights_hash(teacher) == weights_hash(published)
    student = open_model("timm/resnet18", classes=5, channels=3, weights="pretrained", new_head=True)
    assert student.fc.weight.shape == (5, 512)
    assert all(torch.equal(value, published.state_dict()[key]) for key, value in student.state_dict().items() if "fc" not in key)
    again = open_model("timm/resnet18", classes=5, channels=3, weights="pretrained", new_head=True)
    assert weights_hash(student) == weights_hash(again)


def test_published_weights_with_a_key_too_few_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = dict(timm.create_model("resnet18").state_dict())
    del weights["layer1.0.conv1.weight"]
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: weights)
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight"):
        open_model("timm/resnet18", classes=5, channels=3, weights="pretrained", new_head=True)


def test_torchvision_weights_bring_their_preprocessing_and_new_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision.models.squeezenet1_1()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published.state_dict())
    student = open_model("torchvision/squeezenet1_1", classes=5, channels=3, weights="pretrained", new_head=True)
    assert student.classifier[1].weight.shape == (5, 512, 1, 1)
    assert torch.equal(student.features[0].weight, published.features[0].weight)
    assert preprocessing_of(student) == Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, "bilinear")


def test_torchvision_takes_three_channels() -> None:
    with pytest.raises(UserError, match="3 channels and the data has 1"):
        open_model("torchvision/resnet18", classes=5, channels=1)


@pytest.mark.parametrize("spec", [TINY, "torchvision/mobilenet_v3_small", HF])
def test_a_file_of_weights(tmp_path: Path, spec: str, caplog: pytest.LogCaptureFixture) -> None:
    source = open_model(spec, classes=5, channels=3, image_size=28, seed=1)
    file = str(tmp_path / "w.safetensors")
    save_file(source.state_dict(), file)
    same = open_model(spec, classes=5, channels=3, image_size=28, weights=file)
    assert weights_hash(same) == weights_hash(source)
    assert same.stillhouse["weights"] == file
    with pytest.raises(UserError, match="knows 5 classes and the data has 6"):
        open_model(spec, classes=6, channels=3, image_size=28, weights=file)
    with caplog.at_level(logging.INFO, "stillhouse"):
        student = open_model(spec, classes=6, channels=3, image_size=28, weights=file, new_head=True).eval()
    assert "new random classifier" in caplog.text
    assert logits_of(student(torch.randn(2, 3, 28, 28))).shape == (2, 6)
    fresh = open_model(spec, classes=6, channels=3, image_size=28).state_dict()
    for key, value in student.state_dict().items():
        head = value.shape != source.state_dict()[key].shape
        assert torch.equal(value, fresh[key] if head else source.state_dict()[key]) or (head and spec == HF)


@pytest.mark.parametrize("spec", [TINY, "torchvision/mobilenet_v3_small", HF])
def test_a_file_that_does_not_fit(tmp_path: Path, spec: str, caplog: pytest.LogCaptureFixture) -> None:
    source = open_model(spec, classes=5, channels=3, image_size=28, seed=1)
    weights = dict(source.state_dict())
    first = next(key for key in weights if key.endswith("weight"))
    del weights[first]
    save_file({**weights, "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as error:
        open_model(spec, classes=5, channels=3, image_size=28, weights=str(tmp_path / "w.safetensors"))
    assert f"1 missing ({first})" in str(error.value)
    assert "1 unexpected (extra)" in str(error.value)
    caplog.clear()
    model = open_model(spec, classes=5, channels=3, image_size=28, weights=str(tmp_path / "w.safetensors"), allow_partial=True)
    assert f"1 missing ({first})" in caplog.text
    other = next(key for key in weights if key.endswith("weight"))
    assert torch.equal(model.state_dict()[other], weights[other])


def test_a_missing_file_is_told_before_the_network_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.models.opening.build", None)
    with pytest.raises(UserError, match="no weights file"):
        open_model(TINY, classes=5, channels=1, weights="imagenet")


def test_transformers_folders(tmp_path: Path) -> None:
    source = open_model(HF, classes=5, channels=3, image_size=28, seed=1)
    set_preprocessing(source, Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 28, "bilinear"))
    save_student(source, tmp_path / "vit")
    spec = f"transformers/{tmp_path / 'vit'}"
    teacher = open_model(spec, classes=5, channels=3, weights="pretrained")
    assert weights_hash(teacher) == weights_hash(source)
    assert preprocessing_of(teacher) == preprocessing_of(source)
    assert teacher.training
    with pytest.raises(UserError, match="knows 5 classes and the data has 4"):
        open_model(spec, classes=4, channels=3, weights="pretrained")
    with pytest.raises(UserError, match=r"3 channel\(s\) and the data has 1"):
        open_model(spec, classes=5, channels=1, weights="pretrained")
    student = open_model(spec, classes=4, channels=3, weights="pretrained", new_head=True)
    assert student.classifier.weight.shape == (4, 32)
    assert torch.equal(student.vit.embeddings.cls_token, source.vit.embeddings.cls_token)
    assert weights_hash(open_model(spec, classes=5, channels=3, seed=1)) != weights_hash(source)  # random, of that shape


def test_code_beside_a_network_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    for spec in (f"transformers/{tmp_path}", str(tmp_path)):
        with pytest.raises(UserError):
            open_model(spec, classes=5, channels=3, weights="pretrained")
    assert not (tmp_path / "owned").exists()


def test_a_bare_kind_of_network_has_no_weights() -> None:
    with pytest.raises(UserError, match="a kind of network without weights"):
        open_model("transformers/vit", classes=5, channels=3, weights="pretrained")


def test_run_folders(tmp_path: Path) -> None:
    source = open_model(TINY, classes=5, channels=1, seed=1)
    save_student(source, tmp_path / "run" / "student")
    for folder in (tmp_path / "run", tmp_path / "run" / "student"):
        teacher = open_model(str(folder), classes=5, channels=1, image_size=56)
        assert weights_hash(teacher) == weights_hash(source)
        assert (teacher.stillhouse["spec"], teacher.stillhouse["family"]) == (str(folder), "timm")
    with pytest.raises(UserError, match="knows 5 classes and the data has 4"):
        open_model(str(tmp_path / "run"), classes=4, channels=1)
    with pytest.raises(UserError, match=r"1 channel\(s\) and the data has 3"):
        open_model(str(tmp_path / "run"), classes=5, channels=3)
    student = open_model(str(tmp_path / "run"), classes=4, channels=1, new_head=True)
    assert student.head.weight.shape == (4, 48)
    assert torch.equal(student.pos_embed, source.pos_embed)
    with pytest.raises(UserError, match=r"has no student/config\.json"):
        open_model(str(tmp_path), classes=5, channels=1)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"stillhouse": 3}', '{"architecture": "vit_tiny_patch16_224"}'])
def test_a_damaged_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        open_model(str(tmp_path), classes=5, channels=1)


@pytest.mark.parametrize(
    ("spec", "width"),
    [("timm/test_resnet", 96), ("torchvision/resnet18", 512), ("torchvision/squeezenet1_1", 512), (HF, 32)],
    ids=lambda value: str(value).partition(":")[0],
)
def test_any_library_opens_encoders_and_classifiers_begin_with_them(spec: str, width: int, tmp_path: Path) -> None:
    """As an encoder, then as a classifier that starts from it, then as the encoder of that: the body is always the same."""
    images = torch.randn(2, 3, 28 if spec == HF else 64, 28 if spec == HF else 64)
    size = {"image_size": images.shape[-1], "channels": 3}
    encoder = open_model(spec, classes=5, task="encode", **size).eval()
    with torch.no_grad():
        features = encoder(images)
    assert features.shape == (2, width)
    save_student(encoder, tmp_path / "encoder")
    classifier = open_model(str(tmp_path / "encoder"), classes=4, new_head=True, **size).eval()
    assert logits_of(classifier(images)).shape == (2, 4)
    save_student(classifier, tmp_path / "classifier")
    for folder in ("encoder", "classifier"):
        again = open_model(str(tmp_path / folder), classes=5, task="encode", **size).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(images), features, msg=folder)
