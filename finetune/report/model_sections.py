"""What a run's model has learned, for its page: the codebook's use and content, and word maps.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

from pathlib import Path

import torch

from data_tools.in_order.collection import Collection
from finetune.heads.hat_model import LoadedHat
from finetune.report.codewords import codebook_html
from finetune.report.page_parts import note_html
from finetune.report.word_map_figures import hat_maps_html, word_maps_html
from pretrain.model.alignment_model import IMAGE, TEXT
from pretrain.weights.load import find_checkpoint, load_model
from runtime.files import read_json

BATCH = 64
"""Images or captions encoded at a time."""


def model_html(run: Path, data: str, limit: int) -> list[str]:
    """Return the sections on a run's best checkpoint, else its latest.

    Args:
        run: the run's folder.
        data: shard folder.
        limit: images of `data` to read at most, the first ones, with their captions.

    Raises:
        CheckpointError: the checkpoint is incomplete or altered.
        DataError: an image cannot be read.
    """
    description = read_json(find_checkpoint(run) / "model.json")
    head = description.get("head", "dual")
    collection = Collection(data)
    if head == "hat":
        hat = LoadedHat(run)
        if hat.model.config.attention == "mean":
            return [note_html("This HAT compares mean tokens (hat.attention is `mean`): it has no attention to show.")]
        return hat_maps_html(hat, collection, limit)
    if head != "dual":
        return [note_html(f"A {head} head compares one vector of an image with one of a caption: it has no word maps.")]
    return _alignment_html(run, collection, limit, data, description.get("fusion_tuned") is not False)


def _alignment_html(run: Path, collection: Collection, limit: int, data: str, fusion_tuned: bool) -> list[str]:
    model = load_model(run)
    images = min(limit, len(collection))
    pixels = torch.cat(list(collection.images(model.transform, range(images), BATCH, 0)))
    parts = []
    if model.network.codebook is not None:
        captions = collection.captions[: int((collection.caption_image < images).sum())]
        image = torch.cat([model.encode_image(batch) for batch in pixels.split(BATCH)])
        text = torch.cat(
            [model.encode_text(captions[start : start + BATCH]) for start in range(0, len(captions), BATCH)]
        )
        image, text = (
            model.network.codebook_features(features, modality).cpu()
            for features, modality in ((image, IMAGE), (text, TEXT))
        )
        parts += codebook_html(image, text, model.network.codewords().cpu(), captions, pixels, data)
    if model.network.config.fusion.layers:
        parts += word_maps_html(model, collection, pixels)
        if not fusion_tuned:
            parts.append(
                note_html("The fusion encoder was not tuned in this run, so it no longer fits the encoders below it.")
            )
    return parts
