"""Turn captions into token ids, with a WordPiece vocabulary trained on the captions or with an existing tokenizer."""

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
"""BERT's special tokens. A trained vocabulary numbers them from 0 in this order."""
ALPHABET = 1000
"""Maximum number of letters in a trained vocabulary. Rarer letters become [UNK]."""


class CaptionTokenizer:
    """A `tokenizers` pipeline with BERT's special tokens, which cuts captions to `caption_tokens`."""

    def __init__(self, pipeline: Tokenizer, caption_tokens: int) -> None:
        """Check the pipeline's special tokens, and set its truncation.

        Args:
            pipeline: The tokenizer; it is changed.
            caption_tokens: Maximum number of tokens in a caption, [CLS] and [SEP] included.

        Raises:
            DataError: The pipeline lacks a special token, or [PAD] is not 0.
        """
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
        """Number of tokens, special and added ones included."""
        return self.pipeline.get_vocab_size()

    def encode(self, captions: list[str]) -> list[list[int]]:
        """Return the token ids of each caption, [CLS] first and [SEP] last, without padding."""
        return [encoding.ids for encoding in self.pipeline.encode_batch(captions)]

    def lengths(self, captions: list[str]) -> list[int]:
        """Return the tokens of each whole caption, [CLS] and [SEP] included, also of those that `encode` cuts."""
        self.pipeline.no_truncation()
        try:
            return [len(encoding.ids) for encoding in self.pipeline.encode_batch(captions)]
        finally:
            self.pipeline.enable_truncation(self.caption_tokens)

    def count_truncated(self, captions: list[str]) -> int:
        """Return how many captions are longer than `caption_tokens`, so that their ends are cut off."""
        return sum(bool(encoding.overflowing) for encoding in self.pipeline.encode_batch(captions))

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids (captions, longest) int64, padded with 0, and mask (captions, longest) bool, True at tokens."""
        return pad_tokens(self.encode(captions))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self.pipeline.decode(list(ids))

    def drop_punctuation(self) -> CaptionTokenizer:
        """Strip punctuation from captions from now on, as ALBEF's `pre_caption` does, and return this tokenizer.

        ALBEF also cuts captions to 30 words. Here the cut to `caption_tokens` takes its place.
        """
        self.pipeline.normalizer = _strip_punctuation(self.pipeline.normalizer)
        return self

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, which `tokenizers` and `transformers` read too."""
        write_text(Path(folder) / "tokenizer.json", self.pipeline.to_str())


def _strip_punctuation(following: normalizers.Normalizer | None) -> normalizers.Normalizer:
    """Return a normalizer that strips punctuation before the one that follows."""
    steps = [
        normalizers.Replace(Regex(r"[,.'!?\"()*#:;~]"), ""),
        normalizers.Replace(Regex("[-/]"), " "),
        normalizers.Replace(Regex("(?i)<person>"), "person"),
    ]
    return normalizers.Sequence(steps if following is None else [*steps, following])


def pad_tokens(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows of ids to the longest. Return ids (rows, longest) int64, padded with 0, and mask (rows, longest) bool."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1])[None] < lengths[:, None]


def train_tokenizer(
    captions: Iterable[str], vocabulary: int, caption_tokens: int, punctuation: bool = True
) -> CaptionTokenizer:
    """Learn a lower-case WordPiece vocabulary: BERT's special tokens first, then single letters, then pieces.

    The same captions give the same vocabulary, in whatever order they come.

    Args:
        captions: The training captions.
        vocabulary: Maximum number of tokens to learn, special tokens included.
        caption_tokens: Maximum number of tokens in a caption, [CLS] and [SEP] included.
        punctuation: Whether punctuation is learned and read. False has the effect of `drop_punctuation`.
    """
    captions = list(captions)
    pipeline = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=True)
    if not punctuation:
        pipeline.normalizer = _strip_punctuation(pipeline.normalizer)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pipeline.decoder = decoders.WordPiece()

    # The library numbers inner letters (##a) in the order of a hash map, which differs from run to run, and breaks ties between
    # merges by those numbers. A first training without merges therefore collects the letters, and a second one fixes their order.
    letter_counts: Counter[str] = Counter()
    for start in range(0, len(captions), 10_000):
        letter_counts.update(pipeline.normalizer.normalize_str(" ".join(captions[start : start + 10_000])))
    frequent = sorted(letter_counts, key=lambda letter: (-letter_counts[letter], letter))
    letters = [letter for letter in frequent if not letter.isspace()][:ALPHABET]

    def learn(size: int, first_tokens: list[str]) -> list[str]:
        """Train the pipeline, and return its tokens in the order of their ids."""
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=first_tokens, min_frequency=2, show_progress=False,
            initial_alphabet=letters, limit_alphabet=len(letters),
        )  # fmt: skip
        pipeline.train_from_iterator(captions, trainer)
        ids = pipeline.get_vocab()
        return sorted(ids, key=ids.__getitem__)

    first_tokens = [*SPECIAL, *sorted(set(learn(0, list(SPECIAL))) - set(SPECIAL))]
    tokens = learn(vocabulary, first_tokens)
    # Build a new pipeline, because the trained one treats the letters as special tokens too.
    clean = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    clean.normalizer, clean.pre_tokenizer, clean.decoder = pipeline.normalizer, pipeline.pre_tokenizer, pipeline.decoder
    clean.add_special_tokens(list(SPECIAL))
    cls, sep = ((token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]"))
    clean.post_processor = processors.BertProcessing(sep, cls)
    return CaptionTokenizer(clean, caption_tokens)


def load_tokenizer(source: str | Path, caption_tokens: int) -> CaptionTokenizer:
    """Load a tokenizer.

    Args:
        source: A folder with `tokenizer.json` or `vocab.txt`, or a name on the Hugging Face hub (downloaded or cached).
        caption_tokens: Maximum number of tokens in a caption, [CLS] and [SEP] included.

    Raises:
        CheckpointError: There is no such tokenizer, or it cannot be read.
    """
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
        # This is a path, not a name. Asking the hub for it would cost the user most of a minute.
        raise CheckpointError(
            f"no tokenizer folder {folder}; give a folder with tokenizer.json or vocab.txt, or `train` to learn one"
        )
    if folder.exists() and not (folder / "vocab.txt").is_file():
        raise CheckpointError(f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.txt; give another folder")
    from transformers import AutoTokenizer, BertTokenizerFast  # type: ignore[attr-defined]  # in 5.x this alias is created at run time

    try:
        pretrained = (
            BertTokenizerFast(str(folder / "vocab.txt"))
            if folder.exists()
            else AutoTokenizer.from_pretrained(str(source))
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"no tokenizer `{source}` ({reason}); give a folder, or `train` to learn one") from error
    return CaptionTokenizer(pretrained.backend_tokenizer, caption_tokens)
