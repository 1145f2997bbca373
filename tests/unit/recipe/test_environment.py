"""Machines that are set up otherwise: train, sample and doctor work there, or one line says what to set."""

from __future__ import annotations

import getpass
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_scale.errors import RecipeError
from bd3_scale.files import expanded
from bd3_scale.recipe import settle


@pytest.mark.parametrize("command", ["train", "sample", "doctor"])
def test_a_locale_without_utf8_is_one_line(command: str, base: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-m", f"bd3_scale.{command}", str(base)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "set PYTHONUTF8=1" in done.stderr and done.stderr.count("\n") == 1


def test_a_uid_without_a_passwd_entry_has_a_name_and_maybe_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "LOGNAME", "LNAME", "USERNAME", "USER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USER", "")
    settle()
    assert getpass.getuser() == f"uid-{os.getuid()}"  # for the compiler's cache
    with pytest.raises(RecipeError, match=r"~/data: .* has no home directory; set HOME"):
        expanded("~/data")
    assert expanded("data") == Path("data")
