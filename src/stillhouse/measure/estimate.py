"""What a step of plain training, full distillation and masked distillation costs here, and what masking could save at best.

Heavy libraries are imported inside: the command line reads this module's signature before it needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from stillhouse.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from stillhouse.distillers.base import Distiller

PLAIN, FULL, MASKED = "plain training", "full KD", "MaskedKD"


def estimate(
    teacher: nn.Module,
    student: nn.Module,
    *,
    image_size: int,
    channels: int,
    classes: int,
    batch: int,
    keeps: Sequence[float | int] = (1.0, 0.75, 0.5, 0.25),
    rounds: int = 5,
    precision: str = "fp32",
) -> list[dict[str, Any]]:
    """Measures whole training steps (forward, backward, AdamW) on random images, where the networks are; all in turn, in one process.

    Amdahl's bound of a row is what its step would take if masking cost nothing and the teacher's time were in proportion to its
    multiply-adds: the plain step + kept share x the teacher's forward pass, both measured in the same rounds.

    Args:
        teacher: a classifier; a copy on the same weights runs.
        student: a classifier; a copy is trained.
        image_size: side of the images as the student takes them, in pixels.
        channels: channels of an image.
        classes: how many classes both networks tell apart.
        batch: images in a step.
        keeps: shares in (0, 1] or numbers of patches that the teacher sees, a row of MaskedKD each.
        rounds: measured steps of each row, after one that is not.
        precision: "fp32", or "bf16" or "fp16" under autocast.

    Returns:
        A row each for plain training, full KD, and MaskedKD at each keep (or one that says in `refused` why these networks cannot):
        `name`, `method`, `keep`, `kept` and `patches`, `teacher_macs` per image; `step_s` in seconds and the ratios `of_plain`, `of_full`
        and `of_bound` as (median, lower, upper quartile); `bound_s` in seconds; `memory_bytes`, the weights and optimiser state that
        the row holds + what a step needs beyond at its peak, as `memory_of` measures it (`stillhouse.measure.timing.peak_memory`).

    Raises:
        UserError: if the networks do not take these images or do not tell `classes` apart, or a setting is out of range.
    """
    import copy

    import torch

    from stillhouse.measure.timing import interleaved

    _check(image_size, channels, classes, batch, precision)
    device = next(student.parameters()).device
    random = torch.Generator().manual_seed(0)
    images = torch.randn(batch, channels, image_size, image_size, generator=random).to(device)
    labels = torch.randint(classes, (batch,), generator=random).to(device)
    learner = copy.deepcopy(student).train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-5)
    rows, distillers = _rows(teacher, learner, images, keeps)
    _check_classes(distillers[FULL], images[:1], classes)
    steps = {name: _step(distiller.train(), optimizer, (images, labels), precision) for name, distiller in distillers.items()}
    seconds = interleaved({**steps, "teacher": _teacher_forward(distillers[FULL], images, precision)}, rounds)
    for row in rows:
        if row["name"] in steps:
            row |= _times(row, seconds, full_macs=rows[1]["teacher_macs"]) | _memory(distillers[row["name"]], optimizer, steps[row["name"]])
    return rows


def _check(image_size: int, channels: int, classes: int, batch: int, precision: str) -> None:
    for name, value in {"image_size": image_size, "channels": channels, "classes": classes, "batch": batch}.items():
        if value < 1:
            raise UserError(f"{name} is {value}, expected at least 1")
    if precision not in ("fp32", "bf16", "fp16"):
        raise UserError(f"precision is '{precision}', expected 'fp32', 'bf16' or 'fp16'")


def _check_classes(distiller: Distiller, image: Tensor, classes: int) -> None:
    import torch

    from stillhouse.models.outputs import logits_of

    with torch.no_grad():
        outputs = {"student": distiller.eval().student(image), "teacher": distiller.teach(image)}
    for role, output in outputs.items():
        known = logits_of(output).shape[-1]
        if known != classes:
            raise UserError(f"the {role} tells {known} classes apart, expected {classes}; give both networks a head of {classes} classes")


def _rows(
    teacher: nn.Module, learner: nn.Module, images: Tensor, keeps: Sequence[float | int]
) -> tuple[list[dict[str, Any]], dict[str, Distiller]]:
    """What is known without running, and who runs: each distiller hooks modules of its own, on weights that all share."""
    from stillhouse.distillers.classics.kd import KD
    from stillhouse.distillers.classics.scratch import Scratch
    from stillhouse.distillers.supervised.masked_kd import MaskedKD
    from stillhouse.measure.copies import with_frozen_weights, with_same_weights
    from stillhouse.measure.flops import macs

    def networks() -> tuple[nn.Module, nn.Module]:
        return with_same_weights(learner), with_frozen_weights(teacher)

    _, channels, height, width = images.shape
    macs(learner, (channels, height, width))  # says in a sentence when the student does not take these images
    full = KD(*networks())
    _, channels, height, width = full.refeed(images[:1]).shape
    shape = (channels, height, width)
    distillers: dict[str, Distiller] = {PLAIN: Scratch(with_same_weights(learner)), FULL: full}
    rows = [_row(PLAIN, teacher_macs=0), _row(FULL, teacher_macs=macs(teacher, shape))]
    try:
        MaskedKD(*networks(), keep=1.0)
    except UserError as reason:
        return [*rows, _row(MASKED, refused=str(reason))], distillers
    for keep in keeps:
        masked = MaskedKD(*networks(), keep=keep)
        row = _row(MASKED, keep=keep, kept=masked.kept, patches=masked.patches, teacher_macs=macs(teacher, shape, masked.kept))
        distillers[row["name"]] = masked
        rows.append(row)
    return rows, distillers


def _row(method: str, **known: Any) -> dict[str, Any]:
    row = {"name": method, "method": method, "keep": None, "kept": None, "patches": None, "teacher_macs": None, "refused": None} | known
    if row["keep"] is not None:
        row["name"] = f"{method} keep={row['keep']}"
    return row


def _step(distiller: Distiller, optimizer: Optimizer, batch: tuple[Tensor, Tensor], precision: str) -> Callable[[], None]:
    import torch

    def step() -> None:
        with _autocast(batch[0], precision):
            loss = torch.stack(list(distiller(batch).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _teacher_forward(distiller: Distiller, images: Tensor, precision: str) -> Callable[[], None]:
    def forward() -> None:
        with _autocast(images, precision):
            distiller.teach(images)

    return forward


def _autocast(images: Tensor, precision: str) -> AbstractContextManager[Any]:
    import torch

    return torch.autocast(images.device.type, torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "fp32")


def _times(row: dict[str, Any], seconds: dict[str, list[float]], full_macs: int) -> dict[str, Any]:
    from stillhouse.measure.timing import ratio, spread

    step, share = seconds[row["name"]], row["teacher_macs"] / full_macs
    bound = [plain + share * teacher for plain, teacher in zip(seconds[PLAIN], seconds["teacher"], strict=True)]
    return {
        "step_s": spread(step),
        "of_plain": ratio(step, seconds[PLAIN]),
        "of_full": ratio(step, seconds[FULL]),
        "bound_s": spread(bound).median,
        "of_bound": ratio(step, bound),
    }


def _memory(distiller: Distiller, optimizer: Optimizer, step: Callable[[], None]) -> dict[str, Any]:
    from torch import Tensor

    from stillhouse.measure.timing import peak_memory

    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    held = sum(tensor.nbytes for tensor in (*distiller.parameters(), *distiller.buffers(), *state))
    peak = peak_memory(step)
    return {"memory_bytes": held + peak.bytes, "memory_of": peak.of}
