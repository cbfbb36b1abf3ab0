"""Feature maps of detectors and segmenters: taken from a named place, level by level, and brought to the teacher's channels and grid."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from stillhouse.errors import UserError
from stillhouse.models.detectors import Frame, is_detector
from stillhouse.models.taps import as_map, channels_last, empty_image, layer_of, tap

PLACES: dict[str, tuple[str, ...]] = {
    "neck": ("neck", "decoder"),
    "backbone": ("backbone.body", "encoder", "backbone"),
    "logits": ("classifier", "segmentation_head.0", "decode_head"),
}
"""A role, and the modules that may play it, the first one there counts: torchvision's, segmentation-models-pytorch's, our wrappers'."""


def default_place(network: nn.Module) -> str:
    """What the papers distil: a detector's neck, a segmenter's logits."""
    return "neck" if is_detector(network) else "logits"


class Levels:
    """The feature maps of a network at a place, finest first as the network gives them; each pass forgets the one before.

    Args:
        network: a detector or segmenter; any network for module names.
        where: a role (`neck`, `backbone`, `logits`) or module names joined by `+`.

    Attributes:
        channels: of each level.
        grids: height and width of each level's map of an empty image, which is `canvas` (height, width) pixels large.

    Raises:
        UserError: if there is no such place, or the network does not run on an empty image.
    """

    def __init__(self, network: nn.Module, where: str) -> None:
        self.network, self.where = network, where
        self.names = _modules(network, where)
        self._seen: dict[str, Any] = {}
        self._channels_last: list[bool] = []
        self._frame: Frame | None = None
        transform = getattr(network, "transform", None)
        if isinstance(transform, GeneralizedRCNNTransform):
            transform.register_forward_hook(self._remember_frame)
        for name in self.names:
            # no closure: a copy of the network is to have taps of its own
            tap(network, name, partial(self._remember, name))
        maps, size = self._try()
        self.channels, self.grids = [level.shape[1] for level in maps], [(level.shape[-2], level.shape[-1]) for level in maps]
        self.canvas = self.frame.canvas if self.frame else size

    @property
    def frame(self) -> Frame | None:
        """Where the images of the last pass lie on the maps; None where the network does not say: they fill them."""
        told: Frame | None = getattr(self.network, "frame", None)  # transformers'
        return told or self._frame

    def _remember_frame(self, module: nn.Module, inputs: Any, output: Any) -> None:
        images, _ = output
        self._frame = Frame(tuple(images.tensors.shape[-2:]), images.image_sizes)

    def _remember(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._seen[name] = output

    def take(self) -> list[Tensor]:
        """The maps [B, C, H, W] of the last forward pass, with gradient; a second call without a pass between raises RuntimeError."""
        missing = [name for name in self.names if name not in self._seen]
        if missing:
            raise RuntimeError(f"{', '.join(missing)} has not run since '{self.where}' was last read")
        seen, self._seen = self._seen, {}
        levels = [level for name in self.names for level in _tensors(seen[name])]
        if not self._channels_last:  # told by the empty image, which is square: others may have as many rows as channels
            self._channels_last = [channels_last(level) for level in levels]
        return [self._as_map(level, last) for level, last in zip(levels, self._channels_last, strict=True)]

    def _as_map(self, level: Tensor, last: bool) -> Tensor:
        if level.ndim == 4:
            return level.permute(0, 3, 1, 2) if last else level
        return as_map(level, self.network)

    @torch.no_grad()
    def of(self, images: Any) -> list[Tensor]:
        """The maps of these images, without gradient; a detector runs no further than its neck."""
        network: Any = self.network
        inside = is_detector(network) and not any(name.startswith(("head", "rpn", "roi_heads")) for name in self.names)
        if inside and hasattr(network, "features"):
            network.features(images)
        elif inside:
            network.backbone(network.transform(list(images))[0].tensors)
        else:
            network(images)
        return self.take()

    def _try(self) -> tuple[list[Tensor], tuple[int, int]]:
        """The maps of an empty image and its height and width, with all modes put back."""
        network = self.network
        modes = {module: module.training for module in network.modules()}
        image = empty_image(network)
        try:
            network.eval()
            return self.of(list(image) if is_detector(network) else image), (image.shape[-2], image.shape[-1])
        except (RuntimeError, ValueError, AssertionError) as error:
            what = f"{type(network).__name__} does not run on an image of {tuple(image.shape[1:])}"
            raise UserError(f"{what}: {error}; tell its size by set_preprocessing") from error
        finally:
            for module, mode in modes.items():
                module.training = mode


def _modules(network: nn.Module, where: str) -> list[str]:
    known = {name for name, _ in network.named_modules() if name}
    if where not in PLACES:
        names = where.split("+")
        for name in names:
            layer_of(network, name)
        return names
    detectors_own = ("backbone",) if where == "neck" and is_detector(network) else ()  # torchvision's: the body and the pyramid on it
    found = next((name for name in (*PLACES[where], *detectors_own) if name in known), None)
    if found is None:
        raise UserError(
            f"{type(network).__name__} has no {where} that is known here; name its modules instead, joined by '+', "
            f"for example {', '.join(sorted(name for name in known if '.' not in name)) or 'none: it has no modules'}"
        )
    return [found]


def _tensors(output: Any) -> Iterable[Tensor]:
    """A module's map or maps: a tensor, a list, or torchvision's dictionary of levels."""
    if isinstance(output, Tensor):
        return [output]
    return output.values() if isinstance(output, dict) else [each for each in output if isinstance(each, Tensor)]


class OneMap:
    """One of the maps at a place: of several the first (0, the finest) or the last (-1), an encoder's own image among them left out.

    Args:
        network: a detector or segmenter; any network for module names.
        where: as for `Levels`.
        which: 0 or -1.
    """

    def __init__(self, network: nn.Module, where: str, which: int) -> None:
        self.levels = Levels(network, where)
        channels = self.levels.channels  # segmentation-models-pytorch's encoders begin with the image, and some leave a level empty
        images = channels[0] if len(channels) > 1 and channels[0] == empty_image(network).shape[1] else 0
        self.index = [number for number, width in enumerate(channels) if width and not (number == 0 and images)][which]
        self.channels = channels[self.index]

    def take(self) -> Tensor:
        """The map [B, C, H, W] of the last forward pass, with gradient, once."""
        return self.levels.take()[self.index]


class Align(nn.Module):
    """f_align: the student's maps with the teacher's channels, on the teacher's grid.

    Where the two networks resize or pad images differently, a place of the teacher's map gets what the student has at the same place of
    the image, not of the padded batch.

    Args:
        maps_S: the student's levels.
        maps_T: the teacher's.
        always: learn a 1x1 convolution where the channels agree too; by default they are left alone there.

    Raises:
        UserError: if student and teacher have different numbers of levels, or levels that cannot be meant for each other: one side's get
            coarser where the other's get finer, or the cells of one are not of the shape of the other's.
    """

    def __init__(self, maps_S: Levels, maps_T: Levels, *, always: bool = False) -> None:
        super().__init__()
        _refuse_what_does_not_pair(maps_S, maps_T)
        self.maps_S, self.maps_T = maps_S, maps_T
        pairs = zip(maps_S.channels, maps_T.channels, strict=True)
        self.levels = nn.ModuleList(nn.Identity() if s == t and not always else nn.Conv2d(s, t, 1) for s, t in pairs)

    def forward(self, maps_S: list[Tensor], maps_T: list[Tensor]) -> list[Tensor]:
        """Maps [B, C_S, h, w] of both networks' last passes to [B, C_T, H, W] of the teacher's, resized bilinearly where they differ."""
        shares = _shares(self.maps_S.frame, self.maps_T.frame)
        return [_resized(level(S), T.shape[-2:], shares) for level, S, T in zip(self.levels, maps_S, maps_T, strict=True)]


def _refuse_what_does_not_pair(maps_S: Levels, maps_T: Levels) -> None:
    count_S, count_T = len(maps_S.channels), len(maps_T.channels)
    if count_S != count_T:
        raise UserError(
            f"the student has {count_S} level(s) and the teacher {count_T}, expected as many: "
            "name the modules of both, joined by '+', or build both with the same levels"
        )
    levels = list(enumerate(zip(maps_S.grids, maps_T.grids, strict=True), 1))
    for (i, (first_S, first_T)), (j, (second_S, second_T)) in combinations(levels, 2):
        if (_places(first_S) - _places(second_S)) * (_places(first_T) - _places(second_T)) < 0:
            raise UserError(
                f"levels {i} and {j} have maps of {_by(first_S)} and {_by(second_S)} in the student and of {_by(first_T)} and "
                f"{_by(second_T)} in the teacher: one gets coarser and the other finer; name the modules of both in the same order"
            )
    for number, (grid_S, grid_T) in levels:
        (low_S, high_S), (low_T, high_T) = _slant(grid_S, maps_S.canvas), _slant(grid_T, maps_T.canvas)
        if low_S > high_T or low_T > high_S:
            raise UserError(
                f"at level {number} the student has a map of {_by(grid_S)} for an image of {_by(maps_S.canvas)} and the teacher one of "
                f"{_by(grid_T)} for {_by(maps_T.canvas)}: their cells have other shapes and are not of the same places; name other modules"
            )


def _places(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _slant(grid: tuple[int, int], canvas: tuple[int, int]) -> tuple[float, float]:
    """Bounds of a cell's width by its height, as a grid may have been rounded by a place."""
    (rows, columns), (height, width) = grid, canvas
    high = (rows + 1) / (columns - 1) if columns > 1 else float("inf")
    return (rows - 1) / (columns + 1) * width / height, high * width / height


def _shares(frame_S: Frame | None, frame_T: Frame | None) -> list[tuple[float, float]] | None:
    """How many times as large a share of the student's maps as of the teacher's an image has, in y and x; None where they are equal."""
    if frame_S is None or frame_T is None:
        return None
    shares = [
        (s[0] * frame_T.canvas[0] / (t[0] * frame_S.canvas[0]), s[1] * frame_T.canvas[1] / (t[1] * frame_S.canvas[1]))
        for s, t in zip(frame_S.sizes, frame_T.sizes, strict=True)
    ]
    return None if all(share == (1.0, 1.0) for share in shares) else shares


def _resized(maps: Tensor, size: torch.Size, shares: list[tuple[float, float]] | None) -> Tensor:
    if shares is not None:  # at x of the teacher's map, in [-1, 1], stands what the student has at share * (x + 1) - 1
        moves = [[[x, 0.0, x - 1], [0.0, y, y - 1]] for y, x in shares]
        theta = torch.tensor(moves).to(maps.device, non_blocking=True)
        grid = F.affine_grid(theta, [len(maps), 1, *size], align_corners=False)
        return F.grid_sample(maps.float(), grid, mode="bilinear", padding_mode="border", align_corners=False).to(maps.dtype)
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
