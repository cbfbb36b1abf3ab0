"""Where the time of a training step goes, and what its multiply-adds alone would take at the speed this machine reaches on their shapes."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from stillhouse.data import Data
from stillhouse.distillers.base import Distiller
from stillhouse.errors import UserError
from stillhouse.measure.timing import seconds_of, spread, wait
from stillhouse.models.preprocessing import Preprocessing
from stillhouse.training.loop import Loop
from stillhouse.training.recipe import Recipe

PARTS = ("data", "student forward", "saliency", "teacher", "losses", "backward", "optimiser", "logging", "rest")
COUNTS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *rest, **named: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value, *rest, **named: (
        sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    ),
}
"""Operations of each kind of product; torch counts all but the fused attention of CPUs."""
REPEATS = 5
"""How often a product is computed to find how fast it can be."""


class Stopwatch:
    """Seconds by part. A part inside another one is not counted twice: what is inside interrupts what is around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.since = 0.0

    @property
    def now(self) -> str:
        """The part that is being timed, or "rest"."""
        return self.open[-1] if self.open else "rest"

    def begin(self, part: str) -> None:
        """What follows is this part's."""
        self._charge()
        self.open.append(part)

    def end(self) -> None:
        """What follows is again that part's which was interrupted."""
        self._charge()
        self.open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside is this part's."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def _charge(self) -> None:
        wait()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now


class Products(TorchDispatchMode):
    """Counts the matrix products, convolutions and fused attentions that run inside, by part and by what they are of; keeps one of each.

    The one that is kept holds on to its tensors, so a step needs as much memory more as its activations take.
    """

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self.watch = watch
        self.counts: dict[str, Counter[Any]] = defaultdict(Counter)
        self.calls: dict[Any, Callable[[], Any]] = {}
        self.flops: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = COUNTS.get(func._overloadpacket)
        if count is not None:
            key = (str(func), *(_look(each) for each in (*args, *kwargs.values())))
            self.counts[self.watch.now][key] += 1
            if key not in self.calls:
                held, named = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
                self.calls[key] = torch.no_grad()(lambda: func(*held, **named))
                self.flops[key] = int(count(*args, **kwargs, out_val=out))
        return out

    def seconds(self) -> dict[str, float]:
        """By part: what its products take when each is computed alone, the fastest of a few times."""
        best = {key: min(seconds_of(call) for _ in range(REPEATS)) for key, call in self.calls.items()}
        return {part: sum(number * best[key] for key, number in counts.items()) for part, counts in self.counts.items()}

    def operations(self) -> dict[str, int]:
        """By part: floating-point operations, two a multiply-add."""
        return {part: sum(number * self.flops[key] for key, number in counts.items()) for part, counts in self.counts.items()}


