"""Scenes of which half is told by a neighbourhood and half by a marker far away."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from stillhouse.data.contexts import CLASSES, COLD, GLOBAL, LOCAL, WARM, open_contexts
from stillhouse.errors import UserError
from tests.composed import fewer_are_the_first_of_more

# of image and mask: scenes are the same on every machine
SHA256 = {
    ("train", 0, 0): "dfd4126a9358dbe54d01f39fe4b5b0f0fe58d667d8ef097658683b16722ae89b",
    ("train", 1, 399): "3b0b609a6d0a1d54f819d6e6e91510a9abbca15597bd7bc7f9e702283e9adb00",
    ("val", 0, 0): "73dc7e0a83981963086ecc7889242512ebb7cc24be53a248e0ca4cedf48c14dd",
    ("val", 5, 7): "2405367d74384175d48f0056d3cbd93460f7fc25877590c0ef434050eeb61f81",
}


def digest(part: str, seed: int, i: int) -> str:
    image, mask = getattr(open_contexts("", seed=seed), part)[i]
    return hashlib.sha256(image.numpy().tobytes() + mask.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("place", SHA256)
def test_scenes_are_these_everywhere(place: tuple[str, int, int]) -> None:
    assert digest(*place) == SHA256[place]


def test_fewer_scenes_are_the_first_of_more_and_val_is_always_the_same() -> None:
    fewer_are_the_first_of_more(open_contexts)


def test_nothing_of_validation_is_trained_on() -> None:
    data = open_contexts("")
    seen = {data.train[i][0].numpy().tobytes() for i in range(400)}
    assert len(seen) == 400
    assert not seen & {data.val[i][0].numpy().tobytes() for i in range(400)}


def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    train = open_contexts("noise=0").train
    return [train.compose(i) for i in range(200)]


def marker_of(image: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Its colour, and where it is."""
    for colour in (WARM, COLD):
        there = (image == colour).all(-1)
        if there.any():
            return colour, there
    raise AssertionError("there is no marker")


def test_a_marker_in_a_corner_says_what_plain_discs_are_and_is_background() -> None:
    corners, seen = set(), set()
    for image, mask in scenes():
        colour, there = marker_of(image)
        assert there.sum() == 16
        rows, columns = there.nonzero()
        corners.add((int(rows[0]), int(columns[0])))
        assert not mask[there].any()
        named = {int(value) for value in np.unique(mask)} & {3, 4}
        assert named <= {3 if colour == WARM else 4}
        seen |= named
    assert corners == {(0, 0), (0, 28), (28, 0), (28, 28)}
    assert seen == {3, 4}


def test_plain_discs_are_far_from_the_marker() -> None:
    nearest = 99.0
    for image, mask in scenes():
        marker, disc = np.argwhere(marker_of(image)[1]), np.argwhere(mask >= 3)
        if len(disc):
            nearest = min(nearest, np.sqrt(((marker[:, None] - disc[None]) ** 2).sum(-1)).min())
    assert 12 <= nearest < 14


def test_plain_discs_are_alike_and_grey_whatever_they_are() -> None:
    """Without noise a disc has one grey, and its greys are drawn alike for both."""
    greys: dict[int, set[int]] = {3: set(), 4: set()}
    for image, mask in scenes():
        for name in greys:
            pixels = image[mask == name]
            assert (pixels == pixels[:, :1]).all()
            greys[name] |= set(pixels[:, 0].tolist())
    assert all(144 <= min(each) <= 150 and 170 <= max(each) <= 175 for each in greys.values())


def test_stripes_lean_one_way_or_the_other() -> None:
    agree: dict[tuple[int, int], list[float]] = {(name, way): [] for name in (1, 2) for way in (1, -1)}
    for image, mask in scenes():
        for (name, way), found in agree.items():
            shifted = np.roll(image[..., 0], (1, way), (0, 1))
            inside = (mask == name) & np.roll(mask == name, (1, way), (0, 1))
            if inside.any():
                found.append(float((shifted == image[..., 0])[inside].mean()))
    assert np.mean(agree[1, 1]) > 0.9 > 0.6 > np.mean(agree[1, -1])
    assert np.mean(agree[2, -1]) > 0.9 > 0.6 > np.mean(agree[2, 1])


def test_masks_are_exact() -> None:
    for image, mask in scenes()[:50]:
        ground = image[mask == 0].astype(int)
        plain = (ground == ground[:, :1]).all(1)
        assert len(np.unique(ground[plain])) == 1, "all that is no disc and no marker has the ground's one grey"
        assert (~plain).sum() == 16
        assert not (image[mask > 0] == ground[plain][0]).all(1).any()


def test_options() -> None:
    data = open_contexts("size=48,objects=8,noise=0,reach=20,train=40,val=3")
    assert (data.size, data.channels, data.task, data.classes) == (48, 3, "segment", CLASSES)
    assert {*LOCAL, *GLOBAL} == set(CLASSES[1:])
    assert data.train[0][0].shape == (3, 48, 48)
    assert (data.train[0][0].dtype, data.train[0][1].dtype) == (torch.uint8, torch.uint8)
    assert data.name == "contexts:size=48,objects=8,noise=0,reach=20,train=40,val=3"
    assert open_contexts("").name == "contexts"
    values = torch.stack([open_contexts("").train[i][1] for i in range(100)]).unique().tolist()
    assert values == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sise=32", "'contexts' has no option 'sise', did you mean 'size'?"),
        ("size=23", "size=23 is out of range, expected 24 to 256"),
        ("objects=0", "objects=0 is out of range"),
        ("noise=65", "noise=65 is out of range"),
        ("reach=21", "reach=21 is more than a scene of size=32 has room for, expected at most 20"),
        ("train=many", "train='many' is no int"),
    ],
)
def test_what_cannot_be_is_named(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        open_contexts(text)
    assert words in str(error.value)
