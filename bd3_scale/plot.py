"""Draw the plots of one or several runs again, from their metrics.jsonl.

bd3 plot runs/quickstart                          into runs/quickstart/report/
bd3 plot runs/a runs/b --out comparison           both in the same pictures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bd3_scale.messages import show
from bd3_scale.program import run_program
from bd3_scale.reporting.metrics import read_metrics
from bd3_scale.reporting.plots import draw


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bd3 plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run directory")
    parser.add_argument("--out", type=Path, help="folder of the plots (default for a single run: its report/)")
    options = parser.parse_args(arguments)
    show()
    if options.out is None and len(options.runs) > 1:
        parser.error("several runs need --out FOLDER, so that no run's own plots are overwritten")
    for run in options.runs:
        if not (run / "metrics.jsonl").is_file():
            return _fail(f"{run} holds no metrics.jsonl; name a run directory")
    try:
        lines = {name: read_metrics(run / "metrics.jsonl") for name, run in names(options.runs).items()}
        written = draw(lines, options.out or options.runs[0] / "report")
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}; name folders that can be read and written")
    if not written:
        return _fail(f"{', '.join(map(str, options.runs))}: metrics.jsonl holds no train or validation line yet; wait for the first one")
    print("\n".join(str(path) for path in written))
    return 0


def names(runs: list[Path]) -> dict[str, Path]:
    """A label for each run: the name of its folder, or its path where two folders have one name."""
    last = [run.resolve().name for run in runs]
    return {name if last.count(name) == 1 else str(run): run for name, run in zip(last, runs, strict=True)}


def _fail(text: str) -> int:
    print(f"bd3 plot: error: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    run_program(main)
