"""Flickr8k from published encoders, several seeds: the tables of docs/flickr8k.md.

    python -m benchmarks.campaigns.flickr8k_real [--seeds 0 1 2] [--arms real maps clean] [--out docs/flickr8k]

It takes the shards that `make flickr8k` writes, and leaves runs in `runs/`. Each seed of an arm is pretrained, fine-tuned and scored on
Flickr8k's dev images; the checkpoint is chosen by images held out of train. The same command resumes.

    real      EfficientNet-lite0 and MiniLM, both frozen: pretrained, dual head, then fusion head
    clean     the same image encoder, a text encoder from random weights: pretrained, dual head
    shuffled  `real`, pretrained for one epoch, where each training image has another's captions: must score chance (needs `--source`)
    maps      two linear maps over the same frozen encoders, and their own shuffled control

Score records go to OUT, without the ranks of single queries, which stay in `runs/`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from statistics import mean

from retrieval.compare import compare_records
from retrieval.protocols import DIRECTIONS, RECALLS
from retrieval.records import read_record

DATA = Path("runs/data/flickr8k")


def ligature(*arguments: object) -> None:
    """Run a command of Ligature; a failure ends the campaign."""
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    print(">", "ligature", *arguments, flush=True)
    subprocess.run(command, check=True)


def train(stage: str, recipe: str, name: str, seed: int, *overrides: object) -> Path:
    """Pretrain or fine-tune on two processes, unless the run has ended; return its folder."""
    folder = Path("runs") / name
    settings = ["--config", f"{stage}/{recipe}.yaml", "--name", name, "--training.seed", seed, *overrides]
    ligature("launch", "local", "--nproc", 2, stage, *settings)
    return folder


def evaluate(run: Path, heads: str = "[dual]") -> list[Path]:
    """Score a run on dev; return the records, one a head."""
    out = run / "scores.json"
    names = [head.strip() for head in heads.strip("[]").split(",")]
    records = [out, *(out.with_name(f"scores-{head}.json") for head in names[1:])]
    if not all(record.exists() for record in records):
        settings = ["--config", "finetune/flickr8k_evaluate.yaml", "--checkpoint", run, "--heads", heads, "--out", out]
        ligature("evaluate", *settings)
    return records


def run_real(seed: int) -> dict[str, Path]:
    """Train and score one seed of `real`; return its records by name."""
    start = train("pretrain", "flickr8k_real_cpu", f"flickr8k_real_cpu-{seed}", seed)
    dual = train("finetune", "flickr8k_real_cpu", f"{start.name}_finetuned", seed, "--checkpoint", start)
    fusion = train("finetune", "flickr8k_real_fusion_cpu", f"{start.name}_fusion", seed, "--checkpoint", dual)
    pretrained, reranked = evaluate(start, "[dual, fusion]")
    both = evaluate(fusion, "[dual, fusion]")
    return {
        "pretrained, dual": pretrained,
        "pretrained, fusion": reranked,
        "fine-tuned, dual": evaluate(dual)[0],
        "fusion tuned, dual": both[0],
        "fusion tuned, fusion": both[1],
    }


def run_clean(seed: int) -> dict[str, Path]:
    """Train and score one seed of `clean`; return its records by name."""
    start = train("pretrain", "flickr8k_clean_cpu", f"flickr8k_clean_cpu-{seed}", seed)
    dual = train("finetune", "flickr8k_clean_cpu", f"{start.name}_finetuned", seed, "--checkpoint", start)
    return {"clean, pretrained, dual": evaluate(start)[0], "clean, fine-tuned, dual": evaluate(dual)[0]}


def shard_shuffled(source: Path) -> Path:
    """Shard the 5,500 training images, each with the captions of another; return the folder."""
    out, captions = DATA / "train-shuffled", DATA / "shuffled.token.txt"
    names = (source / "Flickr_8k.trainImages.txt").read_text().split()[:5500]
    others = names.copy()
    Random(0).shuffle(others)
    receiver = dict(zip(others, others[1:] + others[:1], strict=True))  # a ring: no image keeps its own
    lines = (line.partition("#") for line in (source / "Flickr8k.token.txt").read_text().splitlines())
    moved = [f"{receiver[image]}#{rest}" for image, _, rest in lines if image in receiver]
    captions.write_text("\n".join(moved) + "\n")
    images = next(path for pattern in ("Flicker8k_Dataset", "*.tar") for path in source.glob(pattern))
    ligature("shard", captions, "--images", images, "--resize_shorter", 256, "--out", out)
    return out


def run_shuffled(seed: int, source: Path) -> dict[str, Path]:
    """Train and score `real` on pairs that do not belong together; return its record by name."""
    data = ["--data.train", shard_shuffled(source)]
    start = train("pretrain", "flickr8k_real_cpu", f"flickr8k_shuffled-{seed}", seed, *data, "--training.epochs", 1)
    tune = ["--checkpoint", start, *data]
    dual = train("finetune", "flickr8k_real_cpu", f"{start.name}_finetuned", seed, *tune)
    return {"shuffled pairs, fine-tuned, dual": evaluate(dual)[0]}


def run_maps(seed: int) -> dict[str, Path]:
    """Train and score the two linear maps over the encoders of `real`'s first seed; return records by name."""
    records = {}
    for name, flags in {"two linear maps": [], "two linear maps, shuffled pairs": ["--shuffled"]}.items():
        folder = Path("runs") / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        records[name] = folder / "scores.json"
        if records[name].exists():
            continue
        sets = ["--train", DATA / "train", "--test", DATA / "dev", "--out", folder / "maps.npz", "--seed", seed]
        script = [sys.executable, "-m", "benchmarks.campaigns.linear_maps", "runs/flickr8k_real_cpu-0"]
        subprocess.run([*script, *map(str, sets), *flags], check=True)
        scores = ["--scores", folder / "maps.npz", "--data", DATA / "dev", "--out", records[name]]
        ligature("evaluate", *scores, "--dataset", "Flickr8k", "--split", "dev", "--training", "fine-tuned-on Flickr8k")
    return records


