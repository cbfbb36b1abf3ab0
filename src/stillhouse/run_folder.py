"""The folder of a run: found, made, taken up again, never overwritten by accident. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from stillhouse.errors import UserError, printable

FREE = ("workers", "save_every", "keep_checkpoints", "trackers", "timeout", "teacher_device")
"""The settings that a resume may change: they do not change what is learnt, another device no more than by its rounding."""
PATIENCE = 15.0
"""Seconds that a run waits for a folder in use: what loads images for a process that was killed takes a few to notice it, and until then it
holds the folder too."""
LOCK = ".lock"


def open_folder(out: str | None, method: str, given: dict[str, Any], resume: bool, overwrite: bool) -> tuple[Path, dict[str, Any] | None]:
    """The run folder, and the settings stored there if the run is to be resumed.

    Args:
        out: where; None: the next free runs/METHOD-N.
        given: the settings named by the user; a resume refuses those that differ from what is stored, but for the `FREE` ones. With a
            student and data among them it also begins a run that has not begun.

    Raises:
        UserError: if the folder holds something and neither resume nor overwrite is asked for, it is no run folder, there is nothing to
            resume, or another setting is given than the run has.
    """
    folder = Path(out) if out else _next_free(method)
    holds = folder.exists() and not (folder.is_dir() and all(path.name in (LOCK, ".settings.yaml") for path in folder.iterdir()))
    if resume and (holds or not {"student", "data"} <= given.keys()):
        stored = _stored(folder, out, given)
        refuse_links(folder)
        return folder, stored
    if folder.is_file():
        raise UserError(f"{folder} is a file, expected a folder for the run; choose another with --out")
    if holds and is_main_process():
        if not overwrite:
            raise UserError(
                f"{folder} already holds something; go on with it with --resume, replace the run with --overwrite, or choose another --out"
            )
        if not (folder / "settings.yaml").is_file():
            raise UserError(f"{folder} is no run folder (it has no settings.yaml) and is not removed; choose another --out")
    return folder, None


def refuse_links(folder: Path) -> None:
    """Refuses a run folder in which links lead out of it: what is written into it must not land elsewhere.

    Raises:
        UserError: naming the first link.
    """
    inside = folder.resolve()
    for where, folders, names in os.walk(folder):
        for path in (Path(where, name) for name in (*folders, *names)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise UserError(f"{path} is a link out of the run folder, and the run would write there: put in its place what it leads to")


def slug(name: str) -> str:
    """A name as part of a folder's: letters and digits, and dashes for all else."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def status(folder: Path) -> str | None:
    """running, interrupted, failed or finished; None before anything was written."""
    return read_facts(folder).get("status") if (folder / "run.json").is_file() else None


class _Plain(yaml.SafeLoader):
    """YAML of words and numbers: neither tags nor aliases, a few lines of which unfold to more than the memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuses aliases.

        Raises:
            YAMLError: where one stands.
        """
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*NAME), which is not followed: write the value out")
        return super().compose_node(parent, index)


def read_settings(path: Path) -> dict[str, Any]:
    """A run's settings, plain YAML: tags, aliases and classes are refused.

    Raises:
        UserError: if it is not there or not a plain mapping.
    """
    try:
        settings = yaml.load(path.read_text("utf-8"), _Plain)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as settings: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"{path} holds no settings, expected lines of NAME: VALUE")
    strange = next((name for name, value in settings.items() if not _is_plain(value)), None)
    if strange is not None:
        raise UserError(f"{path} has a {type(settings[strange]).__name__} as {strange}, expected a number, a word, true, false or a list")
    return settings


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):  # points of a schedule
        return all(_is_plain(each) for item in value.items() for each in item)
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, (str, int, float, type(None)))


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Settings as FOLDER/settings.yaml, which `--config` takes."""
    _write_whole(folder / "settings.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def read_facts(folder: Path) -> dict[str, Any]:
    """The contents of a run's `run.json`.

    Raises:
        UserError: if the folder is no run folder.
    """
    try:
        facts = json.loads((folder / "run.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is no run folder: its run.json cannot be read ({error})") from error
    return checked_facts(facts, folder / "run.json")


FACTS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("status", "method", "task", "title", "started"), str),
    **dict.fromkeys(("versions", "hashes", "data", "models", "keep", "savings", "metrics", "per_class"), dict),
    **dict.fromkeys(("command", "alarms", "result"), list),
    **dict.fromkeys(("seed", "seconds"), (int, float)),
}
"""What kind of thing the entries of `run.json` are."""


def checked_facts(facts: Any, path: Path) -> dict[str, Any]:
    """The contents of a `run.json`, which may come from anybody.

    Raises:
        UserError: unless it is an object whose known entries are what they should be.
    """
    if not isinstance(facts, dict):
        raise UserError(f"'{path}' holds a {type(facts).__name__} where a run's record (a JSON object) was expected.")
    for name, value, kind in _entries(facts):
        if value is not None and not isinstance(value, kind):
            raise UserError(f"'{path}' is damaged: {name} is a {type(value).__name__}, which no run writes; restore it, or run again.")
    return facts


def _entries(facts: dict[str, Any]) -> Iterator[tuple[str, Any, type | tuple[type, ...]]]:
    """(what it is called, the entry, what kind it may be), outer ones first: inner ones are only looked for in those that are right."""
    yield from ((name, facts.get(name), kind) for name, kind in FACTS.items())
    yield from ((f"data: {name}", (facts.get("data") or {}).get(name), list) for name in ("classes", "skipped"))
    yield from (("a model", model, dict) for model in (facts.get("models") or {}).values())
    yield from (("a row of the result", row, dict) for row in facts.get("result") or [])


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Facts as FOLDER/run.json."""
    _write_whole(folder / "run.json", json.dumps(facts, indent=1))


