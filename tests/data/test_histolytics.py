from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.data import histolytics, installed, open_data
from stillhouse.data.histolytics import open_histolytics
from stillhouse.errors import UserError


def present() -> bool:
    try:
        return bool(distribution("histolytics"))
    except PackageNotFoundError:
        return False


real = pytest.mark.skipif(not present(), reason="needs histolytics: pip install --no-deps histolytics")


def test_a_missing_or_different_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(installed, "distribution", nothing)
    with pytest.raises(UserError, match=r"histolytics needs files of the package 'histolytics': pip install --no-deps histolytics$"):
        open_histolytics("")
    picture, raster = tmp_path / "a.jpg", tmp_path / "a.npz"
    Image.new("RGB", (1500, 1500)).save(picture)
    mask = np.arange(1500 * 1500).reshape(1500, 1500) % 4
    np.savez(raster, nuc_raster=mask)
    assert np.array_equal(np.asarray(histolytics._read(picture, raster)[1]), mask)
    for arrays in ({"mask": mask}, {"nuc_raster": mask[:9]}, {"nuc_raster": mask + 1}, {"nuc_raster": np.array([{}], dtype=object)}):
        np.savez(raster, **arrays)
        with pytest.raises(UserError, match=r"is not as in histolytics 0.3.0"):
            histolytics._read(picture, raster)
    raster.write_bytes(b"PK no archive")
    with pytest.raises(UserError, match=r"is not as in histolytics 0.3.0"):
        histolytics._read(picture, raster)


@real
def test_the_real_section() -> None:
    data = open_data("histolytics")
    assert (len(data.train), len(data.val), data.size, data.task) == (10 * 15, 4 * 15, 96, "segment")
    assert data.classes == ["background", "connective", "inflammatory", "neoplastic"]
    for part in (data.train, data.val):
        masks = torch.stack([part[i][1] for i in range(len(part))])
        assert (masks.dtype, part[0][0].dtype, part[0][0].shape) == (torch.uint8, torch.uint8, (3, 96, 96))
        share = torch.bincount(masks.flatten().long(), minlength=4) / masks.numel()
        assert len(share) == 4
        assert float(share[1:].min()) > 0.03  # every class can be judged in both parts


@real
def test_tiles_are_cut_out_as_they_are_and_no_row_is_in_both_parts() -> None:
    image, mask = histolytics._read(*installed.installed_files("histolytics", *histolytics.FILES, need="a test"))
    pixels, classes = torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(np.array(mask))
    data = open_histolytics("tile=100")
    assert torch.equal(data.train[17][0], pixels[:, 100:200, 200:300])
    assert torch.equal(data.train[17][1], classes[100:200, 200:300])
    assert torch.equal(data.val[59][0], pixels[:, 1400:, 1400:])
    assert torch.equal(data.val[0][1], classes[1100:1200, :100])
    assert len(data.train) == 150  # rows 0 to 999
    double = open_histolytics("tile=100,size=200").train[17][1]
    assert torch.equal(double[::2, ::2], data.train[17][1])
    assert torch.equal(double[1::2, 1::2], data.train[17][1])


@real
def test_subsets_and_overlapping_tiles() -> None:
    whole, few, more, other = (
        open_histolytics(text, seed=seed) for text, seed in (("", 0), ("train=20", 0), ("train=50", 0), ("train=20", 1))
    )
    rows = [{image.numpy().tobytes() for image in data.train.tensors[0]} for data in (whole, few, more, other)]
    assert [len(row) for row in rows] == [150, 20, 50, 20]
    assert rows[1] < rows[2] < rows[0]
    assert rows[1] != rows[3] < rows[0]
    assert whole.mean == few.mean == other.mean
    assert len({data.fingerprint for data in (whole, few, more, other)}) == 4
    overlapping = open_histolytics("stride=48,size=32")
    assert (len(overlapping.train), len(overlapping.val)) == (19 * 30, 60)
    for bad, message in (("tile=500", "tile=500"), ("train=151", "expected 1 to 150"), ("stride=97", "stride=97"), ("tiles=5", "'tile'")):
        with pytest.raises(UserError, match=message):
            open_histolytics(bad)
