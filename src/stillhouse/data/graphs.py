"""Graphs as samples: what there must be in one, and how several become a batch of torch-geometric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stillhouse.errors import UserError
from stillhouse.models.trees import kinds_of, need_graphs


class Graphs:
    """The transform of graphs: nothing is changed, all is looked at.

    Raises:
        UserError: if torch-geometric is not installed.
    """

    def __init__(self) -> None:
        self.library = need_graphs("data of graphs").data

    def __call__(self, sample: Any, target: Any) -> tuple[Any, int]:
        """The graph with nothing but `x`, `edge_index`, and if it has them `edge_attr`, `roots` and `hops`; its class.

        Raises:
            UserError: if its kinds are no whole numbers, or its edges do not fit its nodes.
        """
        edge_index = getattr(sample, "edge_index", None)
        if edge_index is None or edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
            raise UserError("a graph has no edge_index, expected whole numbers [2, edges], the nodes that each edge comes from and goes to")
        x = kinds_of(getattr(sample, "x", None), "nodes")
        if not len(x):
            raise UserError("a graph has no nodes, expected at least one; leave it out")
        if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < len(x):
            raise UserError(f"a graph of {len(x)} nodes has an edge to node {int(edge_index.max())}, expected 0 to {len(x) - 1}")
        parts = {"edge_attr": kinds_of(sample.edge_attr, "edges")} if getattr(sample, "edge_attr", None) is not None else {}
        if "edge_attr" in parts and len(parts["edge_attr"]) != edge_index.shape[1]:
            raise UserError(f"a graph has {edge_index.shape[1]} edges and kinds of {len(parts['edge_attr'])}, expected one for each")
        parts |= {name: sample[name] for name in ("roots", "hops") if getattr(sample, name, None) is not None}
        return self.library.Data(x=x, edge_index=edge_index, **parts), int(target)

    def together(self, samples: list[Any], targets: list[int]) -> tuple[Any, Tensor]:
        """A batch of torch-geometric and its classes long [B]."""
        return self.library.Batch.from_data_list(samples), torch.tensor(targets)


class GraphList(Dataset[tuple[Any, int]]):
    """Graphs and their classes, in memory."""

    def __init__(self, graphs: list[Any], labels: list[int]) -> None:
        self.graphs, self.labels = graphs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.graphs[i], self.labels[i]

    def parts(self) -> list[Tensor]:
        """What they are, for a fingerprint."""
        edges = [graph.edge_attr for graph in self.graphs if graph.edge_attr is not None]
        return [
            torch.cat([graph.x for graph in self.graphs]),
            torch.cat([graph.edge_index for graph in self.graphs], 1),
            torch.tensor([[graph.num_nodes, graph.num_edges] for graph in self.graphs]),
            *([torch.cat(edges)] if edges else []),
            torch.tensor(self.labels),
        ]


def undirected(pairs: list[tuple[int, int]]) -> Tensor:
    """Edges both ways, long [2, 2 E]: pair by pair."""
    both = [(a, b) for pair in pairs for a, b in (pair, pair[::-1])]
    return torch.tensor(both, dtype=torch.int64).view(-1, 2).t().contiguous()
