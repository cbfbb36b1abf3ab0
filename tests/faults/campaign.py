"""Ends runs at random moments, takes them up again, and compares what they leave behind with what a run leaves that nothing ended.

    python -m tests.faults.campaign --moments 200 --out faults

What a moment is follows from (seed, number): which run, what ends it, and when, as a share of the time that it takes. Where a run is
finished before its time has come, the time is drawn again, so that each moment ends a run. Moments that were tried are lines of
OUT/moments.jsonl and are not tried again, so that the campaign itself can be ended anywhere. The table is printed and written to
OUT/table.md and table.json.

Children are forked from a process that has imported all there is: a moment costs what the training costs.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import stillhouse as sh
from stillhouse import session
from stillhouse.interrupted import Interrupted
from stillhouse.run_folder import status
from stillhouse.session import Session
from stillhouse.training import checkpoint
from stillhouse.training.checkpoint import checkpoints, load_checkpoint
from stillhouse.training.loop import Loop
from tests.test_taken_up import SHAPES, SHORT, VIT, learnt, taught

Job = dict[str, Any]
SMALL = f"{VIT},embed_dim=16,depth=1"
MIXED: Job = {"accumulate": 2, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "clip": 1.0, "precision": "bf16"}
RUNS: dict[str, tuple[str, Callable[[Path], Job]]] = {
    "kd": ("kd", lambda folder: {"student": SMALL, "teacher": taught(folder, "scratch"), "ema": None}),
    "masked_kd, everything on": (
        "masked_kd",
        lambda folder: {"student": SMALL, "teacher": taught(folder, "scratch"), "keep": 0.5, "baseline": True, **MIXED},
    ),
    "masked_kd, 2 loaders": (
        "masked_kd",
        lambda folder: {"student": SMALL, "teacher": taught(folder, "scratch"), "by": "random", "workers": 2, "mixup": 0.8},
    ),
    "g2sd, two stages": ("g2sd", SHAPES["g2sd"][0]),
    "krr_st, a data set": ("krr_st", SHAPES["krr_st"][0]),
}
DISK = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "write_text"), (shutil, "rmtree")]
"""Before and after each call of these a run is ended, too: where something could be half done."""
WORK = {(Loop, "run"): "training", (Loop, "evaluate"): "evaluating", (Loop, "save"): "writing a checkpoint"}
WORK |= {(Session, "loop"): "between stages", (Session, "finish"): "keeping the student", (session, "write_report"): "writing the report"}
HANGS, TRIES = 600.0, 20


class Watched:
    """What a child does, in memory that it shares with its parent and that outlives it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)
        self.say(doing="opening", calls={})

    def say(self, **facts: Any) -> None:
        told = self.said() | facts
        self._memory.seek(0)
        self._memory.write(json.dumps(told).encode().ljust(4096, b"\0"))

    def said(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._memory[:].rstrip(b"\0") or "{}"))
        except ValueError:  # ended in the middle of saying it
            return {}


