"""`ligature completion`: the script completes commands, stages, keys, their values, shipped recipes and files."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator

import pytest

from launch.cli import main
from launch.completion import command_tree
from launch.reference import KINDS, command_groups
from launch.table import COMMANDS


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script for bash, in a folder of its own."""
    path = tmp_path_factory.mktemp("bash") / "ligature.sh"
    with pytest.MonkeyPatch.context() as patch, open(path, "w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0
    (path.parent / "mine.yaml").write_text("")
    (path.parent / "runs").mkdir()
    return path


@pytest.fixture
def complete(script):
    def ask(*words: str) -> list[str]:
        listed = " ".join(f"'{word}'" for word in ("ligature", *words))
        program = f"source ligature.sh; COMP_WORDS=({listed}); COMP_CWORD={len(words)}; _shtab_ligature; "
        program += "printf '%s\\n' \"${COMPREPLY[@]}\""
        result = subprocess.run(
            ["bash", "-c", program], cwd=script.parent, stdout=subprocess.PIPE, text=True, check=True
        )
        return result.stdout.split()

    return ask


def test_commands_are_completed(complete):
    assert complete("pre") == ["pretrain"]
    assert complete("") == list(COMMANDS)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("pretrain --optimizer.we", ["--optimizer.weight_decay"]),
        ("pretrain --training.precision ", ["fp32", "bf16"]),
        ("pretrain --training.zero_stage=1 --training.precision b", ["bf16"]),
        ("pretrain --config pretrain/dem", ["pretrain/demo.yaml"]),
        ("pretrain --config mi", ["mine.yaml"]),
        ("evaluate --config finetune/demo", ["finetune/demo_evaluate.yaml"]),
        ("pretrain --runs r", ["runs"]),
        ("evaluate --protocol flickr", ["flickr30k_1k", "flickr8k_1k"]),
        ("shard --dupl", ["--duplicates"]),
        ("plan --nodes 2 --teacher.k", ["--teacher.keys"]),
        ("plan --gpu-g", ["--gpu-gbps"]),
        ("search --device c", ["cpu", "cuda"]),
        ("report r", ["runs"]),
        ("launch ", ["local", "hosts", "slurm"]),
        ("launch local --nproc 2 pre", ["pretrain"]),
        ("launch local --nproc 2 pretrain --optimizer.we", ["--optimizer.weight_decay"]),
        ("launch hosts --hostf", ["--hostfile"]),
        ("launch slurm --gpu", ["--gpus-per-node", "--gpu-type"]),
        ("launch slurm --site launch/", ["launch/container.yaml", "launch/modules.yaml"]),
        ("launch slurm --nodes 2 evaluate --protocol coco_1", ["coco_1k"]),
    ],
)
def test_bash_offers_what_fits(complete, line, offered):
    assert complete(*line.split(" ")) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_scripts_hold_the_same_words(capsys, shell):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("optimizer.weight_decay", "fp32 bf16", "pretrain/demo.yaml", "Highest learning")
    )


def test_the_former_name_still_works(capsys):
    assert main(["--completion", "bash"]) == 0
    assert "complete -o" in capsys.readouterr().out


def test_another_shell_is_refused(capsys):
    assert main(["completion", "csh"]) == 2
    assert "'csh'" in capsys.readouterr().err


def commands_in(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command of a tree by its words."""
    yield name.strip(), parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from commands_in(inner, f"{name} {word}")


def test_no_option_of_any_command_lacks_a_text():
    lacking = [
        f"{name} {action.option_strings or action.dest}"
        for name, parser in commands_in(command_tree())
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert not lacking


@pytest.mark.parametrize("command", [name for name in KINDS if " " not in name])
def test_every_key_is_an_option_of_its_command(command):
    tree = dict(commands_in(command_tree()))
    options = {option for action in tree[command]._actions for option in action.option_strings}
    keys = {f"--{key.name}" for group in command_groups(command) for key in group.keys if "NAME" not in key.name}
    assert keys <= options
