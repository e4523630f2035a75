"""Captioned images -> a shard folder: several processes, resumable, broken images set aside and listed.

Shard k is a function of items [k * shard_samples, (k + 1) * shard_samples) and the encoding alone, so a run that was
killed goes on at the first shard that is not complete and ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import tarfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    ShardIndex,
    read_index,
    read_index_note,
    read_manifest,
    write_index,
    write_manifest,
)
from data_tools.sources import CaptionedImage, collect, safe_key
from runtime.errors import DataError, LigatureError, RecipeError
from runtime.files import read_json, replaced_file, sha256_of, write_json, write_text
from runtime.progress import progress

PLAN_NAME, QUARANTINE_NAME = "plan.json", "quarantine.jsonl"
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's formats whose bytes are kept (an MPO is a JPEG with more pictures after it); others become JPEG."""


@dataclass
class ShardOptions:
    """What `ligature shard` is asked: a source, a cut of it, and how to write it."""

    annotation: Path
    """Caption file: Flickr's token file, COCO captions json or Karpathy json; gzipped or not."""
    out: Path
    """Shard folder to write; the same command again goes on with it."""
    images: Path | None = None
    """Folder or uncompressed tar with the images; none: the caption file's own folder."""
    kind: str = "auto"
    """flickr, coco or karpathy; auto looks into the file."""
    split: str | None = None
    """Split of a Karpathy json."""
    names: Path | None = None
    """File with one image name a line: only these are taken."""
    restval: bool = False
    """Let Karpathy's `restval` images join the train split."""
    start: int = 0
    """First image to take, in the source's order after split and names."""
    count: int | None = None
    """How many images to take from `start`; none: all. Cuts that do not overlap never share an image."""
    allow_missing: bool = False
    """Leave out images that are absent, counted, instead of stopping."""
    shard_samples: int = 1000
    """Images a shard."""
    resize_shorter: int | None = None
    """Pixels that the shorter side is reduced to, re-encoded as JPEG; smaller images, and none: bytes are kept."""
    quality: int = 90
    """JPEG quality, where an image is re-encoded."""
    workers: int = 0
    """Writing processes; 0: one a core."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the images cannot be decoded."""

    def __post_init__(self) -> None:
        if self.start < 0 or (self.count is not None and self.count < 1):
            raise RecipeError(f"start {self.start}, count {self.count}: start is 0 or more and count 1 or more")
        _check_numbers(self.shard_samples, self.resize_shorter, self.quality, self.workers, self.max_bad_share)


def _check_numbers(
    shard_samples: int, resize_shorter: int | None, quality: int, workers: int, max_bad_share: float
) -> None:
    for name, value, low, high in [
        ("shard_samples", shard_samples, 1, None),
        ("resize_shorter", 1 if resize_shorter is None else resize_shorter, 1, None),
        ("quality", quality, 1, 100),
        ("workers", workers, 0, None),
        ("max_bad_share", max_bad_share, 0, 1),
    ]:
        if value < low or (high is not None and value > high):
            bounds = f"{low} or more" if high is None else f"{low} to {high}"
            raise RecipeError(f"{name} is {value}; it must be {bounds}")


def shard(options: ShardOptions) -> Manifest:
    """Read the source, write its shards, print one line of what came of it (stdout)."""
    images = options.images or options.annotation.parent
    found = collect(
        options.annotation, images, kind=options.kind, split=options.split, names=options.names,
        restval=options.restval, start=options.start, count=options.count, allow_missing=options.allow_missing,
    )  # fmt: skip
    # Names without folders: the manifest must not depend on where the source lies.
    source = {
        "annotation": options.annotation.name, "images": images.resolve().name, "kind": found.kind,
        "split": options.split, "names": options.names.name if options.names else None, "restval": options.restval,
        "start": options.start, "count": options.count, "keys_made_safe": found.renamed,
    }  # fmt: skip
    manifest = write_shards(
        found.items, options.out, shard_samples=options.shard_samples, resize_shorter=options.resize_shorter,
        quality=options.quality, workers=options.workers, max_bad_share=options.max_bad_share, source=source,
        dropped=found.dropped,
        quarantine=[{"key": None, "source": name, "reason": "absent"} for name in found.absent],
    )  # fmt: skip
    print(summary(manifest))
    return manifest


