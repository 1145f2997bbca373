"""The recipes that come with the package, by name: those of the checkout, or where an installed wheel put them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).parents[2] / "recipes"


def shipped() -> dict[str, Path]:
    """{name: file} of every recipe that can be named instead of a path."""
    if (CHECKOUT.parent / "pyproject.toml").is_file():
        files = list(CHECKOUT.glob("*.yaml"))
    else:
        try:
            installed = metadata.files("bd3_scale") or []
        except metadata.PackageNotFoundError:  # the package's folder alone was copied
            installed = []
        files = [Path(str(file.locate())) for file in installed if file.match("share/bd3_scale/recipes/*.yaml")]
    return {file.stem: file.resolve() for file in sorted(files)}
