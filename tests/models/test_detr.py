from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models import families
from stillhouse.models.detr import KINDS, Detr, known_classes, known_names, open_detr, resized_size, save_detr, to_centres, to_corners
from stillhouse.models.families import Fit
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.models.specs import parse_spec
from stillhouse.models.weights import weights_hash

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CLASSES = 3
SMALL = "encoder_layers=1,decoder_layers=2,encoder_attention_heads=2,decoder_attention_heads=2,encoder_ffn_dim=64,decoder_ffn_dim=64"
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
BOTH_SORTS = pytest.mark.parametrize("kind", ["detr", "rt_detr"])  # one that masks padding, one that does not
FIT = Fit(CLASSES, 3, None, new_head=False)


def spec_of(kind: str, more: str = "") -> str:
    width = {"dab-detr": "hidden_size=32", "rt_detr": "d_model=32,encoder_hidden_dim=32"}.get(kind, "d_model=32")
    return f"transformers/{kind}:{width},{SMALL},num_queries=10,auxiliary_loss=true,backbone=test_resnet{more}"


def opened(spec: str, fit: Fit = FIT, pretrained: bool = False, **more: Any) -> Detr:
    return open_detr(parse_spec(spec), fit, pretrained, **more)[0]


def detector(kind: str = "detr", more: str = "") -> Detr:
    """A random one whose every parameter counts."""
    torch.manual_seed(0)
    network = opened(spec_of(kind, more))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    random = torch.Generator().manual_seed(0)
    images = [torch.rand(3, height, width, generator=random) for height, width in ((70, 90), (64, 50))]
    boxes = [torch.tensor([[3.0, 4.0, 30.0, 40.0], [50.0, 10.0, 90.0, 70.0]]), torch.tensor([[0.0, 0.0, 25.0, 64.0]])]
    return images, [{"boxes": boxes[0], "labels": torch.tensor([1, 3])}, {"boxes": boxes[1], "labels": torch.tensor([2])}]


def without_boxes(targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: value[:0] for key, value in target.items()} for target in targets]


@EVERY_KIND
def test_a_step_trains_all_of_it(kind: str) -> None:
    network = detector(kind)
    assert network.training
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(before) >= len(list(network.parameters())) - 2  # D-FINE's two constants
    optimizer = torch.optim.SGD(network.parameters(), lr=10.0)
    losses = network(*batch())
    assert all(value.ndim == 0 and value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.requires_grad and parameter.grad is None] == []
    optimizer.step()
    moved = {name for name, parameter in network.named_parameters() if name in before and not torch.equal(before[name], parameter)}
    assert {name for name in before if "backbone" in name} <= moved


@EVERY_KIND
@pytest.mark.parametrize("training", [True, False])
def test_the_losses_add_up_to_the_models_own(kind: str, training: bool) -> None:
    network = detector(kind).train(training)
    images, targets = batch()
    torch.manual_seed(1)  # dropout and denoising
    losses = network.losses(images, targets)
    torch.manual_seed(1)
    pixels, mask, frames = network._batch(images)
    wanted = [network._target(target, *frame) for target, frame in zip(targets, frames, strict=True)]
    whole = network.network(pixels, pixel_mask=mask, labels=wanted)
    torch.testing.assert_close(sum(losses.values()), whole.loss)
    denoised = {"loss_denoising"} if training and KINDS[kind].startswith("RT") else set()
    first = "loss_vfl" if KINDS[kind].startswith("RT") else "loss_ce"
    assert set(losses) == {first, "loss_bbox", "loss_giou", "loss_aux"} | denoised


def test_what_the_losses_weigh_is_said_by_the_configuration() -> None:
    network, twice = detector(), detector(more=",bbox_loss_coefficient=10")
    with torch.no_grad():
        a, b = (each.eval().losses(*batch()) for each in (network, twice))
    assert (b["loss_bbox"].item(), b["loss_giou"].item()) == (2 * a["loss_bbox"].item(), a["loss_giou"].item())
    assert "loss_aux" not in opened(spec_of("detr").replace("auxiliary_loss=true", "auxiliary_loss=false"))(*batch())


@EVERY_KIND
def test_images_without_objects(kind: str) -> None:
    network = detector(kind)
    images, targets = batch()
    names = set(network(images, targets))
    losses = network(images, without_boxes(targets))
    assert set(losses) == names  # averages over batches need them all
    assert {losses[name].item() for name in ("loss_bbox", "loss_giou")} == {0.0}
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.requires_grad and parameter.grad is None] == []


