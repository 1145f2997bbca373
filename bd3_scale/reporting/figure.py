"""An empty figure: where all plots of the package and its tools begin.

Invariant: no display is needed and pyplot's global state is not touched, so that plots are safe in a training and beside a user's own
figures; matplotlib is imported where the first figure is made.
"""

from __future__ import annotations

from typing import Any


def empty_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of so many inches on the Agg canvas, whose axes make room for their labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
