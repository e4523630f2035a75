"""`ligature status` describes a run from its folder, with and without SLURM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from launch.cli import main

TRAINING = {"steps": 100, "epochs": 30.0, "global_batch": 32}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"training": TRAINING}))
    lines = [{"step": step, "train/samples_per_second": 64.0, "train/epoch": step / 10} for step in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints" / "latest").write_text("step-00000040\n")
    return folder


def status_lines(capsys, folder: Path) -> dict[str, str]:
    assert main(["status", str(folder)]) == 0
    return {line[:11].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}


def test_status_shows_the_progress_of_a_run(run, capsys):
    lines = status_lines(capsys, run)
    assert lines["step"] == "40 of 100 (40 %)" and lines["rate"] == "2 steps/s, 64 samples/s"
    assert lines["time left"] == "0:30 of training" and lines["checkpoint"].startswith("step-00000040, ")
    assert "job" not in lines and "last error" not in lines


def test_the_total_steps_follow_from_epochs_and_steps_taken(run, capsys):
    (run / "config.yaml").write_text(yaml.safe_dump({"training": TRAINING | {"steps": None}}))
    assert status_lines(capsys, run)["step"] == "40 of 300 (13 %)"  # ten steps an epoch


def test_the_last_error_is_of_the_last_start(run, capsys):
    log = run / "logs" / "n1.log"
    log.write_text(
        "=== job 1 start 0\nligature: the old one\n=== job 1 start 1\nValueError: no\nligature: the disk is full\n"
    )
    assert status_lines(capsys, run)["last error"] == "ligature: the disk is full (n1.log)"
    log.write_text(
        "=== job 1 start 0\nligature: the old one\n=== job 1 start 1\nligature: stopped at step 4 of 9, saved in x\n"
    )
    assert "last error" not in status_lines(capsys, run)  # that it stopped when asked is none


def test_without_slurm_the_job_is_named(run, capsys, monkeypatch):
    (run / "launch").mkdir()
    (run / "launch" / "job.json").write_text('{"job": "7"}')
    monkeypatch.setenv("PATH", "/nowhere")
    assert status_lines(capsys, run)["job"] == "7; no SLURM on this machine to ask"


def test_a_folder_that_is_no_run_gives_a_one_line_error(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "is not a run's folder" in (said := capsys.readouterr().err) and said.count("\n") == 1
