"""What a person sees while a run goes on: a bar by rich, on the main process, silent where nobody looks."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A bar of `steps` that starts at `done`; it writes to the error stream and vanishes when the run is over."""

    def __init__(self, title: str, steps: int, done: int, visible: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
        )
        self._bar = Bar(*columns, console=Console(file=sys.stderr), disable=not (visible and sys.stderr.isatty()), transient=True)
        self._task = self._bar.add_task(title, total=steps, completed=done, news="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._bar.disable:  # rich before 14.3 ends also a bar that nobody sees with an empty line
            self._bar.stop()

    def advance(self) -> None:
        """One step more is done."""
        self._bar.advance(self._task)

    def show(self, news: str) -> None:
        """The latest figure, behind the bar."""
        self._bar.update(self._task, news=news)
