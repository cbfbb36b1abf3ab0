"""`make fuzz`: every target, or those named, for FUZZ_SECONDS each (60), by atheris; what breaks one is kept in tests/fuzz/found."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOUND = Path(__file__).parent / "found"
SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))
LONGEST = 4096


def main(names: list[str]) -> int:
    """Fuzzes one target after another, each in a process of its own; 1 if anything was found."""
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("fuzzing needs atheris: pip install 'stillhouse[fuzz]' (Linux, Python up to 3.13)", file=sys.stderr)
        return 1
    from tests.fuzz.targets import TARGETS

    total, findings = 0, 0
    print(f"{'target':>15}  {'inputs tried':>12}  findings")
    for name in names or TARGETS:
        command = [sys.executable, "-m", "tests.fuzz", "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        runs = re.findall(r"stat::number_of_executed_units: (\d+)|Done (\d+) (?:runs )?in|#(\d+)", done.stderr + done.stdout)
        runs = max((int(number) for match in runs for number in match if number), default=0)
        found = (
            ""
            if done.returncode == 0
            else " ".join(re.findall(r"^(?: === Uncaught.*|\S*(?:Error|Exception|ERROR).*)$", done.stdout + done.stderr, re.M)[:2])
        )
        total, findings = total + runs, findings + bool(done.returncode)
        print(f"{name:>15}  {runs:>12}  {'none' if not done.returncode else found[:300]}", flush=True)
        if done.returncode and "-v" in sys.argv:
            print(done.stdout[-3000:], done.stderr[-3000:])
    print(f"{'all':>15}  {total:>12}  {findings}")
    return int(findings > 0)


def one(name: str) -> None:
    """Fuzzes one target in this process, until its time is over or something is found."""
    import atheris

    with atheris.instrument_imports(include=["stillhouse"]):
        from stillhouse.errors import UserError
        from tests.fuzz.targets import TARGETS

    def attempt(data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="fuzz") as folder, contextlib.suppress(UserError):
            TARGETS[name](data, Path(folder))

    kept, seeds = FOUND / name, Path(tempfile.mkdtemp())
    kept.mkdir(parents=True, exist_ok=True)
    flags = [
        f"-max_total_time={SECONDS}",
        f"-max_len={LONGEST}",
        f"-artifact_prefix={kept}/",
        "-print_final_stats=1",
        "-timeout=60",
        "-rss_limit_mb=6000",
    ]
    atheris.Setup([sys.argv[0], *flags, str(seeds), str(kept)], attempt)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        sys.exit(main([word for word in sys.argv[1:] if word != "-v"]))
