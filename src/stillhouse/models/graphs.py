"""Graph networks by name, `pyg/gin:hidden=32,layers=2`: torch-geometric's layers on kinds of nodes, one answer a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, nearest
from stillhouse.models.families import Fit
from stillhouse.models.specs import Spec
from stillhouse.models.trees import kinds_of, need_graphs
from stillhouse.models.weights import load_weights

NETWORKS = {"gin": "GIN", "gcn": "GCN", "gat": "GAT", "sage": "GraphSAGE"}
DEFAULTS: dict[str, Any] = {"hidden": 32, "layers": 2, "dropout": 0.0, "edges": 0}


class GraphNetwork(nn.Module):
    """A batch of torch-geometric to logits [B, K]: layers of message passing, the sum over nodes, a linear classifier.

    Nodes are `x`, long [N], kinds; one that is below 0 or not below `kinds` is of an unknown kind, which stays at zero. If the batch has
    `roots`, bool [N], it is of trees and the sum is over these alone. Nothing is normalised over the batch: a tree's root would no longer
    get what the node in its graph gets.

    Args:
        name: gin (sum), gcn, gat (attention) or sage (mean).
        kinds: how many kinds of nodes there are.
        classes: K.
        hidden: width.
        layers: how many, at least 1.
        dropout: after each layer but the last, and before the classifier.
        edges: how many kinds of edges are told apart; 0 for none. Only gin (GINE, arXiv 1905.12265) and gat can.

    Raises:
        UserError: if torch-geometric is not installed, there is no such network, or a number is out of range.
    """

    def __init__(
        self, name: str, kinds: int, classes: int, *, hidden: int = 32, layers: int = 2, dropout: float = 0.0, edges: int = 0
    ) -> None:
        nets = need_graphs(f"'pyg/{name}'").nn
        if name not in NETWORKS:
            raise UserError(f"there is no graph network '{name}'{nearest(name, NETWORKS)}; expected one of {', '.join(NETWORKS)}")
        if hidden < 1 or layers < 1 or edges < 0 or not 0 <= dropout < 1:
            raise UserError(
                f"'pyg/{name}' is asked for hidden={hidden}, layers={layers}, edges={edges}, dropout={dropout}; "
                "expected hidden and layers from 1, edges from 0, dropout in [0, 1)"
            )
        if edges and name not in ("gin", "gat"):
            raise UserError(f"'pyg/{name}' cannot tell kinds of edges apart; leave edges out, or take gin or gat")
        super().__init__()
        self.kinds, self.classes, self.layers, self.edges = kinds, classes, layers, edges
        self.embedding = nn.Embedding(kinds + 1, hidden, padding_idx=kinds)
        self.edge_embedding = nn.Embedding(edges + 1, hidden, padding_idx=edges) if edges else None
        options = {"edge_dim": hidden} if edges and name == "gat" else {}
        kind = gine() if edges and name == "gin" else getattr(nets, NETWORKS[name])
        self.body = kind(hidden, hidden, layers, dropout=dropout, **options)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, classes)

    def nodes(self, graphs: Any) -> Tensor:
        """What is known of each node after all layers, [N, hidden]."""
        told = {}
        if self.edge_embedding is not None:
            if graphs.edge_attr is None:
                raise UserError(f"the network tells {self.edges} kinds of edges apart, and these graphs say none; open it without edges=")
            told = {"edge_attr": self.edge_embedding(_known(kinds_of(graphs.edge_attr, "edges"), self.edges))}
        return self.body(self.embedding(_known(kinds_of(graphs.x, "nodes"), self.kinds)), graphs.edge_index, **told)  # type: ignore[no-any-return]

    def forward(self, graphs: Any) -> Tensor:
        """Logits [B, K]."""
        nodes = self.nodes(graphs)
        which = graphs.batch if graphs.batch is not None else torch.zeros(len(nodes), dtype=torch.int64, device=nodes.device)
        roots = getattr(graphs, "roots", None)
        if roots is not None:
            hops = int(getattr(graphs, "hops", torch.tensor(self.layers)).min())
            if hops < self.layers:
                raise UserError(
                    f"the network has {self.layers} layers and sees further than trees of {hops} hops reach: open it with layers={hops}"
                )
            nodes, which = nodes[roots], which[roots]
        sums = nodes.new_zeros(graphs.num_graphs if graphs.batch is not None else 1, nodes.shape[1]).index_add(0, which, nodes)
        return self.head(self.dropout(sums))  # type: ignore[no-any-return]


def _known(kinds: Tensor, number: int) -> Tensor:
    return kinds.where((kinds >= 0) & (kinds < number), number)


def gine() -> Any:
    """torch-geometric's GIN with layers that read edges."""
    from torch_geometric.nn import MLP, GINEConv
    from torch_geometric.nn.models.basic_gnn import BasicGNN

    class GINE(BasicGNN):
        supports_edge_weight = False
        supports_edge_attr = True

        def init_conv(self, in_channels: int, out_channels: int, **options: Any) -> nn.Module:
            return GINEConv(MLP([in_channels, out_channels, out_channels], act=self.act, norm=None), **options)

    return GINE


def open_graph_network(
    spec: Spec, fit: Fit, pretrained: bool, file: dict[str, Any] | None = None, allow_partial: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The network `pyg/NAME:OPTIONS` for `fit.channels` kinds of nodes and `fit.classes` classes, and the options that build it again.

    Options are those of `GraphNetwork`.

    Raises:
        UserError: for an unknown name or option, one that does not fit, or weights that cannot be had.
    """
    if pretrained:
        raise UserError(f"there are no published weights for '{spec}', leave them out or give a file")
    options = dict(DEFAULTS)
    for key, value in spec.options.items():
        if key not in DEFAULTS:
            raise UserError(
                f"graph network '{spec.name}' has no option '{key}'{nearest(key, DEFAULTS) or ','} known: {', '.join(DEFAULTS)}"
            )
        if type(value) not in (int, type(DEFAULTS[key])):
            raise UserError(f"'{spec}' says {key}={value!r}, expected for example {key}={DEFAULTS[key]}")
        options[key] = value
    model = GraphNetwork(spec.name, fit.channels, fit.classes, **options)
    if file is not None:
        load_weights(model, file, allow_partial)
    return model, options
