"""HAT's claim on drawn scenes: do several levels help where a cue is fine, beyond being more weights?

    python -m benchmarks.campaigns.hat_levels --checkpoint runs/demo/pretrain --train SHARDS --validation SHARDS

All arms of a seed start from the same checkpoint and see the same data in the same order. They differ in HAT's levels alone:

    levels       three pairs of levels, shallow to deep
    last         the last level
    last_thrice  the last level with three pairs of projections: as many weights as `levels`
    mean         the three levels by their mean tokens, without attention

Each arm is measured on minimal pairs of drawn scenes, where chance is 50 %. The two images and captions of a pair differ in one
group's texture (fine, local), or in which group stands where (global, the same words). A pair's four comparisons count a quarter
each. Second, captions of unseen scenes are counted that find their image first among all, by what the captions mention. The
prediction, written before any run: `levels` beats `last_thrice` on texture by more than on layout.

Each seed and arm has its own result file, so the same command resumes. It prints each arm's mean and a 95 % t interval of the
differences within seeds: `unresolved` where it holds zero.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from scipy.stats import t as student
from torch import Tensor

from data_tools.pixels.transforms import EvaluationTransform
from data_tools.shapes.drawing import draw
from data_tools.shapes.scenes import Group, Scene, World, scenes
from data_tools.shapes.sentences import Caption, describe, fits
from finetune.heads.hat_model import LoadedHat
from launch import cli
from launch.ablation.workers import Workers, side_by_side
from runtime.errors import LigatureError
from runtime.files import write_json

COUNT = {1: "a", 2: "two", 3: "three"}
WHERE = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
Pair = tuple[Scene, str, Scene, str]


def phrase(group: Group) -> str:
    """Return a group in words, with all it has: "two small striped red circles"."""
    shape = group.shape + ("es" if group.shape == "cross" else "s") * (group.count > 1)
    return f"{COUNT[group.count]} {group.size} {group.texture} {group.colour} {shape}"


def write_caption(scene: Scene) -> str:
    """Return a scene of two groups in words."""
    assert scene.second is not None
    return f"{phrase(scene.first)} {WHERE[scene.place]} {phrase(scene.second)}"


def texture_pairs(count: int) -> list[Pair]:
    """Return pairs of scenes that differ in one group's texture; their captions differ in that one word."""
    random, pairs = Random("texture pairs"), []
    for scene in scenes("test", count, 0, World(single_share=0.0)):
        assert scene.second is not None
        name = random.choice(("first", "second"))
        group = getattr(scene, name)
        other = random.choice([texture for texture in ("plain", "striped", "dotted") if texture != group.texture])
        changed = replace(scene, **{name: replace(group, texture=other)})
        # A changed scene may order its groups anew. Its caption keeps the first one's order, so that only one word differs.
        caption = write_caption(scene)
        old, new = phrase(group), phrase(replace(group, texture=other))
        pairs.append((scene, caption, changed, caption.replace(old, new, 1)))
    return pairs


def layout_pairs(count: int) -> list[Pair]:
    """Return pairs of scenes whose groups have changed places; their captions have the same words."""
    pairs = []
    for scene in scenes("test", count, 0, World(single_share=0.0)):
        assert scene.second is not None
        swapped = f"{phrase(scene.second)} {WHERE[scene.place]} {phrase(scene.first)}"
        pairs.append((scene, write_caption(scene), scene.swapped(), swapped))
    return pairs


@torch.no_grad()
def accuracy(hat: LoadedHat, pairs: list[Pair], size: int) -> float:
    """Return the percentage of right comparisons of each caption with both images and each image with both captions.

    A tie counts a half. `size`: pixels a side of the drawings.
    """
    transform, right = EvaluationTransform(hat.model.encoders.image_size), []
    for number, (scene, caption, other_scene, other_caption) in enumerate(pairs):
        pictures: list[Image.Image] = [draw(drawn, size, number) for drawn in (scene, other_scene)]
        ids, mask = hat.tokenizer([caption, other_caption])
        images = hat.model.image_levels(torch.stack([transform(picture) for picture in pictures]))
        scores: Tensor = hat.model.score(images, hat.model.text_levels(ids, mask), mask)
        for better, worse in (((0, 0), (0, 1)), ((0, 0), (1, 0)), ((1, 1), (1, 0)), ((1, 1), (0, 1))):
            right.append(float(scores[better] > scores[worse]) + 0.5 * float(scores[better] == scores[worse]))
    return 100 * float(np.mean(right))


def caption_type(caption: Caption) -> str:
    """Return what a caption mentions: `texture, place`, `texture`, `place` or `neither`."""
    facts = [fact for fact in ("texture", "place") if any(group.get(fact) for group in caption.groups)]
    return ", ".join(facts) or "neither"


@torch.no_grad()
def found_first(hat: LoadedHat, count: int, size: int) -> dict[str, float]:
    """Return, by type of caption, the percentage that find their image first among `count`.

    Other images that a caption fits do not count against it.
    """
    drawn, transform = scenes("test", count), EvaluationTransform(hat.model.encoders.image_size)
    pictures = [draw(scene, size, number) for number, scene in enumerate(drawn)]
    images = hat.model.image_levels(torch.stack([transform(picture) for picture in pictures]))
    hits: dict[str, list[float]] = {}
    for number, scene in enumerate(drawn):
        captions = describe(scene)
        ids, mask = hat.tokenizer([caption.text for caption in captions])
        scores = hat.model.score(images, hat.model.text_levels(ids, mask), mask)
        fitting = torch.tensor([[fits(caption, other) for caption in captions] for other in drawn])
        best = scores.masked_fill(fitting, -torch.inf).amax(0)
        for caption, own, other in zip(captions, scores[number], best, strict=True):
            hits.setdefault(caption_type(caption), []).append(float(own > other) + 0.5 * float(own == other))
    return {name: 100 * float(np.mean(values)) for name, values in hits.items()}


