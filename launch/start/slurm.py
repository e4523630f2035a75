"""`ligature launch slurm STAGE …`: check everything, write a batch script into the run's folder, submit it."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import fcntl
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.start.config import ContainerConfig, LaunchOptions, SlurmConfig
from launch.start.script import Job, Task, render
from runtime.errors import LigatureError, RecipeError
from runtime.files import read_json, write_json, write_text
from runtime.recipe import keys_of, read_recipe, write_recipe
from runtime.run_folder import RunFolder

TRAINED = ("pretrain", "finetune")
STAGES = ("pretrain", "finetune", "evaluate", "index", "shard", "doctor")
FLAGS = ("dry_run", "resume_with_changes")
WORKERS = {
    "pretrain": "data.workers",
    "finetune": "data.workers",
    "evaluate": "workers",
    "index": "workers",
    "shard": "workers",
}
SHARD_CORES = 8
"""Of a task that shards, where nobody says how many."""
GONE = "Invalid job id"


def launch_slurm(arguments: list[str]) -> None:
    """Submit a stage. Raises RecipeError for mistakes, LigatureError where SLURM refuses; nothing is written or submitted then."""
    options, rest = split_arguments(arguments)
    stage, rest = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else ("pretrain", rest)
    if stage not in STAGES:
        close = difflib.get_close_matches(stage, STAGES, n=1)
        raise RecipeError(f"no stage `{stage}`; " + (f"did you mean {close[0]}?" if close else ", ".join(STAGES)))
    if stage == "doctor":
        options = dataclasses.replace(options, max_crashes=0)  # what it finds it has told; it would find it again
    if stage == "shard":  # on CPUs, whatever the site's jobs usually ask for
        options = dataclasses.replace(options, nodes=1, gpus_per_node=0, tasks_per_node=1, gpu_type=None)
    job, recipes = plan_job(stage, rest, options)
    if options.dry_run:
        print(render(job), end="")
        return
    if all(RunFolder(recipe).finished() for recipe in recipes) and recipes:
        return
    for recipe in recipes:
        check_run(recipe, options.resume_with_changes)
    check_cluster(options)
    ask_sbatch(render(job), "--test-only")
    with submitting([task.folder for task in job.tasks]):
        number = submit(job, stage, recipes)
    folder = job.tasks[0].folder
    print(f"job {number} submitted: {folder}/launch/job.sbatch\n`ligature status {folder}` tells how it does")


def split_arguments(arguments: list[str]) -> tuple[LaunchOptions, list[str]]:
    """What is the launcher's (`--gpus-per-node 8`, wherever it stands), and the stage with what is its own."""
    ours: list[str] = []
    own = iter(arguments)
    rest: list[str] = []
    known = set(keys_of(LaunchOptions)) | {"container"}
    for argument in own:
        name, equals, value = argument.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if name in ("--help", "-h") and not rest:
            print(usage())
            sys.exit(0)
        if not name.startswith("--") or key not in known | {"site"}:
            rest.append(argument)
        elif key in FLAGS:
            ours.append(f"--{key}={value or 'true'}")
        elif not equals and (not (value := next(own, "")) or value.startswith("--")):
            raise RecipeError(f"{name} has no value; write {name} VALUE")
        else:
            # A site's file comes first: what stands on the command line wins over it, wherever it stands.
            ours = ["--config", value, *ours] if key == "site" else [*ours, f"--{key}={value}"]
    return read_recipe(LaunchOptions, ours, "ligature launch slurm"), rest


def usage() -> str:
    """Every option with what is written beside its field."""
    lines = ["usage: ligature launch slurm [STAGE] [the stage's own options] [these, anywhere]", ""]
    lines += [f"Submit a stage to SLURM ({', '.join(STAGES)}; pretrain where none is named).", ""]
    lines += [
        "  --site FILE",
        "      The cluster's settings, any of the keys below (YAML); two examples: launch/modules.yaml, launch/container.yaml",
    ]
    defaults = LaunchOptions()
    for kind, prefix, values in (
        (SlurmConfig, "", defaults),
        (ContainerConfig, "container.", defaults.container),
        (LaunchOptions, "", defaults),
    ):
        for key, about in documented_fields(kind).items():
            if key != "container":
                option = f"--{prefix}{key}".replace("_", "-")
                value = getattr(values, key)
                shape = (
                    "'[…, …]'" if isinstance(value, list) else "'{…: …}'" if isinstance(value, dict) else key.upper()
                )
                default = f" ({value})" if value not in (None, "", [], {}) else ""
                shown = "" if key in FLAGS else f" {shape}{default}"
                lines += [f"  {option}{shown}", *([f"      {about}"] if about else [])]
    return "\n".join(lines)


