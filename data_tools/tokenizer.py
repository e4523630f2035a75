"""Turn captions into token ids, with a WordPiece vocabulary trained on the captions or with an existing tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from runtime.errors import CheckpointError, DataError
from runtime.files import read_json, write_text

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""BERT's special tokens. A trained vocabulary numbers them from 0 in this order."""
ALPHABET = 1000
"""Maximum number of letters in a trained vocabulary. Rarer letters become [UNK]."""


@dataclass(frozen=True)
class SpecialTokens:
    """A tokenizer's special tokens as they are written; None where it has none. BERT's are the defaults."""

    pad: str | None = "[PAD]"
    unknown: str | None = "[UNK]"
    cls: str | None = "[CLS]"
    """The first token of a caption."""
    sep: str | None = "[SEP]"
    """The last token of a caption."""
    mask: str | None = "[MASK]"


BERT = SpecialTokens()
CONFIG = {"pad": "pad_token", "unknown": "unk_token", "cls": "cls_token", "sep": "sep_token", "mask": "mask_token"}
"""Special tokens by the names that `transformers` gives them in `tokenizer_config.json`."""
ABSENT = -1
"""The id of a special token that a tokenizer does not have. No token of a caption is equal to it."""


class CaptionTokenizer:
    """A `tokenizers` pipeline of any kind (WordPiece, BPE, Unigram), which cuts captions to `caption_tokens`.

    Attributes:
        pad: Id of the padding token. Batches are padded with 0 whatever it is: a text encoder reads the mask and fills in its own.
        unknown: Id of the unknown token.
        cls: Id of the token that begins a caption.
        sep: Id of the token that ends a caption.
        mask: Id of the token that masks a word. It and the other ids are `ABSENT` where the tokenizer has no such token.
        length: Words of every batch, where the text encoder reads captions of one length only, as SigLIP's; else None.
    """

    def __init__(
        self, pipeline: Tokenizer, caption_tokens: int, special: SpecialTokens = BERT, length: int | None = None
    ) -> None:
        """Check the pipeline's special tokens, and set its truncation.

        Args:
            pipeline: The tokenizer; it is changed.
            caption_tokens: Maximum number of tokens in a caption, special tokens included.
            special: Its special tokens.
            length: Words of every batch; None for the longest caption's.

        Raises:
            DataError: The pipeline lacks a special token.
        """
        named = {name: token for name, token in asdict(special).items() if token is not None}
        ids = {name: pipeline.token_to_id(token) for name, token in named.items()}
        missing = [named[name] for name, number in ids.items() if number is None]
        if missing:
            raise DataError(f"the tokenizer lacks {' '.join(missing)}; use a BERT (WordPiece) tokenizer")
        self.pipeline, self.caption_tokens, self.special, self.length = pipeline, caption_tokens, special, length
        self.pad, self.unknown, self.cls, self.sep, self.mask = (
            ABSENT if (number := ids.get(name)) is None else number for name in asdict(BERT)
        )
        pipeline.no_padding()
        pipeline.enable_truncation(caption_tokens)

    def require_bert(self) -> CaptionTokenizer:
        """Return this tokenizer if our own BERT can read it.

        Raises:
            DataError: It is another model's, or [PAD] is not 0.
        """
        if self.special != BERT:
            missing = [token for token in asdict(BERT).values() if token not in asdict(self.special).values()]
            raise DataError(f"the tokenizer lacks {' '.join(missing)}; use a BERT (WordPiece) tokenizer")
        if self.pad != 0:
            raise DataError(f"the tokenizer's [PAD] is {self.pad}; it must be 0, as in BERT's vocabulary")
        return self

    @property
    def vocabulary(self) -> int:
        """Number of tokens, special and added ones included."""
        return self.pipeline.get_vocab_size()

    def encode(self, captions: list[str]) -> list[list[int]]:
        """Return the token ids of each caption, without padding: [CLS] first and [SEP] last, or what its model has in their place."""
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
        return pad_tokens(self.encode(captions), self.length)

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
        """Write `tokenizer.json`, which `tokenizers` and `transformers` read too, and what it does not say where it is not a BERT's."""
        write_text(Path(folder) / "tokenizer.json", self.pipeline.to_str())
        if self.special != BERT or self.length:
            named = {CONFIG[name]: token for name, token in asdict(self.special).items() if token is not None}
            settings = {
                "tokenizer_class": OWN_CLASS,
                "model_max_length": self.caption_tokens,
                "fixed_length": self.length,
            }
            write_text(Path(folder) / "tokenizer_config.json", json.dumps(settings | named, indent=2))


