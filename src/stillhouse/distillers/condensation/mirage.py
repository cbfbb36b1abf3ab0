"""Mirage: a set of graphs becomes a short list of computation trees that are often found together, and a network trains on those.

All that L layers of message passing know of a node is its computation tree of depth L. So a graph is the set of its nodes' trees; in each
class the sets of trees that occur together in at least theta graphs are mined, by FP-growth, and kept with how many graphs have them. A
network of L layers then trains on forests, each such a set of trees, drawn in proportion to that number, and reads the roots alone; it is
judged on whole graphs. No gradient takes part and no teacher, and one list serves networks of any kind with up to L layers.

Masked: nothing. Only trees that are rare, and those without a neighbour, are left out.
Source: Gupta et al., "Mirage: Model-Agnostic Graph Distillation for Graph Classification", ICLR 2024, arXiv 2310.09486.

    stillhouse distill --method mirage --student pyg/gin:hidden=32,layers=2 --data motifs --budget 4000

Sure: trees, canonical labels, itemsets by class, forests, sampling, the sum over roots. The code's thresholds are counts for each data set.
Our reading: `theta` is a share of the class's graphs (or a count); `budget` seeks the smallest share whose list, with its trees, takes no
more bytes. A root's embedding is exactly that of the node in its graph for gin, gat and sage, not for gcn: a tree loses degrees.
Departures: forests are drawn anew for every step, not once; trees without a neighbour are left out before mining, as in the code for
IMDB-B, not after; itemsets have at most `size` trees, as k trees that always occur together are 2^k sets. mlxtend mines all that counting
finds, pyfpgrowth, which the code calls, a few less.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillers.base import Distiller, Turn
from stillhouse.errors import UserError
from stillhouse.models.forests import Forests
from stillhouse.models.itemsets import MOST, Itemsets, TooMany, at_most, frequent
from stillhouse.models.trees import is_bare, need_graphs, tree_labels

LOG = logging.getLogger("stillhouse")
Transactions = list[frozenset[str]]


class Mirage(Distiller):
    """p(I, c) = support_c(I) / sum of all supports, over the itemsets I of trees with support_c(I) >= theta_c.

    Args:
        student: a graph network, as many layers as `hops` or fewer. It is not trained; copies of it, as fresh as it is, are trained on the
            forests to see what these are worth.
        hops: L, the depth of the trees.
        theta: in how many graphs of its class a set of trees has to be: a share of them below 1, a number of them from 1 on.
        budget: so many bytes may be kept; the smallest share is sought for which they are. 0: theta counts.
        size: of an itemset, at most.
        edges: whether kinds of edges are part of a tree, if the graphs have any.
        steps: of the training that examines the forests, with Adam.
        rate: its learning rate, going down to 0 as a cosine.
        forests: how many a step.

    Raises:
        UserError: if a setting is out of range, the student is deeper than the trees, and in `prepare` if graphs have no kinds of nodes, a
            class is left with nothing, or there would be too many itemsets.
    """

    off: ClassVar[dict[str, Any]] = {}
    frozen: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ("graphs",)

    def __init__(
        self,
        student: nn.Module,
        *,
        hops: int = 2,
        theta: float = 0.3,
        budget: int = 0,
        size: int = 3,
        edges: bool = True,
        steps: int = 500,
        rate: float = 0.005,
        forests: int = 64,
    ) -> None:
        need_graphs("mirage")
        if hops < 1 or size < 1 or steps < 1 or forests < 1 or budget < 0:
            told = f"hops={hops}, size={size}, steps={steps}, forests={forests}, budget={budget}"
            raise UserError(f"mirage is asked for {told}; expected at least 1 of each, and a budget of bytes or 0")
        if not 0 < theta < math.inf or not 0 < rate < math.inf:
            raise UserError(f"theta is {theta} and rate {rate}, expected a share or number of graphs and a learning rate, above 0")
        layers = getattr(student, "layers", hops)
        if layers > hops:
            raise UserError(f"the student has {layers} layers and sees further than trees of {hops} hops reach: say hops={layers}")
        super().__init__(student)
        self.hops, self.theta, self.budget, self.size, self.edges = hops, theta, budget, size, edges
        self.steps, self.rate, self.batch = steps, rate, forests
        self.kept = Forests()

    def turns(self) -> list[Turn]:
        """Nobody learns."""
        return []

    def forward(self, batch: Any, turn: str = "student") -> dict[str, Tensor]:
        """Nothing is minimised."""
        return {}

    def prepare(self, batches: Iterable[tuple[Any, Tensor]]) -> None:
        """Mines the forests."""
        samples: list[tuple[Any, int]] = []
        for graphs, labels in batches:
            samples += zip(graphs.cpu().to_data_list(), labels.tolist(), strict=True)
        self.kept = self.made(samples)
        LOG.info("mirage keeps %d sets of %d trees in %d bytes", len(self.kept), len(self.kept.trees), self.kept.bytes)

    def made(self, samples: Sequence[tuple[Any, int]]) -> Forests:
        """The forests of these graphs and classes."""
        classes: dict[int, Transactions] = {label: [] for label in range(getattr(self.student, "classes", 0))}
        for graph, label in samples:
            classes.setdefault(label, []).append(frozenset(tree for tree in self.trees(graph) if not is_bare(tree)))
        found = self.affordable(classes) if self.budget else self.mined(classes, self.theta)
        for label in (label for label, itemsets in found.items() if not itemsets):
            number, remedy = len(classes[label]), "a larger budget" if self.budget else "a smaller theta"
            if not any(classes[label]):
                what = f"{number} graphs and none of them an edge, so that no tree is" if number else "no graph"
                raise UserError(f"class number {label} has {what} to be mined; give every class graphs with edges, or leave it out")
            raise UserError(f"class number {label} is left without a tree that enough of its {number} graphs share: {remedy}")
        return assembled(found, {"hops": self.hops, "graphs": len(samples)})

    def trees(self, graph: Any) -> list[str]:
        """The computation tree of each node."""
        return tree_labels(graph, self.hops, self.edges)

    def mined(self, classes: dict[int, Transactions], theta: float) -> dict[int, Itemsets]:
        """The itemsets of each class with at least `theta`, a share or a number."""
        bounds = {label: math.ceil(theta * len(some) - 1e-9) if theta < 1 else math.ceil(theta) for label, some in classes.items()}
        for label, some in classes.items():
            if at_most(some, bounds[label], self.size) > MOST:
                raise TooMany(
                    f"class number {label} may have more than {MOST:,} itemsets of {self.size} trees: take a larger theta or a smaller size"
                )
        return {label: frequent(some, max(1, bounds[label]), self.size) for label, some in classes.items()}

    def affordable(self, classes: dict[int, Transactions]) -> dict[int, Itemsets]:
        """`mined` with the smallest share, in thousandths, whose forests take no more than the budget."""
        best: dict[int, Itemsets] = {label: {} for label in classes}
        low, high = 0, 1000
        while high - low > 1:
            middle = (low + high) // 2
            try:
                found = self.mined(classes, middle / 1000)
                fits = not any(found.values()) or assembled(found).bytes <= self.budget
            except TooMany:
                fits = False
            best, low, high = (found, low, middle) if fits else (best, middle, high)
        return best

    @property
    def products(self) -> dict[str, nn.Module]:
        """The forests."""
        return {"data": self.kept}

    def examined(self, kept: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """A copy of the student, as untrained as it is, trained on forests."""
        return {"student": trained(copy.deepcopy(self.student), kept["data"], self.steps, self.rate, self.batch)}


def assembled(found: Mapping[int, Itemsets], facts: dict[str, Any] | None = None) -> Forests:
    """The itemsets of all classes in an order of their own: by class, the most frequent first."""
    trees = sorted({tree for itemsets in found.values() for itemset in itemsets for tree in itemset})
    numbers = {tree: number for number, tree in enumerate(trees)}
    rows = [(label, -count, sorted(numbers[tree] for tree in itemset)) for label in found for itemset, count in found[label].items()]
    rows.sort(key=lambda row: (row[0], row[1], len(row[2]), row[2]))
    return Forests(trees, [row[2] for row in rows], [-row[1] for row in rows], [row[0] for row in rows], facts)


def trained(network: nn.Module, kept: Any, steps: int, rate: float, count: int) -> nn.Module:
    """The network after `steps` updates by the cross-entropy on `count` forests each, drawn from `kept`; in eval mode."""
    data = need_graphs("mirage").data
    device = next(network.parameters()).device
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        chosen = kept.draw(count)
        batch = data.Batch.from_data_list([kept.graph(i) for i in chosen]).to(device)
        labels = torch.tensor([kept.labels[i] for i in chosen], device=device)
        with torch.enable_grad():
            loss = F.cross_entropy(network(batch), labels)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()
