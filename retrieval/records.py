"""Score records say what was measured, on which data, of which checkpoint: as JSON for programs and as a table for people."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.metrics import Ranks
from retrieval.protocols import DIRECTIONS, RECALL_AT, Outcome, measure
from runtime.errors import LigatureError
from runtime.files import read_json, replaced_file, sha256_of, write_json

SETTING = ("dataset", "split", "protocol", "images", "captions", "captions_per_image")
"""Records that agree in these keys are comparable: the same queries against the same gallery."""
KEYS = (*DIRECTIONS, "rsum", "tie_fraction", "chance", *SETTING, "head", "checkpoint", "training")
"""What every record has, in this order."""


@dataclass
class About:
    """What a record says of the scores in it.

    Raises:
        LigatureError: the kind of training is unknown.
    """

    dataset: str
    """Name of the data."""
    split: str
    """Name of its split."""
    captions_per_image: str
    """The policy in words, such as `all` or `first 5`."""
    head: str
    """What scored, in words, such as `dual` or `fusion, shortlist 32`."""
    checkpoint: str
    """Hash of the checkpoint."""
    training: str
    """`untrained`, `pretrained`, `fine-tuned-on X`, or `unknown` for a user's own scores. Papers call the Flickr30K scores of a
    COCO-fine-tuned model "zero-shot"; here they are `fine-tuned-on coco`."""
    protocol: str = "full"
    """A name in `PROTOCOLS`."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further keys of the record: `shortlist` (its sizes and its recall, which limits a re-ranker), `truncated_captions`, `extended`
    (COCO's extended positives)."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"untrained|pretrained|unknown|fine-tuned-on \S.*", self.training):
            raise LigatureError(
                f"training is {self.training!r}; it must be untrained, pretrained or 'fine-tuned-on <data>'"
            )


def score(
    image_to_text: np.ndarray,
    text_to_image: np.ndarray,
    caption_image: np.ndarray,
    about: About,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Any], Outcome]:
    """Measure two score matrices by a protocol, and describe them.

    Args:
        image_to_text: `(images, captions)`.
        text_to_image: `(captions, images)`.
        caption_image: `(captions,)` integers, the image that each caption describes.
        about: what was scored, and the protocol.
        resamples: resamples of the intervals' bootstrap.
        seed: seed of the bootstrap.

    Returns:
        The record, ready for JSON: the protocol's figures (see `protocols.measure`) and what they are about.
        Then the result of every query.

    Raises:
        LigatureError: the protocol is unknown, or it refuses the scores.
    """
    figures, outcome = measure(
        image_to_text, text_to_image, caption_image, protocol=about.protocol, resamples=resamples, seed=seed
    )
    values = {**figures, **vars(about), "images": len(image_to_text), "captions": len(caption_image)}
    return {**{key: values[key] for key in KEYS}, **about.more}, outcome


def write_record(path: Path, record: dict[str, Any], outcome: Outcome, image_keys: list[str]) -> None:
    """Write a record as JSON, and before it the ranks of every query (`<name>.ranks.npz`) for `ligature compare`.

    Args:
        path: the JSON file.
        record: what `score` returned first.
        outcome: what `score` returned second.
        image_keys: the images' names, in order. Two records are of the same images where their names agree.
    """
    ranks_file = ranks_path(path)
    arrays = {
        f"{direction}.{name}": getattr(ranks, name)
        for direction, ranks in outcome.ranks.items()
        for name in RANK_FIELDS
    }
    # numpy appends .npz to a name that lacks it, but not to an open file.
    with replaced_file(ranks_file) as temporary, open(temporary, "wb") as file:
        keys = np.array(image_keys)
        np.savez_compressed(file, keys=keys, folds=outcome.folds, caption_image=outcome.caption_image, **arrays)  # type: ignore[arg-type]
    # Written after the ranks, because the record states their hash.
    write_json(path, {**record, "ranks": {"file": ranks_file.name, "sha256": sha256_of(ranks_file)}})


RANK_FIELDS = ("above", "tied_negatives", "tied_positives")
"""The arrays of `Ranks`, in order."""


