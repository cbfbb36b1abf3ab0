"""The forests of a run of mirage to train on, for any network with as many layers as their trees are deep, or fewer.

An epoch is as many forests as there were graphs, each drawn anew in proportion to how often its trees were found together. They are
validated on the graphs of the run's own data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from stillhouse.data import Data, open_data
from stillhouse.data.arrays import fingerprint
from stillhouse.errors import UserError
from stillhouse.models.forests import Forests, read_forests
from stillhouse.run_folder import read_settings


def open_forests(folder: str | Path) -> Data:
    """A run's forests, with the graphs that its own data validate on.

    Raises:
        UserError: if the forests are damaged, or the run's data cannot be opened.
    """
    folder = Path(folder)
    forests, job = read_forests(folder / "data"), read_settings(folder / "settings.yaml")
    if job.get("data") is None:
        raise UserError(f"the forests in '{folder}' cannot be judged: the run's data were objects in Python, which no file names")
    source = open_data(job["data"], seed=job.get("seed", 0), bad_data="skip")
    return Data(
        name=str(folder),
        train=Drawn(forests),
        val=source.val,
        classes=source.classes,
        channels=source.channels,
        fingerprint=fingerprint(*forests.tensors().values(), source.fingerprint),
        inputs="graphs",
    )


class Drawn(Dataset[tuple[Any, int]]):
    """Forests and their classes."""

    def __init__(self, forests: Forests) -> None:
        self.forests = forests

    def __len__(self) -> int:
        return int(self.forests.about["graphs"])

    def __getitem__(self, i: int) -> tuple[Any, int]:
        """Forest i, from the first again where there are fewer."""
        i %= len(self.forests)
        return self.forests.graph(i), self.forests.labels[i]

    def draw(self, i: int, epoch: int) -> tuple[Any, int]:
        """Any forest, drawn from torch's generator, which the loader starts from seed, epoch and i."""
        return self[self.forests.draw(1)[0]]
