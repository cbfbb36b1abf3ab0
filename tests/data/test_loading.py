from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from stillhouse.data import Data, open_data
from stillhouse.data.arrays import Arrays
from stillhouse.data.dense_transforms import dense_transforms
from stillhouse.data.loading import TrainBatches, eval_batches, mixing, train_batches
from stillhouse.data.transforms import Transform, train_transform
from stillhouse.errors import UserError
from stillhouse.models.preprocessing import Preprocessing

FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later warn of forks beside threads


class Pictures(Dataset[Any]):
    """PIL images: the path of files, with every augmentation."""

    def __len__(self) -> int:
        return 26

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 30, 3), dtype=np.uint8)), i % 3


def pictures() -> tuple[Dataset[Any], Transform]:
    data = Data("pictures", Pictures(), Pictures(), ["a", "b", "c"], size=24)
    return data.train, train_transform(
        None, data, hflip=0.5, crop_scale=(0.3, 1.0), auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5
    )


def cluttered() -> tuple[Dataset[Any], Transform]:
    data = open_data("digits:canvas=16,train=30")
    return data.train, train_transform(None, data)


def numbered(count: int) -> tuple[Dataset[Any], Transform]:
    """Image i is i all over: what reaches the batch can be read off it."""
    arrays = Arrays(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), torch.arange(count) % 5)
    return arrays, train_transform(None, Data("numbered", arrays, arrays, list("abcde"), channels=1, size=4, mean=(0.0,), std=(1 / 255,)))


SETS = {"pictures": pictures, "cluttered": cluttered}


