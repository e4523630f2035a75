"""`ligature demo`: the whole path on drawn shapes. Draw, shard, pretrain on two processes, fine-tune, evaluate, show the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from launch.start.local import end_with_parent
from runtime.errors import LigatureError
from runtime.files import write_text
from runtime.progress import format_duration
from runtime.recipe import OptionParser

IMAGES = {"train": 8000, "validation": 250, "test": 500}


def demo(arguments: list[str]) -> None:
    """Run every stage by its own command, as a user would; a stage that is done already is not done again."""
    parser = OptionParser("ligature demo", description="The whole path on drawn shapes, on a CPU.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for all of it (default runs/demo)")
    parser.add_argument(
        "--images", type=int, nargs=3, default=list(IMAGES.values()), metavar=("TRAIN", "VALIDATION", "TEST")
    )
    parser.add_argument("--pretrain-steps", type=int, help="fewer steps than the recipe's, for a quick look")
    parser.add_argument("--finetune-steps", type=int)
    options = parser.parse_args(arguments)
    out, began = options.out, time.monotonic()

    from data_tools.shapes.source import write_source

    if not (out / "source").exists():
        heading("drawing scenes")
        write_source(out / "source", dict(zip(IMAGES, options.images, strict=True)), seed=0)
    for split in IMAGES:
        captions = out / "source" / f"captions_{split}.json"
        run("shard", str(captions), "--images", str(out / "source" / "images"), "--out", str(out / "shards" / split))
    data = ["--data.train", str(out / "shards" / "train"), "--data.validation", str(out / "shards" / "validation")]
    more = ["--training.steps", str(options.pretrain_steps)] if options.pretrain_steps else []
    two = ("launch", "local", "--nproc", "2")
    run(*two, "pretrain", "--config", "pretrain/demo.yaml", "--runs", str(out), *data, *more)
    more = ["--training.steps", str(options.finetune_steps)] if options.finetune_steps else []
    checkpoint = ["--checkpoint", str(out / "pretrain")]
    run(*two, "finetune", "--config", "finetune/demo.yaml", "--runs", str(out), *checkpoint, *data, *more)
    evaluate = ("evaluate", "--config", "finetune/demo_evaluate.yaml", "--data", str(out / "shards" / "test"))
    run(*evaluate, "--checkpoint", str(out / "pretrain"), "--out", str(out / "scores-pretrained.json"))
    run(*evaluate, "--checkpoint", str(out / "finetune"), "--out", str(out / "scores.json"))

    from finetune.report.curves import plot_curves
    from retrieval.records import read_record, table

    plot_curves([out / "pretrain", out / "finetune"], out / "curves.png")
    names = ("scores-pretrained.json", "scores-pretrained-fusion.json", "scores.json", "scores-fusion.json")
    text = table([read_record(out / name) for name in names])
    write_text(out / "table.md", text + "\n")
    heading("the table")
    print(text)
    print(ambiguity(out))
    print(
        f"\nIn {out}: the drawings (source/), shards/, the runs (pretrain/, finetune/), scores.json and its kin, table.md, "
        f"curves.png.\nTook {format_duration(time.monotonic() - began)}. Try: tensorboard --logdir {out}"
    )


def run(*command: str) -> None:
    """One `ligature` command in this process's environment, its line shown first."""
    heading("ligature " + " ".join(command))
    line = [sys.executable, "-m", "launch.cli", *command]
    code = subprocess.run(line, env=os.environ, check=False, preexec_fn=end_with_parent(os.getpid())).returncode
    if code:
        error = LigatureError(
            f"the demo stopped in `ligature {command[0]}` (exit code {code}); the same command goes on from there"
        )
        error.exit_code = code
        raise error


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def ambiguity(out: Path) -> str:
    """How many test captions fit more than one test image: no model can tell those apart."""
    from data_tools.shapes.scenes import Group, Scene
    from data_tools.shapes.sentences import Caption, fits

    scenes, captions = [], []
    for line in (out / "source" / "scenes.jsonl").read_text(encoding="utf-8").splitlines():
        truth = json.loads(line)
        if truth["split"] == "test":
            groups = {name: Group(**truth["scene"][name]) for name in ("first", "second") if truth["scene"][name]}
            scenes.append(Scene(**truth["scene"] | groups))
            captions += [Caption(**told) for told in truth["captions"]]
    several = sum(sum(fits(caption, scene) for scene in scenes) > 1 for caption in captions)
    return f"{several:,} of the {len(captions):,} test captions fit more than one of the {len(scenes):,} test images."
