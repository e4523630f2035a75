"""Encode images once with a frozen tower, and train on the cached features: `data.features` of a recipe.

The cache is a folder beside the shards. Its name is a hash of all that the features depend on, so features of other shards, of
another tower or of other views are never read. The ranks share the work. A killed run goes on with the blocks that are missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_tools.config import AugmentConfig, FeaturesConfig, ReadConfig
from data_tools.in_order.collection import Collection
from data_tools.pixels.decode import decode_image, decode_pixels
from data_tools.pixels.feature_blocks import FeatureBlocks
from data_tools.pixels.transforms import render
from data_tools.pixels.views import draw_views
from data_tools.shards.reader import ShardReader
from data_tools.shards.remote import is_remote
from data_tools.workers import open_loader
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import ImageEncoderConfig
from runtime.errors import DataError, LigatureError, RecipeError
from runtime.progress import progress
from runtime.ranks import barrier, run_on_first
from training.context import RunContext

CHUNK = 8
"""Images that a worker decodes and the tower encodes at once."""
VERSION = 1
"""Raised when the same recipe would give other features."""
NUMPY = {"fp16": np.float16, "fp32": np.float32}


def training_features(
    data: ReadConfig, reader: ShardReader, model: AlignmentModel, context: RunContext
) -> FeatureBlocks | None:
    """Return the cached features of the training images, and encode what is missing. A collective.

    Without augmentation there is one view of each image, else `data.features.views` views, drawn once and for all.

    Returns:
        The features, or None where the recipe asks for none.

    Raises:
        RecipeError: the image tower learns.
        LigatureError: the disk has no room for the cache.
    """
    if data.features.kind == "live":
        return None
    views = data.features.views if data.augment.used else 1
    size, augment = model.config.image.image_size, data.augment

    def make_views(encoded: bytes, sample: int) -> Tensor:
        pixels = decode_pixels(encoded)
        drawn = draw_views((pixels.shape[0], pixels.shape[1]), augment, views, sample)
        return torch.stack([render(pixels, view, size) for view in drawn])

    return _cached(data, reader, model, context, make_views, {"augment": _recipe_of_views(augment), "views": views})


def validation_features(
    data: ReadConfig, collection: Collection, model: AlignmentModel, context: RunContext
) -> FeatureBlocks | None:
    """Return the cached features of the validation images, as scoring sees them; see `training_features`."""
    if data.features.kind == "live":
        return None
    assert isinstance(collection.reader, ShardReader), "a run validates on a shard folder"
    transform = model.evaluation_transform()

    def make_view(encoded: bytes, sample: int) -> Tensor:
        return transform(decode_image(encoded))[None]

    return _cached(data, collection.reader, model, context, make_view, {"crop": transform.crop, "views": 1})


def _recipe_of_views(augment: AugmentConfig) -> dict[str, Any]:
    """Return what the drawn views depend on: not where they are made."""
    return {key: value for key, value in asdict(augment).items() if key != "where"}


def _cached(
    data: ReadConfig,
    reader: ShardReader,
    model: AlignmentModel,
    context: RunContext,
    make_views: Callable[[bytes, int], Tensor],
    views: dict[str, Any],
) -> FeatureBlocks:
    features = data.features
    if any(parameter.requires_grad for parameter in model.image_encoder.vit.parameters()):
        raise RecipeError(
            "data.features caches what the image tower gives, but the tower learns; freeze it (model.image.frozen), or set "
            "data.features.kind to live"
        )
    if features.kind == "pooled" and model.config.image.pooling == "query":
        raise RecipeError(
            "data.features.kind is pooled, but model.image.pooling is query, and the query learns; set the kind to tokens"
        )
    rule = {
        "version": VERSION,
        "shards": [manifest.fingerprint for manifest in reader.manifests],
        "tower": _hash_of(model),
        "image": _architecture(model.config.image),
        "kind": features.kind,
        "dtype": features.dtype,
        **views,
    }
    name = hashlib.sha256(json.dumps(rule, sort_keys=True).encode()).hexdigest()[:16]
    blocks = FeatureBlocks(_home(features, reader) / f"features-{name}", len(reader))
    missing = run_on_first(context.ranks, lambda: _check_room(blocks, model, features, views["views"]))
    if not missing:
        return blocks
    encode = _encoder(model, features, context.device)
    own = missing[context.ranks.rank :: context.ranks.world]
    title = "encoding images once"
    total = sum(len(blocks.members(block)) for block in own)
    with progress(title, total, "images", silent=not context.ranks.first) as bar:
        for turn in range(-(-len(missing) // context.ranks.world)):  # every rank enters a phase as often
            context.watchdog.enter_phase(title, 0)
            if turn < len(own):
                rows, broken = [], dict[int, str]()
                for numbers, pixels, reasons in _decoded(reader, blocks.members(own[turn]), make_views, data.workers):
                    rows.append(encode(pixels))
                    broken |= reasons
                    bar.advance(len(numbers))
                blocks.write(own[turn], np.concatenate(rows), broken)
    context.watchdog.enter_collective()
    barrier()
    return blocks


def _architecture(config: ImageEncoderConfig) -> dict[str, Any]:
    """Return what differs from the defaults, so that a key that a later version adds leaves caches as they are."""
    defaults = asdict(ImageEncoderConfig())
    differing = {key: value for key, value in asdict(config).items() if value != defaults[key]}
    return {key: value for key, value in differing.items() if key not in ("weights", "drop_path")}


def _home(features: FeaturesConfig, reader: ShardReader) -> Path:
    if features.folder:
        return Path(features.folder)
    if is_remote(reader.roots[0]):
        raise RecipeError(
            f"data.features: {reader.roots[0]} is remote; name a folder that all ranks see as data.features.folder"
        )
    return Path(reader.roots[0])


def _hash_of(model: AlignmentModel) -> str:
    """Return a hex sha256 of the tower's weights and statistics."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.image_encoder.vit.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_room(blocks: FeatureBlocks, model: AlignmentModel, features: FeaturesConfig, views: int) -> list[int]:
    """Return the missing blocks. Raises LigatureError where the disk has no room for them."""
    missing = blocks.missing()
    if not missing:
        return missing
    encoder = model.image_encoder
    numbers = encoder.tokens * encoder.width if features.kind == "tokens" else encoder.pooled_width
    samples = sum(len(blocks.members(block)) for block in missing)
    needed = samples * views * numbers * np.dtype(NUMPY[features.dtype]).itemsize
    try:
        blocks.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(blocks.folder).free
    except OSError as error:
        raise LigatureError(
            f"data.features: cannot write {blocks.folder} ({error.strerror}); name another folder as data.features.folder"
        ) from error
    if needed > free:
        raise LigatureError(
            f"data.features: {samples:,} images x {views} views need {needed / 1e9:.1f} GB at {blocks.folder.parent}, and "
            f"{free / 1e9:.1f} GB are free; lower data.features.views, or name another folder as data.features.folder"
        )
    print(
        f"features: {samples:,} images x {views} views, {needed / 1e9:.2f} GB, go to {blocks.folder}",
        flush=True,
    )
    return missing


