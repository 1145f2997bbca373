"""Warnings and notes: what a command's user sees of them, and what a program does that imports the package."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from bd3_scale.messages import log, show


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    log.info("step 10: validation")
    log.warning("the disk of %s is slow", "node-7")
    return capsys.readouterr().err.splitlines()


def test_a_command_shows_warnings_as_such_and_notes_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show()
    show()  # a command inside a command says nothing twice
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert said(capsys) == ["step 10: validation", "bd3_scale: warning: the disk of node-7 is slow"]
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert said(capsys) == ["step 10: validation", "bd3_scale: warning: [rank 3] the disk of node-7 is slow"]
    show(note="bd3_scale: ")
    assert said(capsys)[0] == "bd3_scale: step 10: validation"


def test_records_know_their_rank(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    log.warning("slow")
    (record,) = caplog.records
    assert (record.name, record.levelno, record.rank) == ("bd3_scale", logging.WARNING, 5)  # type: ignore[attr-defined]


def test_a_program_has_what_python_does_by_itself_and_its_own_handlers() -> None:
    def stderr_of(program: str) -> str:
        lines = f"import logging, bd3_scale.messages\nlog = bd3_scale.messages.log\n{program}\nlog.info('a note')\nlog.warning('a warning')"
        return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True).stderr

    assert stderr_of("") == "a warning\n"
    assert stderr_of("logging.basicConfig(level='INFO', format='%(rank)d %(message)s')") == "0 a note\n0 a warning\n"
    assert stderr_of("log.setLevel('ERROR')") == ""
