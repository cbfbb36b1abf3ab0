"""Evidence for ACAM-KD: the paper's comparison and ablations for a detector and a segmenter, small enough for two cores.

stillhouse reproduce acam_kd, after pip install --no-deps deepforest histolytics
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stillhouse.evidence.experiment import Arm, Experiment, Search

CLAIM = (
    "The paper (arXiv 2503.06307). COCO, RetinaNet-R50 from R101: baseline 37.4 mAP, MasKD 39.8, FGD 39.6, ACAM-KD 41.2; its ablations "
    "there: places only 40.9, channels only 40.4, query from the student 41.0, fixed mask 39.8, masks from the teacher alone 39.9. Plain "
    'feature regression is not reported (the row called "no mask" equals the baseline). Cityscapes, DeepLabV3-MobileNetV2 from R101: '
    "baseline 73.12 mIoU, MasKD 75.26, ACAM-KD 76.21. So: ACAM-KD above masks from the teacher alone, those above a fixed mask."
)
SHOWED = (
    "on small scenes it beats labels alone and plain feature MSE, the printed form does not; not shown: that choosing together is what "
    "helps, nor that it beats CWD"
)

PUBLISHED = {"mask_grad": "joint", "balanced": False, "normalise": False}
"""The paper's forms: masks descend the loss with the student, nothing is normalised."""
TITLES = {"fitnet": "plain MSE", "cwd": "CWD", "mgd": "MGD", "maskd": "MasKD", "fgd": "FGD"}


def arms(where: dict[str, Any], alpha: float, **weights: dict[str, float]) -> tuple[Arm, ...]:
    """What is compared: all with the same warm start, budget and search.

    Args:
        where: the place that is copied, as all but `fitnet` name it.
        alpha: the weight that ACAM-KD's search begins with.
        weights: those that the rivals' begin with.
    """

    def acam(name: str, **settings: Any) -> Arm:
        return Arm(name, "acam_kd", {"alpha": alpha, **where, **settings}, ("alpha",))

    layers = {f"{who}_layer": place for who in ("student", "teacher") for place in where.values()}
    rivals = [Arm(TITLES[name], name, own | (layers if name == "fitnet" else where), tuple(own)) for name, own in weights.items()]
    return (
        Arm("labels only", "scratch"),
        *rivals,
        acam("ACAM-KD"),
        acam("as printed: a, joint", reading="a", **PUBLISHED),
        acam("b, joint", reading="b", **PUBLISHED),
        acam("b, masks from diversity alone", reading="b", mask_grad="detach", balanced=False),
        acam("fixed mask", masks="fixed"),
        acam("masks from the teacher alone", masks="teacher"),
        acam("query from the student", masks="student_query"),
        acam("places only", parts="spatial"),
        acam("channels only", parts="channel"),
        acam("lambda = 0", diversity=0.0),
    )


SEGMENTERS = arms(
    {"where": "decoder.blocks.2"}, alpha=0.3, fitnet={"beta": 0.3}, cwd={"alpha": 5.0}, mgd={"alpha": 3e-4}, maskd={"alpha": 10.0}
)
DETECTORS = arms(
    {},
    alpha=3.0,
    fitnet={"beta": 3.0},
    cwd={"alpha": 5.0},
    mgd={"alpha": 2e-2},
    maskd={"alpha": 10.0},
    fgd={"alpha": 1e-2, "beta": 5e-3, "gamma": 0.5, "relation": 5e-3},
)
"""MGD, FGD's attention and its relation sum over a map: their official weights, made for maps thousands of times larger, are scaled."""
SEARCH = Search(rates=(2e-3, 6e-3), scales=(10.0,), share=0.375)
DRAWN = ("ACAM-KD", "as printed: a, joint", "b, joint", "b, masks from diversity alone")
SCENES = "scenes:size=48,classes=3,clutter=0,noise=0"
UNET_S = "smp/unet:encoder=timm/test_efficientnet,encoder_depth=4,decoder_channels=(32,24,16,12)"
UNET_T = "smp/unet:encoder=timm/test_resnet,encoder_depth=4,decoder_channels=(64,48,32,24)"
FCOS = "torchvision/fcos:channels=64,levels=2,stride=8,convs=2"
TREES = "deepforest:tile=200,size=96"
FCOS_TREES = "torchvision/fcos:channels=64,levels=2,stride=4,convs=2,score_thresh=0.05"
SHARED: dict[str, Any] = {"batch": 8, "save_every": 5000, "trackers": "none"}

