"""The evidence for decoupled DMD: its control, its arms, its table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stillhouse import distillers
from stillhouse.evidence.decoupled_dmd import ARMS, EXPERIMENTS, REFERENCES, Generated, Reversed
from stillhouse.tasks.generate import Generate
from tests.generators import tiny_generator


def test_the_control_augments_at_noisier_levels_only() -> None:
    control = Reversed(tiny_generator(1), tiny_generator(2))
    random = torch.Generator().manual_seed(0)
    draws = torch.rand(3000, generator=random), torch.rand(3000, generator=random)
    sigma_t = torch.tensor([1.0, 0.75, 0.25]).repeat_interleave(1000)
    matched, augmented = control.noise_levels(draws, sigma_t)
    at = augmented.view(3, -1)
    assert at[0].min() < 0.1  # nothing is noisier than 1: the full range
    assert (at[1].min() >= 0.75) & (at[2].min() >= 0.25) & (augmented.max() <= 0.98)
    assert (matched.view(3, -1).min(1).values < 0.1).all()


def test_the_arms_are_settings_that_exist_and_differ_in_one_thing() -> None:
    known, method = set(distillers.settings("decoupled_dmd")), ARMS[3].settings
    for arm in ARMS:
        assert set(arm.settings) <= known
        changed = {key for key, value in arm.settings.items() if method.get(key) != value}
        assert len(changed) + (arm.method is Reversed) <= 1, arm.name
    assert EXPERIMENTS[0].recipe["epochs"] > 0


def test_the_table_has_a_row_for_every_arm_and_way_to_draw(tmp_path: Path) -> None:
    figures = {"coverage": 0.8, "precision": 0.9, "recall": 0.5, "class_accuracy": 0.95, "frechet": 2.5}

    def run(number: int) -> Any:
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        (folder / "watch.csv").write_text("step,epoch,size\n12,1,1.0\n24,2,1.25\n")
        return SimpleNamespace(folder=folder, metrics=figures | {"coverage": 0.8 + number / 100}, facts={"data": {"val": 719}})

    runs: Any = {arm.name: [run(number), run(number)] for number, arm in enumerate(ARMS)}
    study = Generated(EXPERIMENTS[0], run(0), (0, 1), runs, {}, references=dict.fromkeys(REFERENCES, figures))
    setting, table = study.table()
    rows = table.splitlines()
    assert "719" in setting
    assert len(rows) == 2 + len(REFERENCES) + len(ARMS)
    assert len({row.count("|") for row in rows}) == 1
    assert "80.0 ± 0.0" in rows[2 + len(REFERENCES)]
    assert "+3.0 ± 0.0" in rows[5 + len(REFERENCES)]
    assert "1.00 → 1.25" in rows[-1]
    assert all(title in rows[0] for title in Generate.titles.values())


@pytest.mark.parametrize("name", [arm.name for arm in ARMS])
def test_no_two_arms_share_a_folder(name: str) -> None:
    from stillhouse.run_folder import slug

    assert [slug(arm.name.lower()) for arm in ARMS].count(slug(name.lower())) == 1