def run_arm(name: str, extra: list[str], seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Fine-tune one arm of a seed and measure it, or read the result of an earlier run."""
    result = options.out / f"{name}-{seed}.json"
    if result.exists():
        return json.loads(result.read_text())
    command = ["finetune", "--config", "finetune/demo.yaml", "--head", "hat"]
    command += ["--name", f"{name}-{seed}", "--runs", str(options.out), "--checkpoint", str(options.checkpoint)]
    command += ["--data.train", str(options.train), "--data.validation", str(options.validation)]
    command += ["--training.seed", str(seed), "--training.steps", str(options.steps), "--hat.width", str(options.width)]
    command += ["--training.global_batch", str(options.batch)]
    command += ["--training.validate_every", str(options.steps), "--training.checkpoint_every", str(options.steps)]
    command += ["--hat.frozen_epochs", "1", "--hat.encoder_lr_share", "0.5", "--hat.direction", options.direction]
    options.ligature(*command, *extra)
    hat = LoadedHat(options.out / f"{name}-{seed}")
    figures = {
        "texture": accuracy(hat, texture_pairs(options.pairs), options.size),
        "layout": accuracy(hat, layout_pairs(options.pairs), options.size),
        **{f"first: {name}": share for name, share in found_first(hat, options.pairs, options.size).items()},
    }
    write_json(result, figures)
    return figures


def claim_folder(options: argparse.Namespace, free: tuple[str, ...] = ("out", "seeds", "jobs")) -> None:
    """Make the folder of results and write its settings down; refuse one that holds results of other settings.

    Args:
        options: the command line, with `out`.
        free: options that may change between calls.
    """
    settings = {key: str(value) for key, value in vars(options).items() if key not in free}
    path = options.out / "settings.json"
    options.out.mkdir(parents=True, exist_ok=True)
    if path.exists() and (old_settings := json.loads(path.read_text())) != settings:
        changed = ", ".join(sorted(key for key in settings if settings[key] != old_settings.get(key)))
        raise SystemExit(f"{options.out} holds results of other settings ({changed}); give another --out, or remove it")
    write_json(path, settings)


def format_differences(differences: np.ndarray) -> str:
    """Return the mean of differences within seeds, its 95 % interval, and higher, lower or unresolved."""
    mean = float(differences.mean())
    if len(differences) < 2:
        return f"{mean:+.2f} (one seed: no interval)"
    half = half_interval(differences)
    verdict = "unresolved" if mean - half <= 0 <= mean + half else "higher" if mean > 0 else "lower"
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] {verdict}"


def half_interval(values: np.ndarray) -> float:
    """Return half the width of the 95 % t interval of the mean of two values or more."""
    return float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def main() -> int:
    """Run all arms of all seeds and print the comparison; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "train", "validation"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/hat_levels"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; each needs one core with OMP_NUM_THREADS=1"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument(
        "--size", type=int, default=64, help="pixels a side of the drawings, before the model's resizing"
    )
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--direction", choices=["image_to_text", "text_to_image"], default="text_to_image")
    parser.add_argument(
        "--levels",
        default="[[1,1],[2,2],[2,3]]",
        help="pairs of arm `levels`; the last pair is the level of arm `last`",
    )
    options = parser.parse_args()
    claim_folder(options)
    last = json.loads(options.levels)[-1]
    count = len(json.loads(options.levels))
    arms = {
        "levels": ["--hat.levels", options.levels],
        "last": ["--hat.levels", json.dumps([last])],
        "last_thrice": ["--hat.levels", json.dumps([last] * count)],
        "mean": ["--hat.levels", options.levels, "--hat.attention", "mean"],
    }
    tasks = [(name, arms[name], seed, options) for seed in range(options.seeds) for name in arms]
    with Workers(options.jobs, cli.main) as options.ligature:
        results = list(side_by_side(lambda task: run_arm(*task), tasks, options.jobs))
    by_arm = {name: [result for task, result in zip(tasks, results, strict=True) if task[0] == name] for name in arms}
    cues = list(results[0])
    scores = {name: {cue: np.array([run[cue] for run in runs]) for cue in cues} for name, runs in by_arm.items()}
    print(f"\n{options.seeds} seeds, {options.pairs} pairs a cue, percent right (chance 50)")
    print(f"first: captions that find their image first of {options.pairs}, by what they mention, percent")
    for name, measured in scores.items():
        print(f"{name:12}" + "".join(f"  {cue} {values.mean():.1f}" for cue, values in measured.items()))
    for other in ("last_thrice", "last", "mean"):
        gains = {cue: scores["levels"][cue] - scores[other][cue] for cue in cues}
        for cue, gain in gains.items():
            print(f"levels - {other}, {cue}: {format_differences(gain)}")
        print(f"levels - {other}, texture more than layout: {format_differences(gains['texture'] - gains['layout'])}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LigatureError as error:
        sys.exit(f"{error}")
