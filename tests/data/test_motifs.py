from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch_geometric", reason="torch-geometric is not installed", exc_type=ImportError)

from stillhouse.data import open_data
from stillhouse.data.graphs import Graphs
from stillhouse.data.loading import TrainBatches, eval_batches
from stillhouse.data.motifs import KINDS, MOTIFS, motif_graph
from stillhouse.errors import UserError


def test_the_set() -> None:
    data = open_data("motifs:train=60,val=40")
    assert (data.inputs, data.task, data.channels, data.classes) == ("graphs", "classify", KINDS, ["star", "ring"])
    assert (len(data.train), len(data.val)) == (60, 40)
    assert sum(label for _, label in data.train) == 30
    for graph, label in data.train:
        edges = graph.edge_index
        assert graph.x.dtype == edges.dtype == torch.int64
        assert 0 <= int(graph.x.min()) <= int(graph.x.max()) < KINDS
        assert {(a, b) for a, b in edges.t().tolist()} == {(b, a) for a, b in edges.t().tolist()}
        nodes, pairs = len(graph.x), edges.shape[1] // 2
        assert 17 <= nodes <= 39
        if label == 0:
            assert pairs == nodes - 1  # a tree
        else:
            assert nodes <= pairs <= nodes + 2  # a ring a copy
        assert len({frozenset(pair) for pair in edges.t().tolist()}) == pairs


def test_motifs_are_of_the_same_kinds_and_whole_without_noise() -> None:
    assert sorted(MOTIFS["star"][0]) == sorted(MOTIFS["ring"][0])
    for motif, (kinds, _) in MOTIFS.items():
        graph = motif_graph(motif, 0.0, seed=3)
        assert graph.x[-5:].tolist() == list(kinds)
        tied = graph.edge_index[0, graph.edge_index[1] == len(graph.x) - 1]
        assert (tied < len(graph.x) - 5).sum() == 1


def test_training_graphs_are_the_seeds_and_those_of_validation_are_not() -> None:
    one, same, other, more = (open_data(f"motifs:train={n},val=10", seed=seed) for n, seed in ((20, 0), (20, 0), (20, 1), (30, 0)))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert all(torch.equal(one.train[i][0].edge_index, more.train[i][0].edge_index) for i in range(20))
    assert any(not torch.equal(one.train[i][0].x, other.train[i][0].x) for i in range(20))
    assert all(torch.equal(one.val[i][0].x, other.val[i][0].x) for i in range(10))
    for bad, message in (("train=1", "train=1"), ("noise=2", "noise=2"), ("size=3", "no option 'size'")):
        with pytest.raises(UserError, match=message):
            open_data(f"motifs:{bad}")


def test_batches() -> None:
    data = open_data("motifs:train=20,val=10")
    _, ids, graphs, labels = next(TrainBatches(data.train, Graphs(), batch=4, seed=0).epoch(0))
    assert graphs.num_graphs == 4
    assert labels.tolist() == [data.train[i][1] for i in ids.tolist()]
    assert torch.equal(graphs[1].x, data.train[int(ids[1])][0].x)
    assert [len(labels) for _, _, labels in eval_batches(data.val, Graphs(), batch=4)] == [4, 4, 2]