ARMS = ("real", "clean", "shuffled", "maps")


def run(arm: str, seed: int, source: Path) -> dict[str, Path]:
    """Run one seed of an arm; return its records by name."""
    if arm == "shuffled":
        return run_shuffled(seed, source)
    return {"real": run_real, "clean": run_clean, "maps": run_maps}[arm](seed)


def summarize(name: str, paths: list[Path]) -> str:
    """Return a row of markdown: of one seed, each measure with its interval over images; of several, means and the seeds' range."""
    records = [read_record(path) for path in paths]
    cells = []
    for direction in DIRECTIONS:
        for recall in RECALLS:
            values = [record[direction][recall] for record in records]
            low, high = (min(values), max(values)) if len(values) > 1 else records[0][direction]["interval"][recall]
            cells.append(f"{mean(values):.1f} [{low:.1f}, {high:.1f}]")
    sums = [record["rsum"] for record in records]
    return f"| {name} | " + " | ".join(cells) + f" | {mean(sums):.1f} ({', '.join(f'{one:.1f}' for one in sums)}) |"


def difference(first: Path, second: Path) -> str:
    """Return the paired difference in rsum of two records, with its interval over images."""
    row = next(row for row in compare_records(first, second)["differences"] if row["measure"] == "rsum")
    low, high = row["interval"]
    return f"{row['difference']:+.1f} [{low:+.1f}, {high:+.1f}] {row['verdict']}"


def main() -> int:
    """Run the arms seed by seed, copy their records, and print the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=["real", "maps", "clean"])
    parser.add_argument("--out", type=Path, default=Path("docs/flickr8k"))
    parser.add_argument("--source", type=Path, default=Path("flickr8k"), help="Flickr8k's own files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Path]] = {}
    for arm in options.arms:
        for seed in options.seeds:
            for name, record in run(arm, seed, options.source).items():
                found.setdefault(name, []).append(record)
                shutil.copy(record, options.out / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.json")
    print("| model | TR R@1 | TR R@5 | TR R@10 | IR R@1 | IR R@5 | IR R@10 | rsum (by seed) |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(summarize(name, paths) for name, paths in found.items()))
    pairs = [
        ("fusion tuned, dual", "fusion tuned, fusion"),
        ("fine-tuned, dual", "fusion tuned, fusion"),
        ("pretrained, dual", "pretrained, fusion"),
        ("two linear maps", "fine-tuned, dual"),
        ("two linear maps", "pretrained, dual"),
    ]
    for first, second in pairs:
        if first in found and second in found:
            for seed, records in zip(options.seeds, zip(found[first], found[second], strict=True), strict=True):
                print(f"{second} - {first}, seed {seed}: rsum {difference(*records)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
