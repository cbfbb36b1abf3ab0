"""From a fuzzer's bytes to a document that is nearly right: a valid one in which some places hold something odd."""

from __future__ import annotations

import copy
import json
from typing import Any

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 255, 256, 65536, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.5, 1.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), "", "a", "0", "nan", "../../x", "/etc/passwd", "a\0b", "\ud800", "\u202e", "é" * 300),
    *("[/b]", "<script>", "{}", "!!python/object", [], [[]], [1, "a"], {}, {"a": 1}, {"": None}, [None] * 5, "1e5", "0x10", "2020-01-01"),
]
"""Values that somebody did not think of."""


def spoilt(document: Any, data: bytes) -> Any:
    """The document with an odd value, a missing entry or another of its own parts at some places, all chosen by the bytes."""
    document, taken = copy.deepcopy(document), iter(data)
    for first in taken:
        places = list(_places(document))
        if not places:
            return document
        holder, key = places[(first * 256 + next(taken, 0)) % len(places)]
        how, what = divmod(next(taken, 0), 32)
        if how == 0 and isinstance(holder, dict):
            del holder[key]
        elif how == 1:
            other, its_key = places[what % len(places)]
            if its_key in other if isinstance(other, dict) else its_key < len(other):
                holder[key] = copy.deepcopy(other[its_key])
        elif how == 2 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif how == 3:
            nested: Any = 0
            for _ in range(1 + 6 * what):
                nested = [nested]
            holder[key] = nested
        else:
            holder[key] = copy.deepcopy(ODD[(32 * how + what) % len(ODD)])
        if len(places) > 2000:
            return document
    return document


def _places(document: Any) -> Any:
    """Every (dictionary or list, key) of a document, not deeper than a few steps."""
    waiting = [(document, 0)]
    while waiting:
        holder, depth = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else []
        for key in keys:
            yield holder, key
            if depth < 6:
                waiting.append((holder[key], depth + 1))


def as_json(document: Any, data: bytes) -> bytes:
    """A spoilt document as JSON; for bytes that begin with 0, what follows as it is."""
    return data[1:] if data[:1] == b"\0" else json.dumps(spoilt(document, data)).encode()
