"""Curves of runs as one picture: every run that has figures is drawn, an empty one is refused."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from finetune.report.curves import plot_curves
from runtime.errors import DataError


def write_metrics(folder, steps) -> None:
    folder.mkdir()
    lines = [{"step": step, "train/loss": 1.0 / step, "validation/image_to_text_R@10": 5.0 * step} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_of_two_runs_are_one_picture(tmp_path):
    write_metrics(tmp_path / "first", range(1, 9))
    write_metrics(tmp_path / "second", range(1, 5))
    plot_curves([tmp_path / "first"], tmp_path / "one.png")
    plot_curves([tmp_path / "first", tmp_path / "second"], tmp_path / "two.png")
    one, two = (Image.open(tmp_path / name).convert("RGB") for name in ("one.png", "two.png"))
    assert one.size == two.size == (1350, 675)
    assert one.tobytes() != two.tobytes(), "the second run is drawn"


def test_a_run_without_figures_is_refused(tmp_path):
    write_metrics(tmp_path / "first", range(1, 3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no metrics.jsonl, or nothing in it yet"):
        plot_curves([tmp_path / "first", tmp_path / "empty"], tmp_path / "out.png")
