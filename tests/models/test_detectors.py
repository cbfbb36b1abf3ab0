from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models import detectors, families
from stillhouse.models.detectors import detection_losses, is_detector
from stillhouse.models.opening import open_model, task_of
from stillhouse.models.preprocessing import Preprocessing, preprocessing_of
from stillhouse.models.saving import load_student, save_student
from stillhouse.models.weights import weights_hash

FCOS = "torchvision/fcos:backbone=timm/test_resnet,channels=16,levels=3,convs=1"
RETINANET = "torchvision/retinanet:backbone=timm/test_resnet,channels=8,levels=3,convs=1"
FASTER = "torchvision/faster_rcnn:backbone=timm/test_resnet,channels=8,levels=3,hidden=16"
BUILDERS = [
    name
    for name in torchvision.models.list_models(module=torchvision.models.detection)
    if not name.startswith(("maskrcnn", "keypointrcnn"))
]


def detector(spec: str, classes: int = 2, **settings: Any) -> Any:
    return open_model(spec, classes=classes, channels=3, image_size=settings.pop("image_size", 64), task="detect", **settings)


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[4.0, 6.0, 40.0, 30.0], [30.0, 30.0, 50.0, 60.0]])
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    return [torch.rand(3, 64, 64, generator=generator) for _ in targets], targets


@pytest.mark.parametrize(
    "spec",
    [
        FCOS,
        RETINANET,
        FASTER,
        "torchvision/fcos:backbone=resnet18,channels=8,convs=0,levels=2,stride=16",
        "torchvision/retinanet:backbone=mobilenet_v2,channels=8,convs=0",
        "torchvision/faster_rcnn:backbone=mobilenet_v3_small,channels=8,hidden=8",
        "torchvision/fcos:backbone=timm/mobilenetv3_small_050,channels=48,levels=1,convs=1",
        "torchvision/ssdlite320_mobilenet_v3_large",
        "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",
    ],
)
def test_follows_torchvisions_contract(spec: str) -> None:
    state = torch.get_rng_state()
    network, again, other = (detector(spec, seed=seed) for seed in (0, 0, 1))
    assert weights_hash(network) == weights_hash(again) != weights_hash(other)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert is_detector(network)
    assert (network.stillhouse["task"], network.stillhouse["classes"], network.stillhouse["channels"]) == ("detect", 2, 3)
    images, targets = batch()
    losses = network(images, targets)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    for found in network.eval()(images):
        assert found["boxes"].shape == (len(found["labels"]), 4)
        assert found["scores"].shape == found["labels"].shape
        assert ((found["labels"] >= 1) & (found["labels"] <= 2)).all()
    assert preprocessing_of(network) == Preprocessing((0.0,) * 3, (1.0,) * 3, None, "bilinear")


