"""Evidence for MEAL V2: where the student begins, whether labels, a second teacher, weight decay and the discriminator count.

stillhouse reproduce meal_v2
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stillhouse.distillers.supervised.meal_v2 import MEALV2
from stillhouse.evidence.experiment import Arm, Experiment, Search
from stillhouse.tasks.labels import label_losses

CLAIM = (
    "The paper (arXiv 2009.08453). On ImageNet a trained ResNet-50 gets from 76 to 80.7 % top-1, a ResNet-18 from 69.8 to 73.2 %, by "
    "learning on from two teachers alone. So, at the same number of further updates: better than learning on from labels, no worse without "
    "labels than with them, two teachers better than one, no worse without weight decay, and far better than from random weights."
)
SHOWED = (
    "on Fashion-MNIST a trained student that goes on from two teachers alone gets 1.4 ± 0.7 points above one that goes on from "
    "labels, in every seed, and ends 0.8 ± 0.5 above one that begins with random weights; labels beside, or weight decay, make no "
    "difference, as the paper says. Not shown: that a second teacher helps (0.1 ± 0.4 points), nor that the discriminator does, on "
    "either side (0.2 ± 0.4 and 0.1 ± 0.2)"
)


class WithLabels(MEALV2):
    """The ablation that listens to the labels, too, with half of the weight."""

    def forward(self, batch: tuple[Tensor, Any], turn: str = "student") -> dict[str, Tensor]:
        """`ce` beside the method's own terms."""
        taught = super().forward(batch, turn)
        labels = label_losses(self.student, batch)
        return taught | {"kd": 0.5 * taught["kd"]} | {name: 0.5 * term for name, term in labels.items()}


CNN = "timm/resnet10t:output_stride=8"
TAUGHT = "fashion-mnist:train=12000,val=2500"
QUIET: dict[str, Any] = {"save_every": 100_000, "trackers": "none"}
FROM_RANDOM: dict[str, Any] = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05, "warmup_epochs": 1}
BOTH = {"second_teacher": "@second"}
START = Arm("start", "scratch", {**FROM_RANDOM, "epochs": 10, "eval_every": 10})
OF_TEACHERS: dict[str, Any] = {**FROM_RANDOM, "epochs": 6, "eval_every": 6}

EXPERIMENTS = (
    Experiment(
        name="fashion_mnist",
        title="Fashion-MNIST, 28 x 28: 3,000 training images for the student, which has learnt them from their labels for 10 epochs "
        "before; 12,000 for each of two teachers; 2,500 test images. Every arm has the best of three learning rates, found on another seed",
        data="fashion-mnist:train=3000,val=2500",
        teacher_data=TAUGHT,
        student=f"{CNN},channels=(8,16,32,32),stem_width=8",
        teacher=f"{CNN},channels=(24,48,96,96),stem_width=24",
        recipe={"epochs": 20, "batch": 64, "optimizer": "sgd", "weight_decay": 0.0, "warmup_epochs": 0, "eval_every": 20, **QUIET},
        teacher_recipe=OF_TEACHERS,
        prepared=(Arm("second", "scratch", {**OF_TEACHERS, "data": TAUGHT, "student": f"{CNN},channels=(32,64,64,64),stem_width=16"}),),
        search=Search(rates=(0.003, 0.01, 0.03), scales=()),
        arms=(
            Arm("MEAL V2", "meal_v2", BOTH, before=START),
            Arm("labels, learning on", "scratch", before=START),
            Arm("one teacher", "meal_v2", before=START),
            Arm("with labels", WithLabels, BOTH, before=START),
            Arm("discriminator off", "meal_v2", {**BOTH, "discriminator": "off"}, before=START),
            Arm("discriminator against", "meal_v2", {**BOTH, "discriminator": "against"}, before=START),
            Arm("weight decay 0.001", "meal_v2", {**BOTH, "weight_decay": 1e-3}, before=START),
            Arm("from random weights", "meal_v2", BOTH),
        ),
    ),
)
