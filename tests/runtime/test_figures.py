"""Figures are drawn without a screen, written whole, and closed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from runtime.errors import LigatureError
from runtime.figures import new_figure, pyplot, save_figure


def test_figures_need_no_screen(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    assert pyplot().get_backend().lower() == "agg"


def test_a_figure_is_a_grid_of_panels():
    figure, axes = new_figure(2, 3, figsize=(6, 4))
    assert axes.shape == (2, 3) and tuple(figure.get_size_inches()) == (6, 4)
    pyplot().close(figure)
    figure, axes = new_figure()
    assert axes.shape == (1, 1)
    pyplot().close(figure)


def test_a_saved_figure_is_a_whole_png_and_closed(tmp_path):
    figure, axes = new_figure(figsize=(2, 1))
    axes[0][0].plot([0, 1], [0, 1])
    save_figure(figure, tmp_path / "curve", dpi=50)
    with Image.open(tmp_path / "curve") as picture:
        assert picture.format == "PNG" and picture.size == (100, 50)
    assert [path.name for path in tmp_path.iterdir()] == ["curve"]
    assert not pyplot().fignum_exists(figure.number)


def test_a_figure_that_cannot_be_written_gives_a_one_line_error(tmp_path):
    (tmp_path / "curve.png").mkdir()
    figure, _ = new_figure(figsize=(1, 1))
    with pytest.raises(LigatureError, match="curve.png"):
        save_figure(figure, tmp_path / "curve.png")
    assert not pyplot().fignum_exists(figure.number)


def test_matplotlib_is_imported_with_the_first_figure_only():
    code = "import sys, runtime.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