def profile(
    distiller: Distiller,
    data: Data,
    transforms: tuple[Any, Any],
    preprocessing: Preprocessing,
    recipe: Recipe,
    folder: Path,
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """Runs whole steps of the training loop, batches read as in a run, and says what each part of them takes.

    The bound of a part is the time of its matrix products, convolutions and attentions alone, each measured by itself on the very tensors
    of the step: what would be left if everything else cost nothing. In a part that has no bound of its own there is nothing to multiply.

    Args:
        distiller: what learns; it is trained.
        data: what batches are made of.
        transforms, preprocessing, recipe: as for `stillhouse.training.loop.Loop`.
        folder: where the loop would write; nothing is written.
        rounds: measured steps, after one that is not.

    Returns:
        A row each for the parts in `PARTS` that take any time, and one for the whole "step": `part`; `seconds` as (median, lower, upper
        quartile); `share` of the step; `bound_s` in seconds and `flops`, a step's floating-point operations.

    Raises:
        UserError: if there is no round to measure.
    """
    if rounds < 1:
        raise UserError(f"rounds is {rounds}, expected at least 1")
    loop, watch = Loop(distiller, data, transforms, preprocessing, recipe, folder), Stopwatch()
    batches = _endless(loop)
    with _watched(loop, watch):
        _step(loop, batches, watch)
        taken = [_step(loop, batches, watch) for _ in range(rounds)]
        products = Products(watch)
        with products:
            _step(loop, batches, watch)
    bounds, operations = products.seconds(), products.operations()
    whole = [sum(each.values()) for each in taken]
    rows = [_row(part, [each[part] for each in taken], whole, bounds.get(part, 0.0), operations.get(part, 0)) for part in PARTS]
    total = _row("step", whole, whole, sum(bounds.values()), sum(operations.values()))
    return [*(row for row in rows if row["seconds"].median > 0), total]


def _row(part: str, seconds: list[float], whole: list[float], bound: float, operations: int) -> dict[str, Any]:
    share = spread([mine / all_ for mine, all_ in zip(seconds, whole, strict=True)]).median
    return {"part": part, "seconds": spread(seconds), "share": share, "bound_s": bound, "flops": operations}


def _step(loop: Loop, batches: Iterator[tuple[Tensor, Any, Any]], watch: Stopwatch) -> dict[str, float]:
    """Seconds of each part of a step, with its share of a row of the log."""
    watch.seconds.clear()
    with watch.part("data"):
        batch = next(batches)
    with watch.part("rest"):
        loop.update(loop.step, *batch)
    with watch.part("logging"):
        loop.terms.mean(loop.accelerator)
    loop.step += 1
    watch.seconds["logging"] /= loop.recipe.log_every
    return {part: watch.seconds[part] for part in PARTS}


def _endless(loop: Loop) -> Iterator[tuple[Tensor, Any, Any]]:
    while True:
        for _, *batch in loop.batches.epoch(loop.step // loop.steps_per_epoch):
            yield batch[0], batch[1], batch[2]


@contextmanager
def _watched(loop: Loop, watch: Stopwatch) -> Iterator[None]:
    """Times what a step is made of, from outside: hooks and replaced methods, all of them taken away at the end."""
    distiller, handles = loop.distiller, []
    networks = {"student forward": [distiller.student], "teacher": _teachers(distiller)}
    for part, modules in networks.items():
        for module in modules:
            handles.append(module.register_forward_pre_hook(lambda *_, part=part: watch.begin(part), with_kwargs=True))
            handles.append(module.register_forward_hook(lambda *_: watch.end(), with_kwargs=True))
    methods = [(distiller, "forward", "losses"), (distiller, "scores", "saliency"), (loop.accelerator, "backward", "backward")]
    methods += [(player.optimizer, "step", "optimiser") for player in loop.players]
    with _replaced([each for each in methods if hasattr(each[0], each[1])], watch):
        yield
    for handle in handles:
        handle.remove()


def _teachers(distiller: Distiller) -> list[nn.Module]:
    """The frozen networks and their own parts, for some methods run a teacher only as deep as they need."""
    frozen = [network for name in distiller.frozen if (network := getattr(distiller, name, None)) is not None]
    return list(dict.fromkeys(module for network in frozen for module in (network, *network.children())))


@contextmanager
def _replaced(methods: list[tuple[Any, str, str]], watch: Stopwatch) -> Iterator[None]:
    before = [vars(owner).get(name) for owner, name, _ in methods]
    for owner, name, part in methods:
        setattr(owner, name, _timing(getattr(owner, name), part, watch))
    try:
        yield
    finally:
        for (owner, name, _), own in zip(methods, before, strict=True):
            delattr(owner, name) if own is None else setattr(owner, name, own)


def _timing(function: Callable[..., Any], part: str, watch: Stopwatch) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        with watch.part(part):
            return function(*arguments, **named)

    return timed


def _look(value: Any) -> Any:
    """What decides how long a product of it takes."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return tuple(map(_look, value)) if isinstance(value, (list, tuple)) else value