def same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    first, second = list(one), list(other)
    return len(first) == len(second) > 0 and all(
        a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True)) for a, b in zip(first, second, strict=True)
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_is_a_permutation_without_its_incomplete_end(count: int, batch: int, epoch: int, seed: int) -> None:
    if batch > count:
        return
    got = list(train_batches(*numbered(count), batch=batch, epoch=epoch, seed=seed))
    ids = torch.cat([each[1] for each in got])
    assert [each[0] for each in got] == list(range(count // batch))
    assert len(ids) == count // batch * batch == len(ids.unique())
    for _, these, images, labels in got:
        assert torch.equal(images.mean((1, 2, 3)).round().long(), these)
        assert torch.equal(labels, these % 5)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(torch.cat([b[1] for b in train_batches(*numbered(40), batch=8, epoch=e, seed=s)]).tolist())
        for e in range(4)
        for s in range(4)
    }
    assert len(orders) == 16


@FORKS
@pytest.mark.parametrize("name", SETS)
def test_workers_change_nothing(name: str) -> None:
    dataset, transform = SETS[name]()
    mix = mixing(10, mixup=0.8, cutmix=1.0, smoothing=0.1)
    alone = TrainBatches(dataset, transform, batch=6, seed=3, mix=mix)
    torch.manual_seed(99)  # what the loader would seed its workers from
    team = TrainBatches(dataset, transform, batch=6, seed=3, mix=mix, workers=2)
    for epoch in (0, 1):  # the second by the same workers
        assert same(alone.epoch(epoch), team.epoch(epoch))
    next(team.epoch(0))  # left in the middle
    assert same(alone.epoch(2, 1), team.epoch(2, 1))


@pytest.mark.parametrize("name", SETS)
def test_resuming_in_the_middle_gives_the_remaining_batches(name: str) -> None:
    dataset, transform = SETS[name]()
    mix = mixing(10, mixup=0.8, cutmix=1.0, smoothing=0.1)
    whole = list(train_batches(dataset, transform, batch=6, epoch=4, seed=0, mix=mix))
    for start in range(len(whole)):
        assert same(whole[start:], train_batches(dataset, transform, batch=6, epoch=4, start=start, seed=0, mix=mix))
    assert not list(train_batches(dataset, transform, batch=6, epoch=4, start=len(whole), seed=0, mix=mix))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_together_are_the_batch_of_one_process(name: str, shards: int, mixed: bool) -> None:
    dataset, transform = SETS[name]()
    mix = mixing(10, mixup=0.8, cutmix=1.0, smoothing=0.1) if mixed else None
    whole = list(train_batches(dataset, transform, batch=12, epoch=1, seed=0, mix=mix))
    parts = [list(train_batches(dataset, transform, batch=12, epoch=1, seed=0, mix=mix, shards=shards, shard=r)) for r in range(shards)]
    for step, (_, ids, images, labels) in enumerate(whole):
        row = {int(i): k for k, i in enumerate(ids)}
        seen = []
        for part in parts:
            _, some, their_images, their_labels = part[step]
            assert len(some) == 12 // shards
            rows = [row[int(i)] for i in some]
            assert torch.equal(images[rows], their_images)
            assert torch.equal(labels[rows], their_labels)
            seen += rows
        assert sorted(seen) == list(range(12))


def test_the_same_samples_pair_for_any_number_of_shards() -> None:
    dataset, transform = numbered(24)
    mix = mixing(5, mixup=1.0)
    plain = next(iter(train_batches(dataset, transform, batch=24, epoch=0, seed=0)))
    for shards in (1, 2, 3, 4, 6, 12):
        for shard in range(shards):
            _, ids, images, _ = next(train_batches(dataset, transform, batch=24, epoch=0, seed=0, shards=shards, shard=shard, mix=mix))
            weight = (images[0, 0, 0, 0] - ids[-1]) / (ids[0] - ids[-1])
            assert torch.allclose(images.mean((1, 2, 3)), weight * ids + (1 - weight) * ids.flip(0), atol=1e-4)
            order = plain[1].tolist()
            assert all(order.index(int(a)) + order.index(int(b)) == 23 for a, b in zip(ids, ids.flip(0), strict=True))


def test_smoothing_without_mixing_is_timms_smoothing_for_any_batch() -> None:
    mix = mixing(5, smoothing=0.1)
    assert mix is not None
    for _, ids, images, labels in train_batches(*numbered(21), batch=7, epoch=0, seed=0, mix=mix):
        assert torch.equal(images.mean((1, 2, 3)).round().long(), ids)
        expected = torch.full((7, 5), 0.1 / 5)
        expected[torch.arange(7), ids % 5] = 0.9 + 0.1 / 5
        assert torch.allclose(labels, expected)
        assert torch.allclose(labels.sum(1), torch.ones(7))
    assert mixing(5) is None


def test_mixed_labels_have_the_weights_of_the_images() -> None:
    for _, ids, images, labels in train_batches(*numbered(40), batch=8, epoch=0, seed=1, mix=mixing(5, mixup=1.0)):
        weight = (images[0, 0, 0, 0] - ids[-1]) / (ids[0] - ids[-1])
        hard = torch.nn.functional.one_hot(ids % 5, 5).float()
        assert torch.allclose(labels, weight * hard + (1 - weight) * hard.flip(0), atol=1e-4)


def test_loading_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the generator timm draws from
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    dataset, transform = pictures()
    list(train_batches(dataset, transform, batch=6, epoch=0, seed=0, mix=mixing(3, mixup=1.0)))
    list(eval_batches(dataset, transform, batch=6))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 5))
def test_evaluation_sees_every_sample_once(count: int, batch: int, shards: int) -> None:
    dataset, transform = numbered(count)
    ids: list[Tensor] = []
    for shard in range(shards):
        for these, images, labels in eval_batches(dataset, transform, batch=batch, shards=shards, shard=shard):
            assert torch.equal(images.mean((1, 2, 3)).round().long(), these)
            assert torch.equal(labels, these % 5)
            assert len(these) <= batch
            ids.append(these)
    assert sorted(torch.cat(ids).tolist()) == list(range(count))


@FORKS
@pytest.mark.parametrize("name", SETS)
def test_evaluation_is_the_same_with_workers(name: str) -> None:
    dataset, transform = SETS[name]()

    def run(workers: int) -> Iterator[Any]:
        return ((0, *batch) for batch in eval_batches(dataset, transform, batch=7, workers=workers))

    assert same(run(0), run(2))


def test_items_can_be_sent_to_spawned_workers() -> None:
    dataset, transform = cluttered()
    batches = TrainBatches(dataset, transform, batch=6, seed=0)
    items = pickle.loads(pickle.dumps(batches._loader.dataset))
    assert torch.equal(items[(1, 0, torch.arange(6))][2], batches._loader.dataset[(1, 0, torch.arange(6))][2])


