"""Bit-exact resume: a run killed with kill -9 again and again, some times in mid-save, ends as one that nobody disturbed.

Short form here; `make faults` kills twenty times and prints the table of docs/reliability.md.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from rank_processes import RankProcesses, start_ranks

from pretrain.config import PretrainRecipe
from pretrain.train import pretrain
from runtime.checkpoint import CheckpointFolder, verify_checkpoint
from runtime.files import read_json
from runtime.metrics import read_metrics
from runtime.recipe import read_recipe

SMALL = """--data.workers 1 --teacher.queue 100 --teacher.queue_from_epoch 0 --training.global_batch 16 --training.log_every 1
--training.validate_every 1000 --training.checkpoint_every 1 --training.keep_last 2
--model.image.depth 1 --model.text.layers 1 --model.fusion.layers 1""".split()  # noqa: SIM905 (forty quoted words read worse)


GRACE = 2.0
"""Seconds that the rank left over has to end by itself."""


@dataclass(frozen=True)
class Kill:
    who: str
    """`rank 0`, `rank 1` or `all ranks`"""
    when: str
    """`starting`, `training` or `mid-save`"""


def recipe(drawn: Path, runs: Path, steps: int) -> PretrainRecipe:
    data = ["--data.train", str(drawn / "train"), "--data.validation", str(drawn / "validation")]
    options = ["--config", "pretrain/demo.yaml", *data, *SMALL, "--runs", str(runs), "--training.steps", str(steps)]
    return read_recipe(PretrainRecipe, options, "ligature pretrain")


def last_step(run: Path) -> int:
    return max((int(line["step"]) for line in read_metrics(run)), default=0)


def half_written(run: Path) -> list[Path]:
    """Checkpoints in the making that hold a file already."""
    return [
        path for path in run.glob("lease/*/work-*/.step-*.partial/*") if path.name.endswith((".safetensors", "json"))
    ]


def strike(ranks: RankProcesses, run: Path, kill: Kill, draw: random.Random) -> bool:
    """Wait for the moment and kill. -> whether it came before the run had ended by itself."""
    began, wanted = last_step(run), draw.randint(1, 2)
    delay = draw.uniform(0, 2.0 if kill.when == "starting" else 0.3)
    reached = {
        "starting": lambda: True,
        "training": lambda: last_step(run) >= began + wanted,
        "mid-save": lambda: last_step(run) > began and half_written(run),
    }[kill.when]
    while not reached():
        ranks.processes[0].join(0.01)
        if ranks.processes[0].exitcode is not None:
            return False
    if kill.when != "mid-save":
        ranks.processes[0].join(delay)
    hit = [0, 1] if kill.who == "all ranks" else [int(kill.who[-1])]
    for rank in hit:
        os.kill(ranks.pid(rank), signal.SIGKILL)
    for process in ranks.processes:  # as a launcher does, whose patience is longer
        process.join(GRACE)
        process.kill()
    return True


def campaign(drawn: Path, folder: Path, kills: list[Kill], steps: int) -> Counter[Kill]:
    """Kill a run as told, starting it again after each, then let it end; -> kills that struck. Everything of it must be that
    of an undisturbed run: every loss, and every byte of the last checkpoint."""
    draw = random.Random(0)
    codes, logs = start_ranks(folder / "logs", 2, pretrain, recipe(drawn, folder / "undisturbed", steps)).wait()
    assert codes == [0, 0], logs
    run, struck, in_mid_save = folder / "killed" / "pretrain", Counter[Kill](), 0
    for number, kill in enumerate(kills):
        ranks = start_ranks(folder / f"logs-{number}", 2, pretrain, recipe(drawn, folder / "killed", steps))
        came = strike(ranks, run, kill, draw)
        codes, logs = ranks.wait()
        assert came, f"kill {number} came too late: {codes} {logs}"
        assert codes != [0, 0]
        struck[kill] += 1
        in_mid_save += bool(half_written(run))
        for step in CheckpointFolder(run / "checkpoints", 2).steps():
            verify_checkpoint(run / "checkpoints" / f"step-{step:08}")  # complete or absent
    assert in_mid_save >= 1, "no kill left a half-written checkpoint behind: the campaign shows less than it says"
    codes, logs = start_ranks(folder / "logs-last", 2, pretrain, recipe(drawn, folder / "killed", steps)).wait()
    assert codes == [0, 0], logs
    undisturbed = folder / "undisturbed" / "pretrain"
    losses = [
        [(line["step"], line["train/loss"]) for line in read_metrics(one) if "train/loss" in line]
        for one in (run, undisturbed)
    ]
    assert len(losses[0]) == steps and losses[0] == losses[1]
    made, wanted = (
        read_json(one / "checkpoints" / f"step-{steps:08}" / "manifest.json")["files"] for one in (run, undisturbed)
    )
    made.pop("config.yaml"), wanted.pop("config.yaml")  # it names the run's folder
    assert made == wanted and {
        "model.safetensors",
        "optimizer.safetensors",
        "teacher.safetensors",
        "state.json",
    } <= set(made)
    print(f"{len(kills)} kills, {in_mid_save} of them left a half-written checkpoint behind")
    return struck


def test_a_run_killed_in_mid_save_and_elsewhere_ends_as_if_undisturbed(drawn, tmp_path):
    kills = [Kill("all ranks", "mid-save"), Kill("rank 1", "training"), Kill("rank 0", "mid-save")]
    assert sum(campaign(drawn, tmp_path, kills, steps=9).values()) == 3


@pytest.mark.faults
def test_a_run_killed_twenty_times_ends_as_if_undisturbed(drawn, tmp_path):
    kinds = [Kill(who, when) for when in ("training", "mid-save") for who in ("all ranks", "rank 0", "rank 1")]
    kills = [*kinds * 3, Kill("all ranks", "starting"), Kill("rank 1", "starting")]
    random.Random(1).shuffle(kills)
    struck = campaign(drawn, tmp_path, kills, steps=45)
    assert sum(struck.values()) == 20
    for kill in sorted(struck, key=str):
        print(f"| kill -9 of {kill.who}, {kill.when} | {struck[kill]} | {struck[kill]} | 0 |")
