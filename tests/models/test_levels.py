"""Feature maps level by level: what a place is, what is taken from it, and how the student's maps meet the teacher's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.levels import Align, Levels, OneMap, default_place
from tests.conftest import CLASSES, SIDE, images, tiny, tiny_detector, tiny_segmenter


def test_a_detectors_neck_has_a_map_a_level() -> None:
    detector = tiny_detector()
    levels = Levels(detector, "neck")
    assert default_place(detector) == "neck"
    assert levels.channels == [12, 12, 12]
    pictures = list(images().sigmoid())
    detector(pictures)
    seen = levels.take()
    assert [tuple(each.shape[-2:]) for each in seen] == [(SIDE // 4,) * 2, (SIDE // 8,) * 2, (SIDE // 16,) * 2]
    expected = detector.backbone(detector.transform(pictures)[0].tensors).values()
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_a_detector_runs_no_further_than_its_neck() -> None:
    detector = tiny_detector()
    levels, ran = Levels(detector, "neck"), []
    detector.head.register_forward_hook(lambda *seen: ran.append("head"))
    maps = levels.of(list(images().sigmoid()))
    assert not ran
    assert not any(each.requires_grad for each in maps)


def test_a_segmenters_places() -> None:
    segmenter = tiny_segmenter()
    assert default_place(segmenter) == "logits"
    logits, backbone = Levels(segmenter, "logits"), Levels(segmenter, "backbone")
    assert (logits.channels, backbone.channels) == ([CLASSES], [12])
    out = segmenter(images())["out"]
    (taken,) = logits.take()
    assert taken.requires_grad
    assert torch.equal(nn.functional.interpolate(taken, size=out.shape[-2:], mode="bilinear"), out)
    assert backbone.take()[0].shape == (2, 12, SIDE // 4, SIDE // 4)


def test_modules_by_name_in_the_order_they_are_named() -> None:
    segmenter = tiny_segmenter()
    levels = Levels(segmenter, "classifier.2+backbone.0")
    assert levels.channels == [CLASSES, 12]


def test_a_transformers_tokens_are_laid_out_on_their_grid() -> None:
    levels = Levels(tiny(), "blocks.1")
    levels.of(images())
    tiny_map = levels.of(images())[0]
    assert tiny_map.shape == (2, 32, 4, 4)


def test_a_map_may_have_as_many_rows_as_channels() -> None:
    detector = tiny_detector(width=8)
    detector.transform.max_size = 2 * SIDE
    finest = Levels(detector, "neck").of([torch.rand(3, SIDE, SIDE + 16)])[0]
    assert finest.shape[1:3] == (8, SIDE // 4)
    assert finest.shape[3] > SIDE // 4

    class Last(nn.Module):
        def forward(self, maps: torch.Tensor) -> torch.Tensor:
            return maps.permute(0, 2, 3, 1)

    swin_like = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), Last())
    assert Levels(swin_like, "1").of(torch.rand(1, 3, 32, 48))[0].shape == (1, 8, 8, 12)


def test_what_was_taken_is_gone() -> None:
    segmenter = tiny_segmenter()
    levels = Levels(segmenter, "logits")
    with pytest.raises(RuntimeError, match="has not run since"):
        levels.take()
    segmenter(images())
    levels.take()
    with pytest.raises(RuntimeError, match="has not run since"):
        levels.take()


def test_a_copy_has_taps_of_its_own() -> None:
    pair = nn.ModuleDict({"network": tiny_segmenter()})
    pair.levels = Levels(pair["network"], "logits")
    copied = copy.deepcopy(pair)
    copied["network"](images())
    assert copied.levels.take()[0].shape[1] == CLASSES
    with pytest.raises(RuntimeError, match="has not run since"):
        pair.levels.take()


def test_trying_a_network_changes_nothing() -> None:
    segmenter = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    segmenter[2].eval()
    before = copy.deepcopy(segmenter.state_dict())
    Levels(segmenter, "1")
    assert segmenter.training
    assert segmenter[1].training
    assert not segmenter[2].training
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())


@pytest.mark.parametrize(
    ("where", "said"), [("nek", "has no layer 'nek'"), ("neck+x", "has no layer 'neck'"), ("neck", "has no neck that is known")]
)
def test_a_place_that_is_not_there(where: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Levels(nn.Sequential(nn.Conv2d(3, 4, 3)), where)


def test_align_leaves_alone_what_fits() -> None:
    maps = [torch.randn(2, 8, 4, 4), torch.randn(2, 8, 2, 2)]
    align = Align([8, 8], [8, 8])
    assert not list(align.parameters())
    assert all(a is b for a, b in zip(align(maps, maps), maps, strict=True))
    assert len(list(Align([8, 8], [8, 8], always=True).parameters())) == 4


def test_align_brings_channels_and_grid() -> None:
    maps_S, maps_T = [torch.randn(2, 4, 4, 6)], [torch.randn(2, 8, 8, 12)]
    aligned = Align([4], [8])(maps_S, maps_T)
    assert aligned[0].shape == maps_T[0].shape
    constant = Align([4], [8])([torch.ones(1, 4, 4, 6)], maps_T)[0]
    torch.testing.assert_close(constant, constant[:, :, :1, :1].expand_as(constant))


def test_levels_must_pair() -> None:
    with pytest.raises(UserError, match=r"the student has 2 level\(s\) and the teacher 3"):
        Align([8, 8], [8, 8, 8])


class Encoding(nn.Module):
    """An encoder as segmentation-models-pytorch's: the image, a level that is empty, and two of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, images: Tensor) -> Tensor:
        maps: list[Tensor] = self.encoder(images)
        return maps[-1]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 9, 2, 2)

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.first(images)
        return [images, images.new_zeros(len(images), 0, 16, 16), first, self.last(first)]


def test_one_map_of_several_is_the_first_or_the_last_of_the_encoders_own() -> None:
    network = Encoding()
    first, last = OneMap(network, "backbone", 0), OneMap(network, "backbone", -1)
    assert (first.channels, last.channels) == (6, 9)
    output = network(torch.randn(2, 3, 32, 32))
    assert torch.equal(last.take(), output)
    taken = first.take()
    assert taken.shape == (2, 6, 8, 8)
    assert taken.requires_grad
    with pytest.raises(RuntimeError, match="has not run since"):
        first.take()
    assert OneMap(network, "encoder.first", -1).channels == 6
