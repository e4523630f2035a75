"""Captions -> token ids: a WordPiece vocabulary trained on the captions, or a tokenizer that exists already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from runtime.errors import CheckpointError, DataError
from runtime.files import write_text

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000
"""Letters that a trained vocabulary has at most; rarer ones are [UNK]."""


class CaptionTokenizer:
    """A `tokenizers` pipeline with BERT's special tokens, cut to `caption_tokens`."""

    def __init__(self, pipeline: Tokenizer, caption_tokens: int) -> None:
        ids = pipeline.get_vocab()
        missing = [token for token in SPECIAL if token not in ids]
        if missing:
            raise DataError(f"the tokenizer lacks {' '.join(missing)}; use a BERT (WordPiece) tokenizer")
        self.pipeline, self.caption_tokens = pipeline, caption_tokens
        self.pad, self.unknown, self.cls, self.sep, self.mask = (ids[token] for token in SPECIAL)
        if self.pad != 0:
            raise DataError(f"the tokenizer's [PAD] is {self.pad}; it must be 0, as in BERT's vocabulary")
        pipeline.no_padding()
        pipeline.enable_truncation(caption_tokens)

    @property
    def vocabulary(self) -> int:
        """Number of tokens, specials and added ones included."""
        return self.pipeline.get_vocab_size()

    def encode(self, captions: list[str]) -> list[list[int]]:
        """Token ids of each caption, [CLS] first and [SEP] last, not padded."""
        return [encoding.ids for encoding in self.pipeline.encode_batch(captions)]

    def count_truncated(self, captions: list[str]) -> int:
        """How many captions are longer than `caption_tokens`, so that their end is not read."""
        return sum(bool(encoding.overflowing) for encoding in self.pipeline.encode_batch(captions))

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """-> ids (captions, longest) int64, padded with 0, and mask (captions, longest) bool, True where a token is."""
        return pad_tokens(self.encode(captions))

    def decode(self, ids: Iterable[int]) -> str:
        return self.pipeline.decode(list(ids))

    def drop_punctuation(self) -> CaptionTokenizer:
        """Reads captions from now on as ALBEF's `pre_caption` leaves them; its cut to 30 words is that to `caption_tokens` here."""
        self.pipeline.normalizer = _strip_punctuation(self.pipeline.normalizer)
        return self

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, which `tokenizers` and `transformers` read too."""
        write_text(Path(folder) / "tokenizer.json", self.pipeline.to_str())


def _strip_punctuation(then: normalizers.Normalizer | None) -> normalizers.Normalizer:
    first = [
        normalizers.Replace(Regex(r"[,.'!?\"()*#:;~]"), ""),
        normalizers.Replace(Regex("[-/]"), " "),
        normalizers.Replace(Regex("(?i)<person>"), "person"),
    ]
    return normalizers.Sequence(first if then is None else [*first, then])


def pad_tokens(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids (rows, longest) int64, padded with 0, and their mask (rows, longest) bool."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1])[None] < lengths[:, None]


def train_tokenizer(
    captions: Iterable[str], vocabulary: int, caption_tokens: int, punctuation: bool = True
) -> CaptionTokenizer:
    """Learn a lower-case WordPiece vocabulary of at most `vocabulary` tokens, BERT's special tokens first, then single
    letters. The same captions give the same vocabulary. punctuation: off, it is neither learned nor read (`drop_punctuation`)."""
    captions = list(captions)
    pipeline = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=True)
    if not punctuation:
        pipeline.normalizer = _strip_punctuation(pipeline.normalizer)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pipeline.decoder = decoders.WordPiece()

    # The library numbers inner letters (##a) in the order of a hash map, another one each time, and breaks ties between
    # merges by those numbers. So the letters are collected first, without merges, and then given their numbers.
    counted: Counter[str] = Counter()
    for start in range(0, len(captions), 10_000):
        counted.update(pipeline.normalizer.normalize_str(" ".join(captions[start : start + 10_000])))
    frequent = sorted(counted, key=lambda letter: (-counted[letter], letter))
    letters = [letter for letter in frequent if not letter.isspace()][:ALPHABET]

    def learn(size: int, first: list[str]) -> list[str]:
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=first, min_frequency=2, show_progress=False,
            initial_alphabet=letters, limit_alphabet=len(letters),
        )  # fmt: skip
        pipeline.train_from_iterator(captions, trainer)
        numbers = pipeline.get_vocab()
        return sorted(numbers, key=numbers.__getitem__)

    numbered = [*SPECIAL, *sorted(set(learn(0, list(SPECIAL))) - set(SPECIAL))]
    words = learn(vocabulary, numbered)
    # Made anew: to the trained one, letters would be special tokens as well.
    clean = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    clean.normalizer, clean.pre_tokenizer, clean.decoder = pipeline.normalizer, pipeline.pre_tokenizer, pipeline.decoder
    clean.add_special_tokens(list(SPECIAL))
    cls, sep = ((token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]"))
    clean.post_processor = processors.BertProcessing(sep, cls)
    return CaptionTokenizer(clean, caption_tokens)


def load_tokenizer(source: str | Path, caption_tokens: int) -> CaptionTokenizer:
    """A folder with `tokenizer.json` or `vocab.txt`, or a name on the Hugging Face hub (downloaded or cached)."""
    folder = Path(source)
    if (folder / "tokenizer.json").is_file():
        try:
            pipeline = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{folder / 'tokenizer.json'} is not a tokenizer ({error})") from error
        return CaptionTokenizer(pipeline, caption_tokens)
    if not folder.exists() and (
        folder.is_absolute() or folder.parent not in (Path(), folder) and folder.parent.is_dir()
    ):
        # A path, not a name: nobody should wait for the hub to say that it does not know it.
        raise CheckpointError(
            f"no tokenizer folder {folder}; give a folder with tokenizer.json or vocab.txt, or `train`"
        )
    if folder.exists() and not (folder / "vocab.txt").is_file():
        raise CheckpointError(f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.txt")
    from transformers import AutoTokenizer, BertTokenizerFast  # type: ignore[attr-defined]  # in 5.x an alias made at run time

    try:
        known = (
            BertTokenizerFast(str(folder / "vocab.txt"))
            if folder.exists()
            else AutoTokenizer.from_pretrained(str(source))
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"no tokenizer `{source}` ({reason}); give a folder, or `train`") from error
    return CaptionTokenizer(known.backend_tokenizer, caption_tokens)
