"""A checkpoint -> encodings, once -> heads -> a score record each, and one table. Or a user's own scores -> a record."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.in_order.collection import Collection, open_collection
from finetune.config import EvaluateRecipe
from finetune.heads.decomposed import LoadedVLDeformer, encode_decomposed
from finetune.heads.dual import dual_scores
from finetune.heads.fusion import fusion_scores
from finetune.heads.hat import LoadedHat
from finetune.heads.hat_scoring import hat_scores
from finetune.own_scores import read_own_scores
from finetune.shortlist import make_shortlists
from pretrain.encode import encode_collection
from pretrain.weights.load import find_checkpoint, load_model
from retrieval.extended import extended_positives, match_coco_captions
from retrieval.protocols import folds_of
from retrieval.records import score, table, write_record
from runtime.errors import RecipeError
from runtime.files import read_json, replaced_file
from runtime.ranks import Ranks, join, use_precision


@dataclass
class Scored:
    """What one head made of a collection. On ranks other than the first the matrices may be empty."""

    key: str
    """Of the record's file."""
    head: str
    """As the record calls it."""
    image_to_text: np.ndarray
    text_to_image: np.ndarray
    checkpoint: str
    training: str
    more: dict[str, Any] = field(default_factory=dict)


def evaluate(recipe: EvaluateRecipe) -> list[dict[str, Any]]:
    """Score by the recipe; rank 0 writes the records and prints the table. -> the records, one a head."""
    if recipe.scores:
        own = read_own_scores(recipe)
        record = _record(recipe, own.scored, own.caption_image, own.keys, own.policy)
        print(table([record]))
        return [record]
    ranks, device = join(recipe.device)
    use_precision(recipe.precision, device)
    folder = find_checkpoint(recipe.checkpoint)
    kind = read_json(folder / "model.json").get("head", "dual")
    if kind not in SCORERS:
        raise RecipeError(f"{folder} holds a {kind} head; this command scores {', '.join(SCORERS)}")
    collection = open_collection(recipe.data, recipe.captions_per_image, recipe.images, recipe.split)
    folds_of(recipe.protocol, len(collection))  # before the work: is the protocol for so many images?
    if recipe.extended:
        match_coco_captions(collection.caption_image, collection.keys)
    policy = "all" if recipe.captions_per_image is None else f"first {recipe.captions_per_image}"
    records = [
        _record(recipe, scored, collection.caption_image, collection.keys, policy)
        for scored in SCORERS[kind](recipe, collection, ranks, device)
        if ranks.first
    ]
    if records:
        print(table(records))
    return records


