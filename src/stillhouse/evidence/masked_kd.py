"""Evidence for MaskedKD: the paper's comparison, small enough for two cores.

stillhouse reproduce masked_kd
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.distillers.base import Distiller
from stillhouse.evidence.experiment import Arm, Experiment
from stillhouse.losses.logits import cross_entropy, kl_divergence
from stillhouse.masks.tokens import highest, keep_count
from stillhouse.models.outputs import logits_of
from stillhouse.models.taps import SaliencyTap
from stillhouse.models.tokens import OnSomeTokens

CLAIM = (
    "The paper (arXiv 2302.10494, ImageNet, DeiT-Ti from DeiT-S): labels only 72.0, full KD 75.0, MaskedKD at 50 % of the patches 75.2 "
    "with 49 % of the teacher's multiply-adds, at 40 % 74.9. Patches chosen by the student's attention beat the teacher's, random ones "
    "are worst of the three; masking the student instead collapses; the teacher's accuracy on what it is shown rises during training."
)
SHOWED = (
    "on cluttered digits half the patches teach as well as all; on Fashion-MNIST at this size the student's first choice does not (6.9 "
    "points below full KD), and patches sampled by its attention nearly do (1.2)"
)


class StudentMasked(Distiller):
    """The control that must collapse: the *student* trains on those half of its patches that its own attention ranks highest."""

    def __init__(self, student: nn.Module, teacher: nn.Module, *, keep: float = 0.5, alpha: float = 0.5) -> None:
        super().__init__(student, teacher)
        self.alpha, self.saliency = alpha, SaliencyTap(student)
        self.some = OnSomeTokens(student)
        self.count = keep_count(keep, self.some.patches)

    def forward(self, batch: tuple[Tensor, Tensor], turn: str = "student") -> dict[str, Tensor]:
        """`ce` and `kd` as in KD, the student's logits from some of its patches."""
        images, labels = batch
        with torch.no_grad():
            self.student(images)
        logits_S = logits_of(self.some(images, highest(self.saliency.take()[0], self.count)))
        logits_T = logits_of(self.teach(images))
        return {"ce": (1 - self.alpha) * cross_entropy(logits_S, labels), "kd": self.alpha * kl_divergence(logits_S, logits_T)}


ARMS = (
    Arm("KD", "kd"),
    Arm("labels only", "scratch"),
    Arm("MaskedKD 75 %", "masked_kd", {"keep": 0.75}),
    Arm("MaskedKD 50 %", "masked_kd", {"keep": 0.5}),
    Arm("MaskedKD 25 %", "masked_kd", {"keep": 0.25}),
    Arm("sampled 50 %", "masked_kd", {"keep": 0.5, "by": "sampled"}),
    Arm("sampled 25 %", "masked_kd", {"keep": 0.25, "by": "sampled"}),
    Arm("teacher's attention 50 %", "masked_kd", {"keep": 0.5, "by": "teacher"}),
    Arm("random 50 %", "masked_kd", {"keep": 0.5, "by": "random"}),
    Arm("random 25 %", "masked_kd", {"keep": 0.25, "by": "random"}),
    Arm("lowest 50 %", "masked_kd", {"keep": 0.5, "by": "lowest"}),
    Arm("student masked 50 %", StudentMasked),
)
VIT = "timm/vit_tiny_patch16_224:patch_size=4,weight_init=jax"

EXPERIMENTS = (
    Experiment(
        name="digits",
        title="8 x 8 digits at random places of a noisy 16 x 16 canvas among fragments of others; 16 patches; 300 training digits",
        data="digits:canvas=16,clutter=2,step=4,train=300",
        teacher_data="digits:canvas=16,clutter=2,step=4",
        student=f"{VIT},img_size=16,embed_dim=24,depth=2,num_heads=2",
        teacher=f"{VIT},img_size=16,embed_dim=64,depth=3,num_heads=4",
        recipe={"epochs": 225, "batch": 64, "lr": 4e-3, "warmup_epochs": 20, "eval_every": 45, "save_every": 450},
        teacher_recipe={"epochs": 110, "lr": 1e-3, "warmup_epochs": 10},
        arms=ARMS,
    ),
    Experiment(
        name="fashion_mnist",
        title="Fashion-MNIST, 28 x 28; 49 patches; 3,000 training images for the student, 60,000 for the teacher; 2,500 test images",
        data="fashion-mnist:train=3000,val=2500",
        teacher_data="fashion-mnist",
        student=f"{VIT},img_size=28,embed_dim=32,depth=2,num_heads=2",
        teacher=f"{VIT},img_size=28,embed_dim=64,depth=4,num_heads=4",
        recipe={"epochs": 10, "batch": 64, "lr": 2e-3, "warmup_epochs": 1, "eval_every": 2, "save_every": 230},
        teacher_recipe={"epochs": 3, "lr": 1e-3, "warmup_epochs": 0.3, "eval_every": 1, "save_every": 937},
        arms=ARMS,
    ),
)
