"""What the documentation says works: snippets run, commands are understood, generated pages are current, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stillhouse import cli
from tests import runs
from tests.conftest import images, labels, tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "<!-- not run"
"""Stands, with a reason, on the line before a block that cannot run here."""
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in these languages, but for those marked as not run."""
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    text = page.read_text()
    return [each[2] for each in found if each[1] in languages and NOT_RUN not in text[: each.start()].rstrip().rpartition("\n")[2]]


def commands(page: Path) -> list[str]:
    """The `stillhouse` command lines of a page, continued lines joined, prompts left out."""
    lines = "\n".join(blocks(page, "bash", "console")).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?stillhouse ", line)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a page in order, in one namespace, on small networks and a few images in the place of the large ones."""
    teacher = runs.teacher()
    monkeypatch.chdir(tmp_path)
    standins = {
        "timm/deit_base_patch16_224": teacher,
        "timm/deit_tiny_patch16_224": runs.STUDENT,
        "imagefolder:DIR": runs.DATA,
        "epochs=300": "max_steps=4, batch=16, trackers='none'",
    }
    pictures, classes = images(4), labels(4)
    names: dict[str, Any] = {"student": tiny(seed=1), "teacher": tiny(seed=2), "loader": [(pictures, classes)] * 2}
    for block in blocks(page, "python"):
        for large, small in standins.items():
            block = block.replace(large, small)
        exec(compile(block, str(page), "exec"), names)


class Understood(Exception):
    """The command line was read to its end."""


@EVERY_PAGE
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = cli._given

    def stop(*arguments: Any) -> None:
        read(*arguments)
        raise Understood

    monkeypatch.setattr(cli, "_given", stop)
    for command in commands(page):
        with pytest.raises((Understood, SystemExit)) as end:
            assert cli.main(shlex.split(command, comments=True)[1:]) == 0, command
        assert end.type is Understood or end.value.code == 0, command  # --help ends by itself


def test_the_pages_of_methods_are_current() -> None:
    wanted = runpy.run_path(str(ROOT / "docs" / "make_methods.py"))["pages"]()
    found = {path.name: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert found == wanted, "run: python docs/make_methods.py"


@EVERY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_no_file_names_a_path_of_one_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout: which files are committed is not known")
    somewhere = re.compile(r"(?<![\w.-])/(?:tmp|work|root|home|Users)/")
    for name in listed.stdout.splitlines():
        try:
            text = (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        assert not somewhere.search(text), name
