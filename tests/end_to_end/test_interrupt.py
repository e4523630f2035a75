"""An interrupted and resumed run equals an undisturbed one to the last bit."""

import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from runtime.errors import RunHeld
from runtime.metrics import read_metrics

STEPS = 8


@pytest.fixture(scope="module")
def recipe(drawn):
    data = ["--data.train", str(drawn / "train"), "--data.validation", str(drawn / "validation")]
    small = ["--training.steps", str(STEPS), "--training.log_every", "1", "--training.validate_every", "4"]
    small += [
        "--training.checkpoint_every",
        "2",
        "--training.keep_last",
        "9",
        "--teacher.queue",
        "100",
        "--teacher.queue_from_epoch",
        "0",
        "--transport.warm_start",
        "true",
    ]
    small += ["--data.workers", "1", "--training.global_batch", "16"]
    return ["launch", "local", "--nproc", "2", "pretrain", "--config", "pretrain/demo.yaml", *data, *small]


def run(recipe, folder, before_end=None):
    """Run the command; `before_end(process)` may disturb it. -> exit code."""
    process = subprocess.Popen([sys.executable, "-m", "launch.cli", *recipe, "--runs", str(folder)])
    if before_end:
        before_end(process)
    return process.wait()


def losses(folder):
    return [(line["step"], line["train/loss"]) for line in read_metrics(folder / "pretrain") if "train/loss" in line]


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(recipe, folder) == 0
    return folder


def when_step_logged(folder, step, act):
    """Wait until a step is in metrics.jsonl, then act."""

    def disturb(process):
        while process.poll() is None and not any(line["step"] >= step for line in read_metrics(folder / "pretrain")):
            pass
        act(process)

    return disturb


def test_a_signal_stops_at_a_step_boundary_and_the_same_command_goes_on(recipe, undisturbed, tmp_path):
    code = run(recipe, tmp_path, when_step_logged(tmp_path, 3, lambda process: process.send_signal(signal.SIGTERM)))
    assert code == 75
    assert len(losses(tmp_path)) < STEPS
    assert run(recipe, tmp_path) == 0
    assert losses(tmp_path) == losses(undisturbed)
    same_weights(tmp_path, undisturbed)


def test_a_living_run_is_not_disturbed_and_a_killed_one_goes_on_from_its_last_checkpoint(
    recipe, undisturbed, tmp_path, capfd
):
    def signal_ranks(process, number):
        for line in subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout.splitlines()[1:]:
            child, parent = (int(part) for part in line.split())
            if parent == process.pid:
                os.kill(child, number)

    def disturb(process):
        signal_ranks(process, signal.SIGSTOP)  # a holder that is slow still holds
        assert run(recipe[recipe.index("pretrain") :], tmp_path) == RunHeld.exit_code
        assert "is being written by process" in capfd.readouterr().err
        signal_ranks(process, signal.SIGKILL)

    assert run(recipe, tmp_path, when_step_logged(tmp_path, 5, disturb)) not in (0, 75)
    assert run(recipe, tmp_path) == 0
    assert losses(tmp_path) == losses(undisturbed)
    same_weights(tmp_path, undisturbed)


def same_weights(first, second):
    for name in ("model", "optimizer", "teacher", "queue", "transport"):
        one, other = (
            load_file(folder / "pretrain" / "checkpoints" / f"step-{STEPS:08}" / f"{name}.safetensors")
            for folder in (first, second)
        )
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), name