def documented_fields(kind: type) -> dict[str, str]:
    """A dataclass's own fields -> the string that stands below each."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[node.target.id] = " ".join(after.value.value.split()) if said else ""  # type: ignore[union-attr]
    return found


def plan_job(stage: str, arguments: list[str], options: LaunchOptions) -> tuple[Job, list[Any]]:
    """The job, and the recipe of each of its runs (none where the stage keeps no run's folder)."""
    lines, slices = read_array(options.array, stage)
    explicit = any(part.split("=")[0] == f"--{WORKERS.get(stage)}" for part in arguments)
    tasks, recipes, workers = [], [], 0
    for number, line in enumerate(lines):
        where = f"--array {options.array}, task {number}: " if options.array else ""
        try:
            own = f"-{number}" if len(lines) > 1 else ""
            task, recipe, workers = plan_task(stage, [*arguments, *line], options, slices, explicit, own)
        except RecipeError as error:
            raise RecipeError(f"{where}{error}") from None
        tasks.append(task)
        recipes += [recipe] if recipe else []
    if len({task.folder for task in tasks}) < len(tasks):
        raise RecipeError(
            f"two tasks of --array {options.array} have one folder; give each a name of its own (--name, --out)"
        )
    config = dataclasses.replace(options, cpus_per_task=options.cpus_per_task or workers + 1)
    container = config.container.kind != "none"
    ligature = (
        "ligature" if container or config.venv or config.conda else f"{shlex.quote(sys.executable)} -m launch.cli"
    )
    folder = tasks[0].folder
    name = folder.parent.name if len(tasks) > 1 else folder.name
    array = slices or (len(tasks) if options.array else 0)
    threads = max(1, (config.cpus_per_task or 1) - workers)
    return Job(name, tasks, array, threads, config, Path.cwd(), ligature, stage not in ("evaluate", "doctor")), recipes


def read_array(array: str | None, stage: str) -> tuple[list[list[str]], int]:
    """-> further arguments of each task, and the number of slices (0: an array of lines, or none)."""
    if array is None:
        return [[]], 0
    if array.isdigit():
        if stage != "shard":
            raise RecipeError(
                f"--array {array}: only `shard` is cut into slices; for {stage} name a file with a task's options on each line"
            )
        if int(array) < 1:
            raise RecipeError(f"--array is {array}; it is a number of slices, 1 or more")
        return [[]], int(array)
    path = Path(array)
    if not path.is_file():
        raise RecipeError(f"--array {array}: no such file; it holds one task's further options a line")
    lines = [shlex.split(line, comments=True) for line in path.read_text(encoding="utf-8").splitlines()]
    if not (lines := [line for line in lines if line]):
        raise RecipeError(f"--array {array} is empty; it holds one task's further options a line")
    return lines, 0


def plan_task(
    stage: str, arguments: list[str], options: LaunchOptions, slices: int, explicit: bool, number: str
) -> tuple[Task, Any, int]:
    """One task's command and folder, the recipe of its run, and its loader workers. Raises RecipeError for what cannot run."""
    from launch.cli import read_stage

    key = WORKERS.get(stage)
    if key and not explicit and options.gpus_per_node and options.cpus_per_task:
        arguments = [*arguments, f"--{key}", str(options.cpus_per_task - 1)]  # one core trains, the others load
    if options.node_disk and stage in TRAINED:  # the variables are for the ranks to expand
        arguments = [
            *arguments,
            "--data.cache.folder",
            f"{options.node_disk}/ligature-shards",
            "--data.cache.stage",
            "true",
        ]
    if stage == "doctor":
        return Task(shlex.join([stage, *arguments]), Path(f"runs/doctor{number}").absolute()), None, 0
    if stage == "shard":
        return plan_shards(arguments, slices)
    recipe = read_stage(stage, arguments)
    if stage in TRAINED:
        check_batch(recipe, options)
        path = RunFolder(recipe).path.absolute()
        workers = recipe.data.workers
        if options.cpus_per_task and workers >= options.cpus_per_task and workers:
            print(f"note: {workers} loader workers and training share {options.cpus_per_task} cores", file=sys.stderr)
        return Task(f"{stage} --config {shlex.quote(str(path / 'config.yaml'))}", path), recipe, workers
    out = Path(recipe.out).absolute()
    return Task(shlex.join([stage, *arguments]), out.with_name(f"{out.stem}.launch")), None, recipe.workers


def plan_shards(arguments: list[str], slices: int) -> tuple[Task, None, int]:
    """`ligature shard`, one task or one a slice; its script and logs go beside the shard folder, which holds shards alone."""
    from data_tools.making.writer import read_options

    options = read_options(arguments)
    command = shlex.join(["shard", *arguments]) + (f" --slice $SLURM_ARRAY_TASK_ID/{slices}" if slices else "")
    out = Path(options.out).absolute()
    return Task(command, out.with_name(f"{out.name}.launch")), None, (options.workers or SHARD_CORES) - 1


def check_batch(recipe: Any, options: LaunchOptions) -> None:
    """Refuse a world that the recipe's batch does not divide over."""
    from pretrain.config import divide_batch

    divide_batch(recipe.training.global_batch, getattr(recipe.training, "micro_batch", 1), options.world)


def check_run(recipe: Any, insist: bool) -> None:
    """Refuse a run's folder that belongs to another recipe, showing what differs; `insist` goes on with the new one."""
    run = RunFolder(recipe)
    changes = run.changes(recipe)
    if changes and not insist:
        raise RecipeError(
            f"{run.path} belongs to another recipe ({'; '.join(changes)}); choose another --name, "
            "or go on with what has changed by --resume-with-changes"
        )
    for change in changes:
        print(f"changed: {change}")


def check_cluster(options: LaunchOptions) -> None:
    """Whether there is a SLURM here, and a partition of that name."""
    for command in ("sbatch", "sinfo", "squeue"):
        if not shutil.which(command):
            raise LigatureError(
                f"no {command} on this machine; launch from a login node of a SLURM cluster, look at the script by --dry-run, "
                "or use `ligature launch local`"
            )
    if options.partition:
        known = sorted(set(slurm("sinfo", "--noheader", "--format=%R").split()))
        for name in options.partition.split(","):
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise RecipeError(
                    f"this cluster has no partition {name!r}; "
                    + (f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}")
                )


def slurm(*command: str, text: str | None = None) -> str:
    """A command of SLURM -> what it printed. Raises LigatureError with its own error, in one line."""
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        told = result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}"
        told = re.sub(r"^\w+: (error: )?", "", told.splitlines()[-1])
        raise LigatureError(f"{command[0]} refused: {told}")
    return result.stdout