SEGMENT_SCENES = Experiment(
    name="segment_scenes",
    title="Three kinds of handwritten digits, up to nine of them on a photograph, 48 x 48; 200 training scenes for the student, "
    "3,000 for the teacher; what is copied is the decoder's last map but one, at half the image's size",
    task="segment",
    data=f"{SCENES},objects=9,train=200",
    teacher_data=f"{SCENES},objects=9,train=3000",
    student=UNET_S,
    teacher=UNET_T,
    recipe={"epochs": 10, "warmup_epochs": 1, "hflip": 0.0, "eval_every": 10, **SHARED, "batch": 4},
    teacher_recipe={"epochs": 5, "batch": 16, "lr": 5e-3, "warmup_epochs": 0.5, "eval_every": 5},
    arms=SEGMENTERS,
    search=replace(SEARCH, share=0.4),
    drawn=DRAWN,
)

DETECT_SCENES = Experiment(
    name="detect_scenes",
    title="Three kinds of handwritten digits on photographs, 48 x 48; 300 training scenes for the student, 3,000 for the teacher; "
    "all students begin with the teacher's neck and head",
    task="detect",
    data=f"{SCENES},train=300",
    teacher_data=f"{SCENES},train=3000",
    student=f"{FCOS},backbone=timm/test_resnet",
    teacher=f"{FCOS},backbone=timm/resnet10t",
    recipe={"epochs": 8, "warmup_epochs": 1, "hflip": 0.0, "eval_every": 8, **SHARED},
    teacher_recipe={"epochs": 5, "lr": 2e-3, "warmup_epochs": 0.5, "eval_every": 5},
    arms=DETECTORS,
    inherit=True,
    search=SEARCH,
    drawn=DRAWN,
)

EXPERIMENTS = (
    SEGMENT_SCENES,
    DETECT_SCENES,
    Experiment(
        name="segment_nuclei",
        title="Nuclei of three kinds on one stained section (histolytics), 96 px tiles at 48 x 48; 40 training tiles for the student, "
        "all that overlap for the teacher; what is copied is the decoder's last map but one, at half the image's size",
        task="segment",
        data="histolytics:size=48,train=40",
        teacher_data="histolytics:size=48,stride=48",
        student=UNET_S,
        teacher=UNET_T,
        recipe={"epochs": 24, "warmup_epochs": 2, "eval_every": 24, **SHARED, "batch": 4},
        teacher_recipe={"epochs": 30, "batch": 16, "lr": 5e-3, "warmup_epochs": 2, "eval_every": 30},
        arms=SEGMENTERS,
        searched=SEGMENT_SCENES,
        drawn=DRAWN,
    ),
    Experiment(
        name="detect_trees",
        title="Trees seen from the air (deepforest), 200 px tiles at 96 x 96; 40 training tiles for the student, all that overlap for the "
        "teacher, validation on other photographs; all students begin with the teacher's neck and head",
        task="detect",
        data=f"{TREES},train=40",
        teacher_data=f"{TREES},stride=50",
        student=f"{FCOS_TREES},backbone=timm/test_resnet",
        teacher=f"{FCOS_TREES},backbone=timm/test_nfnet",
        recipe={"epochs": 4, "warmup_epochs": 1, "eval_every": 4, **SHARED, "batch": 4},
        teacher_recipe={"epochs": 2, "batch": 6, "lr": 3e-3, "warmup_epochs": 0.2, "eval_every": 1},
        arms=DETECTORS,
        inherit=True,
        searched=DETECT_SCENES,
        drawn=DRAWN,
    ),
)