@pytest.mark.parametrize("name", BUILDERS)
def test_all_of_torchvisions_own(name: str) -> None:
    with torch.device("meta"):
        network = detector(f"torchvision/{name}", classes=4)
    assert is_detector(network)
    heads = {layer.shape[0] for key, layer in network.state_dict().items() if "classification_head.cls_logits" in key or "cls_score" in key}
    assert all(rows % 5 == 0 for rows in heads)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("composed", "own"),
    [("retinanet", "retinanet_resnet50_fpn"), ("fcos", "fcos_resnet50_fpn"), ("faster_rcnn", "fasterrcnn_resnet50_fpn")],
)
def test_with_its_defaults_a_composed_one_is_torchvisions(composed: str, own: str) -> None:
    with torch.device("meta"):
        ours, theirs = (detector(f"torchvision/{name}", image_size=None) for name in (composed, own))
    assert {key: value.shape for key, value in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert _anchors(ours) == _anchors(theirs)
    assert (ours.transform.min_size, ours.transform.max_size) == (theirs.transform.min_size, theirs.transform.max_size) == ((800,), 1333)
    assert (ours.transform.image_mean, ours.transform.image_std) == (theirs.transform.image_mean, theirs.transform.image_std)


def _anchors(network: Any) -> Any:
    generator = getattr(network, "anchor_generator", None) or network.rpn.anchor_generator
    return generator.sizes, generator.aspect_ratios


@pytest.mark.parametrize(("stride", "levels"), [(4, 1), (4, 5), (4, 6), (8, 2), (8, 4), (16, 4), (32, 1)])
@pytest.mark.parametrize("name", ["retinanet", "fcos", "faster_rcnn"])
def test_levels_and_anchors_follow_the_stride(name: str, stride: int, levels: int) -> None:
    network = detector(f"torchvision/{name}:backbone=timm/test_resnet,channels=8,stride={stride},levels={levels},convs=1")
    strides = [stride * 2**i for i in range(levels)]
    maps = network.backbone.eval()(torch.zeros(1, 3, 256, 256))
    assert [value.shape for value in maps.values()] == [(1, 8, -(-256 // each), -(-256 // each)) for each in strides]
    first = {"retinanet": 4, "fcos": 1, "faster_rcnn": 8}[name]
    assert [sizes[0] for sizes in _anchors(network)[0]] == [first * each for each in strides]
    if name == "faster_rcnn":
        assert network.roi_heads.box_roi_pool.featmap_names == [key for key in maps if key.isdigit()]


def test_images_keep_their_size() -> None:
    images = [torch.rand(3, 96, 96)]
    for spec, side in ((FCOS, 96), (f"{FCOS},min_size=64", 64), ("torchvision/ssdlite320_mobilenet_v3_large", 320)):
        network = detector(spec, image_size=96)
        assert network.transform(images)[0].image_sizes == [(side, side)]
    assert detector(f"{FCOS},min_size=400").transform.max_size == 666  # as 800 is to 1333
    assert detector(f"{FCOS},min_size=400,max_size=500").transform.max_size == 500
    assert detector(f"{FCOS},score_thresh=0.05,nms_thresh=0.4").score_thresh == 0.05


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("torchvision/retinanet_resnet50", "did you mean 'retinanet_resnet50_fpn"),
        ("torchvision/maskrcnn_resnet50_fpn", "wants masks or keypoints"),
        ("torchvision/keypointrcnn_resnet50_fpn", "wants masks or keypoints"),
        ("torchvision/fcos:backbone=resnet19", "did you mean 'resnet18'?"),
        ("torchvision/fcos:backbone=timm/resnet19", "timm has no network 'resnet19', did you mean"),
        ("torchvision/fcos:backbone=swin_t", "shows no map of stride 8"),
        ("torchvision/fcos:backbone=timm/vit_tiny_patch16_224", "shows maps of stride [16, 16, 16], not 8"),
        ("torchvision/fcos:backbone=3", "expected a classifier's name"),
        ("torchvision/fcos:chanels=16", "has no option 'chanels', did you mean 'channels'?"),
        ("torchvision/fcos:hidden=16", "has no option 'hidden'"),
        ("torchvision/fcos:head=none", "has no option 'head'"),
        ("torchvision/fcos_resnet50_fpn:weights=DEFAULT", "has no option 'weights'"),
        ("torchvision/fcos:levels=x", "expected a whole number"),
        ("torchvision/fcos:levels=2.5", "expected a whole number"),
        ("torchvision/fcos:score_thresh=x", "expected a number"),
        ("torchvision/fcos:image_mean=0.5", "expected three numbers"),
        ("torchvision/fcos:levels=6", "one to 5 levels from there"),
        ("torchvision/fcos:levels=0", "one to 5 levels"),
        ("torchvision/fcos:stride=5", "stride 4, 8, 16, 32 and one to"),
        ("torchvision/retinanet:convs=5", "expected 0 to 4"),
        ("torchvision/faster_rcnn:convs=0", "expected 1 to 16"),
        ("torchvision/resnet18", "it can be the backbone of one, as in torchvision/fcos:backbone=resnet18"),
        ("timm/resnet18", "as in torchvision/fcos:backbone=timm/resnet18 or torchvision/retinanet:backbone=timm/resnet18"),
        ("smp/unet", "is there to segment images, and what is asked for is to detect"),
        ("torchvision/deeplabv3", "is there to segment images"),
    ],
)
def test_what_cannot_be_is_named(spec: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        detector(spec)
    assert words in str(error.value)


def test_three_channels_and_the_right_task() -> None:
    with pytest.raises(UserError, match="3 channels and the data has 1"):
        open_model(FCOS, classes=2, channels=1, task="detect")
    for spec in (FCOS, "torchvision/retinanet_resnet50_fpn"):
        with pytest.raises(UserError, match="is there to detect images, and what is asked for is to classify"):
            open_model(spec, classes=2, channels=3)
    specs = ("timm/resnet18", "torchvision/fcos", "torchvision/fcn", "smp/unet", "transformers/detr", "transformers/vit", "torchvision/x")
    assert [task_of(spec) for spec in specs] == ["classify", "detect", "segment", "segment", "detect", None, None]


@pytest.mark.parametrize("spec", [f"{FCOS},frozen_bn=true", f"{RETINANET},frozen_bn=true"])
def test_losses_in_eval_mode_are_those_of_training(spec: str) -> None:
    """With frozen normalisation, and nothing sampled, the two modes differ in nothing."""
    network, (images, targets) = detector(spec), batch()
    expected = network(images, targets)
    state = torch.get_rng_state()
    found = detection_losses(network.eval(), images, targets)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("spec", [FCOS, FASTER])
def test_losses_in_eval_mode_leave_the_network_alone(spec: str) -> None:
    network, (images, targets) = detector(spec).eval(), batch()
    before = weights_hash(network)
    losses = detection_losses(network, images, targets)
    sum(losses.values()).backward()
    assert any(parameter.grad is not None for parameter in network.backbone.body.parameters())
    assert weights_hash(network) == before
    assert not any(module.training for module in network.modules())
    assert len(network(images)) == 2
    network.train()
    assert detection_losses(network, images, targets).keys() == losses.keys()
    assert weights_hash(network) != before  # training moves the statistics


def test_a_detector_of_ones_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.inner = nn.Dropout(0.9), detector(FASTER)

        def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
            assert self.training == (targets is not None)
            return self.inner([self.drop(image) for image in images], targets)

    network, (images, targets) = Own().eval(), batch()
    assert is_detector(network)
    before = weights_hash(network)
    torch.manual_seed(0)
    losses = detection_losses(network, images, targets)
    torch.manual_seed(0)
    for key, value in detection_losses(network.inner, images, targets).items():
        assert torch.equal(losses[key], value)
    assert weights_hash(network) == before
    assert not is_detector(timm.create_model("test_resnet"))


@pytest.mark.parametrize(
    "spec", [FCOS, f"{RETINANET},frozen_bn=true,score_thresh=0.02", FASTER, "torchvision/ssdlite320_mobilenet_v3_large"]
)
def test_what_is_saved_opens_bit_equal(tmp_path: Path, spec: str) -> None:
    network, (images, targets) = detector(spec, names=["dog", "cat"], seed=3), batch()
    network(images, targets)  # moves the statistics
    save_student(network, tmp_path / "student")
    again = load_student(tmp_path)
    assert weights_hash(again) == weights_hash(network)
    for mine, theirs in zip(again.eval()(images), network.eval()(images), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert preprocessing_of(again) == preprocessing_of(network)
    assert (again.stillhouse["names"], again.stillhouse["task"]) == (["dog", "cat"], "detect")
    teacher = detector(str(tmp_path), image_size=128)
    assert weights_hash(teacher) == weights_hash(network)
    assert teacher.transform.min_size == network.transform.min_size  # as it was trained
    assert task_of(str(tmp_path)) == "detect"
    for wrong in ("classify", "segment"):
        with pytest.raises(UserError, match=f"is there to detect images, and what is asked for is to {wrong}"):
            open_model(str(tmp_path), classes=2, channels=3, task=wrong)


@pytest.mark.parametrize("spec", [FCOS, RETINANET, FASTER])
def test_classes_are_found_by_name(tmp_path: Path, spec: str) -> None:
    source = detector(spec, classes=3, names=["dog", "cat", "Cow"], seed=1)
    save_student(source, tmp_path / "student")
    teacher = detector(str(tmp_path), names=["cow", "dog"])
    assert teacher.stillhouse["names"] == ["cow", "dog"]
    maps = [torch.randn(1, source.backbone.out_channels, 4, 4)]
    if spec == FASTER:
        boxes = torch.randn(5, 16)
        for mine, theirs, size in zip(teacher.roi_heads.box_predictor(boxes), source.roi_heads.box_predictor(boxes), (1, 4), strict=True):
            torch.testing.assert_close(mine.unflatten(1, (3, size)), theirs.unflatten(1, (4, size))[:, [0, 3, 1]])
    else:
        mine, theirs = (network.head.eval()(maps)["cls_logits"] for network in (teacher, source))
        torch.testing.assert_close(mine, theirs[..., [0, 3, 1]])
    with pytest.raises(UserError, match=f"'{tmp_path}' knows no class 'hen' of the data, but a teacher must know the data's classes"):
        detector(str(tmp_path), names=["hen", "dog"])
    with pytest.raises(UserError, match="knows 3 classes and the data has 2"):
        detector(str(tmp_path))
    student = detector(str(tmp_path), names=["hen", "dog"], new_head=True)
    own = source.state_dict()
    changed = {key for key, value in student.state_dict().items() if value.shape != own[key].shape or not torch.equal(value, own[key])}
    assert changed == {key for key in own if "classification_head.cls_logits" in key or "box_predictor" in key}


def test_as_many_classes_of_other_names_are_taken_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = detector(FCOS, names=["0", "1"])
    save_student(source, tmp_path / "student")
    assert weights_hash(detector(str(tmp_path), names=["zero", "one"])) == weights_hash(source)
    assert "know no class 'zero', but as many as the data has: taken in their order" in caplog.text


def test_cocos_classes_by_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    spec = "torchvision/ssdlite320_mobilenet_v3_large"
    published = torchvision.models.get_model(spec.split("/")[1], weights=None, weights_backbone=None, num_classes=91).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(published))
    teacher = detector(spec, weights="pretrained", names=["dog", "cat"])
    for key, value in teacher.state_dict().items():
        if "classification_head" in key and key.endswith(("1.weight", "1.bias")) and value.shape != published[key].shape:
            assert torch.equal(value.unflatten(0, (-1, 3)), published[key].unflatten(0, (-1, 91))[:, [0, 18, 17]])
        else:
            assert torch.equal(value, published[key])
    with caplog.at_level(logging.INFO, "stillhouse"):
        student = detector(spec, weights="pretrained", names=["dog", "yak"], new_head=True)
    assert "new random class head" in caplog.text
    assert "no 'yak'" in caplog.text
    assert torch.equal(student.state_dict()["backbone.features.0.0.0.weight"], published["backbone.features.0.0.0.weight"])

    def no_download(*_: object, **__: object) -> None:
        raise AssertionError("it is downloaded before it is refused")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_download)
    with pytest.raises(UserError, match="knows no class 'yak' of the data"):
        detector(spec, weights="pretrained", names=["dog", "yak"])
    with pytest.raises(UserError, match="knows 90 classes and the data has 2"):
        detector(spec, weights="pretrained")


def test_cocos_file_is_taken_like_the_download(tmp_path: Path) -> None:
    spec = "torchvision/ssdlite320_mobilenet_v3_large"
    published = torchvision.models.get_model(spec.split("/")[1], weights=None, weights_backbone=None, num_classes=91).state_dict()
    torch.save(published, tmp_path / "coco.pth")
    teacher = detector(spec, weights=str(tmp_path / "coco.pth"), names=["person"], classes=1)
    key = "head.classification_head.module_list.0.1.bias"
    assert torch.equal(teacher.state_dict()[key].unflatten(0, (-1, 2)), published[key].unflatten(0, (-1, 91))[:, :2])


def test_no_network_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setattr(families, "_reachable", lambda host: False)
    for spec in ("torchvision/ssdlite320_mobilenet_v3_large", "torchvision/fcos:backbone=resnet18"):
        with pytest.raises(UserError, match="no network, or no such weights"):
            detector(spec, weights="pretrained", new_head=True)


def test_older_names_of_the_layers(tmp_path: Path) -> None:
    """torchvision's published files name the layers of pyramids and heads as earlier versions did."""
    source = detector(f"{RETINANET},frozen_bn=true", seed=1)
    old = {}
    for key, value in source.state_dict().items():
        key = key.replace("_blocks.0.0.", "_blocks.0.").replace("_blocks.1.0.", "_blocks.1.").replace("_blocks.2.0.", "_blocks.2.")
        old[key.replace("head.conv.0.0.", "head.conv.0.")] = value
    assert old.keys() != source.state_dict().keys()
    save_file(old, tmp_path / "w.safetensors")
    assert weights_hash(detector(f"{RETINANET},frozen_bn=true", weights=str(tmp_path / "w.safetensors"))) == weights_hash(source)
    del old["head.classification_head.cls_logits.weight"]
    save_file({**old, "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"1 missing \(head\.classification_head\.cls_logits\.weight\); 1 unexpected \(extra\)"):
        detector(RETINANET, weights=str(tmp_path / "w.safetensors"))


def test_published_weights_of_the_backbone_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(published))
    spec = "torchvision/fcos:backbone=resnet18,channels=8,levels=2,convs=0"
    student = detector(spec, weights="pretrained", new_head=True)
    body = student.backbone.body.state_dict()
    assert body
    assert all(torch.equal(value, published[key]) for key, value in body.items())
    assert student.stillhouse["options"]["frozen_bn"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in student.modules())
    trained = detector(f"{spec},frozen_bn=false", weights="pretrained", new_head=True)
    assert any(isinstance(module, nn.BatchNorm2d) for module in trained.modules())
    save_student(student, tmp_path / "student")
    assert weights_hash(load_student(tmp_path)) == weights_hash(student)
    with pytest.raises(UserError, match="has published weights for its backbone only, but a teacher must know"):
        detector(spec, weights="pretrained")


def test_timms_backbone_brings_its_own_statistics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published = timm.create_model("test_resnet")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(published.state_dict()))
    student = detector(FCOS, weights="pretrained", new_head=True)
    assert torch.equal(student.backbone.body.network.conv1[0].weight, published.conv1[0].weight)
    assert student.transform.image_mean == [0.5, 0.5, 0.5] != detector(FCOS).transform.image_mean
    save_student(student, tmp_path / "student")
    assert load_student(tmp_path).transform.image_mean == [0.5, 0.5, 0.5]


def test_frozen_normalisation_without_epsilon_as_torchvision_published_it() -> None:
    with torch.device("meta"):
        network = detector("torchvision/retinanet_resnet50_fpn:frozen_bn=true")
    frozen = [module for module in network.modules() if "Frozen" in type(module).__name__]
    assert len(frozen) == 53
    assert {module.eps for module in frozen} == {0.0}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_transformers_detectors_are_asked_for_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from stillhouse.models import detr

    wanted = list(inspect.signature(detr.open_detr).parameters)
    assert wanted == list(inspect.signature(detectors.open_detector).parameters)
    monkeypatch.setattr(detr, "open_detr", lambda spec, *_: (nn.Identity(), dict(spec.options)))
    assert detector("transformers/detr:d_model=16").stillhouse["options"] == {"d_model": 16}


def test_what_has_no_part_in_the_maps_does_not_learn() -> None:
    """timm keeps the stages behind the last map that is asked for; a parameter without gradient would make DDP wait."""
    network = detector("torchvision/fcos:backbone=timm/lcnet_035,channels=8,levels=2,stride=8,convs=1").train()
    sum(network(*batch()).values()).backward()
    idle = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert idle
    assert all(name.startswith("backbone.body.network.blocks.5") for name in idle)
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)
