"""A run survives what a cluster does to it: preemption, time limits, lost nodes, crashed ranks; and ends as if undisturbed."""

from __future__ import annotations

import os
import signal

from runtime.metrics import read_metrics

STEPS = 150


def losses(folder):
    return [(line["step"], line["train/loss"]) for line in read_metrics(folder)]


def test_a_preempted_limited_and_bereft_run_ends_as_an_undisturbed_one(cluster, ligature):
    run = ligature.run_folder()
    job = ligature.submit(
        "pretrain",
        "--config",
        "tiny.yaml",
        "--nodes",
        "2",
        "--time",
        "60",
        "--stop-before",
        "50",
        "--sbatch",
        '["--exclusive"]',
    )
    said = ligature("launch", "slurm", "--config", "tiny.yaml", "--gpus-per-node", "0", code=1)
    assert f"is already launched: job {job}" in said and said.count("\n") == 1

    ligature.wait(lambda: ligature.step() >= 3, "three steps")
    other = cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--wrap=true").strip()
    ligature.wait(lambda: cluster.job(job)["Restarts"] == "1", "preemption")
    ligature.wait(lambda: cluster.job(int(other))["JobState"] == "COMPLETED", "the urgent job")
    preempted_at = ligature.step()

    # The start may last a minute from here on, of which all but 10 s are for stopping: the limit strikes while the ranks work.
    ligature.wait(lambda: ligature.step() > preempted_at, "a step of the second start")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    ligature.wait(lambda: cluster.job(job)["Restarts"] == "2", "the time limit")
    limited_at = ligature.step()
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    ligature.wait(lambda: cluster.job(job)["JobState"] == "RUNNING", "the third start")
    lost = cluster.job(job)["BatchHost"]
    ligature.wait(lambda: ligature.step() > limited_at, "a step of the third start")
    cluster.kill_node(lost)
    ligature.wait(lambda: cluster.job(job)["Restarts"] == "3", "the loss of a node")
    ligature.wait(lambda: cluster.job(job)["JobState"] == "RUNNING", "the fourth start")
    assert lost not in cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    ligature.wait((run / "finished.json").exists, "the last step", 600)
    cluster.start_node(lost)

    events = (run / "launch" / "events.log").read_text()
    assert 3 <= preempted_at < limited_at < STEPS
    assert f"job {job} start 0: stopped: asked by a signal (preemption); requeued" in events
    assert f"job {job} start 1: asked to stop: the time limit is near" in events
    assert f"job {job} start 3: started on" in events and "crashed" not in events
    node_logs = "".join(path.read_text() for path in (run / "logs").glob("n*.log"))
    assert all(f"job {job} start {start} on" in node_logs for start in range(4))  # appended, not overwritten

    local = ("launch", "local", "--nproc", "2", "pretrain", "--config", "tiny.yaml", "--name", "undisturbed")
    ligature(*local)
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(ligature.run_folder("undisturbed"))
    assert "nothing to do" in ligature("launch", "slurm", "--config", "tiny.yaml", "--gpus-per-node", "0")
