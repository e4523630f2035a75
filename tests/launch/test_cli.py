"""The command: help at once, a mistake in one line with its exit code, nothing written before it is answered."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.table import COMMANDS
from runtime.errors import DataError, Interrupted, LigatureError, RecipeError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def answer(capsys, tmp_path, monkeypatch):
    """answer(*arguments) -> (exit code, the one line on stderr); run in an empty folder that stays empty."""
    monkeypatch.chdir(tmp_path)

    def ask(*arguments: str) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert captured.err.startswith("ligature: ") and captured.err.count("\n") == 1, captured.err
        assert list(tmp_path.iterdir()) == []
        return code, captured.err.strip()

    return ask


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_help_lists_every_command(capsys, arguments):
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in COMMANDS)


def test_help_takes_a_command_and_a_group(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["help", "pretrain", "optimizer"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out.startswith("optimizer: AdamW and its learning-rate schedule.")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert f"usage: ligature {command}" in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "meant"), [("pretrian", "pretrain"), ("evalute", "evaluate"), ("shards", "shard")])
def test_an_unknown_command_is_answered_with_the_nearest(answer, typed, meant):
    assert answer(typed) == (2, f"ligature: no command `{typed}`; did you mean {meant}?")


def test_a_command_like_no_other_is_sent_to_help(answer):
    assert answer("zzz") == (2, "ligature: no command `zzz`; `ligature --help` lists them")


def test_a_missing_caption_file_is_named(answer, tmp_path):
    code, line = answer("shard", tmp_path / "captions.json", "--out", tmp_path / "out")
    assert code == 1 and str(tmp_path / "captions.json") in line


def test_sharding_without_out_is_refused(answer):
    code, line = answer("shard", "captions.json")
    assert code == 2 and "out" in line


def test_a_misspelt_option_of_shard_is_named(answer):
    code, line = answer("shard", "captions.json", "--out", "o", "--shard_sample", "5")
    assert code == 2 and "unknown key shard_sample (value '5'); did you mean shard_samples?" in line


def test_a_missing_shard_folder_is_named(answer, tmp_path):
    code, line = answer("inspect", tmp_path / "none")
    assert code == 1 and str(tmp_path / "none") in line


@pytest.mark.parametrize("command", ["inspect", "plot", "launch", "shapes"])
def test_a_command_without_a_required_option_is_refused(answer, command):
    code, line = answer(command)
    assert code == 2 and f"{command}: " in line and f"ligature {command} --help" in line


OUTPUTS = [
    ("pretrain --data.train x --runs OUT", "runs"),
    ("finetune --checkpoint x --dataset x --data.train x --runs OUT", "runs"),
    ("evaluate --checkpoint x --data x --dataset x --split x --out OUT/scores.json", "out"),
    ("index --checkpoint x --data x --out OUT", "out"),
    ("shard x --out OUT", "out"),
    ("launch local pretrain --data.train x --runs OUT", "runs"),
    ("shapes OUT", "out"),
    ("demo --out OUT", "--out"),
    ("plot x --out OUT/a.png", "--out"),
    ("report x --out OUT/a.html", "--out"),
    ("export x OUT", "out"),
    ("heatmap x y z --out OUT/a.png", "--out"),
    ("import albef x OUT", "out"),
    ("inspect x --html OUT/a.html", "--html"),
    ("search x --html OUT/a.html", "--html"),
    ("compare a b --out OUT/a.json", "--out"),
]


@pytest.mark.parametrize(("line", "key"), OUTPUTS, ids=[line.partition(" --")[0] for line, _ in OUTPUTS])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(answer, line, key):
    code, message = answer(*line.replace("OUT", f"{__file__}/out").split())
    assert code == 2 and key in message and f"{__file__} is a file; name another" in message


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("pretrain", "data.train"),
        ("finetune", "checkpoint dataset data.train"),
        ("finetune --checkpoint x --dataset x", "data.train"),
        ("evaluate", "checkpoint scores data dataset split"),
        ("index", "checkpoint data"),
        ("ablate", "base data arms comparisons"),
        ("shard", "annotation out"),
        ("compare", "first second"),
    ],
)
def test_all_missing_keys_are_named_at_once(answer, line, keys):
    code, message = answer(*line.split())
    assert code == 2 and all(key in message for key in keys.split()), message


def test_a_wrong_option_of_the_demo_gives_a_one_line_error(answer):
    code, line = answer("demo", "--image", "3")
    assert code == 2 and "--image" in line


def test_a_shard_folder_is_described(drawn, capsys):
    assert main(["inspect", str(drawn / "train"), "--full"]) == 0
    assert "64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [(LigatureError, 1), (DataError, 1), (RecipeError, 2), (Interrupted, 75)],
    ids=lambda value: str(value),
)
def test_an_error_gives_a_one_line_error_and_its_exit_code(answer, monkeypatch, error, code):
    def fail(arguments):
        raise error("what is wrong\n  and what to do")

    monkeypatch.setattr("launch.commands.demo.run", fail)
    assert answer("demo") == (code, "ligature: what is wrong and what to do")


def test_other_ranks_say_who_they_are(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert main(["zzz"]) == 2
    assert capsys.readouterr().err.startswith("ligature (rank 3): ")


def test_a_full_disk_gives_a_one_line_error(answer, monkeypatch):
    def fail(arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/metrics.jsonl")

    monkeypatch.setattr("launch.commands.demo.run", fail)
    code, line = answer("demo")
    assert code == 1 and "No space left" in line and "runs/x/metrics.jsonl" in line


def test_an_unwritable_path_gives_a_one_line_error(answer, monkeypatch):
    monkeypatch.setattr("launch.commands.demo.run", lambda arguments: os.mkdir(f"{__file__}/runs"))
    code, line = answer("demo")
    assert code == 1 and "Not a directory" in line and f"{__file__}/runs" in line and "name a place" in line


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("launch.commands.demo.run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


def test_ctrl_c_is_no_traceback(answer, monkeypatch):
    def fail(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.commands.demo.run", fail)
    assert answer("demo") == (130, "ligature: interrupted")


def ligature(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def test_the_process_leaves_with_the_exit_code_and_the_line():
    result = ligature("pretrian")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "ligature: no command `pretrian`; did you mean pretrain?\n"


def test_a_closed_output_pipe_is_no_error():
    """`ligature --help | head -1`"""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", "--help"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")
