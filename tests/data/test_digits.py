from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from stillhouse.data import open_data
from stillhouse.data.digits import FRAGMENT, CanvasDigits

CLUTTERED = "digits:canvas=16,clutter=2"


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_the_plain_digits_are_all_there_in_two_stratified_parts() -> None:
    data = open_data("digits")
    assert len(data.train) + len(data.val) == 1797
    assert (data.channels, data.size, len(data.classes)) == (1, 8, 10)
    images = torch.cat([data.train.images, data.val.images])
    assert rows(images) == rows((torch.from_numpy(load_digits().images) * 255 / 16).round().byte()[:, None])
    counts = torch.bincount(data.train.labels) / (torch.bincount(data.train.labels) + torch.bincount(data.val.labels))
    assert ((counts - 0.6).abs() < 0.005).all()
    assert not rows(data.train.images) & rows(data.val.images)  # the set has no duplicates, so no digit is in both


def test_neither_the_seed_nor_the_canvas_changes_which_digits_validate() -> None:
    plain, small = open_data("digits"), open_data("digits:train=300", seed=5)
    cluttered = open_data(f"{CLUTTERED},train=300", seed=7)
    assert torch.equal(plain.val.images, small.val.images)
    assert torch.equal(plain.val.images, cluttered.val.digits)
    assert len(small.train) == len(cluttered.train) == 300
    assert rows(small.train.images) < rows(plain.train.images) > rows(cluttered.train.digits)
    assert rows(small.train.images) != rows(open_data("digits:train=300", seed=6).train.images)
    assert (torch.bincount(small.train.labels) - 30).abs().max() <= 2


def test_canvases_are_a_function_of_seed_epoch_and_sample() -> None:
    train, again, other = (open_data(CLUTTERED, seed=seed).train for seed in (0, 0, 1))
    ids = torch.tensor([5, 900, 3])
    first = train.draw_batch(ids, 2)[0]
    train.draw_batch(ids, 3)
    assert torch.equal(first, train.draw_batch(ids, 2)[0])
    assert torch.equal(first, again.draw_batch(ids, 2)[0])
    assert torch.equal(train.draw(900, 2)[0], first[1])
    assert train.draw(900, 2)[1] == int(train.labels[900])
    for images in (train.draw_batch(ids, 3)[0], other.draw_batch(ids, 2)[0]):
        assert not (images == first).flatten(1).all(1).any()


def test_validation_canvases_never_change() -> None:
    val, other = open_data(CLUTTERED, seed=0).val, open_data(CLUTTERED, seed=1).val
    ids = torch.arange(len(val))
    assert torch.equal(val.draw_batch(ids, 0)[0], other.draw_batch(ids, 9)[0])
    assert torch.equal(val.boxes(ids), other.boxes(ids, 9))


def test_the_digit_lies_in_its_box() -> None:
    train = open_data("digits:canvas=24,clutter=0,noise=0").train
    ids = torch.arange(len(train))
    images, boxes = train.draw_batch(ids, 4)[0], train.boxes(ids, 4)
    for i in ids.tolist():
        x1, y1, x2, y2 = boxes[i].tolist()
        assert torch.equal(images[i, 0, y1:y2, x1:x2], train.digits[i, 0])
        assert images[i].sum() == train.digits[i].sum()  # nothing outside
    assert boxes.min() == 0
    assert boxes.max() == 24
    assert (boxes[:, 2:] - boxes[:, :2] == 8).all()


def test_clutter_and_noise_cover_no_stroke_and_come_from_other_digits() -> None:
    train = open_data("digits:canvas=20,clutter=3,noise=0.1").train
    ids = torch.arange(len(train))
    images, boxes = train.draw_batch(ids, 1)[0], train.boxes(ids, 1)
    inside = torch.stack([image[0, y1:y2, x1:x2] for image, (x1, y1, x2, y2) in zip(images, boxes.tolist(), strict=True)])
    assert (inside >= train.digits[:, 0]).all()
    digits = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    digits[1] = 200
    lone = CanvasDigits(digits, torch.arange(3), 16, 1, 1, 0.0, ("test",), True).draw_batch(torch.arange(3), 0)[0]
    light = (lone > 0).flatten(1).sum(1)
    assert light[1] == 64
    assert set(light[[0, 2]].tolist()) <= {0, FRAGMENT**2}


def test_statistics_are_those_of_the_images_and_one_for_all_seeds() -> None:
    data, other = open_data(CLUTTERED, seed=0), open_data(f"{CLUTTERED},train=100", seed=3)
    assert (data.mean, data.std) == (other.mean, other.std)
    assert data.fingerprint != other.fingerprint
    pixels = data.train.draw_batch(torch.arange(len(data.train)), 8)[0] / 255
    assert abs(float(pixels.mean()) - data.mean[0]) < 0.005
    assert abs(float(pixels.std()) - data.std[0]) < 0.005


def test_step_puts_the_digits_on_a_grid_and_covers_it() -> None:
    train = open_data("digits:canvas=16,clutter=2,step=4").train
    corners = train.boxes(torch.arange(len(train)))[:, :2]
    assert set(corners.flatten().tolist()) == {0, 4, 8}
