"""`ligature index`: a collection's images -> unit vectors on disk, in parts that are committed one by one.

Which images are a part, and which of them a batch, depends on their numbers alone: killed and started again, with any number of
workers, it ends with the same bytes (with the same number of threads to a process and, on the CPU, any number of ranks).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.in_order.gallery import FileGallery, Gallery, TarGallery, open_gallery
from finetune.encoders import Encoder, load_encoder
from finetune.search.config import IndexRecipe
from pretrain.weights.load import find_checkpoint
from retrieval.index import BROKEN, MANIFEST, Index, Part, join_parts, part_path, remove_parts, write_part
from runtime.checkpoint import checkpoint_hash
from runtime.errors import DataError, RecipeError
from runtime.files import read_json, sha256_of, write_json, write_text
from runtime.progress import format_duration, progress
from runtime.ranks import Ranks, barrier, join, run_on_first, use_precision

PLAN, LISTED = "plan.json", "files.json"
CAPTIONS = 5
"""Kept of each image, to be shown beside it and to measure an approximate index by."""


def build_index(recipe: IndexRecipe) -> None:
    """Make the index, or go on with it; on a finished one say so. Prints what it came to."""
    ranks, device = join(recipe.device)
    use_precision(recipe.precision, device)
    out = Path(recipe.out)
    hash = checkpoint_hash(find_checkpoint(recipe.checkpoint))
    with claimed(out, ranks):
        if run_on_first(ranks, lambda: _finished(out, hash, recipe)):
            if ranks.first:
                remove_parts(out)
                print(f"{out} is complete: {_told(Index(out))}; nothing to do, remove it to index again")
        else:
            _make(recipe, out, ranks, device)
        if ranks.first and recipe.approximate != "none":
            _approximate(recipe, Index(out), device)


@contextmanager
def claimed(out: Path, ranks: Ranks) -> Iterator[None]:
    """The folder, locked by this run's first rank: two runs would write the same parts."""

    def claim() -> int:
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is a file; give another --out")
        if out.is_dir() and not ({MANIFEST, "parts"} & set(os.listdir(out))) and any(out.iterdir()):
            raise DataError(f"{out} holds other files; give a folder of its own as --out")
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise DataError(f"{out} is being written by another `ligature index`; wait for it") from None
        return descriptor

    descriptor = run_on_first(ranks, claim)
    try:
        yield
    finally:
        if ranks.first:
            os.close(descriptor)
            if not any(out.iterdir()):  # nothing came of it
                out.rmdir()


def _finished(out: Path, hash: str, recipe: IndexRecipe) -> bool:
    """Whether the index is there. Raises DataError where another checkpoint made it, or it is of other images; lists are added to
    one whose folder has changed since, which is told."""
    if not (out / MANIFEST).is_file():
        return False
    about = Index(out).about
    made, place = about["checkpoint"], about["source"]["place"]
    data = recipe.data
    if made != hash:
        raise DataError(f"{out} was made by checkpoint {made}, not by {hash}; give another --out, or remove it")
    if (precision := about.get("precision", "fp32")) != recipe.precision:
        raise DataError(f"{out} was made in {precision}, not in {recipe.precision}; give another --out, or remove it")
    if place != _place(data):
        raise DataError(f"{out} is of the images of {place}, not of {data}; give another --out, or remove it")
    if about["source"]["fingerprint"] != open_gallery(data).fingerprint:
        if recipe.approximate != "none":
            print(f"{data} has changed since {out} was made; the lists are of what was indexed then")
            return True
        raise DataError(
            f"{out} is of other images than {data} holds now; give another --out, or remove it to index them anew"
        )
    return True


