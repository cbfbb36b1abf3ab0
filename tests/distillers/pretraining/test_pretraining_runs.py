"""Pre-training from the first run to the last: an autoencoder, what it teaches, and fine-tuning of what was pre-trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import stillhouse as sh
from stillhouse.errors import UserError
from stillhouse.evidence.experiment import Arm, Experiment, Study
from stillhouse.evidence.table import write_evidence
from stillhouse.models.mae import MaskedAutoencoder
from stillhouse.models.opening import open_model
from stillhouse.models.preprocessing import preprocessing_of
from stillhouse.run import Run
from tests.runs import DATA, RECIPE

BASE = "timm/vit_tiny_patch16_224:img_size=8,patch_size=2"
STUDENT = f"{BASE},embed_dim=16,depth=2,num_heads=2"
DISTILLED = "timm/deit_tiny_distilled_patch16_224:img_size=8,patch_size=2,embed_dim=16,depth=2,num_heads=2"
DECODER: dict[str, Any] = {"decoder_width": 12, "decoder_depth": 2, "decoder_heads": 3}
SHORT: dict[str, Any] = {**RECIPE, "epochs": 1, "data": DATA, "allow_weak_teacher": True}


@pytest.fixture(scope="module")
def mae(tmp_path_factory: pytest.TempPathFactory) -> Run:
    student = f"{BASE},embed_dim=24,depth=3,num_heads=2"
    return sh.distill("mae", student=student, out=str(tmp_path_factory.mktemp("mae") / "run"), **DECODER, **SHORT)


@pytest.fixture(scope="module")
def fine(mae: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return sh.distill("scratch", student=str(mae.folder), out=str(tmp_path_factory.mktemp("fine") / "run"), **SHORT)


def open_encoder(folder: Path | str) -> Any:
    return open_model(str(folder), classes=10, channels=1, task="encode").eval()


def test_a_run_keeps_the_encoder_and_the_autoencoder(mae: Run) -> None:
    assert mae.facts["task"] == "encode"
    assert {"probe", "knn"} <= set(mae.metrics)
    assert mae.report.is_file()
    encoder, whole = open_encoder(mae.folder), open_encoder(mae.folder / "autoencoder")
    assert isinstance(whole, MaskedAutoencoder)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(encoder(images), whole(images))


def test_an_autoencoder_goes_on(mae: Run, tmp_path: Path) -> None:
    """With the decoder and the preprocessing that it has."""
    still = {**SHORT, "data": f"{DATA},clutter=1", "max_steps": 1, "lr": 1e-9, "min_lr": 0.0}
    for method in ("mae", "self_distill_pretrain"):
        further = sh.distill(method, student=str(mae.folder / "autoencoder"), out=str(tmp_path / method), **still)
        for part in ("student", "autoencoder"):
            before, after = open_encoder(mae.folder / part), open_encoder(further.folder / part)
            assert preprocessing_of(after) == preprocessing_of(before)
            for name, value in before.state_dict().items():
                torch.testing.assert_close(after.state_dict()[name], value)


def test_fine_tuning_begins_with_what_was_pre_trained(mae: Run, tmp_path: Path) -> None:
    tuned = sh.distill("scratch", student=str(mae.folder), out=str(tmp_path / "run"), max_steps=1, **{**SHORT, "lr": 1e-9})
    assert tuned.facts["task"] == "classify"
    before, after = open_encoder(mae.folder), tuned.student
    assert after.num_classes == 10
    torch.testing.assert_close(after.blocks[2].mlp.fc1.weight, before.blocks[2].mlp.fc1.weight)  # type: ignore[index,union-attr,operator]
    torch.testing.assert_close(after.pos_embed, before.pos_embed)


@pytest.mark.parametrize("part", ["", "autoencoder"])
def test_dmae_learns_from_a_run_or_its_autoencoder(mae: Run, part: str, tmp_path: Path) -> None:
    run = sh.distill("dmae", teacher=str(mae.folder / part), student=STUDENT, out=str(tmp_path / "run"), ema=0.5, **DECODER, **SHORT)
    assert {"val_pixels", "val_features", "probe"} <= set(run.metrics)
    assert open_encoder(run.folder).embed_dim == 16
    assert not (run.folder / "autoencoder").exists()


def test_g2sd_goes_through_both_stages(mae: Run, fine: Run, tmp_path: Path) -> None:
    networks = {"teacher": str(mae.folder / "autoencoder"), "specific_teacher": str(fine.folder), "student": DISTILLED}
    run = sh.distill("g2sd", **networks, unlabelled="digits:train=96", out=str(tmp_path / "run"), **DECODER, **SHORT)
    assert run.facts["title"] == "G2SD", "not its first stage"
    assert {"val_ce", "val_kd", "top1", "agreement"} <= set(run.metrics)
    generic = (run.folder / "generic" / "val.csv").read_text()
    assert "val_hidden" in generic
    assert "probe" in generic
    assert len((run.folder / "generic" / "train.csv").read_text().splitlines()) > 2
    network = run.student
    assert type(network).__name__ == "VisionTransformerDistilled"
    assert not network.pos_embed[:, 1].any()  # type: ignore[index,operator]
    with pytest.raises(UserError, match=r"a masked autoencoder: RUN/autoencoder"):
        sh.distill("g2sd", **{**networks, "teacher": str(mae.folder)}, out=str(tmp_path / "other"), **DECODER, **SHORT)


def test_g2sd_is_taken_up_where_it_stopped(mae: Run, fine: Run, tmp_path: Path) -> None:
    networks = {"teacher": str(mae.folder / "autoencoder"), "specific_teacher": str(fine.folder), "student": DISTILLED}
    whole = sh.distill("g2sd", **networks, out=str(tmp_path / "whole"), **DECODER, **SHORT)
    part = sh.distill("g2sd", **networks, out=str(tmp_path / "part"), **DECODER, **SHORT)
    facts = part.folder / "run.json"
    facts.write_text(facts.read_text().replace('"status": "finished"', '"status": "interrupted"'))
    again = sh.distill(out=str(part.folder), resume=True)
    for key, value in whole.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[key], value), key


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    before: dict[str, Any] = {"data": "digits:train=96", "epochs": 1, **DECODER}
    experiment = Experiment(
        name="tiny",
        title="Digits",
        data=DATA,
        teacher_data=DATA,
        student=STUDENT,
        teacher="@mae",
        recipe={key: value for key, value in SHORT.items() if key != "data"},
        teacher_recipe={},
        prepared=(Arm("mae", "mae", before),),
        arms=(
            Arm("labels only", "scratch"),
            Arm("pre-trained", "scratch", before=Arm("dmae", "dmae", {**before, "teacher": "@mae/autoencoder"})),
            Arm("taught", "kd", before=Arm("mae", "mae", before)),
        ),
    )
    return experiment.run(tmp_path_factory.mktemp("evidence"), range(1), smoke=False)


def test_an_arm_may_begin_with_a_run_of_its_own(study: Study) -> None:
    assert sorted(study.before) == ["pre-trained", "taught"]
    (first,), (then,) = study.before["pre-trained"], study.runs["pre-trained"]
    assert (first.facts["method"], first.facts["task"], first.facts["seed"]) == ("dmae", "encode", 0)
    assert (then.facts["method"], then.facts["task"], then.facts["seed"]) == ("scratch", "classify", 0)
    assert then.facts["models"]["student"]["params"] == study.runs["labels only"][0].facts["models"]["student"]["params"]
    assert study.teacher.facts["method"] == "scratch"
    assert study.runs["taught"][0].facts["method"] == "kd"


def test_the_table_says_what_came_before(study: Study, tmp_path: Path) -> None:
    text = write_evidence(tmp_path / "tiny.md", "tiny", "A claim.", [study]).read_text()
    assert "| arm | top-1, % | minus labels only, paired | linear probe before, % |" in text
    assert f"teacher `{STUDENT}`" in text, "not @mae"
