"""Batches whose content is a function of (seed, epoch, step) alone: not of workers, processes, or where a run was resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stillhouse.data.transforms import Normalise, PerImage, Transform
from stillhouse.errors import UserError
from stillhouse.randomness import seed_from, seeded

TrainBatch = tuple[int, Tensor, Any, Any]


class Together(Protocol):
    """A transform of samples and their targets, and how they become a batch."""

    def __call__(self, sample: Any, target: Any) -> tuple[Any, Any]:
        """One of them."""
        ...

    def together(self, samples: list[Any], targets: list[Any]) -> tuple[Any, Any]:
        """A batch of them."""
        ...


AnyTransform = Transform | Together
Place = tuple[int, int, Tensor]  # view (the epoch, unless views repeat), step in the epoch, sample ids [b]


def mixing(
    classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, smoothing: float = 0.0, prob: float = 1.0, switch_prob: float = 0.5
) -> Mixup | None:
    """timm's Mixup for whole batches, or None when nothing is asked. With both alphas 0 it smooths the labels and mixes nothing.

    Args:
        mixup, cutmix: alpha of the Beta distribution of the mixing weight (arXiv 1710.09412, 1905.04899); 0 is off.
        smoothing: share of each label spread evenly over all classes, in [0, 1).
        prob: probability that a batch is mixed.
        switch_prob: probability of cutmix where both are on.

    Raises:
        UserError: if a value is out of range.
    """
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if not 0 <= value < float("inf"):
            raise UserError(f"{name} is {value}, expected 0 (off) or a positive number")
    for name, value in (("prob", prob), ("switch_prob", switch_prob)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}, expected a probability, 0 to 1")
    if not 0 <= smoothing < 1:
        raise UserError(f"smoothing is {smoothing}, expected 0 (off) to below 1")
    if not (mixup or cutmix or smoothing):
        return None
    mix = Mixup(mixup, cutmix, prob=prob, switch_prob=switch_prob, label_smoothing=smoothing, num_classes=classes)
    mix.mixup_enabled = bool(mixup or cutmix)
    return mix


class TrainBatches:
    """Training batches of any epoch, from any step on; worker processes, if any, live as long as this object.

    - The order of an epoch is a permutation drawn from (seed, "order", epoch); the samples after the last full batch are dropped.
    - A sample is read and augmented under (seed, "augment", epoch, its id), a batch is mixed under (seed, "mix", epoch, step).
    - `batch` is the global batch. With S shards, shard r gets a contiguous S-th of it; when mixing, the r-th slice of its first half and
      the mirrored slice of its second half, because timm mixes image i with image B-1-i: every pair stays together, whatever S is.
    - With V views, epoch e shows the samples of epoch e mod V, augmented and mixed as there; what was dropped there is dropped again. Where
      pairs are mixed they come in the order of that epoch, else in one of their own.

    Args:
        dataset: `dataset[i] -> (image, label)`; `draw(i, epoch)` instead if it has it, or `draw_batch(ids, epoch)` if the transform
            takes batches.
        transform: of `transforms.train_transform`.
        mix: of `mixing`; timm's Mixup in mode "batch".
        wrong: what is wrong with the target of an image, "" if nothing is; `Data.wrong`.
        views: epochs after which augmentation and mixing repeat; None: never.

    Raises:
        UserError: if the set is smaller than a batch, or the batch does not divide.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        transform: AnyTransform,
        *,
        batch: int,
        seed: int,
        shards: int = 1,
        shard: int = 0,
        workers: int = 0,
        mix: Mixup | None = None,
        wrong: Callable[[Any, Any], str] | None = None,
        views: int | None = None,
    ) -> None:
        length, pairs = len(dataset), mix is not None and mix.mixup_enabled  # type: ignore[arg-type]  # Dataset declares no length
        if batch < 1 or workers < 0 or not 0 <= shard < shards:
            raise UserError(
                f"batch={batch}, workers={workers}, shard={shard} of {shards}: expected batch > 0, workers >= 0, shard < shards"
            )
        if batch % (2 * shards if pairs else shards):
            among = f"{shards} processes" + (" times 2, because mixup mixes pairs" if pairs else "")
            raise UserError(f"the batch of {batch} does not divide by {among}: choose a multiple of {2 * shards if pairs else shards}")
        if batch > length:
            raise UserError(f"the training set has {length} images, fewer than a batch of {batch}: choose batch={length} or less")
        if mix is not None and mix.mode != "batch":
            raise UserError(f"mixup's mode is '{mix.mode}', expected 'batch': the others would depend on the number of processes")
        self._sampler = _Places(length, batch, seed, _slots(batch, shards, shard, pairs), views, pairs)
        self._loader = _loader(_Batches(dataset, transform, seed, mix, wrong), self._sampler, workers, keep=True)

    def __len__(self) -> int:
        """Steps an epoch."""
        return self._sampler.length // self._sampler.batch

    def view(self, epoch: int) -> int:
        """The first epoch whose images are those of this one."""
        return self._sampler.view(epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[TrainBatch]:
        """Batches `start`, start + 1, … of an epoch.

        Yields:
            (step, ids long [b], images float [b, C, H, W], labels long [b] or soft float [b, K]); to segment masks long [b, H, W] instead
            of labels; to detect a list of images float [C, H, W] and a list of their boxes and labels.

        Raises:
            UserError: if an image cannot be read after all.
        """
        self._sampler.epoch, self._sampler.start = epoch, start
        return _raising(iter(self._loader))


def train_batches(
    dataset: Dataset[Any],
    transform: AnyTransform,
    *,
    batch: int,
    epoch: int,
    start: int = 0,
    seed: int,
    shards: int = 1,
    shard: int = 0,
    workers: int = 0,
    mix: Mixup | None = None,
) -> Iterator[TrainBatch]:
    """The batches of one epoch: `TrainBatches(…).epoch(epoch, start)`, which keeps its workers over several."""
    return TrainBatches(dataset, transform, batch=batch, seed=seed, shards=shards, shard=shard, workers=workers, mix=mix).epoch(
        epoch, start
    )


def eval_batches(
    dataset: Dataset[Any],
    transform: AnyTransform,
    *,
    batch: int,
    workers: int = 0,
    shards: int = 1,
    shard: int = 0,
    wrong: Callable[[Any, Any], str] | None = None,
) -> Iterator[tuple[Tensor, Any, Any]]:
    """(ids long [b], images, targets as `TrainBatches` gives them) of every sample once, in order; shard r of S takes samples r, r + S, …

    `batch` is that of one process, the last one may be smaller, and processes may differ by one in how many they get: gather sums, not
    batches.
    """
    ids = torch.arange(len(dataset))[shard::shards]  # type: ignore[arg-type]
    places = [(0, step, part) for step, part in enumerate(ids.split(batch))] if len(ids) else []
    loader = _loader(_Batches(dataset, transform, 0, None, wrong), places, workers, keep=False)
    for _, some, images, labels in _raising(iter(loader)):
        yield some, images, labels


class _Places(Sampler[Place]):
    """Where each batch is: which samples this shard takes at each step of an epoch. `epoch` and `start` are set before it is iterated."""

    def __init__(self, length: int, batch: int, seed: int, slots: Tensor, views: int | None, pairs: bool) -> None:
        self.length, self.batch, self.seed, self.slots, self.views, self.pairs = length, batch, seed, slots, views, pairs
        self.epoch, self.start = 0, 0

    def view(self, epoch: int) -> int:
        return epoch if self.views is None else epoch % self.views

    def __iter__(self) -> Iterator[Place]:
        view = self.view(self.epoch)
        order = self._shuffled(self.length, "order", view)
        if view != self.epoch and not self.pairs:  # pairs are of two images that meet in one place of one batch
            order = order[: self.length // self.batch * self.batch]
            order = order[self._shuffled(len(order), "order again", self.epoch)]
        return self._places(view, self.start, order)

    def _shuffled(self, length: int, what: str, epoch: int) -> Tensor:
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed_from(self.seed, what, epoch)))

    def _places(self, view: int, start: int, order: Tensor) -> Iterator[Place]:
        for step in range(start, self.length // self.batch):
            yield view, step, order[step * self.batch + self.slots]


def _slots(batch: int, shards: int, shard: int, pairs: bool) -> Tensor:
    """Which places of the global batch this shard takes [batch / shards]."""
    if not pairs:
        return torch.arange(batch).chunk(shards)[shard]
    first = torch.arange(batch // 2).chunk(shards)[shard]
    return torch.cat([first, (batch - 1 - first).flip(0)])


class _Batches(Dataset[TrainBatch | UserError]):
    """Whole batches by their place, so that workers need no state."""

    def __init__(
        self, dataset: Dataset[Any], transform: AnyTransform, seed: int, mix: Mixup | None, wrong: Callable[[Any, Any], str] | None = None
    ) -> None:
        self.dataset, self.transform, self.seed, self.mix, self.wrong = dataset, transform, seed, mix, wrong

    def __getitem__(self, place: Place) -> TrainBatch | UserError:
        try:
            return self._batch(*place)
        except UserError as error:
            return error  # raised in a worker, it would arrive wrapped in the worker's traceback

    def _batch(self, epoch: int, step: int, ids: Tensor) -> TrainBatch:
        images, labels = self._read(ids, epoch)
        if self.mix is None:
            return step, ids, images, labels
        if not self.mix.mixup_enabled:
            return step, ids, images, mixup_target(labels, self.mix.num_classes, 1.0, self.mix.label_smoothing)
        with seeded(self.seed, "mix", epoch, step):
            images, labels = self.mix(images, labels)
        return step, ids, images, labels

    def _read(self, ids: Tensor, epoch: int) -> tuple[Any, Any]:
        if isinstance(self.transform, Normalise) and hasattr(self.dataset, "draw_batch"):
            images, labels = self.dataset.draw_batch(ids, epoch)
            return self.transform(images), labels
        samples = [self._sample(i, epoch) for i in ids.tolist()]
        images, targets = [image for image, _ in samples], [target for _, target in samples]
        if not isinstance(self.transform, (Normalise, PerImage)):
            return self.transform.together(images, targets)
        return torch.stack(images), torch.stack(targets) if isinstance(targets[0], Tensor) else torch.tensor(targets)

    def _sample(self, i: int, epoch: int) -> tuple[Tensor, Any]:
        with seeded(self.seed, "augment", epoch, i):
            image, target = self.dataset.draw(i, epoch) if hasattr(self.dataset, "draw") else self.dataset[i]
            fault = self.wrong(image, target) if self.wrong is not None else ""
            if fault:
                raise UserError(f"sample {i} of the data has {fault}")
            if not isinstance(self.transform, (Normalise, PerImage)):
                return self.transform(image, target)
            return self.transform(image), target if isinstance(target, Tensor) and target.is_floating_point() else int(target)


def _loader(items: _Batches, places: Any, workers: int, keep: bool) -> DataLoader[TrainBatch | UserError]:
    return DataLoader(
        items,
        sampler=places,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=keep and workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise the loader would draw a seed for its workers from the global generator
    )


def _raising(batches: Iterator[TrainBatch | UserError]) -> Iterator[TrainBatch]:
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch
