"""The logits, whatever the library that made the network wraps them in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stillhouse.errors import UserError


def logits_of(output: Any) -> Tensor:
    """The logits [B, K] in a network's output: a tensor itself, or an object with `.logits` (transformers, torchvision's GoogLeNet).

    Raises:
        UserError: if there are no logits in it.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the network returned {type(output).__name__}, expected logits or `.logits`; wrap it in a module that returns logits"
        )
    return logits
