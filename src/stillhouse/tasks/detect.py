"""Object detection: what is measured over a pass, and how it is drawn."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.utils import draw_bounding_boxes

from stillhouse.errors import UserError
from stillhouse.tasks.base import Task
from stillhouse.tasks.colours import as_rgb, colours

ROW = 8
"""Numbers a box takes in the state: its image, 4 corners, label, score, whether it is a crowd."""
SHOWN_SIDE, LETTER, LINES = 160, 6, 80
"""A picture with a longer side (pixels) is shown smaller than words in it could be read; a letter's width; widths of a line in a side."""


class Detect(Task):
    """COCO's average precision of a student's boxes (torchmetrics, with faster-coco-eval).

    Its state is every box that was true or found, as rows of one list that grows with the data (about 3 kB an image of 100 boxes), so that
    processes with different numbers of images agree.

    Args:
        classes: the names of the labels 1..K; 0, the background, has none.
        sync_on_compute: as for `Task`.

    Raises:
        UserError: if there is none.
    """

    headline: ClassVar[str] = "map"
    titles: ClassVar[dict[str, str]] = {
        "map": "mAP",
        "map_50": "AP50",
        "map_75": "AP75",
        "map_small": "AP small",
        "map_medium": "AP medium",
        "map_large": "AP large",
    }
    per_class: ClassVar[str] = "AP"

    truths: list[Tensor]
    found: list[Tensor]

    def __init__(self, classes: list[str], *, sync_on_compute: bool = True) -> None:
        super().__init__(classes, sync_on_compute=sync_on_compute)
        self.add_state("truths", [], dist_reduce_fx="cat")
        self.add_state("found", [], dist_reduce_fx="cat")
        self.seen = 0

    def update(self, output: list[dict[str, Tensor]], targets: list[dict[str, Tensor]], teacher_output: Any = None) -> None:
        """Add a batch.

        Args:
            output: a dict an image: "boxes" [m, 4] (xyxy, pixels), "labels" [m] in 1..K, "scores" [m].
            targets: a dict an image: "boxes" [n, 4], "labels" [n], and "iscrowd" [n] where a box may stand for many objects: what is
                found in it is neither right nor wrong. An image without boxes counts: what is found there is wrong.
            teacher_output: not used: boxes of two networks have no natural agreement.

        Raises:
            UserError: if the student does not answer as a detector in eval mode does.
        """
        answers = isinstance(output, (list, tuple)) and all(
            isinstance(each, dict) and {"boxes", "labels", "scores"} <= each.keys() for each in output
        )
        if not answers or len(output) != len(targets):
            raise UserError(
                f"the student returned {type(output).__name__} on {len(targets)} images, expected a dict with boxes, labels and scores for "
                "each; evaluate a detector that follows torchvision's contract in eval mode"
            )
        for truth, answer in zip(targets, output, strict=True):
            image = self._number()
            crowd = truth.get("iscrowd", torch.zeros_like(truth["labels"]))
            self.truths.append(_rows(image, truth["boxes"], truth["labels"], torch.ones_like(truth["labels"]), crowd))
            self.found.append(_rows(image, answer["boxes"], answer["labels"], answer["scores"], torch.zeros_like(answer["labels"])))

    def compute(self) -> dict[str, float]:
        """Average precision in [0, 1] as COCO defines it: at most 100 boxes an image and class, mean over classes that occur.

        `map` (mean over IoU 0.50:0.05:0.95), `map_50`, `map_75`, and `map_small`, `map_medium`, `map_large` of objects below 32², up to 96²
        and above (square pixels of the images as the student sees them). `ap/NAME` of each class. What no object could show, such as
        `map_large` without a large one, is left out.

        Raises:
            UserError: if there is no object, or a label is not in 1..K.
        """
        truths, found = _images(self.truths), _images(self.found)
        for whose, boxes in (("the validation data", truths), ("the student", found)):
            for rows in boxes.values():
                strange = rows[(rows[:, 5] < 1) | (rows[:, 5] > len(self.classes)), 5]
                if len(strange):
                    raise UserError(f"{whose} has a box with the label {int(strange[0])}, expected 1 to {len(self.classes)}")
        metric = MeanAveragePrecision(backend="faster_coco_eval", class_metrics=True, sync_on_compute=False)
        metric.warn_on_many_detections = False
        nothing = torch.zeros(0, ROW)
        every = sorted({*truths, *found})
        metric.update([_answer(found.get(image, nothing)) for image in every], [_truth(truths.get(image, nothing)) for image in every])
        if not any((rows[:, 7] == 0).any() for rows in truths.values()):
            raise UserError("nothing was measured: there is no object in the validation images")
        values = metric.compute()
        result = {name: float(values[name]) for name in self.titles}
        labels, precisions = values["classes"].reshape(-1).tolist(), values["map_per_class"].reshape(-1).tolist()
        result |= {f"ap/{self.classes[label - 1]}": value for label, value in zip(labels, precisions, strict=True)}
        return {name: value for name, value in result.items() if value >= 0}  # torchmetrics says -1 where there is nothing

    @property
    def chance(self) -> float:
        """0.01: boxes at random hit next to nothing, but rarely nothing at all."""
        return 0.01

    @staticmethod
    def draw(images: Tensor, what: Any, classes: list[str], score: float = 0.3) -> Tensor:
        """Boxes in their class's colour over the images uint8 [n, C, H, W], with the class's name where it can be read.

        Args:
            images: the pictures.
            what: targets, or a detector's answers in eval mode: a dict an image.
            classes: the names of the labels 1..K.
            score: answers with less are left out.
        """
        palette, side = colours(len(classes)), max(images.shape[-2:])
        drawn = []
        for image, boxes in zip(as_rgb(images.cpu()), what, strict=True):
            sure = (boxes["boxes"][:, 2:] >= boxes["boxes"][:, :2]).all(1)  # nothing else has a place in the picture
            if "scores" in boxes:
                sure &= boxes["scores"] >= score
            corners, labels = boxes["boxes"][sure].float().cpu(), (boxes["labels"][sure] - 1).tolist()
            if labels:
                names = [classes[label] if _fits(classes[label], box, side) else None for label, box in zip(labels, corners, strict=True)]
                colour = [palette[label] for label in labels]
                image = draw_bounding_boxes(image, corners, names, colour, width=max(1, round(side / LINES)))  # type: ignore[arg-type]
            drawn.append(image)
        return torch.stack(drawn)

    def _number(self) -> int:
        """A number for an image that no other process uses."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes, process = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if together else (1, 0)
        self.seen += 1
        return self.seen * processes + process


def _rows(image: int, boxes: Tensor, labels: Tensor, scores: Tensor, crowd: Tensor) -> Tensor:
    """The boxes of an image as rows, laid out flat: torchmetrics gathers flat lists even from a process that has none."""
    columns = [torch.full_like(scores, image, dtype=torch.float32)[:, None], boxes, labels[:, None], scores[:, None], crowd[:, None]]
    return torch.cat([column.detach().float() for column in columns], dim=1).flatten()


def _images(state: list[Tensor] | Tensor) -> dict[int, Tensor]:
    """Rows [n, ROW] on the CPU, by image."""
    rows = torch.cat([torch.zeros(0), *(part.cpu() for part in ([state] if isinstance(state, Tensor) else state))]).view(-1, ROW)
    rows = rows[rows[:, 0].argsort(stable=True)]
    images, counts = rows[:, 0].long().unique_consecutive(return_counts=True)
    return dict(zip(images.tolist(), rows.split(counts.tolist()), strict=True))


def _answer(rows: Tensor) -> dict[str, Tensor]:
    return {"boxes": rows[:, 1:5], "labels": rows[:, 5].int(), "scores": rows[:, 6]}


def _truth(rows: Tensor) -> dict[str, Tensor]:
    return {"boxes": rows[:, 1:5], "labels": rows[:, 5].int(), "iscrowd": rows[:, 7].int()}


def _fits(name: str, box: Tensor, side: int) -> bool:
    """Whether a name can be read in a picture of this longer side and has room over its box."""
    return side <= SHOWN_SIDE and LETTER * len(name) <= float(box[2] - box[0])
