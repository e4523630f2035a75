"""README says what is true: its `bash` and `python` blocks are run as written, in order, in one empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
TO_RUN = [(language, code) for language, code in BLOCKS if language in ("bash", "python")]
LIMIT = 600
"""Seconds a block may take on two busy cores."""


def test_the_first_screen_names_the_two_commands_and_the_makefile_has_them():
    assert BLOCKS[0][0] == "sh" and README[: README.index("```")].count("\n") < 10
    assert re.findall(r"^make (\w+)", BLOCKS[0][1], flags=re.MULTILINE) == ["demo", "test"]
    verbs = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"demo", "test", "lint", "clean"} <= set(verbs)


def test_links_and_folders_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    tree = next(code for language, code in BLOCKS if not language)
    for folder in re.findall(r"^(\w+)/ ", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_every_command_in_the_readme_exists():
    from launch.table import COMMANDS

    code = "\n".join(code for language, code in BLOCKS if language in ("bash", "sh"))
    shown = set(re.findall(r"^ligature (\w+)", code, flags=re.MULTILINE))
    assert shown and shown <= set(COMMANDS)
    for name in re.findall(r"`ligature (\w+)", README):
        assert name in COMMANDS, f"README names `ligature {name}`"


def run(language: str, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # `ligature` is the one of this environment, whether or not it is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)


def test_code_blocks_of_the_readme_run_as_written(tmp_path: Path):
    assert [language for language, _ in TO_RUN] == ["bash"] * 4 + ["python"] * 2
    printed = []
    for language, code in TO_RUN:
        done = run(language, code, tmp_path)
        if done.returncode:
            pytest.fail(f"{code}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        printed.append(done.stdout)
    assert "| dual" in printed[2] and "| chance" in printed[2]
    assert (tmp_path / "runs/first-retrieval/scores.json").is_file() and (tmp_path / "runs/curves.png").is_file()
    assert "two red circles" in (tmp_path / "runs/found.html").read_text(encoding="utf-8")
    assert re.search(r"tensor\(\[\[.+, .+\]\]\)\ntensor\(\[.+, .+\]\)", printed[4])
