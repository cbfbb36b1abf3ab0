"""A run folder as one page: `write_report(run_dir)` writes `report.html`, a single file that loads nothing from anywhere."""

from __future__ import annotations

from pathlib import Path

from stillhouse.run_folder import whole_file


def write_report(run_dir: str | Path) -> Path:
    """Write `RUN/report.html` from what the run folder holds so far, and return its path.

    Works at any moment of a run (in progress, interrupted, finished): a section without data is left out. The file replaces the one
    before it in one move, so that a browser never reads half a page. Raises UserError when `run_dir` is not a run folder.
    """
    from stillhouse.report.page import render  # jinja2, numpy and Pillow: only when a report is written

    path = Path(run_dir) / "report.html"
    with whole_file(path) as unfinished:
        unfinished.write_text(render(Path(run_dir)), encoding="utf-8", errors="backslashreplace")  # a file's name may be no text
    return path