def score_dual(recipe: EvaluateRecipe, collection: Collection, ranks: Ranks, device: torch.device) -> Iterator[Scored]:
    """The dual head of an alignment model, its fusion head on the dual head's shortlists, and that taken apart but not tuned."""
    heads = recipe.heads or ["dual"]
    if "hat" in heads or recipe.ensemble:
        raise RecipeError(f"{recipe.checkpoint} is no HAT checkpoint; its heads are dual and fusion")
    if recipe.shortlist_from and "fusion" not in heads:
        raise RecipeError("shortlist_from is for heads that re-rank; add fusion to heads, or leave it out")
    if "vldeformer" in heads:
        yield from score_vldeformer(recipe, collection, ranks, device)
        heads = [head for head in heads if head != "vldeformer"]
        if not heads:
            return
    model = load_model(recipe.checkpoint, device)
    if "fusion" in heads and not model.network.config.fusion.layers:
        raise RecipeError(f"heads asks for fusion, but {recipe.checkpoint} has no fusion encoder; use --heads '[dual]'")
    untuned = "fusion" in heads and read_json(model.folder / "model.json").get("fusion_tuned") is False
    if untuned and ranks.first:
        print(
            f"{recipe.checkpoint} was fine-tuned with matching_weight 0: its fusion head is pretraining's, on encoders that have moved on",
            file=sys.stderr,
        )
    featureless = not model.network.config.text.layers
    if featureless and heads != ["fusion"]:
        raise RecipeError(
            f"{recipe.checkpoint} has no text layers, so no dual head; use --heads '[fusion]', on all pairs or with --shortlist_from"
        )
    cut = _truncated(model.tokenizer, collection, ranks)
    encodings = encode_collection(
        model.network,
        model.tokenizer,
        collection,
        ranks,
        recipe.batch_size,
        recipe.workers,
        keep_tokens="fusion" in heads,
        silent=False,
    )
    first, by = first_stage(recipe, collection, ranks, device) if recipe.shortlist_from else (None, {})
    similarity = dual_scores(encodings).numpy()
    for head in heads:
        if head == "dual":
            yield Scored(head, head, similarity, similarity.T, model.hash, model.training, cut)
            continue
        folds = folds_of(recipe.protocol, len(collection))
        unlisted = featureless and first is None  # no features, no shortlist
        size = len(collection.captions) if unlisted else recipe.shortlist
        before = similarity if first is None else first
        lists = make_shortlists(before, size, folds, collection.caption_image)
        ways = lists.rerank(before, fusion_scores(model.network, encodings, lists, ranks, device))
        about = "fusion of all pairs" if size >= len(collection.captions) else f"fusion of the best {recipe.shortlist}"
        ceiling = {"shortlist": lists.ceiling(collection.caption_image) | by}
        more = cut | ceiling | ({"fusion_tuned": False} if untuned else {})
        yield Scored(head, about, ways[0], ways[1], model.hash, model.training, more)


def score_hat(recipe: EvaluateRecipe, collection: Collection, ranks: Ranks, device: torch.device) -> Iterator[Scored]:
    """HAT, or the mean of two HATs' scores: of all pairs, or of another checkpoint's shortlists."""
    if recipe.heads not in (None, ["hat"]):
        raise RecipeError(f"{recipe.checkpoint} is a HAT checkpoint; use --heads '[hat]', or leave heads out")
    models = [LoadedHat(source, device) for source in (recipe.checkpoint, recipe.ensemble) if source]
    if len({model.training for model in models}) > 1:
        raise RecipeError(f"{recipe.checkpoint} is {models[0].training}, but {recipe.ensemble} is {models[1].training}")
    cut = _truncated(models[0].tokenizer, collection, ranks)
    name = models[0].model.name
    if recipe.ensemble:
        name = f"hat ensemble of {name.removeprefix('hat ')} and {models[1].model.name.removeprefix('hat ')}"
    first, lists = None, None
    if recipe.shortlist_from:
        first, by = first_stage(recipe, collection, ranks, device)
        folds = folds_of(recipe.protocol, len(collection))
        lists = make_shortlists(first, recipe.shortlist, folds, collection.caption_image)
        cut = cut | {"shortlist": lists.ceiling(collection.caption_image) | by}
        name += f" of the best {recipe.shortlist}"
    total = np.zeros(0)
    for model in models:
        found = hat_scores(
            model.model,
            model.tokenizer,
            collection,
            ranks,
            device,
            recipe.batch_size,
            recipe.workers,
            lists.wanted() if lists else None,
        )
        total = found / len(models) if model is models[0] else total + found / len(models)
    ways = lists.rerank(first, lists.of(total)) if lists is not None and first is not None else (total, total.T)
    hashes = "+".join(model.hash for model in models)
    yield Scored("hat", name, ways[0], ways[1], hashes, models[0].training, cut)


def first_stage(
    recipe: EvaluateRecipe, collection: Collection, ranks: Ranks, device: torch.device
) -> tuple[np.ndarray, dict[str, Any]]:
    """The scores (images, captions) that shortlists are made by, of `shortlist_from`'s dual head or VLDeformer; and whose they are."""
    size, workers = recipe.batch_size, recipe.workers
    folder = find_checkpoint(recipe.shortlist_from)
    if read_json(folder / "model.json").get("head") == "vldeformer":
        loaded = LoadedVLDeformer(folder, device)
        image, text = encode_decomposed(
            loaded.model, loaded.tokenizer, collection, ranks, device, size, workers, silent=False
        )
        return (image @ text.T).numpy(), {"checkpoint": loaded.hash, "head": loaded.name}
    dual = load_model(folder, device)
    if not dual.network.config.text.layers:
        raise RecipeError(f"shortlist_from: {folder} has no text layers, so no dual head to make shortlists by")
    found = encode_collection(dual.network, dual.tokenizer, collection, ranks, size, workers, silent=False)
    return dual_scores(found).numpy(), {"checkpoint": dual.hash}


