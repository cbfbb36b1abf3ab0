"""A run's figures: CSV files that resume leaves as if nothing had happened, and the trackers Accelerate knows."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from stillhouse.errors import UserError


class Table:
    """A CSV file that rows are added to. Columns are those of the first row; a resume first drops what lies behind its step.

    Args:
        path: the file.
        last_step: keep the rows up to this step.
    """

    def __init__(self, path: Path, last_step: int = 0) -> None:
        self.path = path
        rows = [row for row in read_table(path) if int(row["step"]) <= last_step]
        path.unlink(missing_ok=True)
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, float | str]) -> None:
        """Appends a row; full precision, so that equal runs give equal files."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Diverged(UserError):
    """A loss became NaN or infinite; the last checkpoint is from before."""


class Terms:
    """The loss terms of the steps since the last row of the log, kept on the device so that a step need not wait for it."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, terms: dict[str, Tensor]) -> None:
        """The terms of one update, detached scalars."""
        self._rows.append((step, terms))

    def check(self) -> None:
        """Waits for the device once.

        Raises:
            Diverged: if any term was NaN or infinite, naming the first such step and its terms.
        """
        if not self._rows:
            return
        finite = torch.stack([torch.stack([value.isfinite() for value in terms.values()]).all() for _, terms in self._rows]).cpu()
        if finite.all():
            return
        step, terms = self._rows[int((~finite).nonzero()[0])]
        which = ", ".join(f"{name} = {float(value):g}" for name, value in terms.items() if not value.isfinite())
        raise Diverged(
            f"the loss is not finite at step {step}: {which}; lower --lr, set --clip 1 or use --precision bf16 or fp32; "
            "the checkpoints in the run folder are from before"
        )

    def mean(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each term over steps and processes since the last call, and their `total`.

        Raises:
            Diverged: as `check`.
        """
        self.check()
        rows = [terms for _, terms in self._rows]
        self._rows = []
        names = list(dict.fromkeys(name for terms in rows for name in terms))
        means = [torch.stack([terms[name].double() for terms in rows if name in terms]).mean() for name in names]
        if not means:
            return {}
        reduced = dict(zip(names, accelerator.reduce(torch.stack(means), "mean").tolist(), strict=True))
        return {"total": sum(reduced.values()), **reduced}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs to go on with the same row: `{"12.ce": …}`."""
        return {f"{step}.{name}": value for step, terms in self._rows for name, value in terms.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts `tensors` back."""
        rows: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            step, name = key.split(".", 1)
            rows.setdefault(int(step), {})[name] = value
        self._rows = sorted(rows.items())
