"""How many patches a masked teacher sees: by a number, by a schedule, or by what it finds itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillers.base import Clock, Distiller
from stillhouse.errors import UserError
from stillhouse.masks.keep_rate import PROBES, KeepRate
from stillhouse.masks.schedules import Schedule
from stillhouse.masks.tokens import highest, keep_count
from stillhouse.measure.flops import macs
from stillhouse.models.outputs import logits_of
from stillhouse.models.taps import empty_image, looking
from stillhouse.models.tokens import OnSomeTokens

TOLERANCE, BUDGET = 0.1, 1.0


class Keeping(Distiller):
    """A distiller whose teacher runs on `kept` of its patches, those that `scores` ranks highest.

    Args:
        student: a classifier.
        teacher: a transformer that can run on some of its tokens.
        keep: a share in (0, 1], a number of patches, a schedule, or "auto" (see `stillhouse.masks.keep_rate`).
        tolerance, budget: of keep="auto".

    Raises:
        UserError: if the teacher cannot run on some of its tokens, or a setting is out of range.
    """

    prepared_on: ClassVar[int | None] = PROBES

    def __init__(
        self, student: nn.Module, teacher: nn.Module, keep: int | float | str | Mapping[float, float], tolerance: float, budget: float
    ) -> None:
        if keep != "auto" and (tolerance, budget) != (TOLERANCE, BUDGET):
            raise UserError(f"tolerance={tolerance} and budget={budget} are for keep='auto', but keep is {keep!r}: leave them out")
        some = OnSomeTokens(teacher)
        super().__init__(student, some)
        self.progress = 0.0
        self.schedule = Schedule(1.0 if keep == "auto" else keep)
        for value in self.schedule.values():
            keep_count(value, some.patches)
        self.rate = self._rate(tolerance, budget) if keep == "auto" else None
        self.probes, self.part = torch.empty(0), 0

    def _rate(self, tolerance: float, budget: float) -> KeepRate:
        shape_S, shape_T = (cast(tuple[int, int, int], empty_image(model).shape[1:]) for model in (self.student, self.teacher.model))
        return KeepRate(
            self.patches, lambda count: macs(self.teacher.model, shape_T, count), macs(self.student, shape_S), tolerance, budget
        )

    def scores(self, images: Tensor) -> Tensor:
        """How much each of the teacher's patches deserves to be seen: fp32 [B, N], on the teacher's grid. The student has just run."""
        raise NotImplementedError(f"{type(self).__name__} does not say which patches the teacher sees")

    def distillation(self, logits_S: Tensor, logits_T: Tensor) -> Tensor:
        """The student's loss from what the teacher says, unweighted; both logits [B, K]."""
        raise NotImplementedError(f"{type(self).__name__} does not say what the student learns from the teacher")

    @property
    def patches(self) -> int:
        """How many patches the teacher has to see when nothing is masked."""
        return int(self.teacher.patches)

    @property
    def kept(self) -> int:
        """How many patches the teacher sees at this point of the training."""
        return self.rate.kept if self.rate is not None else keep_count(self.schedule.at(self.progress), self.patches)

    def prepare(self, batches: Iterable[tuple[Any, Any]]) -> None:
        """Where keep finds itself: remembers the first few of these images to look at."""
        if self.rate is not None:
            self.probes = torch.stack(list(islice((image for images, _ in batches for image in images), PROBES)))
            self.rate.show(self.probes.device)

    def after_update(self, clock: Clock) -> None:
        """The schedule of keep follows the training's progress; where keep finds itself, it is revised when that is due."""
        self.progress = clock.progress
        if self.rate is not None and not len(self.probes):
            raise UserError("keep='auto' has no images to look at: call prepare([(images, labels)]) before the first step")
        if self.rate is not None and self.rate.due(clock.step, clock.steps, self.part):
            self.revise(self.rate, clock.step, clock.steps)

    def revise(self, rate: KeepRate, step: int, steps: int) -> None:
        """Sees where the teacher pulls the student on each rung and on all patches, and lets the keep rate choose.

        The same on every process: the images are, and so are the weights. Not compiled, so that no network is made for a keep never used.
        """
        with looking(self.student), torch.compiler.set_stance("force_eager"):
            logits_S = logits_of(self.student(self.probes))
            scores = self.scores(self.probes)
            chosen = [highest(scores, count) if count < self.patches else None for count in rate.counts]
            answers = [logits_of(self.teach(self.probes, keep)) for keep in chosen]
        logits_S = logits_S.detach().requires_grad_()
        losses = [self.distillation(logits_S, logits_T) for logits_T in answers]
        whole, *masked = (torch.autograd.grad(loss, logits_S)[0].flatten() for loss in losses)
        turned = [1 - F.cosine_similarity(pull, whole, dim=0) for pull in masked]
        distance, *found = torch.stack([losses[0].detach(), *turned]).tolist()
        rate.choose([0.0, *found], distance, step, steps)
        rate.show(whole.device)

    def watch(self) -> dict[str, Tensor]:
        """Where keep finds itself: `keep`, and what the last look found: how far the teacher's pull is `turned`, and `student_distance`."""
        return self.rate.figures if self.rate is not None else {}

    def news(self) -> str:
        """Why keep was changed."""
        return self.rate.news() if self.rate is not None else ""

    def get_extra_state(self) -> Tensor:
        """The schedule's place, for checkpoints, and how keep has found itself."""
        state = self.progress if self.rate is None else [self.progress, *self.rate.state()]
        return torch.tensor(state, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes up where a checkpoint left it."""
        self.progress, *found = state.flatten().tolist()
        if self.rate is not None:
            self.rate.restore(found)
            self.rate.show(self.probes.device)
