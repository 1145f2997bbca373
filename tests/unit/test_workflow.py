"""What CI on a public host does is what `.ci/run` does, on every Python that the package supports."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_the_workflow_runs_ci_run_on_every_supported_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    job = workflow["jobs"]["run"]
    versions = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    assert job["strategy"]["matrix"]["python"] == versions and len(versions) > 1
    assert set(workflow[True]) == {"push", "pull_request"}, "YAML 1.1 reads `on` as true"
    checkout, python, run = job["steps"]
    assert checkout["uses"].startswith("actions/checkout@") and python["with"]["python-version"] == "${{ matrix.python }}"
    assert run == {"run": ".ci/run"} and os.access(ROOT / ".ci" / "run", os.X_OK)
    assert job["env"]["PYTHON"] == "python${{ matrix.python }}" and "${PYTHON:-python3}" in (ROOT / ".ci" / "run").read_text()
