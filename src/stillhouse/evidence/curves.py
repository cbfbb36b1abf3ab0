"""What masks did during training, drawn: one SVG an experiment, with a panel a figure and a line an arm."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from stillhouse.report.chart import Chart, Line, chart
from stillhouse.run import Run
from stillhouse.training.log import read_table

COLOURS = ("#b4470f", "#1f6f8b", "#6b4fa0", "#4f7a28", "#9a6a00", "#7a3b52")
TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ 300 * panels|length }} 270" font-family="sans-serif" font-size="11" fill="#333">
<rect width="100%" height="100%" fill="white"/>
{% for panel in panels %}
<g transform="translate({{ 300 * loop.index0 + 45 }} 30)">
<text y="-12" font-size="12" font-weight="bold">{{ panel.title }}</text>
{% for place, text in panel.y_ticks %}
<path d="M0 {{ 1.6 * place }}h235" stroke="#ddd"/><text x="-6" y="{{ 1.6 * place + 4 }}" text-anchor="end">{{ text }}</text>
{% endfor %}
{% for place, text in panel.x_ticks %}<text x="{{ 2.35 * place }}" y="178" text-anchor="middle">{{ text }}</text>{% endfor %}
<g transform="scale(2.35 1.6)" fill="none" stroke-width="2">
{% for name, style, path, last in panel.paths %}
<path d="{{ path }}" stroke="{{ style }}" vector-effect="non-scaling-stroke"/>
{% endfor %}
</g></g>
{% endfor %}
{% for name, style, path, last in panels[0].paths %}
<text x="{{ 45 + 205 * (loop.index0 % 4) }}" y="{{ 232 + 18 * (loop.index0 // 4) }}" fill="{{ style }}">— {{ name }}</text>
{% endfor %}
</svg>
"""


def write_curves(path: Path, runs: Mapping[str, Sequence[Run]], figures: dict[str, str]) -> bool:
    """Writes a panel for each figure (a column of `watch.csv` -> its title): the mean over an arm's runs, by step.

    Returns:
        Whether there was anything to draw.
    """
    panels = [panel for column, title in figures.items() if (panel := _panel(title, column, runs))]
    if panels:
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        path.write_text(environment.from_string(TEMPLATE).render(panels=panels), encoding="utf-8")
    return bool(panels)


def _panel(title: str, column: str, runs: Mapping[str, Sequence[Run]]) -> Chart | None:
    lines = []
    for colour, (name, several) in zip(COLOURS, runs.items(), strict=False):
        tables = [[row for row in read_table(run.folder / "watch.csv") if row.get(column)] for run in several]
        rows = list(zip(*tables, strict=False))
        steps = [float(same[0]["step"]) for same in rows]
        lines.append(Line(name, colour, steps, [statistics.mean(float(row[column]) for row in same) for same in rows]))
    return chart(title, lines)
