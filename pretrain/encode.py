"""A collection of images and captions -> features, each encoded once, the work shared by the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_tools.in_order.collection import Collection
from data_tools.pixels.transforms import EvaluationTransform
from data_tools.tokenizer import CaptionTokenizer
from pretrain.model.alignment_model import AlignmentModel
from runtime.progress import progress
from runtime.ranks import Ranks, gather_rows


@dataclass
class Encodings:
    """On the CPU, in the collection's order, whole on every rank."""

    image: Tensor
    """(images, feature_dim) unit-norm float32"""
    text: Tensor
    """(captions, feature_dim) unit-norm float32"""
    image_tokens: Tensor | None = None
    """(images, 1 + patches, image width), kept where a fusion head will read them"""
    text_states: Tensor | None = None
    """(captions, caption_tokens, text width), likewise; zero behind each caption's end"""
    text_mask: Tensor | None = None
    """(captions, caption_tokens) bool"""


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
    """Encode all images and all captions in evaluation mode; each rank takes a run of whole batches."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    images, captions = len(collection), collection.captions
    image_parts, token_parts, text_parts, state_parts, mask_parts = [], [], [], [], []
    own_images, own_captions = rank_share(images, batch_size, ranks), rank_share(len(captions), batch_size, ranks)
    with progress("encoding", images + len(captions), "items", silent=silent or not ranks.first) as bar:
        transform = EvaluationTransform(model.config.image.image_size)
        for pixels in collection.images(transform, own_images, batch_size, workers):
            tokens = model.image_encoder(pixels.to(device))
            image_parts.append(model.image_features(tokens))
            if keep_tokens:
                token_parts.append(tokens.cpu())
            bar.advance(len(pixels) * ranks.world)
        for start in range(own_captions.start, own_captions.stop, batch_size):
            ids, mask = tokenizer(captions[start : min(start + batch_size, own_captions.stop)])
            states = model.text_encoder(ids.to(device), mask.to(device))
            text_parts.append(model.text_features(states))
            if keep_tokens:
                room = (0, 0, 0, tokenizer.caption_tokens - ids.shape[1])
                state_parts.append(torch.nn.functional.pad(states.cpu() * mask[..., None], room))
                mask_parts.append(torch.nn.functional.pad(mask, room[2:]))
            bar.advance(len(ids) * ranks.world)
    model.train(training)
    dim, width, image_width = model.config.feature_dim, model.text_encoder.width, model.image_encoder.width
    image = gather_shares(image_parts, images, batch_size, (dim,), device)
    text = gather_shares(text_parts, len(captions), batch_size, (dim,), device)
    if not keep_tokens:
        return Encodings(image, text)
    patches = model.image_encoder.tokens
    return Encodings(
        image,
        text,
        gather_shares(token_parts, images, batch_size, (patches, image_width), device),
        gather_shares(state_parts, len(captions), batch_size, (tokenizer.caption_tokens, width), device),
        gather_shares(
            [part.float() for part in mask_parts], len(captions), batch_size, (tokenizer.caption_tokens,), device
        ).bool(),
    )


def rank_share(count: int, batch_size: int, ranks: Ranks) -> range:
    """This rank's run of `count` items, in whole batches: a batch then holds the same items whatever the number of ranks, and
    so gives the same bits. The last ranks may have less to do, or nothing."""
    batches = -(-count // batch_size)
    each = -(-batches // ranks.world) * batch_size
    return range(min(ranks.rank * each, count), min((ranks.rank + 1) * each, count))


def gather_shares(
    parts: list[Tensor], count: int, batch_size: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """The ranks' runs joined, on the CPU. Runs are padded to one length for the exchange."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    own = torch.cat(parts) if parts else torch.zeros(0, *shape)
    if world == 1:
        return own.cpu()
    own = own.to(device)
    padding = own.new_zeros(len(rank_share(count, batch_size, Ranks(0, world))) - len(own), *shape)
    return gather_rows(torch.cat([own, padding]))[:count].cpu()
