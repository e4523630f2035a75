"""A job as it will be submitted to SLURM: its tasks, their folders and commands, and the cores they need.

Tested in tests/launch/start/test_launch_slurm.py.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.stages import check_batch, read_shard_options, read_stage
from launch.start.config import LaunchOptions, SlurmConfig
from runtime.errors import RecipeError
from runtime.run_folder import RunFolder

STAGES = ("pretrain", "finetune", "evaluate", "index", "shard", "doctor")
"""What can be submitted."""
TRAINED = ("pretrain", "finetune")
"""Stages that keep a run's folder."""
WORKERS = {
    "pretrain": "data.workers",
    "finetune": "data.workers",
    "evaluate": "workers",
    "index": "workers",
    "shard": "workers",
}
"""Stage -> its recipe key for the number of loader workers."""
SHARD_CORES = 8
"""Cores of a task of `shard`, unless the command line says otherwise."""


@dataclass(frozen=True)
class Task:
    """One job, or one task of an array."""

    command: str
    """Command line of its ranks, without `ligature` itself."""
    folder: Path
    """Folder for its script and logs: the run's own folder where the stage keeps one."""


@dataclass(frozen=True)
class Job:
    """What one call of sbatch submits."""

    name: str
    tasks: list[Task]
    """A single task, or one for each line of an array's file. An array of slices has a single one, which reads `$SLURM_ARRAY_TASK_ID`."""
    array: int
    """Number of tasks of the array; 0: not an array."""
    threads: int
    """Threads of each rank for arithmetic on CPUs."""
    config: SlurmConfig
    """Options of the job, with the cores filled in."""
    working_folder: Path
    """Folder that the ranks run in: the one it is launched from."""
    ligature: str
    """How the ranks call `ligature`, as shell words."""
    resumes: bool
    """Whether the stage resumes after a stop. Scoring starts anew, so a second start would meet the same time limit."""


@dataclass(frozen=True)
class PlannedTask:
    """A task, with what its recipe says of it."""

    task: Task
    recipe: Any
    """The recipe of its run; None where the stage keeps no run's folder."""
    workers: int
    """Loader workers of a rank."""


def plan_job(stage: str, arguments: list[str], options: LaunchOptions) -> tuple[Job, list[Any]]:
    """Plan the job of a stage.

    Args:
        stage: One of STAGES.
        arguments: The stage's own command-line arguments.
        options: Options of `ligature launch slurm`.

    Returns:
        The job, and the recipes of its runs (none where the stage keeps no run's folder).

    Raises:
        RecipeError: The stage cannot run like this; the message names the task of an array.
    """
    lines, slices = read_array(options.array, stage)
    stated = any(part.split("=")[0] == f"--{WORKERS.get(stage)}" for part in arguments)
    planned = []
    for number, line in enumerate(lines):
        where = f"--array {options.array}, task {number}: " if options.array else ""
        try:
            if stage == "doctor":
                folder = Path(f"runs/doctor-{number}" if len(lines) > 1 else "runs/doctor").absolute()
                planned.append(PlannedTask(Task(shlex.join([stage, *arguments, *line]), folder), None, 0))
            elif stage == "shard":
                planned.append(plan_shards([*arguments, *line], slices))
            else:
                own = [*arguments, *line]
                if options.gpus_per_node and options.cpus_per_task and not stated:
                    own += [f"--{WORKERS[stage]}", str(options.cpus_per_task - 1)]  # one core trains, the others load
                planned.append(plan_task(stage, own, options))
        except RecipeError as error:
            raise RecipeError(f"{where}{error}") from None
    tasks = [entry.task for entry in planned]
    if len({task.folder for task in tasks}) < len(tasks):
        raise RecipeError(
            f"two tasks of --array {options.array} have one folder; give each its own name (--name, --out)"
        )
    workers = planned[-1].workers
    cores = options.cpus_per_task or workers + 1
    folder = tasks[0].folder
    job = Job(
        name=folder.parent.name if len(tasks) > 1 else folder.name,
        tasks=tasks,
        array=slices or (len(tasks) if options.array else 0),
        threads=max(1, cores - workers),
        config=dataclasses.replace(options, cpus_per_task=cores),
        working_folder=Path.cwd(),
        ligature=ligature_of(options),
        resumes=stage not in ("evaluate", "doctor"),
    )
    return job, [entry.recipe for entry in planned if entry.recipe]


def ligature_of(config: SlurmConfig) -> str:
    """Return how the ranks call `ligature`: the environment's command, or this process's Python where none is named."""
    if config.container.kind != "none" or config.venv or config.conda:
        return "ligature"
    return f"{shlex.quote(sys.executable)} -m launch.cli"


def read_array(array: str | None, stage: str) -> tuple[list[list[str]], int]:
    """Read the option `--array`.

    Returns:
        Each task's further arguments, and the number of slices (0: an array of lines, or no array).

    Raises:
        RecipeError: The file is missing or empty, or the stage cannot be cut into slices.
    """
    if array is None:
        return [[]], 0
    if array.isdigit():
        if stage != "shard":
            raise RecipeError(
                f"--array {array}: only `shard` is cut into slices; for {stage} name a file with one task's options a line"
            )
        if int(array) < 1:
            raise RecipeError(f"--array is {array}; it is a number of slices, 1 or more")
        return [[]], int(array)
    path = Path(array)
    if not path.is_file():
        raise RecipeError(f"--array {array}: no such file; write one task's further options a line")
    lines = [shlex.split(line, comments=True) for line in path.read_text(encoding="utf-8").splitlines()]
    if not (lines := [line for line in lines if line]):
        raise RecipeError(f"--array {array} is empty; write one task's further options a line")
    return lines, 0


def plan_task(stage: str, arguments: list[str], options: LaunchOptions) -> PlannedTask:
    """Plan one task of a stage that reads a recipe.

    Raises:
        RecipeError: The recipe cannot run, or its batch size does not divide over the job's ranks.
    """
    if stage not in TRAINED:
        recipe = read_stage(stage, arguments)
        out = Path(recipe.out).absolute()
        return PlannedTask(
            Task(shlex.join([stage, *arguments]), out.with_name(f"{out.stem}.launch")), None, recipe.workers
        )
    if options.node_disk:  # its variables are for the ranks to expand
        cache = f"{options.node_disk}/ligature-shards"
        arguments = [*arguments, "--data.cache.folder", cache, "--data.cache.stage", "true"]
    recipe = read_stage(stage, arguments)
    check_batch(recipe, options.world)
    workers = recipe.data.workers
    if options.cpus_per_task and workers >= options.cpus_per_task and workers:
        print(f"note: {workers} loader workers and training share {options.cpus_per_task} cores", file=sys.stderr)
    folder = RunFolder(recipe).path.absolute()
    return PlannedTask(Task(f"{stage} --config {shlex.quote(str(folder / 'config.yaml'))}", folder), recipe, workers)


def plan_shards(arguments: list[str], slices: int) -> PlannedTask:
    """Plan `ligature shard`, as one task or as one for each slice.

    The script and logs go beside the shard folder, which holds nothing but shards.
    """
    options = read_shard_options(arguments)
    # The slice's number stays outside the quotes: the rank's shell fills it in.
    command = shlex.join(["shard", *arguments]) + (f" --slice $SLURM_ARRAY_TASK_ID/{slices}" if slices else "")
    out = Path(options.out).absolute()
    return PlannedTask(Task(command, out.with_name(f"{out.name}.launch")), None, (options.workers or SHARD_CORES) - 1)
