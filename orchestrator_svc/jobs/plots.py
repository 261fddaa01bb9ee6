"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_lines(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], *, title: str, ylabel: str) -> None:
    """Draws (step, value) curves into a PNG file; the folder is made. Empty curves are left out. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, points in curves.items():
        if points:
            # A curve of one or two points would be invisible as a line.
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 10 else None)
    axes.set(title=title, xlabel="optimiser step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    if any(curves.values()):
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
