"""Score records: what was measured, on what, of which checkpoint; as JSON for machines and a table for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.metrics import Ranks
from retrieval.protocols import DIRECTIONS, RECALL_AT, Outcome, measure
from runtime.errors import LigatureError
from runtime.files import read_json, replaced_file, sha256_of, write_json

# What makes rows of a table comparable: the same queries against the same gallery.
SETTING = ("dataset", "split", "protocol", "images", "captions", "captions_per_image")
KEYS = (*DIRECTIONS, "rsum", "tie_fraction", "chance", *SETTING, "head", "checkpoint", "training")


def score(
    image_to_text: np.ndarray,
    text_to_image: np.ndarray,
    caption_image: np.ndarray,
    *,
    dataset: str,
    split: str,
    captions_per_image: str,
    head: str,
    checkpoint: str,
    training: str,
    protocol: str = "full",
    more: dict[str, Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Any], Outcome]:
    """Score two matrices by a protocol and say what they are: a record, ready for JSON, and what every query came to.

    Args:
        image_to_text: `(images, captions)`.
        text_to_image: `(captions, images)`.
        caption_image: `(captions,)` integers, the image that each caption describes.
        captions_per_image: the policy, in words: `all`, `first 5`.
        head: what scored, in words: `dual`, `fusion, shortlist 32`.
        checkpoint: its hash.
        training: `untrained`, `pretrained`, or `fine-tuned-on X`. Papers call a COCO-fine-tuned model's
            Flickr30K scores "zero-shot"; here they are `fine-tuned-on coco`. `unknown` is for a user's own scores.
        protocol: a name in `PROTOCOLS`.
        more: further keys of the record: `shortlist` (its sizes and its recall, a re-ranker's ceiling), `truncated_captions`,
            `extended` (COCO's extended positives).
        resamples, seed: of the intervals' bootstrap.

    Returns:
        The protocol's figures (see `protocols.measure`) and the arguments that describe them.

    Raises:
        LigatureError: an unknown protocol or kind of training, or scores that the protocol refuses.
    """
    if not re.fullmatch(r"untrained|pretrained|unknown|fine-tuned-on \S.*", training):
        raise LigatureError(f"training is {training!r}, must be untrained, pretrained or 'fine-tuned-on <data>'")
    figures, outcome = measure(
        image_to_text, text_to_image, caption_image, protocol=protocol, resamples=resamples, seed=seed
    )
    about = {
        "protocol": protocol,
        "dataset": dataset,
        "split": split,
        "images": len(image_to_text),
        "captions": len(caption_image),
        "captions_per_image": captions_per_image,
        "head": head,
        "checkpoint": checkpoint,
        "training": training,
    }
    return {**{key: {**figures, **about}[key] for key in KEYS}, **(more or {})}, outcome


def write_record(path: Path, record: dict[str, Any], outcome: Outcome, image_keys: list[str]) -> None:
    """Write a record as JSON and, before it and beside it, every query's ranks (`<name>.ranks.npz`), for `ligature compare`.

    image_keys: the images' names, in order: what two records' rows are matched by.
    """
    side = ranks_path(path)
    arrays = {
        f"{direction}.{name}": getattr(ranks, name)
        for direction, ranks in outcome.ranks.items()
        for name in RANK_FIELDS
    }
    with replaced_file(side) as temporary, open(temporary, "wb") as file:
        keys = np.array(image_keys)
        np.savez_compressed(file, keys=keys, folds=outcome.folds, caption_image=outcome.caption_image, **arrays)  # type: ignore[arg-type]
    write_json(path, {**record, "ranks": {"file": side.name, "sha256": sha256_of(side)}})


RANK_FIELDS = ("above", "tied_negatives", "tied_positives")


def ranks_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.ranks.npz")


def read_outcome(path: Path, record: dict[str, Any]) -> tuple[Outcome, list[str]]:
    """What every query of a record came to, and its images' keys. Raises LigatureError where the ranks are not there, or not its."""
    told = record.get("ranks")
    if not isinstance(told, dict) or {"file", "sha256"} - told.keys():
        raise LigatureError(
            f"{path} has no ranks beside it, so it cannot be compared; score it again with `ligature evaluate`"
        )
    side = path.with_name(Path(told["file"]).name)
    if not side.is_file():
        raise LigatureError(f"{side} is missing; a record is compared by its ranks, keep both files together")
    if sha256_of(side) != told["sha256"]:
        raise LigatureError(f"{side} does not belong to {path}: its hash is another; score it again")
    with np.load(side, allow_pickle=False) as arrays:
        ranks = {way: Ranks(*(arrays[f"{way}.{name}"] for name in RANK_FIELDS)) for way in DIRECTIONS}
        return Outcome(ranks, arrays["folds"], arrays["caption_image"]), arrays["keys"].tolist()


def read_record(path: Path) -> dict[str, Any]:
    """Read a record; a file that is missing, no JSON or no score record is a `LigatureError` that names it."""
    record = read_json(path)
    missing = [key for key in KEYS if key not in record] if isinstance(record, dict) else list(KEYS)
    if missing:
        raise LigatureError(f"{path} is not a score record: it lacks {', '.join(missing)}")
    return record


def table(records: list[dict[str, Any]]) -> str:
    """Records as aligned markdown: one table for each setting (data and protocol), a row a record, and chance below.

    TR retrieves text for an image, IR an image for a text; recalls in percent with their 95 % intervals.
    """
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        settings.setdefault(tuple(record[key] for key in SETTING), []).append(record)
    return "\n\n".join(_one_table(rows) for rows in settings.values())


def _one_table(records: list[dict[str, Any]]) -> str:
    """The table of records that share a setting."""
    columns = [(direction, f"R@{k}") for direction in DIRECTIONS for k in RECALL_AT]
    header = ["head", "training", *(f"{short} R@{k}" for short in ("TR", "IR") for k in RECALL_AT)]
    lines = [[*header, "rsum", "TR median rank", "IR median rank"]]
    for record in records:
        recalls = []
        for direction, name in columns:
            low, high = record[direction]["interval"][name]
            recalls.append(f"{record[direction][name]:.1f} [{low:.1f}, {high:.1f}]")
        medians = [f"{record[direction]['median_rank']:.1f}" for direction in DIRECTIONS]
        lines.append([record["head"], record["training"], *recalls, f"{record['rsum']:.1f}", *medians])
    first = records[0]
    chances = [first["chance"][direction][name] for direction, name in columns]
    lines.append(["chance", "-", *(f"{value:.2f}" for value in chances), f"{sum(chances):.2f}", "-", "-"])

    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # Words to the left, numbers to the right, on the page and in the source.
    pad = [f"<{width}" if i < 2 else f">{width}" for i, width in enumerate(widths)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    title = (
        f"{first['dataset']} {first['split']}, protocol {first['protocol']}: {first['images']:,} images, "
        f"{first['captions']:,} captions ({first['captions_per_image']}); recalls in percent [95 % interval]"
    )
    rows = [[format(cell, width) for cell, width in zip(line, pad, strict=True)] for line in lines]
    return "\n".join([title, "", *(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])])
