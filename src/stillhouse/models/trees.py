"""Computation trees: all that L layers of message passing can know of a node, as strings that are equal just where the trees are.

The tree of a node has the node at its root, and below each of its nodes all neighbours in the graph, the one it came from among them, down
to depth L (Xu et al., arXiv 1810.00826; Gupta et al., arXiv 2310.09486). A graph is `x` long [N], kinds of nodes; `edge_index` long [2, E],
from neighbour to node; and perhaps `edge_attr` long [E], kinds of edges.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import UserError


def need_graphs(what: str) -> Any:
    """The module torch_geometric, for `what`.

    Raises:
        UserError: if it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it imports of torch is told to be old
            import torch_geometric
    except ImportError:
        raise UserError(f"{what} needs torch-geometric: pip install 'stillhouse[graphs]'") from None
    return torch_geometric


def kinds_of(values: Tensor | None, what: str) -> Tensor:
    """Kinds long [N] from whole numbers [N] or [N, 1].

    Raises:
        UserError: if there are none, they are no whole numbers, or there are several for one.
    """
    if values is None:
        raise UserError(f"a graph has no {what}: say what kind each is, as whole numbers [N]; where all are alike, their degree will do")
    if values.dtype.is_floating_point or values.dtype.is_complex:
        raise UserError(
            f"a graph's {what} are {values.dtype}, expected kinds, as whole numbers [N]; put numbers that vary into classes before"
        )
    if values.ndim > 2 or (values.ndim == 2 and values.shape[1] != 1):
        raise UserError(
            f"a graph's {what} have the shape {tuple(values.shape)}, expected one kind for each, [N]; number their combinations"
        )
    return values.reshape(-1).long()


def neighbours(graph: Any) -> list[dict[int, int]]:
    """For each node the nodes that tell it something, with the kind of the edge (0 without kinds); no loops, and each of them once."""
    kinds = kinds_of(graph.edge_attr, "edges") if graph.edge_attr is not None else torch.zeros_like(graph.edge_index[0])
    found: list[dict[int, int]] = [{} for _ in range(len(graph.x))]
    for source, target, kind in zip(*graph.edge_index.tolist(), kinds.tolist(), strict=True):
        if source != target:
            found[target].setdefault(source, kind)
    return found


def tree_labels(graph: Any, hops: int, edges: bool = True) -> list[str]:
    """The tree of each node: its kind, then of each child the edge's kind (0 without `edges`) and its own tree, in order, then $.

    Neither the numbering of nodes nor the order of edges matters. With no hops it is the kind alone.

    Raises:
        UserError: if kinds are not whole numbers.
    """
    kinds, below = kinds_of(graph.x, "nodes").tolist(), neighbours(graph)
    labels = [f"{kind} $" for kind in kinds]
    for _ in range(hops):
        children = [sorted(f"{kind if edges else 0} {labels[other]}" for other, kind in found.items()) for found in below]
        labels = [" ".join([str(kind), *some, "$"]) for kind, some in zip(kinds, children, strict=True)]
    return labels


def is_bare(label: str) -> bool:
    """Whether a tree is a root without children."""
    return label.count(" ") == 1


def encoded(labels: Sequence[str]) -> Tensor:
    """Trees one behind the other, root first and each node before its children: long [nodes, 3], depth, kind, kind of the edge above it."""
    rows: list[tuple[int, int, int]] = []
    for label in labels:
        depth, edge, expects_node = 0, 0, True
        for word in label.split():
            if word == "$":
                depth, expects_node = depth - 1, False
            elif expects_node:
                rows.append((depth, int(word), edge))
                depth, expects_node = depth + 1, False
            else:
                edge, expects_node = int(word), True
        assert depth == 0
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3)


def decoded(nodes: Tensor) -> list[str]:
    """The labels of `encoded` trees [nodes, 3]."""
    labels: list[str] = []
    words: list[str] = []
    open_ = 0
    for depth, kind, edge in [*nodes.tolist(), [0, 0, 0]]:
        words += ["$"] * (open_ - depth)
        if depth == 0:
            labels += [" ".join(words)] if words else []
            words = []
        words += [str(edge)] * (depth > 0) + [str(kind)]
        open_ = depth + 1
    return labels


def forest(labels: Sequence[str], hops: int) -> Any:
    """Trees of depth `hops` side by side as a graph of torch-geometric: edges from child to parent, `roots` bool [N], `hops` long [1]."""
    data = need_graphs("a forest").data
    nodes = encoded(labels)
    path: list[int] = []
    pairs: list[tuple[int, int]] = []
    for i, depth in enumerate(nodes[:, 0].tolist()):
        path[depth:] = [i]
        pairs += [(i, path[depth - 1])] if depth else []
    below = nodes[:, 0] > 0
    edge_index = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).t().contiguous()
    parts = {"edge_attr": nodes[below, 2].clone(), "roots": ~below, "hops": torch.tensor([hops])}
    return data.Data(x=nodes[:, 1].clone(), edge_index=edge_index, **parts)
