"""Local ranks start only for a valid recipe, stop together, and return the code of the first failure."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from launch.cli import main
from launch.start import local
from launch.start.local import check_gpus, free_port, run_ranks
from runtime.errors import RecipeError

ROOT = Path(__file__).parents[3]


def program(text: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text)]


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))


MISTAKES = [
    (
        ["--nproc", "2", "pretrain", "--training.global_batch", "7"],
        "training.global_batch 7 does not divide over 2 ranks",
    ),
    (["--nproc", "0", "pretrain"], "--nproc is 0"),
    (["--nproc", "two", "pretrain"], "'two'"),
    (["--nproc", "2", "pretrain", "--optimizer.lrr", "1"], "did you mean optimizer.lr?"),
    (["--nproc", "2", "pretrain", "--config", "none.yaml"], "none.yaml"),
    (["--nproc", "2", "finetune"], "checkpoint, dataset and data.train are not set"),
    (
        [
            "--nproc",
            "2",
            "finetune",
            "--checkpoint",
            "x",
            "--dataset",
            "x",
            "--data.train",
            "x",
            "--training.global_batch",
            "7",
        ],
        "training.global_batch 7 does not divide over 2 ranks",
    ),
    (["--nproc", "2", "shard"], "'shard'"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_answered_before_anything_starts(nothing_starts, capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "local", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_rank_gets_its_number_and_world_size(tmp_path):
    code = run_ranks(
        program(
            f"""
            import json, os
            names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
            with open(f"{tmp_path}/{{os.environ['RANK']}}", "w") as file:
                json.dump({{name: os.environ[name] for name in names}}, file)
            """
        ),
        3,
    )
    assert code == 0
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in told] == [(str(rank), str(rank)) for rank in range(3)]
    assert {(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["MASTER_ADDR"]) for one in told} == {
        ("3", "3", "127.0.0.1")
    }
    assert len({one["MASTER_PORT"] for one in told}) == 1


WAIT_FOREVER = "import signal; signal.pause()"


def test_the_first_failure_stops_the_others_and_gives_its_code(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "GRACE", 0.0)
    code = run_ranks(
        program(
            f"""
            import os, signal, sys
            open(f"{tmp_path}/{{os.environ['RANK']}}-{{os.getpid()}}", "w").close()
            if os.environ["RANK"] == "1":
                while len(os.listdir("{tmp_path}")) < 3:
                    pass
                sys.exit(7)
            signal.pause()
            """
        ),
        3,
    )
    assert code == 7
    for started in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(started.name.split("-")[1]), 0)


def test_a_killed_rank_has_the_shells_code_for_it(monkeypatch):
    monkeypatch.setattr(local, "GRACE", 0.0)
    kill = "import os, signal\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\nsignal.pause()"
    assert run_ranks([sys.executable, "-c", kill], 2) == 128 + signal.SIGKILL


def test_a_failed_run_gives_a_one_line_error_with_the_ranks_code(monkeypatch, capsys):
    monkeypatch.setattr(local, "run_ranks", lambda command, count: 75)
    assert main(["launch", "local", "--nproc", "2", "pretrain", "--training.global_batch", "8"]) == 75
    assert "pretrain stopped with exit code 75" in capsys.readouterr().err


def test_the_stages_own_arguments_are_passed_on(monkeypatch):
    seen = []
    monkeypatch.setattr(local, "run_ranks", lambda command, count: seen.append((command, count)) or 0)
    assert main(["launch", "local", "--nproc", "4", "pretrain", "--training.global_batch", "8", "--name", "x"]) == 0
    ((command, count),) = seen
    assert count == 4
    assert command[1:] == ["-m", "launch.cli", "pretrain", "--training.global_batch", "8", "--name", "x"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_the_launcher_reaches_every_rank(number, tmp_path):
    """The ranks note the signal, end in their own time with 'start me again', and the launcher says the same."""
    rank = f"""
import os, signal, sys
from pathlib import Path
rank = os.environ["RANK"]
def stop(number, frame):
    Path("{tmp_path}", f"got-{{rank}}-{{number}}").touch()
    sys.exit(75)
signal.signal({int(number)}, stop)
os.write(1, f"{{os.getpid()}}\\n".encode())  # one write: two ranks share the pipe
while True:
    signal.pause()
"""
    launcher = f"import sys\nfrom launch.start.local import run_ranks\nsys.exit(run_ranks([sys.executable, '-c', {rank!r}], 2))"
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    try:
        process.send_signal(number)
        assert process.wait(60) == 75
    finally:
        for pid in [process.pid, *pids]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
    assert {path.name for path in tmp_path.iterdir()} == {f"got-{rank}-{int(number)}" for rank in range(2)}


def test_a_mistake_inside_leaves_no_rank_behind(monkeypatch, tmp_path):
    started = []
    real = subprocess.Popen

    def popen(*arguments, **options):
        if started:
            raise OSError("no more processes")
        started.append(real(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(OSError, match="no more processes"):
        run_ranks([sys.executable, "-c", WAIT_FOREVER], 2)
    assert started[0].poll() == -signal.SIGKILL


def test_the_launchers_own_handlers_come_back():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    assert run_ranks([sys.executable, "-c", ""], 1) == 0
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_free_port_can_be_bound():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's PR_SET_PDEATHSIG")
def test_ranks_end_with_a_launcher_that_is_killed_at_once():
    rank = "import os, signal; os.write(1, f'{os.getpid()}\\n'.encode()); signal.pause()"
    launcher = f"from launch.start.local import run_ranks\nimport sys\nrun_ranks([sys.executable, '-c', {rank!r}], 2)"
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    ends = [os.pidfd_open(pid) for pid in pids]
    try:
        process.kill()
        for end in ends:
            poll = select.poll()  # select.select knows no descriptor above 1,023, and a long test session has them
            poll.register(end, select.POLLIN)
            assert poll.poll(60_000), "a rank runs on without its launcher"
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_gpus("auto", 4)
    check_gpus("cpu", 5)
    with pytest.raises(RecipeError, match="--nproc is 5, but torch sees 4 GPUs"):
        check_gpus("auto", 5)
