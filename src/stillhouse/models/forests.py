"""Forests in place of graphs: sets of computation trees with how often they were seen together, kept in few bytes, drawn to train on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.trees import decoded, encoded, forest
from stillhouse.run_folder import whole_folder

KIND = "forests"


class Forests(nn.Module):
    """Each forest a set of trees of one class, and a number that it is drawn in proportion to. Nothing in it learns.

    Args:
        trees: labels as in `stillhouse.models.trees`, each once.
        members: for each forest the numbers of its trees.
        supports: for each forest in how many graphs of its class all of them are.
        labels: for each forest its class.
        about: facts that are kept beside it: `hops`, how deep the trees are; `graphs`, how many there were; what made it.
    """

    def __init__(
        self,
        trees: Sequence[str] = (),
        members: Sequence[Sequence[int]] = (),
        supports: Sequence[int] = (),
        labels: Sequence[int] = (),
        about: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.trees, self.members = list(trees), [list(each) for each in members]
        self.supports, self.labels = list(supports), list(labels)
        self.about = about or {}
        self._graphs: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.members)

    def graph(self, i: int) -> Any:
        """Forest i as a graph of torch-geometric with `roots`."""
        if i not in self._graphs:
            self._graphs[i] = forest([self.trees[tree] for tree in self.members[i]], self.about["hops"])
        return self._graphs[i]

    def chances(self) -> Tensor:
        """How likely each forest is drawn, float64 [forests]; they sum to 1."""
        supports = torch.tensor(self.supports, dtype=torch.float64)
        return supports / supports.sum()

    def draw(self, count: int) -> list[int]:
        """The numbers of `count` forests, drawn in proportion to their supports, over all classes together, from torch's generator."""
        return torch.multinomial(self.chances(), count, replacement=True).tolist()  # type: ignore[no-any-return]

    def tensors(self) -> dict[str, Tensor]:
        """All that is needed to have it again, in the smallest whole numbers that hold it."""
        nodes = encoded(self.trees)
        lists = {
            **{"depth": nodes[:, 0], "kind": nodes[:, 1]},
            **({"edge": nodes[:, 2]} if nodes[:, 2].any() else {}),
            "member": torch.tensor([tree for each in self.members for tree in each], dtype=torch.int64),
            "size": torch.tensor([len(each) for each in self.members], dtype=torch.int64),
            "support": torch.tensor(self.supports, dtype=torch.int64),
            "label": torch.tensor(self.labels, dtype=torch.int64),
        }
        return {name: smallest(values) for name, values in lists.items()}

    @property
    def bytes(self) -> int:
        """What `tensors` take, the trees themselves among them."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def write(self, folder: Path) -> None:
        """`folder/data.safetensors` and `folder/about.json`, both or nothing."""
        try:
            with whole_folder(folder) as new:
                save_file(self.tensors(), new / "data.safetensors")
                (new / "about.json").write_text(json.dumps({"kind": KIND, "bytes": self.bytes, **self.about}, indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the forests to '{folder}' ({error}), free some space or give another folder") from error


def read_forests(folder: Path) -> Forests:
    """What `Forests.write` wrote.

    Raises:
        UserError: if there is nothing of that kind, or it is damaged.
    """
    try:
        about = json.loads((folder / "about.json").read_text())
        if about.pop("kind") != KIND:
            raise UserError(f"'{folder}' holds no forests but something else, see its about.json")
        tensors = {name: tensor.long() for name, tensor in load_file(folder / "data.safetensors").items()}
        edge = tensors.get("edge", torch.zeros_like(tensors["depth"]))
        trees = decoded(torch.stack([tensors["depth"], tensors["kind"], edge], 1))
        members = [each.tolist() for each in tensors["member"].split(tensors["size"].tolist())]
        supports, labels = tensors["support"].tolist(), tensors["label"].tolist()
        if not len(members) == len(supports) == len(labels) or max(map(max, members)) >= len(trees) or min(map(min, members)) < 0:
            raise ValueError("its parts do not fit together")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the forests in '{folder}' cannot be read ({error}), make them again") from error
    about.pop("bytes", None)
    return Forests(trees, members, supports, labels, about)


def is_forests(folder: Path) -> bool:
    """Whether a folder says that forests are in it."""
    try:
        told = json.loads((folder / "about.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("kind") == KIND


def smallest(values: Tensor) -> Tensor:
    """The same whole numbers in the smallest of torch's types that safetensors keeps and that holds them."""
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return values.to(dtype).contiguous()
    return values.contiguous()
