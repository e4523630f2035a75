"""Do several levels help where a cue is fine, and not only because they are more weights? HAT's claim on drawn scenes.

    python -m benchmarks.campaigns.hat_levels --checkpoint runs/demo/pretrain --train SHARDS --validation SHARDS

Every arm of a seed starts from the same checkpoint and sees the same data in the same order; arms differ in HAT's levels alone:

    levels       three pairs of levels, shallow to deep
    last         the last level
    last_thrice  the last level with three pairs of projections: as many weights as `levels`
    mean         the three levels, mean tokens compared: no attention

Each is measured on minimal pairs of drawn scenes, chance 50 %: two images and two captions that differ in one group's texture
(fine, local), or in which group stands where (global), the words being the same. A pair's four comparisons count a quarter each.
Beside that, the captions of unseen scenes that find their image first among all of them, by what the captions tell.
The prediction, written before any run: `levels` beats `last_thrice` on texture by more than on layout.

Results are kept one file a seed and arm, so the same command goes on where it stopped. It prints each arm's mean and, for the
differences within seeds, a 95 % t interval: `unresolved` where it holds zero.
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
    shape = group.shape + ("es" if group.shape == "cross" else "s") * (group.count > 1)
    return f"{COUNT[group.count]} {group.size} {group.texture} {group.colour} {shape}"


def tell(scene: Scene) -> str:
    assert scene.second is not None
    return f"{phrase(scene.first)} {WHERE[scene.place]} {phrase(scene.second)}"


def texture_pairs(count: int) -> list[Pair]:
    """Scenes that differ in one group's texture; the captions in that one word."""
    random, pairs = Random("texture pairs"), []
    for scene in scenes("test", count, 0, World(single_share=0.0)):
        assert scene.second is not None
        name = random.choice(("first", "second"))
        group = getattr(scene, name)
        other = random.choice([texture for texture in ("plain", "striped", "dotted") if texture != group.texture])
        changed = replace(scene, **{name: replace(group, texture=other)})
        # Scenes put their groups in order; the second caption keeps the first one's, so that one word alone differs.
        caption = tell(scene)
        said, new = phrase(group), phrase(replace(group, texture=other))
        pairs.append((scene, caption, changed, caption.replace(said, new, 1)))
    return pairs


def layout_pairs(count: int) -> list[Pair]:
    """Scenes whose groups have changed places; the captions are of the same words."""
    pairs = []
    for scene in scenes("test", count, 0, World(single_share=0.0)):
        assert scene.second is not None
        swapped = f"{phrase(scene.second)} {WHERE[scene.place]} {phrase(scene.first)}"
        pairs.append((scene, tell(scene), scene.swapped(), swapped))
    return pairs


@torch.no_grad()
def accuracy(hat: LoadedHat, pairs: list[Pair], size: int) -> float:
    """Share of right comparisons, percent: each caption with both images, each image with both captions; a tie is half."""
    transform, right = EvaluationTransform(hat.model.encoders.image_size), []
    for number, (one, caption, other, its) in enumerate(pairs):
        pictures: list[Image.Image] = [draw(scene, size, number) for scene in (one, other)]
        ids, mask = hat.tokenizer([caption, its])
        images = hat.model.image_levels(torch.stack([transform(picture) for picture in pictures]))
        scores: Tensor = hat.model.score(images, hat.model.text_levels(ids, mask), mask)
        for better, worse in (((0, 0), (0, 1)), ((0, 0), (1, 0)), ((1, 1), (1, 0)), ((1, 1), (0, 1))):
            right.append(float(scores[better] > scores[worse]) + 0.5 * float(scores[better] == scores[worse]))
    return 100 * float(np.mean(right))


def tells(caption: Caption) -> str:
    """The type of a caption: `texture, place`, `texture`, `place` or `neither`."""
    facts = [fact for fact in ("texture", "place") if any(group.get(fact) for group in caption.groups)]
    return ", ".join(facts) or "neither"


