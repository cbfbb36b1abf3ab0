"""Evidence for G2SD: each of its stages alone, both, and a generic stage that copies painted pixels in place of the decoder's tokens.

stillhouse reproduce g2sd
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from stillhouse.distillers.pretraining.g2sd import G2SD, Generic
from stillhouse.evidence.experiment import ALMOST_NOTHING, Arm, Experiment
from stillhouse.losses.pretraining import whitened_smooth_l1
from stillhouse.masks.patches import random_masking
from stillhouse.models.mae import encode

CLAIM = (
    "The paper (arXiv 2302.14771). ViT-S from ViT-B: 98.7 % of its teacher's accuracy on ImageNet, 98.1 % on COCO, 99.3 % on ADE20K. So, "
    "if both stages earn their place: G2SD above the generic stage alone and above the specific one alone, those above plain training; the "
    "generic stage above pre-training the student by itself, and above copying the teacher's pixels."
)
SHOWED = (
    "on Fashion-MNIST with 1,000 labels both stages together are above either alone and 3.4 ± 2.7 points above labels alone, near the "
    "spread of three seeds; not shown: that the decoder's features teach more than its pixels"
)


class Painted(Generic):
    """The generic stage's ablation: what is predicted is what the teacher paints, each patch with mean 0 and variance 1."""

    def __init__(self, student: nn.Module, teacher: Any, **settings: Any) -> None:
        super().__init__(student, teacher, **settings)
        width = teacher.decoder.mask_token.shape[-1]
        self.predictor = Mlp(settings["decoder"][0], width, teacher.decoder.head.out_features)

    def forward(self, batch: tuple[Tensor, Any], turn: str = "student") -> dict[str, Tensor]:
        """`painted`: the distance."""
        images = batch[0]
        masking = random_masking(len(images), self.grid[0] * self.grid[1], self.masked, images.device)
        with torch.no_grad():
            painted = self.teacher.paint(self.refeed(images), masking.keep, masking.restore)
        predicted = self.predictor(self.decoder(encode(self.student, images, masking.keep), masking.restore))
        return {"painted": whitened_smooth_l1(predicted[:, self.decoder.prefix :], painted)}


class FromPixels(G2SD):
    """G2SD with `Painted` for its generic stage."""

    @staticmethod
    def generically(student: nn.Module, teacher: nn.Module, **settings: Any) -> Generic:
        """The ablation's."""
        return Painted(student, teacher, **settings)


VIT = "timm/vit_tiny_patch16_224:patch_size=7,img_size=28,embed_dim=96,depth=6,num_heads=4"
DEIT = "timm/deit_tiny_distilled_patch16_224:patch_size=7,img_size=28,embed_dim=32,depth=4,num_heads=2"
UNLABELLED, LABELLED = "fashion-mnist:train=5000,val=500", "fashion-mnist:train=1000,val=2500"
QUIET: dict[str, Any] = {"save_every": 5000, "trackers": "none"}
PRETRAIN: dict[str, Any] = {"data": UNLABELLED, "epochs": 10, "batch": 64, "lr": 1e-3, "warmup_epochs": 1, "eval_every": 10, **QUIET}
SMALL: dict[str, Any] = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2}
TEACHERS = {"teacher": "@mae/autoencoder", "specific_teacher": "@teacher"}
TAUGHT: dict[str, Any] = {**TEACHERS, "unlabelled": UNLABELLED, "generic": 1 / 3, **SMALL}
UNTRAINED = Arm("untrained", "mae", {**PRETRAIN, **SMALL, **ALMOST_NOTHING})
"""A student as it begins, with the positions that the others have."""

EXPERIMENTS = (
    Experiment(
        name="fashion_mnist",
        title="Fashion-MNIST, 28 x 28, 16 patches; 5,000 images without labels for generic stage or pre-training, 10 epochs, and 1,000 "
        "with labels for the specific stage or plain training, 30 epochs. The teacher is pre-trained on the 5,000 for 30 epochs, and "
        "fine-tuned on 1,000 for 20",
        data=LABELLED,
        teacher_data=LABELLED,
        student=DEIT,
        teacher="@mae",
        retained=True,
        recipe={"epochs": 30, "batch": 64, "lr": 1e-3, "warmup_epochs": 1, "eval_every": 30, **QUIET},
        teacher_recipe={"epochs": 20, "eval_every": 20},
        prepared=(
            Arm(
                "mae",
                "mae",
                {**PRETRAIN, "student": VIT, "epochs": 30, "eval_every": 30}
                | {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4},
            ),
        ),
        arms=(
            Arm("labels only", "scratch", before=UNTRAINED),
            Arm("MAE, then labels", "scratch", before=Arm("mae", "mae", {**PRETRAIN, **SMALL})),
            Arm("generic, then labels", "g2sd", {**TAUGHT, "alpha": 0.0}),
            Arm("specific alone", "g2sd", {**TAUGHT, "generic": 0.0}, before=UNTRAINED),
            Arm("G2SD", "g2sd", TAUGHT),
            Arm("generic from pixels", FromPixels, TAUGHT),
        ),
    ),
)
