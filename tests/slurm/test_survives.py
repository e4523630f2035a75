"""A run survives preemption, time limits, lost nodes and crashed ranks with an unchanged result."""

from __future__ import annotations

import math
import os
import shutil
import signal
import statistics
from pathlib import Path

from runtime.checkpoint import verify_checkpoint
from runtime.metrics import read_metrics

EXCLUSIVE = ("--sbatch", '["--exclusive"]')


def losses(folder):
    return [(line["step"], line["train/loss"]) for line in read_metrics(folder)]


def run_time(cluster, job):
    """Seconds since the job's last start."""
    hours, minutes, seconds = cluster.job(job)["RunTime"].split(":")
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds)


def rank_processes(cluster, folder):
    """Processes of ranks of the run in `folder`, by its path in their command line."""
    return [
        process
        for process in cluster.processes()
        if f"{folder}/config.yaml" in (line := Path(f"/proc/{process}/cmdline").read_bytes().decode())
        and "python" in line
    ]


def test_preemption_time_limits_and_lost_nodes_do_not_change_the_result(cluster, ligature):
    # SLURM looks at time limits every 30 s: the run must be longer, however fast this machine is.
    local = ("launch", "local", "--nproc", "2", "pretrain", "--config", "tiny.yaml")
    ligature(*local, "--name", "pace", "--training.steps", "8")
    pace = statistics.median(line["train/samples_per_second"] for line in read_metrics(ligature.run_folder("pace"))[4:])
    steps = max(60, round(60 * pace / 32))
    recipe = ("--config", "tiny.yaml", "--training.steps", str(steps))

    run = ligature.run_folder()
    job = ligature.submit("pretrain", *recipe, "--nodes", "2", "--time", "60", "--stop-before", "100", *EXCLUSIVE)
    said = ligature("launch", "slurm", *recipe, "--gpus-per-node", "0", code=1)
    assert f"is already launched: job {job}" in said and said.count("\n") == 1

    ligature.wait(lambda: ligature.step() >= 3, "three steps")
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--wrap=true"
    ).strip()
    ligature.wait(lambda: cluster.job(job)["Restarts"] == "1", "preemption")
    ligature.wait(lambda: cluster.job(int(urgent))["JobState"] == "COMPLETED", "the urgent job")
    preempted_at = ligature.step()

    ligature.wait(lambda: ligature.step() > preempted_at, "a step of the second start")
    minutes = math.ceil((run_time(cluster, job) + 35) / 60)
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    ligature.wait(lambda: cluster.job(job)["Restarts"] == "2", "the time limit")
    limited_at = ligature.step()
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    ligature.wait(lambda: ligature.step() > limited_at, "a step of the third start")
    lost = cluster.job(job)["BatchHost"]
    cluster.kill_node(lost)
    cluster.run(
        "scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=lost"
    )  # what a site's health check says
    ligature.wait(lambda: cluster.job(job)["Restarts"] == "3", "the loss of a node")
    lost_at = ligature.step()
    ligature.wait(lambda: cluster.job(job)["JobState"] == "RUNNING", "the fourth start")
    assert lost not in cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    assert "RUNNING" in (output := ligature("status", str(run))) and "started 4 times" in output
    ligature.wait((run / "finished.json").exists, "the last step", 600)
    cluster.start_node(lost)

    events = (run / "launch" / "events.log").read_text()
    assert 3 <= preempted_at < limited_at < lost_at < steps
    assert f"job {job} start 0: stopped: asked by a signal (preemption); requeued" in events
    assert f"job {job} start 1: asked to stop: the time limit is near" in events
    assert f"job {job} start 1: stopped: the time limit is near; requeued" in events
    assert f"job {job} start 3: started on" in events and "crashed" not in events
    node_logs = "".join(path.read_text() for path in (run / "logs").glob("n*.log"))
    assert all(f"job {job} start {start} on" in node_logs for start in range(4))  # appended, not overwritten

    ligature(*local, "--training.steps", str(steps), "--name", "undisturbed")
    assert [step for step, _ in losses(run)] == list(range(1, steps + 1))
    assert losses(run) == losses(ligature.run_folder("undisturbed"))
    assert "nothing to do" in ligature("launch", "slurm", *recipe, "--gpus-per-node", "0")