def score_vldeformer(
    recipe: EvaluateRecipe, collection: Collection, ranks: Ranks, device: torch.device
) -> Iterator[Scored]:
    """A VLDeformer's embeddings, or those of an alignment model taken apart and not tuned, compared by cosine."""
    if recipe.ensemble:
        raise RecipeError(f"{recipe.checkpoint} is no HAT checkpoint; ensemble is HAT's")
    loaded = LoadedVLDeformer(recipe.checkpoint, device)
    if loaded.tuned and (recipe.heads not in (None, ["vldeformer"]) or recipe.shortlist_from):
        raise RecipeError(
            f"{recipe.checkpoint} is a VLDeformer checkpoint; use --heads '[vldeformer]' or leave heads out, and shortlist_from too"
        )
    cut = _truncated(loaded.tokenizer, collection, ranks)
    image, text = encode_decomposed(
        loaded.model, loaded.tokenizer, collection, ranks, device, recipe.batch_size, recipe.workers, silent=False
    )
    similarity = (image @ text.T).numpy()
    yield Scored("vldeformer", loaded.name, similarity, similarity.T, loaded.hash, loaded.training, cut)


# By the kind of head that a checkpoint's model.json names.
SCORERS = {"dual": score_dual, "hat": score_hat, "vldeformer": score_vldeformer}


def _truncated(tokenizer: Any, collection: Collection, ranks: Ranks) -> dict[str, Any]:
    """How many captions the model cannot read whole: said, and put into the record."""
    cut = tokenizer.count_truncated(collection.captions)
    if cut and ranks.first:
        print(
            f"captions longer than {tokenizer.caption_tokens} tokens, whose end is not read: {cut:,} of {len(collection.captions):,}",
            file=sys.stderr,
        )
    return {"truncated_captions": cut}


def _record(
    recipe: EvaluateRecipe, scored: Scored, caption_image: np.ndarray, keys: list[str], policy: str
) -> dict[str, Any]:
    """Score, write the record and what belongs beside it, and say where a re-ranker's ceiling is."""
    more = dict(scored.more)
    if recipe.precision != "fp32":
        more["precision"] = recipe.precision
    if recipe.extended:
        more["extended"] = extended_positives(scored.image_to_text, scored.text_to_image, caption_image, keys)
    record, outcome = score(
        scored.image_to_text,
        scored.text_to_image,
        caption_image,
        dataset=recipe.dataset,
        split=recipe.split,
        captions_per_image=policy,
        head=scored.head,
        checkpoint=scored.checkpoint,
        training=scored.training,
        protocol=recipe.protocol,
        more=more,
    )
    out = Path(recipe.out)
    first = not recipe.heads or recipe.heads[0] == scored.key
    path = out if first else out.with_name(f"{out.stem}-{scored.key}{out.suffix}")
    side = path.with_name(f"{path.stem}.scores.npz")
    side.unlink(missing_ok=True)  # of an earlier record of that name
    if recipe.save_scores:
        matrices = {"scores": scored.image_to_text, "text_to_image": scored.text_to_image}
        with replaced_file(side) as temporary, open(temporary, "wb") as file:
            np.savez(file, caption_image=caption_image, **matrices)  # type: ignore[arg-type]
    write_record(path, record, outcome, keys)
    if "shortlist" in more:
        there, back = more["shortlist"]["recall"].values()
        print(f"{scored.head}: a right answer is on {there:.1f} % of the images' lists, {back:.1f} % of the captions'")
    return record
