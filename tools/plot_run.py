"""Draw the plots of one or several runs again, from their metrics.jsonl.

python tools/plot_run.py runs/quickstart
python tools/plot_run.py runs/a runs/b --out comparison
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bd3_scale.runtime.metrics import read_metrics
from bd3_scale.runtime.plots import draw


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, help="folder of the plots (default: report/ in the first run)")
    options = parser.parse_args(arguments)
    for run in options.runs:
        if not (run / "metrics.jsonl").is_file():
            print(f"plot_run: error: {run} holds no metrics.jsonl; name a run directory", file=sys.stderr)
            return 1
    written = draw({run.name: read_metrics(run / "metrics.jsonl") for run in options.runs}, options.out or options.runs[0] / "report")
    print("\n".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
