"""Rooms stay small and every file is tested by name: limits on files, functions and parameters, and the mirror of tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["runtime", "data_tools", "retrieval", "training", "pretrain", "finetune", "launch"]
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
FILE_LINES, FUNCTION_LINES, PARAMETERS = 450, 100, 8


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Yield all functions and methods of a file, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node  # type: ignore[misc]


def parameters(function: ast.FunctionDef) -> int:
    """Count the parameters that a caller passes."""
    names = [each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_no_file_is_long():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {str(path): length for path, length in lengths.items() if length > FILE_LINES}


def test_no_function_is_long():
    lengths = {
        f"{path.relative_to(ROOT)}:{function.name}": function.end_lineno - function.lineno + 1
        for path in FILES
        for function in functions(path)
    }
    assert not {name: length for name, length in lengths.items() if length > FUNCTION_LINES}


def test_no_function_takes_many_parameters():
    """Constructors are excepted: a public one such as ShardStream's has many options with defaults."""
    counts = {
        f"{path.relative_to(ROOT)}:{function.name}": parameters(function)
        for path in FILES
        for function in functions(path)
        if function.name != "__init__"
    }
    assert not {name: count for name, count in counts.items() if count > PARAMETERS}


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by their base name."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_has_a_test_that_names_it(path):
    """`x.py` has `test_x.py` on its floor, or its docstring ends by saying which file tests it."""
    if path.name == "__init__.py":
        return
    floor = path.relative_to(ROOT).parts[0]
    if list((ROOT / "tests" / floor).rglob(f"test_{path.stem}.py")):
        return
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    homes = re.findall(r"tests/[\w/]+\.py", text.splitlines()[-1] if text else "")
    assert homes, (
        f"{path.relative_to(ROOT)} has no test of its name, and its docstring does not end with `Tested in tests/….py.`"
    )
    assert all((ROOT / home).is_file() for home in homes), homes