def ask_sbatch(script: str, *options: str) -> str:
    return slurm("sbatch", *options, text=script)


@contextmanager
def submitting(folders: list[Path]) -> Iterator[None]:
    """Hold the folders' launches: of two launches of one run at once the second is refused. What failed leaves no folder behind."""
    made, locks = [], []
    try:
        for folder in folders:
            made += [path for path in (folder, *folder.parents) if not path.exists()]
            (folder / "launch").mkdir(parents=True, exist_ok=True)
            locks.append(open(folder / "launch" / "lock", "w"))  # noqa: SIM115 (held until the job is on record)
            try:
                fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                made.clear()
                raise LigatureError(f"{folder} is being launched by another command at this moment") from None
            if number := active_job(folder):
                made.clear()
                raise LigatureError(
                    f"{folder} is already launched: job {number}; see `ligature status {folder}`, or end it first: scancel {number}"
                )
        yield
    except BaseException:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        for lock in locks:
            lock.close()


def active_job(folder: Path) -> str | None:
    """The number of the folder's job where SLURM still runs it or will."""
    record = folder / "launch" / "job.json"
    if not record.exists():
        return None
    number = read_json(record)["job"]
    try:
        return number if slurm("squeue", "--noheader", f"--jobs={number}", "--format=%T").strip() else None
    except LigatureError as error:
        if GONE in str(error):
            return None
        raise


def submit(job: Job, stage: str, recipes: list[Any]) -> str:
    """Write the script and the resolved recipes, submit, and put the job on record. -> its number."""
    script = render(job)
    for task in job.tasks:
        (task.folder / "logs").mkdir(exist_ok=True)
    for recipe in recipes:
        # What a requeued start reads: the recipe's own file may be edited meanwhile.
        write_recipe(RunFolder(recipe).config, recipe)
    write_text(job.tasks[0].folder / "launch" / "job.sbatch", script)
    number = slurm("sbatch", "--parsable", str(job.tasks[0].folder / "launch" / "job.sbatch")).strip().split(";")[0]
    for place, task in enumerate(job.tasks):
        record = {
            "job": f"{number}_{place}" if len(job.tasks) > 1 else number,
            "stage": stage,
            "ranks": job.config.world,
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "script": str(job.tasks[0].folder / "launch" / "job.sbatch"),
        }
        write_json(task.folder / "launch" / "job.json", record)
    return number