def ranks_path(path: Path) -> Path:
    """Return the path of the ranks that belong to a record."""
    return path.with_name(f"{path.stem}.ranks.npz")


def read_outcome(path: Path, record: dict[str, Any]) -> tuple[Outcome, list[str]]:
    """Return the result of every query of a record, and the names of its images.

    Raises:
        LigatureError: the record's ranks are missing, or belong to another record.
    """
    entry = record.get("ranks")
    if not isinstance(entry, dict) or {"file", "sha256"} - entry.keys():
        raise LigatureError(
            f"{path} has no ranks beside it, so it cannot be compared; score it again with `ligature evaluate`"
        )
    ranks_file = path.with_name(
        Path(entry["file"]).name
    )  # the name alone: records may be moved together with their ranks
    if not ranks_file.is_file():
        raise LigatureError(f"{ranks_file} is missing; a record is compared by its ranks, keep both files together")
    if sha256_of(ranks_file) != entry["sha256"]:
        raise LigatureError(f"{ranks_file} does not belong to {path}: its hash differs; score it again")
    with np.load(ranks_file, allow_pickle=False) as arrays:
        ranks = {direction: Ranks(*(arrays[f"{direction}.{name}"] for name in RANK_FIELDS)) for direction in DIRECTIONS}
        return Outcome(ranks, arrays["folds"], arrays["caption_image"]), arrays["keys"].tolist()


def read_record(path: Path) -> dict[str, Any]:
    """Return a score record.

    Raises:
        LigatureError: the file is missing, is not JSON or is not a score record; the message names it.
    """
    record = read_json(path)
    missing = [key for key in KEYS if key not in record] if isinstance(record, dict) else list(KEYS)
    if missing:
        raise LigatureError(f"{path} is not a score record: it lacks {', '.join(missing)}")
    return record


def table(records: list[dict[str, Any]]) -> str:
    """Return records as aligned markdown: one table per setting (data and protocol), with two rows per record and chance below.

    The rows of a record are TR, which retrieves text for an image, and IR, which retrieves an image for a text. With names as long as
    `fine-tuned-on flickr30k` a table is 100 columns wide.
    """
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        settings.setdefault(tuple(record[key] for key in SETTING), []).append(record)
    return "\n\n".join(_table_of_setting(rows) for rows in settings.values())


def _table_of_setting(records: list[dict[str, Any]]) -> str:
    """Return the table of records that share a setting."""
    names = [f"R@{k}" for k in RECALL_AT]
    lines = [["model", "", *names, "rank", "rsum"]]
    for record in records:
        # The head stands in the first row and the training in the second.
        for label, short, direction in zip((record["head"], record["training"]), ("TR", "IR"), DIRECTIONS, strict=True):
            recalls = [
                f"{record[direction][name]:.1f} "
                + "–".join(f"{end:.1f}" for end in record[direction]["interval"][name])
                for name in names
            ]
            rsum = f"{record['rsum']:.1f}" if short == "TR" else ""
            lines.append([label, short, *recalls, f"{record[direction]['median_rank']:.1f}", rsum])
    first = records[0]
    total = sum(first["chance"][direction][name] for direction in DIRECTIONS for name in names)
    for short, direction in zip(("TR", "IR"), DIRECTIONS, strict=True):
        chances = [f"{first['chance'][direction][name]:.2f}" for name in names]
        lines.append(["chance" * (short == "TR"), short, *chances, "-", f"{total:.2f}" * (short == "TR")])

    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # Words are aligned to the left and numbers to the right, in the markdown source and where it is rendered.
    pad = [f"<{width}" if i < 2 else f">{width}" for i, width in enumerate(widths)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    title = (
        f"{first['dataset']} {first['split']}, protocol {first['protocol']}: {first['images']:,} images, "
        f"{first['captions']:,} captions ({first['captions_per_image']})\n"
        "Recalls in percent, 95 % intervals, median rank. TR: an image finds its texts, IR: a text its image."
    )
    rows = [[format(cell, width) for cell, width in zip(line, pad, strict=True)] for line in lines]
    return "\n".join([title, "", *(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])])
