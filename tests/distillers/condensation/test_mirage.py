from __future__ import annotations

import copy
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch_geometric", reason="torch-geometric is not installed", exc_type=ImportError)
pytest.importorskip("mlxtend", reason="mlxtend is not installed", exc_type=ImportError)

from torch_geometric.data import Batch, Data

from stillhouse import distill, distillers
from stillhouse.data import open_data
from stillhouse.data.forests import Drawn, open_forests
from stillhouse.data.graphs import Graphs, undirected
from stillhouse.data.loading import TrainBatches, eval_batches
from stillhouse.distillers.condensation.mirage import Mirage, assembled, trained
from stillhouse.errors import UserError
from stillhouse.evidence.mirage import Whole
from stillhouse.models import itemsets
from stillhouse.models.forests import Forests, read_forests
from stillhouse.models.graphs import GraphNetwork
from stillhouse.models.itemsets import at_most, frequent
from stillhouse.models.trees import tree_labels
from stillhouse.report.page import facts
from stillhouse.tasks.classify import Classify

TRANSACTIONS = st.lists(st.frozensets(st.sampled_from("abcdef")), max_size=8)


def student(name: str = "gin", layers: int = 2, **options: Any) -> GraphNetwork:
    torch.manual_seed(0)
    return GraphNetwork(name, 3, 2, hidden=8, layers=layers, **options)


def mined(data: Any, **settings: Any) -> Forests:
    """The forests of a data set."""
    method = Mirage(student(), **settings)
    method.prepare((graphs, labels) for _, graphs, labels in eval_batches(data.train, Graphs(), batch=16))
    assert isinstance(method.products["data"], Forests)
    return method.products["data"]


def brute_force(transactions: list[frozenset[str]], threshold: int, size: int) -> dict[frozenset[str], int]:
    items = sorted(set().union(*transactions))
    sets = [frozenset(some) for k in range(1, size + 1) for some in itertools.combinations(items, k)]
    counts = {each: sum(each <= transaction for transaction in transactions) for each in sets}
    return {each: count for each, count in counts.items() if count >= threshold}


@given(transactions=TRANSACTIONS, threshold=st.integers(1, 5), size=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_mining_is_counting(transactions: list[frozenset[str]], threshold: int, size: int) -> None:
    found = frequent(transactions, threshold, size)
    assert found == brute_force(transactions, threshold, size)
    assert len(found) <= at_most(transactions, threshold, size) + 1e-6
    for itemset, support in found.items():
        assert all(found[itemset - {item}] >= support for item in itemset if len(itemset) > 1)
    assert frequent(transactions, len(transactions) + 1, size) == {}


@given(transactions=TRANSACTIONS)
@settings(max_examples=30, deadline=None)
def test_with_a_threshold_of_one_every_transaction_is_an_itemset(transactions: list[frozenset[str]]) -> None:
    assert {each for each in transactions if each} <= set(frequent(transactions, 1, 6))


def test_the_bound_is_reached_where_all_go_together() -> None:
    together = [frozenset("abcdefgh")] * 4
    for size in (1, 2, 3, 8):
        assert at_most(together, 3, size) == pytest.approx(len(frequent(together, 3, size)))
    assert at_most(together, 5, 3) == 0


def test_what_is_kept_is_what_counting_says() -> None:
    data = open_data("motifs:train=40,val=4,noise=0.05")
    kept = mined(data, theta=0.25, size=2)
    for label in (0, 1):
        transactions = [frozenset(tree_labels(graph, 2)) for graph, own in data.train if own == label]
        assert len(transactions) == 20
        expected = {each: sum(each <= some for some in transactions) for each in frequent(transactions, 5, 2)}
        rows = [row for row in range(len(kept)) if kept.labels[row] == label]
        assert {frozenset(kept.trees[tree] for tree in kept.members[row]): kept.supports[row] for row in rows} == expected
    total = sum(kept.supports)
    assert kept.chances().tolist() == pytest.approx([support / total for support in kept.supports])
    assert kept.about == {"hops": 2, "graphs": 40}
    count = mined(data, theta=5, size=2)  # the same, as a number of graphs
    assert (count.trees, count.members, count.supports) == (kept.trees, kept.members, kept.supports)
    assert max(map(len, mined(data, theta=0.25, size=1).members)) == 1
    i = max(range(len(kept)), key=lambda i: len(kept.members[i]))
    graph = kept.graph(i)
    assert int(graph.roots.sum()) == len(kept.members[i]) == 2
    assert int(graph.hops) == 2


def test_it_is_deterministic_whatever_the_order_of_batches_and_costs_no_more_than_its_budget() -> None:
    data = open_data("motifs:train=60,val=4")
    sizes = []
    for budget in (200, 400, 1000):
        kept, again = mined(data, budget=budget), mined(data, budget=budget)
        assert kept.tensors().keys() == again.tensors().keys()
        assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in kept.tensors().items())
        assert 0 < kept.bytes <= budget
        assert set(kept.labels) == {0, 1}
        sizes.append(kept.bytes)
    assert sizes == sorted(sizes)
    with pytest.raises(UserError, match=r"left without a tree .* larger budget"):
        mined(data, budget=20)


