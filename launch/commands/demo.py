"""`ligature demo`: the whole path on drawn shapes. Draw, shard, pretrain, fine-tune, evaluate, show the table.

Tested in tests/end_to_end/test_path.py.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from launch.start.command import print_heading, run_command
from runtime.checks import output_folder
from runtime.files import write_text
from runtime.progress import format_duration
from runtime.recipe import OptionParser

IMAGES = {"train": 8000, "validation": 250, "test": 500}
"""Images of each split, by default."""


def run(arguments: list[str]) -> None:
    """Run every stage by its own command, as a user would. A finished stage does not run again."""
    parser = OptionParser("ligature demo", description="Run the whole path on drawn shapes, on a CPU.")
    parser.add_argument(
        "--out", type=output_folder, default="runs/demo", help="folder for all of it (default runs/demo)"
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs=3,
        default=list(IMAGES.values()),
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help=f"images of each split (default {' '.join(map(str, IMAGES.values()))})",
    )
    parser.add_argument("--pretrain-steps", type=int, help="steps of pretraining (default: the recipe's)")
    parser.add_argument("--finetune-steps", type=int, help="steps of fine-tuning (default: the recipe's)")
    options = parser.parse_args(arguments)
    out, began = options.out, time.monotonic()

    from data_tools.shapes.source import write_source

    if not (out / "source").exists():
        print_heading("drawing scenes")
        write_source(out / "source", dict(zip(IMAGES, options.images, strict=True)), seed=0)
    for split in IMAGES:
        captions, images = out / "source" / f"captions_{split}.json", out / "source" / "images"
        run_command("shard", str(captions), "--images", str(images), "--out", str(out / "shards" / split))
    data = ["--data.train", str(out / "shards" / "train"), "--data.validation", str(out / "shards" / "validation")]
    two_ranks = ("launch", "local", "--nproc", "2")
    steps = ["--training.steps", str(options.pretrain_steps)] if options.pretrain_steps else []
    run_command(*two_ranks, "pretrain", "--config", "pretrain/demo.yaml", "--runs", str(out), *data, *steps)
    steps = ["--training.steps", str(options.finetune_steps)] if options.finetune_steps else []
    checkpoint = ["--checkpoint", str(out / "pretrain")]
    finetune = ("finetune", "--config", "finetune/demo.yaml", "--runs", str(out))
    run_command(*two_ranks, *finetune, *checkpoint, *data, *steps)
    evaluate = ("evaluate", "--config", "finetune/demo_evaluate.yaml", "--data", str(out / "shards" / "test"))
    run_command(*evaluate, "--checkpoint", str(out / "pretrain"), "--out", str(out / "scores-pretrained.json"))
    run_command(*evaluate, "--checkpoint", str(out / "finetune"), "--out", str(out / "scores.json"))

    from finetune.report.curves import plot_curves
    from retrieval.records import read_record, table

    plot_curves([out / "pretrain", out / "finetune"], out / "curves.png")
    names = ("scores-pretrained.json", "scores-pretrained-fusion.json", "scores.json", "scores-fusion.json")
    text = table([read_record(out / name) for name in names])
    write_text(out / "table.md", text + "\n")
    print_heading("the table")
    print(text)
    print(describe_ambiguity(out))
    print(
        f"\n{out} holds the drawings (source/), the shards (shards/), the runs (pretrain/, finetune/), the score records "
        f"(scores*.json), table.md and curves.png.\n"
        f"It took {format_duration(time.monotonic() - began)}. Try: tensorboard --logdir {out}"
    )


def describe_ambiguity(out: Path) -> str:
    """Return a sentence on how many test captions fit more than one test image: no model can tell those apart."""
    from data_tools.shapes.scenes import Group, Scene
    from data_tools.shapes.sentences import Caption, fits

    scenes, captions = [], []
    for line in (out / "source" / "scenes.jsonl").read_text(encoding="utf-8").splitlines():
        truth = json.loads(line)
        if truth["split"] == "test":
            groups = {name: Group(**truth["scene"][name]) for name in ("first", "second") if truth["scene"][name]}
            scenes.append(Scene(**truth["scene"] | groups))
            captions += [Caption(**caption) for caption in truth["captions"]]
    several = sum(sum(fits(caption, scene) for scene in scenes) > 1 for caption in captions)
    return f"{several:,} of the {len(captions):,} test captions fit more than one of the {len(scenes):,} test images."
