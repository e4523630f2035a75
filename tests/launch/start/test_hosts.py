"""Ranks on several machines over ssh: here a program of that name, which runs the line it is given on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from launch.cli import main
from launch.start.hosts import Host, read_hosts, run_hosts
from launch.start.local import free_port
from runtime.errors import RecipeError

ROOT = Path(__file__).parents[3]
SSH = """#!/bin/bash
[ "$1 $2" = "-o BatchMode=yes" ] || exit 255
echo "$3" >> "$(dirname "$0")/hosts"
exec env -i PATH="$PATH" sh -c "$4" # ssh passes no variables on
"""


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return folder


def program(text: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text)]


def test_every_rank_gets_its_number_on_its_machine(ssh, tmp_path):
    told = program(
        """
        import json, os
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
        open(f"rank-{os.environ['RANK']}", "w").write(json.dumps([os.environ[name] for name in names]))
        """
    )
    port = free_port()
    assert run_hosts([Host("a", 2), Host("b", 1)], told, port) == 0
    places = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(3)]
    assert places == [
        [str(r), str(local), "3", str(n), "a", str(port)] for r, local, n in [(0, 0, 2), (1, 1, 2), (2, 0, 1)]
    ]
    assert sorted((ssh / "hosts").read_text().split()) == ["a", "b"]


def test_a_failure_is_reported_and_ends_the_others(ssh, monkeypatch):
    monkeypatch.setattr("launch.start.hosts.GRACE", 1.0)
    code = program("import os, sys, signal\nsys.exit(3) if os.environ['RANK'] == '1' else signal.pause()")
    assert run_hosts([Host("a", 1), Host("b", 1)], code, free_port()) == 3


def test_a_request_to_stop_reaches_every_rank(ssh, tmp_path):
    rank = """
        import os, signal, sys
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
        open("ready-" + os.environ["RANK"], "w").close()
        while True:
            signal.pause()
        """
    parent = f"""
        from launch.start.hosts import Host, run_hosts
        raise SystemExit(run_hosts([Host("a", 1), Host("b", 1)], {program(rank)!r}, {free_port()}))
        """
    process = subprocess.Popen(program(parent))
    while process.poll() is None and not all((tmp_path / f"ready-{rank}").exists() for rank in range(2)):
        pass
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75


def test_a_hostfile_is_read(tmp_path):
    (tmp_path / "hosts").write_text("# the cluster\nnode1 slots=8\nnode2 # small\n\n")
    assert read_hosts(tmp_path / "hosts") == [Host("node1", 8), Host("node2", 1)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no machine"),
        ("a slots=x", "line 1: 'a slots=x'"),
        ("a\na", "twice"),
        ("-oProxyCommand=x", "no machine"),
    ],
)
def test_a_wrong_hostfile_gives_a_one_line_error(tmp_path, text, says):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(RecipeError, match=says):
        read_hosts(tmp_path / "hosts")


def test_a_batch_that_does_not_divide_starts_nothing(ssh, tmp_path, capsys):
    (tmp_path / "hosts").write_text("a slots=2\nb\n")
    arguments = ["launch", "hosts", "--hostfile", "hosts", "pretrain", "--training.global_batch", "8"]
    assert main(arguments) == 2
    assert "8 does not divide over 3 ranks" in capsys.readouterr().err and not (ssh / "hosts").exists()


def test_a_stage_without_training_is_started_too(ssh, tmp_path, capsys):
    (tmp_path / "hosts").write_text("a\n")
    recipe = ["--checkpoint", str(tmp_path / "nothing"), "--data", str(tmp_path / "images")]
    assert main(["launch", "hosts", "--hostfile", "hosts", "index", *recipe]) != 0
    assert (ssh / "hosts").read_text().split() == ["a"]
    assert "index stopped with exit code" in capsys.readouterr().err
