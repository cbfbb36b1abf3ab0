from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.models.inherit import inherit
from stillhouse.models.opening import open_model
from stillhouse.models.weights import weights_hash

DETECTORS = [
    "torchvision/fcos:backbone={},channels=8,levels=2,convs=1",
    "torchvision/retinanet:backbone={},channels=8,levels=4,stride=16,convs=1",
    "torchvision/faster_rcnn:backbone={},channels=8,levels=2,hidden=8",
]
SMALL, LARGE = "timm/test_resnet", "timm/mobilenetv3_small_050"


@pytest.mark.parametrize("spec", DETECTORS)
def test_a_detectors_head_and_pyramid_are_inherited_and_its_body_is_not(spec: str) -> None:
    student, source = (open_model(spec.format(body), classes=2, channels=3, task="detect", seed=i) for i, body in enumerate((SMALL, LARGE)))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    teacher = weights_hash(source)
    names = inherit(student, source)
    own, given = student.state_dict(), source.state_dict()
    outside = [key for key in own if not key.startswith("backbone.body.")]
    laterals = [key for key in outside if "fpn.inner_blocks" in key and own[key].shape != given[key].shape]
    assert laterals  # the 1x1 convolutions read the bodies' own channels
    assert set(names) == set(outside) - set(laterals)
    assert all(torch.equal(own[key], given[key]) for key in names)
    assert all(torch.equal(own[key], before[key]) for key in own if key not in names)
    assert weights_hash(source) == teacher
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_same_backbone_is_not_inherited_either() -> None:
    student, source = (open_model(DETECTORS[0].format(SMALL), classes=2, channels=3, task="detect", seed=seed) for seed in (0, 1))
    names = inherit(student, source)
    assert set(names) == {key for key in student.state_dict() if not key.startswith("backbone.body.")}
    assert not torch.equal(student.backbone.body.network.conv1[0].weight, source.backbone.body.network.conv1[0].weight)


@pytest.mark.parametrize(
    ("spec", "body"),
    [("torchvision/deeplabv3:backbone=timm/test_resnet,channels=8", "backbone."), ("smp/fpn:encoder=timm/test_resnet", "encoder.")],
)
def test_a_segmenters_head_is_inherited(spec: str, body: str) -> None:
    student, source = (open_model(spec, classes=2, channels=3, task="segment", seed=seed) for seed in (0, 1))
    assert set(inherit(student, source)) == {key for key in student.state_dict() if not key.startswith(body)}


def test_other_classes_keep_their_own_outputs() -> None:
    student, source = (open_model(DETECTORS[0].format(SMALL), classes=classes, channels=3, task="detect") for classes in (2, 3))
    kept = {key for key in student.state_dict() if not key.startswith("backbone.body.")} - set(inherit(student, source))
    assert kept == {"head.classification_head.cls_logits.weight", "head.classification_head.cls_logits.bias"}


def test_a_backbone_inside_another_module_is_left_out() -> None:
    def network() -> nn.Module:
        inner = nn.ModuleDict({"backbone": nn.Linear(2, 2), "encoder": nn.Linear(2, 2)})
        return nn.ModuleDict({"network": inner, "head": nn.Linear(2, 2)})

    names = inherit(network(), network())
    assert names == ["network.encoder.weight", "network.encoder.bias", "head.weight", "head.bias"]


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(UserError, match="can inherit nothing from Sequential: outside their backbones no weights agree"):
        inherit(nn.Linear(2, 2), nn.Sequential(nn.Linear(3, 3)))
