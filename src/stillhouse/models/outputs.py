"""The logits, whatever the library that made the network wraps them in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stillhouse.errors import UserError


def logits_of(output: Any) -> Tensor:
    """The logits in a network's output: [B, K] of a classifier, [B, K, H, W] of a segmenter.

    A tensor is the logits itself; else they are its `.logits` (transformers, torchvision's GoogLeNet) or under `"out"` (torchvision's
    segmenters).

    Raises:
        UserError: if there are no logits in it.
    """
    logits = output.get("out") if isinstance(output, dict) and "out" in output else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the network returned {type(output).__name__}, expected logits or `.logits`; wrap it in a module that returns logits"
        )
    return logits


def classes_of(network: nn.Module) -> int | None:
    """How many classes a classifier knows, as its library or Stillhouse noted it; None where nobody did."""
    config, options = getattr(network, "config", None), getattr(network, "stillhouse", {}).get("options", {})
    noted = (
        getattr(network, "num_classes", None),
        getattr(config, "num_labels", None),
        options.get("num_classes"),
    )
    return next((int(number) for number in noted if number), None)
