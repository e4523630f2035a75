"""A collection in memory, and a tokenizer whose vocabulary is written down here."""

from __future__ import annotations

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data_tools.tokenizer import SPECIAL, CaptionTokenizer

WORDS = [f"w{number}" for number in range(80)]


def tokenizer() -> CaptionTokenizer:
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    pipeline = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    pipeline.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return CaptionTokenizer(pipeline, 12)


class Pictures:
    """`count` noise images with `each` captions of 1 to 9 words."""

    features = None

    def __init__(self, count: int, each: int, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
        self.pictures = [Image.fromarray(picture.numpy()) for picture in pixels]
        words = torch.randint(len(WORDS), (count * each, 9), generator=generator).tolist()
        self.captions = [" ".join(WORDS[word] for word in row[: 1 + row[0] % 9]) for row in words]
        self.caption_image = torch.arange(count).repeat_interleave(each).numpy()

    def __len__(self) -> int:
        return len(self.pictures)

    def images(self, transform, which, batch_size, workers):
        for start in range(which.start, which.stop, batch_size):
            end = min(start + batch_size, which.stop)
            yield torch.stack([transform(picture) for picture in self.pictures[start:end]])
