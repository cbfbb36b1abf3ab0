"""A method's evidence: method, baselines and an ablation that must be worse; same data, budget and seeds. One module a method."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from stillhouse.errors import UserError, nearest


def reproduce(name: str, out: Path, seeds: int | None = None, smoke: bool = False) -> Path:
    """Runs the evidence of a method and writes its table as OUT/NAME.md. Runs that are finished are not run again.

    Raises:
        UserError: if there is no evidence of that name.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in ("experiment", "table", "curves")]
    if name not in known:
        raise UserError(f"there is no evidence for '{name}'{nearest(name, known)}; there is for {', '.join(known)}")
    if seeds is not None and seeds < 1:
        raise UserError(f"seeds is {seeds}, expected at least 1, and 3 to say anything")
    from stillhouse.evidence.table import write_evidence

    module = importlib.import_module(f"{__name__}.{name}")
    asked = range(seeds or int(getattr(module, "SEEDS", 3)))
    studies = [experiment.run(out / name, asked, smoke) for experiment in module.EXPERIMENTS]
    return write_evidence(out / f"{name}.md", name, module.CLAIM, studies, getattr(module, "SHOWED", ""))
