"""The house stands: a floor imports only from floors below it, no modules form a circle, recipes load without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.table import COMMANDS

ROOT = Path(__file__).parents[1]
FLOORS = ["configs", "runtime", "data_tools", "retrieval", "training", "pretrain", "finetune", "launch", "ligature"]
"""From the lowest to the highest."""
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a tree names in an import; `from package import name` gives `package.name` too, which may be one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: a reader sees the floor"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_time_tree(path: Path) -> ast.Module:
    """Parse a module and drop what only type checkers read."""

    class Strip(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            self.generic_visit(node)
            return node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else node

    return Strip().visit(ast.parse(path.read_text(encoding="utf-8")))


def import_graph() -> dict[str, set[str]]:
    """Return the modules that each module imports, inside functions too: a circle there is a circle."""
    names = {module_name(path): path for path in FILES}
    return {
        name: {other for other in imports(run_time_tree(path)) if other in names} - {name}
        for name, path in names.items()
    }


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_no_floor_above_it(floor):
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    wrong = [
        f"{module_name(path)} imports {name}"
        for path in FILES
        if path.relative_to(ROOT).parts[0] == floor
        for name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in above
    ]
    assert not wrong


def test_no_module_imports_itself_through_others():
    graph, done = import_graph(), set[str]()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_the_engine_alone_imports_deepspeed():
    actual = {
        module_name(path)
        for path in FILES
        for name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] == "deepspeed"
    }
    assert actual == {"pretrain.engine"}


def test_scoring_and_loading_never_reach_the_engine():
    graph = import_graph()
    reached, waiting = (
        set[str](),
        ["finetune.evaluate", "finetune.heads.hat", "pretrain.weights.load", "retrieval.compare"],
    )
    while waiting:
        if (name := waiting.pop()) not in reached:
            reached.add(name)
            waiting += graph[name]
    assert "pretrain.encode" in reached and "pretrain.engine" not in reached


def test_no_checkpoint_is_ever_unpickled_but_foreign_weights():
    """`torch.load` runs what a file says; the one place that reads others' .pth files reads their weights only."""
    calls = [
        (module_name(path), ast.unparse(node))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert all("weights_only=True" in call for _, call in calls), calls


def run_python(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


LIGHT = [
    "launch",
    "launch.cli",
    "launch.table",
    "launch.stages",
    "launch.completion",
    "launch.plan",
    "launch.recover.node_checks",
    "launch.recover.run_status",
    "launch.start.command",
    "launch.start.config",
    "launch.start.hosts",
    "launch.start.job",
    "launch.start.local",
    "launch.start.script",
    "launch.start.slurm",
    *(command.module for command in COMMANDS.values()),
    "pretrain",
    "pretrain.config",
    "pretrain.budget",
    "training.sick_steps",
    "finetune",
    "finetune.config",
    "finetune.heads.config",
    "finetune.heads.registry",
    "finetune.search.config",
    "retrieval",
    "data_tools",
    "data_tools.config",
    "data_tools.shards.manifest",
    "data_tools.sources",
    "data_tools.making.writer",
    "data_tools.making.inspection",
    "runtime",
    "runtime.recipe",
    "runtime.run_folder",
    "runtime.checkpoint",
    "runtime.metrics",
    "runtime.progress",
    "runtime.ranks",
    "runtime.interrupts",
    "runtime.watchdog",
    "runtime.straggler",
    "configs",
    "ligature",
]


def test_what_describes_a_run_imports_no_torch():
    program = (
        "import importlib, sys\n"
        f"for name in {LIGHT}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'deepspeed', 'timm', 'tensorboard'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    result = run_python(program)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["pretrain", "--help"],
        ["finetune", "--help"],
        ["evaluate", "--help"],
        ["shard", "--help"],
        ["index", "--help"],
        ["search", "--help"],
        ["launch", "slurm", "--help"],
    ],
    ids=" ".join,
)
def test_help_is_answered_without_torch(arguments):
    program = (
        "import sys\n"
        "from launch.cli import main\n"
        "try:\n"
        f"    code = main({arguments})\n"
        "except SystemExit as leaving:\n"
        "    code = leaving.code\n"
        "assert not code, code\n"
        "assert 'torch' not in sys.modules, 'help imports torch'\n"
    )
    result = run_python(program)
    assert result.returncode == 0, result.stderr
    assert "usage: ligature" in result.stdout


def test_no_commands_help_imports_torch():
    program = (
        "import sys\n"
        "from launch.cli import main\n"
        f"for name in {list(COMMANDS)}:\n"
        "    try:\n"
        "        main([name, '--help'])\n"
        "    except SystemExit as leaving:\n"
        "        assert not leaving.code, name\n"
        "    assert 'torch' not in sys.modules, f'the help of {name} imports torch'\n"
    )
    result = run_python(program)
    assert result.returncode == 0, result.stderr
