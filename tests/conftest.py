"""Tiny networks with weights that matter: every family that is supported, built for real, small enough for a test."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from tests.counts import TRIED

CLASSES = 5
SIDE = 32
PATCHES = 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def scrambled(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The network with every parameter moved (positions, class tokens and layer scales start at nearly 0 and would hide mistakes).

    A function of the seed only; in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def tiny(name: str = "vit_tiny_patch16_224", *, seed: int = 0, **options: Any) -> nn.Module:
    """A timm transformer of 2 blocks, 2 heads, width 32, on 4 x 4 patches."""
    small = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return scrambled(lambda: timm.create_model(name, **{**small, **options}), seed)


def tiny_cnn(seed: int = 0) -> nn.Module:
    """A timm residual network whose last feature map is 4 x 4 on an image of 32."""
    options = {"num_classes": CLASSES, "output_stride": 8, "channels": (8, 8, 16, 16), "stem_width": 8}
    model = scrambled(lambda: timm.create_model("resnet10t", **options), seed)
    set_preprocessing(model, Preprocessing((0.5,) * 3, (0.5,) * 3, SIDE))  # as `tiny` wants its images
    return model


class Segmenter(nn.Module):
    """A segmenter as torchvision's are: `backbone`, `classifier`, logits [B, K, H, W] under "out". Without batch statistics."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 5, stride=4, padding=2), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))
        self.classifier = nn.Sequential(nn.GELU(), nn.Dropout(drop), nn.Conv2d(width, CLASSES, 1))
        self.stillhouse: Any = {"task": "segment", "spec": None, "family": "object", "name": None, "options": {}, "weights": "given"}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(self.backbone(images))
        return {"out": nn.functional.interpolate(logits, size=images.shape[-2:], mode="bilinear")}


def tiny_segmenter(seed: int = 0, width: int = 12, drop: float = 0.0) -> nn.Module:
    return scrambled(lambda: Segmenter(width, drop), seed)


def tiny_detector(seed: int = 0, width: int = 12) -> nn.Module:
    """torchvision's RetinaNet on three levels of `width` channels. Without batch statistics."""

    def build() -> nn.Module:
        body = nn.Sequential(
            OrderedDict(
                stem=nn.Sequential(nn.Conv2d(3, width, 3, stride=4, padding=1), nn.GELU()),
                one=nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GELU()),
                two=nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GELU()),
            )
        )
        levels = {"stem": "0", "one": "1", "two": "2"}
        backbone = BackboneWithFPN(body, levels, [width] * 3, width, extra_blocks=_NoMore())
        anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
        network = RetinaNet(backbone, CLASSES + 1, min_size=SIDE, max_size=SIDE, anchor_generator=anchors, detections_per_img=20)
        network.head = RetinaNetHead(width, anchors.num_anchors_per_location()[0], CLASSES + 1)
        return network

    return scrambled(build, seed)


class _NoMore(ExtraFPNBlock):
    """No level beyond the backbone's."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        return results, names


def tiny_transformers(name: str, **options: Any) -> nn.Module:
    """One of transformers' image or audio classifiers, as small as `tiny`, showing its attention when asked."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
    side = {} if name == "AST" else {"image_size": SIDE}
    config = getattr(transformers, f"{name}Config")(**small, **side, num_labels=CLASSES, attn_implementation="eager", **options)
    kind = "Audio" if name == "AST" else "Image"
    return scrambled(lambda: getattr(transformers, f"{name}For{kind}Classification")(config))


def images(batch: int = 2, *, side: int = SIDE, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def labels(batch: int = 2, *, seed: int = 0) -> Tensor:
    return torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(seed))


def masks(batch: int = 2, *, seed: int = 0) -> Tensor:
    return torch.randint(CLASSES, (batch, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))


def boxes(batch: int = 2, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """Two objects an image."""
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(batch, 2, 2, generator=random) * SIDE / 2
    sides = 6 + torch.rand(batch, 2, 2, generator=random) * SIDE / 4
    kinds = torch.randint(1, CLASSES + 1, (batch, 2), generator=random)
    return [{"boxes": torch.cat([corners[i], corners[i] + sides[i]], -1), "labels": kinds[i]} for i in range(batch)]


def permutations(batch: int, patches: int, seed: int = 0) -> Tensor:
    """All patches of each image in another order, int64 [batch, patches]."""
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed)).argsort(1)


@dataclass(frozen=True)
class Family:
    """A family of transformers that can run on some of its tokens."""

    title: str
    example: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor] = images


_AUDIO = {"num_mel_bins": 16, "max_length": 32, "frequency_stride": 8, "time_stride": 8}


def _timm(title: str, name: str, **options: Any) -> Family:
    return Family(title, f"timm/{name}", partial(tiny, name, **options))


def _transformers(name: str, **options: Any) -> Family:
    inputs = (lambda: torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))) if name == "AST" else images
    kind = "Audio" if name == "AST" else "Image"
    return Family(f"transformers {name}", f"{name}For{kind}Classification", partial(tiny_transformers, name, **options), inputs)


FAMILIES = [
    _timm("ViT, DeiT", "vit_tiny_patch16_224"),
    _timm("ViT with an average head", "vit_medium_patch16_gap_240", global_pool="avg"),
    _timm("ViT with registers and without class token", "vit_wee_patch16_reg1_gap_256"),
    _timm("distilled DeiT", "deit_tiny_distilled_patch16_224"),
    _timm("DeiT III", "deit3_small_patch16_224"),
    _timm("CLIP", "vit_base_patch16_clip_224"),
    _timm("SigLIP", "vit_base_patch16_siglip_224"),
    _timm("DINOv2 with registers", "vit_small_patch14_reg4_dinov2"),
    _timm("hybrid ViT", "vit_tiny_r_s16_p8_224", patch_size=1),
    _timm("EVA-02", "eva02_tiny_patch14_224"),
    _timm("DINOv3", "vit_small_patch16_dinov3"),
    _timm("rotary ViT", "vit_small_patch16_rope_224"),
    _timm("rotary ViT, angles by block and head", "vit_small_patch16_rope_mixed_224"),
    _timm("CaiT", "cait_xxs24_224"),
    _transformers("ViT"),
    _transformers("DeiT"),
    _transformers("Dinov2"),
    _transformers("Dinov2WithRegisters", num_register_tokens=4),
    _transformers("AST", **_AUDIO),
]
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was tried of bad and hostile input."""
    for kind, count in sorted(TRIED.items()):
        terminalreporter.write_line(f"{count:6} {kind}")
