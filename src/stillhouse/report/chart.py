"""Where the lines of a chart go. The template draws them (so every name is escaped there); this file only knows about numbers.

Places are in percent of the plot, x to the right and y down, so that one drawing fits a phone and a desktop: the page stretches the lines
(their width stays) and sets the text of the axes at its own size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

MOST_POINTS = 400  # per line; more are averaged in groups, which the chart says
PLOT = 100.0


@dataclass(frozen=True)
class Line:
    """A named line. `style` is a CSS class; a `level` is one value drawn across the whole plot."""

    name: str
    style: str
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    level: float | None = None

    def points(self) -> list[tuple[float, float]]:
        """The places where both numbers are finite."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Chart:
    """A chart ready to be drawn: `paths` (name, style, SVG path, last value), `x_ticks` and `y_ticks` (place in percent, label)."""

    title: str
    unit: str
    x_label: str
    paths: list[tuple[str, str, str, str]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    note: str
    description: str


def chart(title: str, lines: list[Line], *, unit: str = "", x_label: str = "step", note: str = "") -> Chart | None:
    """Lay out `lines`; None when no line has a single finite point. A value that is not finite leaves a gap in its line."""
    drawn = [line for line in lines if line.points()]
    if not drawn:
        return None
    levels = [line for line in lines if line.level is not None and math.isfinite(line.level)]
    xs = [x for line in drawn for x, _ in line.points()]
    x_low, x_high = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - 1, xs[0] + 1)
    most = max(len(line.x) for line in drawn)
    group = -(-most // MOST_POINTS)
    if group > 1:
        note = f"{note} Each point is the mean of {group} rows.".strip()
    thin = [Line(line.name, line.style, _means(line.x, group), _means(line.y, group)) for line in drawn]
    ys = [y for line in thin for _, y in line.points()] + [line.level for line in levels if line.level is not None]
    y_ticks = ticks(min(ys), max(ys), outside=True)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    thin += [Line(line.name, line.style, [x_low, x_high], [line.level or 0.0] * 2) for line in levels]
    paths = [(line.name, line.style, path(line, (x_low, x_high), (y_low, y_high)), label(line.points()[-1][1], unit)) for line in thin]
    spoken = "; ".join(f"{name} ends at {value}" for name, _, _, value in paths)
    return Chart(
        title=title,
        unit=unit,
        x_label=x_label,
        paths=paths,
        x_ticks=[(place(x, x_low, x_high), label(x)) for x in ticks(x_low, x_high)] if len(set(xs)) > 1 else [(PLOT / 2, label(xs[0]))],
        y_ticks=[(PLOT - place(y, y_low, y_high), label(y, step=y_ticks[1] - y_ticks[0])) for y in y_ticks],
        note=note,
        description=f"{title} over {x_label} {label(min(xs))} to {label(max(xs))}: {spoken}.",
    )


def place(value: float, low: float, high: float) -> float:
    """Linear: `low` is 0, `high` is 100."""
    return PLOT * (value - low) / (high - low)


def path(line: Line, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    """The SVG path of a line; it is lifted over points that are not finite. A point alone becomes a dot (its ends are round)."""
    parts, pen = [], "M"
    for x, y in zip(line.x, line.y, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        parts.append(f"{pen}{place(x, *x_range):.2f} {PLOT - place(y, *y_range):.2f}")
        pen = "L"
    alone = [here + "h0" if here[0] == "M" and after[0] == "M" else here for here, after in pairwise([*parts, "M"])]
    return "".join(alone)


def ticks(low: float, high: float, *, outside: bool = False) -> list[float]:
    """Four to seven round numbers spanning low..high: within it, or just around it when `outside`."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-290):
        low, high = low - (abs(low) * 0.05 or 1.0), high + (abs(high) * 0.05 or 1.0)
    raw = (high - low) / 5
    digits = math.floor(math.log10(raw))
    power = 10.0**digits
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= raw * 0.999)
    slack = 1e-9 * step
    first, final = (math.floor((low + slack) / step), math.ceil((high - slack) / step))
    if not outside:
        first, final = (math.ceil((low - slack) / step), math.floor((high + slack) / step))
    return [round(i * step, 6 - digits) for i in range(first, final + 1)]


def label(value: float, unit: str = "", step: float = 0.0) -> str:
    """A number as short as it can be read: 12000 -> "12k", 0.2513 -> "0.251"; ticks, a `step` apart, have the step's digits."""
    if unit == "%":
        return f"{value:.1f}\N{NARROW NO-BREAK SPACE}%"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if step:
        digits = next((d for d in range(7) if math.isclose(step * 10**d, round(step * 10**d))), None)
        return f"{value:g}" if digits is None else f"{value:.{digits}f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:g}"


def _means(values: list[float], group: int) -> list[float]:
    if group == 1:
        return values
    groups = [[v for v in values[i : i + group] if math.isfinite(v)] for i in range(0, len(values), group)]
    return [sum(part) / len(part) if part else math.nan for part in groups]
