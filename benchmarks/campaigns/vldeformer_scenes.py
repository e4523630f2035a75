"""VLDeformer on drawn scenes: what a fusion model loses when it is decomposed, and how much faster it becomes.

    python -m benchmarks.campaigns.vldeformer_scenes --seeds 8

It draws a small world, mostly two objects, of four colours, four shapes and two sizes. In the demo's larger world relations are not
learned at all (docs/shapes.md). Each seed has one joint model. It is pretrained, then tuned to match each caption against the same
caption with place words exchanged, which teaches its fusion encoder who stands where. It fuses by cross-attention;
`--fusion single_stream` has not learned relations in as many steps (docs/retrieval.md). Every arm starts from that joint model and
sees the same data in the same order:

    dual         its projected features
    fusion       its fusion encoder on every pair
    untuned      its fusion encoder run on each modality alone (the paper's "w/o decompose")
    dual_tuned   its projected features, tuned by contrast for as long as the arms below
    vldeformer   decomposed and tuned by contrast, without hard negatives
    hard         the same with altered captions (left and right exchanged among others) and images in the denominators
    fresh_joint  the same as `vldeformer`, with new random weights in the joint layers
    cls          the same as `vldeformer`, [CLS] in place of mean tokens

Four figures are measured:

    relation      pairs of scenes that differ only in which group stands where, with captions of the same words; a bag of words has
                  50 %, and a pair's four comparisons count a quarter each
    choice        an image's true caption against one with a shape's name exchanged, for words that training never put in
    words alone   the same choice against the mean of all images; a model that looks has 50 %
    milliseconds  one query in words over a gallery encoded before

The predictions, written before any run: untuned has 50 % on relations; fusion is above vldeformer, and vldeformer above the dual head
and above fresh_joint; mean tokens are above [CLS]; hard negatives raise `choice`, and `words alone` stays within 45 to 55 %. One
change came later, before its arm was run: the dual head that vldeformer is compared with is tuned as long.

Each seed and arm has its own result file, so the same command resumes. It prints each arm's mean and 95 % t intervals of the
differences within seeds (`unresolved` where they hold zero). It draws accuracy over latency, and writes a page of captions that
fusion answers right and VLDeformer wrong.

Tested in tests/finetune/test_vldeformer_scenes.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.campaigns.hat_levels import claim_folder, format_differences, half_interval
from benchmarks.ratios import clock
from data_tools.shapes.drawing import draw
from data_tools.shapes.scenes import SHAPES, World, scenes
from data_tools.shapes.sentences import describe, relation_pairs
from data_tools.shapes.source import write_source
from finetune.encoders import load_encoder
from finetune.heads.decomposed import LoadedVLDeformer
from launch import cli
from launch.ablation.workers import Workers, side_by_side
from pretrain.weights.load import ImageTextModel, load_model
from runtime.errors import LigatureError
from runtime.figures import new_figure, save_figure
from runtime.files import write_json

TRAINED, HELD_OUT = ("circle", "square"), ("star", "cross")
"""Names of shapes that training puts in for others, and those that the choices put in."""
WORLD = World(
    colours=("red", "green", "blue", "yellow"),
    shapes=(*TRAINED, *HELD_OUT),
    counts=(1,),
    plain_share=1.0,
    single_share=0.1,
)


class Matched:
    """A model's fusion encoder as a scorer of all pairs; its images are encoded before."""

    def __init__(self, model: ImageTextModel) -> None:
        self.model = model

    def encode_image(self, images: Tensor) -> Tensor:
        """Return image tokens (images, tokens, width)."""
        return self.model.network.image_encoder(images)

    def score(self, tokens: Tensor, captions: list[str]) -> Tensor:
        """Return logits (images, captions); probabilities of 1 would make ties.

        Args:
            tokens: (images, tokens, width).
            captions: texts.
        """
        network, (ids, mask) = self.model.network, self.model.tokenizer(captions)
        states, read = network.text_encoder(ids, mask), network.fusion_encoder.prepare_images(tokens)
        image, text = torch.meshgrid(torch.arange(len(tokens)), torch.arange(len(captions)), indexing="ij")
        chosen = text.flatten()
        logits = network.match(states[chosen], mask[chosen], read, image.flatten())
        return (logits[:, 1] - logits[:, 0]).view(len(tokens), len(captions))


class Embedded:
    """A dual head or a VLDeformer as a scorer of all pairs."""

    def __init__(self, encoder: ImageTextModel | LoadedVLDeformer) -> None:
        self.model = self.encoder = encoder

    def encode_image(self, images: Tensor) -> Tensor:
        """Return image features (images, width)."""
        return self.encoder.encode_image(images)

    def score(self, features: Tensor, captions: list[str]) -> Tensor:
        """Return cosines (images, captions)."""
        return features @ self.encoder.encode_text(captions).T


