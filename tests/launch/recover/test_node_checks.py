"""`ligature doctor` reports faults of a node and what to do about them."""

from __future__ import annotations

import socket

from launch.cli import main
from launch.recover import node_checks


def test_versions_that_do_not_fit_are_named(monkeypatch):
    from importlib import metadata

    assert node_checks.check_versions().level == "ok"
    true = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "torch" else true(name))
    found = node_checks.check_versions()
    assert found.level == "FAIL" and "needs torch" in found.text and "not 0.1" in found.text


def test_a_full_slow_or_closed_disk_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks, "WRITTEN", node_checks.MIB)
    (found,) = node_checks.check_disk(tmp_path / "not" / "there" / "yet")
    assert found.level == "ok" and str(tmp_path) in found.text and list(tmp_path.iterdir()) == []
    full = node_checks.shutil.disk_usage(tmp_path)._replace(free=node_checks.GIB)
    monkeypatch.setattr(node_checks.shutil, "disk_usage", lambda _: full)
    (found,) = node_checks.check_disk(tmp_path)
    assert found.level == "FAIL" and "free some" in found.text


def test_truncated_shards_are_reported(drawn, tmp_path):
    import shutil

    assert node_checks.check_data(drawn / "test").level == "ok"
    copy = tmp_path / "copy"
    shutil.copytree(drawn / "test", copy)
    shard = next(copy.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    found = node_checks.check_data(copy)
    assert found.level == "FAIL" and shard.name in found.text


def test_clocks_that_differ_name_the_rank():
    assert node_checks.check_clocks([5.0, 5.0004]).level == "ok"
    found = node_checks.check_clocks([15.0, 5.0, 15.0])
    assert found.level == "warn" and "10.0 s" in found.text and "rank 1" in found.text


def test_ranks_that_cannot_meet_say_what_to_do(capfd, monkeypatch):
    """Rank 1 of two, alone: nobody answers at its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(node_checks, "PATIENCE", 1)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "FAIL" in (said := capfd.readouterr().out) and "all-reduce" in said and "network_interface" in said
