"""What holds for every way to distil. Finds them all by itself: a new method's file is enough to be held to it."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn

from stillhouse import distillers, tasks
from stillhouse.distillers.base import Clock, Distiller
from stillhouse.distillers.classics.scratch import Scratch
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from tests.conftest import CLASSES
from tests.parts import NO_MEAN, batch, data_for, gradients, kind_of, make, networks_for, terms_of

METHODS = sorted(distillers.modules())
EVERY = pytest.mark.parametrize("name", METHODS)
TRAINED = pytest.mark.parametrize("name", [name for name in METHODS if name != "mirage"])
TAUGHT = pytest.mark.parametrize("name", [name for name in METHODS if "teacher" in distillers.networks(name)])
FROM_LABELS = ("classify", "detect", "segment", "regress")


def frozen_state(distiller: Distiller) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name in distiller.frozen
        if getattr(distiller, name) is not None
        for key, value in getattr(distiller, name).state_dict().items()
    }


def test_all_are_found() -> None:
    assert {"scratch", "kd", "hard_kd", "fitnet", "attention_transfer", "masked_kd"} <= set(METHODS)


@TRAINED
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "soft labels"])
def test_every_term_is_a_finite_named_scalar(name: str, soft: bool) -> None:
    if soft and kind_of(name) != "classify":
        pytest.skip("only class labels can be soft")
    pictures, classes = data_for(name)
    targets = torch.randn(8, CLASSES).softmax(-1) if soft else classes
    terms = terms_of(make(name), (pictures, targets))
    assert terms
    for key, term in terms.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", key)
        assert term.shape == ()
        assert term.dtype == torch.float32
        assert term.isfinite()
    assert sum(terms.values()).requires_grad


@TRAINED
def test_off_is_plain_training_bit_for_bit(name: str) -> None:
    if kind_of(name) not in FROM_LABELS or not distillers.find(name).off:
        pytest.skip("it has no weight without which only the labels count")
    distiller, networks, data = make(name, **distillers.find(name).off), networks_for(name), data_for(name)
    alone = {role: Scratch(networks[role]).train() for role in distiller.products}
    ours = gradients(distiller, data)
    theirs = {
        key.replace("student.", f"{role}.", 1): gradient
        for role, plain in alone.items()
        for key, gradient in gradients(plain, data).items()
    }
    assert theirs
    for key, gradient in theirs.items():
        assert torch.equal(ours[key], gradient), key
    for key in ours.keys() - theirs.keys():
        assert not ours[key].any(), f"{key} learns although only the labels count"
    expected = sum(sum(terms_of(plain, data).values()).item() for plain in alone.values())
    assert sum(terms_of(distiller, data).values()).item() == pytest.approx(expected, abs=0 if len(alone) == 1 else 1e-6)


@TRAINED
def test_a_step_moves_the_product_and_leaves_the_frozen_untouched(name: str) -> None:
    distiller = make(name)
    before, product = copy.deepcopy(frozen_state(distiller)), copy.deepcopy(distiller.product.state_dict())
    for turn, together in groupby(distiller.turns(), key=lambda turn: turn.name):
        learning = [parameter for each in together for parameter in each.parameters]
        assert learning
        assert not {id(p) for p in learning} & {
            id(p) for key in distiller.frozen if getattr(distiller, key) for p in getattr(distiller, key).parameters()
        }
        optimizer = torch.optim.AdamW(learning, lr=0.1)
        sum(terms_of(distiller, data_for(name), turn=turn).values()).backward()
        optimizer.step()
        distiller.zero_grad()
    distiller.after_update(Clock(step=1, steps=10, epoch=0, epochs=1))
    assert any(not torch.equal(value, product[key]) for key, value in distiller.product.state_dict().items())
    after = frozen_state(distiller)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert value.numpy().tobytes() == after[key].numpy().tobytes(), key


@TRAINED
def test_gradients_are_finite_and_reach_only_who_learns(name: str) -> None:
    distiller = make(name)
    of_anyone: set[int] = set()
    for turn, together in groupby(distiller.turns(), key=lambda turn: turn.name):
        learning = {id(parameter) for each in together for parameter in each.parameters}
        found = gradients(distiller, data_for(name), turn)
        assert all(gradient.isfinite().all() for gradient in found.values())
        for key, parameter in distiller.named_parameters():
            assert (key in found) == (id(parameter) in learning), f"{key} in turn {turn}: DDP would wait for it, or it is not for it"
        of_anyone |= learning
    for key, parameter in distiller.named_parameters():
        frozen = key.split(".")[0] in distiller.frozen
        assert (id(parameter) in of_anyone) == parameter.requires_grad, key
        assert not (frozen and parameter.requires_grad), key


@TAUGHT
def test_the_teacher_is_in_eval_mode_whatever_train_says(name: str) -> None:
    distiller = make(name)
    for mode in (True, False, True):
        assert distiller.train(mode) is distiller
        assert distiller.student.training is (mode and "student" not in distiller.frozen)
        assert not any(module.training for module in distiller.teacher.modules())
    nn.Sequential(distiller).train()
    assert not distiller.teacher.training
    assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())


@TRAINED
def test_forward_is_deterministic(name: str) -> None:
    distiller = make(name)
    first, second = terms_of(distiller, data_for(name)), terms_of(distiller, data_for(name))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@TRAINED
def test_a_batch_is_the_mean_of_its_parts(name: str) -> None:
    """Accumulation and the number of processes change neither the loss nor its gradient."""
    if name in NO_MEAN:
        pytest.skip(NO_MEAN[name])
    distiller, (pictures, classes) = make(name), data_for(name)
    whole, gradient = terms_of(distiller, (pictures, classes)), gradients(distiller, (pictures, classes))
    distiller.zero_grad()
    parts = [terms_of(distiller, (pictures[i : i + 2], classes[i : i + 2]), first=i) for i in range(0, 8, 2)]
    for key, term in whole.items():
        torch.testing.assert_close(sum(part[key] for part in parts) / 4, term, rtol=1e-5, atol=1e-6)
    parts = [terms_of(distiller, (pictures[i : i + 2], classes[i : i + 2]), first=i) for i in range(0, 8, 2)]
    (sum(sum(part.values()) for part in parts) / 4).backward()
    for key, parameter in distiller.named_parameters():
        if key in gradient:
            torch.testing.assert_close(parameter.grad, gradient[key], rtol=1e-4, atol=1e-5)


@TRAINED
def test_runs_under_bf16_autocast(name: str) -> None:
    distiller = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        terms = terms_of(distiller, data_for(name))
    sum(terms.values()).backward()
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    assert all(p.grad.isfinite().all() for turn in distiller.turns() for p in turn.parameters if p.grad is not None)
    full = terms_of(make(name), data_for(name))
    for key, term in terms.items():
        torch.testing.assert_close(term, full[key], rtol=0.1, atol=0.05)


@TRAINED
def test_state_round_trips_without_the_frozen(name: str) -> None:
    distiller = make(name)
    distiller.after_update(Clock(step=3, steps=10, epoch=0, epochs=1))
    state = copy.deepcopy(distiller.state_dict())
    assert all(isinstance(value, Tensor) for value in state.values()), "checkpoints hold tensors, never pickles"
    assert not [key for key in state if key.split(".")[0] in distiller.frozen]
    other = make(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * parameter.requires_grad
    assert any(not torch.equal(value, state[key]) for key, value in other.state_dict().items())
    before = copy.deepcopy(frozen_state(other))
    other.load_state_dict(state)
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]), key
    for key, value in frozen_state(other).items():
        assert torch.equal(value, before[key])
    for key, term in terms_of(other, data_for(name)).items():
        assert torch.equal(term, terms_of(distiller, data_for(name))[key])


@TRAINED
def test_state_round_trips_when_wrapped(name: str) -> None:
    """As DDP and torch.compile wrap: every key has a prefix."""
    wrapped = nn.ModuleDict({"module": make(name)})
    state = wrapped.state_dict()
    assert not [key for key in state if key.split(".")[1] in wrapped["module"].frozen]
    wrapped.load_state_dict(state)


@TRAINED
def test_a_missing_or_unknown_key_is_still_an_error(name: str) -> None:
    distiller = make(name)
    state = distiller.state_dict()
    key = next(key for key, parameter in distiller.named_parameters() if parameter.requires_grad)
    with pytest.raises(RuntimeError, match="Missing key"):
        distiller.load_state_dict({other: value for other, value in state.items() if other != key})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        distiller.load_state_dict({**state, f"{key}.nobody": torch.zeros(1)})


@TRAINED
def test_a_copy_is_on_its_own(name: str) -> None:
    """An EMA of the student is a deepcopy, taken after steps were made."""
    distiller = make(name)
    terms = terms_of(distiller, data_for(name))
    copied = copy.deepcopy(distiller)
    assert all(torch.equal(terms_of(copied, data_for(name))[key], term) for key, term in terms.items())
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    assert all(torch.equal(terms_of(distiller, data_for(name))[key], term) for key, term in terms.items())


@TAUGHT
def test_the_teacher_sees_images_as_it_was_trained(name: str) -> None:
    if kind_of(name) == "detect":
        pytest.skip("torchvision's detectors normalise for themselves")
    if kind_of(name) == "generate":
        pytest.skip("generators with different normalisations are refused: tests/distillers/generative")
    networks = networks_for(name)
    for role, network in networks.items():
        teaches = role != "student" and role in distillers.find(name).frozen
        told = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.5), 32) if teaches else ((0.1, 0.2, 0.3), (0.5, 0.4, 0.3), 32)
        set_preprocessing(network, Preprocessing(*told))
    distiller, seen, seen_by_student = make(name, **networks), [], []
    entry = "backbone" if kind_of(name) == "segment" else "patch_embed"
    for role in set(distiller.frozen) & networks.keys() - {"student"}:
        if hasattr(networks[role], entry):
            networks[role].get_submodule(entry).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    networks["student"].get_submodule(entry).register_forward_pre_hook(lambda module, inputs: seen_by_student.append(inputs[0]))
    pictures, targets = batch(2, kind_of(name))
    terms_of(distiller, (pictures, targets))

    def column(*values: float) -> Tensor:
        return torch.tensor(values).view(-1, 1, 1)

    pixels = pictures * column(0.5, 0.4, 0.3) + column(0.1, 0.2, 0.3)
    expected = (pixels - column(0.4, 0.5, 0.6)) / column(0.2, 0.25, 0.5)
    assert seen
    for each in seen:
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(each, pictures) for each in seen_by_student)


@TRAINED
def test_what_may_be_drawn_are_maps_of_the_batch(name: str) -> None:
    distiller = make(name).eval()
    before = copy.deepcopy(distiller.state_dict())
    for key, drawn in distiller.look(data_for(name)).items():
        assert re.fullmatch(r"[a-z_ 0-9]+", key)
        assert drawn.shape[0] == 8
        assert drawn.ndim == 3
        assert not drawn.requires_grad
        assert ((drawn >= 0) & (drawn <= 1)).all()
    assert all(torch.equal(value, before[key]) for key, value in distiller.state_dict().items())


@TRAINED
def test_what_it_watches_are_finite_figures_that_cost_no_gradient(name: str) -> None:
    distiller = make(name)
    terms_of(distiller, data_for(name))
    figures = distiller.watch()
    for key, figure in figures.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", key)
        assert figure.shape == ()
        assert figure.isfinite()
        assert not figure.requires_grad
    assert isinstance(distiller.alarm({key: float(figure) for key, figure in figures.items()}), str)


@EVERY
def test_the_file_says_where_it_comes_from_and_how_it_is_run(name: str) -> None:
    text = importlib.import_module(distillers.modules()[name]).__doc__ or ""
    assert re.search(r"arXiv \d{4}\.\d{4,5}", text) or "Labels only" in text
    assert f"stillhouse distill --method {name} " in text
    assert re.search(r"^Masked: .+?[.;](\s|$)", text, re.MULTILINE | re.DOTALL), "what is masked, and by whom"


@EVERY
def test_every_setting_is_documented_and_has_a_default(name: str) -> None:
    text = distillers.find(name).__doc__ or ""
    assert set(distillers.find(name).tasks) <= set(tasks.TASKS)
    for setting in [*distillers.networks(name), *distillers.settings(name)]:
        assert re.search(rf"^\s+{setting}: \S", text, re.MULTILINE), f"{setting} is not in the class's Args"
    for setting, parameter in distillers.settings(name).items():
        assert parameter.default is not inspect.Parameter.empty, setting
        assert parameter.annotation is not inspect.Parameter.empty, setting
    if kind_of(name) in FROM_LABELS:
        assert set(distillers.find(name).off) <= set(distillers.settings(name))


@EVERY
def test_one_file_at_most_two_hundred_lines(name: str) -> None:
    source = inspect.getsource(importlib.import_module(distillers.modules()[name]))
    assert len(source.splitlines()) <= 200


@TRAINED
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, at torchvision's graph breaks
def test_runs_compiled(name: str) -> None:
    distiller, plain = make(name), make(name)
    distiller.student.compile(backend="eager")
    for key, term in terms_of(distiller, data_for(name)).items():
        torch.testing.assert_close(term, terms_of(plain, data_for(name))[key], rtol=1e-5, atol=1e-6)
