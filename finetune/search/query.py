"""Search an index with words or a picture: return the images that are most like each query, as data."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.in_order.gallery import is_image
from data_tools.pixels.decode import SOURCE_FORMATS, open_image, upright
from finetune.encoders import Encoder, load_encoder
from finetune.search.indexing import encode
from pretrain.weights.load import find_checkpoint
from retrieval.approximate import open_lists, search_lists
from retrieval.index import Index, nearest
from runtime.checkpoint import checkpoint_hash
from runtime.errors import CheckpointError, DataError, RecipeError

QUERIES_AT_ONCE = 64
"""Queries encoded in one batch."""


@dataclass
class Query:
    """A query in words, or the image of a file."""

    text: str
    """The words, or the image's path as the user wrote it."""
    image: Path | None = None


@dataclass
class Hit:
    """An image that a search returned."""

    score: float
    """Cosine of the query's and the image's vectors."""
    number: int
    """The image's number in the collection that was indexed."""
    name: str
    captions: list[str]


@dataclass
class Answers:
    """The hits of several queries, and how the index was searched."""

    index: Index
    queries: list[Query]
    hits: list[list[Hit]]
    """The hits of each query, best first."""
    description: str
    """One phrase: exact or approximate search, the number of images, the checkpoint."""
    encoding_seconds: float
    """Seconds that encoding all queries took."""
    comparing_seconds: float
    """Seconds that comparing them with the index took."""
    notes: list[str] = field(default_factory=list)
    """Words that the model could not read, one sentence a query."""


def read_queries(words: list[str], file: Path | None) -> list[Query]:
    """Return the queries of a command line and of a file. A query that ends like an image's name is an image file.

    Args:
        words: queries of the command line.
        file: queries in UTF-8, one a line; `-` is standard input; None: no file.

    Raises:
        RecipeError: there is no query, an empty one, or an image file that does not exist.
        DataError: the file cannot be read.
    """
    texts = list(words)
    if file is not None:
        try:
            content = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read queries from {file}: {getattr(error, 'strerror', None) or error}") from None
        lines = content.splitlines()
        if blank := [number for number, line in enumerate(lines, start=1) if not line.strip()]:
            raise RecipeError(f"{file}, line {blank[0]}: an empty query; remove the line")
        texts += lines
    if not texts:
        raise RecipeError("nothing to search for; give words in quotes, an image file, or --queries FILE")
    return [_parse_query(text) for text in texts]


def _parse_query(text: str) -> Query:
    words = " ".join(text.split())
    if not words:
        raise RecipeError('the query is empty; give words, as in: ligature search "a dog on a beach"')
    if not is_image(text):
        return Query(words)
    if not Path(text).is_file():
        raise RecipeError(f"no image file {text}; a query with the ending of an image must name one")
    return Query(text, Path(text))


def search(
    folder: Path, queries: list[Query], top: int, checkpoint: str | None, approximate: bool, device: torch.device
) -> Answers:
    """Return the images of an index that are most like each query.

    Args:
        folder: the index.
        queries: at least one.
        top: hits of each query; a smaller index gives all its images.
        checkpoint: folder that holds the index's checkpoint now; None: the folder that the index names.
        approximate: read the index's inverted lists instead of all its rows.
        device: where queries are encoded.

    Raises:
        LigatureError: there is no index, its checkpoint is missing or another one, an image cannot be read, or the model
            knows none of a query's words.
    """
    index = Index(folder)
    encoder = load_encoder(find_index_checkpoint(index, checkpoint), device)
    notes = list_unread_words(queries, encoder)
    start = time.perf_counter()
    vectors = encode_queries(queries, encoder)
    encoding_seconds = time.perf_counter() - start
    if approximate:
        lists, lists_to_read, recall = open_lists(index)  # not timed: a server opens them once
        start = time.perf_counter()
        scores, rows = search_lists(lists, lists_to_read, index.vectors, vectors, top)
        description = f"approximate search of {len(index):,} images; {recall}"
    else:
        start = time.perf_counter()
        scores, rows = nearest(index.vectors, vectors, top)
        description = f"exact search of {len(index):,} images"
    comparing_seconds = time.perf_counter() - start
    images = iter(index.images(rows[rows >= 0]))  # a row of -1 stands for a missing hit
    hits = [
        [Hit(float(score), **next(images)) for score, row in zip(query_scores, query_rows, strict=True) if row >= 0]
        for query_scores, query_rows in zip(scores, rows, strict=True)
    ]
    description += f", checkpoint {encoder.hash} ({encoder.training})"
    return Answers(index, queries, hits, description, encoding_seconds, comparing_seconds, notes)


