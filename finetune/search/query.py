"""`ligature search`: words or a picture -> the images of an index that are most like it, as a table, JSON lines or a page."""

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

BATCH = 64
"""Queries encoded at once."""


@dataclass
class Query:
    """What is asked: words, or the image in a file."""

    text: str
    image: Path | None = None


@dataclass
class Hit:
    score: float
    """Cosine of the query's and the image's vectors."""
    number: int
    """Of the image in what was indexed."""
    name: str
    captions: list[str]


@dataclass
class Answers:
    """What was found, and how."""

    index: Index
    queries: list[Query]
    hits: list[list[Hit]]
    """Of each query, best first."""
    description: str
    """The index, and whether the search was exact, in words."""
    encoding_seconds: float
    """For encoding all queries."""
    comparing_seconds: float
    """For comparing them."""
    notes: list[str] = field(default_factory=list)


def read_queries(words: list[str], file: Path | None) -> list[Query]:
    """The queries of a command line and of a file (one a line; `-` is standard input).

    One that ends like an image's name is an image file. Raises RecipeError for none, an empty one, or a missing image.
    """
    told = list(words)
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read queries from {file}: {getattr(error, 'strerror', None) or error}") from None
        lines = text.splitlines()
        if blank := [number for number, line in enumerate(lines, start=1) if not line.strip()]:
            raise RecipeError(f"{file}, line {blank[0]}: an empty query; remove the line")
        told += lines
    if not told:
        raise RecipeError("nothing to search for; give words in quotes, an image file, or --queries FILE")
    found = []
    for one in told:
        text = " ".join(one.split())
        if not text:
            raise RecipeError('the query is empty; give words, as in: ligature search "a dog on a beach"')
        if is_image(one):
            if not Path(one).is_file():
                raise RecipeError(f"no image file {one}; a query that ends like one is read as one")
            found.append(Query(one, Path(one)))
        else:
            found.append(Query(text))
    return found


def search(
    folder: Path, queries: list[Query], top: int, checkpoint: str | None, approximate: bool, device: torch.device
) -> Answers:
    """Ask an index. checkpoint: where the encoder lies now, if not where it lay when the index was made.

    Raises a LigatureError in one line: no index, no such checkpoint or another one, an image that cannot be read, words of which
    the model knows none.
    """
    index = Index(folder)
    encoder = load_encoder(checkpoint_of(index, checkpoint), device)
    notes = notes_on(queries, encoder)
    began = time.perf_counter()
    vectors = encode_queries(queries, encoder)
    encoded = time.perf_counter()
    how = f"exact search of {len(index):,} images"
    if approximate:
        lists, read, recall = open_lists(index)
        began, encoded = began + time.perf_counter() - encoded, time.perf_counter()  # opening is neither
        scores, rows = search_lists(lists, read, index.vectors, vectors, top)
        how = f"approximate search of {len(index):,} images; {recall}"
    else:
        scores, rows = nearest(index.vectors, vectors, top)
    compared = time.perf_counter()
    found = iter(index.images(rows[rows >= 0]))
    hits = [
        [Hit(float(score), **next(found)) for score, row in zip(*one, strict=True) if row >= 0]
        for one in zip(scores, rows, strict=True)
    ]
    description = f"{how}, checkpoint {encoder.hash} ({encoder.training})"
    return Answers(index, queries, hits, description, encoded - began, compared - encoded, notes)


def checkpoint_of(index: Index, given: str | None) -> Path:
    """The folder of the checkpoint that made the index. Raises CheckpointError where it is gone or another one."""
    wanted = index.about["checkpoint"]
    source = Path(given or index.about["checkpoint_folder"])
    if not given and not source.exists():
        raise CheckpointError(
            f"the checkpoint that made {index.folder} is no longer at {source}; name where it is with --checkpoint (its hash is "
            f"{wanted})"
        )
    folder = find_checkpoint(source)
    if (hash := checkpoint_hash(folder)) != wanted:
        raise CheckpointError(
            f"{index.folder} was made by checkpoint {wanted}, but {folder} is {hash}: their vectors do not compare; index again "
            "with this one, or name that one"
        )
    return folder


def notes_on(queries: list[Query], encoder: Encoder) -> list[str]:
    """What the model cannot read of the words. Raises DataError for a query of which it knows nothing."""
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
    """(queries, width) float32."""
    vectors: list[Any] = [None] * len(queries)
    for kind in (False, True):
        places = [place for place, query in enumerate(queries) if bool(query.image) == kind]
        for start in range(0, len(places), BATCH):
            own = places[start : start + BATCH]
            if kind:
                pixels = torch.stack([encoder.transform(open_query(queries[place])) for place in own])
                rows = encode(encoder.encode_image, pixels)
            else:
                rows = encode(encoder.encode_text, [queries[place].text for place in own])
            for place, row in zip(own, rows, strict=True):
                vectors[place] = row
    return np.stack(vectors)


def open_query(query: Query) -> Any:
    """The image of a query. Raises DataError where it cannot be read."""
    assert query.image is not None
    try:
        return upright(open_image(query.image.read_bytes(), SOURCE_FORMATS))
    except (OSError, ValueError) as error:
        raise DataError(f"{query.image} cannot be read ({error}); give another image") from error
