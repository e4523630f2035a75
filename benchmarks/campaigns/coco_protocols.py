"""COCO's 5K and 1K x 5 protocols at their real size, with the HAT head, within 16 GB of host memory.

    python benchmarks/campaigns/coco_protocols.py --captions ../shared/data/annotations/coco/coco_test.json.gz [--out runs/coco_protocols]

No COCO images are needed. 5,000 JPEGs are generated under the real names, beside the real 25,010 captions of the Karpathy test
split. The weights are random, so the scores must be chance. Size, memory and bookkeeping are real:

    all pairs   a small HAT scores every image with every caption: coco_5k with all captions, coco_5k and coco_1k with the first
                five, and the extended positives
    full size   a HAT with the paper's tokens (784, 196 and 49 regions an image, 768 wide, three levels of every caption kept)
                reranks a shortlist, under coco_1k

Each evaluation is a process of its own, and its peak memory (RSS) is printed. The exit code is 1 where a peak is above 16 GB, where
a count is not the protocol's, or where a score is far from chance. It takes about 25 minutes on two quiet cores;
`--images 200 --part all` is a quick look under protocol `full`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_tools.tokenizer import CaptionTokenizer, train_tokenizer
from finetune.heads.config import HatConfig, ImageBackboneConfig
from finetune.heads.hat_model import HatModel
from finetune.heads.levels import BackboneEncoders, CheckpointEncoders, LevelEncoders
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from pretrain.weights.load import describe_model
from retrieval.records import read_record
from runtime.checkpoint import write_checkpoint

LIMIT = 16.0
"""GB of host memory."""
SMALL = ModelConfig(
    ImageEncoderConfig("vit_tiny_patch16_224", image_size=32, patch=8, width=32, depth=2, heads=2),
    TextEncoderConfig(width=32, layers=2, heads=2, feed_forward=64, positions=64),
    FusionEncoderConfig(layers=0),
    feature_dim=32,
    codewords=0,
)
ALL_PAIRS = HatConfig(levels=[[1, 1], [2, 2]], width=32, frozen_epochs=0)
# The paper's tokens and widths, but shallow: depth costs time and no memory.
FULL_SIZE = HatConfig(
    encoders="backbones",
    levels=[[1, 2], [2, 3], [3, 4]],
    frozen_epochs=0,
    image=ImageBackboneConfig("swin_base_patch4_window7_224", arguments={"depths": [1, 1, 1, 1]}, weights="none"),
    text=TextEncoderConfig(layers=3),
    tokenizer="as saved",
)


def prepare(captions: Path, out: Path, count: int) -> tuple[Path, CaptionTokenizer]:
    """Cut the caption file to `count` images, generate those images and train a tokenizer.

    Returns:
        The cut caption file, and the tokenizer.
    """
    raw = captions.read_bytes()
    entries = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)[:count]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for entry in entries:
        path = out / "images" / Path(entry["image"]).name
        if not path.exists():
            random = np.random.default_rng(int(path.stem[-12:]))
            small = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            small.resize((256, 192), Image.Resampling.BICUBIC).save(path, quality=85)
    cut = out / "captions.json"
    cut.write_text(json.dumps(entries))
    return cut, train_tokenizer((caption for entry in entries for caption in entry["caption"]), 8000, 32)


def save_random(out: Path, tokenizer: CaptionTokenizer, parts: list[str]) -> dict[str, Path]:
    """Write checkpoints of random weights: a dual head, and the HATs of some parts.

    Args:
        out: where to write.
        tokenizer: saved with each.
        parts: `all`, `full` or both.

    Returns:
        Name of a checkpoint -> its folder.
    """
    torch.manual_seed(0)
    network = AlignmentModel(SMALL, tokenizer.vocabulary)
    about = describe_model(SMALL, 32, "untrained")
    models = {"dual": (dict(network.named_parameters()), about)}
    for name in parts:
        config = {"all": ALL_PAIRS, "full": FULL_SIZE}[name]
        uses_checkpoint = config.encoders == "checkpoint"
        encoders: LevelEncoders = (
            CheckpointEncoders(network)
            if uses_checkpoint
            else BackboneEncoders(config, tokenizer.vocabulary, start=False)
        )
        description = {"head": "hat", "hat": asdict(config), "model": asdict(SMALL) if uses_checkpoint else None}
        models[name] = HatModel(encoders, config).state_dict(), about | description
    folders = {}
    for name, (weights, description) in models.items():
        folders[name] = out / f"{name}-random"
        if not folders[name].exists():
            write_checkpoint(folders[name], {"model": weights}, {"model": description}, tokenizer.save)
    return folders


def evaluate(name: str, out: Path, *arguments: str) -> tuple[dict, float, float]:
    """Run one `ligature evaluate`; return its record, its peak memory in GB, and its seconds."""
    path, start = out / f"{name}.json", time.monotonic()
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "evaluate",
        "--out",
        str(path),
        "--dataset",
        "COCO (generated images)",
    ]
    process = subprocess.Popen([*command, "--split", "test", "--device", "cpu", "--workers", "0", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name}: ligature evaluate failed")
    return read_record(path), usage.ru_maxrss * 1024 / 1e9, time.monotonic() - start


def main() -> int:
    """Run the evaluations; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, required=True, help="coco_test.json, ALBEF's or BLIP's format")
    parser.add_argument("--out", type=Path, default=Path("runs/coco_protocols"))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--part", choices=["all", "full"], nargs="+", default=["all", "full"])
    parser.add_argument("--shortlist", type=int, default=8)
    options = parser.parse_args()
    out, correct = options.out, True
    cut, tokenizer = prepare(options.captions, out, options.images)
    folders = save_random(out, tokenizer, options.part)
    full_split = options.images == 5000
    five_k, one_k = ("coco_5k", "coco_1k") if full_split else ("full", "full")
    data = ("--data", str(cut), "--images", str(out / "images"))
    first = ("--captions_per_image", "5")
    runs = []
    if "all" in options.part:
        hat = ("--checkpoint", str(folders["all"]))
        extended = ("--extended", "true") if full_split else ()
        runs += [
            ("all-5k-every-caption", *hat, *data, "--protocol", five_k),
            ("all-5k", *hat, *data, *first, "--protocol", five_k, *extended),
            ("all-1k", *hat, *data, *first, "--protocol", one_k),
        ]
    if "full" in options.part:
        lists = ("--shortlist_from", str(folders["dual"]), "--shortlist", str(options.shortlist), "--batch_size", "16")
        runs.append(("full-size-1k", "--checkpoint", str(folders["full"]), *data, *first, *lists, "--protocol", one_k))
    for name, *arguments in runs:
        record, memory, seconds = evaluate(name, out, *arguments)
        captions = record["captions"]
        counts = f"{record['images']:,} images, {captions:,} captions ({record['captions_per_image']})"
        print(f"{name}: {record['protocol']}, {counts}: {memory:.1f} GB at its peak, {seconds / 60:.1f} min")
        expected = 25_010 if name.endswith("every-caption") else 25_000
        if memory > LIMIT or (full_split and captions != expected):
            correct = False
        for direction in ("image_to_text", "text_to_image"):
            recall, chance = record[direction]["R@10"], record["chance"][direction]["R@10"]
            if recall > 5 * chance + 2:
                print(
                    f"{name}: {direction} R@10 is {recall:.2f} %, chance is {chance:.2f} %, and random weights know nothing"
                )
                correct = False
    print(f"at most {LIMIT:.0f} GB, counts and chance as they must be" if correct else "something is wrong, see above")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