def test_tasks_that_outlive_their_node_are_fenced_off(cluster, ligature):
    """The node of a job is lost to SLURM, but its one rank trains on; the job's next start takes the run from it."""
    recipe = ("--config", "tiny.yaml", "--name", "fenced", "--training.steps", "100000", "--training.global_batch", "4")
    run = ligature.run_folder("fenced")
    job = ligature.submit("pretrain", *recipe, "--training.checkpoint_every", "5", "--time", "60")
    ligature.wait(lambda: (run / "checkpoints" / "latest").exists(), "a checkpoint")
    lost = cluster.job(job)["BatchHost"]
    (ghost,) = rank_processes(cluster, run)
    cluster.kill_node(lost)
    ligature.wait(lambda: cluster.job(job)["Restarts"] == "1", "the loss of a node")
    ligature.wait(
        lambda: f"job {job} start 1: started on" in (run / "launch" / "events.log").read_text(), "the second start"
    )
    ligature.wait(lambda: ghost not in rank_processes(cluster, run), "the end of the ghost")
    ligature.wait((run / "launch" / f"exits-{job}-0").exists, "its exit code")
    events = (run / "launch" / "events.log").read_text()
    assert f"77 rank 0 on {lost}" in (run / "launch" / f"exits-{job}-0").read_text()
    assert "was taken over" in (run / "logs" / f"{lost}.log").read_text()

    before = ligature.step("fenced")
    ligature.wait(lambda: ligature.step("fenced") > before + 5, "steps of the second start")
    assert (
        cluster.job(job)["JobState"] == "RUNNING" and cluster.job(job)["Restarts"] == "1"
    )  # the ghost requeued nothing
    assert "crashed" not in events
    cluster.run("scontrol", "requeue", str(job))  # an administrator's
    ligature.wait(lambda: cluster.job(job)["Restarts"] == "2", "the requeue")
    before = ligature.step("fenced")
    ligature.wait(lambda: ligature.step("fenced") > before, "a step of the third start")
    assert "crashed" not in (run / "launch" / "events.log").read_text()
    cluster.run("scancel", str(job))
    ligature.wait(lambda: cluster.job(job)["JobState"] == "CANCELLED", "the end")
    ligature.wait(lambda: not rank_processes(cluster, run), "the ranks' end")
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == list(range(1, len(steps) + 1))  # one writer at a time
    verify_checkpoint(run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip())
    assert cluster.job(job)["Restarts"] == "2"  # cancelled is cancelled
    cluster.start_node(lost)
    ligature.wait(lambda: set(cluster.node_states().values()) == {"IDLE"}, "all nodes to be idle")


def test_crashes_are_counted_and_the_job_is_held_with_the_reason(cluster, ligature, drawn):
    data = ligature.folder / "data"
    shutil.copytree(drawn / "train", data)
    recipe = ("--config", "tiny.yaml", "--name", "crashing", "--data.train", str(data), "--training.steps", "100000")
    run = ligature.run_folder("crashing")
    job = ligature.submit("pretrain", *recipe, "--nodes", "2", "--max-crashes", "1", "--time", "60")
    ligature.wait(lambda: ligature.step("crashing") >= 1, "a step")
    os.kill(rank_processes(cluster, run)[0], signal.SIGKILL)
    ligature.wait(lambda: cluster.job(job)["Restarts"] == "1", "the first crash")
    shutil.rmtree(data)  # from here on it crashes at every start
    ligature.wait(lambda: "HeldUser" in cluster.job(job)["Reason"] or cluster.job(job)["Priority"] == "0", "the hold")
    events = (run / "launch" / "events.log").read_text()
    assert f"job {job} start 0: crashed with code 137 rank" in events and "(crash 1 of 1); requeued" in events
    assert f"job {job} start 1: crashed with code 1 rank" in events and f"no shard folder {data}" in events
    assert "held after crash 2" in events
    output = ligature("status", str(run))
    assert f"{job} PENDING" in output and "held after crash 2" in output and f"no shard folder {data}" in output
    cluster.run("scancel", str(job))
