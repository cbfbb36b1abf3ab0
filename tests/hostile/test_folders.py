"""YAML and run folders from strangers: settings, records, links."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import stillhouse as sh
from stillhouse import cli
from stillhouse.errors import UserError
from stillhouse.interrupted import Interrupted
from stillhouse.report import write_report
from stillhouse.report.compare import compare
from stillhouse.run_folder import read_facts, read_settings
from tests.counts import tried
from tests.runs import distil, files, interrupt, teacher


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(cli, "_show_log", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists()


LAUGHS = "a0: &a0 [ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
HOSTILE_YAML = {
    "tag": "keep: !!python/object/apply:os.system ['touch ran']\n",
    "new": "keep: !!python/object/new:os.system ['touch ran']\n",
    "name": "keep: !!python/name:os.system\n",
    "module": "keep: !!python/module:os\n",
    "own tag": "keep: !Payload {}\n",
    "directive": "%TAG ! tag:yaml.org,2002:python/object/apply:\n---\nkeep: !os.system ['touch ran']\n",
    "class path": "keep:\n  class_path: os.system\n  init_args: {command: touch ran}\n",
    "billion laughs": LAUGHS,
    "alias": "lr: &x 0.1\nmin_lr: *x\n",
    "itself": "keep: &x [*x]\n",
    "merge": "base: &b {lr: 1}\n<<: *b\n",
    "deep list": "keep: " + "[" * 50_000 + "\n",
    "deep mapping": "keep: " + "{a: " * 20_000 + "\n",
    "date": "keep: 2020-01-01\n",
    "bytes": "keep: !!binary aGVsbG8=\n",
    "set": "keep: !!set {a, b}\n",
    "number as name": "1: 2\n",
    "two documents": "keep: 1\n---\nkeep: 2\n",
    "no text": "\x00\x01",
    "list": "- method\n",
    "nothing": "",
    "wrong kind": "lr: [1, 2]\n",
    "path as lr": "lr: ../../etc/passwd\n",
    "unknown": "callback: os.system\n",
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_settings_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(HOSTILE_YAML[name])
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "config.yaml", tmp_path / "run/settings.yaml")
    before = files(tmp_path)
    for arguments in (["--config", "config.yaml"], ["--resume", "--out", "run"]):
        given = ["--teacher", "nowhere", "--student", "nowhere", "--data", "digits:train=64"] if "--config" in arguments else []
        assert cli.main(["distill", *arguments, *given]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert len(said) < 2000
        assert "nowhere" not in said or "--config" not in arguments or name in ("nothing",)
    assert files(tmp_path) == before
    tried("hostile YAML refused", 2)


def test_what_an_alias_unfolds_to_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(LAUGHS)
    with pytest.raises(UserError, match="alias"):
        read_settings(tmp_path / "settings.yaml")


RECORD: dict[str, Any] = {"status": "finished", "method": "kd", "data": {"name": "d", "classes": ["a"], "skipped": []}, "result": []}
HOSTILE_RECORDS = [
    *("[]", "null", '"run"', "{", "[" * 100_000, "\x00"),
    *({"status": ["finished"]}, {"data": []}, {"data": {"classes": "abc"}}, {"data": {"skipped": {"a": 1}}}, {"models": [1]}),
    *({"models": {"teacher": "t"}}, {"result": {"row": 1}}, {"result": ["teacher"]}, {"metrics": [1]}, {"per_class": 5}, {"keep": "all"}),
    *({"savings": [0]}, {"command": "rm -rf"}, {"versions": []}, {"hashes": "x"}, {"alarms": {}}, {"task": ["classify"]}, {"seed": "0"}),
]


@pytest.mark.parametrize("changes", HOSTILE_RECORDS, ids=lambda value: str(value)[:30])
def test_a_record_that_no_run_writes_is_refused(changes: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(changes if isinstance(changes, str) else json.dumps(RECORD | changes))
    for read in (read_facts, lambda run: compare([run]), write_report, lambda run: sh.Run(run).metrics):
        with pytest.raises(UserError):
            read(tmp_path)
    tried("hostile run records refused")


@pytest.mark.parametrize(
    "what", ["train.csv", "run.json", "settings.yaml", "checkpoints", "student", "report.html", "pictures", ".run.json"]
)
def test_a_run_folder_with_a_link_out_of_it_is_not_gone_on_with(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    outside = tmp_path / "home"
    outside.mkdir()
    (outside / "thesis.txt").write_text("years of work")
    path = tmp_path / "run" / what
    if path.is_dir():
        shutil.copytree(path, outside / "folder")
        shutil.rmtree(path)
    elif path.exists():
        shutil.copy(path, outside / "thesis.txt")
        path.unlink()
    path.symlink_to(outside / ("folder" if (outside / "folder").exists() else "thesis.txt"))
    before = files(outside)
    with pytest.raises(UserError, match="is a link out of the run folder"):
        sh.distill(out="run", resume=True)
    assert files(outside) == before
    tried("links out of a folder refused")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after its third step."""
    teacher()  # trained before the signal comes
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(Interrupted):
            distil(folder, "kd", save_every=2)
    return folder


