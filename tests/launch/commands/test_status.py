"""`ligature status` describes a run from its folder, with and without SLURM."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from launch.recover.run_status import state
from runtime.lease import Holder, take_lease

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


def test_without_an_argument_all_runs_are_listed(run, capsys, monkeypatch):
    folder = run.parent
    (folder / "runs" / "group").mkdir(parents=True)
    run.rename(folder / "runs" / "group" / "going")
    done = folder / "runs" / "done"
    done.mkdir()
    (done / "config.yaml").write_text(yaml.safe_dump({"training": TRAINING}))
    (done / "finished.json").write_text("{}")
    (folder / "runs" / "group" / "config.yaml").write_text("arms: {}\n")  # an ablation's: no run itself
    (folder / "runs" / "data").mkdir()
    monkeypatch.chdir(folder)
    assert main(["status"]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["run", "state", "step", "time", "left", "checkpoint"]
    assert first.split() == ["runs/done", "finished", "0", "of", "100", "(0", "%)", "none", "yet"]
    assert second.startswith("runs/group/going  stopped   40 of 100 (40 %)  0:30       step-00000040, ")
    assert len({line.find(word) for line, word in ((first, "finished"), (second, "stopped"))}) == 1


def test_a_folder_of_runs_is_listed_as_json_too(run, capsys):
    assert main(["status", "--json", str(run.parent)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["run"] == str(run) and row["state"] == "stopped" and row["step"] == "40 of 100 (40 %)"


def test_a_run_that_a_process_holds_is_running(run, capsys):
    lease = take_lease(run)
    try:
        assert state(run) == "running"
    finally:
        lease.release()
    assert state(run) == "stopped"


def test_a_run_of_a_dead_process_is_stopped_and_one_elsewhere_runs_while_its_heart_beats(run):
    here = Holder.this_process()
    dead = replace(here, pid=here.pid, start="1")
    (run / "lease" / dead.name / dead.work).mkdir(parents=True)
    assert state(run) == "stopped"
    elsewhere = replace(here, machine="another")
    (run / "lease" / dead.name).rename(run / "lease" / elsewhere.name)
    alive = run / "lease" / elsewhere.name / elsewhere.work / "alive"
    alive.parent.mkdir()
    alive.touch()
    assert state(run) == "running"
    os.utime(alive, (1, 1))
    assert state(run) == "stopped"


def test_no_runs_gives_a_one_line_error(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 2
    assert "no runs in runs/ here" in capsys.readouterr().err


def test_watching_shows_the_runs_again_until_ctrl_c(run, capsys, monkeypatch):
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    assert main(["status", str(run), "--watch", "5"]) == 0
    assert waits == [5, 5, 5] and capsys.readouterr().out.count("40 of 100") == 3
    assert main(["status", str(run), "--watch", "0"]) == 2
    assert "--watch is 0" in capsys.readouterr().err
