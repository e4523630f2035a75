"""Trackers get every figure of a run and its recipe, go on after a restart, and never end a run."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import accelerate.tracking
import pytest

from launch.cli import main
from runtime.errors import RecipeError
from training.config import LoopConfig
from training.trackers import Trackers

TINY = "--model.image.width 32 --model.image.depth 1 --model.text.width 32 --model.text.layers 1 --model.text.feed_forward 64"
TINY += " --model.fusion.layers 1 --model.codewords 8 --teacher.queue 8"
SHORT = "--training.global_batch 8 --training.steps 2 --training.log_every 1 --training.validate_every 2 --training.device cpu"


class Recorder(accelerate.tracking.GeneralTracker):
    """A tracker by accelerate's interface that keeps what it gets."""

    name = "wandb"
    requires_logging_directory = False
    opened: list[Recorder] = []

    def __init__(self, run_name: str, **settings):
        super().__init__()
        self.project, self.settings, self.recipe, self.logged, self.ended = run_name, settings, {}, [], False

    @property
    def tracker(self):
        return self

    def start(self):
        self.opened.append(self)

    def store_init_configuration(self, values):
        self.recipe = values

    def log(self, values, step=None, **_):
        self.logged.append((step, values))

    def finish(self):
        self.ended = True


@pytest.fixture
def recorder(monkeypatch) -> type[Recorder]:
    """Put the recorder where wandb is, and let wandb pass for installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("json") if name == "wandb" else found(name))
    monkeypatch.setattr(accelerate.tracking, "WandBTracker", Recorder)
    monkeypatch.setattr(Recorder, "opened", [])
    return Recorder


def test_both_stages_send_all_figures_and_their_recipe(drawn, tmp_path, recorder, capsys):
    data = [
        "--data.train",
        str(drawn / "train"),
        "--data.validation",
        str(drawn / "validation"),
        "--runs",
        str(tmp_path),
    ]
    tracked = ["--training.trackers", "[wandb]", "--training.tracker_project", "shapes", *SHORT.split(), *data]
    pretrain = [
        "pretrain",
        "--config",
        "pretrain/demo.yaml",
        "--name",
        "first",
        "--training.micro_batch",
        "8",
        *TINY.split(),
    ]
    assert main([*pretrain, *tracked]) == 0
    start = ["--checkpoint", str(tmp_path / "first"), "--name", "tuned"]
    assert main(["finetune", "--config", "finetune/demo.yaml", *start, *tracked]) == 0
    assert [tracker.settings["name"] for tracker in recorder.opened] == ["first", "tuned"]
    for tracker in recorder.opened:
        run = tmp_path / tracker.settings["name"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [{"step": step, **values} for step, values in tracker.logged] == lines and len(lines) == 3
        assert (tracker.recipe["name"], tracker.recipe["training.steps"]) == (run.name, 2)
        assert tracker.project == "shapes" and tracker.ended
        assert json.loads((run / "trackers.json").read_text()) == {"wandb": tracker.settings["id"]}
    assert len({tracker.settings["id"] for tracker in recorder.opened}) == 2
    assert "WARNING: wandb" not in capsys.readouterr().err


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with a recipe alone."""
    (tmp_path / "config.yaml").write_text(
        "name: r\ntraining: {steps: 3, seeds: [1, 2], ema_momentum: null}\nothers: {}\n"
    )
    return tmp_path


def test_a_resumed_run_goes_on_under_its_id(run, recorder):
    first, second = Trackers(), Trackers()
    own = first.start("wandb", run, "p", None)
    assert own and own.startswith(f"{run.name}-") and second.start("wandb", run, "p", own) == own
    before, after = recorder.opened
    assert before.settings == after.settings and before.settings["resume"] == "allow"
    assert before.recipe == {
        "name": "r",
        "training.steps": 3,
        "training.seeds": "[1, 2]",
        "training.ema_momentum": "None",
        "others": "{}",
    }
    assert after.recipe == {}, "the recipe is stored once"


def test_figures_that_are_not_finite_are_left_out(run, recorder):
    with Trackers() as trackers:
        trackers.start("wandb", run, "p", None)
        trackers.write(7, {"a": 1.0, "b": math.nan, "c": math.inf})
    assert recorder.opened[0].logged == [(7, {"a": 1.0})] and recorder.opened[0].ended


def test_a_tracker_that_fails_is_dropped_with_one_warning(run, recorder, capsys, monkeypatch):
    def fail(self, values, step=None, **_):
        self.logged.append(step)
        raise ConnectionError("no\nserver")

    monkeypatch.setattr(Recorder, "log", fail)
    with Trackers() as trackers:
        trackers.start("wandb", run, "p", None)
        trackers.write(1, {"a": 1.0})
        trackers.write(2, {"a": 1.0})
    assert recorder.opened[0].logged == [1]
    assert capsys.readouterr().err == "ligature: WARNING: wandb gets nothing from here on: ConnectionError: no server\n"


def test_a_tracker_that_is_not_installed_is_named_in_one_line(drawn, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else found(name))
    data = ["--data.train", str(drawn / "train"), "--runs", str(tmp_path), "--training.trackers", "[mlflow]"]
    assert main(["pretrain", "--config", "pretrain/demo.yaml", *data]) == 2
    assert capsys.readouterr().err == (
        "ligature: training.trackers has mlflow, which is not installed; `pip install mlflow`, or leave it out\n"
    )
    assert not list(tmp_path.iterdir()), "nothing has begun"


def test_a_tracker_of_another_name_is_refused():
    with pytest.raises(RecipeError, match="has tensorboard; it takes wandb, trackio and mlflow"):
        LoopConfig(trackers=["tensorboard"])  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_a_real_tracker_holds_the_figures(run, name, monkeypatch, capsys):
    """In a database of its own, without a network. Skipped where the package is missing, as in the developers' environment."""
    monkeypatch.setenv("TRACKIO_DIR", str(run / "trackio"))  # read at the import
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run}/mlflow.db")
    pytest.importorskip(name)
    accelerate.PartialState(cpu=True)
    own = None
    for step in (1, 2):  # two starts of one run
        with Trackers() as trackers:
            own = trackers.start(name, run, "p", own)
            trackers.write(step, {"validation/R@1": 10.0 * step})
    assert "WARNING" not in capsys.readouterr().err
    if name == "mlflow":
        import mlflow

        history = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db").get_metric_history(own, "validation/R_at_1")
        assert [(metric.step, metric.value) for metric in history] == [(1, 10.0), (2, 20.0)]
    else:
        import sqlite3

        rows = sqlite3.connect(run / "trackio" / "p.db").execute("select step, metrics from metrics").fetchall()
        assert [(step, json.loads(metrics)) for step, metrics in rows] == [
            (1, {"validation/R@1": 10.0}),
            (2, {"validation/R@1": 20.0}),
        ]