def _encoder(model: AlignmentModel, features: FeaturesConfig, device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """Return the function (images, views, 3, size, size) uint8 -> (images, views, …) features."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> np.ndarray:
        tokens = model.image_tokens(pixels.flatten(0, 1).to(device))
        found = tokens if features.kind == "tokens" else model.image_encoder.global_state(tokens)
        return found.unflatten(0, pixels.shape[:2]).float().cpu().numpy().astype(NUMPY[features.dtype])

    return encode


class _Views(Dataset):
    """Sample number -> its number, its views, and why they cannot be made."""

    def __init__(self, reader: ShardReader, make_views: Callable[[bytes, int], Tensor]) -> None:
        self.reader, self.make_views = reader, make_views

    def __getitem__(self, sample: int) -> tuple[int, Tensor | None, str]:
        try:
            return sample, self.make_views(self.reader[sample].image, sample), ""
        except (OSError, ValueError, DataError) as error:
            return sample, None, " ".join(str(error).split())


def _decoded(
    reader: ShardReader, samples: range, make_views: Callable[[bytes, int], Tensor], workers: int
) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
    """Yield chunks of samples: their numbers, their views (zeros where unreadable), and the reasons of unreadable ones."""
    chunks = [list(samples[start : start + CHUNK]) for start in range(0, len(samples), CHUNK)]
    loader = open_loader(_Views(reader, make_views), lambda examples: examples, workers, batch_sampler=chunks)
    for examples in loader:
        like = next((views for _, views, _ in examples if views is not None), None)
        if like is None:
            raise DataError(f"{len(examples)} images in a row cannot be read, the last one: {examples[-1][2]}")
        pixels = torch.stack([torch.zeros_like(like) if views is None else views for _, views, _ in examples])
        yield [number for number, _, _ in examples], pixels, {number: why for number, _, why in examples if why}