@BOTH_SORTS
def test_losses_in_eval_mode_change_nothing(kind: str) -> None:
    network = detector(kind).eval()
    before, random = weights_hash(network), torch.get_rng_state()
    once, again = (network.losses(*batch()) for _ in range(2))
    assert once == again
    assert weights_hash(network) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not network.training


corner = st.floats(0, 700, width=32)
side = st.floats(0, 300, width=32)


@given(corner, corner, side, side, st.integers(1, 1000), st.integers(1, 1000))
def test_boxes_there_and_back(x: float, y: float, w: float, h: float, height: int, width: int) -> None:
    boxes = torch.tensor([[x, y, x + w, y + h]])
    torch.testing.assert_close(to_corners(to_centres(boxes, height, width), height, width), boxes, rtol=1e-6, atol=5e-4)


def test_boxes_by_hand() -> None:
    centres = to_centres(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), 80, 40)
    assert centres.tolist() == [[0.5, 0.5, 0.5, 0.5]]
    assert to_corners(centres, 80, 40).tolist() == [[10.0, 20.0, 30.0, 60.0]]
    assert to_centres(torch.zeros(0, 4), 5, 5).shape == (0, 4)


@EVERY_KIND
@pytest.mark.parametrize("size", ["", ",size=128", ",size=(64,96)", ",size=100,longest=110"])
def test_who_predicts_the_targets_gets_them_back_in_pixels(kind: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was resized or padded; and so are boxes beyond the image cut off."""
    network = detector(kind, size).eval()
    images, targets = batch()
    seen: dict[str, Any] = {}

    def predict(pixels: Tensor, pixel_mask: Tensor, labels: list[dict[str, Tensor]] | None = None) -> Any:
        seen["shape"], seen["wanted"] = pixels.shape, labels or seen["wanted"]
        boxes, logits = torch.full((2, 10, 4), 2.0), torch.full((2, 10, CLASSES + (kind in ("detr", "table-transformer"))), -10.0)
        for i, wanted in enumerate(seen["wanted"]):
            count = len(wanted["boxes"])
            boxes[i, :count], logits[i, torch.arange(count), wanted["class_labels"]] = wanted["boxes"], 10.0 - torch.arange(count)
        return SimpleNamespace(logits=logits, pred_boxes=boxes, loss_dict={})

    monkeypatch.setattr(network.network, "forward", predict)
    network.losses(images, targets)
    for found, target, image in zip(network(images), targets, images, strict=True):
        count = len(target["labels"])
        torch.testing.assert_close(found["boxes"][:count], target["boxes"], rtol=0, atol=1e-3)
        assert torch.equal(found["labels"][:count], target["labels"])
        assert torch.equal(found["scores"], found["scores"].sort(descending=True).values)
        limits = torch.tensor([image.shape[2], image.shape[1]] * 2)
        assert bool((found["boxes"] >= 0).all() & (found["boxes"] <= limits).all())
    if "rt_" in kind or kind == "d_fine":
        assert seen["shape"][2] % 32 == seen["shape"][3] % 32 == 0  # its levels must nest
    elif size == ",size=(64,96)":
        assert seen["shape"][2:] == (64, 96)


@BOTH_SORTS
def test_detections_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Of its own processor, on the same folder: the resize, the normalisation and the reading of the outputs."""
    network = detector(kind, ",size=(64,96)").eval()
    save_detr(network, tmp_path)
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    images = [torch.randint(256, (3, 64, 96), dtype=torch.uint8), torch.randint(256, (3, 100, 80), dtype=torch.uint8)]
    with torch.no_grad():
        given = processor(images, return_tensors="pt")
        pixels, _, _ = network._batch([image / 255 for image in images])
        torch.testing.assert_close(given["pixel_values"], pixels, rtol=0, atol=0.02)  # they round to whole grey values in between
        output = theirs(pixels)
        wanted = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[image.shape[1:] for image in images])
        found = network([image / 255 for image in images])
    for ours, other, image in zip(found, wanted, images, strict=True):
        best = other["scores"].sort(descending=True, stable=True).indices
        torch.testing.assert_close(ours["scores"], other["scores"][best], rtol=1e-4, atol=1e-5)
        assert torch.equal(ours["labels"], other["labels"][best] + 1)
        limits = torch.tensor([image.shape[2], image.shape[1]] * 2)
        torch.testing.assert_close(ours["boxes"], torch.minimum(other["boxes"][best].clamp(min=0), limits), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(
    ("height", "width", "size", "longest", "wanted"),
    [
        (480, 640, None, None, (480, 640)),
        (480, 640, 800, 1333, (800, 1067)),
        (400, 1600, 800, 1333, (333, 1333)),
        (1600, 400, 800, 1333, (1333, 333)),
        (480, 640, (640, 640), None, (640, 640)),
        (1, 900, 100, 300, (1, 300)),
    ],
)
def test_sizes(height: int, width: int, size: Any, longest: int | None, wanted: tuple[int, int]) -> None:
    assert resized_size(height, width, size, longest) == wanted


@EVERY_KIND
def test_features_are_what_passes_the_neck(kind: str) -> None:
    network = detector(kind).eval()
    seen: dict[str, list[Tensor]] = {}
    for name in ("backbone", "neck"):
        network.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    decoded: list[int] = []
    network.network.model.decoder.register_forward_hook(lambda *_: decoded.append(1))
    images, _ = batch()
    network(images)
    whole, decodings = seen["neck"], len(decoded)
    levels = network.features(images)
    assert len(decoded) == decodings == 1
    assert len(levels) == len(whole) == {"deformable_detr": 4, "rt_detr": 3, "rt_detr_v2": 3, "d_fine": 3}.get(kind, 1)
    assert all(torch.equal(level, other) for level, other in zip(levels, whole, strict=True))
    assert all(level.ndim == 4 and level.shape[0] == 2 for level in levels)
    assert levels[-1].shape[1] == (256 if kind in ("rt_detr_v2", "d_fine") else 32)
    strides = [8, 16, 32, 64][: len(levels)] if len(levels) > 1 else [32]
    height, width = (96, 96) if len(levels) == 3 else (70, 90)
    assert [tuple(level.shape[2:]) for level in levels] == [(-(-height // stride), -(-width // stride)) for stride in strides]
    assert len(seen["backbone"]) == (3 if len(levels) > 1 else 4)
    seen["neck"][0].square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in network.named_parameters() if "backbone" in name and "conv1" in name)
    assert len(network(images)) == 2  # and it still goes all the way


def test_the_neck_is_the_decoders_memory() -> None:
    """In rows and columns as the image: position (y, x) of the map is the token y * width + x."""
    network = detector().eval()
    memory: list[Tensor] = []
    network.network.model.decoder.register_forward_hook(
        lambda module, inputs, named, output: memory.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    images, _ = batch()
    network(images)
    (level,) = network.features(images)
    assert torch.equal(level[:, :, 2, 1], memory[0][:, 2 * level.shape[3] + 1])


@EVERY_KIND
def test_saved_and_opened_again_bit_for_bit(kind: str, tmp_path: Path) -> None:
    network = detector(kind, ",size=96")
    network(*batch())  # moves the statistics
    save_detr(network.eval(), tmp_path)
    images, targets = batch()
    wanted, losses = network(images), network.losses(images, targets)
    file = load_file(tmp_path / "model.safetensors")
    for again in (opened(f"transformers/{tmp_path}", pretrained=True), opened(f"transformers/{tmp_path}", file=file)):
        assert again.training
        assert weights_hash(again) == weights_hash(network)
        assert (again.size, again.longest) == (96, 160)
        assert {type(module) for module in again.modules()} == {type(module) for module in network.modules()}
        again.eval()
        assert again.losses(images, targets) == losses
        for ours, other in zip(again(images), wanted, strict=True):
            assert all(torch.equal(ours[key], other[key]) for key in ("boxes", "labels", "scores"))


def test_weights_of_a_file_with_or_without_the_wrappers_name(tmp_path: Path) -> None:
    network = detector()
    for weights in (network.state_dict(), network.network.state_dict()):
        assert weights_hash(opened(spec_of("detr"), file=dict(weights))) == weights_hash(network)
    wrong = {key: value for key, value in network.state_dict().items() if "bbox_predictor" not in key}
    with pytest.raises(UserError, match=r"6 missing \(bbox_predictor"):
        opened(spec_of("detr"), file=wrong)
    opened(spec_of("detr"), file=wrong, allow_partial=True)


@BOTH_SORTS
def test_other_classes_get_a_new_head_or_a_refusal(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = detector(kind)
    save_detr(network, tmp_path)
    spec, more = f"transformers/{tmp_path}", Fit(5, 3, None, new_head=False)
    with pytest.raises(UserError, match="knows 3 classes and the data has 5"):
        opened(spec, more, pretrained=True)
    with pytest.raises(UserError, match="knows 3 classes and the data has 5"):
        opened(spec, more, file=load_file(tmp_path / "model.safetensors"))
    with caplog.at_level(logging.INFO, "stillhouse"):
        student = opened(spec, Fit(5, 3, None, new_head=True), pretrained=True)
    assert "new random classifier" in caplog.text
    images, targets = batch()
    targets[0]["labels"] = torch.tensor([5, 4])
    ours, theirs = student.network.model.encoder.state_dict(), network.network.model.encoder.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    student(images, targets)


def with_holes(folder: Path) -> Detr:
    """COCO's published detectors have 91 outputs for 80 classes, as its ids have holes."""
    torch.manual_seed(0)
    network = opened(spec_of("detr"), Fit(5, 3, None, new_head=False))
    network.network.config.id2label = {0: "N/A", 1: "cat", 2: "dog", 3: "N/A", 4: "owl"}
    save_detr(network, folder)
    return network.eval()


def test_outputs_that_are_no_class_are_skipped(tmp_path: Path) -> None:
    config = with_holes(tmp_path).network.config.to_dict()
    assert (known_classes(config), known_names(config)) == (3, ["cat", "dog", "owl"])
    assert (known_classes({}), known_names({})) == (2, ["LABEL_0", "LABEL_1"])
    teacher = opened(f"transformers/{tmp_path}", pretrained=True).eval()
    assert teacher.ids.tolist() == [1, 2, 4]
    assert teacher._target({"boxes": torch.zeros(2, 4), "labels": torch.tensor([3, 1])}, 1, 1)["class_labels"].tolist() == [4, 1]
    logits = torch.zeros(1, 2, 6)
    logits[0, 0, 4], logits[0, 1, 2], logits[0, 0, 3] = 4.0, 3.0, 9.0
    scores, queries, labels = teacher._best(logits)
    assert queries.tolist() == [[1, 0]]
    assert labels.tolist() == [[2, 3]]
    torch.testing.assert_close(scores[0, 1], logits.softmax(-1)[0, 0, 4])
    assert set(teacher.losses(*batch())) >= {"loss_ce"}
    student = opened(f"transformers/{tmp_path}", Fit(5, 3, None, new_head=True), pretrained=True)
    assert (student.ids.tolist(), student.network.class_labels_classifier.out_features) == ([0, 1, 2, 3, 4], 6)


def test_classes_are_found_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = with_holes(tmp_path)
    spec, images = f"transformers/{tmp_path}", batch()[0]
    birds = opened(spec, Fit(2, 3, None, new_head=False, names=["Owl", "cat"]), pretrained=True).eval()
    assert birds.ids.tolist() == [4, 1]
    with torch.no_grad():
        assert torch.equal(birds.network(torch.stack(images[:1])).logits, network.network(torch.stack(images[:1])).logits)
    save_detr(birds, tmp_path / "birds")
    assert known_names(birds.network.config.to_dict()) == ["cat", "owl"]  # what is not asked for is forgotten
    again = opened(f"transformers/{tmp_path / 'birds'}", Fit(2, 3, None, new_head=False, names=["cat", "owl"]), pretrained=True)
    assert again.ids.tolist() == [1, 4]
    with pytest.raises(UserError, match="knows no class 'eel' of the data"):
        opened(spec, Fit(1, 3, None, new_head=False, names=["eel"]), pretrained=True)
    assert opened(spec, Fit(3, 3, None, new_head=False, names=["cat", "eel", "dog"]), pretrained=True).ids.tolist() == [1, 2, 4]
    assert "know no class 'eel', but as many as the data has: taken in their order" in caplog.text


def test_names_are_saved(tmp_path: Path) -> None:
    network = opened(spec_of("detr"), Fit(2, 3, None, new_head=False, names=["cat", "dog"]))
    save_detr(network, tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).id2label == {0: "cat", 1: "dog"}
    back = opened(f"transformers/{tmp_path}", Fit(2, 3, None, new_head=False, names=["dog", "cat"]), pretrained=True)
    assert back.ids.tolist() == [1, 0]
    odd = opened(spec_of("detr"), Fit(2, 3, None, new_head=False, names=["n/a", "dog"]))  # a class, not a hole
    assert odd.ids.tolist() == [0, 1]
    assert known_classes(odd.network.config.to_dict()) == 2


@EVERY_KIND
def test_a_random_backbone_learns_its_normalisation(kind: str) -> None:
    """Frozen, its residual branches would stay scaled by the zeros they start with."""
    network = opened(spec_of(kind))
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.network.model.backbone.modules())
    frozen = opened(spec_of(kind, ",freeze_backbone_batch_norms=true"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.network.model.backbone.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in opened(spec_of(kind)).network.model.backbone.modules())


@BOTH_SORTS
def test_random_weights_of_a_published_configuration(kind: str, tmp_path: Path) -> None:
    """Whatever it freezes is not to stay random."""
    save_detr(opened(spec_of(kind, ",freeze_backbone_batch_norms=true")), tmp_path)
    for pretrained in (True, False):
        body = opened(f"transformers/{tmp_path}", pretrained=pretrained).network.model.backbone
        assert any(isinstance(module, nn.BatchNorm2d) for module in body.modules()) != pretrained
    small = {"d_model": 32, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 1, "num_labels": CLASSES}
    resnet = {"model_type": "resnet", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "embedding_size": 8, "layer_type": "basic"}
    transformers.DetrConfig(**small, backbone_config=resnet).save_pretrained(tmp_path / "resnet")
    again = opened(f"transformers/{tmp_path / 'resnet'}")
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert len(again(*batch())) == 3


@pytest.mark.parametrize("kind", ["detr", "rt_detr", "dab-detr"])
def test_published_weights_of_a_kind_are_its_backbones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def published(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        network = create(name, **options)
        if pretrained:
            torch.nn.init.constant_(network.get_submodule("layer2.0.conv1").weight, 0.25)
        return network

    monkeypatch.setattr("timm.create_model", published)
    student = Fit(CLASSES, 3, None, new_head=True)
    network = opened(spec_of(kind), student, pretrained=True)
    body = next(module for module in network.network.model.backbone.modules() if hasattr(module, "layer2"))
    assert bool((body.layer2[0].conv1.weight == 0.25).all())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())  # of ImageNet's statistics, frozen
    assert network.mean.flatten().tolist() == [0.5, 0.5, 0.5]  # what timm says of this one
    network(*batch())
    trained = opened(spec_of(kind, ",freeze_backbone_batch_norms=false"), student, pretrained=True)
    assert any(isinstance(module, nn.BatchNorm2d) for module in trained.network.model.backbone.modules())
    with pytest.raises(UserError, match="has published weights for its backbone only"):
        opened(spec_of(kind), pretrained=True)
    with pytest.raises(UserError, match="'rt_detr_resnet' has no published weights for a backbone"):
        opened(spec_of("rt_detr").replace(",backbone=test_resnet", ""), student, pretrained=True)


def test_freezing_keeps_activations() -> None:
    """Transformers replaces timm's normalisation with activation by a frozen one without."""
    spec = spec_of("detr").replace("test_resnet", "mobilenetv3_small_050")
    with pytest.raises(UserError, match="cannot freeze the normalisation of the backbone 'mobilenetv3_small_050' without losing"):
        opened(f"{spec},freeze_backbone_batch_norms=true")


def test_images_of_one_size_are_resized_to_it(tmp_path: Path) -> None:
    square = Fit(CLASSES, 3, 128, new_head=False)
    assert (opened(spec_of("detr"), square).size, opened(spec_of("detr", ",size=64"), square).size) == (128, 64)
    save_detr(detector(more=",size=(64,96)"), tmp_path)
    assert opened(f"transformers/{tmp_path}", square, pretrained=True).size == 128
    assert opened(f"transformers/{tmp_path}", pretrained=True).size == (64, 96)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_backbones_of_timm(backbone: str) -> None:
    network = opened(spec_of("detr").replace("test_resnet", backbone))
    assert network.features([torch.rand(3, 64, 96)])[0].shape == (1, 32, 2, 3)


@EVERY_KIND
def test_kinds_need_no_network(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.socket.connect", unknown)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr(families, "getproxies", dict)
    opened(spec_of(kind).replace(",backbone=test_resnet", ""))
    with pytest.raises(UserError, match="no network, or no such weights"):
        opened("transformers/no-such-house/no-such-detr", pretrained=True)


@BOTH_SORTS
def test_half_precision(kind: str) -> None:
    network = detector(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = network(*batch())
        found = network.eval()(batch()[0])
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert {value.dtype for each in found for value in each.values()} == {torch.float32, torch.int64}
    sum(losses.values()).backward()


def test_a_copy_has_its_own_taps() -> None:
    network = detector().eval()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    images, _ = batch()
    (level,), (other,) = network.features(images), twin.features(images)
    assert not level.any()
    assert other.any()
    assert twin.neck is not network.neck


def test_a_module_of_ones_own() -> None:
    inner = detector("rt_detr").network
    network = Detr(inner, size=64).eval()
    assert len(network(batch()[0])) == 2
    assert preprocessing_of(network).mean == (0.0, 0.0, 0.0)  # it normalises inside
    assert all(key.startswith("network.") for key in network.state_dict())
    with pytest.raises(UserError, match="Linear is no detector of transformers' DETR family"):
        Detr(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("transformers/dett", "no kind of detector 'dett'.*detr"),
        ("transformers/vit", "no kind of detector 'vit'"),
        ("transformers/detr:d_modell=32", "no option 'd_modell'.*d_model"),
        ("transformers/detr:trust_remote_code=true", "option 'trust_remote_code'.*is refused"),
        ("transformers/detr:backbone_config={}", "option 'backbone_config'.*is refused"),
        ("transformers/detr:use_timm_backbone=true", "option 'use_timm_backbone'.*is refused"),
        ("transformers/detr:backbone=resnet1", "timm has no network 'resnet1'.*resnet"),
        ("transformers/detr:backbone=5", "timm has no network '5'"),
        ("transformers/detr:d_model=large", "d_model"),
        ("transformers/detr:num_labels=7", "says num_labels=7 but the data asks for 3"),
        (spec_of("detr", ",size=0"), "size=0 is no size"),
        (spec_of("detr", ",size=big"), "size='big' is no size"),
        (spec_of("detr", ",size=(1,2,3)"), r"size=\(1, 2, 3\) is no size"),
        (spec_of("detr", ",size=()"), r"size=\(\) is no size"),
        (spec_of("detr", ",size=50,longest=20"), "longest=20 does not fit size=50"),
        (spec_of("detr", ",longest=20"), "longest=20 does not fit size=None"),
        (spec_of("detr", ",size=(64,64),longest=90"), "longest=90 does not fit"),
    ],
)
def test_what_cannot_be_opened(spec: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        opened(spec)


def test_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = detector()
    images, targets = batch()
    with pytest.raises(UserError, match="in training mode needs targets"):
        network(images)
    for labels in ([0, 1], [1, 4]):
        with pytest.raises(UserError, match=f"labels go from {labels[0]} to {labels[1]}, expected 1 to 3"):
            network(images, [{**targets[0], "labels": torch.tensor(labels)}, targets[1]])
    with pytest.raises(UserError, match="images of 3 channels and the data has 1"):
        opened(spec_of("detr"), Fit(3, 1, None, new_head=False))
    save_detr(network, tmp_path / "detr")
    with pytest.raises(UserError, match="comes with its own backbone"):
        opened(f"transformers/{tmp_path / 'detr'}:backbone=resnet18", pretrained=True)
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="is a 'vit', expected a detector"):
        opened(f"transformers/{tmp_path / 'vit'}", pretrained=True)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: pip install 'stillhouse\[transformers\]'"):
        opened(spec_of("detr"))


def test_old_processors_and_those_that_do_not_normalise(tmp_path: Path) -> None:
    network = detector()
    save_detr(network, tmp_path)
    told = tmp_path / "preprocessor_config.json"
    told.write_text('{"size": 80, "max_size": 100, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3]}')
    old = opened(f"transformers/{tmp_path}", pretrained=True)
    assert (old.size, old.longest, old.mean.flatten().tolist()) == (80, 100, [0.5] * 3)
    assert opened(f"transformers/{tmp_path}:size=60", pretrained=True).longest == 100
    told.write_text('{"size": {"height": 64, "width": 32}, "do_normalize": false, "image_mean": [0.5, 0.5, 0.5]}')
    plain = opened(f"transformers/{tmp_path}", pretrained=True)
    assert (plain.size, plain.mean.any().item(), plain.std.flatten().tolist()) == ((64, 32), False, [1.0] * 3)
    told.unlink()
    bare = opened(f"transformers/{tmp_path}", pretrained=True)
    assert (bare.size, bare.mean.flatten().tolist()) == (None, pytest.approx([0.485, 0.456, 0.406]))


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    save_detr(detector(), tmp_path)
    save_file({"strange": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 unexpected \\(strange\\)"):
        opened(f"transformers/{tmp_path}", pretrained=True)