def find_index_checkpoint(index: Index, source: str | None) -> Path:
    """Return the folder of the checkpoint that made the index.

    Args:
        index: a complete index.
        source: folder of a run or a checkpoint; None: the folder that the index names.

    Raises:
        CheckpointError: the checkpoint is missing, or it is another one.
    """
    index_hash = index.about["checkpoint"]
    path = Path(source or index.about["checkpoint_folder"])
    if not source and not path.exists():
        raise CheckpointError(
            f"the checkpoint that made {index.folder} is no longer at {path}; name where it is with --checkpoint (its hash is "
            f"{index_hash})"
        )
    folder = find_checkpoint(path)
    if (hash := checkpoint_hash(folder)) != index_hash:
        raise CheckpointError(
            f"{index.folder} was made by checkpoint {index_hash}, but {folder} is {hash}: their vectors do not compare; index "
            "again with this one, or name that one"
        )
    return folder


def list_unread_words(queries: list[Query], encoder: Encoder) -> list[str]:
    """Return a note on each query that the model reads in part: unknown words, or too many of them.

    Raises:
        DataError: the model's vocabulary has nothing of a query.
    """
    notes = []
    for query in queries:
        if query.image:
            continue
        encoding = encoder.tokenizer.pipeline.encode(query.text)
        spans = [
            span
            for token, span in zip(encoding.ids, encoding.offsets, strict=True)
            if token == encoder.tokenizer.unknown
        ]
        unknown = [query.text[start:end] for start, end in spans]
        if len(unknown) == len(encoding.ids) - 2:  # without [CLS] and [SEP]
            raise DataError(
                f"the model's vocabulary has nothing of {query.text!r}; use words like those it was trained on"
            )
        if unknown:
            notes.append(f"{query.text!r}: not in the model's vocabulary, so not read: {', '.join(unknown)}")
        if encoding.overflowing:
            notes.append(
                f"{query.text!r} is longer than {encoder.tokenizer.caption_tokens} tokens: its end is not read"
            )
    return notes


def encode_queries(queries: list[Query], encoder: Encoder) -> np.ndarray:
    """Return the queries' vectors in their order, (queries, width) float32. Words and images are encoded in separate batches."""
    vectors: list[Any] = [None] * len(queries)
    for with_image in (False, True):
        indices = [index for index, query in enumerate(queries) if bool(query.image) == with_image]
        for start in range(0, len(indices), QUERIES_AT_ONCE):
            batch = indices[start : start + QUERIES_AT_ONCE]
            if with_image:
                pixels = torch.stack([encoder.transform(open_query_image(queries[index])) for index in batch])
                rows = encode(encoder.encode_image, pixels)
            else:
                rows = encode(encoder.encode_text, [queries[index].text for index in batch])
            for index, row in zip(batch, rows, strict=True):
                vectors[index] = row
    return np.stack(vectors)


def open_query_image(query: Query) -> Any:
    """Return the image of a query, upright. Raises DataError where it cannot be read."""
    assert query.image is not None
    try:
        return upright(open_image(query.image.read_bytes(), SOURCE_FORMATS))
    except (OSError, ValueError) as error:
        raise DataError(f"{query.image} cannot be read ({error}); give another image") from error
