"""What each command prints when it is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stillhouse.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from stillhouse.measure.timing import Ratio


def show(command: str, result: Any) -> None:
    """Prints what a command of `stillhouse.commands` returned."""
    shown: dict[str, Callable[[Any], None]] = {
        "distill": _run,
        "methods": _methods,
        "check": _findings,
        "estimate": print_estimate,
        "evaluate": _metrics,
        "compare": _compare,
        "reproduce": lambda path: print(path.read_text()),
        "export": print,
    }
    shown[command](result)


def _run(run: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from stillhouse.report.numbers import milliseconds, percent, si
    from stillhouse.report.run_folder import task_of
    from stillhouse.tasks import find

    facts, task = run.facts, find(task_of(run.facts))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in (task.titles[task.headline], "parameters", "mult-adds", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    costs = {"params": si, "macs": si, "step_ms": milliseconds}
    for row in facts["result"]:
        table.add_row(row["row"], percent(row.get(task.headline)), *(write(row.get(key)) for key, write in costs.items()))
    Console().print(table)
    saved = facts.get("savings")
    if saved:
        share = saved["teacher_macs_kept"] / saved["teacher_macs_full"]
        line = f"the teacher saw {facts['keep']['kept']} of {facts['keep']['patches']} patches: {percent(share)} of its multiply-adds"
        if saved["step_ms_full"]:
            line += f"; a step took {percent(saved['step_ms_kept'] / saved['step_ms_full'])} of the time with the whole teacher"
        print(line)
    kept = facts.get("teacher_cache")
    if kept:
        print(
            f"the teacher did not run in {kept['steps_without_teacher']} of {kept['steps']} steps; its answers take "
            f"{si(kept['bytes'])}B in {kept['folder']}"
        )
    for alarm in facts.get("alarms") or []:
        print(f"warning: {printable(alarm)}")
    print(f"report: {run.report}")


def _methods(cards: Any) -> None:
    from itertools import groupby

    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    if len(cards) == 1:
        card = cards[0]
        print(card.text)
        print(f"\nEvidence: {card.showed or 'none of its own'}")
        if card.settings:
            print("\nSettings:\n" + "\n".join(f"    --{name} {value}" for name, value in card.settings.items()))
        return
    console = Console()
    for family, of_family in groupby(cards, key=lambda card: card.family):
        console.print(Text(f"\n{family}", style="bold"))
        for card in of_family:
            facts = {"to": ", ".join(card.tasks), "needs": ", ".join(card.needs) or "no teacher", "masked": card.masked}
            facts |= {"evidence": card.showed} if card.showed else {}
            console.print(Padding(Text.assemble((card.name, "bold"), f"  {card.sentence}"), (0, 0, 0, 2)))
            console.print(Padding(Text(";  ".join(f"{name}: {text}" for name, text in facts.items()), style="dim"), (0, 0, 0, 6)))


def _findings(findings: Any) -> None:
    for finding in findings:
        print(f"{finding.what:>20}  {finding.seen}")


def _metrics(metrics: dict[str, float]) -> None:
    named = {printable(name): value for name, value in metrics.items()}
    width = max(12, *map(len, named))
    for name, value in named.items():
        print(f"{name:>{width}}  {value:.4f}")


def print_estimate(rows: list[dict[str, Any]], console: Console | None = None) -> None:
    """The rows of `estimate` as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from stillhouse.report.numbers import si

    console = console or Console()
    if "part" in rows[0]:
        return _print_profile(rows, console)
    if "of_features" in rows[0]:
        return _print_dense_estimate(rows, console)
    table = Table(title="What a training step costs here", box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for column in ("", "teacher\nMACs", "step\nms", "x plain", "x full KD", "bound\nms", "x bound", "memory"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        if row["refused"]:
            continue
        method = f"{row['method']} {row['kept']}/{row['patches']}" if row["kept"] else row["method"]
        times = [f"{1000 * row['step_s'].median:.0f}", _with_spread(row["of_plain"]), _with_spread(row["of_full"])]
        bound = [f"{1000 * row['bound_s']:.0f}", _with_spread(row["of_bound"])]
        table.add_row(method, si(row["teacher_macs"]), *times, *bound, f"{si(row['memory_bytes'])}B")
    console.print(table)
    console.print(
        "MaskedKD K/N: the teacher sees K of N patches. MACs: multiply-adds an image. Medians ± half the distance between quartiles. "
        "Bound: plain step + kept share of the teacher's forward pass. Memory: weights, optimiser state and one step's peak beyond them "
        f"({rows[0]['memory_of']})."
    )
    for row in rows:
        if row["refused"]:
            console.print(f"{row['method']} cannot be used here: {row['refused']}", markup=False)


def _print_dense_estimate(rows: list[dict[str, Any]], console: Console) -> None:
    """The rows of `estimate` for networks that detect or segment."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from stillhouse.report.numbers import si

    table = Table(title="What a training step costs here", box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for column in ("", "step\nms", "x plain", "x feature KD", "memory", "above plain"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        times = [f"{1000 * row['step_s'].median:.0f}", _with_spread(row["of_plain"]), _with_spread(row["of_features"])]
        table.add_row(row["name"], *times, f"{si(row['memory_bytes'])}B", f"{si(row['above_plain'])}B" if row["above_plain"] else "")
    console.print(table)
    console.print(
        f"Medians ± half the distance between quartiles. Memory: one step's peak beyond what is held before it ({rows[0]['memory_of']})."
    )


def _print_profile(rows: list[dict[str, Any]], console: Console) -> None:
    """Where the time of a step goes."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from stillhouse.report.numbers import percent, si

    table = Table(title="Where the time of a training step goes", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in ("", "ms", "share", "bound\nms", "FLOPs", "FLOP/s in\nthe bound"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        middle, low, high = (1000 * value for value in row["seconds"])
        bound = [f"{1000 * row['bound_s']:.1f}", si(row["flops"]), si(row["flops"] / row["bound_s"])] if row["flops"] else []
        table.add_row(row["part"], f"{middle:.1f}±{(high - low) / 2:.1f}", percent(row["share"]), *bound, end_section=row is rows[-2])
    console.print(table)
    whole = rows[-1]
    console.print(
        "Medians ± half the distance between quartiles, of whole steps of the training loop. Bound: the products, convolutions and "
        "attentions of that part alone, each at the speed this machine reaches on its shapes. "
        f"A step takes {whole['seconds'].median / whole['bound_s']:.2f} times its bound."
    )


def _with_spread(measured: Ratio) -> str:
    return f"{measured.median:.2f}±{(measured.high - measured.low) / 2:.2f}"


def _compare(rows: Any) -> None:
    from stillhouse.report.compare import print_table

    print_table(rows)