Scorer = Matched | Embedded


def encode_pictures(scorer: Scorer, pictures: list[Image.Image]) -> Tensor:
    """Return what the scorer keeps of pictures."""
    return scorer.encode_image(torch.stack([scorer.model.transform(picture) for picture in pictures]))


def relation_accuracy(scorer: Scorer, count: int, size: int) -> float:
    """Return the percentage of right comparisons of `count` pairs; a tie counts a half."""
    right = []
    for number, pair in enumerate(relation_pairs(count, world=WORLD)):
        scores = scorer.score(
            encode_pictures(scorer, [draw(scene, size, number) for scene, _ in pair]),
            [caption.text for _, caption in pair],
        )
        for better, worse in (((0, 0), (0, 1)), ((0, 0), (1, 0)), ((1, 1), (1, 0)), ((1, 1), (0, 1))):
            right.append(float(scores[better] > scores[worse]) + 0.5 * float(scores[better] == scores[worse]))
    return 100 * float(np.mean(right))


def make_choices(count: int) -> list[tuple[int, str, str]]:
    """Return numbers of test scenes, each with a true caption and the same with one shape's name exchanged.

    The name put in is of a shape that the scene lacks. As many stars become crosses as crosses become stars, so that a model that
    goes by the words alone has half of them right.

    Raises:
        ValueError: the scenes hold too few choices.
    """
    by_shape: dict[str, list[tuple[int, str, str]]] = {name: [] for name in HELD_OUT}
    for number, scene in enumerate(scenes("test", 4 * count, world=WORLD)):
        shapes = {group.shape for group in scene.groups} & set(HELD_OUT)
        if len(shapes) != 1:
            continue
        (name,) = shapes
        other = next(held for held in HELD_OUT if held != name)
        for words in (caption.text.split() for caption in describe(scene)):
            indices = [index for index, word in enumerate(words) if shape_name(word) == name]
            if len(indices) == 1:  # crosses are called plus signs too: those have no word to exchange
                index = indices[0]
                bare = words[index].rstrip(",")
                replacement = other + ("es" if other == "cross" else "s") * (bare not in SHAPES)
                altered = [*words[:index], words[index].replace(bare, replacement), *words[index + 1 :]]
                by_shape[name].append((number, " ".join(words), " ".join(altered)))
                break
    half = count // 2
    if (fewest := min(map(len, by_shape.values()))) < half:
        raise ValueError(f"{4 * count} scenes hold {fewest} choices of each kind, not {half}")
    return [item for pair in zip(*by_shape.values(), strict=False) for item in pair][: 2 * half]


def shape_name(word: str) -> str:
    """Return the shape that a word of a caption names, also in the plural or before a comma; return another word as it is."""
    bare = word.rstrip(",")
    return next((name for name in SHAPES if bare in (name, name + "s", name + "es")), word)


def choice_accuracy(scorer: Scorer, count: int, size: int) -> dict[str, float]:
    """Return the percentage of right choices with the image, and for embeddings with the mean of all images."""
    choices, drawn = make_choices(count), scenes("test", 4 * count, world=WORLD)
    features = encode_pictures(scorer, [draw(drawn[number], size, number) for number, _, _ in choices])
    scores = [scorer.score(features[row, None], [true, altered])[0] for row, (_, true, altered) in enumerate(choices)]
    figures = {"choice": share_right(torch.stack(scores))}
    if isinstance(scorer, Embedded):
        mean = features.mean(0, keepdim=True)
        figures["words alone"] = share_right(
            torch.stack([scorer.score(mean, [true, altered])[0] for _, true, altered in choices])
        )
    return figures


def share_right(scores: Tensor) -> float:
    """Return the percentage of right choices; a tie counts a half. `scores`: (choices, 2), the right caption first."""
    return 100 * float(((scores[:, 0] > scores[:, 1]).float() + 0.5 * (scores[:, 0] == scores[:, 1]).float()).mean())


def latency(scorer: Scorer, gallery: int, size: int) -> float:
    """Return the milliseconds of one query over images encoded before: the median of 15, after 3 that warm up."""
    shown = scenes("test", gallery, world=WORLD)
    features = encode_pictures(scorer, [draw(scene, size, number) for number, scene in enumerate(shown)])
    times = []
    for scene in shown[:18]:
        start = clock()
        scorer.score(features, [describe(scene)[0].text])
        times.append(clock() - start)
    return 1000 * float(np.median(times[3:]))


@torch.no_grad()
def measure(scorer: Scorer, options: argparse.Namespace) -> dict[str, float]:
    """Return all figures of one arm and seed."""
    return {
        "relation": relation_accuracy(scorer, options.pairs, options.size),
        **choice_accuracy(scorer, options.pairs, options.size),
        "milliseconds": latency(scorer, options.gallery, options.size),
    }


