"""Which teachers' answers can be kept, and whose they are."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillhouse.cache.answers import Answers
from stillhouse.cache.teacher import APART, CachedTeacher, prints
from stillhouse.caching import try_out
from stillhouse.distillers.base import Clock, Distiller
from stillhouse.distillers.classics.kd import KD
from stillhouse.errors import UserError
from stillhouse.fitting import input_of, transforms_of
from tests.parts import make
from tests.runs import STUDENT, TEACHER, data_for, distil, distiller, network, weights

CACHE = {"teacher_cache": "auto", "views": 1, "max_steps": 2}


def tried(learner: Distiller) -> tuple[dict[str, Any], int]:
    data = data_for(learner)
    transform = transforms_of(input_of(learner.student, data), data, {})[1]
    return try_out(CachedTeacher(learner.teacher, "fp16"), learner, data, transform)


class Noisy(KD):
    """Shows its teacher something else by chance."""

    def teach(self, images: Tensor, *args: Any) -> Any:
        return super().teach(images + torch.rand_like(images))


class Moving(KD):
    """Its teacher moves."""

    def after_update(self, clock: Clock) -> None:
        with torch.no_grad():
            self.teacher.head.bias += 1


class Looking(KD):
    """Looks into its teacher where nobody is told of it."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(student, teacher)
        self.seen: list[Tensor] = []
        teacher.blocks[0].register_forward_hook(lambda module, inputs, output: self.seen.append(output.mean()))

    def forward(self, batch: Any, turn: str = "student") -> dict[str, Tensor]:
        terms = super().forward(batch, turn)
        return {**terms, "seen": self.seen.pop()}


@pytest.mark.parametrize("name", ["kd", "hard_kd", "dkd", "fitnet", "attention_transfer"])
def test_teachers_that_say_the_same_can_be_kept(name: str) -> None:
    learner = distiller(name)
    before = weights(learner)
    about, size = tried(learner)
    assert about["inputs"] == [[1, 8, 8]]
    assert about["answers"]["output"] == ["torch.float32", [10]]
    layer = 24 * 5 * 2 if name in ("fitnet", "attention_transfer") else 0  # fp16: 4 patches and the class token
    assert size == 10 * 2 + layer + 4 + 4  # a print and an id
    assert all(torch.equal(value, before[key]) for key, value in learner.state_dict().items())


