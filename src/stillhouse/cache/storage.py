"""How a teacher's numbers are kept: as floats, as whole numbers between the least and the greatest of a sample, or the largest few logits.

What is kept of values x [B, …] comes back as x' [B, …], and of each number |x' - x| is at most

- fp32: 0; fp16: 2^-11 |x| (and from 65520 on infinite); bf16: 2^-8 |x|: half a unit in the last place of 11 and 8 binary digits;
- int16, int8: half a step, (max - min) / (2 (2^bits - 1)) with max and min over the sample.

If no logit moves by more than e, softmax(x' / tau) lies within factors exp(±2 e / tau) of softmax(x / tau), so its L1 distance is at most
exp(2 e / tau) - 1. So much, times tau and the weight of its term, may KD's gradient in a sample's logits change.

With `top_k` the k largest logits are kept and the others' probability is spread evenly over them: each of the K - k becomes
logsumexp(others) - log(K - k). At temperature 1 the k kept probabilities and the others' sum m are then what they were, and the L1 distance
is at most 2 m. Divided by a temperature tau >= 1 the others' sum can only grow by it (Jensen), to m', and the distance is at most 2 m'.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from stillhouse.errors import UserError

Storage = Literal["fp32", "fp16", "bf16", "int16", "int8"]
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WHOLE = {"int16": torch.int16, "int8": torch.int8}


def pack(values: Tensor, storage: Storage) -> dict[str, Tensor]:
    """Numbers as they are kept: `values` [B, …], and of whole numbers `low` and `step` [B]: x' = low + step (values - least of its kind).

    Args:
        values: [B, …], finite.
        storage: fp32, fp16, bf16, int16 or int8.

    Raises:
        UserError: for another storage.
    """
    if storage in FLOATS:
        return {"values": values.to(FLOATS[storage])}
    if storage not in WHOLE:
        raise UserError(f"storage is '{storage}', expected one of {', '.join(get_args(Storage))}")
    kind = torch.iinfo(WHOLE[storage])
    flat = values.float().flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    step = (high - low) / (kind.max - kind.min)
    places = torch.where(step > 0, (flat - low) / step, 0).round().clamp(0, kind.max - kind.min)
    return {"values": (places + kind.min).to(WHOLE[storage]).view(values.shape), "low": low.squeeze(1), "step": step.squeeze(1)}


def pack_top(logits: Tensor, k: int, storage: Storage) -> dict[str, Tensor]:
    """The k largest logits of each sample as `pack` keeps them, their `classes` [B, k], and what each of the others becomes, `rest` [B].

    Args:
        logits: [B, K] with K > k.

    Raises:
        UserError: if these are not the logits of more than k classes.
    """
    if logits.ndim != 2 or not 0 < k < logits.shape[1]:
        raise UserError(f"top_k is {k}, expected 1 to {logits.shape[-1] - 1} of a classifier's classes, or none to keep all of them")
    logits = logits.float()
    values, classes = logits.topk(k)
    rest = logits.scatter(1, classes, -torch.inf).logsumexp(1) - math.log(logits.shape[1] - k)
    small = torch.int16 if logits.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    return {**pack(values, storage), "classes": classes.to(small), "rest": rest}


def unpack(kept: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What was kept, as numbers [B, *shape] of a dtype."""
    values = kept["values"]
    if "low" in kept:
        steps = values.flatten(1).float() - torch.iinfo(values.dtype).min
        values = (kept["low"][:, None] + kept["step"][:, None] * steps).view(values.shape)
    if "classes" in kept:
        values = kept["rest"][:, None].repeat(1, *shape).scatter(1, kept["classes"].long(), values.float())
    return values.to(dtype)
