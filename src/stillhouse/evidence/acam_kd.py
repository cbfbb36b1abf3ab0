"""Evidence for ACAM-KD: the paper's comparison and ablations for a detector and a segmenter, small enough for two cores.

stillhouse reproduce acam_kd
"""

from __future__ import annotations

from typing import Any

from stillhouse.evidence.experiment import Arm, Experiment, Search

CLAIM = (
    "The paper (arXiv 2503.06307). COCO, RetinaNet-R50 from R101: baseline 37.4 mAP, MasKD 39.8, FGD 39.6, ACAM-KD 41.2; its ablations "
    "there: places only 40.9, channels only 40.4, query from the student 41.0, fixed mask 39.8, masks from the teacher alone 39.9. Plain "
    "feature regression is not reported (the row called \"no mask\" equals the baseline). Cityscapes, DeepLabV3-MobileNetV2 from R101: "
    "baseline 73.12 mIoU, MasKD 75.26, ACAM-KD 76.21. So: ACAM-KD above masks from the teacher alone, those above a fixed mask."
)


def arms(**weights: dict[str, float]) -> tuple[Arm, ...]:
    """What is compared: all with the same warm start, budget and search. `weights`: of the methods whose official ones suit other sizes."""

    def acam(name: str, **settings: Any) -> Arm:
        return Arm(name, "acam_kd", settings, ("alpha",))

    rivals = [Arm(TITLES[method], method, own, tuple(own)) for method, own in weights.items()]
    return (
        Arm("labels only", "scratch"),
        *rivals,
        acam("ACAM-KD"),
        acam("as printed: a, joint, raw maps", reading="a", mask_grad="joint", normalise=False),
        acam("reading b, joint", reading="b", mask_grad="joint"),
        acam("reading c, joint", reading="c", mask_grad="joint"),
        acam("fixed mask", masks="fixed"),
        acam("masks from the teacher alone", masks="teacher"),
        acam("query from the student", masks="student_query"),
        acam("places only", parts="spatial"),
        acam("channels only", parts="channel"),
        acam("lambda = 0", diversity=0.0),
    )


TITLES = {"fitnet": "plain MSE", "cwd": "CWD", "mgd": "MGD", "maskd": "MasKD", "fgd": "FGD"}
SEGMENTERS = arms(fitnet={"beta": 1.0}, cwd={"alpha": 3.0}, mgd={"alpha": 0.01}, maskd={"alpha": 0.5})
"""MGD sums over a map: its weight is the official one times how many more elements an official map has."""
DETECTORS = arms(
    fitnet={"beta": 1.0},
    cwd={"alpha": 5.0},
    mgd={"alpha": 0.02},
    maskd={"alpha": 10.0},
    fgd={"alpha": 6.4e-3, "beta": 3.2e-3, "gamma": 0.4, "relation": 4e-3},
)
SEARCH = Search(rates=(2e-3, 6e-3), scales=(0.1, 10.0), share=0.25)
SCENES = "scenes:size=64,classes=5"
DEEPLAB = "torchvision/deeplabv3:channels=64,stride=8"
FCOS = "torchvision/fcos:channels=64,levels=2,stride=8,convs=2"

EXPERIMENTS = (
    Experiment(
        name="segment_scenes",
        title="Five kinds of handwritten digits on photographs, 64 x 64; 200 training scenes for the student, 3,000 for the teacher",
        task="segment",
        data=f"{SCENES},train=200",
        teacher_data=f"{SCENES},train=3000",
        student=f"{DEEPLAB},backbone=timm/test_efficientnet",
        teacher=f"{DEEPLAB},backbone=timm/test_resnet",
        recipe={"epochs": 25, "batch": 16, "warmup_epochs": 2, "hflip": 0.0, "eval_every": 25, "save_every": 1000, "trackers": "none"},
        teacher_recipe={"epochs": 8, "lr": 4e-3, "warmup_epochs": 1, "eval_every": 8},
        arms=SEGMENTERS,
        inherit=True,
        search=SEARCH,
    ),
    Experiment(
        name="detect_scenes",
        title="Five kinds of handwritten digits on photographs, 64 x 64; 400 training scenes for the student, 3,000 for the teacher",
        task="detect",
        data=f"{SCENES},train=400",
        teacher_data=f"{SCENES},train=3000",
        student=f"{FCOS},backbone=timm/lcnet_035",
        teacher=f"{FCOS},backbone=timm/resnet10t",
        recipe={"epochs": 15, "batch": 8, "warmup_epochs": 1, "hflip": 0.0, "eval_every": 15, "save_every": 1000, "trackers": "none"},
        teacher_recipe={"epochs": 5, "lr": 2e-3, "warmup_epochs": 1, "eval_every": 5},
        arms=DETECTORS,
        inherit=True,
        search=SEARCH,
    ),
    Experiment(
        name="segment_nuclei",
        title="Nuclei of three kinds on one stained section (histolytics), 96 px tiles at 64 x 64; 40 training tiles for the student, "
        "all that overlap for the teacher",
        task="segment",
        data="histolytics:size=64,train=40",
        teacher_data="histolytics:size=64,stride=48",
        student=f"{DEEPLAB},backbone=timm/test_efficientnet",
        teacher=f"{DEEPLAB},backbone=timm/test_resnet",
        recipe={"epochs": 100, "batch": 16, "warmup_epochs": 8, "eval_every": 100, "save_every": 1000, "trackers": "none"},
        teacher_recipe={"epochs": 40, "lr": 4e-3, "warmup_epochs": 4, "eval_every": 40},
        arms=SEGMENTERS,
        inherit=True,
        search=SEARCH,
    ),
    Experiment(
        name="detect_trees",
        title="Trees on aerial photographs (deepforest), 200 px tiles at 96 x 96; 40 training tiles of one place for the student, "
        "all that overlap for the teacher; judged on two other places",
        task="detect",
        data="deepforest:size=96,train=40",
        teacher_data="deepforest:size=96,stride=50",
        student=f"{FCOS},backbone=timm/lcnet_035",
        teacher=f"{FCOS},backbone=timm/resnet10t",
        recipe={"epochs": 60, "batch": 8, "warmup_epochs": 5, "eval_every": 60, "save_every": 1000, "trackers": "none"},
        teacher_recipe={"epochs": 12, "lr": 2e-3, "warmup_epochs": 1, "eval_every": 12},
        arms=DETECTORS,
        inherit=True,
        search=SEARCH,
    ),
)
