from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import UserError
from stillhouse.models.specs import Spec, parse_options, parse_spec

names = st.from_regex(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)?", fullmatch=True)
keys = st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.sampled_from(["timm", "torchvision", "transformers"]), names, st.dictionaries(keys, values, max_size=4))
def test_a_spec_written_out_reads_back_equal(family: str, name: str, options: dict[str, object]) -> None:
    spec = Spec(family, name, options)
    read = parse_spec(str(spec))
    assert read == spec
    assert [type(value) for value in read.options.values()] == [type(value) for value in options.values()]


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read_or_refused_in_one_sentence(text: str) -> None:
    for parse in (parse_spec, parse_options):
        try:
            parse(text)
        except UserError:  # any other exception fails the test
            continue


def test_literals_words_and_truth() -> None:
    assert parse_options("a=28, b=(0.5,0.5),c=avg,d=true,e=False,f='x,y',g=1e-3,h=None,i=[1,(2,3)],j=a.b/c-d") == {
        "a": 28,
        "b": (0.5, 0.5),
        "c": "avg",
        "d": True,
        "e": False,
        "f": "x,y",
        "g": 1e-3,
        "h": None,
        "i": [1, (2, 3)],
        "j": "a.b/c-d",
    }


def test_families_and_folders() -> None:
    assert parse_spec("timm/vit_tiny_patch16_224.augreg_in21k:img_size=28") == Spec(
        "timm", "vit_tiny_patch16_224.augreg_in21k", {"img_size": 28}
    )
    assert parse_spec("transformers/google/vit-base-patch16-224") == Spec("transformers", "google/vit-base-patch16-224")
    assert parse_spec("transformers//models/vit") == Spec("transformers", "/models/vit")
    assert parse_spec("runs/timm/tiny") == Spec("run", "runs/timm/tiny")
    assert parse_spec("timm") == Spec("run", "timm")
    assert str(Spec("run", "runs/tiny")) == "runs/tiny"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "option 'a' has no value, write a=VALUE"),
        ("a=", "option 'a' has no value"),
        ("a=1,a=2", "option 'a' is given twice"),
        ("a=1,", "expected NAME=VALUE"),
        ("", "expected NAME=VALUE"),
        ("1a=2", "expected NAME=VALUE"),
        ("a=(1,2", "'(' is never closed"),
        ("a=1)", "')' closes nothing"),
        ("a='x", "is never closed"),
        ("a=__import__('os')", "cannot read a="),
        ("a={1,2}", "cannot use a="),
        ("a=b'x'", "cannot use a="),
    ],
)
def test_what_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_options(text)
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["", "  ", "timm/", "timm/:a=1"])
def test_a_spec_needs_a_name(text: str) -> None:
    with pytest.raises(UserError):
        parse_spec(text)