@pytest.mark.parametrize(
    ("make_one", "why"),
    [
        (lambda: distiller("masked_kd"), "what it is asked changes with the student"),
        (lambda: distiller("masked_kd", by="teacher"), "it is asked 2 times a step"),
        (lambda: distiller("masked_kd", by="random", keep="0:1.0,0.5:0.5"), "the progress of the training"),
        (lambda: make("fgd"), "it is not asked about a batch of images of one size"),
        (lambda: make("dmae"), "it is never run as a whole"),
        (lambda: Noisy(network(), network(TEACHER, 1)), "or by chance"),
        (lambda: Moving(network(), network(TEACHER, 1)), "it changes"),
        (lambda: Looking(network(), network(TEACHER, 1)), "more of it is looked at"),
    ],
    ids=["masked", "asked twice", "schedule", "detector", "encoder", "noise", "moving", "looking"],
)
def test_others_are_refused_with_the_reason(make_one: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        tried(make_one())


def test_a_second_run_finds_the_answers_and_others_are_refused(tmp_path: Path) -> None:
    """Naming what differs, and leaving everything as it was."""
    first = distil(tmp_path / "one", "kd", **CACHE)
    found = first.facts["teacher_cache"]
    folder = Path(found["folder"])
    assert folder.parent == tmp_path
    assert found["images_asked"] > 0
    second = distil(tmp_path / "two", "kd", **CACHE, student=STUDENT.replace("depth=1", "depth=2"), alpha=0.9, baseline=True)
    again = second.facts["teacher_cache"]
    assert (again["folder"], again["images_asked"], again["steps_without_teacher"]) == (found["folder"], 0, again["steps"])
    named = {**CACHE, "teacher_cache": str(folder)}
    manifest = (folder / "manifest.json").read_bytes()
    wrong: dict[str, dict[str, Any]] = {
        r"another data \(": {"data": "digits:train=80"},
        r"another augmentation \(\{\}, now \{'hflip': 0.5\}\)": {"hflip": 0.5},
        r"another storage \(fp16, now int8\)": {"cache_storage": "int8"},
        r"another top k \(None, now 3\)": {"cache_top_k": 3},
        r"another mixing \(None, now \{'mixup': 0.8, 'cutmix': 0.0, 'batch': 16\}\)": {"mixup": 0.8},
        r"seed \(0, now 1\)": {"seed": 1},
        r"another precision \(fp32, now bf16\)": {"precision": "bf16"},
        r"another teacher \(": {"teacher": network("timm/vit_tiny_patch16_224:img_size=8,patch_size=4,embed_dim=24,depth=1", 5)},
    }
    for why, given_too in wrong.items():
        with pytest.raises(UserError, match=why):
            distil(tmp_path / "wrong", "kd", **{**named, "allow_weak_teacher": True, **given_too})
        assert not (tmp_path / "wrong").exists()
    assert (folder / "manifest.json").read_bytes() == manifest


def test_what_cannot_work_is_said_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    refused: dict[str, tuple[str, dict[str, Any]]] = {
        "say how many with views": ("kd", {"teacher_cache": "auto"}),
        "the method has no teacher": ("scratch", {**CACHE, "teacher": None}),
        "holds something else": ("kd", {**CACHE, "teacher_cache": str(tmp_path / "photos")}),
        "top_k is 10, expected 1 to 9": ("kd", {**CACHE, "cache_top_k": 10}),
        "cache_storage is int4": ("kd", {**CACHE, "cache_storage": "int4"}),
    }
    for why, (method, given_too) in refused.items():
        with pytest.raises(UserError, match=why):
            distil(tmp_path / "run", method, **given_too)
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"GB are free: ask for fewer --views"):
        distil(tmp_path / "run", "kd", **CACHE)


def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        distil(tmp_path / "run", "kd", **{**CACHE, "teacher_cache": str(tmp_path / "answers")})


def test_a_manifest_that_was_never_finished_is_no_manifest(tmp_path: Path) -> None:
    """As a process leaves it that is killed while it writes the first file of all, and as one finds it while another is at it."""
    (tmp_path / ".manifest.json.0123").write_text('{"data"')
    answers = Answers(tmp_path, {"data": "digits"})
    answers.write_manifest()
    assert Answers(tmp_path, {"data": "digits"}).facts == {"data": "digits"}
    with pytest.raises(UserError, match=r"another data \(digits, now others\)"):
        Answers(tmp_path, {"data": "others"})


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"manifest\.json cannot be written \(.*No space left on device\)"):
        Answers(tmp_path, {"data": "digits"}).write_manifest()
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_prints_tell_images_apart(seed: int) -> None:
    """Flipped, moved by a pixel, a corner erased, normalised otherwise, in another order; rounding is no other image."""
    random = torch.Generator().manual_seed(seed)
    small = torch.rand(16, 3, 12, 12, generator=random)
    images = torch.nn.functional.interpolate(small, size=96, mode="bilinear")  # as smooth as photographs are
    erased = images.clone()
    erased[:, :, :16, :16] = torch.rand(16, 3, 16, 16, generator=random)
    own = prints([images])
    others = {
        "flip": images.flip(-1),
        "move": images.roll(1, -1),
        "erase": erased,
        "normalise": images * 1.1 - 0.1,
        "order": images.roll(1, 0),
    }
    for name, other in others.items():
        assert (prints([other]) - own).abs().max() > APART, name
    assert (prints([images * (1 + 1e-6 * torch.randn(images.shape, generator=random))]) - own).abs().max() < APART / 100
    assert torch.equal(prints([images[3:5]]), own[3:5])
