"""Molecules that pass from blood into the brain, or do not: 7,807 of B3DB (Meng et al., doi 10.1038/s41597-021-01069-5; CC0), as graphs.

Read from where PyPI's package `qc-b3db` (1.1.1) is installed, without importing it; RDKit reads the SMILES. Nodes are heavy atoms, their
kind is element, whether it is aromatic, and the sign of its charge; edges are bonds: single, double, triple, aromatic or other. Kinds are
those of the training molecules, in alphabetical order; an atom of no such kind is of the unknown kind, one beyond the last.

`split=scaffold`, as long as nothing is said: molecules with the same ring systems (Bemis and Murcko) are on the same side. The largest such
groups train, as in MoleculeNet (arXiv 1703.00564); what is left at the end, rings seen nowhere before, is to validate: `val`, by default
0.2 of all. `split=random` takes the same share of each class. Both are the same for every seed. `train=N` takes so many of the training
molecules, each class in proportion, by the seed. 63 of 100 molecules are of the class BBB+, but 56 of those that validate by scaffold.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.data import Data
from stillhouse.data.arrays import fingerprint
from stillhouse.data.graphs import GraphList, undirected
from stillhouse.data.installed import installed_files
from stillhouse.data.options import read_options, within
from stillhouse.data.splits import split, subset
from stillhouse.errors import UserError
from stillhouse.models.trees import need_graphs

FILE = "B3DB/B3DB_classification.tsv"
CLASSES = ["BBB-", "BBB+"]
BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")


def open_b3db(text: str, *, seed: int = 0) -> Data:
    """Open `b3db:TEXT`; TEXT may be empty.

    Raises:
        UserError: if the package, RDKit or torch-geometric is not installed, the package holds something else, or an option is unknown or
            out of range.
    """
    options = {"split": "scaffold", "val": 0.2, **read_options(text, "b3db", split=str, val=float, train=int)}
    if options["split"] not in ("scaffold", "random"):
        raise UserError(f"b3db has no split '{options['split']}', expected split=scaffold or split=random")
    within("val", options["val"], 0.01, 0.9)
    need_graphs("b3db")
    (file,) = installed_files("qc-b3db", FILE, need="b3db")
    molecules, skipped = read_molecules(file)
    labels = torch.tensor([molecule[2] for molecule in molecules])
    if options["split"] == "random":
        train, val = split(labels, options["val"], "b3db", "split")
    else:
        train, val = by_scaffold([molecule[3] for molecule in molecules], options["val"])
    names = sorted({atom for i in train.tolist() for atom in molecules[i][0]})  # of all that may train, whatever `train`
    if "train" in options:
        within("train", options["train"], 2, len(train))
        train = train[subset(labels[train], options["train"], seed, "b3db", "subset")]
    return Data(
        name=f"b3db:{text}" if text else "b3db",
        train=_graphs(molecules, train, names),
        val=_graphs(molecules, val, names),
        classes=CLASSES,
        channels=len(names),
        skipped=skipped,
        fingerprint=fingerprint(hashlib.sha256(file.read_bytes()).hexdigest(), repr(names), train, val),
        inputs="graphs",
    )


Molecule = tuple[list[str], list[tuple[int, int, int]], int, str]
"""Kinds of atoms; bonds as pairs of atoms and a kind; class; scaffold."""


@functools.lru_cache(maxsize=1)
def read_molecules(file: Path) -> tuple[list[Molecule], list[str]]:
    """All molecules in the file's order, and a line for each that could not be read.

    Raises:
        UserError: if RDKit is not installed, or the file is another.
    """
    try:
        from rdkit import rdBase
        from rdkit.Chem import MolFromSmiles
        from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
    except ImportError:
        raise UserError("b3db needs RDKit, which reads molecules: pip install 'stillhouse[graphs]'") from None
    found: list[Molecule] = []
    skipped: list[str] = []
    with file.open(encoding="utf-8", newline="") as lines, rdBase.BlockLogs():
        for number, row in enumerate(csv.DictReader(lines, delimiter="\t"), 2):
            smiles, told = row.get("SMILES"), row.get("BBB+/BBB-")
            if not smiles or told not in CLASSES:
                raise UserError(f"line {number} of '{file}' is not as in qc-b3db 1.1.1: pip install --no-deps qc-b3db==1.1.1")
            molecule = MolFromSmiles(smiles)
            if molecule is None:
                skipped.append(f"line {number}: RDKit cannot read '{smiles}'")
                continue
            bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), _bond(str(bond.GetBondType()))) for bond in molecule.GetBonds()]
            scaffold = MurckoScaffoldSmiles(mol=molecule, includeChirality=False)
            found.append(([_atom(atom) for atom in molecule.GetAtoms()], bonds, CLASSES.index(told), scaffold))
    return found, skipped


def _atom(atom: Any) -> str:
    charge = atom.GetFormalCharge()
    symbol = atom.GetSymbol()
    return (symbol.lower() if atom.GetIsAromatic() else symbol) + ("+" if charge > 0 else "-" if charge < 0 else "")


def _bond(name: str) -> int:
    return BONDS.index(name) if name in BONDS else len(BONDS)


def by_scaffold(scaffolds: list[str], share: float) -> tuple[Tensor, Tensor]:
    """Two sorted index tensors: whole groups, largest first, train until only `share` of all is left."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, scaffold in enumerate(scaffolds):
        groups[scaffold].append(i)
    parts: tuple[list[int], list[int]] = ([], [])
    for group in sorted(groups.values(), key=lambda group: (-len(group), group[0])):
        parts[len(parts[0]) + len(group) > (1 - share) * len(scaffolds)].extend(group)
    train, val = (torch.tensor(sorted(part)) for part in parts)
    return train, val


def _graphs(molecules: list[Molecule], which: Tensor, names: list[str]) -> GraphList:
    data, numbers = need_graphs("b3db").data, {name: number for number, name in enumerate(names)}
    graphs, labels = [], []
    for atoms, bonds, label, _ in (molecules[i] for i in which.tolist()):
        kinds = torch.tensor([kind for *_, kind in bonds], dtype=torch.int64).repeat_interleave(2)
        x = torch.tensor([numbers.get(atom, len(names)) for atom in atoms])
        graphs.append(data.Data(x=x, edge_index=undirected([(a, b) for a, b, _ in bonds]), edge_attr=kinds))
        labels.append(label)
    return GraphList(graphs, labels)
