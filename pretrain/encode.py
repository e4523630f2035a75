"""Encode a collection of images and captions into features. The ranks share the work and all get the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_tools.in_order.collection import Collection
from data_tools.tokenizer import CaptionTokenizer
from pretrain.model.alignment_model import AlignmentModel
from runtime.progress import progress
from runtime.ranks import Ranks, gather_rows


@dataclass
class Encodings:
    """A collection's features: on the CPU, in the collection's order, whole on every rank."""

    image: Tensor
    """(images, feature_dim) unit-norm float32"""
    text: Tensor
    """(captions, feature_dim) unit-norm float32"""
    image_tokens: Tensor | None = None
    """(images, 1 + patches, image width), kept only for a fusion head to read"""
    text_states: Tensor | None = None
    """(captions, caption_tokens, text width), kept only for a fusion head to read; zero after each caption's end"""
    text_mask: Tensor | None = None
    """(captions, caption_tokens) bool, True where a token is"""


@torch.no_grad()
def encode_collection(
    model: AlignmentModel,
    tokenizer: CaptionTokenizer,
    collection: Collection,
    ranks: Ranks,
    batch_size: int = 64,
    workers: int = 0,
    keep_tokens: bool = False,
    silent: bool = True,
) -> Encodings:
    """Encode every image and every caption once, in evaluation mode. A collective: each rank takes a range of whole batches.

    Args:
        model: the model, on the device to compute on. Its training mode is left as it was.
        tokenizer: the model's tokenizer.
        collection: images and captions.
        ranks: this process among those that share the work.
        batch_size: images, or captions, in one forward pass.
        workers: processes that decode images.
        keep_tokens: whether to keep the encoders' states too, which a fusion head reads.
        silent: whether to leave out the progress bar.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    images, captions = len(collection), collection.captions
    image_parts, token_parts, text_parts, state_parts, mask_parts = [], [], [], [], []
    own_images, own_captions = rank_share(images, batch_size, ranks), rank_share(len(captions), batch_size, ranks)
    with progress("encoding", images + len(captions), "items", silent=silent or not ranks.first) as bar:
        for images_of_batch in _images(model, collection, own_images, batch_size, workers):
            tokens = model.image_tokens(images_of_batch.to(device))
            image_parts.append(model.image_features(tokens))
            if keep_tokens:
                token_parts.append(tokens.cpu())
            bar.advance(len(tokens) * ranks.world)
        for start in range(own_captions.start, own_captions.stop, batch_size):
            ids, mask = tokenizer(captions[start : min(start + batch_size, own_captions.stop)])
            states = model.text_encoder(ids.to(device), mask.to(device))
            text_parts.append(model.text_features(states, mask.to(device)))
            if keep_tokens:
                # A batch is as long as its longest caption; padded to one length, batches can be joined.
                padding = (0, 0, 0, tokenizer.caption_tokens - ids.shape[1])
                state_parts.append(torch.nn.functional.pad(states.cpu() * mask[..., None], padding))
                mask_parts.append(torch.nn.functional.pad(mask, padding[2:]))
            bar.advance(len(ids) * ranks.world)
    model.train(training)
    dim, width, image_width = model.config.feature_dim, model.text_encoder.width, model.image_encoder.width
    image = gather_shares(image_parts, images, batch_size, (dim,), device)
    text = gather_shares(text_parts, len(captions), batch_size, (dim,), device)
    if not keep_tokens:
        return Encodings(image, text)
    masks = [mask.float() for mask in mask_parts]  # float32, as the rows of an empty share are
    length = tokenizer.caption_tokens
    return Encodings(
        image,
        text,
        gather_shares(token_parts, images, batch_size, (model.image_encoder.tokens, image_width), device),
        gather_shares(state_parts, len(captions), batch_size, (length, width), device),
        gather_shares(masks, len(captions), batch_size, (length,), device).bool(),
    )


def _images(
    model: AlignmentModel, collection: Collection, numbers: range, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """Yield batches of pixels, or of cached features where the collection has some."""
    if collection.features is None:
        yield from collection.images(model.evaluation_transform(), numbers, batch_size, workers)
        return
    for start in range(0, len(numbers), batch_size):
        yield collection.features.first_views(numbers[start : start + batch_size])


def rank_share(count: int, batch_size: int, ranks: Ranks) -> range:
    """Return this rank's range of `count` items, in whole batches.

    A batch then holds the same items at any world size, and so gives the same bits. The last ranks may get fewer items
    than the others, or none.
    """
    batches = -(-count // batch_size)
    each = -(-batches // ranks.world) * batch_size
    return range(min(ranks.rank * each, count), min((ranks.rank + 1) * each, count))


def gather_shares(
    parts: list[Tensor], count: int, batch_size: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Join the rows that the ranks computed for their `rank_share`. A collective.

    Args:
        parts: this rank's rows, batch by batch; empty if its share is empty.
        count: rows of all ranks together.
        batch_size: batch size of the shares, as in `rank_share`.
        shape: shape of one row.
        device: where the ranks exchange tensors.

    Returns:
        (count, *shape), on the CPU.
    """
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    own = torch.cat(parts) if parts else torch.zeros(0, *shape)
    if world == 1:
        return own.cpu()
    own = own.to(device)
    # Every rank must bring as many rows as rank 0, whose share is the longest.
    padding = own.new_zeros(len(rank_share(count, batch_size, Ranks(0, world))) - len(own), *shape)
    return gather_rows(torch.cat([own, padding]))[:count].cpu()
