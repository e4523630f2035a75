"""`ligature --completion bash|zsh|fish`: a completion script for a shell, made from the commands' own help.

The script holds every word it offers, so completing starts no Python.

Tested in tests/launch/test_completion.py.
"""

from __future__ import annotations

import contextlib
import io
import re

from launch.stages import RECIPES
from launch.table import COMMANDS, find_command
from runtime.errors import LigatureError, RecipeError

SHELLS = ("bash", "zsh", "fish")
NESTED = {"launch": ("local", "slurm", "hosts")}
"""Command -> the words that may follow it directly. A stage comes after them."""

BASH = """\
# ligature's commands and options. To use it: source <(ligature --completion {shell})
_ligature() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]-}} words=
  if [ "$COMP_CWORD" = 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  case $command in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [[ $word == -* ]] || COMPREPLY+=($(compgen -f -- "$word"))
}}
complete -o filenames -F _ligature ligature
"""


def completion(arguments: list[str]) -> str:
    """Return the completion script of a shell.

    Args:
        arguments: What follows `--completion` on the command line: the shell's name.

    Raises:
        RecipeError: The shell is none of SHELLS.
    """
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise RecipeError(f"--completion takes a shell: {', '.join(SHELLS)}")
    shell = arguments[0]
    words = {name: words_of(name) for name in COMMANDS}
    if shell == "fish":
        return format_fish(words)
    cases = "\n".join(f'    {name}) words="{" ".join(after)}" ;;' for name, after in words.items())
    text = BASH.format(shell=shell, commands=" ".join([*COMMANDS, "--help", "--completion"]), cases=cases)
    # After this line zsh understands bash's completion functions, so one script serves both.
    return "autoload -Uz bashcompinit && bashcompinit\n" + text if shell == "zsh" else text


def words_of(name: str) -> list[str]:
    """Return the words that may follow a command: its options, and for `launch` the stages with theirs."""
    words = [*NESTED.get(name, ()), *(RECIPES if name in NESTED else ())]
    commands = [[name, *rest] for rest in ([[kind] for kind in NESTED.get(name, ())] or [[]])]
    commands += [[stage] for stage in RECIPES] if name in NESTED else []
    return words + sorted({option for command in commands for option in options_of(command)})


def options_of(command: list[str]) -> set[str]:
    """Return the long options that a command's help lists."""
    text = io.StringIO()
    # Every command's `--help` leaves by SystemExit after printing.
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit, LigatureError):
        find_command(command[0]).load()([*command[1:], "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text.getvalue())) - {"--print_config"}


def format_fish(words: dict[str, list[str]]) -> str:
    """Return the script for fish.

    Args:
        words: Command -> the words that may follow it.
    """
    lines = ["# ligature's commands and options. To use it: ligature --completion fish | source"]
    for name, after in words.items():
        # The script puts the text in single quotes.
        about = COMMANDS[name].about.replace("'", "")
        lines.append(f"complete -c ligature -n __fish_use_subcommand -f -a {name} -d '{about}'")
        for word in after:
            option = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            lines.append(f"complete -c ligature -n '__fish_seen_subcommand_from {name}' {option}")
    return "\n".join(lines) + "\n"
