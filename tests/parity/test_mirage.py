"""Numbers computed by the paper's own code; mirage.json says how. None of that code is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch_geometric", reason="torch-geometric is not installed", exc_type=ImportError)

from stillhouse.data.graphs import undirected
from stillhouse.models.trees import encoded, need_graphs, tree_labels

OFFICIAL = json.loads(Path(__file__).with_name("mirage.json").read_text())["rows"]


def graph(i: int) -> Any:
    """The i-th of the 24 graphs."""
    nodes = 6 + i % 5
    kinds = [v * i // 3 % 2 for v in range(nodes)]
    edges = [(v - 1 - (v * i) % 2 * (v > 1), v) for v in range(1, nodes)] + ([(0, nodes - 1)] if i % 3 == 0 else [])
    edges = sorted(set(edges))
    told = torch.tensor([int((a + b) % 9 == 8) for a, b in edges]).repeat_interleave(2)
    return need_graphs("a test").data.Data(x=torch.tensor(kinds), edge_index=undirected(edges), edge_attr=told)


@pytest.mark.parametrize("official", OFFICIAL, ids=lambda row: f"{row['hops']} hops")
def test_computation_trees(official: dict[str, Any]) -> None:
    trees = [tree_labels(graph(i), official["hops"]) for i in range(24)]
    assert [[len(encoded([tree])) for tree in each] for each in trees] == official["nodes"]
    assert [len(set(each)) for each in trees] == official["per_graph"]
    different = {tree for each in trees for tree in each}
    assert len(different) == official["distinct"]
    assert sorted(sum(tree in each for each in trees) for tree in different) == official["supports"]
