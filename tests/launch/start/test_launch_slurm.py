"""The batch script requests the stated resources, handles every way ranks end, and wrong options are refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from launch.commands.launch import read_slurm_options
from launch.start.config import SlurmConfig
from launch.start.job import plan_job
from runtime.errors import RecipeError

SITE = ["--gpus-per-node", "0", "--time", "10"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def script(capsys, *arguments: str) -> str:
    assert main(["launch", "slurm", *arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert list(Path.cwd().glob("runs")) == []  # a dry run writes nothing
    return text


def options_of(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def test_the_script_requests_the_stated_resources(capsys):
    asked = ("--nodes", "2", "--gpus-per-node=8", "--cpus-per-task", "12", "--partition", "gpu", "--account", "me")
    text = script(capsys, *asked, "--config", "pretrain/codis_base.yaml", "--name", "big", "--time", "2-00:00:00")
    options = options_of(text)
    assert options | {"nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "12"} == options
    assert options | {"partition": "gpu", "account": "me", "time": "2-00:00:00", "signal": "B:USR1@120"} == options
    assert options["open-mode"] == "append" and "requeue" in options
    assert options["output"] == f"{Path.cwd()}/runs/big/logs/job-%j.log"
    # Since 22.05 srun does not take it over from sbatch: without it all workers of a rank share one core.
    assert "ranks=(\n  srun\n  --export=ALL\n  --kill-on-bad-exit=1\n  --cpus-per-task=12\n" in text
    assert f"command='pretrain --config {Path.cwd()}/runs/big/config.yaml'" in text
    assert "--gpus-per-task" not in text  # it hides the other GPUs of a node, and every rank would see device 0


def test_a_site_file_is_read_and_the_command_line_wins(capsys, tmp_path):
    text = script(
        capsys, "--partition", "mine", "--site", "launch/modules.yaml", "--config", "pretrain/codis_base.yaml"
    )
    assert options_of(text)["partition"] == "mine" and options_of(text)["account"] == "my-project"
    assert "exclusive" in options_of(text)
    before, _, after = text.partition("source ~/ligature/.venv/bin/activate")
    assert "module load gcc/12 cuda/12.4" in before and "set -u" not in before and "set -u" in after
    assert "export NCCL_SOCKET_IFNAME=ib0" in text and "export HF_HUB_OFFLINE=1" in text
    assert "ligature=ligature\n" in text


def test_one_torchrun_a_node_in_a_container(capsys):
    text = script(capsys, "--site", "launch/container.yaml", "--nodes", "4", "--config", "pretrain/codis_base.yaml")
    options = options_of(text)
    assert (
        options["ntasks-per-node"] == "1"
        and options["cpus-per-task"] == str(8 * 12)
        and options["gpus-per-node"] == "8"
    )
    assert "--nproc-per-node=8" in text and "--nnodes=4" in text and "--node-rank=$SLURM_NODEID" in text
    assert "SIGUSR1" in text  # torchrun does not pass it on by itself
    assert "--container-image=/shared/images/ligature.sqsh" in text and f"{Path.cwd()}:{Path.cwd()}" in text
    assert "export RANK=$SLURM_PROCID" not in text  # torchrun says which rank is which


def test_workers_follow_the_cores():
    base = ["launch", "slurm", "--config", "pretrain/codis_base.yaml", "--dry-run"]

    def planned(*arguments):
        options, rest = read_slurm_options([*base[2:], *arguments])
        job, (recipe,) = plan_job("pretrain", rest, options)
        return job.config.cpus_per_task, recipe.data.workers, job.threads

    assert planned("--cpus-per-task", "12") == (12, 11, 1)
    assert planned("--data.workers", "5") == (6, 5, 1)
    assert planned("--cpus-per-task", "12", "--data.workers", "4") == (12, 4, 8)
    slurm_disk = read_slurm_options(["--node-disk", "$TMPDIR", *base[2:]])
    _, (staged,) = plan_job("pretrain", slurm_disk[1], slurm_disk[0])
    assert staged.data.cache.stage and staged.data.cache.folder == "$TMPDIR/ligature-shards"
    assert planned("--cpus-per-task", "4", "--gpus-per-node", "0", "--data.workers", "1") == (4, 1, 3)


def test_an_array_has_a_run_for_each_line(capsys, tmp_path):
    (tmp_path / "arms.txt").write_text("--name full # all of it\n\n--name no-codebook --objectives.codebook.weight 0\n")
    text = script(capsys, "pretrain", "--config", "pretrain/codis_base.yaml", "--array", "arms.txt")
    assert options_of(text)["array"] == "0-1"
    assert f"{tmp_path}/runs/full\n" in text and f"{tmp_path}/runs/no-codebook\n" in text


def test_an_index_is_built_by_all_ranks(capsys, tmp_path):
    arguments = ("index", "--checkpoint", "runs/a", "--data", "shards", "--out", "photos", "--nodes", "2")
    text = script(capsys, *arguments)
    assert options_of(text)["nodes"] == "2" and f"folder={tmp_path}/photos.launch" in text
    assert "index --checkpoint runs/a --data shards --out photos" in text


def test_shards_are_written_in_slices(capsys, tmp_path):
    arguments = ("shard", "captions.json", "--out", "shards", "--array", "16")
    text = script(capsys, *arguments, "--gpus-per-node", "0", "--cpus-per-task", "4")
    assert options_of(text)["array"] == "0-15" and "$SLURM_ARRAY_TASK_ID/16" in text
    assert f"folder={tmp_path}/shards.launch" in text


MISTAKES = {
    "batch": (
        ["--nodes", "3", "--gpus-per-node", "8", "--training.global_batch", "100"],
        "100 does not divide over 24",
    ),
    "key": (["--gpu-per-node", "8"], "gpu-per-node"),
    "stage": (["pretran"], "did you mean pretrain?"),
    "value": (["--nodes"], "--nodes has no value"),
    "number": (["--nodes", "0"], "nodes is 0"),
    "tasks": (["--gpus-per-node", "4", "--tasks-per-node", "2"], "there is one rank a GPU"),
    "time": (["--time", "soon"], "write it as SLURM does"),
    "short": (["--time", "2"], "leaves nothing before stop_before"),
    "array": (["--array", "none.txt"], "no such file"),
    "slices": (["--array", "4"], "only `shard` is cut into slices"),
    "site": (["--site", "nowhere.yaml"], "nowhere.yaml"),
    "image": (["--container.kind", "pyxis"], "give both, or neither"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gives_a_one_line_error_and_nothing_is_written(capsys, tmp_path, case):
    arguments, says = MISTAKES[case]
    assert main(["launch", "slurm", *arguments, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_there_gives_a_one_line_error(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "slurm", *SITE, "--name", "x"]) == 1
    said = capsys.readouterr().err
    assert "no sbatch on this machine" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_times_are_read_as_slurm_reads_them():
    for text, seconds in {"90": 5400, "10:30": 630, "24:00:00": 86400, "2-12": 216000, "1-00:30:00": 88200}.items():
        assert SlurmConfig(time=text).seconds == seconds
    with pytest.raises(RecipeError, match="in quotes"):
        SlurmConfig(time=yaml.safe_load("24:00:00"))


# A cluster of two shell scripts: `srun` runs the ranks' command once, `scontrol` answers from a file and writes down what it is told.
SCONTROL = """#!/bin/bash
case "$*" in
  "show hostnames"*) echo node1 ;;
  *"show node"*) echo "NodeName=node1 NodeAddr=127.0.0.1 State=IDLE" ;;
  *"show job"*) cat "$FAKE/job" ;;
  *) echo "$*" >> "$FAKE/told" ;;
