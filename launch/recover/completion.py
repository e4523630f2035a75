"""`ligature --completion bash|zsh|fish`: a script for the shell, made from the commands' own help; completing starts no Python."""

from __future__ import annotations

import contextlib
import io
import re

from runtime.errors import LigatureError, RecipeError

SHELLS = ("bash", "zsh", "fish")
NESTED = {"launch": ("local", "slurm", "hosts")}
"""Commands whose first word is one of a few, then a stage."""

BASH = """\
# ligature's commands and options. Put it to use: source <(ligature --completion {shell})
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
    """The script for a shell. Raises RecipeError for a shell that is not known."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise RecipeError(f"--completion takes a shell: {', '.join(SHELLS)}")
    shell = arguments[0]
    from launch.cli import COMMANDS

    words = {name: command_words(name) for name in COMMANDS}
    if shell == "fish":
        return fish(words, {name: about for name, (_, about) in COMMANDS.items()})
    cases = "\n".join(f'    {name}) words="{" ".join(known)}" ;;' for name, known in words.items())
    text = BASH.format(shell=shell, commands=" ".join([*COMMANDS, "--help", "--completion"]), cases=cases)
    return "autoload -Uz bashcompinit && bashcompinit\n" + text if shell == "zsh" else text


def command_words(name: str) -> list[str]:
    """What may follow a command: its options as its help lists them; for `launch` also the stages and their options."""
    from launch.cli import RECIPES

    words = [*NESTED.get(name, ()), *(RECIPES if name in NESTED else ())]
    commands = [[name, *rest] for rest in ([[kind] for kind in NESTED.get(name, ())] or [[]])]
    commands += [[stage] for stage in RECIPES] if name in NESTED else []
    return words + sorted({option for command in commands for option in options_of(command)})


def options_of(command: list[str]) -> set[str]:
    """The long options in a command's help."""
    from launch.cli import COMMANDS

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit, LigatureError):
        COMMANDS[command[0]][0]([*command[1:], "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", printed.getvalue())) - {"--print_config"}


def fish(words: dict[str, list[str]], about: dict[str, str]) -> str:
    lines = ["# ligature's commands and options. Put it to use: ligature --completion fish | source"]
    for name, known in words.items():
        text = about[name].replace("'", "")
        lines.append(f"complete -c ligature -n __fish_use_subcommand -f -a {name} -d '{text}'")
        for word in known:
            option = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            lines.append(f"complete -c ligature -n '__fish_seen_subcommand_from {name}' {option}")
    return "\n".join(lines) + "\n"
