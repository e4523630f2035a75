"""The launcher requests resources from a real SLURM and refuses what it cannot give."""

from __future__ import annotations

import subprocess
import sys

import pytest

HELD = ("--config", "tiny.yaml", "--gpus-per-node", "0", "--sbatch", '["--hold"]')


@pytest.fixture(autouse=True)
def nothing_is_left(cluster):
    yield
    for job in cluster.run("squeue", "--noheader", "--format=%A").split():
        cluster.run("scancel", job)


def test_requests_the_cluster_cannot_serve_are_refused_in_one_line(cluster, ligature):
    mistakes = {
        ("--partition", "mian"): "no partition 'mian'; did you mean main?",
        ("--nodes", "4"): "sbatch refused",
        ("--constraint", "h100"): "sbatch refused",
        ("--sbatch", '["--no-such-option"]'): "sbatch refused",
    }
    for arguments, says in mistakes.items():
        code = 2 if arguments[0] == "--partition" else 1
        said = ligature("launch", "slurm", "--config", "tiny.yaml", "--gpus-per-node", "0", *arguments, code=code)
        assert says in said and said.count("\n") == 1
    assert not (ligature.folder / "runs").exists()
    assert cluster.run("squeue", "--noheader") == ""


def test_a_run_of_another_recipe_is_refused_unless_forced(cluster, ligature):
    cluster.run("scancel", str(ligature.submit("pretrain", *HELD, "--optimizer.lr", "0.2")))
    cluster.run("scancel", str(ligature.submit("pretrain", *HELD)))  # what came to no checkpoint binds nobody
    (ligature.run_folder() / "checkpoints" / "step-20").mkdir(parents=True)
    said = ligature("launch", "slurm", *HELD, "--optimizer.lr", "0.5", code=2)
    assert "belongs to another recipe (optimizer.lr: 0.001 -> 0.5)" in said and said.count("\n") == 1
    assert cluster.run("squeue", "--noheader") == ""
    assert "lr: 0.001" in (config := ligature.run_folder() / "config.yaml").read_text()
    output = ligature("launch", "slurm", *HELD, "--optimizer.lr", "0.5", "--resume-with-changes")
    assert "changed: optimizer.lr: 0.001 -> 0.5" in output and "lr: 0.5" in config.read_text()


def test_of_two_launches_at_once_one_is_refused(cluster, ligature):
    command = [sys.executable, "-m", "launch.cli", "launch", "slurm", *HELD]
    both = [
        subprocess.Popen(
            command,
            cwd=ligature.folder,
            env=ligature.environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], errors
    assert any("is already launched: job" in error or "is being launched by another" in error for error in errors)
    assert len(cluster.run("squeue", "--noheader").splitlines()) == 1


def test_two_jobs_share_a_node_and_each_rank_has_its_cores(cluster, ligature, drawn):
    """As an array of doctors, two ranks each, all on one node: they meet among themselves."""
    (ligature.folder / "jobs.txt").write_text(f"--data {drawn}/train\n--data {drawn}/nothing\n")
    job = ligature.submit(
        "doctor", "--array", "jobs.txt", "--tasks-per-node", "2", "--cpus-per-task", "2", "--sbatch", '["--nodelist=n1"]',
    )  # fmt: skip
    ligature.wait(
        lambda: cluster.run("squeue", "--noheader", "--states=RUNNING", "--nodelist=n1").count("\n") == 2, "both"
    )
    logs = [ligature.folder / f"runs/doctor-{number}/logs/{number}-n1.log" for number in range(2)]
    ligature.wait(lambda: all(log.exists() and "clocks" in log.read_text() for log in logs), "both doctors")
    output = [log.read_text() for log in logs]
    for text in output:
        assert "gloo over 2 ranks" in text and "2 ranks, 2 a node" in text and "(2 requested)" in text
        assert text.count("=== ") == 1
    assert "FAIL" not in output[0] and "no shard folder" in output[1]
    events = [ligature.folder / f"runs/doctor-{number}/launch/events.log" for number in range(2)]
    ligature.wait(lambda: "finished" in events[0].read_text() and "held after" in events[1].read_text(), "both ends")
    ports = [text.read_text().split("ranks meet at ")[1].split()[0] for text in events]
    assert ports[0] != ports[1]
    assert "last error  ligature: 1 of 8 checks failed; the first, data: no shard folder" in ligature(
        "status", str(ligature.folder / "runs/doctor-1")
    )
    cluster.run("scancel", str(job))


def test_slices_of_a_source_become_one_shard_folder(cluster, ligature, drawn):
    """As an array; launched again on the finished folder it changes nothing."""
    source = ("shard", str(drawn / "source/captions_train.json"), "--images", str(drawn / "source/images"))
    shards = ("--out", "shards", "--shard_samples", "16", "--array", "3", "--cpus-per-task", "1")
    manifest, events = ligature.folder / "shards/manifest.json", ligature.folder / "shards.launch/launch/events.log"
    for times in (1, 2):
        ligature.submit(*source, *shards)
        ligature.wait(lambda: events.exists() and events.read_text().count("finished") == 3 * times, "three slices")  # noqa: B023
        if times == 1:
            whole = manifest.read_bytes()
    assert manifest.read_bytes() == whole
    assert sorted(path.name for path in manifest.parent.glob("*.tar")) == [
        f"shard-{number:06}.tar" for number in range(4)
    ]
    assert "crashed" not in events.read_text()


def test_torchrun_passes_the_signal_on(cluster, ligature):
    job = ligature.submit(
        "pretrain", "--config", "tiny.yaml", "--name", "elastic", "--nodes", "2", "--launcher", "torchrun",
        "--training.steps", "100000", "--training.global_batch", "8",
    )  # fmt: skip
    ligature.wait(lambda: ligature.step("elastic") >= 2, "two steps")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    ligature.wait(lambda: cluster.job(job)["Restarts"] == "1", "the requeue")
    run = ligature.run_folder("elastic")
    stopped_at = ligature.step("elastic")
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{stopped_at:08}"
    ligature.wait(lambda: ligature.step("elastic") > stopped_at, "a step of the second start")
    assert "start 0: stopped: the time limit is near; requeued" in (run / "launch" / "events.log").read_text()
    assert f"going on from {run}" in "".join(log.read_text() for log in (run / "logs").glob("n*.log"))


def test_the_stages_after_pretraining_run_as_jobs(cluster, ligature, drawn):
    ligature("pretrain", "--config", "tiny.yaml", "--training.steps", "2", "--training.checkpoint_every", "2")
    runs = ligature.folder / "runs"
    tune = ("--config", "finetune/demo.yaml", "--checkpoint", str(runs / "run"), "--data.train", str(drawn / "train"))
    tune += ("--data.validation", str(drawn / "validation"), "--training.global_batch", "8", "--training.steps", "2")
    job = ligature.submit("finetune", *tune, "--runs", str(runs), "--nodes", "2")
    ligature.wait(lambda: cluster.job(job)["JobState"] == "COMPLETED", "fine-tuning")
    score = ("--config", "finetune/demo_evaluate.yaml", "--checkpoint", str(runs / "finetune"), "--shortlist", "4")
    job = ligature.submit("evaluate", *score, "--data", str(drawn / "test"), "--out", str(runs / "scores.json"))
    ligature.wait(lambda: cluster.job(job)["JobState"] == "COMPLETED", "scoring")
    assert "| dual" in "".join(path.read_text() for path in (runs / "scores.launch" / "logs").glob("*.log"))
    assert (runs / "scores.json").is_file()