esac
"""
SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURMD_NODENAME=node1
exec "$@"
"""
RANK = """#!/bin/bash
echo "place $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"
shell=$(ps -o ppid= -p $PPID) # what SLURM knows of the rank: it has a subshell
batch=$(ps -o ppid= -p $shell)
eval "$FAKE_RANK"
"""


class FakeCluster:
    """Runs the batch script as a node would, with `ligature` a shell line of ours."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        for name, program in {"scontrol": SCONTROL, "srun": SRUN, "ligature": RANK}.items():
            (folder / name).write_text(program)
            (folder / name).chmod(0o755)
        self.text = "\n".join(
            f"ligature={folder}/ligature" if "ligature=" in line[:9] else line for line in text.splitlines()
        )

    def run(
        self, rank: str, start: int = 0, now: str = "JobState=RUNNING Reason=None Restarts={start}"
    ) -> tuple[int, list[str]]:
        """Run a start whose rank does `rank`. -> its exit code, and what SLURM was told."""
        (self.folder / "job").write_text(f"JobId=7 {now.format(start=start)} Requeue=1\n")
        (self.folder / "told").unlink(missing_ok=True)
        environment = os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}", "FAKE": str(self.folder)}
        environment |= {"FAKE_RANK": rank, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
        environment |= {"SLURM_RESTART_COUNT": str(start)} if start else {}
        done = subprocess.run(["bash", "-c", self.text], env=environment, capture_output=True, text=True, check=False)
        told = self.folder / "told"
        return done.returncode, told.read_text().splitlines() if told.exists() else []

    def log(self) -> str:
        return (Path.cwd() / "runs/x/logs/node1.log").read_text()


@pytest.fixture
def fake(capsys, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    return FakeCluster(folder, script(capsys, *SITE, "--name", "x", "--max-crashes", "2"))


def test_a_rank_gets_its_number_and_a_finished_job_is_not_requeued(fake):
    assert fake.run("true") == (0, [])
    address, port = fake.log().split()[-2:]
    assert (
        fake.log().splitlines()[-1].startswith("place 0 1 0 1 ")
        and address == "127.0.0.1"
        and 20000 <= int(port) < 32100
    )


def test_two_jobs_on_a_node_meet_at_two_ports(fake):
    fake.run("true")
    first = int(fake.log().split()[-1])
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        fake.run("true")
    assert int(fake.log().split()[-1]) == first + 1
    assert fake.log().count("=== ") == 2  # appended


@pytest.mark.parametrize(
    ("rank", "told"),
    [
        ("exit 75", ["requeue 7"]),  # stopped at a step boundary
        ("kill -TERM $$", ["requeue 7"]),  # asked before it could listen
        ("exit 2", []),  # a mistake in the recipe: the next start would make it again
        ("exit 69", []),  # another process has the run
        ("exit 77", []),
        ("exit 1", ["requeue 7"]),  # the first crash of two that are forgiven
        ("kill -KILL $$", ["requeue 7"]),
    ],
)
def test_how_ranks_end_decides_what_follows(fake, rank, told):
    code, said = fake.run(rank)
    assert code != 0 and said == told


def test_after_so_many_crashes_the_job_is_held_with_the_reason(fake):
    crash = "echo 'ligature: the disk is on fire'; exit 1"
    for start in range(2):
        assert fake.run(crash, start)[1] == ["requeue 7"]
    assert fake.run("exit 75", 2)[1] == ["requeue 7"]  # being asked to stop is no crash
    said = fake.run(crash, 3)[1]
    assert (
        said[-1] == "requeuehold 7"
        and "the disk is on fire" in said[0]
        and said[0].startswith("update JobId=7 Comment=")
    )
    assert fake.run(crash, 4)[1] == ["requeue 7"]  # released by hand: it counts from the start again


@pytest.mark.parametrize(
    "now", ["JobState=CANCELLED Restarts=0", "JobState=RUNNING Restarts=1", "JobState=PENDING Restarts=1"]
)
def test_a_start_that_slurm_has_given_up_requeues_nothing(fake, now):
    assert fake.run("exit 75", now=now)[1] == []
    assert fake.run("exit 1", now=now)[1] == []


def test_the_signal_before_the_limit_reaches_the_rank_and_requeues(fake):
    # The rank asks the batch script to stop, as SLURM would; `srun` becomes the rank's shell, so it gets USR1.
    rank = "trap 'echo heard; exit 75' USR1; kill -USR1 $batch; for i in {1..100}; do read -t 0.05 < <(:); done; exit 9"
    code, said = fake.run(rank)
    assert code == 75 and said == ["requeue 7"] and "heard" in fake.log().splitlines()
    assert "the time limit is near" in (Path.cwd() / "runs/x/launch/events.log").read_text()


@pytest.mark.parametrize("number", ["TERM", "USR1"])
def test_a_signal_to_the_ranks_shell_alone_reaches_what_it_runs(fake, number):
    """So SLURM does it where processes are tracked by cgroups. More signals meanwhile change nothing, and the code is the rank's."""
    rank = f"trap 'echo heard {number}' {number}; trap 'exit 75' USR2; kill -{number} $shell; for i in {{1..20}}; do read -t 0.05 < <(:); done"
    code, said = fake.run(f"{rank}; kill -{number} $shell; kill -USR2 $$; exit 9")
    assert code == 75 and said == ["requeue 7"]
    assert f"heard {number}" in fake.log().splitlines()
    assert [
        line for line in (Path.cwd() / "runs/x/launch").glob("exits-*") for line in line.read_text().splitlines()
    ] == ["75 rank 0 on node1"]


