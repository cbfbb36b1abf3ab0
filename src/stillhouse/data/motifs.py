"""Random trees that carry a motif: a ring of four with a tail, or a star of the same kinds of nodes. What the motif is, is the class.

Nodes are of three kinds. A graph is a random tree of 12 to 24 nodes, and one to three copies of its class's motif of five nodes, whose last
is tied to a node of the tree; then each node's kind is replaced by a random one with probability `noise`. Both motifs have the same kinds
of nodes, so that counting them says nothing. Options: `train` and `val` (how many graphs, 400 and 400), `noise` (0.1).

Graph i is a function of the seed and i, in validation of i alone; half of them are of each class.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from stillhouse.data import Data
from stillhouse.data.arrays import fingerprint
from stillhouse.data.graphs import GraphList, undirected
from stillhouse.data.options import read_options, within
from stillhouse.models.trees import need_graphs
from stillhouse.randomness import seed_from

KINDS = 3
MOTIFS = {
    "star": ((0, 0, 1, 1, 2), ((0, 1), (0, 2), (0, 3), (0, 4))),
    "ring": ((0, 1, 0, 2, 1), ((0, 1), (1, 2), (2, 3), (3, 0), (0, 4))),
}
"""Kinds of the nodes, and edges."""


def open_motifs(text: str, *, seed: int = 0) -> Data:
    """Open `motifs:TEXT`; TEXT may be empty. `seed` draws the training graphs, never those of validation.

    Raises:
        UserError: if torch-geometric is not installed, or an option is unknown or out of range.
    """
    options = {"train": 400, "val": 400, "noise": 0.1, **read_options(text, "motifs", train=int, val=int, noise=float)}
    within("train", options["train"], 2, 100_000)
    within("val", options["val"], 2, 100_000)
    within("noise", options["noise"], 0, 1)
    train, val = (
        GraphList(*_drawn(int(options[part]), options["noise"], *where))
        for part, where in (("train", ("motifs", "train", seed)), ("val", ("motifs", "val")))
    )
    return Data(
        name=f"motifs:{text}" if text else "motifs",
        train=train,
        val=val,
        classes=list(MOTIFS),
        channels=KINDS,
        fingerprint=fingerprint(*train.parts(), *val.parts()),
        inputs="graphs",
    )


def _drawn(count: int, noise: float, *where: int | str) -> tuple[list[Any], list[int]]:
    labels = [i % len(MOTIFS) for i in range(count)]
    return [motif_graph(list(MOTIFS)[label], noise, seed_from(*where, i)) for i, label in enumerate(labels)], labels


def motif_graph(motif: str, noise: float, seed: int) -> Any:
    """One graph of torch-geometric."""
    data, draws = need_graphs("motifs").data, random.Random(seed)
    size = draws.randint(12, 24)
    kinds = [draws.randrange(KINDS) for _ in range(size)]
    pairs = [(draws.randrange(node), node) for node in range(1, size)]
    for _ in range(draws.randint(1, 3)):
        own, edges = MOTIFS[motif]
        first = len(kinds)
        pairs += [(draws.randrange(size), first + len(own) - 1), *((first + a, first + b) for a, b in edges)]
        kinds += own
    kinds = [draws.randrange(KINDS) if draws.random() < noise else kind for kind in kinds]
    return data.Data(x=torch.tensor(kinds), edge_index=undirected(pairs))