def draw_world(options: argparse.Namespace) -> Path:
    """Draw the training scenes, and return their shard folder."""
    source, shards = options.out / "source", options.out / "train"
    if not source.exists():
        write_source(source, {"train": options.scenes}, options.size, world=WORLD)
    options.ligature(
        "shard", str(source / "captions_train.json"), "--images", str(source / "images"), "--out", str(shards)
    )
    return shards


def pretrain(seed: int, options: argparse.Namespace) -> Path:
    """Pretrain a seed's model, and return its run folder."""
    name = f"pretrain-{seed}"
    steps = str(options.pretrain_steps)
    options.ligature(
        "pretrain", "--config", "pretrain/demo.yaml", "--name", name, "--runs", str(options.out),
        "--model.fusion.kind", options.fusion, "--data.train", str(options.train), "--training.seed", str(seed),
        "--training.micro_batch", "64", "--training.steps", steps, "--training.checkpoint_every", steps,
        "--training.validate_every", steps,
    )  # fmt: skip
    return options.out / name


def tune(
    name: str, seed: int, recipe: str, source: str, steps: int, extra: list[str], options: argparse.Namespace
) -> Path:
    """Fine-tune the model of a seed's run `source`, and return the new run's folder. A finished run is left as it is."""
    options.ligature(
        "finetune", "--config", recipe, "--name", f"{name}-{seed}", "--runs", str(options.out),
        "--checkpoint", str(options.out / f"{source}-{seed}"), "--dataset", "shapes", "--data.train", str(options.train),
        "--training.seed", str(seed), "--training.steps", str(steps), "--training.checkpoint_every", str(steps),
        "--training.validate_every", str(steps), *extra,
    )  # fmt: skip
    return options.out / f"{name}-{seed}"


def make_joint_model(seed: int, options: argparse.Namespace) -> Path:
    """Pretrain and tune the joint model of a seed, and return its run folder."""
    pretrain(seed, options)
    # A seed learns relations all at once, or not yet: smaller batches and more weight bring that moment forward.
    sooner = [
        "--training.global_batch",
        "32",
        "--exchanged.weight",
        "3",
    ]
    return tune("joint", seed, "finetune/shapes_relations.yaml", "pretrain", options.joint_steps, sooner, options)


def arms(options: argparse.Namespace) -> dict[str, Callable[[int], Scorer]]:
    """Return for each arm a function that makes its scorer for a seed. The seed's joint model must exist."""
    decomposed = ["--head", "vldeformer", "--vldeformer.temperature", str(options.temperature)]
    plain = [*decomposed, "--vldeformer.negatives.text", "false", "--vldeformer.negatives.image", "false"]
    hard = [
        *decomposed,
        "--vldeformer.negatives.lexicon",
        "built-in",
        "--vldeformer.negatives.objects",
        json.dumps(TRAINED),
    ]

    dual = ["--matching_weight", "0"]

    def tuned(name: str, extra: list[str]) -> Callable[[int], Scorer]:
        return lambda seed: Embedded(
            load_encoder(tune(name, seed, "finetune/demo.yaml", "joint", options.steps, extra, options))
        )

    return {
        "dual": lambda seed: Embedded(load_model(options.out / f"joint-{seed}")),
        "fusion": lambda seed: Matched(load_model(options.out / f"joint-{seed}")),
        "untuned": lambda seed: Embedded(LoadedVLDeformer(options.out / f"joint-{seed}")),
        "dual_tuned": tuned("dual_tuned", dual),
        "vldeformer": tuned("vldeformer", plain),
        "hard": tuned("hard", hard),
        "fresh_joint": tuned("fresh_joint", [*plain, "--vldeformer.start", "fresh_joint"]),
        "cls": tuned("cls", [*plain, "--vldeformer.pooling", "cls"]),
    }


def plot(figures: dict[str, list[dict[str, float]]], gallery: int, out: Path) -> None:
    """Draw each arm as a row, the fastest first: accuracy on relations on the left, milliseconds a query on the right.

    Each seed is a faint dot; each arm's mean has its 95 % t interval. Arms of equal speed need a row each to be told apart.
    """
    milliseconds = {name: float(np.median([run["milliseconds"] for run in runs])) for name, runs in figures.items()}
    names = sorted(figures, key=lambda name: milliseconds[name])
    figure, ((accuracy, speed),) = new_figure(1, 2, figsize=(9, 4), sharey=True, gridspec_kw={"width_ratios": [2, 1]})
    for row, name in enumerate(names):
        right = np.array([run["relation"] for run in figures[name]])
        interval = half_interval(right) if len(right) > 1 else 0.0
        accuracy.errorbar(right.mean(), row, xerr=interval, fmt="o", capsize=3, color=f"C{row}")
        accuracy.scatter(right, [row] * len(right), s=14, alpha=0.35, color=f"C{row}")
        speed.plot(milliseconds[name], row, "o", color=f"C{row}")
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
        speed.annotate(f"{milliseconds[name]:.3g}", (milliseconds[name], row), **place)
    accuracy.axvline(50, color="grey", linestyle=":", linewidth=1)
    accuracy.set_xlim(40, 100)
    accuracy.set_xlabel("relations right, % (a bag of words: 50)")
    accuracy.set_yticks(range(len(names)), names)
    accuracy.invert_yaxis()
    speed.set_xscale("log")
    speed.margins(x=0.25)
    speed.set_xlabel(f"ms of a query over {gallery:,} images\nencoded before, one thread")
    figure.tight_layout()
    save_figure(figure, out, dpi=120)


