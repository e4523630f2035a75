"""The log of a run has a line a step, continues from a checkpoint, and ignores a line cut by a crash."""

from __future__ import annotations

import json
import math

import pytest

from runtime.metrics import MetricsLog, read_metrics


def logged(folder, *steps: int, opened_at: int = 0) -> None:
    log = MetricsLog(folder, opened_at)
    for step in steps:
        log.write(step, {"train/loss": 10.0 - step})
    log.close()


def steps_of(folder) -> list[float]:
    return [line["step"] for line in read_metrics(folder)]


def test_lines_come_back_in_order(tmp_path):
    logged(tmp_path, 1, 2)
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 9.0}, {"step": 2, "train/loss": 8.0}]


def test_an_empty_log_is_an_empty_list(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_log_reopened_at_a_step_drops_later_lines(tmp_path):
    logged(tmp_path, 1, 2, 3, 4)
    logged(tmp_path, 3, opened_at=2)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path):
    logged(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert steps_of(tmp_path) == [1]


def test_after_a_cut_line_the_log_goes_on_cleanly(tmp_path):
    logged(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    logged(tmp_path, 2, opened_at=1)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 1.0})
    assert steps_of(tmp_path) == [1]
    log.close()


def test_a_figure_that_is_not_a_number_is_kept(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": math.nan})
    log.close()
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    MetricsLog(tmp_path, 1).close()  # what is kept is written again
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)["loss"] is None


def test_tensorboard_gets_the_same_figures_and_forgets_the_same_steps(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged(tmp_path, 1, 2, 3)
    logged(tmp_path, 3, opened_at=2)
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 9.0), (2, 8.0), (3, 7.0)]
