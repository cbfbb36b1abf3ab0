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


class Maps(nn.Module):
    """Maps of these (channels, rows, columns) from an image of 32 x 32, each from a module of its own."""

    def __init__(self, *shapes: tuple[int, int, int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(shape[1:]), nn.Conv2d(3, shape[0], 1)) for shape in shapes)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [level(images) for level in self.levels]


def levels(*shapes: tuple[int, int, int]) -> Levels:
    return Levels(Maps(*shapes), "+".join(f"levels.{number}" for number in range(len(shapes))))


def test_align_leaves_alone_what_fits() -> None:
    maps = [torch.randn(2, 8, 4, 4), torch.randn(2, 8, 2, 2)]
    pair = levels((8, 4, 4), (8, 2, 2)), levels((8, 4, 4), (8, 2, 2))
    align = Align(*pair)
    assert not list(align.parameters())
    assert all(a is b for a, b in zip(align(maps, maps), maps, strict=True))
    assert len(list(Align(*pair, always=True).parameters())) == 4


def test_align_brings_channels_and_grid() -> None:
    maps_S, maps_T = [torch.randn(2, 4, 4, 6)], [torch.randn(2, 8, 8, 12)]
    align = Align(levels((4, 4, 4)), levels((8, 8, 8)))
    assert align(maps_S, maps_T)[0].shape == maps_T[0].shape
    constant = align([torch.ones(1, 4, 4, 6)], maps_T)[0]
    torch.testing.assert_close(constant, constant[:, :, :1, :1].expand_as(constant))


def test_levels_must_be_as_many() -> None:
    with pytest.raises(UserError, match=r"the student has 2 level\(s\) and the teacher 3"):
        Align(levels((8, 4, 4), (8, 2, 2)), levels((8, 4, 4), (8, 2, 2), (8, 1, 1)))


def test_levels_must_get_coarser_together() -> None:
    fine_first, coarse_first = levels((8, 16, 16), (8, 8, 8)), levels((8, 4, 4), (8, 8, 8))
    with pytest.raises(
        UserError, match=r"^levels 1 and 2 have maps of 16 x 16 and 8 x 8 in the student and of 4 x 4 and 8 x 8 in the teacher: one gets"
    ):
        Align(fine_first, coarse_first)
    Align(fine_first, levels((8, 8, 8), (8, 4, 4)))  # of another stride
    Align(fine_first, levels((8, 8, 8), (8, 8, 8)))  # as a vision transformer's


def test_levels_must_have_cells_of_one_shape() -> None:
    with pytest.raises(
        UserError, match=r"^at level 1 the student has a map of 4 x 16 for an image of .* and the teacher one of 8 x 8 for .* other shapes"
    ):
        Align(levels((8, 4, 16)), levels((8, 8, 8)))
    Align(levels((8, 7, 8)), levels((8, 16, 16)))  # rounded


@pytest.mark.parametrize("min_size", [SIDE, 40, 64, 96])
def test_a_place_is_the_same_place_of_the_image_however_it_was_resized_and_padded(min_size: int) -> None:
    """Maps that hold where they are in the image, over batches that two detectors pad differently, meet in the same places."""
    student, teacher = tiny_detector(), tiny_detector()
    student.transform.min_size, student.transform.max_size = (min_size,), 2 * min_size
    teacher.transform.max_size = 100
    pair = Levels(student, "neck"), Levels(teacher, "neck")
    align, pictures = Align(*pair), [torch.rand(3, 30, 44), torch.rand(3, 50, 37)]
    maps_S, maps_T = (each.of(pictures) for each in pair)

    def places(seen: Levels, like: list[Tensor]) -> list[Tensor]:
        """[B, 2, h, w] of each level: y and x of a cell's middle, as shares of the image."""
        made = []
        for level in like:
            rows, columns = level.shape[-2:]
            y, x = ((torch.arange(count) + 0.5) / count for count in (rows, columns))
            shares = [(h / seen.frame.canvas[0], w / seen.frame.canvas[1]) for h, w in seen.frame.sizes]
            made.append(torch.stack([torch.stack(torch.meshgrid(y / h, x / w, indexing="ij")) for h, w in shares]))
        return made

    align.levels = nn.ModuleList(nn.Identity() for _ in maps_S)
    expected = places(pair[1], maps_T)
    for moved, wanted, own in zip(align(places(pair[0], maps_S), maps_T), expected, places(pair[0], maps_S), strict=True):
        low, high = own.amin((2, 3), keepdim=True), own.amax((2, 3), keepdim=True)  # beyond its own map a student has nothing to say
        torch.testing.assert_close(moved, wanted.clamp(low, high), rtol=1e-4, atol=1e-4)


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
