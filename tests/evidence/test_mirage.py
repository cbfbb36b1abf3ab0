"""Mirage's evidence: the ablations are what they are called, and an interrupted experiment goes on where it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch_geometric", reason="torch-geometric is not installed", exc_type=ImportError)
pytest.importorskip("mlxtend", reason="mlxtend is not installed", exc_type=ImportError)

from torch_geometric.data import Batch, Data

from stillhouse.data import open_data
from stillhouse.data.graphs import undirected
from stillhouse.errors import UserError
from stillhouse.evidence import mirage
from stillhouse.evidence.mirage import ARMS, EXPERIMENTS, NETWORKS, DepthUntold, Lists, NoWayBack
from stillhouse.models.forests import Forests
from stillhouse.models.graphs import GraphNetwork
from stillhouse.models.trees import tree_labels

EDGES = st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda pair: pair[0] < pair[1]), max_size=9)


def trees(graph: Any, hops: int) -> list[str]:
    """Those of the ablation."""
    return NoWayBack(GraphNetwork("gin", 3, 2, layers=1), hops=hops, edges=False).trees(graph)


def walks(pairs: set[tuple[int, int]], start: int, hops: int) -> list[tuple[int, ...]]:
    """All walks from a node of up to `hops` edges that never go straight back."""
    found, last = [(start,)], [(start,)]
    for _ in range(hops):
        last = [
            (*walk, node)
            for walk in last
            for node in range(6)
            if tuple(sorted((walk[-1], node))) in pairs and node not in walk[-2:-1] and node != walk[-1]
        ]
        found += last
    return found


@given(pairs=EDGES, kinds=st.lists(st.integers(0, 2), min_size=6, max_size=6))
@settings(max_examples=40, deadline=None)
def test_without_the_way_back_a_tree_has_the_walks_that_do_not_turn(pairs: set[tuple[int, int]], kinds: list[int]) -> None:
    graph = Data(x=torch.tensor(kinds), edge_index=undirected(sorted(pairs)))
    assert trees(graph, 1) == tree_labels(graph, 1, edges=False), "of one hop none turns"
    for hops in (2, 3):
        for node, tree in enumerate(trees(graph, hops)):
            assert tree.count("$") == len(walks(pairs, node, hops))


def test_without_the_way_back_what_two_layers_see_of_a_node_is_not_in_its_tree() -> None:
    path = Data(x=torch.tensor([0, 1, 2]), edge_index=undirected([(0, 1), (1, 2)]))
    assert trees(path, 2) == ["0 0 1 0 2 $ $ $", "1 0 0 $ 0 2 $ $", "2 0 1 0 0 $ $ $"]
    assert tree_labels(path, 2)[0] == "0 0 1 0 0 $ 0 2 $ $ $"


def test_trees_whose_depth_is_untold_are_read_by_deeper_networks() -> None:
    network = GraphNetwork("gin", 3, 2, layers=2)
    lists = (["0 0 1 $ $"], [[0]], [3], [1], {"hops": 1})
    with pytest.raises(UserError, match="sees further"):
        network(Batch.from_data_list([Forests(*lists).graph(0)]))
    untold = DepthUntold(*lists).graph(0)
    assert network(Batch.from_data_list([untold])).shape == (1, 2)
    assert untold.roots.tolist() == [True, False]


def test_the_arms_differ_in_what_they_are_called() -> None:
    arms = {arm.name: arm for arm in ARMS}
    data = open_data("motifs:train=40,val=4,noise=0.05")
    lists = replace(EXPERIMENTS[0], budget=3_000)
    made: dict[str, Any] = {
        name: lists.made(arms[name], data, 0)[0] for name in ("Mirage", "trees without the way back", "trees of one hop, networks of two")
    }
    depth = {name: kept.tensors()["depth"].max().item() for name, kept in made.items()}
    assert list(depth.values()) == [2, 2, 1]
    full = set(made["Mirage"].trees)
    assert full
    assert full.isdisjoint(made["trees without the way back"].trees), "every tree of two hops turns back somewhere"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Lists:
    """Few graphs, few steps, three arms."""
    monkeypatch.setattr(mirage, "MINED", {})
    arms = tuple(arm for arm in ARMS if arm.name in ("Mirage", "random graphs", "trees without the way back"))
    data, learning = "motifs:train=40,val=8,noise=0.05", {"steps": 2, "rate": 0.005, "count": 4}
    return replace(EXPERIMENTS[0], data=data, budget=3_000, learning=learning, arms=arms)


def test_what_was_interrupted_goes_on_with_the_arm_it_was_at(tiny: Lists, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, asked = tiny.run(tmp_path / "whole", range(2), smoke=False), []
    measured = Lists.measured

    def stopping(self: Lists, arm: Any, data: Any, seed: int) -> dict[str, float]:
        asked.append((arm.name, seed))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return measured(self, arm, data, seed)

    monkeypatch.setattr(Lists, "measured", stopping)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "stopped", range(2), smoke=False)
    again = tiny.run(tmp_path / "stopped", range(2), smoke=False)
    assert asked[2:4] == [asked[2]] * 2, "the arm that was not finished"
    assert len(asked) == 7, "and no other is run twice"
    for name, rows in whole.rows.items():
        for ours, theirs in zip(again.rows[name], rows, strict=True):
            assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    (setting, table) = again.table()
    assert "seeds 0, 1" in setting
    assert all(f"| {name} |" in table for name in whole.rows)
    assert all(f"{name}: AUROC, %" in table for name in NETWORKS)
