from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from stillhouse.errors import UserError
from stillhouse.models.opening import open_model, task_of
from stillhouse.models.outputs import logits_of
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of, set_preprocessing
from stillhouse.models.saving import load_student, save_student
from stillhouse.models.weights import weights_hash

DEEPLAB = "torchvision/deeplabv3:backbone=timm/test_resnet,channels=8"
FCN = "torchvision/fcn:backbone=timm/test_resnet,aux=true"
LRASPP = "torchvision/lraspp:backbone=mobilenet_v3_small,channels=8"
VIT = "backbone=timm/vit_tiny_patch16_224,patch_size=8,embed_dim=32,depth=3,num_heads=2"
UNET = "smp/unet:encoder=timm/test_resnet,encoder_depth=3,decoder_channels=(16,8,8)"
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None, "bilinear")


def segmenter(spec: str, classes: int = 3, **settings: Any) -> Any:
    return open_model(spec, classes=classes, channels=settings.pop("channels", 3), task="segment", **settings)


def images(channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "spec",
    [
        DEEPLAB,
        FCN,
        LRASPP,
        UNET,
        "torchvision/deeplabv3:backbone=resnet18,channels=8,stride=8",
        "torchvision/deeplabv3:backbone=mobilenet_v2,channels=8,aux=true",
        "torchvision/fcn:backbone=shufflenet_v2_x0_5,stride=32",
        "torchvision/lraspp:backbone=timm/test_resnet,stride=8",
        "torchvision/lraspp_mobilenet_v3_large",
        "torchvision/fcn:backbone=timm/resnet10t,stem_width=8,stride=8",
        f"torchvision/fcn:{VIT}",
        f"torchvision/fcn:{VIT},aux=true",
        f"torchvision/deeplabv3:{VIT},channels=8",
        f"torchvision/lraspp:{VIT},channels=8",
        "torchvision/fcn:backbone=timm/eva02_tiny_patch14_224,patch_size=16,depth=1,embed_dim=48,num_heads=2,img_size=64",
        "smp/PSPNet:encoder=resnet18,psp_out_channels=8",
        "smp/deeplabv3plus:encoder=mobilenet_v2,decoder_channels=8",
        "smp/fpn:encoder=timm/test_resnet,decoder_pyramid_channels=8,decoder_segmentation_channels=32",
    ],
)
def test_a_logit_for_every_class_and_pixel(spec: str) -> None:
    state = torch.get_rng_state()
    network, again, other = (segmenter(spec, seed=seed) for seed in (0, 0, 1))
    assert weights_hash(network) == weights_hash(again) != weights_hash(other)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert (network.stillhouse["task"], network.stillhouse["classes"]) == ("segment", 3)
    output = network(images())
    assert logits_of(output).shape == (2, 3, 64, 64)
    assert (isinstance(output, dict) and "aux" in output) == ("aux=true" in spec)
    assert preprocessing_of(network) is None  # whoever trains it decides
    assert task_of(spec) == "segment"


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models.segmentation))
@pytest.mark.parametrize("aux", [False, True])
def test_all_of_torchvisions_own(name: str, aux: bool) -> None:
    if name.startswith("lraspp"):
        with pytest.raises(UserError, match="has no option 'aux'"):
            segmenter(f"torchvision/{name}:aux={aux}")
        return
    with torch.device("meta"):
        network = segmenter(f"torchvision/{name}:aux={aux}")
    assert (network.aux_classifier is not None) == aux
    assert {value.shape[0] for key, value in network.state_dict().items() if "classifier.4" in key} == {3}


