"""Which checkpoint a run resumes from, and which one it goes back to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from runtime.checkpoint import CheckpointFolder, write_checkpoint
from runtime.errors import CheckpointError, SickRun
from runtime.ranks import Ranks
from training.context import RunContext
from training.resume import find_healthy, find_resume


@pytest.fixture
def checkpoints(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep_last=5)


@pytest.fixture
def context(checkpoints) -> RunContext:
    return RunContext(SimpleNamespace(checkpoints=checkpoints), Ranks(), torch.device("cpu"), watchdog=None)


def commit(checkpoints: CheckpointFolder, *steps: int) -> None:
    def write(folder: Path, staging: Path) -> None:
        write_checkpoint(folder, {}, {"state": {"number": 1}}, lambda folder: None, staging)

    for step in steps:
        checkpoints.commit(step, False, write)


def damage(checkpoints: CheckpointFolder, *steps: int) -> None:
    for step in steps:
        (checkpoints.path_of(step) / "state.json").write_text("{}")


def test_a_run_without_checkpoints_starts_anew(context):
    assert find_resume(context) is None


def test_a_damaged_checkpoint_is_passed_over(context, checkpoints):
    commit(checkpoints, 1, 2)
    damage(checkpoints, 2)
    assert find_resume(context) == checkpoints.path_of(1)


def test_a_run_never_starts_anew_over_damaged_checkpoints(context, checkpoints):
    commit(checkpoints, 1, 2)
    damage(checkpoints, 1, 2)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in .* verifies"):
        find_resume(context)
    assert checkpoints.steps() == [1, 2]


def test_going_back_deletes_the_later_checkpoints(context, checkpoints):
    commit(checkpoints, 1, 2, 3)
    assert find_healthy(context, 2) == checkpoints.path_of(2)
    assert checkpoints.steps() == [1, 2]


def test_without_an_earlier_checkpoint_the_run_stops(context, checkpoints):
    commit(checkpoints, 3)
    with pytest.raises(SickRun, match="no checkpoint of step 2 or before"):
        find_healthy(context, 2)
    assert checkpoints.steps() == [3]
