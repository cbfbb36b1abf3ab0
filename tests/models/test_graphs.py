from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("torch_geometric", reason="torch-geometric is not installed", exc_type=ImportError)

from torch_geometric.data import Batch, Data

from stillhouse.data.graphs import Graphs, undirected
from stillhouse.errors import UserError
from stillhouse.models import trees
from stillhouse.models.forests import Forests, is_forests, read_forests, smallest
from stillhouse.models.graphs import GraphNetwork
from stillhouse.models.opening import open_model
from stillhouse.models.saving import load_student, save_student
from stillhouse.models.trees import decoded, encoded, forest, is_bare, tree_labels


@st.composite
def graphs(draw: Any, kinds: int = 3, edge_kinds: int = 2) -> Any:
    """Any small graph: loops, repeated edges, parts without edges and all."""
    nodes = draw(st.integers(1, 7))
    pairs = draw(st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), max_size=10))
    told = draw(st.lists(st.integers(0, edge_kinds - 1), min_size=len(pairs), max_size=len(pairs)))
    seen: dict[tuple[int, int], int] = {}
    told = [seen.setdefault((min(pair), max(pair)), kind) for pair, kind in zip(pairs, told, strict=True)]
    x = draw(st.lists(st.integers(0, kinds - 1), min_size=nodes, max_size=nodes))
    attr = torch.tensor(told, dtype=torch.int64).repeat_interleave(2)
    return Data(x=torch.tensor(x), edge_index=undirected(pairs), edge_attr=attr)


def simple(graph: Any) -> Any:
    """Without loops and repeated edges, as trees have it."""
    found = [(a, b, kind) for b, each in enumerate(trees.neighbours(graph)) for a, kind in each.items()]
    index = torch.tensor([(a, b) for a, b, _ in found], dtype=torch.int64).view(-1, 2).t()
    return Data(x=graph.x, edge_index=index, edge_attr=torch.tensor([kind for *_, kind in found], dtype=torch.int64))


def network(name: str, layers: int = 2, edges: int = 0, seed: int = 0) -> GraphNetwork:
    torch.manual_seed(seed)
    return GraphNetwork(name, 3, 2, hidden=8, layers=layers, edges=edges).double().eval()


EXACT = pytest.mark.parametrize(("name", "edges"), [("gin", 0), ("gin", 2), ("sage", 0), ("gat", 0), ("gat", 2)])


