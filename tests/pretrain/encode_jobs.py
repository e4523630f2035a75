"""Jobs that each rank of the encoding tests runs."""

from __future__ import annotations

import tiny
import torch
from PIL import Image
from torch import Tensor

from pretrain.encode import encode_collection
from runtime.ranks import ranks_from_environment


class Pictures:
    """A collection in memory: `count` noise images with `each` captions."""

    features = None

    def __init__(self, count: int, each: int) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (count, tiny.IMAGE, tiny.IMAGE, 3), generator=generator, dtype=torch.uint8)
        self._images = [Image.fromarray(picture.numpy()) for picture in pixels]
        words = torch.randint(len(tiny.WORDS), (count * each, 6), generator=generator).tolist()
        self.captions = [" ".join(tiny.WORDS[word] for word in row[: 2 + row[0] % 5]) for row in words]

    def __len__(self) -> int:
        return len(self._images)

    def images(self, transform, which, batch_size, workers):
        for start in range(which.start, which.stop, batch_size):
            end = min(start + batch_size, which.stop)
            yield torch.stack([transform(picture) for picture in self._images[start:end]])


def encode(count: int, each: int, keep_tokens: bool) -> dict[str, Tensor | None]:
    model = tiny.model().train()
    found = encode_collection(
        model, tiny.tokenizer(), Pictures(count, each), ranks_from_environment(), 2, 0, keep_tokens
    )
    assert model.training, "the model's mode is left as it was"
    return dict(vars(found))
