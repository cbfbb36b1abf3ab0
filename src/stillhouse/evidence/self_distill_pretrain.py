"""Evidence for self-distillation: beside further pre-training for as long, for twice as long, and a second phase from the teacher.

stillhouse reproduce self_distill_pretrain
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from stillhouse.distillers.base import Stage
from stillhouse.distillers.pretraining.self_distill_pretrain import SelfDistillPretrain
from stillhouse.evidence.experiment import Arm, Experiment, fine_tuned

CLAIM = (
    "The paper (arXiv 2210.02871). A pre-trained transformer that goes on pre-training on a small target set loses accuracy after "
    "fine-tuning the longer it does; self-distillation does not, and is better than further pre-training and than none, on six sets of "
    "images and on texts. So: above further pre-training of the same cost (which is twice as long), above none, and above a second phase "
    "that begins with the teacher's weights."
)
SHOWED = (
    "on digits after Fashion-MNIST self-distillation is 2.0 ± 2.2 and 5.2 ± 2.0 points above no further pre-training, after 40 and "
    "100 epochs. Not shown: that it is better than going on. Further pre-training does not lose accuracy here, however long it lasts:"
    " as long it is 0.5 ± 3.3 and 1.1 ± 2.7 points above self-distillation, at the same cost 2.8 ± 1.1 and 4.4 ± 2.4, and a second "
    "phase from the teacher's weights is no worse than one from the start"
)


class FromTeacher(SelfDistillPretrain):
    """The ablation whose second phase begins where the first one ended: at first there is no distance from the teacher."""

    @classmethod
    def stages(cls, student: nn.Module, teacher: nn.Module | None, epochs: int, **settings: Any) -> Iterator[Stage]:
        """As the method's, with other weights at the start of the second."""
        phases = super().stages(student, teacher, epochs, **settings)
        first = next(phases)
        yield first
        for second in phases:
            second.distiller.load_state_dict(first.distiller.state_dict())
            yield second


VIT = "timm/vit_tiny_patch16_224:patch_size=4,img_size=28,embed_dim=64,depth=4,num_heads=4"
QUIET: dict[str, Any] = {"save_every": 100_000, "trackers": "none"}
UNLABELLED = "digits:train=400"


def experiment(name: str, epochs: int) -> Experiment:
    """Further pre-training for so many epochs."""
    further = {"data": UNLABELLED, "student": "@mae/autoencoder", "epochs": epochs, "eval_every": epochs, "lr": 5e-4, "warmup_epochs": 0}
    twice = further | {"epochs": 2 * epochs, "eval_every": 2 * epochs}
    arms = (
        fine_tuned("self-distillation", "self_distill_pretrain", further | {"teacher": None}),
        Arm("none", "scratch", {"student": "@mae"}),
        fine_tuned("further pre-training", "mae", further),
        fine_tuned("further, twice as long", "mae", twice),
        fine_tuned("second phase from the teacher", FromTeacher, further | {"teacher": None}),
        Arm("labels alone, from random weights", "scratch"),
    )
    return Experiment(
        name=name,
        title=f"8 x 8 digits, shown in 28 x 28: {epochs} epochs on 400 images without labels, then 60 on 100 of them with labels; 719 "
        "test images. Before, 10,000 images of Fashion-MNIST without labels for 10 epochs, for all but the last. The teacher named here is "
        "that network with a head, fine-tuned likewise",
        data="digits:train=100",
        teacher_data="digits:train=100",
        student=VIT,
        teacher="@mae",
        recipe={"epochs": 60, "batch": 50, "lr": 1e-3, "warmup_epochs": 2, "eval_every": 60, **QUIET},
        teacher_recipe={},
        prepared=(
            Arm(
                "mae",
                "mae",
                {"data": "fashion-mnist:train=10000,val=500", "epochs": 10, "eval_every": 10, "batch": 64, "warmup_epochs": 1}
                | {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4},
            ),
        ),
        arms=arms,
    )


EXPERIMENTS = (experiment("short", 40), experiment("long", 100))
