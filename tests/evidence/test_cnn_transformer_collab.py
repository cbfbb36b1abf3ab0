"""The evidence for two students: its arms are what they say, and its table tells both."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import torch

from stillhouse import distillers
from stillhouse.distillers.dense.cnn_transformer_collab import CNNTransformerCollab
from stillhouse.evidence import cnn_transformer_collab as evidence
from stillhouse.evidence.experiment import Search
from tests.conftest import images, masks, tiny_segmenter


def test_arms_are_settings_that_exist() -> None:
    names = [arm.name for arm in evidence.ARMS]
    assert len(set(names)) == len(names)
    for experiment in evidence.EXPERIMENTS:
        assert experiment.arms[0].settings == CNNTransformerCollab.off, "what differences are taken from is each alone"
        assert set(experiment.places) <= set(distillers.settings("cnn_transformer_collab"))
        for arm in experiment.arms:
            assert set(arm.settings) | set(arm.weights) <= set(distillers.settings(arm.method)), arm.name
            assert all(arm.settings.get(name, 1.0) for name in arm.weights), "a factor on a weight of 0 finds nothing"
            assert "segment" in distillers.find(arm.method).tasks


def test_ablations_turn_directions_and_nothing_else() -> None:
    torch.manual_seed(0)
    first, second = torch.rand(2, 8, 8), torch.rand(2, 8, 8)
    counts = torch.rand(2, 8, 8) < 0.8
    kinds = (CNNTransformerCollab, evidence.Inverted, evidence.Tossed, evidence.StudentTaught, evidence.PartnerTaught)
    made = {kind: kind(tiny_segmenter(1), tiny_segmenter(2), warmup=0.0) for kind in kinds}
    found = {kind: each.directions(first, second, counts) for kind, each in made.items()}
    assert all(torch.equal(a, b) for a, b in zip(found[evidence.Inverted], found[CNNTransformerCollab][::-1], strict=True))
    for to_first, to_second in found.values():
        assert torch.equal(to_first | to_second, counts)
        assert not (to_first & to_second).any()
    assert found[evidence.StudentTaught][0].equal(counts)
    assert found[evidence.PartnerTaught][1].equal(counts)
    assert 0.3 < found[evidence.Tossed][0].float().mean() / counts.float().mean() < 0.7
    torch.manual_seed(0)
    terms = [each((images(), masks())) for each in made.values()]
    assert len({term["pixel"].item() for term in terms[:3]}) == 3
    for kind in kinds[1:]:
        own = {name for name, _ in inspect.getmembers(kind) if name in vars(kind) and not name.startswith("__")}
        assert own == {"directions"}


def test_the_table_tells_both_students(tmp_path: Path) -> None:
    experiment = replace(
        evidence.EXPERIMENTS[0],
        data="contexts:train=8,val=4",
        recipe={**evidence.EXPERIMENTS[0].recipe, "epochs": 1, "batch": 4, "log_every": 1},
        arms=(evidence.ARMS[0], evidence.ARMS[1], evidence.ARMS[-2]),
    )
    found = experiment.run(tmp_path, range(2), smoke=True)
    text, table = found.table()
    assert "4 validation images" in text
    rows = table.splitlines()
    assert len(rows) == 5
    assert {row.count("|") for row in rows} == {rows[0].count("|")}
    assert "ViT: far" in rows[0]
    assert "| each alone |" in rows[2]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.json")}
    assert len(stamps) == 6
    assert experiment.run(tmp_path, range(2), smoke=True).figures == found.figures
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.json")} == stamps


def test_a_factor_multiplies_the_weights_of_an_arm_and_nothing_else() -> None:
    contexts, nuclei = evidence.EXPERIMENTS
    for arm in nuclei.arms:
        own, less = nuclei.settings(arm, 1.0), nuclei.settings(arm, 0.1)
        assert {name for name in own if own[name] != less[name]} == set(arm.weights), arm.name
        assert all(torch.isclose(torch.tensor(10 * less[name]), torch.tensor(own[name])) for name in arm.weights)
        assert contexts.found(arm, Path("nowhere"), {}) == 1.0, "without a search nothing is run"
    assert nuclei.found(nuclei.arms[0], Path("nowhere"), {}) == 1.0, "each alone has no weights to search for"


def test_without_groups_of_classes_there_are_no_such_columns_and_the_search_is_told(tmp_path: Path) -> None:
    experiment = replace(
        evidence.EXPERIMENTS[0],
        data="contexts:train=8,val=4",
        recipe={**evidence.EXPERIMENTS[0].recipe, "epochs": 1, "batch": 4, "log_every": 1},
        arms=evidence.ARMS[:2],
        kinds={},
        search=Search(rates=(), scales=(0.1,), share=0.5, seed=9),
    )
    found = experiment.run(tmp_path, [0], smoke=True)
    searched = {run.parent.name: json.loads(run.read_text()) for run in tmp_path.rglob("search-*/run.json")}
    assert set(searched) == {"search-dml-1", "search-dml-0.1"}
    assert {run["seed"] for run in searched.values()} == {9}
    means = {name: run["metrics"]["miou"] + run["metrics"]["partner_miou"] for name, run in searched.items()}
    assert found.found == {"each alone": 1.0, "DML": 1.0 if means["search-dml-1"] >= means["search-dml-0.1"] else 0.1}
    text, table = found.table()
    assert "the best of {1, 0.1}" in text
    assert "in 50% of the epochs" in text
    rows = table.splitlines()
    assert "near" not in rows[0]
    assert {row.count("|") for row in rows} == {rows[0].count("|")} == {10}
    assert rows[2].endswith("|  |")
    assert rows[3].endswith(f"| {found.found['DML']:g} |")
