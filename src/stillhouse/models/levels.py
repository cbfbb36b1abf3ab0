"""Feature maps of detectors and segmenters: taken from a named place, level by level, and brought to the teacher's channels and grid."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.detectors import is_detector
from stillhouse.models.taps import as_map, channels_last, empty_image, layer_of

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

    Raises:
        UserError: if there is no such place, or the network does not run on an empty image.
    """

    def __init__(self, network: nn.Module, where: str) -> None:
        self.network, self.where = network, where
        self.names = _modules(network, where)
        self._seen: dict[str, Any] = {}
        self._channels_last: list[bool] = []
        for name in self.names:
            # no closure: a copy of the network is to have taps of its own
            layer_of(network, name).register_forward_hook(partial(self._remember, name))
        self.channels = [level.shape[1] for level in self._try()]

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

    def _try(self) -> list[Tensor]:
        """The maps of an empty image, with all modes put back."""
        network = self.network
        modes = {module: module.training for module in network.modules()}
        image = empty_image(network)
        try:
            network.eval()
            return self.of(list(image) if is_detector(network) else image)
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

    Args:
        channels_S: of the student's levels.
        channels_T: of the teacher's.
        always: learn a 1x1 convolution where the channels agree too; by default they are left alone there.

    Raises:
        UserError: if student and teacher have different numbers of levels.
    """

    def __init__(self, channels_S: list[int], channels_T: list[int], *, always: bool = False) -> None:
        super().__init__()
        if len(channels_S) != len(channels_T):
            raise UserError(
                f"the student has {len(channels_S)} level(s) and the teacher {len(channels_T)}, expected as many: "
                "name the modules of both, joined by '+', or build both with the same levels"
            )
        pairs = zip(channels_S, channels_T, strict=True)
        self.levels = nn.ModuleList(nn.Identity() if s == t and not always else nn.Conv2d(s, t, 1) for s, t in pairs)

    def forward(self, maps_S: list[Tensor], maps_T: list[Tensor]) -> list[Tensor]:
        """Maps [B, C_S, h, w] to [B, C_T, H, W] of the teacher's, resized bilinearly where the grids differ."""
        return [_resized(level(S), T.shape[-2:]) for level, S, T in zip(self.levels, maps_S, maps_T, strict=True)]


def _resized(maps: Tensor, size: torch.Size) -> Tensor:
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