def write_skipped(folder: Path, skipped: list[str]) -> None:
    """What was left out of the data as FOLDER/skipped.txt, a line each; no file where nothing was."""
    if skipped:
        _write_whole(folder / "skipped.txt", "".join(f"{printable(each)}\n" for each in skipped))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in one sentence why `path` could not be written.

    Raises:
        UserError: instead of an error of the system, such as a full disk.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); free space there and go on with --resume, or choose another --out") from error


@contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """A file beside `path`, flushed and renamed to it at the end: whenever the machine stops, the old one is there or the new one.

    Args:
        shared: whether other processes may write the same file meanwhile; each then has one of its own beside.

    Raises:
        UserError: if it cannot be written; what was there before stays.
    """
    beside = path.with_name(f".{path.name}.{uuid4().hex}" if shared else f".{path.name}")
    with writing(path):
        beside.unlink(missing_ok=True)  # never through a link that somebody left there
        try:
            yield beside
            flush(beside)
            beside.replace(path)
            flush(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file, or which names a folder holds, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else trains in the folder meanwhile. The system gives it free when the process ends, however it ends.

    Raises:
        UserError: if another process has it, and keeps it for `PATIENCE` seconds.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, timeout=PATIENCE)
    with writing(folder):
        try:
            lock.acquire()
        except Timeout:
            told = f"another process is training in {folder}: wait for it, stop it, or choose another folder with --out"
            raise UserError(told) from None
        except NotImplementedError:
            pass  # a file system without locks: some clusters have one
    try:
        yield
    finally:
        lock.release()


def emptied(folder: Path) -> None:
    """Removes a run; what says that it is one goes last, so that it can be removed again if this is cut short."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "settings.yaml"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, renamed to it at the end, so that nobody ever sees half of it; what was there before goes only then."""
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)  # left by a killed process of the same number
    try:
        new.mkdir(parents=True)
        yield new
        for path in [*new.rglob("*"), new]:
            flush(path)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what `whole_folder` had begun in `folder` when its process was killed."""
    for left in [*folder.glob(".*.new"), *folder.glob(".*.old")]:
        shutil.rmtree(left)


def _write_whole(path: Path, text: str) -> None:
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _stored(folder: Path, out: str | None, given: dict[str, Any]) -> dict[str, Any]:
    if out is None:
        raise UserError("--resume needs the run folder: name it with --out")
    if not (folder / "settings.yaml").is_file():
        raise UserError(f"there is no run to resume in {folder}: it has no settings.yaml; leave out --resume to start one")
    stored = read_settings(folder / "settings.yaml")
    for name, value in given.items():
        value = list(value) if isinstance(value, tuple) else value  # as YAML has it
        if name not in FREE and stored.get(name) is not None and stored[name] != value:
            raise UserError(
                f"the run in {folder} has {name}={stored[name]}, not {value}; resume it without that, or start another with --out"
            )
    return stored


def _next_free(method: str) -> Path:
    taken = {path.name for path in Path("runs").glob(f"{method}-*")}
    return next(Path("runs") / f"{method}-{number}" for number in range(1, len(taken) + 2) if f"{method}-{number}" not in taken)


def is_main_process() -> bool:
    """Whether this process writes the folder: torchrun's first, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0
