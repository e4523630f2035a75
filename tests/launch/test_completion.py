"""`ligature --completion`: the script completes commands, stages and keys."""

from __future__ import annotations

import subprocess

import pytest

from launch.cli import main


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_completion_offers_commands_and_keys(capsys, tmp_path):
    assert main(["--completion", "bash"]) == 0
    (tmp_path / "ligature.sh").write_text(capsys.readouterr().out)

    def complete(*words: str) -> list[str]:
        listed = " ".join(f"'{word}'" for word in words)
        program = f"source ligature.sh; COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _ligature; "
        program += "printf '%s\\n' \"${COMPREPLY[@]}\""
        return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()

    assert complete("ligature", "pre") == ["pretrain"]
    assert complete("ligature", "pretrain", "--optimizer.we") == ["--optimizer.weight_decay"]
    assert len(complete("ligature", "pretrain", "--optimizer.w")) > 1
    assert "--gpus-per-node" in complete("ligature", "launch", "slurm", "pretrain", "--gpu")
