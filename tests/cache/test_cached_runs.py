"""A run that reads what its teacher said is the run that asks it again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.cache.answers import Answers
from stillhouse.cache.storage import pack, pack_top, unpack
from stillhouse.cache.teacher import CachedTeacher
from stillhouse.distillers.base import Distiller
from stillhouse.distillers.classics.kd import KD
from stillhouse.errors import UserError
from stillhouse.models.weights import weights_hash
from stillhouse.training.checkpoint import checkpoints
from stillhouse.training.loop import Loop
from tests.runs import STUDENT, TEACHER, assert_equal, distiller, loop, network, weights

PER_EPOCH = 4
MIXED = {"mixup": 0.8, "cutmix": 1.0, "accumulate": 2}


def cached(learner: Distiller, folder: Path, answers: Path, storage: Any = "fp32", top_k: int | None = None, **recipe: Any) -> Loop:
    """A loop with two views of each image and the teacher's answers in a folder; with `resume=True` where it was stopped."""
    resume = recipe.pop("resume", False)
    made = loop(learner, folder, **{"views": 2, "epochs": 4, **recipe})
    made.cache = CachedTeacher(learner.teacher, storage, top_k)
    made.cache.answers = Answers(answers, {"teacher": weights_hash(learner.teacher), "storage": storage})
    if resume:
        made.load()
    return made


def plain(learner: Distiller, folder: Path, **recipe: Any) -> Loop:
    return loop(learner, folder, **{"views": 2, "epochs": 4, **recipe})


def rows(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("train.csv", "val.csv")]


def counted(teacher: nn.Module) -> list[int]:
    """How many images the network itself was run on, call by call."""
    calls: list[int] = []
    layer: Any = teacher.patch_embed
    layer.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    return calls


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "kd": ("kd", {"temperature": 2.0}, {}),
    "kd, mixed": ("kd", {}, MIXED),
    "kd, bf16": ("kd", {}, {"precision": "bf16", **MIXED}),
    "hard_kd": ("hard_kd", {}, {}),
    "dkd": ("dkd", {}, {}),
    "fitnet, mixed": ("fitnet", {}, MIXED),
    "attention_transfer": ("attention_transfer", {}, {}),
    "masked_kd of random patches": ("masked_kd", {"by": "random", "hint": 1.0}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_exact_answers_change_nothing(case: str, tmp_path: Path) -> None:
    """Weights, terms and metrics, bit for bit; the teacher runs once a view, and once for validation."""
    name, settings, recipe = CASES[case]
    asking, reading = distiller(name, **settings), distiller(name, **settings)
    plain(asking, tmp_path / "asking", **recipe).run()
    run = cached(reading, tmp_path / "reading", tmp_path / "answers", **recipe)
    run.run()
    assert_equal(weights(reading), weights(asking))
    assert rows(tmp_path / "reading") == rows(tmp_path / "asking")
    facts = run.cached()
    assert facts is not None
    assert (facts["steps"], facts["steps_without_teacher"]) == (4 * PER_EPOCH, 2 * PER_EPOCH)
    validation = len(run.data.val)  # type: ignore[arg-type]
    assert (facts["images_asked"], facts["images_read"]) == (2 * 64 + validation, 2 * 64 + 3 * validation)
    assert all(each["max"] == 0 for each in facts["errors"].values())


@pytest.mark.parametrize(("storage", "top_k"), [("fp16", None), ("bf16", None), ("int8", None), ("int16", 3)])
def test_what_is_learned_from_is_what_is_kept(storage: Any, top_k: int | None, tmp_path: Path) -> None:
    """Also in the epochs in which it is being kept: as by a teacher that says what is kept."""

    class Rounding(nn.Module):
        def __init__(self, teacher: nn.Module) -> None:
            super().__init__()
            self.teacher = teacher

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.teacher(images)
            kept = pack_top(logits, top_k, storage) if top_k else pack(logits, storage)
            return unpack(kept, tuple(logits.shape[1:]), logits.dtype)

    rounding, reading = KD(network(), Rounding(network(TEACHER, 1))), distiller("kd")
    plain(rounding, tmp_path / "rounding", **MIXED).run()
    run = cached(reading, tmp_path / "reading", tmp_path / "answers", storage, top_k, **MIXED)
    run.run()
    assert_equal(weights(reading), weights(rounding))
    facts = run.cached()
    assert facts is not None
    assert 0 < facts["errors"]["output"]["mean"] < facts["errors"]["output"]["max"] < 0.1
    assert 0 < facts["errors"]["probability moved"]["mean"] < facts["errors"]["probability moved"]["max"] < (0.01 if not top_k else 1)


def test_another_student_never_runs_the_teacher(tmp_path: Path) -> None:
    cached(distiller("kd"), tmp_path / "one", tmp_path / "answers").run()
    second = KD(network(f"{STUDENT},proj_drop_rate=0.3", 7), network(TEACHER, 1), temperature=4.0)
    calls = counted(second.teacher)
    run = cached(second, tmp_path / "two", tmp_path / "answers")
    run.run()
    assert not calls
    facts = run.cached()
    assert facts is not None
    assert (facts["images_asked"], facts["steps_without_teacher"]) == (0, 4 * PER_EPOCH)
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "answers").rglob("*") if path.suffix == ".safetensors")


