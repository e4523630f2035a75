"""The guard against slowness: figures outside their bounds are listed, and every bound belongs to an existing benchmark."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.__main__ import SHORT, list_outside
from benchmarks.ratios import Ratios

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_figures_outside_their_bounds_are_listed():
    expected = {"speed": {"at_least": 2.0}, "time": {"at_most": 1.0}}
    assert list_outside({"speed": 2.0, "time": 1.0, "other": 9.0}, expected) == []
    assert list_outside({"speed": 1.9, "time": 1.1}, expected) == [
        'speed: 1.9, expected {"at_least": 2.0}',
        'time: 1.1, expected {"at_most": 1.0}',
    ]
    assert list_outside({"speed": float("nan"), "time": 0.0}, expected) == ['speed: nan, expected {"at_least": 2.0}']
    assert list_outside({"speed": 3.0}, expected) == ["time: the benchmark no longer gives this figure"]


def test_every_benchmark_has_a_short_form_and_bounds():
    expected = json.loads((FOLDER / "expected.json").read_text())
    files = {path.stem for path in FOLDER.glob("*.py")} - {"flops", "ratios", "__main__"}
    assert set(expected) == set(SHORT) == files
    assert all(set(bounds) <= {"at_least", "at_most"} for figures in expected.values() for bounds in figures.values())


def test_a_ratio_short_of_its_aim_gives_exit_code_1(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGATURE_RATIOS", str(tmp_path / "ratios.json"))
    ratios = Ratios()
    ratios.record("speed", 3.0, at_least=2.0)
    assert ratios.close() == 0
    ratios.record("time", 3.0, at_most=2.0, unit="s")
    assert ratios.close() == 1
    assert json.loads((tmp_path / "ratios.json").read_text()) == {"speed": 3.0, "time": 3.0}
    assert "time: 3 s (aim: at most 2, short of it)" in capsys.readouterr().out