def _strip_punctuation(following: normalizers.Normalizer | None) -> normalizers.Normalizer:
    """Return a normalizer that strips punctuation before the one that follows."""
    steps = [
        normalizers.Replace(Regex(r"[,.'!?\"()*#:;~]"), ""),
        normalizers.Replace(Regex("[-/]"), " "),
        normalizers.Replace(Regex("(?i)<person>"), "person"),
    ]
    return normalizers.Sequence(steps if following is None else [*steps, following])


def pad_tokens(rows: list[list[int]], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Pad rows of ids to the longest, or to `length`. Return ids (rows, longest) int64, padded with 0, and mask (rows, longest) bool."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    if length:
        ids = torch.nn.functional.pad(ids, (0, length - ids.shape[1]))
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
    """Load a tokenizer, BERT's or that of another model.

    Args:
        source: A folder with `tokenizer.json`, `vocab.txt` or other files of a tokenizer, or a name on the Hugging Face hub (downloaded or cached).
        caption_tokens: Maximum number of tokens in a caption, special tokens included.

    Raises:
        CheckpointError: There is no such tokenizer, or it cannot be read.
        DataError: It lacks its own special tokens.
    """
    folder = Path(source)
    if not folder.exists() and (
        folder.is_absolute() or folder.parent not in (Path(), folder) and folder.parent.is_dir()
    ):
        # This is a path, not a name. Asking the hub for it would cost the user most of a minute.
        raise CheckpointError(
            f"no tokenizer folder {folder}; give a folder with tokenizer.json or vocab.txt, or `train` to learn one"
        )
    if folder.exists() and not any((folder / name).is_file() for name in FILES):
        raise CheckpointError(f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.txt; give another folder")
    if (folder / "tokenizer.json").is_file():
        pipeline = _read_pipeline(folder / "tokenizer.json")
        config_file = folder / "tokenizer_config.json"
        settings = read_json(config_file) if config_file.is_file() else {}
        if settings.get("tokenizer_class") == OWN_CLASS and "fixed_length" in settings:  # saved by `save`
            named = {name: settings.get(key) for name, key in CONFIG.items()}
            return CaptionTokenizer(pipeline, caption_tokens, SpecialTokens(**named), settings["fixed_length"])
        if all(pipeline.token_to_id(token) is not None for token in SPECIAL):
            return CaptionTokenizer(pipeline, caption_tokens)
    from transformers import (  # type: ignore[attr-defined]  # in 5.x BertTokenizerFast is created at run time
        AutoTokenizer,
        BertTokenizerFast,
        PreTrainedTokenizerFast,
    )

    bare_vocabulary = (folder / "vocab.txt").is_file() and not (folder / "tokenizer_config.json").is_file()
    try:
        # Without a config AutoTokenizer cannot tell whose vocabulary it is; in a file of this name it is a BERT's.
        pretrained: Any = (
            BertTokenizerFast(str(folder / "vocab.txt"))
            if bare_vocabulary
            else AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        )
        # SigLIP's class is in Python alone, beside the same in tokenizer.json.
        if not hasattr(pretrained, "backend_tokenizer"):
            pretrained = PreTrainedTokenizerFast.from_pretrained(str(source))
    except Exception as error:  # no file, no network, a class of its own: the library raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"no tokenizer `{source}` ({reason}); give a folder, or `train` to learn one") from error
    return CaptionTokenizer(pretrained.backend_tokenizer, caption_tokens, _special_tokens(pretrained))


OWN_CLASS = "PreTrainedTokenizerFast"
"""The class of `transformers` that takes `tokenizer.json` as it is."""
FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer_config.json")
"""Files by one of which a folder is known to hold a tokenizer."""


def _read_pipeline(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer ({error})") from error


def _special_tokens(pretrained: Any) -> SpecialTokens:
    """Return the special tokens of a tokenizer of `transformers`. Some call the first and last token of a text BOS and EOS."""
    return SpecialTokens(
        pad=pretrained.pad_token,
        unknown=pretrained.unk_token,
        cls=pretrained.cls_token or pretrained.bos_token,
        sep=pretrained.sep_token or pretrained.eos_token,
        mask=pretrained.mask_token,
    )