def stopped_and_resumed(tmp_path: Path, die: Callable[[Loop], None], **recipe: Any) -> None:
    whole, resumed = distiller("kd"), distiller("kd")
    cached(whole, tmp_path / "whole", tmp_path / "its own", "int8", **recipe).run()
    die(cached(distiller("kd"), tmp_path / "stopped", tmp_path / "answers", "int8", **recipe))
    again = cached(resumed, tmp_path / "stopped", tmp_path / "answers", "int8", resume=True, **recipe)
    assert 0 < again.step < 4 * PER_EPOCH
    again.run()
    assert_equal(weights(resumed), weights(whole))
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")


@pytest.mark.parametrize("step", [6, 13])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later warn of forks beside threads
def test_killed_while_keeping_it_goes_on_exactly(step: int, tmp_path: Path) -> None:
    """What was not written is asked again; what was written behind the last checkpoint is read."""

    def killed(run: Loop) -> None:
        child = os.fork()
        if not child:
            update = run.update

            def dying(at: int, *batch: Any) -> None:
                if at == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                update(at, *batch)

            run.update = dying  # type: ignore[method-assign]
            run.run()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert checkpoints(run.folder / "checkpoints")

    stopped_and_resumed(tmp_path, killed, save_every=5)


def test_a_damaged_shard_is_told_and_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = distiller("kd"), distiller("kd")
    cached(first, tmp_path / "one", tmp_path / "answers").run()
    shard = next((tmp_path / "answers" / "view-1").iterdir())
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    half = next((tmp_path / "answers" / "val").iterdir())
    half.write_bytes(half.read_bytes()[:100])
    run = cached(second, tmp_path / "two", tmp_path / "answers")
    run.run()
    assert_equal(weights(second), weights(first))
    assert sorted(record.args[0] for record in caplog.records if "damaged" in record.message) == [half, shard]
    facts = run.cached()
    assert facts is not None
    assert facts["steps_without_teacher"] == 3 * PER_EPOCH
    assert {path.stem for path in (tmp_path / "answers" / "view-1").iterdir()} == {shard.stem}  # the very same content


def test_an_answer_is_not_given_to_another_question(tmp_path: Path) -> None:
    """Data that change behind their fingerprint are noticed before anything learnt from them is kept."""
    cached(distiller("kd"), tmp_path / "one", tmp_path / "answers").run()
    run = cached(distiller("kd"), tmp_path / "two", tmp_path / "answers")
    update = run.update
    run.update = lambda step, ids, images, targets: update(step, ids, images.flip(-1), targets)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="asked about other images than the answers in its cache are about"):
        run.run()
    assert not checkpoints(tmp_path / "two" / "checkpoints")


def test_more_views_are_added(tmp_path: Path) -> None:
    cached(distiller("kd"), tmp_path / "one", tmp_path / "answers").run()
    run = cached(distiller("kd"), tmp_path / "two", tmp_path / "answers", views=3, epochs=3)
    run.run()
    facts = run.cached()
    assert facts is not None
    assert facts["steps_without_teacher"] == 2 * PER_EPOCH
    assert sorted(path.name for path in (tmp_path / "answers").iterdir()) == ["manifest.json", "val", "view-0", "view-1", "view-2"]


def test_shards_are_written_as_they_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.cache.answers.SHARD", 1)
    whole, parts = distiller("kd"), distiller("kd")
    plain(whole, tmp_path / "whole").run()
    cached(parts, tmp_path / "parts", tmp_path / "answers").run()
    assert_equal(weights(parts), weights(whole))
    assert len(list((tmp_path / "answers" / "view-0").iterdir())) == PER_EPOCH


def test_a_compiled_teacher_answers_alike(tmp_path: Path) -> None:
    whole, compiled = distiller("fitnet"), distiller("fitnet")
    plain(whole, tmp_path / "whole").run()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled.teacher.compile(backend=backend)
    run = cached(compiled, tmp_path / "compiled", tmp_path / "answers")
    run.run()
    assert_equal(weights(compiled), weights(whole))
    facts = run.cached()
    assert facts is not None
    assert facts["steps_without_teacher"] == 2 * PER_EPOCH
    assert 0 < len(graphs) < 20  # not one a step


def test_numbers_too_large_are_refused(tmp_path: Path) -> None:
    learner = distiller("kd")
    with torch.no_grad():
        learner.teacher.head.bias += 1e5
    with pytest.raises(UserError, match="too large for how they are kept; use --cache-storage bf16 or fp32"):
        cached(learner, tmp_path / "run", tmp_path / "answers", "fp16").run()
