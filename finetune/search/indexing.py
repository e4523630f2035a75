"""`ligature index`: encode the images of a collection as unit vectors on disk, in parts that are committed one by one.

The number of an image alone decides its part and its batch. An index that is killed and started again therefore ends with the
same bytes, with any number of workers. Two things may change a last bit: the number of threads of a process and, on a GPU, the
number of ranks.

Tested in tests/finetune/search/test_query.py.
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

PLAN_FILE, LIST_FILE = "plan.json", "files.json"
CAPTIONS = 5
"""Captions kept of each image: a page shows them, and an approximate index is measured with them."""
MEASURED_IMAGES = 500
"""Images whose captions, or pixels, measure an approximate index at most."""
QUERIES_AT_ONCE = 64


def build_index(recipe: IndexRecipe) -> None:
    """Build the index of a recipe, or resume it; print what it holds. A finished index is left as it is.

    Raises:
        DataError: the folder or the images cannot be used.
        RecipeError: the index was begun with other settings.
    """
    ranks, device = join(recipe.device)
    use_precision(recipe.precision, device)
    out = Path(recipe.out)
    checkpoint = checkpoint_hash(find_checkpoint(recipe.checkpoint))
    with lock_folder(out, ranks):
        if run_on_first(ranks, lambda: _is_finished(out, checkpoint, recipe)):
            if ranks.first:
                remove_parts(out)
                print(f"{out} is complete: {_describe(Index(out))}; nothing to do, remove it to index again")
        else:
            _write_index(recipe, out, ranks, device)
        if ranks.first and recipe.approximate != "none":
            _add_inverted_lists(recipe, Index(out), device)


@contextmanager
def lock_folder(out: Path, ranks: Ranks) -> Iterator[None]:
    """Create the folder and lock it on the first rank: two runs would write the same parts."""

    def lock() -> int:
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is a file; give another --out")
        if out.is_dir() and not ({MANIFEST, "parts"} & set(os.listdir(out))) and any(out.iterdir()):
            raise DataError(f"{out} holds other files; give --out a folder of its own")
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise DataError(f"another `ligature index` is writing {out}; wait until it ends") from None
        return descriptor

    descriptor = run_on_first(ranks, lock)
    try:
        yield
    finally:
        if ranks.first:
            os.close(descriptor)
            if not any(out.iterdir()):  # the command failed before it wrote anything
                out.rmdir()


def _is_finished(out: Path, checkpoint: str, recipe: IndexRecipe) -> bool:
    """Return whether the index is complete.

    Inverted lists are added even where the images have changed since; a line says so.

    Raises:
        DataError: another checkpoint or precision made the index, or it is of other images.
    """
    if not (out / MANIFEST).is_file():
        return False
    about = Index(out).about
    own_checkpoint, own_place = about["checkpoint"], about["source"]["place"]
    data = recipe.data
    advice = "give another --out, or remove it"
    if own_checkpoint != checkpoint:
        raise DataError(f"{out} was made by checkpoint {own_checkpoint}, not by {checkpoint}; {advice}")
    if (precision := about.get("precision", "fp32")) != recipe.precision:
        raise DataError(f"{out} was made in {precision}, not in {recipe.precision}; {advice}")
    if own_place != _absolute_place(data):
        raise DataError(f"{out} is of the images of {own_place}, not of {data}; {advice}")
    if about["source"]["fingerprint"] != open_gallery(data).fingerprint:
        if recipe.approximate != "none":
            print(f"{data} has changed since {out} was made; the inverted lists cover the images indexed then")
            return True
        raise DataError(
            f"{out} is of other images than {data} holds now; give another --out, or remove it to index them again"
        )
    return True


def _write_index(recipe: IndexRecipe, out: Path, ranks: Ranks, device: torch.device) -> None:
    """Encode the parts that are missing, each on one rank, and join all parts into the index."""
    encoder = load_encoder(recipe.checkpoint, device)
    # Before anything is written: a model that cannot encode texts raises here.
    width = encode(encoder.encode_text, [""]).shape[1]

    def list_missing_parts() -> list[int]:
        gallery = open_gallery(recipe.data, _listed_files(out))
        _check_plan(out, recipe, encoder, gallery)
        parts = -(-len(gallery) // recipe.part_images)
        return [part for part in range(parts) if not part_path(out, part).is_dir()]

    missing = run_on_first(ranks, list_missing_parts)
    gallery = open_gallery(recipe.data, _listed_files(out))  # every rank reads the list that the first one wrote
    parts = -(-len(gallery) // recipe.part_images)
    done = len(gallery) - sum(len(_image_numbers(part, recipe, gallery)) for part in missing)
    broken = 0
    with progress("indexing", len(gallery), "images", done=done, silent=not ranks.first) as bar:

        def advance(images: int) -> None:
            bar.advance(images * ranks.world)  # the first rank's bar stands for all ranks

        for part in missing[ranks.rank :: ranks.world]:
            numbers = _image_numbers(part, recipe, gallery)
            content = _encode_part(encoder, gallery, numbers, recipe, width, advance)
            write_part(out, part, content)
            if content.broken:
                broken += len(content.broken)
                bar.note = f"{broken:,} cannot be read"
        rate = bar.rate()
    barrier()
    if ranks.first:
        _finish(recipe, out, gallery, parts, rate)


def _finish(recipe: IndexRecipe, out: Path, gallery: Gallery, parts: int, rate: float) -> None:
    """Join the parts and print what the index holds. `rate`: images a second, 0 if unknown."""
    indexed = len(gallery) - sum(_count_lines(part_path(out, part) / BROKEN) for part in range(parts))
    if not indexed:
        first = json.loads((part_path(out, 0) / BROKEN).read_text().splitlines()[0])
        remove_parts(out)
        raise DataError(
            f"none of the {len(gallery):,} images of {recipe.data} can be read; the first is {first['name']}: {first['reason']}"
        )
    join_parts(out, parts, read_json(out / "parts" / PLAN_FILE))
    speed = f"; {rate:,.1f} images a second, {format_duration(len(gallery) / rate)} for all" if rate else ""
    print(f"{out}: {_describe(Index(out))}{speed}")
    for problem in gallery.problems if isinstance(gallery, TarGallery) else []:
        print(f"{recipe.data} is damaged: {problem}")


def _image_numbers(part: int, recipe: IndexRecipe, gallery: Gallery) -> range:
    """Return the numbers of a part's images."""
    return range(part * recipe.part_images, min((part + 1) * recipe.part_images, len(gallery)))


