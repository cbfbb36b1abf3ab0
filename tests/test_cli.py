"""The command: every flag of every function, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stillhouse import cli, distillers
from stillhouse.errors import UserError
from tests.runs import DATA, RECIPE, STUDENT, files, teacher

FLAGS = """
--accumulate --allow-partial --allow-weak-teacher --alpha --attention --auto-augment --bad-data --baseline --batch --budget --by
--cache-storage --cache-top-k --channels-last --checkpointing --clip --compile --config --crop-scale --cutmix --data --ema --epochs
--eval-every --fused --hflip --hint --inherit --keep --keep-checkpoints --layer-decay --log-every --lr --max-steps --method --min-lr
--mixup --optimizer --out --overwrite --precision --random-erasing --resume --save-every --seed --smoke --smoothing --student
--student-weights --targets --task --teacher --teacher-cache --teacher-device --teacher-error --teacher-precision --teacher-weights
--temperature --timeout --tolerance --trackers --views --warmup-epochs --weight-decay --workers
"""
"""Of `distill --method masked_kd`: a flag that is renamed breaks somebody's script."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "_show_log", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def helped(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_flags_of_masked_kd_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped("distill", capsys=capsys)
    found = set(re.findall(r"^  (?:-h, )?(--[\w.-]+)", text, re.MULTILINE)) - {"--help"}
    assert sorted(found) == FLAGS.split()
    assert text == helped("distill", "--method", "masked_kd", capsys=capsys)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(command, capsys=capsys)
    assert cli.COMMANDS[command].split(";")[0] in " ".join(text.split())
    for line in text.splitlines():
        assert not line.rstrip().endswith("(type: Any, default: null)"), line
    assert command in helped(capsys=capsys)


@pytest.mark.parametrize("method", sorted(distillers.modules()))
def test_the_settings_of_a_method_are_flags_with_their_defaults(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(helped("distill", "--method", method, capsys=capsys).split())
    for name, parameter in distillers.settings(method).items():
        _, found, rest = text.rpartition(f"--{name.replace('_', '-')} ")
        assert found, name
        default = "null" if parameter.default is None else str(parameter.default)
        assert f"default: {default})" in rest.split(" --")[0], name


def test_dashes_and_underscores_and_equals_signs_mean_the_same() -> None:
    from stillhouse.run import distill

    for words in (["--max-steps", "3", "--smoke"], ["--max_steps=3", "--smoke=true"], ["--max-steps=3", "--smoke", "true"]):
        given = cli._given("distill", distill, [*words, "--keep", "0.25", "--out", "some-where/a_b"])
        assert given == {"max_steps": 3, "smoke": True, "keep": 0.25, "out": "some-where/a_b"}


def test_only_what_is_given_is_passed_on() -> None:
    from stillhouse.run import distill

    assert cli._given("distill", distill, ["--resume", "--out", "x"]) == {"resume": True, "out": "x"}
    assert cli._given("distill", distill, []) == {}
    assert cli._given("distill", distill, ["--keep", "0:1.0,0.5:0.5"]) == {"keep": "0:1.0,0.5:0.5"}
    assert cli._given("distill", distill, ["--keep", "98"]) == {"keep": 98}
    assert cli._given("distill", distill, ["--crop-scale", "[0.5, 1.0]"])["crop_scale"] == (0.5, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--temprature", "2"], r"did you mean '--temperature'\?"),
        (["distill", "--warmup-epoch", "2"], r"did you mean '--warmup-epochs'\?"),
        (["distill", "--method", "kd", "--keep", "0.5"], "keep"),
        (["distill", "--method", "masked-k"], r"did you mean 'masked_kd'\?"),
        (["distill", "--epochs", "many"], "epochs"),
        (["distill", "--precision", "fp8"], "precision"),
        (["distill", "--smoke", "--max-steps"], "max"),
        (["methods", "maskd_kd"], r"did you mean 'masked_kd'\?"),
        (["evaluate"], "run"),
        (["evaluate", "nowhere"], "nowhere"),
        (["compare", "nowhere"], "nowhere"),
        (["export", "nowhere", "--to", "timm", "--out", "there"], "nowhere"),
        (["export", "nowhere", "--to", "keras", "--out", "there"], "keras"),
        (["check"], "teacher"),
        (["reproduce", "maskd_kd"], "maskd_kd"),
    ],
)
def test_what_cannot_be_understood_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(arguments) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"stillhouse {arguments[0]}: ")
    assert said.err.count("\n") == 1, said.err
    assert re.search(message, said.err), said.err
    assert "Traceback" not in said.err
    assert files(tmp_path) == {}


def test_an_unknown_command_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["distil"])
    assert end.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_from_the_command_to_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Also evaluate, compare, methods, check and export, on one small run."""
    recipe = [word for name, value in RECIPE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert (
        cli.main(["distill", "--teacher", teacher(), "--student", STUDENT, "--data", DATA, "--out", "run", *recipe, "--max-steps", "2"])
        == 0
    )
    table = capsys.readouterr().out
    assert "student (masked_kd)" in table
    assert "the teacher saw 2 of 4 patches" in table
    assert "report: run/report.html" in table
    before = files(tmp_path)
    assert cli.main(["distill", "--resume", "--out", "run"]) == 0
    assert capsys.readouterr().out == table
    assert files(tmp_path) == before
    assert cli.main(["evaluate", "run"]) == 0
    assert "top1" in capsys.readouterr().out
    assert cli.main(["compare", "run", teacher()]) == 0
    assert "run" in capsys.readouterr().out
    assert cli.main(["methods"]) == 0
    assert all(name in capsys.readouterr().out for name in ["masked_kd"])
    assert cli.main(["methods", "masked_kd"]) == 0
    assert "2302.10494" in capsys.readouterr().out
    assert cli.main(["check", "--teacher", teacher(), "--student", STUDENT, "--data", DATA]) == 0
    assert "frozen, in eval mode" in capsys.readouterr().out
    assert cli.main(["export", "run", "--to", "timm", "--out", "exported"]) == 0
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == before["run/student/model.safetensors"]


@pytest.mark.parametrize(("error", "code", "said"), [(KeyboardInterrupt(), 130, "stopped"), (UserError("so"), 1, "so")])
def test_exit_codes(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stillhouse import commands

    def methods(name: str | None = None) -> None:
        raise error

    monkeypatch.setattr(commands, "methods", methods)
    assert cli.main(["methods"]) == code
    assert capsys.readouterr().err == f"stillhouse methods: {said}\n"