def test_edges_count_unless_told() -> None:
    graph = Data(x=torch.tensor([0, 1]), edge_index=undirected([(0, 1)]), edge_attr=torch.tensor([3, 3]))
    batch = [(Batch.from_data_list([graph, graph]), torch.tensor([0, 1]))]
    for edges, kind in ((True, "3"), (False, "0")):
        method = Mirage(student(), edges=edges, theta=1, hops=2)
        method.prepare(batch)
        assert method.kept.trees == [f"0 {kind} 1 {kind} 0 $ $ $", f"1 {kind} 0 {kind} 1 $ $ $"]
        assert method.kept.supports == [1] * 6


def test_what_cannot_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad, message in (
        ({"hops": 0}, "hops=0"),
        ({"theta": 0.0}, "theta is 0.0"),
        ({"theta": -3}, "theta is -3"),
        ({"theta": float("nan")}, "theta is nan"),
        ({"rate": 0.0}, "rate 0.0"),
        ({"budget": -1}, "budget=-1"),
        ({"size": 0}, "size=0"),
        ({"hops": 1}, "has 2 layers and sees further than trees of 1 hops reach: say hops=2"),
    ):
        with pytest.raises(UserError, match=message):
            Mirage(student(), **bad)
    Mirage(student(layers=1), hops=2)
    pair, lonely = (Data(x=torch.tensor(x), edge_index=undirected(e)) for x, e in (([0, 1], [(0, 1)]), ([0, 1], [])))
    method = Mirage(student(), theta=1)
    no_tree = "class number 1 has 1 graphs and none of them an edge, so that no tree is to be mined; give every class graphs with edges"
    for of in ({"theta": 1}, {"budget": 1000}):
        with pytest.raises(UserError, match=no_tree):
            Mirage(student(), **of).prepare([(Batch.from_data_list([pair, lonely]), torch.tensor([0, 1]))])
    with pytest.raises(UserError, match="class number 1 has no graph to be mined; give every class graphs with edges, or leave it out"):
        method.prepare([(Batch.from_data_list([pair]), torch.tensor([0]))])
    with pytest.raises(UserError, match="class number 1 is left without a tree that enough of its 1 graphs share: a smaller theta"):
        Mirage(student(), theta=2).prepare([(Batch.from_data_list([pair, pair, pair]), torch.tensor([0, 0, 1]))])
    with pytest.raises(UserError, match="float32, expected kinds"):
        method.prepare([(Batch.from_data_list([copy.copy(pair).update({"x": torch.rand(2, 4)})]), torch.tensor([0]))])
    method.prepare(
        [(Batch.from_data_list([pair, lonely, pair]), torch.tensor([0, 0, 1]))]
    )  # one without edges has no tree, and that is all
    assert [method.kept.supports[i] for i in range(3)] == [1, 1, 1]
    data = open_data("motifs:train=20,val=4")
    monkeypatch.setattr(itemsets, "MOST", 10)
    monkeypatch.setattr("stillhouse.distillers.condensation.mirage.MOST", 10)
    with pytest.raises(UserError, match="may have more than 10 itemsets of 3 trees"):
        mined(data, theta=1)
    monkeypatch.setitem(sys.modules, "mlxtend.frequent_patterns", None)
    with pytest.raises(UserError, match=r"mirage needs mlxtend.*: pip install 'stillhouse\[graphs\]'$"):
        frequent([frozenset("ab")], 1, 2)


def test_networks_of_any_kind_learn_from_one_list_and_the_student_stays_as_it_is() -> None:
    stars = [
        Data(x=torch.tensor([label, 1, 1] + [2 * label] * (i % 3)), edge_index=undirected([(0, leaf) for leaf in range(1, 3 + i % 3)]))
        for i in range(30)
        for label in (0, 1)
    ]
    graphs, labels = Batch.from_data_list(stars), torch.tensor([0, 1] * 30)
    maker = Mirage(student(), theta=0.3)
    maker.prepare([(graphs, labels)])
    kept = maker.kept
    for name in ("gin", "gat", "sage"):
        method = Mirage(student(name), steps=100, rate=0.01)
        before = copy.deepcopy(method.student.state_dict())
        with torch.no_grad():
            torch.manual_seed(1)
            network = method.examined({"data": kept})["student"]
            torch.manual_seed(1)
            again = method.examined({"data": kept})["student"]
            metric = Classify(["one", "other"])
            metric.update(network(graphs), labels)
            assert metric.compute()["auroc"] > 0.9, name
            assert torch.equal(network(graphs), again(graphs))
        assert not network.training
        assert all(torch.equal(before[key], value) for key, value in method.student.state_dict().items())
    assert method.turns() == []
    assert method((graphs, labels)) == {}
    assert not any(key.startswith("kept") for key in method.state_dict())  # what is mined again needs no checkpoint


