"""Files are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import LigatureError
from runtime.files import committed_folder, read_json, replaced_file, sha256_of, write_json, write_text

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_replaced_file_appears_whole(tmp_path):
    with replaced_file(tmp_path / "deep" / "note") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "deep" / "note").exists()
    assert (tmp_path / "deep" / "note").read_text() == "new"
    assert names(tmp_path / "deep") == {"note"}


def test_a_failure_keeps_the_old_file_and_no_leftovers(tmp_path):
    write_text(tmp_path / "note", "old")
    with pytest.raises(ZeroDivisionError), replaced_file(tmp_path / "note") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "note").read_text() == "old"
    assert names(tmp_path) == {"note"}


def test_a_failure_leaves_nothing_of_a_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), committed_folder(tmp_path / "folder") as temporary:
        (temporary / "part").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == set()


def test_a_committed_folder_appears_whole(tmp_path):
    with committed_folder(tmp_path / "runs" / "folder") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "part").write_text("all")
        assert names(tmp_path / "runs") == {temporary.name}
    assert (tmp_path / "runs" / "folder" / "inner" / "part").read_text() == "all"
    assert names(tmp_path / "runs") == {"folder"}


def test_a_committed_folder_is_never_written_into_again(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "part").write_text("first")
    with pytest.raises(LigatureError, match="cannot write"), committed_folder(tmp_path / "folder") as temporary:
        (temporary / "part").write_text("second")
    assert (tmp_path / "folder" / "part").read_text() == "first"
    assert names(tmp_path) == {"folder"}


def test_leftovers_of_a_killed_process_do_not_enter_the_folder(tmp_path):
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".folder.partial" / "half").write_text("of the past")
    with committed_folder(tmp_path / "folder") as temporary:
        (temporary / "part").write_text("new")
    assert names(tmp_path / "folder") == {"part"}


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_full_disk_gives_a_one_line_error_that_names_the_file(tmp_path, monkeypatch, where):
    monkeypatch.setattr(where, full_disk)
    with pytest.raises(LigatureError) as error:
        write_json(tmp_path / "state.json", {"step": 1})
    message = one_line(error)
    assert str(tmp_path / "state.json") in message and "No space left" in message and "free some space" in message
    assert names(tmp_path) == set()


def test_a_full_disk_leaves_nothing_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(LigatureError, match="No space left"), committed_folder(tmp_path / "folder") as temporary:
        (temporary / "part").write_text("all")
    assert names(tmp_path) == set()


def test_a_file_in_the_place_of_a_folder_gives_a_one_line_error(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(LigatureError) as error:
        write_text(tmp_path / "runs" / "config.yaml", "name: x")
    assert str(tmp_path / "runs" / "config.yaml") in one_line(error)


@pytest.mark.parametrize("manager", ["replaced_file", "committed_folder"])
def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path, manager):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        f"from runtime.files import {manager}\n"
        f"with {manager}(Path(sys.argv[1])) as temporary:\n"
        "    part = temporary / 'part' if temporary.is_dir() else temporary\n"
        "    part.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path / "final")], cwd=ROOT, check=False)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "final").exists()
    assert all(name.startswith(".") and name.endswith(".partial") for name in names(tmp_path))


def test_json_survives_writing_and_reading_with_any_letters(tmp_path):
    value = {"words": "café, 犬", "numbers": [1, 0.1, None]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert "犬" in (tmp_path / "value.json").read_text(encoding="utf-8")


def test_json_refuses_what_is_not_json(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no file"), (b'{"cut": ', "not valid JSON"), (b"\xff\xfe{}", "not valid JSON"), (b"", "not valid JSON")],
    ids=["missing", "cut", "not UTF-8", "empty"],
)
def test_json_that_cannot_be_read_gives_a_one_line_error_with_its_name(tmp_path, content, says):
    path = tmp_path / "state.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LigatureError, match=says) as error:
        read_json(path)
    assert str(path) in one_line(error)


def test_a_folder_in_the_place_of_json_gives_a_one_line_error(tmp_path):
    with pytest.raises(LigatureError, match="cannot read"):
        read_json(tmp_path)


def test_the_hash_is_sha256_of_all_blocks(tmp_path):
    content = os.urandom((1 << 20) + 7)
    (tmp_path / "large").write_bytes(content)
    assert sha256_of(tmp_path / "large") == hashlib.sha256(content).hexdigest()
