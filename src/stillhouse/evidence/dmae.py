"""Evidence for DMAE: pre-training with and without a teacher, and with one that knows nothing, judged after fine-tuning on few labels.

stillhouse reproduce dmae
"""

from __future__ import annotations

from typing import Any

from stillhouse.evidence.experiment import ALMOST_NOTHING, Arm, Experiment, fine_tuned

CLAIM = (
    "The paper (arXiv 2208.12256). ImageNet, ViT-B from a ViT-L that was pre-trained by masking, 100 epochs: 84.0 after fine-tuning, 1.2 "
    "above distilling from a ViT-L that was fine-tuned first; 83.6 with ten visible patches of 196, 82.4 with four. So: DMAE above MAE of "
    "the same length, that above no pre-training; with few patches little is lost; a teacher that has learned nothing does not help."
)
SHOWED = (
    "on Fashion-MNIST with 500 labels pre-training by masking helps (6 points over none) and hiding 95 % costs nothing; not shown: that a "
    "teacher adds to it (0.2 ± 1.3 points), nor that one that has learned nothing does not"
)

VIT = "timm/vit_tiny_patch16_224:patch_size=4,img_size=28"
DATA = "fashion-mnist:train=5000,val=500"
DECODER: dict[str, Any] = {"decoder_width": 48, "decoder_depth": 1, "decoder_heads": 3}
QUIET: dict[str, Any] = {"save_every": 5000, "trackers": "none"}
PRETRAIN: dict[str, Any] = {"data": DATA, "epochs": 10, "batch": 128, "lr": 2e-3, "warmup_epochs": 1, "eval_every": 10, **DECODER, **QUIET}
TEACHER: dict[str, Any] = {**PRETRAIN, "student": f"{VIT},embed_dim=96,depth=6,num_heads=4", "epochs": 20, "eval_every": 20}


def after(name: str, method: str, **settings: Any) -> Arm:
    """Fine-tuning of what a method has pre-trained."""
    return fine_tuned(name, method, PRETRAIN | settings)


EXPERIMENTS = (
    Experiment(
        name="fashion_mnist",
        title="Fashion-MNIST, 28 x 28, 49 patches; all students but one are pre-trained on 5,000 images without their labels, 10 epochs, "
        "and all are fine-tuned on 500 labelled ones; nothing is said of more, such as 1,000. The teacher is pre-trained on the 5,000 "
        "images for 20 epochs; the figure given for it is after 20 epochs of fine-tuning, which the students' teacher has not seen. It "
        "runs 4 of its 6 blocks, on 13 of 50 tokens (at 95 % on 3)",
        data="fashion-mnist:train=500,val=2500",
        teacher_data="fashion-mnist:train=500,val=2500",
        student=f"{VIT},embed_dim=32,depth=4,num_heads=2",
        teacher="@mae",
        recipe={"epochs": 40, "batch": 64, "lr": 1e-3, "warmup_epochs": 4, "eval_every": 40, **QUIET},
        teacher_recipe={"epochs": 20, "eval_every": 20},
        prepared=(
            Arm("mae", "mae", TEACHER),
            Arm("untrained", "mae", TEACHER | ALMOST_NOTHING),
        ),
        arms=(
            after("MAE", "mae", norm_pixels=False),
            after("no pre-training", "mae", **ALMOST_NOTHING),
            after("DMAE", "dmae", teacher="@mae"),
            after("DMAE 95 % hidden", "dmae", teacher="@mae", masked=0.95),
            after("teacher untrained", "dmae", teacher="@untrained"),
        ),
    ),
)