@pytest.mark.parametrize("name", ["deeplabv3", "fcn"])
def test_at_stride_8_a_composed_one_is_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = (segmenter(f"torchvision/{each}aux=true") for each in (f"{name}:stride=8,", f"{name}_resnet50:"))
    assert {key: value.shape for key, value in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert _convolutions(ours) == _convolutions(theirs)


def _convolutions(network: nn.Module) -> list[Any]:
    kinds = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    return [
        (name, conv.stride, conv.kernel_size, conv.dilation, conv.padding if conv.kernel_size != (1, 1) else None) for name, conv in kinds
    ]


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "timm/test_resnet"])
def test_the_stride_is_taken_out_of_the_last_stages(backbone: str, stride: int) -> None:
    network = segmenter(f"torchvision/deeplabv3:backbone={backbone},channels=8,stride={stride},aux=true").eval()
    maps = network.backbone(torch.zeros(1, 3, 128, 128))
    assert list(maps) == ["aux", "out"]
    assert maps["out"].shape[2:] == (128 // stride, 128 // stride)
    assert maps["aux"].shape[2:] == (128 // min(stride, 16),) * 2
    assert [conv[0].dilation[0] for conv in network.classifier[0].convs[1:4]] == [12 * 8 // stride, 24 * 8 // stride, 36 * 8 // stride]


def test_dilated_convolutions_see_what_strided_ones_saw() -> None:
    """Taking every second place of the dilated map gives the strided one, for a body of whole stages."""
    strided, dilated = (segmenter(f"torchvision/fcn:backbone=resnet18,stride={stride}").eval() for stride in (32, 16))
    dilated.load_state_dict(strided.state_dict())
    with torch.no_grad():
        few, many = (network.backbone(images())["out"] for network in (strided, dilated))
    torch.testing.assert_close(many[..., ::2, ::2], few, rtol=1e-4, atol=1e-5)


def test_a_vision_transformer_shows_all_its_blocks_and_takes_other_sizes() -> None:
    network = segmenter(f"torchvision/fcn:{VIT},aux=true", image_size=32).eval()
    options = network.stillhouse["options"]
    assert (options["img_size"], options["stride"], options["depth"]) == (32, 8, 3), "what builds it again, whatever the images"
    seen: dict[int, torch.Tensor] = {}
    for number, block in enumerate(network.backbone.blocks):
        block.register_forward_hook(lambda module, inputs, output, number=number: seen.update({number: output}))
    with torch.no_grad():
        maps = network.backbone(torch.rand(1, 3, 32, 48))
    assert [tuple(each.shape) for each in seen.values()] == [(1, 32, 4, 6)] * 3
    assert list(maps) == ["aux", "out"]
    assert torch.equal(maps["out"], seen[2])
    assert torch.equal(maps["aux"], seen[0])
    assert all(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(UserError, match="takes sides that its patches of 8 pixels divide, and got 32 x 44"):
        network(torch.rand(1, 3, 32, 44))


def test_the_maps_of_a_vision_transformer_are_timms() -> None:
    network = segmenter(f"torchvision/fcn:{VIT}", image_size=64).eval()
    plain = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0).eval()
    own = {key.removeprefix("backbone.network.model."): value for key, value in network.state_dict().items()}
    plain.load_state_dict({key: value for key, value in own.items() if key in plain.state_dict()}, strict=False)
    with torch.no_grad():
        expected = plain.forward_intermediates(images(), intermediates_only=True)[-1]
        torch.testing.assert_close(network.backbone(images())["out"], expected)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (f"torchvision/fcn:{VIT},stride=16", "asks for stride 16, but the patches of 'timm/vit_tiny_patch16_224' have a side of 8"),
        (f"torchvision/fcn:{VIT},dept=3", "network 'fcn' has no option 'dept'"),
        (f"torchvision/fcn:{VIT},features_only=true", "option 'features_only' of"),
        ("torchvision/fcn:backbone=timm/beit_base_patch16_224", "takes images of one size only"),
        ("torchvision/deeplabv3_resnet5", "did you mean 'deeplabv3_resnet50'?"),
        ("torchvision/deeplabv3:backbone=resnet19", "did you mean 'resnet18'?"),
        ("torchvision/deeplabv3:backbone=vgg11,stride=16", "expected [1, C, 4, 4] at stride 16"),
        ("torchvision/deeplabv3:stride=4", "expected a classifier's name and stride 8, 16 or 32"),
        ("torchvision/deeplabv3:chanels=8", "did you mean 'channels'?"),
        ("torchvision/deeplabv3:channels=0", "expected at least one"),
        ("torchvision/deeplabv3:channels=many", "expected for example channels=256"),
        ("torchvision/deeplabv3:aux=1", "expected for example aux=false"),
        ("torchvision/lraspp:aux=true", "has no option 'aux'"),
        ("torchvision/fcn_resnet50:weights_backbone=DEFAULT", "has no option 'weights_backbone'"),
        ("smp/unett", "did you mean 'unet'?"),
        ("smp/unet:encoder=resnet19", "did you mean 'resnet18'?"),
        ("smp/unet:encoder=timm/resnet19", "timm has no network 'resnet19'"),
        ("smp/unet:encoder_dept=3", "did you mean 'encoder_depth'?"),
        ("smp/unet:encoder_depth=9", "smp cannot make 'unet' with encoder_depth=9"),
        ("smp/unet:encoder_weights=imagenet", "has no option 'encoder_weights'"),
        ("smp/unet:checkpoint_path=x", "has no option 'checkpoint_path'"),
        ("smp/unet:pretrained_cfg={'url':'x'}", "has no option 'pretrained_cfg'"),
        ("smp/unet:activation=sigmoid", "has no option 'activation'"),
        ("smp/unet:aux_params={'classes':2}", "has no option 'aux_params'"),
        ("timm/resnet18", "as in torchvision/deeplabv3:backbone=timm/resnet18 or torchvision/lraspp:backbone=timm/resnet18"),
        ("torchvision/fcos", "is there to detect images, and what is asked for is to segment"),
        ("transformers/segfomer", "did you mean 'segformer'?"),
        ("transformers/nvidia/mit-b0", "a published one is made in Python and passed"),
        ("transformers/segformer:depts=(1,1)", "did you mean 'depths'?"),
        ("transformers/segformer:id2label={'0':'x'}", "option 'id2label' of"),
    ],
)
def test_what_cannot_be_is_named(spec: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        segmenter(spec)
    assert words in str(error.value)


def test_channels_and_tasks() -> None:
    assert logits_of(segmenter(UNET, channels=1)(images(1))).shape == (2, 3, 64, 64)
    with pytest.raises(UserError, match="3 channels and the data has 1, take one of smp"):
        segmenter(DEEPLAB, channels=1)
    for spec in (DEEPLAB, UNET, "torchvision/fcn_resnet50"):
        with pytest.raises(UserError, match="is there to segment images, and what is asked for is to classify"):
            open_model(spec, classes=3, channels=3)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=r"pip install 'stillhouse\[smp\]'"):
        segmenter(UNET)


@pytest.mark.parametrize("spec", [DEEPLAB, FCN, LRASPP, UNET, f"torchvision/fcn:{VIT},aux=true,img_size=32"])
def test_what_is_saved_opens_bit_equal(tmp_path: Path, spec: str) -> None:
    network = segmenter(spec, names=["sky", "sea", "land"], seed=3)
    network(images())  # moves the statistics
    set_preprocessing(network, IMAGENET)
    save_student(network, tmp_path / "student")
    again = load_student(tmp_path)
    assert weights_hash(again) == weights_hash(network)
    assert torch.equal(logits_of(again.eval()(images())), logits_of(network.eval()(images())))
    assert preprocessing_of(again) == IMAGENET
    assert (again.stillhouse["names"], task_of(str(tmp_path))) == (["sky", "sea", "land"], "segment")
    with pytest.raises(UserError, match="is there to segment images, and what is asked for is to detect"):
        open_model(str(tmp_path), classes=3, channels=3, task="detect")
    with pytest.raises(UserError, match=r"3 channel\(s\) and the data has 1"):
        segmenter(str(tmp_path), channels=1)


@pytest.mark.parametrize("spec", [DEEPLAB, FCN, LRASPP, UNET])
def test_classes_are_found_by_name(tmp_path: Path, spec: str) -> None:
    source = segmenter(spec, classes=4, names=["__background__", "sea", "land", "Air"], seed=1)
    save_student(source, tmp_path / "student")
    teacher = segmenter(str(tmp_path), names=["background", "air", "sea"])
    expected = source.eval()(images())
    found = teacher.eval()(images())
    torch.testing.assert_close(logits_of(found), logits_of(expected)[:, [0, 3, 1]], rtol=0, atol=1e-6)
    if spec == FCN:
        torch.testing.assert_close(found["aux"], expected["aux"][:, [0, 3, 1]], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="knows no class 'fire' of the data"):
        segmenter(str(tmp_path), names=["background", "air", "fire"])
    student = segmenter(str(tmp_path), names=["background", "air", "fire"], new_head=True).eval()
    assert logits_of(student(images())).shape == (2, 3, 64, 64)
    own = source.state_dict()
    body = [key for key in own if key.startswith(("backbone.", "encoder."))]
    assert all(torch.equal(student.state_dict()[key], own[key]) for key in body)


def test_published_classes_by_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    published = torchvision.models.get_model(
        "deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    ).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(published))
    spec = "torchvision/deeplabv3_mobilenet_v3_large"
    teacher = segmenter(spec, weights="pretrained", names=["person", "background", "dog"])
    assert torch.equal(teacher.state_dict()["classifier.4.weight"], published["classifier.4.weight"][[15, 0, 12]])
    assert not any(key.startswith("aux_classifier") for key in teacher.state_dict())
    assert preprocessing_of(teacher) == IMAGENET
    assert logits_of(teacher.eval()(images())).shape == (2, 3, 64, 64)
    with caplog.at_level(logging.INFO, "stillhouse"):
        student = segmenter(f"{spec}:aux=true", weights="pretrained", names=["person", "yak", "dog"], new_head=True)
    assert "no 'yak'" in caplog.text
    assert student.state_dict()["aux_classifier.4.weight"].shape[0] == 3
    assert torch.equal(student.state_dict()["aux_classifier.0.weight"], published["aux_classifier.0.weight"])
    with pytest.raises(UserError, match="knows 21 classes and the data has 3"):
        segmenter(spec, weights="pretrained")


def test_published_weights_of_the_backbone_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published = timm.create_model("test_resnet")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(published.state_dict()))
    for spec in (DEEPLAB, UNET):
        student = segmenter(spec, weights="pretrained", new_head=True)
        kept = {key.rpartition("layer1")[2]: value for key, value in student.state_dict().items() if "layer1" in key}
        assert kept
        assert all(torch.equal(value, published.layer1.state_dict()[key.removeprefix(".")]) for key, value in kept.items())
        assert preprocessing_of(student) == Preprocessing((0.5,) * 3, (0.5,) * 3, None, "bilinear")
        save_student(student, tmp_path / "student")
        assert weights_hash(load_student(tmp_path)) == weights_hash(student)
        with pytest.raises(UserError, match="has published weights for its backbone only"):
            segmenter(spec, weights="pretrained")


def test_no_network_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    for spec in ("torchvision/lraspp_mobilenet_v3_large", "torchvision/lraspp"):
        with pytest.raises(UserError, match="no network, or no such weights"):
            segmenter(spec, weights="pretrained", new_head=True)


SEGFORMER = "transformers/segformer:hidden_sizes=(8,16,16,32),depths=(1,1,1,1),num_attention_heads=(1,2,2,2),decoder_hidden_size=16"


def test_a_kind_of_transformers_is_made_by_name_and_opens_again(tmp_path: Path) -> None:
    network, again, other = (segmenter(SEGFORMER, seed=seed) for seed in (0, 0, 1))
    assert weights_hash(network) == weights_hash(again) != weights_hash(other)
    assert network.training
    assert logits_of(network(images())).shape == (2, 3, 16, 16)
    save_student(network, tmp_path / "student")
    opened = load_student(tmp_path)
    assert weights_hash(opened) == weights_hash(network)
    assert torch.equal(logits_of(opened.eval()(images())), logits_of(network.eval()(images())))
    with pytest.raises(UserError, match="is a kind of network and has no published weights"):
        segmenter(SEGFORMER, weights="pretrained")