@EXACT
@given(graph=graphs(), layers=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_a_root_gets_exactly_what_its_node_gets(name: str, edges: int, graph: Any, layers: int) -> None:
    graph, net = simple(graph), network(name, layers, edges)
    wood = forest(tree_labels(graph, layers), layers)
    with torch.no_grad():
        torch.testing.assert_close(net.nodes(wood)[wood.roots], net.nodes(graph), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(net(wood), net(graph), rtol=1e-11, atol=1e-11)


def test_but_not_with_gcn_nor_without_the_way_back_nor_over_all_nodes() -> None:
    graph = Data(x=torch.tensor([0, 1, 2, 1, 0]), edge_index=undirected([(0, 1), (1, 2), (2, 3), (1, 4)]))
    wood = forest(tree_labels(graph, 2), 2)
    with torch.no_grad():
        gcn, gin = network("gcn"), network("gin")
        assert (gcn.nodes(wood)[wood.roots] - gcn.nodes(graph)).abs().max() > 1e-3
        assert (gin(Data(x=wood.x, edge_index=wood.edge_index)) - gin(graph)).abs().max() > 1e-3
        down = forest(["0 0 1 0 2 $ 0 1 $ $ $"], 2)  # node 0's tree, had its neighbour not led back to it
        assert tree_labels(graph, 2)[0] == "0 0 1 0 0 $ 0 0 $ 0 2 $ $ $"
        assert (gin.nodes(down)[0] - gin.nodes(graph)[0]).abs().max() > 1e-3
        assert (gin.nodes(forest(tree_labels(graph, 1), 2))[0] - gin.nodes(graph)[0]).abs().max() > 1e-3


@given(graph=graphs(), hops=st.integers(0, 3), data=st.data())
@settings(max_examples=60, deadline=None)
def test_neither_numbers_of_nodes_nor_order_of_edges_matter(graph: Any, hops: int, data: Any) -> None:
    place = torch.tensor(data.draw(st.permutations(range(len(graph.x)))), dtype=torch.int64)
    order = torch.tensor(data.draw(st.permutations(range(graph.edge_index.shape[1]))), dtype=torch.int64)
    x = torch.empty_like(graph.x)
    x[place] = graph.x
    other = Data(x=x, edge_index=place[graph.edge_index][:, order], edge_attr=graph.edge_attr[order])
    labels = tree_labels(other, hops)
    assert [labels[i] for i in place.tolist()] == tree_labels(graph, hops)


def test_labels_by_hand() -> None:
    path = Data(x=torch.tensor([2, 0, 1]), edge_index=undirected([(0, 1), (1, 2)]), edge_attr=torch.tensor([1, 1, 0, 0]))
    assert tree_labels(path, 0) == ["2 $", "0 $", "1 $"]
    assert tree_labels(path, 1) == ["2 1 0 $ $", "0 0 1 $ 1 2 $ $", "1 0 0 $ $"]
    assert tree_labels(path, 1, edges=False) == ["2 0 0 $ $", "0 0 1 $ 0 2 $ $", "1 0 0 $ $"]
    assert [is_bare(label) for label in ("17 $", "1 0 0 $ $")] == [True, False]
    for change in ({"x": torch.tensor([2, 0, 0])}, {"edge_attr": torch.tensor([1, 1, 1, 1])}):
        other = copy.copy(path).update(change)
        assert tree_labels(other, 2)[0] != tree_labels(path, 2)[0]
        assert tree_labels(other, 1)[0] == tree_labels(path, 1)[0]
    # numbers of two digits do not run together, nor do a node's kind and an edge's
    assert (
        len({tree_labels(Data(x=torch.tensor(x), edge_index=undirected([(0, 1)])), 1)[0] for x in ([1, 11], [11, 1], [1, 1], [11, 11])})
        == 4
    )


@given(graph=graphs(), hops=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_tree_has_a_node_for_each_walk_and_survives_its_code(graph: Any, hops: int) -> None:
    graph = simple(graph)
    adjacency = torch.zeros(len(graph.x), len(graph.x), dtype=torch.int64)
    adjacency[graph.edge_index[1], graph.edge_index[0]] = 1
    walks = sum(torch.matrix_power(adjacency, length).sum(1) for length in range(hops + 1))
    labels = tree_labels(graph, hops)
    assert [len(encoded([label])) for label in labels] == walks.tolist()
    assert decoded(encoded(labels)) == labels
    wood = forest(labels, hops)
    out = torch.bincount(wood.edge_index[0], minlength=len(wood.x))
    assert torch.equal(out == 0, wood.roots)
    assert (out <= 1).all()
    assert int(wood.roots.sum()) == len(labels)
    above = torch.arange(len(wood.x))
    above[wood.edge_index[0]] = wood.edge_index[1]
    for _ in range(hops):
        above = above[above]
    assert wood.roots[above].all()  # every way up ends at a root after `hops` edges at most
    back = Data(x=wood.x, edge_index=wood.edge_index, edge_attr=wood.edge_attr)
    assert [tree_labels(back, hops)[i] for i in wood.roots.nonzero()[:, 0].tolist()] == labels


def test_graphs_become_a_batch_and_bad_ones_are_told() -> None:
    transform = Graphs()
    good = Data(x=torch.tensor([[1], [0]]), edge_index=undirected([(0, 1)]), y=torch.ones(3), pos=torch.rand(2, 3))
    lonely = Data(x=torch.tensor([1]), edge_index=undirected([]))
    samples = [transform(good, torch.tensor(1)), transform(lonely, 0)]
    batch, targets = transform.together([graph for graph, _ in samples], [target for _, target in samples])
    assert batch.num_graphs == 2
    assert sorted(batch.keys()) == ["batch", "edge_index", "ptr", "x"]
    assert batch.x.tolist() == [1, 0, 1]
    assert targets.tolist() == [1, 0]
    assert network("gin")(batch).shape == (2, 2)
    for change, message in (
        ({"x": torch.rand(2, 5)}, "float32, expected kinds, as whole numbers"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, r"shape \(2, 3\)"),
        ({"x": None}, "has no nodes"),
        ({"x": torch.ones(0, dtype=torch.int64)}, "no nodes"),
        ({"edge_index": torch.tensor([[0], [2]])}, "an edge to node 2, expected 0 to 1"),
        ({"edge_index": None}, "no edge_index"),
        ({"edge_attr": torch.rand(2)}, "edges are torch.float32"),
        ({"edge_attr": torch.ones(1, dtype=torch.int64)}, "2 edges and kinds of 1"),
    ):
        with pytest.raises(UserError, match=message):
            transform(copy.copy(good).update(change), 0)


@pytest.mark.parametrize("name", ["gin", "gcn", "gat", "sage"])
def test_networks_by_name(name: str, tmp_path: Path) -> None:
    model = open_model(f"pyg/{name}:hidden=8,layers=3", classes=2, channels=3, seed=1)
    again = open_model(f"pyg/{name}:hidden=8,layers=3", classes=2, channels=3, seed=1)
    batch = Batch.from_data_list(
        [Data(x=torch.tensor([0, 1, 2]), edge_index=undirected([(0, 1), (1, 2)])), Data(x=torch.tensor([7]), edge_index=undirected([]))]
    )
    assert model(batch).shape == (2, 2)
    assert torch.equal(model(batch), again(batch))
    alone = [model(batch[i])[0] for i in range(2)]
    torch.testing.assert_close(torch.stack(alone), model(batch))
    save_student(model, tmp_path / "student")
    torch.testing.assert_close(load_student(tmp_path / "student")(batch), model(batch))
    opened = open_model(str(tmp_path), classes=2, channels=3)
    torch.testing.assert_close(opened(batch), model(batch))
    with pytest.raises(UserError, match="takes 3 channel"):
        open_model(str(tmp_path), classes=2, channels=4)


def test_an_unknown_kind_is_one_of_its_own_and_starts_at_nothing() -> None:
    net = network("gin", edges=2)
    graph = Data(x=torch.tensor([0, 1]), edge_index=undirected([(0, 1)]), edge_attr=torch.tensor([1, 1]))
    logits = [net(copy.copy(graph).update({"x": torch.tensor([0, kind])})) for kind in (1, 3, 4, -1)]
    assert not torch.equal(logits[0], logits[1])
    assert torch.equal(logits[1], logits[2])
    assert torch.equal(logits[1], logits[3])
    assert not net.embedding(torch.tensor(3)).any()
    assert torch.equal(
        net(copy.copy(graph).update({"edge_attr": torch.tensor([2, 2])})), net(copy.copy(graph).update({"edge_attr": torch.tensor([9, 9])}))
    )


def test_what_cannot_be_built_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, message in (
        ("pyg/gan", "no graph network 'gan', did you mean"),
        ("pyg/gin:width=8", "no option 'width', known: hidden, layers, dropout, edges"),
        ("pyg/gin:hidden=wide", "expected for example hidden=32"),
        ("pyg/gin:layers=0", "layers=0"),
        ("pyg/sage:edges=2", "cannot tell kinds of edges apart"),
    ):
        with pytest.raises(UserError, match=message):
            open_model(spec, classes=2, channels=3)
    with pytest.raises(UserError, match="no published weights"):
        open_model("pyg/gin", classes=2, channels=3, weights="pretrained")
    with pytest.raises(UserError, match="open it without edges="):
        network("gin", edges=2)(Data(x=torch.tensor([0]), edge_index=undirected([])))
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    with pytest.raises(UserError, match=r"'pyg/gin' needs torch-geometric: pip install 'stillhouse\[graphs\]'$"):
        open_model("pyg/gin", classes=2, channels=3)
    with pytest.raises(UserError, match=r"pip install 'stillhouse\[graphs\]'$"):
        Graphs()


def test_forests_are_drawn_by_support_and_kept_in_few_bytes(tmp_path: Path) -> None:
    made = Forests(
        ["0 0 1 $ $", "1 0 0 $ $", "2 3 300 $ $"], [[0], [0, 1], [2]], [70000, 20000, 10000], [0, 1, 1], {"hops": 1, "graphs": 9}
    )
    assert made.chances().tolist() == [0.7, 0.2, 0.1]
    torch.manual_seed(0)
    counts = torch.bincount(torch.tensor(made.draw(10_000)), minlength=3).double()
    expected = 10_000 * made.chances()
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, p = 0.001
    assert made.bytes == sum(tensor.nbytes for tensor in made.tensors().values()) == 6 + 12 + 6 + 4 + 3 + 12 + 3
    made.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "data.safetensors"]
    again = read_forests(tmp_path)
    assert is_forests(tmp_path)
    assert not is_forests(tmp_path.parent)
    assert (again.trees, again.members, again.supports, again.labels) == (made.trees, made.members, made.supports, made.labels)
    assert again.about == made.about
    assert again.graph(2).edge_attr.tolist() == [3]
    for name, bad in (("about.json", "{}"), ("about.json", '{"kind": "pictures"}'), ("data.safetensors", "x")):
        broken = tmp_path / f"broken-{len(bad)}"
        made.write(broken)
        (broken / name).write_text(bad)
        with pytest.raises(UserError, match=r"holds no forests|cannot be read"):
            read_forests(broken)
    assert [smallest(torch.tensor(values)).dtype for values in ([255], [-1], [40000], [2**40], [])] == [
        *(torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint8)
    ]


def test_gradients_do_not_depend_on_the_order_of_trees_and_a_network_may_not_be_deeper() -> None:
    labels = ["0 0 1 $ 0 2 $ $", "1 0 0 $ $", "2 0 0 $ $"]

    def gradients(order: list[int]) -> list[Tensor]:
        net = network("gin", layers=1)
        torch.nn.functional.cross_entropy(net(forest([labels[i] for i in order], 1)), torch.tensor([1])).backward()
        return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]

    for one, other in zip(gradients([0, 1, 2]), gradients([2, 0, 1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    with pytest.raises(UserError, match="has 2 layers and sees further than trees of 1 hops"):
        network("gin")(forest(labels, 1))