def _make(recipe: IndexRecipe, out: Path, ranks: Ranks, device: torch.device) -> None:
    encoder = load_encoder(recipe.checkpoint, device)
    width = encode(encoder.encode_text, [""]).shape[1]  # before anything is written: a model may give texts no vector

    def begin() -> list[int]:
        gallery = open_gallery(recipe.data, _listed(out))
        _agree(out, recipe, encoder, gallery)
        parts = -(-len(gallery) // recipe.part_images)
        return [part for part in range(parts) if not part_path(out, part).is_dir()]

    missing = run_on_first(ranks, begin)
    gallery = open_gallery(recipe.data, _listed(out))  # on every rank the list that the first one wrote down
    parts = -(-len(gallery) // recipe.part_images)
    done = len(gallery) - sum(len(_numbers(part, recipe, gallery)) for part in missing)
    broken = 0
    with progress("indexing", len(gallery), "images", done=done, silent=not ranks.first) as bar:
        for part in missing[ranks.rank :: ranks.world]:
            content = _embed(encoder, gallery, _numbers(part, recipe, gallery), recipe, width, bar.advance, ranks.world)
            write_part(out, part, content)
            if content.broken:
                broken += len(content.broken)
                bar.note = f"{broken:,} cannot be read"
        took = bar.rate()
    barrier()
    if not ranks.first:
        return
    indexed = len(gallery) - sum(_count(part_path(out, part) / BROKEN) for part in range(parts))
    if not indexed:
        first = json.loads((part_path(out, 0) / BROKEN).read_text().splitlines()[0])
        remove_parts(out)
        raise DataError(
            f"none of the {len(gallery):,} images of {recipe.data} can be read; the first is {first['name']}: {first['reason']}"
        )
    join_parts(out, parts, read_json(out / "parts" / PLAN))
    speed = f"; {took:,.1f} images a second, {format_duration(len(gallery) / took)} for all" if took else ""
    print(f"{out}: {_told(Index(out))}{speed}")
    for problem in gallery.problems if isinstance(gallery, TarGallery) else []:
        print(f"{recipe.data} is damaged: {problem}")


def _numbers(part: int, recipe: IndexRecipe, gallery: Gallery) -> range:
    """The images of a part."""
    return range(part * recipe.part_images, min((part + 1) * recipe.part_images, len(gallery)))


def _listed(out: Path) -> list[str] | None:
    """The files of a folder as they were listed when its index was begun: files that came since are not of it."""
    path = out / "parts" / LISTED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _agree(out: Path, recipe: IndexRecipe, encoder: Encoder, gallery: Gallery) -> None:
    """Write down what is being made; where that stands there already, it must be the same."""
    plan = {
        "checkpoint": encoder.hash,
        "checkpoint_folder": str(encoder.folder.resolve()),
        "training": encoder.training,
        "source": {"kind": gallery.kind, "place": _place(recipe.data), "fingerprint": gallery.fingerprint},
        "images": len(gallery),
        "batch_size": recipe.batch_size,
        "precision": recipe.precision,
        "part_images": recipe.part_images,
    }
    path = out / "parts" / PLAN
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        if isinstance(gallery, FileGallery):
            write_text(path.parent / LISTED, json.dumps(gallery.names))  # ASCII: a name may be no UTF-8
        write_json(path, plan)
        return
    begun = read_json(path)
    for key in ("checkpoint", "training", "batch_size", "precision", "part_images"):
        before = begun.get(key, "fp32" if key == "precision" else None)  # an older index does not say
        if before != plan[key]:
            raise RecipeError(f"{out} cannot go on: {key} is {plan[key]}, it was begun with {before}; {_ANEW}")
    if begun.get("source") != plan["source"]:
        raise RecipeError(
            f"{out} cannot go on: it was begun on {begun['source']['place']}, whose images were others than those of "
            f"{recipe.data} now; {_ANEW}"
        )


_ANEW = "give another --out, or remove it to begin again"


def _place(data: str) -> str:
    return data if "://" in data else str(Path(data).resolve())


def _embed(
    encoder: Encoder, gallery: Gallery, numbers: range, recipe: IndexRecipe, width: int, advance: Callable, world: int
) -> Part:
    vectors, names, kept, broken = [np.zeros((0, width), np.float32)], list[str](), list[int](), list[dict[str, Any]]()
    for batch in gallery.batches(encoder.transform, numbers, recipe.batch_size, recipe.workers):
        if batch.pixels is not None:
            vectors.append(encode(encoder.encode_image, batch.pixels))
            kept += batch.numbers
            names += [gallery.name(number) for number in batch.numbers]
        broken += [
            {"number": number, "name": gallery.name(number), "reason": reason} for number, reason in batch.broken
        ]
        advance((len(batch.numbers) + len(batch.broken)) * world)
    captions = [gallery.captions(number)[:CAPTIONS] for number in kept]
    return Part(np.concatenate(vectors), kept, names, captions, broken)


@torch.inference_mode()
def encode(function: Callable, inputs: Any) -> np.ndarray:
    """(rows, width) float32 of an encoder's `encode_image` or `encode_text`."""
    return function(inputs).float().cpu().numpy()


def _approximate(recipe: IndexRecipe, made: Index, device: torch.device) -> None:
    from retrieval.approximate import build_lists, load_faiss, read_lists_info

    stands, asked_by = read_lists_info(made), ""
    if recipe.queries:
        asked_by = f"{Path(recipe.queries).name}, {sha256_of(Path(recipe.queries))[:8]}"
    if stands and stands.get("target") == recipe.recall and asked_by in ("", stands["measured_with"]):
        print(f"{made.folder} has its inverted lists already; nothing to do")
        return
    load_faiss()
    spread = np.unique(np.linspace(0, len(made) - 1, min(500, len(made))).astype(np.int64))
    if recipe.queries:
        told, kind = Path(recipe.queries).read_text(encoding="utf-8").splitlines(), asked_by
    else:
        told = [image["captions"][0] for image in made.images(spread) if image["captions"]]
        kind = "captions of its images"
    if told:
        encoder = load_encoder(recipe.checkpoint, device)
        queries = np.concatenate(
            [encode(encoder.encode_text, told[start : start + 64]) for start in range(0, len(told), 64)]
        )
    else:
        queries, kind = (
            np.asarray(made.vectors[spread]),
            "its own images; words may find less, give some with --queries",
        )
    print(build_lists(made, queries, kind, recipe.recall))


def _told(made: Index) -> str:
    about = made.about
    broken = f", {about['broken']:,} cannot be read ({made.folder / BROKEN} says why)" if about["broken"] else ""
    return f"{len(made):,} images by checkpoint {about['checkpoint']} ({about['training']}){broken}"


def _count(path: Path) -> int:
    return path.read_bytes().count(b"\n")