def test_a_rank_too_slow_for_the_limit_is_requeued_all_the_same(fake):
    # As seen in SLURM 22.05: at the limit the script gets SIGTERM, and the job no longer counts as running.
    now = "JobState=COMPLETING Reason=TimeLimit Restarts={start}"
    assert fake.run("kill -TERM $batch; exit 9", now=now) == (9, ["requeue 7"])
    cancelled = "JobState=COMPLETING Reason=None Restarts={start}"
    assert fake.run("kill -TERM $batch; exit 9", now=cancelled) == (9, [])


def test_a_stage_that_cannot_resume_is_not_requeued_at_its_time_limit(capsys, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    asked = [
        "evaluate",
        "--checkpoint",
        "c",
        "--data",
        "d",
        "--dataset",
        "x",
        "--split",
        "dev",
        "--out",
        "runs/x/s.json",
    ]
    fake = FakeCluster(folder, script(capsys, *SITE, *asked))
    limit = "JobState=COMPLETING Reason=TimeLimit Restarts={start}"
    assert fake.run("kill -TERM $batch; exit 143", now=limit) == (143, [])
    near = "trap 'exit 138' USR1; kill -USR1 $batch; for i in {1..10}; do read -t 0.05 < <(:); done; exit 0"
    assert fake.run(near) == (0, [])  # it is left to finish
    assert fake.run("kill -TERM $batch; exit 143")[1] == ["requeue 7"]  # preempted: it may have its time yet
