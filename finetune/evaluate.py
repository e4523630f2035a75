"""Score a checkpoint, or a user's own scores, and write one record a head and one table.

Which heads a checkpoint has, and how they score a collection, is in `finetune/heads/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.in_order.collection import open_collection
from data_tools.tokenizer import load_tokenizer
from finetune.caption_lengths import CaptionLengths, length_table
from finetune.config import EvaluateRecipe
from finetune.heads.base import Scored, Workload
from finetune.heads.registry import DEFAULT, load_part, names_with
from finetune.own_scores import read_own_scores
from pretrain.weights.load import find_checkpoint
from retrieval.extended import extended_positives, match_coco_captions
from retrieval.protocols import folds_of
from retrieval.records import About, score, table, write_record
from runtime.errors import RecipeError
from runtime.files import read_json, replaced_file
from runtime.ranks import join, use_precision

CLIP_LIMIT = 77
"""Captions with more tokens count as long: recalls by length are then printed, and not in the record alone."""


def evaluate(recipe: EvaluateRecipe) -> list[dict[str, Any]]:
    """Score by the recipe; the first rank writes the records and prints the table.

    Returns:
        The records, one a head; none on ranks other than the first.
    """
    records = list(_score_file(recipe) if recipe.scores else _score_checkpoint(recipe))
    if records:
        print(table(records))
    return records


def _score_file(recipe: EvaluateRecipe) -> Iterator[dict[str, Any]]:
    own = read_own_scores(recipe)
    yield _write(recipe, own.scored, own.caption_image, own.keys, own.policy)


def _score_checkpoint(recipe: EvaluateRecipe) -> Iterator[dict[str, Any]]:
    ranks, device = join(recipe.device)
    use_precision(recipe.precision, device)
    folder = find_checkpoint(recipe.checkpoint)
    description = read_json(folder / "model.json")
    kind, known = description.get("head", DEFAULT), names_with("scorer")
    if kind not in known:
        raise RecipeError(f"{folder} holds a {kind} head; this command scores {', '.join(known)}")
    collection = open_collection(recipe.data, recipe.captions_per_image, recipe.images, recipe.split)
    # Both refuse a collection that does not fit, before any work is done.
    folds_of(recipe.protocol, len(collection))
    if recipe.extended:
        match_coco_captions(collection.caption_image, collection.keys)
    policy = "all" if recipe.captions_per_image is None else f"first {recipe.captions_per_image}"
    work = Workload(ranks, device, recipe.batch_size, recipe.workers, silent=False)
    tokenizer = load_tokenizer(folder, description["caption_tokens"])
    lengths = CaptionLengths(np.array(tokenizer.lengths(collection.captions)), tokenizer.caption_tokens)
    # Every rank scores each head, since the ranks share the work; the first one alone writes.
    for scored in load_part(kind, "scorer")(recipe, collection, work):
        if ranks.first:
            yield _write(recipe, scored, collection.caption_image, collection.keys, policy, lengths)


def _write(
    recipe: EvaluateRecipe,
    scored: Scored,
    caption_image: np.ndarray,
    keys: list[str],
    policy: str,
    lengths: CaptionLengths | None = None,
) -> dict[str, Any]:
    """Score by the protocol; write the record and the files beside it; print a re-ranker's ceiling.

    Args:
        recipe: names the protocol, the data and the output.
        scored: one head's scores.
        caption_image: (captions,) the image of each caption.
        keys: the images' names.
        policy: captions per image, in the record's words.
        lengths: of the captions; None where scores come from a file, whose model's tokenizer is not known.

    Returns:
        The record.
    """
    details = dict(scored.details)
    if recipe.precision != "fp32":
        details["precision"] = recipe.precision
    if recipe.extended:
        details["extended"] = extended_positives(scored.image_to_text, scored.text_to_image, caption_image, keys)
    about = About(
        dataset=recipe.dataset,
        split=recipe.split,
        captions_per_image=policy,
        head=scored.head,
        checkpoint=scored.checkpoint,
        training=scored.training,
        protocol=recipe.protocol,
        more=details,
    )
    record, outcome = score(scored.image_to_text, scored.text_to_image, caption_image, about)
    if lengths is not None:
        record["caption_tokens"] = described = lengths.describe(outcome)
        if described["cut_captions"] or described["longest"] > CLIP_LIMIT:
            print(f"{scored.head}: {length_table(described)}")
    out = Path(recipe.out)
    first = not recipe.heads or recipe.heads[0] == scored.key
    path = out if first else out.with_name(f"{out.stem}-{scored.key}{out.suffix}")
    matrices = path.with_name(f"{path.stem}.scores.npz")
    matrices.unlink(missing_ok=True)  # it may be of an earlier record of this name
    if recipe.save_scores:
        _save_scores(matrices, scored, caption_image)
    write_record(path, record, outcome, keys)
    if "shortlist" in details:
        images, captions = details["shortlist"]["recall"].values()
        print(
            f"{scored.head}: a right answer is on {images:.1f} % of the images' lists, {captions:.1f} % of the captions'"
        )
    return record


def _save_scores(path: Path, scored: Scored, caption_image: np.ndarray) -> None:
    arrays = {"scores": scored.image_to_text, "text_to_image": scored.text_to_image}
    with replaced_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, caption_image=caption_image, **arrays)  # type: ignore[arg-type]