def _listed_files(out: Path) -> list[str] | None:
    """Return the files of a folder as listed when its index was begun; later files do not belong to the index."""
    path = out / "parts" / LIST_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _check_plan(out: Path, recipe: IndexRecipe, encoder: Encoder, gallery: Gallery) -> None:
    """Write down what the index will hold; an index that was begun already must have the same plan."""
    plan = {
        "checkpoint": encoder.hash,
        "checkpoint_folder": str(encoder.folder.resolve()),
        "training": encoder.training,
        "source": {"kind": gallery.kind, "place": _absolute_place(recipe.data), "fingerprint": gallery.fingerprint},
        "images": len(gallery),
        "batch_size": recipe.batch_size,
        "precision": recipe.precision,
        "part_images": recipe.part_images,
    }
    path = out / "parts" / PLAN_FILE
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        if isinstance(gallery, FileGallery):
            # json.dumps writes ASCII: a file's name need not be UTF-8.
            write_text(path.parent / LIST_FILE, json.dumps(gallery.names))
        write_json(path, plan)
        return
    advice = "give another --out, or remove it to start again"
    old_plan = read_json(path)
    for key in ("checkpoint", "training", "batch_size", "precision", "part_images"):
        old_value = old_plan.get(key, "fp32" if key == "precision" else None)  # older indexes hold no precision
        if old_value != plan[key]:
            raise RecipeError(f"{out} cannot be resumed: {key} is {plan[key]}, it was begun with {old_value}; {advice}")
    if old_plan.get("source") != plan["source"]:
        raise RecipeError(
            f"{out} cannot be resumed: it was begun on {old_plan['source']['place']}, with other images than {recipe.data} "
            f"holds now; {advice}"
        )


def _absolute_place(data: str) -> str:
    return data if "://" in data else str(Path(data).resolve())


def _encode_part(
    encoder: Encoder,
    gallery: Gallery,
    numbers: range,
    recipe: IndexRecipe,
    width: int,
    advance: Callable[[int], None],
) -> Part:
    """Encode the images of a part; call `advance` with the number of images after each batch."""
    vectors, names, readable = [np.zeros((0, width), np.float32)], list[str](), list[int]()
    broken: list[dict[str, Any]] = []
    for batch in gallery.batches(encoder.transform, numbers, recipe.batch_size, recipe.workers):
        if batch.pixels is not None:
            vectors.append(encode(encoder.encode_image, batch.pixels))
            readable += batch.numbers
            names += [gallery.name(number) for number in batch.numbers]
        broken += [
            {"number": number, "name": gallery.name(number), "reason": reason} for number, reason in batch.broken
        ]
        advance(len(batch.numbers) + len(batch.broken))
    captions = [gallery.captions(number)[:CAPTIONS] for number in readable]
    return Part(np.concatenate(vectors), readable, names, captions, broken)


@torch.inference_mode()
def encode(encoder: Callable, inputs: Any) -> np.ndarray:
    """Return what an `encode_image` or `encode_text` gives for the inputs, as (rows, width) float32."""
    return encoder(inputs).float().cpu().numpy()


def _add_inverted_lists(recipe: IndexRecipe, index: Index, device: torch.device) -> None:
    """Add inverted lists to a finished index, unless it has lists of the same recall measured with the same queries."""
    from retrieval.approximate import build_lists, load_faiss, read_lists_info

    old_lists, query_file = read_lists_info(index), ""
    if recipe.queries:
        # Name and content: the same file name may hold other queries by now.
        query_file = f"{Path(recipe.queries).name}, {sha256_of(Path(recipe.queries))[:8]}"
    if old_lists and old_lists.get("target") == recipe.recall and query_file in ("", old_lists["measured_with"]):
        print(f"{index.folder} has its inverted lists already; nothing to do")
        return
    load_faiss()
    rows = np.unique(np.linspace(0, len(index) - 1, min(MEASURED_IMAGES, len(index))).astype(np.int64))
    if recipe.queries:
        texts, kind = Path(recipe.queries).read_text(encoding="utf-8").splitlines(), query_file
    else:
        texts = [image["captions"][0] for image in index.images(rows) if image["captions"]]
        kind = "captions of its images"
    if texts:
        encoder = load_encoder(recipe.checkpoint, device)
        starts = range(0, len(texts), QUERIES_AT_ONCE)
        queries = np.concatenate(
            [encode(encoder.encode_text, texts[start : start + QUERIES_AT_ONCE]) for start in starts]
        )
    else:
        queries = np.asarray(index.vectors[rows])
        kind = "its own images; words may find less, give some with --queries"
    print(build_lists(index, queries, kind, recipe.recall))


def _describe(index: Index) -> str:
    about = index.about
    broken = f", {about['broken']:,} cannot be read ({index.folder / BROKEN} says why)" if about["broken"] else ""
    return f"{len(index):,} images by checkpoint {about['checkpoint']} ({about['training']}){broken}"


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