def summary(manifest: Manifest) -> str:
    """One line: images, captions, shards, what was dropped and why."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest.dropped.items()) or "nothing"
    renamed = manifest.source.get("keys_made_safe", 0)
    return (
        f"{manifest.folder}: {manifest.samples:,} images, {manifest.captions:,} captions, "
        f"{len(manifest.shards):,} shards, {manifest.bytes / 1e6:,.1f} MB; dropped: {dropped}"
        + (f"; {renamed:,} keys made safe (dots, slashes and blanks became _)" if renamed else "")
    )


# -- One image --------------------------------------------------------------------------------------------------------


def encode(raw: bytes, resize_shorter: int | None, quality: int) -> tuple[bytes, str, int, int]:
    """Decode an image whole and give the bytes to store: `(bytes, extension, width, height)`.

    The bytes are kept unless the shorter side is above `resize_shorter` or the format is not JPEG, PNG or WebP; those
    become RGB JPEG, upright. Raises ValueError with what is wrong with it: broken, of no known format, too many pixels.
    """
    from PIL import Image

    from data_tools.images import SOURCE_FORMATS, open_image, upright

    stored = open_image(raw, SOURCE_FORMATS)
    scale = min(1.0, (resize_shorter or math.inf) / min(stored.size))
    if stored.format in EXTENSIONS and scale == 1:
        return raw, EXTENSIONS[stored.format], *stored.size
    image = upright(stored)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), "jpg", *image.size


# -- One shard --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    """One shard to write; sent to a process."""

    folder: Path
    number: int
    items: Sequence[CaptionedImage]
    resize_shorter: int | None
    quality: int

    @property
    def stem(self) -> str:
        return f"shard-{self.number:06d}"


@dataclass(frozen=True, slots=True)
class _Written:
    shard: Shard
    quarantine: list[dict[str, Any]]


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member with nothing of this machine or moment in its header; returns the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _write_shard(task: _Task) -> _Written:
    rows: list[tuple] = []
    image_ids: list[str] = []
    quarantine: list[dict[str, Any]] = []
    path = task.folder / f"{task.stem}.tar"
    with replaced_file(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
            for item in task.items:
                try:
                    data, extension, width, height = encode(item.read(), task.resize_shorter, task.quality)
                except MemoryError:
                    raise
                except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes
                    quarantine.append({"key": item.key, "source": item.source, "reason": _reason(error)})
                    continue
                words = {"captions": item.captions, "image_id": item.image_id, "source": item.source}
                text = json.dumps(words, ensure_ascii=False).encode()
                image_offset = _add_member(tar, f"{item.key}.{extension}", data)
                text_offset = _add_member(tar, f"{item.key}.json", text)
                rows.append((item.key, image_offset, len(data), extension, text_offset, len(text), "json",
                             width, height, len(item.captions)))  # fmt: skip
                image_ids.append(item.image_id)
        size, digest = temporary.stat().st_size, sha256_of(temporary)
    # The index follows its tar and carries what else is known of the shard: it is the mark of a complete one.
    note = {"bytes": size, "sha256": digest, "quarantine": quarantine}
    write_index(path.with_suffix(".parquet"), ShardIndex.from_rows(rows, image_ids), note)
    return _as_written(task, len(rows), sum(row[-1] for row in rows), note)


def _reason(error: Exception) -> str:
    """An error in one line, without paths and addresses: the same on every run."""
    text = getattr(error, "strerror", None) or re.sub(r" <\S+ object at 0x[0-9a-f]+>", "", str(error))
    return " ".join(f"{type(error).__name__}: {text}".split())


def _as_written(task: _Task, samples: int, captions: int, note: dict[str, Any]) -> _Written:
    index = task.folder / f"{task.stem}.parquet"
    entry = Shard(f"{task.stem}.tar", samples, captions, note["bytes"], note["sha256"], index.name, sha256_of(index))
    return _Written(entry, note["quarantine"])


def _finished(task: _Task) -> _Written | None:
    """What an earlier run wrote of this shard; None where its tar or index is absent or cut."""
    index, tar = task.folder / f"{task.stem}.parquet", task.folder / f"{task.stem}.tar"
    if not (index.is_file() and tar.is_file()):
        return None
    try:
        rows, note = read_index(index), read_index_note(index)
    except DataError:
        return None  # cut by a crash of the machine: written again
    if tar.stat().st_size != note.get("bytes"):
        return None
    return _as_written(task, len(rows), int(rows.captions.sum()), note)


# -- The folder -------------------------------------------------------------------------------------------------------


def write_shards(
    items: Iterable[CaptionedImage],
    out: str | Path,
    *,
    shard_samples: int = 1000,
    resize_shorter: int | None = None,
    quality: int = 90,
    workers: int = 0,
    max_bad_share: float = 0.01,
    source: Mapping[str, Any] | None = None,
    dropped: Mapping[str, int] | None = None,
    quarantine: Sequence[Mapping[str, Any]] = (),
) -> Manifest:
    """Write a shard folder; called again with the same items and encoding it goes on, or finds it complete.

    `workers` processes write one shard each at a time (0: one a core; 1: this process alone); with more than one, the
    caller's main module must be importable (`if __name__ == "__main__":`). `source` describes the samples; `dropped`
    and `quarantine` are what the source left out already. An image that does not decode is left out, counted, and
    listed in `quarantine.jsonl`. `DataError`: too many of those, or `out` holds something else. `LigatureError`: no
    space left.
    """
    _check_numbers(shard_samples, resize_shorter, quality, workers, max_bad_share)
    items, out = list(items), Path(out)
    _check_keys(items)
    encoding = {"shard_samples": shard_samples, "resize_shorter": resize_shorter, "quality": quality}
    plan = json.loads(json.dumps({**(source or {}), **encoding, "items_sha256": _digest(items)}))
    if complete := _open_folder(out, plan):
        return complete

    slices = range(0, len(items), shard_samples)
    tasks = [_Task(out, k, items[at : at + shard_samples], resize_shorter, quality) for k, at in enumerate(slices)]
    written = {task.number: found for task in tasks if (found := _finished(task))}
    todo = [task for task in tasks if task.number not in written]
    bad = sum(len(found.quarantine) for found in written.values())
    already = sum(len(task.items) for task in tasks) - sum(len(task.items) for task in todo)
    with progress("sharding", len(items), "images", done=already) as bar:
        for task, found in _run(todo, workers):
            written[task.number] = found
            bad += len(found.quarantine)
            bar.advance(len(task.items), f"{bad:,} unreadable" if bad else None)
            if bad > max_bad_share * len(items):
                break
    in_order = [written[number] for number in sorted(written)]
    listed = [*quarantine, *(line for found in in_order for line in found.quarantine)]
    if listed:
        write_text(out / QUARANTINE_NAME, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in listed))
    if bad > max_bad_share * len(items):
        first = next(line for found in in_order for line in found.quarantine)
        raise DataError(
            f"{bad:,} of {len(items):,} images cannot be decoded, more than the share {max_bad_share:g} allowed; "
            f"the first: {first['source']} ({first['reason']}); see {out / QUARANTINE_NAME}, "
            "mend them or raise --max_bad_share"
        )
    return _finish(out, in_order, plan, {**(dropped or {}), **({"unreadable images": bad} if bad else {})})


def _check_keys(items: list[CaptionedImage]) -> None:
    if not items:
        raise DataError("no images to write")
    seen = set()
    for item in items:
        if not item.key or safe_key(item.key) != (item.key, False):
            raise DataError(f"the key {item.key!r} of {item.source} is empty or has a dot, slash or blank")
        if item.key in seen:
            raise DataError(f"the key {item.key!r} of {item.source} comes twice; keys are unique in a shard folder")
        texts = item.captions if isinstance(item.captions, (list, tuple)) else []  # a string is no list of letters
        if not texts or not all(isinstance(caption, str) and caption for caption in texts):
            raise DataError(f"{item.source} has no list of captions, or one that is empty or no text")
        seen.add(item.key)


def _digest(items: list[CaptionedImage]) -> str:
    digest = hashlib.sha256()
    for item in items:
        line = [item.key, item.captions, item.image_id, item.source, item.size]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


def _open_folder(out: Path, plan: dict[str, Any]) -> Manifest | None:
    """Make the folder ready for this plan; gives the manifest if it is complete, refuses a folder of another plan."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in out.iterdir()}
    except OSError as error:
        raise LigatureError(f"cannot write into {out}: {error.strerror}; choose another --out") from None
    if MANIFEST_NAME in found:
        manifest = read_manifest(out, check=False)
        _same_plan(out, manifest.source, plan)
        if not (damaged := manifest.damaged()):
            (out / PLAN_NAME).unlink(missing_ok=True)
            print(f"{out} is complete already, from the same source with the same options: nothing to do")
            return manifest
        print(f"{out}: {damaged[0]}; writing what is missing")
        write_json(out / PLAN_NAME, plan)
        (out / MANIFEST_NAME).unlink()
    elif PLAN_NAME in found:
        _same_plan(out, read_json(out / PLAN_NAME), plan)
    elif any(not name.endswith(".partial") for name in found):
        raise DataError(f"{out} is not empty and holds no shards of this command; choose another --out")
    for leftover in out.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    if not (out / PLAN_NAME).is_file():
        write_json(out / PLAN_NAME, plan)
    return None


