"""`ligature completion`: print a completion script for a shell.

Tested in tests/launch/test_completion.py.
"""

from __future__ import annotations

from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Print the script."""
    parser = OptionParser(
        "ligature completion",
        description="Print a completion script: options, their values, shipped recipes, files and folders.",
        epilog="To use it: source <(ligature completion bash). For zsh: write it to a file _ligature in a folder of $fpath. "
        "For fish: ligature completion fish | source.",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that the script is for")
    options = parser.parse_args(arguments)
    from launch.completion import completion

    print(completion(options.shell), end="")