def watch(watched: Watched, end: dict[str, Any]) -> None:
    """In a child: keeps `watched` up to date, and ends the child at the call that `end` names."""

    def touched(doing: str) -> Any:
        calls = watched.said()["calls"]
        calls[doing] = calls.get(doing, 0) + 1
        watched.say(calls=calls)
        if (doing, calls[doing]) == (end.get("doing"), end.get("call")):
            return lambda: os.kill(os.getpid(), signal.SIGKILL)
        return lambda: None

    def at_disk(original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            kill = touched(watched.said()["doing"])
            if not end.get("after"):
                kill()
            result = original(*arguments, **named)
            kill()
            return result

        return call

    def at_work(original: Any, doing: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            before = watched.said()["doing"]
            watched.say(doing=doing)
            touched(doing)()
            result = original(*arguments, **named)
            watched.say(doing=before)
            return result

        return call

    for owner, name in DISK:
        setattr(owner, name, at_disk(getattr(owner, name)))
    for (owner, name), doing in WORK.items():
        setattr(owner, name, at_work(getattr(owner, name), doing))
    save = checkpoint.save_checkpoint

    def saved(folder: Path, step: int, *rest: Any) -> Path:
        path = save(folder, step, *rest)
        watched.say(saved=[str(folder), step])
        return path

    sys.modules[Loop.__module__].save_checkpoint = saved  # type: ignore[attr-defined]


def forked(work: Callable[[], Any], log: Path) -> int:
    """A child that does the work and ends as the command would; its process id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        work()
        code = 0
    except Interrupted as error:
        print(error, file=sys.stderr)
        code = 128 + error.signal
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def begin(name: str, folder: Path, teachers: Path, end: dict[str, Any], watched: Watched, log: Path) -> int:
    """A child that begins the run or goes on with it; its process id."""
    method, make = RUNS[name]

    def work() -> None:
        watch(watched, end)
        sh.distill(method, out=str(folder), resume=True, **SHORT | make(teachers))

    return forked(work, log)


def ended(process: int, seconds: float | None = None, number: int = signal.SIGKILL) -> int:
    """How a child ended, as shells say it; after so many seconds it gets the signal."""
    begun, sent = time.monotonic(), False
    while True:
        found, how = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(how) if os.WIFEXITED(how) else 128 + os.WTERMSIG(how)
        waited = time.monotonic() - begun
        if seconds is not None and waited > seconds and not sent:
            os.kill(process, number)
            sent = True
        if waited > HANGS:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.005)


def reference(name: str, out: Path) -> tuple[Path, dict[str, Any]]:
    """The run that nothing ends: its folder, how long it took, and how often it touched the disk doing what. Made once."""
    folder, facts = out / "reference" / name, out / "reference" / f"{name}.json"
    if facts.is_file():
        return folder, json.loads(facts.read_text())
    taught_by, watched = out / "teachers", Watched()
    if ended(forked(lambda: RUNS[name][1](taught_by), out / "log.txt")):  # a process that has trained has threads, and must not be forked
        raise SystemExit(f"the teachers of '{name}' could not be trained: see {out / 'log.txt'}")
    shutil.rmtree(folder, ignore_errors=True)
    begun = time.monotonic()
    code = ended(begin(name, folder, taught_by, {}, watched, out / "log.txt"))
    if code:
        raise SystemExit(f"the run '{name}' does not even end when nothing ends it: see {out / 'log.txt'}")
    found = {"seconds": time.monotonic() - begun, "calls": watched.said()["calls"]}
    facts.write_text(json.dumps(found))
    return folder, found


def struck(name: str, how: str, draw: random.Random, facts: dict[str, Any], folder: Path, out: Path) -> tuple[int, dict[str, Any], float]:
    """Begins the run or goes on with it, and ends it at a moment that is drawn: the code, what it last told, after how many seconds."""
    watched, end, seconds = Watched(), {}, None
    if how == "disk":
        doing = draw.choice(sorted(facts["calls"]))
        end = {"doing": doing, "call": draw.randint(1, facts["calls"][doing]), "after": draw.random() < 0.5}
    else:
        seconds = draw.uniform(0, facts["seconds"])
    begun = time.monotonic()
    process = begin(name, folder, out / "teachers", end, watched, out / "log.txt")
    code = ended(process, seconds, signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    return code, watched.said(), time.monotonic() - begun


def moment(number: int, seed: int, names: list[str], out: Path) -> dict[str, Any]:
    """One moment: the run is ended, once or twice, and taken up until it is finished. When it should end the second time it may have."""
    draw = random.Random(f"{seed} {number}")
    name, how = draw.choice(names), draw.choices(["disk", "time", "SIGTERM"], [4, 4, 2])[0]
    whole, facts = reference(name, out)
    folder = out / "runs" / str(number)
    shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = {"moment": number, "run": name, "how": how, "doing": [], "codes": [], "lost": False}
    for _ in range(draw.choice([1, 1, 2])):
        for _ in range(TRIES):
            code, told, seconds = struck(name, how, draw, facts, folder, out)
            if code or found["codes"]:
                break
            shutil.rmtree(folder)  # it was finished before its time came: faster than the reference was
            facts = facts | {"seconds": seconds}
        else:
            raise SystemExit(f"the run '{name}' was finished {TRIES} times before {how} could end it")
        found["codes"].append(code)
        found["doing"].append(told.get("doing", "opening") if code else "finished")
        found["lost"] |= not still_there(told.get("saved"))
    asked = set(found["codes"]) <= {0, *(128 + each for each in (signal.SIGKILL, signal.SIGTERM))}  # it did not fail by itself
    found["codes"].append(ended(begin(name, folder, out / "teachers", {}, Watched(), out / "log.txt")))
    finished = found["codes"][-1] == 0 and (folder / "report.html").is_file() and status(folder) == "finished"
    found["differs"] = differing(*(learnt(each) if each.exists() else {} for each in (folder, whole)))
    found["identical"] = asked and finished and not found["differs"]
    if found["identical"] and not found["lost"]:
        shutil.rmtree(folder)
    return found


def differing(ours: dict[str, bytes], theirs: dict[str, bytes]) -> list[str]:
    """The files that differ. A run that was asked to stop has one checkpoint more, of that step; it may have pushed an older one out.

    The last checkpoint of each training must be there, as it is when nothing was ended.
    """
    last = {folder: max(path for path in theirs if path.startswith(folder)) for folder in map(checkpoints_of, theirs) if folder}
    asked = {path for path in theirs if not checkpoints_of(path) or Path(path).parent == Path(last[checkpoints_of(path)]).parent}
    asked |= ours.keys() & theirs.keys() | {path for path in ours if not checkpoints_of(path)}
    return sorted(path for path in asked if ours.get(path) != theirs.get(path))


def checkpoints_of(path: str) -> str:
    """The folder of checkpoints that a file lies in, "" for others."""
    return next((f"{each}/" for each in Path(path).parents if each.name == "checkpoints"), "").removeprefix("./")


def still_there(saved: tuple[str, int] | None) -> bool:
    """Whether the last checkpoint that was written is whole."""
    if saved is None:
        return True
    last = checkpoints(Path(saved[0]))[-1:]
    return bool(last) and load_checkpoint(last[0])[1]["step"] >= saved[1]


def table(rows: list[dict[str, Any]]) -> str:
    """Counts, by what the run was doing when it was first ended and by what ended it, as Markdown."""
    lines = ["| ended | moments | ended bit-identical | checkpoint lost |", "|---|---|---|---|"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by = "SIGTERM" if row["how"] == "SIGTERM" else "kill -9"
        groups.setdefault(f"by {by}, {row['doing'][0]}", []).append(row)
    for title, some in [*sorted(groups.items()), ("all", rows)]:
        same, lost = sum(row["identical"] for row in some), sum(row["lost"] for row in some)
        lines.append(f"| {title} | {len(some)} | {same} | {lost} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The campaign; 0 if every run ended as if nothing had happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("faults"))
    parser.add_argument("--runs", nargs="+", choices=[*RUNS], default=[*RUNS])
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    (asked.out / "reference").mkdir(parents=True, exist_ok=True)
    kept = asked.out / "moments.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    for number in sorted(set(range(asked.moments)) - {row["moment"] for row in rows}):
        row = moment(number, asked.seed, asked.runs, asked.out)
        rows.append(row)
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        good = "identical" if row["identical"] and not row["lost"] else f"WRONG: {row['differs'] or row['codes']}"
        print(f"{number + 1}/{asked.moments} {row['run']}: {row['how']} while {', then '.join(row['doing'])}: {good}", flush=True)
    (asked.out / "table.md").write_text(table(rows))
    (asked.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return int(not all(row["identical"] and not row["lost"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