def test_evidence_counts_graphs_as_sparingly_as_forests() -> None:
    data = open_data("motifs:train=40,val=4")
    few, all_ = Whole(data, 500, 0), Whole(data, 0, 0)
    assert len(all_) == 40
    assert 400 < few.bytes <= 500
    assert abs(few.labels.count(0) - few.labels.count(1)) <= 1
    graphs = [few.graph(i) for i in range(len(few))]
    assert few.bytes == sum(graph.num_nodes + graph.num_edges + 3 for graph in graphs)  # an edge is two numbers, and each way is one edge
    assert Whole(data, 500, 1).labels[0] in (0, 1)


def test_an_epoch_of_forests_is_drawn_anew() -> None:
    kept = assembled({0: {frozenset(["0 0 1 $ $"]): 9}, 1: {frozenset(["1 0 0 $ $"]): 1}}, {"hops": 1, "graphs": 400})
    batches = TrainBatches(Drawn(kept), Graphs(), batch=400, seed=0)
    (_, _, graphs, first), (_, _, _, again), (_, _, _, other) = (next(batches.epoch(epoch)) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 15 < int(first.sum()) < 70  # a tenth of 400
    assert int(graphs.roots.sum()) == 400
    assert trained(student(layers=1), kept, 2, 0.01, 4)(graphs).shape == (400, 2)


def test_a_run_leaves_forests_that_open_as_data(tmp_path: Path) -> None:
    run = distill(
        "mirage",
        student="pyg/gin:hidden=8",
        data="motifs:train=40,val=20",
        budget=600,
        steps=20,
        out=str(tmp_path / "run"),
        trackers="none",
        batch=20,
    )
    assert 0 <= run.metrics["top1"] <= 1
    assert read_forests(tmp_path / "run" / "data").bytes <= 600
    about = json.loads((tmp_path / "run" / "data" / "about.json").read_text())
    assert (about["kind"], about["hops"], about["graphs"]) == ("forests", 2, 40)
    data = open_forests(tmp_path / "run")
    assert (data.inputs, data.classes, data.channels, len(data.train), len(data.val)) == ("graphs", ["star", "ring"], 3, 40, 20)
    assert distillers.find("mirage").tasks == ("classify",)


def test_students_of_other_kinds_train_on_the_run(tmp_path: Path) -> None:
    shared = {"trackers": "none", "batch": 20, "out": str(tmp_path / "run")}
    distill("mirage", student="pyg/gin:hidden=8", data="motifs:train=40,val=20", theta=0.3, steps=2, **shared)
    run = distill(
        "scratch", student="pyg/sage:hidden=8", data=str(tmp_path / "run"), epochs=2, batch=20, trackers="none", out=str(tmp_path / "next")
    )
    assert (tmp_path / "next" / "student" / "model.safetensors").is_file()
    assert 0 <= run.metrics["top1"] <= 1


@pytest.mark.parametrize(
    ("method", "job", "said"),
    [
        (
            "mirage",
            {"student": "pyg/gin", "data": "digits"},
            "method mirage is for graphs to classify, and 'digits' has images to classify; use ",
        ),
        ("kd", {"student": "pyg/gin", "teacher": "pyg/gin", "data": "motifs"}, "has graphs to classify; use one of mirage, scratch"),
        ("mae", {"student": "pyg/gin", "data": "motifs", "task": "encode"}, "the data 'motifs' are to classify, not to encode"),
        (
            "mirage",
            {"student": "timm/test_resnet", "data": "motifs"},
            "the data has graphs, and 'timm/test_resnet' takes images; name one such as",
        ),
        (
            "scratch",
            {"student": "pyg/gin", "data": "digits"},
            "the data has images, and 'pyg/gin' takes graphs; name one such as timm/resnet18",
        ),
    ],
)
def test_images_and_graphs_are_told_apart_before_anything_is_done(method: str, job: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        distill(method, out=str(tmp_path / "run"), **job)
    assert not (tmp_path / "run").exists()


def test_a_run_stopped_while_its_forests_are_examined_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job: dict[str, Any] = {"student": "pyg/gin:hidden=8,layers=2", "data": "motifs:train=64", "batch": 16, "steps": 5, "trackers": "none"}
    whole = distill("mirage", out=str(tmp_path / "whole"), **job)
    module = sys.modules[Mirage.__module__]

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "trained", stopped)
        with pytest.raises(KeyboardInterrupt):
            distill("mirage", out=str(tmp_path / "stopped"), **job)
    assert json.loads((tmp_path / "stopped/run.json").read_text())["status"] == "interrupted"
    again = distill(out=str(tmp_path / "stopped"), resume=True)
    assert again.facts["status"] == "finished"
    assert again.metrics == whole.metrics
    assert "None" not in dict(facts(again.facts)).values(), "there is no teacher to tell of"
    kept = "data/data.safetensors"
    assert (again.folder / kept).read_bytes() == (whole.folder / kept).read_bytes()
