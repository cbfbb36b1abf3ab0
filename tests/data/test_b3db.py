from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_geometric", reason="torch-geometric is not installed", exc_type=ImportError)

from stillhouse.data import b3db, installed, open_data
from stillhouse.data.b3db import by_scaffold, open_b3db, read_molecules
from stillhouse.errors import UserError


def present() -> bool:
    try:
        return bool(distribution("qc-b3db"))
    except PackageNotFoundError:
        return False


rdkit = pytest.mark.skipif(find_spec("rdkit") is None, reason="needs RDKit: pip install 'stillhouse[graphs]'")
real = pytest.mark.skipif(
    find_spec("rdkit") is None or not present(), reason="needs qc-b3db and RDKit: pip install --no-deps qc-b3db; pip install rdkit"
)


def write(path: Path, *rows: tuple[str, str]) -> Path:
    path.write_text("NO.\tSMILES\tBBB+/BBB-\n" + "".join(f"{i}\t{smiles}\t{label}\n" for i, (smiles, label) in enumerate(rows)))
    read_molecules.cache_clear()
    return path


def test_a_missing_or_different_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(installed, "distribution", nothing)
    with pytest.raises(UserError, match=r"b3db needs files of the package 'qc-b3db': pip install --no-deps qc-b3db$"):
        open_b3db("")
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(UserError, match=r"b3db needs RDKit.*: pip install 'stillhouse\[graphs\]'$"):
        read_molecules(write(tmp_path / "a.tsv", ("C", "BBB+")))


@rdkit
def test_molecules_by_hand(tmp_path: Path) -> None:
    rows = [("c1ccccc1C[NH3+]", "BBB+"), ("C(C)(", "BBB-"), ("[O-]C=O", "BBB-")]
    molecules, skipped = read_molecules(write(tmp_path / "a.tsv", *rows))
    assert skipped == ["line 3: RDKit cannot read 'C(C)('"]
    atoms, bonds, label, scaffold = molecules[0]
    assert (atoms, label, scaffold) == (["c"] * 6 + ["C", "N+"], 1, "c1ccccc1")
    assert sorted(kind for *_, kind in bonds) == [0, 0, 3, 3, 3, 3, 3, 3]
    assert molecules[1] == (["O-", "C", "O"], [(0, 1, 0), (1, 2, 1)], 0, "")
    graph, label = b3db._graphs(molecules, torch.tensor([1]), ["C", "O"])[0]
    assert (graph.x.tolist(), label) == ([2, 0, 1], 0)  # the charged oxygen is unknown: one beyond the last
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert graph.edge_attr.tolist() == [0, 0, 1, 1]
    for bad in (("C", "yes"), ("", "BBB+")):
        with pytest.raises(UserError, match=r"line 2 of .* is not as in qc-b3db 1\.1\.1"):
            read_molecules(write(tmp_path / "b.tsv", bad))


def test_scaffolds_stay_together() -> None:
    train, val = by_scaffold(["a", "b", "a", "c", "b", "a", "d", "e", "f", "b"], 0.4)
    assert (train.tolist(), val.tolist()) == ([0, 1, 2, 4, 5, 9], [3, 6, 7, 8])


@real
def test_the_real_molecules() -> None:
    data = open_data("b3db")
    assert (data.inputs, data.classes, data.channels) == ("graphs", ["BBB-", "BBB+"], 27)
    assert (len(data.train), len(data.val), len(data.skipped)) == (6244, 1561, 2)
    assert sum(data.train.labels) + sum(data.val.labels) == 4956
    assert max(int(graph.x.max()) for graph in data.train.graphs) == 26
    assert max(int(graph.edge_attr.max()) for graph in data.train.graphs if graph.num_edges) == 3
    few = open_b3db("train=100", seed=1)
    assert (len(few.train), few.channels) == (100, 27)
    assert abs(sum(few.train.labels) / 100 - sum(data.train.labels) / 6244) < 0.02
    assert torch.equal(few.val[7][0].x, data.val[7][0].x)
    random = open_b3db("split=random,val=0.1")
    assert len(random.val) in (780, 781)
    assert len({each.fingerprint for each in (data, few, random, open_b3db("train=100", seed=2))}) == 4
    for bad, message in (("split=time", "no split 'time'"), ("val=0", "val=0"), ("train=9000", "expected 2 to 6244")):
        with pytest.raises(UserError, match=message):
            open_b3db(bad)
