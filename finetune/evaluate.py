"""A checkpoint -> encodings, once -> heads -> a score record each, and one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.collection import Collection
from finetune.config import EvaluateRecipe
from finetune.heads.dual import dual_scores
from finetune.heads.fusion import fusion_scores
from pretrain.encode import encode_collection
from pretrain.load import load_model
from retrieval.records import score, table, write_record
from runtime.errors import RecipeError
from runtime.ranks import join


def evaluate(recipe: EvaluateRecipe) -> list[dict[str, Any]]:
    """Score by the recipe; rank 0 writes the records and prints the table. -> the records, one a head."""
    ranks, device = join(recipe.device)
    model = load_model(recipe.checkpoint, device)
    if "fusion" in recipe.heads and not model.network.config.fusion.layers:
        raise RecipeError(f"heads asks for fusion, but {recipe.checkpoint} has no fusion encoder; use --heads '[dual]'")
    collection = Collection(recipe.data, recipe.captions_per_image)
    encodings = encode_collection(
        model.network,
        model.tokenizer,
        collection,
        ranks,
        device,
        recipe.batch_size,
        recipe.workers,
        keep_tokens="fusion" in recipe.heads,
        silent=False,
    )
    if not ranks.first:
        return []
    similarity = dual_scores(encodings).numpy()
    records = []
    for head in recipe.heads:
        ways = similarity, similarity.T
        if head == "fusion":
            ways = fusion_scores(model.network, encodings, similarity, recipe.shortlist, device)
        record = score(
            *ways,
            collection.caption_image,
            dataset=recipe.dataset,
            split=recipe.split,
            captions_per_image="all" if recipe.captions_per_image is None else f"first {recipe.captions_per_image}",
            head=head if head == "dual" else f"fusion of the best {recipe.shortlist}",
            checkpoint=model.hash,
            training=model.training,
        )
        records.append(record)
        write_record(record_path(Path(recipe.out), recipe.heads, head), record)
    print(table(records))
    return records


def record_path(out: Path, heads: list[Any], head: str) -> Path:
    """The first head's record has the name asked for; further ones carry theirs."""
    return out if head == heads[0] else out.with_name(f"{out.stem}-{head}{out.suffix}")
