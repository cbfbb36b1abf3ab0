"""A keep rate that finds itself: how few patches a teacher may see follows from where it then pulls the student, looked at now and then.

The paper (arXiv 2302.10494) leaves open how many patches to keep; the rule is Stillhouse's own. With g the gradient of the distillation
loss by the student's logits, on a few training images, all in one vector,

    turned(K) = 1 - cos(g(teacher on K patches), g(teacher on all patches))

is 0 where masking changes nothing, 1 where the masked teacher pulls at right angles, and above 1 where it pulls back. How far the teacher
strays counts for more the nearer the student is to it. It is not looked at before the student has learnt something: what an untrained
student would show the teacher says nothing of what it will show it, so until then all patches are kept, or what the budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stillhouse.errors import UserError

LADDER = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15)
"""The shares of patches to choose from."""
LOOKS = 20
"""How often it looks at most, more often at the beginning: the i-th of n looks is when (i / (n + 1))^2 of the training is done."""
OVERHEAD = 0.02
"""The looks' share of the training's multiply-adds, at most."""
PROBES = 32
"""How many training images it looks at."""


class KeepRate:
    """The smallest share of patches on which the teacher still pulls the student nearly where it would on all of them.

    A rung of the ladder will do if turned(rung) < tolerance. The smallest such rung is taken, or a smaller one if the budget wants it.

    Args:
        patches: how many there are.
        macs_T: the teacher's multiply-adds for an image on so many patches.
        macs_S: the student's for an image.
        tolerance: at least 0; 0 keeps all patches, above 2 the fewest.
        budget: the teacher's multiply-adds, mean over the training, as a share of those on all patches, at most.

    Raises:
        UserError: if tolerance or budget is out of range, or the budget is below the smallest rung's cost.
    """

    def __init__(self, patches: int, macs_T: Callable[[int], int], macs_S: int, tolerance: float, budget: float) -> None:
        self.counts = [max(1, round(share * patches)) for share in LADDER]
        every = macs_T(patches)
        self.costs = [macs_T(count) / every for count in self.counts]
        self.relative_S = macs_S / every
        for name, value, low, high in (("tolerance", tolerance, 0.0, math.inf), ("budget", budget, self.costs[-1], 1.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise UserError(
                    f"{name} is {value}, expected a number from {low:.3g} to {high:g}; on {LADDER[-1]:.0%} of its patches, the fewest, the "
                    f"teacher needs {self.costs[-1]:.3g} of its multiply-adds"
                )
        self.tolerance, self.budget = tolerance, budget
        self.rung = self.within(budget)
        self.spent, self.looked, self.looks = 0.0, 0, -1
        self.turned, self.distance, self._news = 0.0, 0.0, ""
        self.figures: dict[str, Tensor] = {}

    @property
    def kept(self) -> int:
        """How many patches are kept now."""
        return self.counts[self.rung]

    def within(self, allowance: float) -> int:
        """The largest rung that costs no more."""
        return next((rung for rung, cost in enumerate(self.costs) if cost <= allowance + 1e-9), len(self.costs) - 1)

    def due(self, step: int, steps: int, batch: int) -> bool:
        """Counts an update on `batch` images, of which `step` of `steps` are done; whether it is time to look.

        How many looks there will be is settled at the first update: at most `LOOKS`, and no more than `OVERHEAD` pays for if the training
        were as cheap as it can get.
        """
        self.spent += self.costs[self.rung]
        if self.looks < 0:
            look, update = PROBES * (self.relative_S + sum(self.costs)), batch * (3 * self.relative_S + self.costs[-1])
            self.looks = min(LOOKS, int(OVERHEAD * steps * update / look))
            if not self.looks:
                self._news = f"keep {LADDER[self.rung]:g}, to the end: so short a training does not pay for finding another"
        number = int((self.looks + 1) * math.sqrt(step / steps) + 1e-9)
        if number <= self.looked or step >= steps:
            return False
        self.looked = number
        return True

    def choose(self, turned: Sequence[float], distance: float, step: int, steps: int) -> None:
        """Takes the rung that these call for, `step` updates of `steps` being done.

        Args:
            turned: of each rung; the first is that on all patches, 0.
            distance: the student's distillation loss from the teacher on all patches; only told.
            step, steps: updates that are done, and all.
        """
        enough = max(rung for rung, each in enumerate(turned) if rung == 0 or each < self.tolerance)
        before, self.rung = self.rung, max(enough, self.within((self.budget * steps - self.spent) / (steps - step)))
        self.turned, self.distance = turned[self.rung], distance
        if self.rung != before:
            self._news = self._reason(before, enough, turned)

    def _reason(self, before: int, enough: int, turned: Sequence[float]) -> str:
        said = f"keep {LADDER[before]:g} -> {LADDER[self.rung]:g}: that turns the teacher's pull by {self.turned:.2f}"
        if self.rung > enough:
            return f"{said}; more than {self.kept} patches would exceed the budget of {self.budget:g}"
        fewer = self.rung + 1
        also = f", {LADDER[fewer]:g} would by {turned[fewer]:.2f}" if fewer < len(LADDER) else ""
        return f"{said}{also}; the tolerance is {self.tolerance:g}; the student's distance from the teacher {self.distance:.3g}"

    def news(self) -> str:
        """Why the rung was last changed; once."""
        told, self._news = self._news, ""
        return told

    def show(self, device: torch.device) -> None:
        """Lays out `figures`: what is kept and, once it has looked, what the last look found, for curves."""
        named = {"keep": LADDER[self.rung]}
        named |= {"turned": self.turned, "student_distance": self.distance} if self.looked else {}
        self.figures = {name: torch.full((), value, device=device) for name, value in named.items()}

    def state(self) -> list[float]:
        """What a checkpoint has to hold."""
        return [self.rung, self.spent, self.looked, self.looks, self.turned, self.distance]

    def restore(self, state: Sequence[float]) -> None:
        """Puts `state` back."""
        rung, self.spent, looked, looks, self.turned, self.distance = state
        self.rung, self.looked, self.looks = int(rung), int(looked), int(looks)
