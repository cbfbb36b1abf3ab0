"""Importing and asking for help cost nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "timm", "accelerate", "transformers", "jsonargparse", "sklearn", "datasets", "torchvision", "torchmetrics", "numpy")


@pytest.mark.parametrize(
    "code",
    [
        "import stillhouse",
        "import stillhouse.cli, stillhouse.run, stillhouse.commands, stillhouse.distillers, stillhouse.training.recipe",
        "import stillhouse; stillhouse.distillers.modules(); stillhouse.UserError; stillhouse.distill; stillhouse.Interrupted",
        "from stillhouse.cli import main\ntry: main(['--help'])\nexcept SystemExit as end: assert end.code == 0",
        "from stillhouse.cli import main\ntry: main(['--version'])\nexcept SystemExit as end: assert end.code == 0",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    check = f"\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_public_name_is_there() -> None:
    import stillhouse

    for name in stillhouse.__all__:
        assert getattr(stillhouse, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        stillhouse.nothing  # noqa: B018
    assert stillhouse.distillers.MaskedKD is stillhouse.distillers.find("masked_kd")
    with pytest.raises(AttributeError, match="no distiller 'Nothing'"):
        stillhouse.distillers.Nothing  # noqa: B018


def test_no_module_hides_a_public_name() -> None:
    """Importing `stillhouse.check` would turn `stillhouse.check` into a module."""
    import pkgutil

    import stillhouse

    assert {module.name for module in pkgutil.iter_modules(stillhouse.__path__)} & set(stillhouse.__all__) == {"distillers"}