def _same_plan(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if old == new:
        return
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    name = next((name for name in names if name != "items_sha256"), None)
    what = f"{name} was {old.get(name)!r}, now {new.get(name)!r}" if name else "other images or captions"
    raise DataError(f"{out} holds shards of another plan ({what}); choose another --out, or remove that folder first")


def _finish(out: Path, written: list[_Written], plan: dict[str, Any], dropped: dict[str, int]) -> Manifest:
    shards = tuple(found.shard for found in written if found.shard.samples)
    if not shards:
        raise DataError(f"none of the images can be decoded; see {out / QUARANTINE_NAME}")
    manifest = Manifest(out, shards, plan, dropped)
    for found in written:
        if not found.shard.samples:  # every image of it was broken: readers need not know empty shards
            (out / found.shard.name).unlink()
            (out / found.shard.index).unlink()
    write_manifest(manifest)
    (out / PLAN_NAME).unlink()
    return manifest


# -- Several processes ------------------------------------------------------------------------------------------------


def _run(tasks: list[_Task], workers: int) -> Iterator[tuple[_Task, _Written]]:
    """Write shards, giving each as it becomes complete, in any order. Left early, it waits for those under way."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(tasks))
    if workers <= 1:
        yield from ((task, _write_shard(task)) for task in tasks)
        return
    # Spawned, not forked: the caller may have threads (torch, pyarrow), and a fork would copy their locks.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        futures = {pool.submit(_write_shard, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise LigatureError(
            "a writing process died (out of memory?); finished shards are kept: run it again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: a killed parent's pool would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
