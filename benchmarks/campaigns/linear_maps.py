"""Two linear maps over the frozen encoders of a checkpoint: the line that a model trained from these encoders has to beat.

    python -m benchmarks.campaigns.linear_maps runs/flickr8k_real_cpu --train runs/data/flickr8k/train \\
        --test runs/data/flickr8k/dev --out maps.npz
    ligature evaluate --scores maps.npz --data runs/data/flickr8k/dev --dataset Flickr8k --split dev --out maps.json

Each encoder reads each image, whole, and each caption once. The maps then learn by InfoNCE on pairs of an image and one of its
captions, drawn anew every epoch. `--shuffled` gives every training image the captions of another one: the control, which must score
chance. Nothing but the encoders is taken from the checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_tools.in_order.collection import Collection, open_collection
from pretrain.weights.load import ImageTextModel, load_model

LOGIT_SCALE = 1 / 0.05


@torch.no_grad()
def encode(model: ImageTextModel, collection: Collection) -> tuple[Tensor, Tensor]:
    """Return the pooled states of all images, (images, image width), and of all captions, (captions, text width)."""
    network, images, texts = model.network, [], []
    for pixels in collection.images(model.transform, range(len(collection)), 64, 0):
        images.append(network.image_encoder.global_state(network.image_tokens(pixels)))
    for start in range(0, len(collection.captions), 256):
        ids, mask = model.tokenizer(collection.captions[start : start + 256])
        texts.append(network.text_encoder.global_state(network.text_encoder(ids, mask), mask))
    return torch.cat(images), torch.cat(texts)


def fit(images: Tensor, texts: Tensor, caption_image: np.ndarray, options: argparse.Namespace) -> nn.ModuleList:
    """Train the maps.

    Args:
        images: (images, image width).
        texts: (captions, text width).
        caption_image: (captions,) the image of each caption, in rising order.
        options: of the command line.

    Returns:
        The image's map and the text's.
    """
    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    first = np.searchsorted(caption_image, np.arange(len(images)))
    count = np.bincount(caption_image, minlength=len(images))
    partner = random.permutation(len(images)) if options.shuffled else np.arange(len(images))
    maps = nn.ModuleList(nn.Linear(width, options.dim) for width in (images.shape[1], texts.shape[1]))
    optimizer = torch.optim.AdamW(maps.parameters(), lr=options.lr, weight_decay=0.05)
    steps = options.epochs * (len(images) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, steps, pct_start=0.1)
    for _ in range(options.epochs):
        order = random.permutation(len(images))
        for start in range(0, len(order) - options.batch + 1, options.batch):
            rows = order[start : start + options.batch]
            captions = first[partner[rows]] + random.integers(0, count[partner[rows]])
            sides = [functional.dropout(side, options.dropout) for side in (images[rows], texts[captions])]
            image, text = (functional.normalize(map_(side)) for map_, side in zip(maps, sides, strict=True))
            logits, targets = LOGIT_SCALE * image @ text.T, torch.arange(len(rows))
            loss = (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return maps


def main() -> int:
    """Encode, train, and write the test set's embeddings; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shuffled", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    model = load_model(options.checkpoint)
    train, test = open_collection(options.train, None), open_collection(options.test, None)
    states = encode(model, train)
    start = time.process_time()
    maps = fit(*states, train.caption_image, options)
    print(f"{options.epochs} epochs of two maps: {time.process_time() - start:.0f} CPU seconds")
    with torch.no_grad():
        image, text = (
            functional.normalize(map_(side)).numpy() for map_, side in zip(maps, encode(model, test), strict=True)
        )
    np.savez(options.out, image=image, text=text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
