"""The one place that chooses matplotlib's backend: figures are drawn without a screen and written as PNG.

    figure, axes = new_figure(2, 3, figsize=(15, 7.5))
    axes[0][0].plot(steps, losses)
    save_figure(figure, Path("curves.png"), dpi=90)

Nothing is imported before the first figure, because matplotlib takes about a second to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.files import replaced_file


def pyplot() -> Any:
    """Return matplotlib's pyplot with a backend that needs no screen, for what the functions below do not cover."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def new_figure(rows: int = 1, columns: int = 1, **settings: Any) -> tuple[Any, Any]:
    """Make an empty figure. `save_figure` writes it and closes it.

    Args:
        rows: rows of panels.
        columns: columns of panels.
        settings: further arguments of `pyplot.subplots`, such as `figsize` in inches.

    Returns:
        The figure, and its axes as an array (rows, columns), a single panel included.
    """
    return pyplot().subplots(rows, columns, squeeze=False, **settings)


def save_figure(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG, complete or not at all, and close it.

    Raises:
        LigatureError: the file cannot be written.
    """
    try:
        with replaced_file(path) as temporary:
            figure.savefig(temporary, dpi=dpi, format="png")
    finally:
        pyplot().close(figure)
