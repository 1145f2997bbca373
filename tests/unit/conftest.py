"""What the tests of recipes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.refusing import BASE


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The file of a small recipe that is right."""
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path
