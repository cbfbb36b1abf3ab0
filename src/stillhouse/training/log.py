"""A run's figures: CSV files that resume leaves as if nothing had happened, and the trackers Accelerate knows."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.run_folder import whole_file, writing


class Table:
    """A CSV file that rows are added to; a resume first drops what lies behind its step.

    A column may appear late (a term that begins later in the training): earlier rows are then empty there.

    Args:
        path: the file.
        last_step: keep the rows up to this step.
        writable: False on processes that only know its name.

    Raises:
        UserError: if it cannot be written.
    """

    def __init__(self, path: Path, last_step: int = 0, writable: bool = True) -> None:
        self.path = path
        self.columns: list[str] = []
        if not writable:
            return
        try:
            rows = [row for row in read_table(path) if int(row["step"]) <= last_step]
        except (LookupError, TypeError, ValueError, OSError, csv.Error) as error:
            raise UserError(f"{path} cannot be read as a table of steps ({error}); restore it, or start another run") from error
        if rows:
            self.columns = list(rows[0])
            self._write(rows)
        else:
            with writing(path):
                path.unlink(missing_ok=True)

    def add(self, row: Mapping[str, float | str]) -> None:
        """Appends a row, on the disk before a checkpoint can be; full precision, so that equal runs give equal files."""
        late = [name for name in row if name not in self.columns]
        if late:
            rows = read_table(self.path)
            self.columns += late
            self._write([*rows, row])
            return
        with writing(self.path), self.path.open("a", newline="") as file:
            self._writer(file).writerow(row)
            file.flush()
            os.fsync(file.fileno())

    def _write(self, rows: Sequence[Mapping[str, float | str]]) -> None:
        with whole_file(self.path) as beside, beside.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows)

    def _writer(self, file: TextIO) -> csv.DictWriter[str]:
        return csv.DictWriter(file, fieldnames=self.columns, restval="")


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no file. A last line that was cut short is no row."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        text = file.read()
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))


REMEDY = "in another run lower --lr, set --clip 1 or use --precision bf16 or fp32; the checkpoints in this run's folder are from before"


class Diverged(UserError):
    """A loss or a weight became NaN or infinite; the last checkpoint is from before."""


class Terms:
    """The loss terms of the steps since the last row of the log, kept on the device so that a step need not wait for it."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, terms: dict[str, Tensor]) -> None:
        """The terms of one update, detached scalars."""
        self._rows.append((step, terms))

    def gather(self, accelerator: Accelerator) -> None:
        """Makes every term the mean over processes, which all have to call it."""
        if self._rows and accelerator.num_processes > 1:
            flat = torch.stack([value.double() for _, terms in self._rows for value in terms.values()])
            means = iter(accelerator.reduce(flat, "mean").float())
            self._rows = [(step, {name: next(means) for name in terms}) for step, terms in self._rows]

    def check(self, accelerator: Accelerator) -> None:
        """Gathers, so that all processes go on or stop together. Waits for the device once.

        Raises:
            Diverged: if any term was NaN or infinite, naming the first such step and its terms.
        """
        if not self._rows:
            return
        self.gather(accelerator)
        finite = torch.stack([torch.stack([value.isfinite() for value in terms.values()]).all() for _, terms in self._rows]).cpu()
        if finite.all():
            return
        step, terms = self._rows[int((~finite).nonzero()[0])]
        which = ", ".join(f"{name} = {float(value):g}" for name, value in terms.items() if not value.isfinite())
        raise Diverged(f"the loss is not finite at step {step}: {which}; {REMEDY}")

    def mean(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each term over steps and processes since the last call, and their `total`.

        Raises:
            Diverged: as `check`.
        """
        self.check(accelerator)
        rows = [terms for _, terms in self._rows]
        self._rows = []
        names = list(dict.fromkeys(name for terms in rows for name in terms))
        means = [torch.stack([terms[name].double() for terms in rows if name in terms]).mean() for name in names]
        if not means:
            return {}
        row = dict(zip(names, torch.stack(means).tolist(), strict=True))
        return {"total": sum(row.values()), **row}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs to go on with the same row: `{"12.0.ce": …}`, by step and place, for a file forgets the order."""
        return {f"{step}.{place}.{name}": value for step, terms in self._rows for place, (name, value) in enumerate(terms.items())}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts `tensors` back."""
        rows: dict[int, dict[str, Tensor]] = {}
        for step, _, name, value in sorted((*_place(key), value) for key, value in tensors.items()):
            rows.setdefault(step, {})[name] = value
        self._rows = list(rows.items())


def _place(key: str) -> tuple[int, int, str]:
    step, place, name = key.split(".", 2)
    return int(step), int(place), name


def refuse_unless_finite(network: nn.Module, step: int) -> None:
    """A finite loss can have a gradient that is not: weights that it spoilt are never written.

    Raises:
        Diverged: naming the first such weight.
    """
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise Diverged(f"the update of step {step} made {name} NaN or infinite; {REMEDY}")
