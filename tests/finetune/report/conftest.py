"""Fixtures of the tests of pages: a small pretrained run."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main


@pytest.fixture(scope="session")
def reported(drawn, tmp_path_factory) -> Path:
    """The folder of a run of five steps, with codewords and a fusion encoder. Copy it to change it."""
    folder = tmp_path_factory.mktemp("reported")
    data = ["--data.train", str(drawn / "train"), "--data.validation", str(drawn / "validation")]
    model = [
        "--model.image.width",
        "32",
        "--model.image.depth",
        "1",
        "--model.text.width",
        "32",
        "--model.text.layers",
        "1",
    ]
    model += [
        "--model.text.feed_forward",
        "64",
        "--model.fusion.layers",
        "1",
        "--model.codewords",
        "8",
        "--teacher.queue",
        "8",
    ]
    short = [
        "--training.global_batch",
        "8",
        "--training.micro_batch",
        "8",
        "--training.steps",
        "5",
        "--training.log_every",
        "1",
    ]
    arguments = ["--config", "pretrain/demo.yaml", "--name", "small", "--runs", str(folder), *data, *model, *short]
    assert main(["pretrain", *arguments]) == 0
    return folder / "small"