def write_flips(options: argparse.Namespace) -> Path:
    """Write a page of new captions that fusion answers right and VLDeformer wrong, by the first seed (the paper's figure 4)."""
    shown, page = options.out / "shown", options.out / "flips.html"
    if not shown.exists():
        write_source(shown, {"test": min(100, options.gallery)}, options.size, world=WORLD)
    data = ["--data", str(shown / "captions_test.json"), "--images", str(shown / "images")]
    records = []
    for run, head in (("joint-0", "fusion"), ("vldeformer-0", "vldeformer")):
        records.append(str(options.out / f"flips-{head}.json"))
        options.ligature(
            "evaluate", "--checkpoint", str(options.out / run), *data, "--dataset", "shapes", "--split", "test",
            "--protocol", "full", "--heads", f"[{head}]", "--shortlist", "500", "--save_scores", "true", "--out", records[-1],
        )  # fmt: skip
    options.ligature("compare", *records, "--page", str(page), *data)
    return page


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/vldeformer_scenes"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--scenes", type=int, default=3000, help="scenes to train on (default 3000)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds at a time; each needs one core with OMP_NUM_THREADS=1"
    )
    parser.add_argument("--pretrain_steps", type=int, default=900)
    parser.add_argument("--joint_steps", type=int, default=2000, help="steps of tuning the joint model (default 2000)")
    parser.add_argument("--steps", type=int, default=250, help="steps of tuning each arm (default 250)")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--gallery", type=int, default=500)
    parser.add_argument("--size", type=int, default=32, help="pixels a side of the drawings")
    parser.add_argument("--fusion", default="cross_attention", choices=["cross_attention", "single_stream"])
    parser.add_argument("--arms", nargs="*", help="arms to run (default: all)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    claim_folder(options, free=("out", "seeds", "jobs", "arms"))
    with Workers(options.jobs, cli.main) as options.ligature:
        figures = run_arms(options)
        flips = write_flips(options) if {"fusion", "vldeformer"} <= set(figures) else None
    print_results(figures, options)
    if flips:
        print(flips)
    return 0


def run_arms(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Measure all arms of all seeds, and return each arm's figures by seed. Earlier results are read."""
    options.train = draw_world(options)
    makers = arms(options)
    names = options.arms or list(makers)

    def run_seed(seed: int) -> list[dict[str, float]]:
        measured = []
        for name in names:
            result = options.out / f"{name}-{seed}.json"
            if not result.exists():
                make_joint_model(seed, options)
                write_json(result, measure(makers[name](seed), options))
            measured.append(json.loads(result.read_text()))
        return measured

    seeds = list(side_by_side(run_seed, range(options.seeds), options.jobs))
    return {name: [measured[index] for measured in seeds] for index, name in enumerate(names)}


def print_results(figures: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """Print means and differences, and draw the plot. `figures`: arm -> figures of each seed."""
    print(
        f"\n{options.seeds} seeds, {options.pairs} pairs and choices; percent right (chance 50), a gallery of {options.gallery:,}"
    )
    for name, runs in figures.items():
        means = {key: np.mean([run[key] for run in runs]) for key in runs[0]}
        print(f"{name:12}" + "".join(f"  {key} {value:6.1f}" for key, value in means.items()))
    for one, other, key in (
        ("fusion", "vldeformer", "relation"),
        ("vldeformer", "dual_tuned", "relation"),
        ("vldeformer", "dual_tuned", "choice"),
        ("vldeformer", "untuned", "relation"),
        ("vldeformer", "fresh_joint", "relation"),
        ("vldeformer", "cls", "relation"),
        ("hard", "vldeformer", "relation"),
        ("hard", "vldeformer", "choice"),
    ):
        if one in figures and other in figures:
            print(
                f"{one} - {other}, {key}: {format_differences(np.array([a[key] - b[key] for a, b in zip(figures[one], figures[other], strict=True)]))}"
            )
    plot(figures, options.gallery, options.out / "accuracy_latency.png")
    print(f"{options.out / 'accuracy_latency.png'}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LigatureError as error:
        sys.exit(f"{error}")
