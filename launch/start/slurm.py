"""Submit a stage to SLURM: check everything, write a batch script into the run's folder, hand it to sbatch.

Tested in tests/launch/start/test_launch_slurm.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import fcntl
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.start.config import LaunchOptions
from launch.start.job import Job, plan_job
from launch.start.script import render
from runtime.errors import LigatureError, RecipeError
from runtime.files import read_json, write_json, write_text
from runtime.recipe import write_recipe
from runtime.run_folder import RunFolder

GONE = "Invalid job id"
"""What SLURM's commands say of a job that it no longer knows."""


def launch_slurm(stage: str, arguments: list[str], options: LaunchOptions) -> None:
    """Submit a stage, or print its script in a dry run.

    Args:
        stage: One of `launch.start.job.STAGES`.
        arguments: The stage's own command-line arguments.
        options: Options of `ligature launch slurm`.

    Raises:
        RecipeError: A mistake; nothing is written or submitted.
        LigatureError: SLURM is missing or refuses; nothing is written or submitted.
    """
    if stage == "doctor":
        options = dataclasses.replace(options, max_crashes=0)  # a second start would find the same
    if stage == "shard":  # on CPUs, whatever the site's file asks for other jobs
        options = dataclasses.replace(options, nodes=1, gpus_per_node=0, tasks_per_node=1, gpu_type=None)
    job, recipes = plan_job(stage, arguments, options)
    script = render(job)
    # SLURM has not been asked for anything so far, so a dry run works on machines without it.
    if options.dry_run:
        print(script, end="")
        return
    # `all` is true of no recipes: a stage that keeps no run is always submitted.
    if all(RunFolder(recipe).finished() for recipe in recipes) and recipes:
        return
    for recipe in recipes:
        check_run(recipe, options.resume_with_changes)
    check_cluster(options)
    # The controller judges the whole request here, so what it refuses leaves no folder behind.
    slurm("sbatch", "--test-only", text=script)
    with hold_folders([task.folder for task in job.tasks]):
        number = submit(job, script, stage, recipes)
    folder = job.tasks[0].folder
    print(f"job {number} submitted: {folder}/launch/job.sbatch\n`ligature status {folder}` shows how it is doing")


def check_run(recipe: Any, accept_changes: bool) -> None:
    """Check that a run's folder belongs to this recipe; with `accept_changes` only print what differs.

    Raises:
        RecipeError: The folder belongs to another recipe; the message shows what differs.
    """
    run = RunFolder(recipe)
    changes = run.changes(recipe)
    if changes and not accept_changes:
        raise RecipeError(
            f"{run.path} belongs to another recipe ({'; '.join(changes)}); choose another --name, "
            "or resume it with the new values by --resume-with-changes"
        )
    for change in changes:
        print(f"changed: {change}")


def check_cluster(options: LaunchOptions) -> None:
    """Check that SLURM's commands are here and that the cluster has the partition.

    Raises:
        LigatureError: A command of SLURM is missing.
        RecipeError: There is no partition of that name; the message suggests one.
    """
    for command in ("sbatch", "sinfo", "squeue"):
        if not shutil.which(command):
            raise LigatureError(
                f"no {command} on this machine; launch from a login node of a SLURM cluster, look at the script by --dry-run, "
                "or use `ligature launch local`"
            )
    if options.partition:
        # %R is the bare name; %P marks the default partition with an asterisk.
        known = sorted(set(slurm("sinfo", "--noheader", "--format=%R").split()))
        for name in options.partition.split(","):
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
                raise RecipeError(f"this cluster has no partition {name!r}; {hint}")


def slurm(*command: str, text: str | None = None) -> str:
    """Run a command of SLURM.

    Args:
        command: The command and its arguments.
        text: What it reads from standard input.

    Returns:
        What it printed.

    Raises:
        LigatureError: The command failed; the message holds its last line.
    """
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}"
        # SLURM's error lines begin with the command's name, which the message has already.
        reason = re.sub(r"^\w+: (error: )?", "", reason.splitlines()[-1])
        raise LigatureError(f"{command[0]} refused: {reason}")
    return result.stdout


@contextmanager
def hold_folders(folders: list[Path]) -> Iterator[None]:
    """Hold the locks of the folders while a job is submitted. A failure removes the folders that were created.

    Raises:
        LigatureError: Another command is launching one of the folders, or SLURM has a job of it already.
    """
    created: list[Path] = []
    locks = []
    try:
        for folder in folders:
            created += [path for path in (folder, *folder.parents) if not path.exists()]
            (folder / "launch").mkdir(parents=True, exist_ok=True)
            locks.append(open(folder / "launch" / "lock", "w"))  # noqa: SIM115 (held until the job is on record)
            try:
                # The kernel drops this lock when the process ends, so a killed launch blocks nobody.
                fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                created.clear()  # the other launch needs them
                raise LigatureError(f"{folder} is being launched by another command right now") from None
            # Asked under the lock: of two launches at once, the later one finds the job of the earlier one.
            if number := active_job(folder):
                created.clear()
                raise LigatureError(
                    f"{folder} is already launched: job {number}; see `ligature status {folder}`, or end it first: scancel {number}"
                )
        yield
    # Ctrl-C too: a folder left behind would look like a run to `ligature status`.
    except BaseException:
        for path in created:
            shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        for lock in locks:
            lock.close()


def active_job(folder: Path) -> str | None:
    """Return the number of a folder's job if SLURM runs it or will run it, else None."""
    record = folder / "launch" / "job.json"
    if not record.exists():
        return None
    number = read_json(record)["job"]
    try:
        return number if slurm("squeue", "--noheader", f"--jobs={number}", "--format=%T").strip() else None
    except LigatureError as error:
        # SLURM forgets a job some time after its end. Asking for it is then an error, not an empty answer.
        if GONE in str(error):
            return None
        raise


def submit(job: Job, script: str, stage: str, recipes: list[Any]) -> str:
    """Write the script and the resolved recipes, submit the job, and record it in each task's folder.

    Returns:
        The job's number.
    """
    for task in job.tasks:
        (task.folder / "logs").mkdir(exist_ok=True)
    for recipe in recipes:
        # A requeued start reads this copy: the user may edit the recipe's own file meanwhile.
        write_recipe(RunFolder(recipe).config, recipe)
    path = job.tasks[0].folder / "launch" / "job.sbatch"
    write_text(path, script)
    # With several clusters sbatch prints `number;cluster`.
    number = slurm("sbatch", "--parsable", str(path)).strip().split(";")[0]
    for index, task in enumerate(job.tasks):
        record = {
            # A task of an array is a run of its own, so its folder records its own number.
            # Slices share one folder, which records the whole array's.
            "job": f"{number}_{index}" if len(job.tasks) > 1 else number,
            "stage": stage,
            "ranks": job.config.world,
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "script": str(path),
        }
        write_json(task.folder / "launch" / "job.json", record)
    return number
