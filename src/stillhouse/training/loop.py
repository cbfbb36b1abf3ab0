"""The loop: runs any `Distiller`, a few lines a step. Everything under it is Accelerate's: devices, processes, precision, trackers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.data.mixup import Mixup
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from stillhouse import tasks
from stillhouse.cache.teacher import CachedTeacher
from stillhouse.data import OF_CLASSES, Data
from stillhouse.data.loading import TrainBatches, eval_batches, mixing
from stillhouse.distillers.base import Clock, Distiller
from stillhouse.errors import UserError
from stillhouse.interrupted import Interrupted
from stillhouse.models.detectors import compiled_part
from stillhouse.models.preprocessing import Preprocessing
from stillhouse.randomness import samples, seed_from
from stillhouse.run_folder import whole_file
from stillhouse.tasks.base import Task
from stillhouse.training.batches import in_parts, on_device
from stillhouse.training.checkpoint import (
    last_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from stillhouse.training.evaluation import evaluate, learnt
from stillhouse.training.interrupt import Interruption
from stillhouse.training.layout import channels_last, checkpointed
from stillhouse.training.log import Table, Terms, read_table, refuse_unless_finite
from stillhouse.training.optim import Player, players_of
from stillhouse.training.pictures import small, undone
from stillhouse.training.processes import accelerator_for
from stillhouse.training.progress import Progress
from stillhouse.training.recipe import Recipe

LOG = logging.getLogger("stillhouse")
SMOKE_STEPS, SMOKE_BATCHES, PICTURES = 4, 2, 6
DRAWN = ("detect", "segment", "generate")
"""The tasks whose answers are drawn over the images."""


class Loop:
    """A training that can be stopped at any step and goes on from there exactly.

    Args:
        distiller: what learns, and from what.
        data: images and labels.
        transforms: the training and the evaluation transform.
        preprocessing: what both transforms make of an image; pictures are drawn by undoing it.
        recipe: how to train.
        folder: where figures, pictures and checkpoints go.
        facts: what must be equal for a checkpoint to be taken up again (method, hashes of teacher, data and settings).
        title: what the progress bar calls it.
        metric: what makes the metric that the products are measured by; by default that of the data's task.
        cache: the distiller's teacher, if its answers are kept.
    """

    def __init__(
        self,
        distiller: Distiller,
        data: Data,
        transforms: tuple[Any, Any],
        preprocessing: Preprocessing,
        recipe: Recipe,
        folder: Path,
        facts: dict[str, Any] | None = None,
        title: str = "",
        metric: Callable[..., Task] | None = None,
        cache: CachedTeacher | None = None,
    ) -> None:
        self.cache = cache
        self.accelerator = accelerator_for(recipe, folder, turns=len(distiller.turns()))
        self.data, self.recipe, self.folder, self.facts, self.title = data, recipe, folder, facts or {}, title
        self.task = tasks.find(data.task)
        self.metric = metric or partial(self.task, data.classes)
        self.eval_transform, self.preprocessing = transforms[1], preprocessing
        self.batch = recipe.batch
        self.batches = TrainBatches(
            data.train,
            transforms[0],
            batch=recipe.batch,
            seed=recipe.seed,
            shards=self.accelerator.num_processes,
            shard=self.accelerator.process_index,
            workers=recipe.workers,
            mix=_mixing(data, recipe),
            wrong=data.wrong,
            views=recipe.views,
        )
        if self.batch // self.accelerator.num_processes % recipe.accumulate:
            raise UserError(f"a process's part of the batch of {self.batch} does not divide into accumulate={recipe.accumulate} parts")
        self.steps_per_epoch = len(self.batches)
        turns = distiller.turns()
        asked = recipe.epochs * self.steps_per_epoch if turns else 0
        self.steps = min(asked, recipe.max_steps or math.inf, SMOKE_STEPS if recipe.smoke else math.inf)
        warmup = round(recipe.warmup_epochs * self.steps_per_epoch) if recipe.warmup_epochs < recipe.epochs else 0
        self.distiller = distiller.to(self.accelerator.device)
        for network in distiller.children():
            channels_last(network, recipe.channels_last)
        if recipe.checkpointing:
            checkpointed(distiller.student)
        self.players = players_of(distiller, recipe, int(self.steps), min(warmup, int(self.steps) // 5))
        self.ema = ModelEmaV3(self.products, decay=recipe.ema, use_warmup=True) if recipe.ema is not None else None
        if recipe.compile:
            for network in distiller.children():
                compiled_part(network).compile()
        self.model = self.accelerator.prepare(distiller) if turns else distiller
        for player in self.players:
            player.optimizer = self.accelerator.prepare_optimizer(player.optimizer)
        self.terms, self.figures = Terms(), Terms()
        self.alarms: list[str] = []
        self.news: list[str] = []
        self.alarmed = False
        self.step = 0

    def run(self) -> dict[str, float]:
        """Trains from where it is to the end and returns the last evaluation's metrics.

        Raises:
            Interrupted: after a signal to stop, once a checkpoint is written.
            Diverged: if a loss is not finite; the last checkpoint is from before.
            UserError: if something cannot be written.
        """
        self.accelerator.init_trackers("stillhouse")
        try:
            return self.run_from_here()
        finally:
            for tracker in self.accelerator.trackers:  # not `end_training`: it takes the process group away from what comes next
                tracker.finish()

    def run_from_here(self) -> dict[str, float]:
        """`run`, once it is known where to begin."""
        main = self.accelerator.is_main_process
        train, watch, speed, val = (Table(self.folder / f"{name}.csv", self.step, main) for name in ("train", "watch", "speed", "val"))
        metrics: dict[str, float] = {}
        if not self.steps and not read_table(val.path):
            metrics = self.evaluate()
            self.write(val, tasks.by_class(metrics)[0])
            self.save()
        if not self.step:
            self.hear(0)
        first, elsewhere, begun = self.step, 0.0, time.perf_counter()
        self.pictures(first)
        with Interruption() as interruption, Progress(self.title, int(self.steps), self.step, main) as progress:
            for step, *batch in self.to_do():
                self.update(step, *batch)
                self.step = step + 1
                progress.advance()
                if self.step % self.recipe.log_every == 0 or self.step == self.steps:
                    if self.cache is not None:
                        self.cache.check()
                    row = self.terms.mean(self.accelerator)
                    self.write(train, {"lr": self.players[0].optimizer.param_groups[0]["lr"], **row})
                    self.watched(watch)
                    seconds = time.perf_counter() - begun - elsewhere
                    self.write(speed, {"images_per_second": (self.step - first) * self.batch / max(seconds, 1e-9)})
                    progress.show(f"loss {row['total']:.3f}" if row else "")
                paused = time.perf_counter()
                if self.evaluates():
                    metrics = self.evaluate()
                    self.write(val, tasks.by_class(metrics)[0])
                    progress.show(f"{self.task.titles[self.task.headline]} {metrics[self.task.headline]:.3f}")
                self.pictures(self.step)
                stopping = self.stops(interruption)
                if self.saves() or stopping:
                    self.save()
                if stopping:
                    raise Interrupted(f"interrupted after step {self.step}", stopping)
                elsewhere += time.perf_counter() - paused
        return metrics or {name: float(value) for name, value in read_table(val.path)[-1].items() if name not in ("step", "epoch")}

    def to_do(self) -> Iterator[tuple[int, Tensor, Any, Any]]:
        """(step, ids, images, targets) from where the run is to its end: this process's share of every global batch."""
        while self.step < self.steps:
            epoch, start = divmod(self.step, self.steps_per_epoch)
            self.turn_to(f"view-{self.batches.view(epoch)}")
            for index, ids, images, targets in self.batches.epoch(epoch, start):
                yield epoch * self.steps_per_epoch + index, ids, images, targets
                if self.step >= self.steps:
                    return

    def update(self, step: int, ids: Tensor, images: Any, targets: Any) -> None:
        """One step: every turn that is due learns from the same images; then what moves without gradients moves."""
        batch = (ids, *on_device((images, targets), self.accelerator.device))
        parts = list(zip(*(in_parts(each, self.recipe.accumulate) for each in batch), strict=True))
        if not self.model.training:
            self.model.train()
        seen: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        for turn, together in groupby(self.players, key=lambda player: player.turn.name):
            players = list(together)
            for player in players:
                player.schedule.step_update(step)
            due = [player for player in players if step % player.turn.every == 0]
            if not due:
                continue
            for number, part in enumerate(parts):
                torch.manual_seed(seed_from(self.recipe.seed, "step", step, turn, self.accelerator.process_index, number))
                last = number == len(parts) - 1
                terms = self.learn(turn, step, part, 1 / len(parts), last)
                for name, value in terms.items():
                    seen[name] = seen.get(name, 0.0) + value.detach() / len(parts)
                for name, value in self.distiller.watch().items():
                    figures[name] = figures.get(name, 0.0) + value.detach() / len(parts)
            for player in due:
                if self.recipe.clip is not None:
                    self.accelerator.clip_grad_norm_(player.turn.parameters, self.recipe.clip)
                player.optimizer.step()
            self.model.zero_grad(set_to_none=True)
        if seen:
            self.terms.add(step + 1, seen)
        if figures:
            self.figures.add(step + 1, figures)
        torch.manual_seed(seed_from(self.recipe.seed, "after", step))
        self.distiller.after_update(self.clock(step + 1))
        self.hear(step + 1)
        if self.ema is not None:
            self.ema.update(self.products, step=step + 1)
        if self.cache is not None:
            self.cache.end_step()

    def hear(self, step: int) -> None:
        """What the method has decided is told, and kept for the report."""
        news = self.distiller.news()
        if news:
            self.news.append(f"step {step}: {news}")
            if self.accelerator.is_main_process:
                LOG.info(self.news[-1])

    def learn(self, turn: str, step: int, part: tuple[Tensor, Any, Any], share: float, last: bool) -> dict[str, Tensor]:
        """The gradients of one part of the batch; processes exchange them with the last part only."""
        ids, images, targets = part
        waiting = nullcontext() if last else self.accelerator.no_sync(self.model)
        place = step if self.recipe.views is None else self.batches.view(step // self.steps_per_epoch)
        with waiting, samples(self.recipe.seed, place, ids), self.answering():
            with self.accelerator.autocast():
                terms = self.model((images, targets), turn)
            self.accelerator.backward(torch.stack(list(terms.values())).sum() * share)
        return terms

    def turn_to(self, view: str) -> None:
        """Of the teacher's answers those about this view of the training images, with all that any process knows; or about "val"."""
        if self.cache is None:
            return
        if view == "val":
            self.cache.turn_to(view, len(self.data.val))  # type: ignore[arg-type]
            return
        self.cache.flush()
        self.accelerator.wait_for_everyone()
        self.cache.turn_to(view, len(self.data.train))  # type: ignore[arg-type]

    def answering(self) -> AbstractContextManager[None]:
        """The teacher says again what it has said, if that is kept."""
        return self.cache.answering() if self.cache is not None else nullcontext()

    def cached(self) -> dict[str, Any] | None:
        """What keeping the teacher's answers came to: images over all processes, and steps."""
        if self.cache is None:
            return None
        read, asked, *steps = self.accelerator.reduce(torch.tensor(self.cache.counts, device=self.accelerator.device), "sum").tolist()
        return self.cache.facts(read, asked, *(count // self.accelerator.num_processes for count in steps))

    def clock(self, step: int) -> Clock:
        """Where the training is after `step` updates."""
        return Clock(step, int(self.steps), step // self.steps_per_epoch, self.recipe.epochs)

    def evaluates(self) -> bool:
        """Whether an evaluation is due: after every `eval_every`-th epoch, and at the end."""
        return self.step == self.steps or self.step % (self.recipe.eval_every * self.steps_per_epoch) == 0

    def saves(self) -> bool:
        """Whether a checkpoint is due."""
        return self.step == self.steps or self.step % (self.recipe.save_every or self.steps_per_epoch) == 0

    def stops(self, interruption: Interruption) -> int:
        """The signal because of which to end here, or 0. Several processes agree, and so only where they wait for each other anyway."""
        if self.accelerator.num_processes == 1:
            return interruption.asked
        if self.step % self.recipe.log_every and not self.saves():
            return 0
        return int(self.accelerator.gather(torch.tensor([interruption.asked], device=self.accelerator.device)).max())

    def evaluate(self) -> dict[str, float]:
        """The metrics of what would be kept now; the names of all but the first network stand before their metrics."""
        metrics: dict[str, float] = {}
        self.turn_to("val")
        for number, (name, network) in enumerate(self.examined().items()):
            torch.manual_seed(seed_from(self.recipe.seed, "evaluate", self.step))
            metric = self.learnt(self.metric(), network)
            first = None if number else self.distiller
            with self.answering():
                found = evaluate(network, self.val_batches(), self.accelerator, metric, first, self.recipe.seed)
            metrics |= {f"{name}_{key}": value for key, value in tasks.by_class(found)[0].items()} if number else found
        return metrics

    @torch.no_grad()
    def examined(self) -> dict[str, nn.Module]:
        """The networks that are measured."""
        torch.manual_seed(seed_from(self.recipe.seed, "examined", self.step))
        return self.distiller.examined(self.kept)

    def val_batches(self) -> Iterator[tuple[Tensor, Any, Any]]:
        """This process's share of the validation set, in order."""
        batches = eval_batches(
            self.data.val,
            self.eval_transform,
            batch=self.batch,
            workers=self.recipe.workers,
            shards=self.accelerator.num_processes,
            shard=self.accelerator.process_index,
            wrong=self.data.wrong,
        )
        return islice(batches, SMOKE_BATCHES if self.recipe.smoke else None)

    def learnt(self, metric: Task, network: nn.Module) -> Task:
        """The metric, once it has learnt what it wants to from labelled training images."""
        return learnt(metric, network, self.data, self.eval_transform, self.accelerator.device, self.batch, self.recipe.workers)

    @property
    def products(self) -> nn.ModuleDict:
        """What the distiller would leave behind, as one module."""
        return nn.ModuleDict(self.distiller.products)

    @property
    def kept(self) -> dict[str, nn.Module]:
        """What the run would leave behind now: the distiller's products, or their moving averages."""
        return dict((self.ema.module if self.ema is not None else self.products).items())

    def watched(self, table: Table) -> None:
        """What the method watches, as a row of its own; an alarm is told when it begins, and kept for the report."""
        row = self.figures.mean(self.accelerator)
        if not row:
            return
        row.pop("total")
        self.write(table, row)
        alarm = self.distiller.alarm(row)
        if alarm and not self.alarmed:
            self.alarms.append(f"step {self.step}: {alarm}")
            if self.accelerator.is_main_process:
                LOG.warning(self.alarms[-1])
        self.alarmed = bool(alarm)

    def pictures(self, step: int) -> None:
        """At the start, the middle and the end: what a handful of validation images look like to student and teacher, for the report."""
        moments = {0: 0.0, int(self.steps) // 2: 0.5, int(self.steps): 1.0}
        if step not in moments or not self.accelerator.is_main_process or self.data.inputs != "images":
            return
        few = eval_batches(self.data.val, self.eval_transform, batch=min(self.batch, PICTURES), workers=0, shards=1, shard=0)
        _, images, targets = next(iter(few))
        seen_images, seen_targets = on_device((images, targets), self.accelerator.device)
        training = self.distiller.training
        self.distiller.eval()
        torch.manual_seed(seed_from(self.recipe.seed, "look", step))
        maps = self.distiller.look((seen_images, seen_targets))
        pictures = undone(images, self.preprocessing)
        tensors = {"images": small(pictures), **{name: value.float().cpu() for name, value in maps.items()}}
        if self.data.task in OF_CLASSES:
            tensors["labels"] = targets
        if self.data.task in DRAWN:
            tensors |= self.drawn(pictures, seen_images, targets)
        self.distiller.train(training)
        path = self.folder / "pictures" / f"step-{step:08d}.safetensors"
        told = {"step": str(step), "progress": str(moments[step])}
        with whole_file(path) as beside:
            path.parent.mkdir(exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata=told)

    @torch.no_grad()
    def drawn(self, pictures: Tensor, images: Any, targets: Any) -> dict[str, Tensor]:
        """Labels and what the student says now, laid over the pictures."""
        on = on_device(targets, self.accelerator.device)
        classes, draw, ask = self.data.classes, self.task.draw, self.metric().ask
        student = next(iter(self.examined().values())).eval()
        drawn = {"labels": draw(pictures, targets, classes)} if self.data.task != "generate" else {}
        drawn["student"] = draw(pictures, ask(student, images, on), classes)
        if self.distiller.teacher is not None:
            whole = nn.Sequential(self.distiller.refeed, self.distiller.teacher)
            drawn["teacher"] = draw(pictures, ask(whole, images, on), classes)
        return {f"drawn/{name}": small(each) for name, each in drawn.items()}

    def write(self, table: Table, row: dict[str, float]) -> None:
        """A row for the CSV file and the trackers."""
        if not self.accelerator.is_main_process:
            return
        epoch = -(-self.step // self.steps_per_epoch)
        table.add({"step": self.step, "epoch": epoch, **row})
        self.accelerator.log({f"{table.path.stem}/{name}": value for name, value in row.items()}, step=self.step)

    def save(self) -> None:
        """A checkpoint of all that learns, once the losses up to here and the weights are known to be finite."""
        if self.cache is not None:
            self.cache.check()
            self.cache.flush()
        self.terms.check(self.accelerator)
        self.figures.gather(self.accelerator)
        refuse_unless_finite(self.distiller, self.step)
        if self.accelerator.is_main_process:
            parts = {
                "distiller": _tensors(self.distiller.state_dict()),
                **{name: optimizer_tensors(player.optimizer) for name, player in self.by_name().items()},
            }
            parts["log"], parts["watch"] = self.terms.tensors(), self.figures.tensors()
            if self.ema is not None:
                parts["ema"] = _tensors(self.ema.module.state_dict())
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
            state = {"facts": self.facts, "scaler": scaler, "alarms": self.alarms, "alarmed": self.alarmed, "news": self.news}
            state["cache"] = self.cache.counts if self.cache is not None else []
            save_checkpoint(self.folder / "checkpoints", self.step, parts, state, self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def by_name(self) -> dict[str, Player]:
        """The players by the names of their files; those that share a turn are numbered."""
        named: dict[str, Player] = {}
        for player in self.players:
            name = f"optimizer-{player.turn.name}"
            named[name if name not in named else f"{name}-{sum(key.startswith(name) for key in named) + 1}"] = player
        return named

    def load(self) -> None:
        """Takes up the last checkpoint that is whole, if there is one.

        Raises:
            UserError: if none is whole, or it is of another method, model, teacher, data set or settings.
        """
        found = last_checkpoint(self.folder / "checkpoints")
        if found is None:
            return
        path, parts, facts = found
        for name, value in self.facts.items():
            was = facts.get("facts", {}).get(name)
            if was != value:
                raise UserError(f"{path} is of another {name} ({_difference(was, value)}); start anew in another folder with --out")
        try:
            self.distiller.load_state_dict(parts["distiller"])
            for name, player in self.by_name().items():
                load_optimizer_tensors(player.optimizer, parts[name])
            if self.ema is not None:
                self.ema.module.load_state_dict(parts["ema"])
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{path} is of another network ({str(error).splitlines()[0]}); start anew with --out") from error
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.step, self.alarms, self.alarmed, self.news = facts["step"], facts["alarms"], facts["alarmed"], facts["news"]
        self.distiller.news()  # of its preparation, which was told when the run began
        if self.cache is not None:
            self.cache.counts = facts["cache"]
        for terms, part in ((self.terms, "log"), (self.figures, "watch")):
            terms.restore(on_device(parts[part], self.accelerator.device))


def _difference(was: Any, now: Any) -> str:
    """What was and what is now; of settings only those that differ."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return f"{was}, now {now}"
    return ", ".join(f"{name} was {was.get(name)}, now {now.get(name)}" for name in {**was, **now} if was.get(name) != now.get(name))


def _mixing(data: Data, recipe: Recipe) -> Mixup | None:
    if (data.task != "classify" or data.inputs != "images") and (recipe.mixup or recipe.cutmix or recipe.smoothing):
        raise UserError(
            f"mixup, cutmix and smoothing are for images to classify, and '{data.name}' has {data.inputs} to {data.task}: leave them out"
        )
    return mixing(len(data.classes), mixup=recipe.mixup, cutmix=recipe.cutmix, smoothing=recipe.smoothing)


def _tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