@torch.no_grad()
def found_first(hat: LoadedHat, count: int, size: int) -> dict[str, float]:
    """Type of caption -> the percent that find their image first among `count`. Other images that a caption fits do not count."""
    drawn, transform = scenes("test", count), EvaluationTransform(hat.model.encoders.image_size)
    pictures = [draw(scene, size, number) for number, scene in enumerate(drawn)]
    images = hat.model.image_levels(torch.stack([transform(picture) for picture in pictures]))
    hits: dict[str, list[float]] = {}
    for number, scene in enumerate(drawn):
        told = describe(scene)
        ids, mask = hat.tokenizer([caption.text for caption in told])
        scores = hat.model.score(images, hat.model.text_levels(ids, mask), mask)
        fitting = torch.tensor([[fits(caption, other) for caption in told] for other in drawn])
        best = scores.masked_fill(fitting, -torch.inf).amax(0)
        for caption, own, other in zip(told, scores[number], best, strict=True):
            hits.setdefault(tells(caption), []).append(float(own > other) + 0.5 * float(own == other))
    return {name: 100 * float(np.mean(found)) for name, found in hits.items()}


def run_arm(name: str, extra: list[str], seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Fine-tune one arm and measure it, or read what an earlier run left."""
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
    found = {
        "texture": accuracy(hat, texture_pairs(options.pairs), options.size),
        "layout": accuracy(hat, layout_pairs(options.pairs), options.size),
        **{f"first: {name}": share for name, share in found_first(hat, options.pairs, options.size).items()},
    }
    write_json(result, found)
    return found


def claim_folder(options: argparse.Namespace, free: tuple[str, ...] = ("out", "seeds", "jobs")) -> None:
    """Make the folder of results and write down what they are results of; refuse one that holds results of other settings."""
    settings = {key: str(value) for key, value in vars(options).items() if key not in free}
    path = options.out / "settings.json"
    options.out.mkdir(parents=True, exist_ok=True)
    if path.exists() and (before := json.loads(path.read_text())) != settings:
        changed = ", ".join(sorted(key for key in settings if settings[key] != before.get(key)))
        raise SystemExit(f"{options.out} holds results of other settings ({changed}); give another --out, or remove it")
    write_json(path, settings)


def spell(differences: np.ndarray) -> str:
    """Mean, interval and verdict of differences within seeds."""
    mean = float(differences.mean())
    if len(differences) < 2:
        return f"{mean:+.2f} (one seed: no interval)"
    half = half_interval(differences)
    verdict = "unresolved" if mean - half <= 0 <= mean + half else "higher" if mean > 0 else "lower"
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] {verdict}"


def half_interval(values: np.ndarray) -> float:
    """Of the 95 % t interval of the mean of at least two values."""
    return float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "train", "validation"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/hat_levels"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each with OMP_NUM_THREADS=1")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument(
        "--size", type=int, default=64, help="pixels a side of the drawings, before the model's resizing"
    )
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--direction", choices=["image_to_text", "text_to_image"], default="text_to_image")
    parser.add_argument(
        "--levels", default="[[1,1],[2,2],[2,3]]", help="the pairs of arm `levels`, the last one being the last level"
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
    places = [(name, arms[name], seed, options) for seed in range(options.seeds) for name in arms]
    with Workers(options.jobs, cli.main) as options.ligature:
        done = list(side_by_side(lambda place: run_arm(*place), places, options.jobs))
    found = {name: [one for place, one in zip(places, done, strict=True) if place[0] == name] for name in arms}
    cues = list(done[0])
    scores = {name: {cue: np.array([one[cue] for one in runs]) for cue in cues} for name, runs in found.items()}
    print(f"\n{options.seeds} seeds, {options.pairs} pairs a cue, percent right (chance 50)")
    print(f"first: captions that find their image first of {options.pairs}, by what they tell, percent")
    for name, measured in scores.items():
        print(f"{name:12}" + "".join(f"  {cue} {values.mean():.1f}" for cue, values in measured.items()))
    for other in ("last_thrice", "last", "mean"):
        gains = {cue: scores["levels"][cue] - scores[other][cue] for cue in cues}
        for cue, gain in gains.items():
            print(f"levels - {other}, {cue}: {spell(gain)}")
        print(f"levels - {other}, texture more than layout: {spell(gains['texture'] - gains['layout'])}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LigatureError as error:
        sys.exit(f"{error}")