class Breaking(Pictures):
    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        if i == 20:
            raise UserError("'20.jpg' cannot be read")
        return super().__getitem__(i)


@FORKS
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_a_worker_is_one_sentence(workers: int) -> None:
    _, transform = pictures()
    with pytest.raises(UserError, match=r"^'20.jpg' cannot be read$"):
        list(train_batches(Breaking(), transform, batch=26, epoch=0, seed=0, workers=workers))
    with pytest.raises(UserError, match=r"^'20.jpg' cannot be read$"):
        list(eval_batches(Breaking(), transform, batch=26, workers=workers))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"batch": 41}, "has 40 images, fewer than a batch of 41: choose batch=40 or less"),
        ({"batch": 0}, "expected batch > 0"),
        ({"batch": 8, "workers": -1}, "expected batch > 0"),
        ({"batch": 8, "shards": 2, "shard": 2}, "shard < shards"),
        ({"batch": 9, "shards": 2}, "does not divide by 2 processes: choose a multiple of 2"),
        ({"batch": 10, "shards": 2, "mix": mixing(5, mixup=1.0)}, "because mixup mixes pairs: choose a multiple of 4"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(how: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TrainBatches(*numbered(40), seed=0, **how)


def test_mixing_out_of_range_is_refused() -> None:
    bad: list[dict[str, float]] = [
        {"mixup": -1},
        {"cutmix": float("nan")},
        {"smoothing": 1.0},
        {"mixup": 1, "prob": 2},
        {"cutmix": 1, "switch_prob": -0.1},
    ]
    for settings_ in bad:
        with pytest.raises(UserError, match=next(reversed(settings_))):
            mixing(5, **settings_)
    mix = mixing(5, mixup=1.0)
    assert mix is not None
    mix.mode = "elem"
    with pytest.raises(UserError, match="mode is 'elem', expected 'batch'"):
        TrainBatches(*numbered(40), batch=8, seed=0, mix=mix)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_is_wrong_far_behind_the_first_is_named(workers: int) -> None:
    image, good = torch.zeros(3, 8, 8, dtype=torch.uint8), {"boxes": torch.tensor([[0.0, 0, 4, 4]]), "labels": torch.tensor([1])}
    samples: Any = [(image, good)] * 5 + [(image, good | {"labels": torch.tensor([4])})]
    data = Data("own", samples, samples[:1], ["a", "b", "c"], task="detect")
    transform = dense_transforms(Preprocessing((0.0,) * 3, (1.0,) * 3), data)[1]
    with pytest.raises(UserError, match=r"sample 5 of the data has the labels \[4\], expected 1 to 3"):
        list(eval_batches(data.train, transform, batch=2, workers=workers, wrong=data.wrong))


@pytest.mark.parametrize("name", SETS)
def test_mixed_views_repeat_epoch_by_epoch(name: str) -> None:
    dataset, transform = SETS[name]()
    mix = mixing(10, mixup=0.8, cutmix=1.0)
    repeating, plain = (TrainBatches(dataset, transform, batch=6, seed=0, mix=mix, views=views) for views in (2, None))
    for epoch in range(5):
        assert repeating.view(epoch) == epoch % 2
        assert same(repeating.epoch(epoch), plain.epoch(epoch % 2))


@pytest.mark.parametrize("name", SETS)
def test_views_without_mixing_repeat_in_another_order(name: str) -> None:
    """Every image that a view has shown, as it was, and no other; the first time in the order of any run."""
    dataset, transform = SETS[name]()
    repeating, plain = (TrainBatches(dataset, transform, batch=6, seed=0, views=views) for views in (2, None))
    assert same(repeating.epoch(1), plain.epoch(1))
    seen = [dict(one for batch in repeating.epoch(epoch) for one in zip(batch[1].tolist(), batch[2], strict=True)) for epoch in (1, 3, 5)]
    assert len({tuple(each) for each in seen}) == 3
    for each in seen[1:]:
        assert each.keys() == seen[0].keys()
        assert all(torch.equal(image, seen[0][i]) for i, image in each.items())