def test_files_are_not_written_through_links_left_beside(tmp_path: Path) -> None:
    from stillhouse.run_folder import write_facts

    (tmp_path / "run").mkdir()
    (tmp_path / "thesis.txt").write_text("years of work")
    for name in (".run.json", ".report.html"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "thesis.txt")
    write_facts(tmp_path / "run", RECORD)
    write_report(tmp_path / "run")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    tried("links out of a folder not followed", 2)


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "a\0b", "..", "C:\\evil", "<b>", "x" * 400, "a\nb"])
def test_names_of_classes_are_no_paths(name: str, tmp_path: Path) -> None:
    """Everything that a run writes is in its folder, whatever its classes are called."""
    import dataclasses

    from tests.runs import RECIPE, STUDENT, data

    named = dataclasses.replace(data(), classes=[name, *data().classes[1:]])
    before = files(tmp_path)
    run = sh.distill("scratch", student=STUDENT, data=named, out="here/run", **RECIPE | {"max_steps": 1})
    found = files(tmp_path)
    assert all(path == "here" or path.startswith("here/run") for path in found.keys() - before.keys())
    assert run.student is not None
    tried("names of classes that are paths")


def test_a_shared_data_folder_of_archives_and_scripts_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra stillhouse[datasets]")
    import zipfile

    from stillhouse.data import open_data

    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped/train.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/1.png", bytes(50_000_000))
    with pytest.raises(UserError, match="is an archive"):
        open_data("hf:zipped")
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted/scripted.py").write_text("open('ran', 'w')\n")
    with pytest.raises(UserError, match="cannot be read as a data set"):
        open_data("hf:scripted")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/train.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="cannot be read as a data set"):
        open_data("hf:pickled")
    tried("data folders with code or archives refused", 3)


def test_a_type_that_an_arrow_file_pickles_is_not_unpickled(tmp_path: Path) -> None:
    """The way of CVE-2023-47248: a column whose type is a pickle."""
    datasets = pytest.importorskip("datasets", reason="needs the extra stillhouse[datasets]")
    import pickle

    import pyarrow as pa

    from stillhouse.data import open_data
    from tests.data.corpus import Payload

    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Payload())}
    schema = pa.schema([pa.field("image", pa.int64(), metadata=metadata), pa.field("label", pa.int64())])
    (tmp_path / "arrow").mkdir()
    with pa.OSFile("arrow/train.arrow", "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.table({"image": pa.array([1, 2]), "label": pa.array([0, 1])}, schema=schema))
    datasets.disable_progress_bars()
    with pytest.raises(UserError):
        open_data("hf:arrow")
    tried("pickles refused")
