"""Whatever annotations hold: an error in one sentence, or boxes, masks and classes that are sound, with all that is left out named."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from stillhouse.data import IGNORED, Data, open_data
from stillhouse.errors import UserError
from tests.counts import tried
from tests.data.corpus import encoded, flat
from tests.fuzz.spoil import ODD

PICTURE = encoded(flat("RGB", (9, 9, 9)), "PNG")
SIDE = 12
few = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
odd = st.sampled_from(ODD)
ids = st.integers(0, 3) | odd
numbers = st.floats() | st.floats(-5, 20) | st.integers() | st.integers(-2, 14)
files = st.sampled_from([f"{i}.png" for i in range(4)])
IMAGE = st.fixed_dictionaries({"id": ids, "file_name": files | odd}, optional={"width": st.just(SIDE) | odd, "height": st.just(SIDE) | odd})
ANNOTATION = st.fixed_dictionaries(
    {"image_id": ids, "category_id": st.integers(1, 2) | odd, "bbox": st.lists(numbers, min_size=4, max_size=4) | odd},
    optional={"id": ids, "iscrowd": st.integers(0, 1) | odd},
)
CATEGORY = st.fixed_dictionaries({"id": st.integers(1, 2) | odd, "name": st.sampled_from(["cat", "dog"]) | odd})
KNOWN = st.just([{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}])


def sound(data: Data) -> list[dict[str, Any]]:
    """The boxes of all images, each looked at."""
    found = []
    for part in (data.train, data.val):
        for i in range(len(part)):  # type: ignore[arg-type]
            image, target = part[i]
            boxes = target["boxes"]
            assert boxes.isfinite().all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes >= 0).all()
            assert (boxes[:, ::2] <= image.width).all()
            assert (boxes[:, 1::2] <= image.height).all()
            assert not data.wrong(image, target)
            found.append(target)
    return found


def both(spec: str) -> tuple[Data | None, Data | None]:
    """The data where faults are refused and where they are skipped; None for a sentence."""
    found: list[Data | UserError] = []
    for bad_data in ("refuse", "skip"):
        try:
            found.append(open_data(spec, bad_data=bad_data))  # type: ignore[arg-type]
        except UserError as error:
            found.append(error)
    for said in (str(each) for each in found if isinstance(each, UserError)):
        assert "\n" not in said
        said.encode()
    refused, skipped = (None if isinstance(each, UserError) else each for each in found)
    assert refused is None or not refused.skipped
    return refused, skipped


@few
@given(
    st.lists(IMAGE | odd, max_size=4) | odd,
    st.lists(ANNOTATION | odd, max_size=5) | odd,
    KNOWN | st.lists(CATEGORY | odd, max_size=3) | odd,
)
def test_coco(images: Any, annotations: Any, categories: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for i in range(4):
            Path(folder, f"{i}.png").write_bytes(PICTURE)
        Path(folder, "all.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        refused, skipped = both(f"coco:{folder}")
        if refused is not None:
            kept = sound(refused)
            assert len(kept) == len(images)
            assert sum(len(each["labels"]) for each in kept) == len(annotations)
        if skipped is not None:
            kept = sound(skipped)
            assert len(kept) <= len(images)
            assert len(kept) == len(images) or skipped.skipped
            assert sum(len(each["labels"]) for each in kept) == len(annotations) or skipped.skipped
    tried("odd annotations")


TEXT = st.text(max_size=8) | st.sampled_from(["cat", "dog", "1", "4.5", "-3", "nan", "inf", "1e400", "", " ", "12", "../0.png", "0.png"])
OBJECT = st.fixed_dictionaries({side: TEXT | st.integers(-2, 15).map(str) for side in ("xmin", "ymin", "xmax", "ymax")} | {"name": TEXT})


@few
@given(st.lists(st.tuples(TEXT, TEXT, TEXT, st.lists(OBJECT, max_size=3)), min_size=2, max_size=3))
def test_voc(pictures: list[tuple[str, str, str, list[dict[str, str]]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, width, height, objects) in enumerate(pictures):
            Path(folder, f"{i}.png").write_bytes(PICTURE)
            sides = "".join(f"<{side}>{escape(text)}</{side}>" for side, text in (("width", width), ("height", height)))
            boxes = "".join(
                f"<object><name>{escape(each.pop('name'))}</name><bndbox>"
                + "".join(f"<{side}>{escape(text)}</{side}>" for side, text in each.items())
                + "</bndbox></object>"
                for each in objects
            )
            text = f"<annotation><filename>{escape(name)}</filename><size>{sides}</size>{boxes}</annotation>"
            Path(folder, f"{i}.xml").write_text(text, "utf-8", "surrogatepass")
        refused, skipped = both(f"voc:{folder}")
        for data in (refused, skipped):
            if data is not None:
                kept = sum(len(each["labels"]) for each in sound(data))
                assert kept == sum(len(objects) for *_, objects in pictures) or data.skipped
    tried("odd annotations", len(pictures))


MASK = arrays(
    np.uint8, st.tuples(st.integers(1, 13), st.integers(1, 13)) | st.just((SIDE, SIDE)), elements=st.sampled_from([0, 1, 2, 3, 254, 255])
)


@few
@given(
    st.lists(MASK | st.just(np.eye(SIDE, dtype=np.uint8)), min_size=3, max_size=4),
    st.sampled_from(["", ":classes=3", ":values=[0,255]", ":ignore=1"]),
)
def test_masks(masks: list[np.ndarray[Any, Any]], options: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("images", "masks"):
            Path(folder, name).mkdir()
        for i, mask in enumerate(masks):
            Path(folder, f"images/{i}.png").write_bytes(PICTURE)
            Image.fromarray(mask).save(Path(folder, f"masks/{i}.png"))
        for data in both(f"masks:{folder}{options}"):
            samples = [] if data is None else [part[i] for part in (data.train, data.val) for i in range(len(part))]  # type: ignore[arg-type]
            for image, mask in samples:
                assert tuple(mask.shape) == (image.height, image.width) == (SIDE, SIDE)
                assert data is not None
                assert ((mask < len(data.classes)) | (mask == IGNORED)).all()
                assert not data.wrong(image, mask)
            if data is not None and len(samples) < len(masks):
                assert len(data.skipped) == len(masks) - len(samples)
    tried("odd annotations", len(masks))
