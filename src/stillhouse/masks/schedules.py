"""How much is shown, and when: values that change at given points of the training and stay constant between, so that shapes stay static."""

from __future__ import annotations

from collections.abc import Mapping

from stillhouse.errors import UserError


class Schedule:
    """A number that depends on the training's progress, piecewise constant.

    Args:
        value: a number for the whole training; or points `{progress: number}` with progress in [0, 1], the first at 0; or the same as
            text, `"0:1.0,0.5:0.5"` (all patches in the first half of the training, then half of them).

    Raises:
        UserError: if there is no point at 0, or a progress outside [0, 1], or text that is no number.
    """

    def __init__(self, value: float | int | str | Mapping[float, float]) -> None:
        points = value if isinstance(value, Mapping) else _parse(value) if isinstance(value, str) else {0.0: value}
        self.points = dict(sorted(points.items()))
        if 0 not in self.points or not all(0 <= progress <= 1 for progress in self.points):
            raise UserError(f"the schedule {value!r} needs points in [0, 1], the first at 0, such as '0:1.0,0.5:0.5'")

    def at(self, progress: float) -> float | int:
        """The number in force at `progress` in [0, 1]."""
        return next(number for point, number in reversed(self.points.items()) if point <= progress)

    def values(self) -> list[float | int]:
        """Every number the schedule takes."""
        return list(self.points.values())


def _parse(text: str) -> dict[float, float | int]:
    try:
        if ":" not in text:
            return {0.0: _number(text)}
        pairs = [point.split(":") for point in text.split(",")]
        return {float(progress): _number(number) for progress, number in pairs}
    except ValueError:
        raise UserError(f"'{text}' is no number and no schedule; write 0.5, 98, or points such as '0:1.0,0.5:0.5'") from None


def _number(text: str) -> float | int:
    return int(text) if text.strip().isdigit() else float(text)
