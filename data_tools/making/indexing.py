"""WebDataset tars made elsewhere (img2dataset's, open_clip's) -> a shard folder as good as our own, without copying a byte.

Beside each tar comes `<tar>.index.parquet`, and `manifest.json` last. (img2dataset's own `<tar>.parquet` is another thing, and stays.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.making.processes import run_parallel
from data_tools.making.writer import DROPPED_NAME, write_lines
from data_tools.shards.captions import parse_captions, parse_image_id
from data_tools.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    ShardIndex,
    hash_image_id,
    read_index,
    read_index_note,
    read_manifest,
    write_index,
    write_manifest,
)
from data_tools.shards.tars import Group, group_members, walk_tar
from data_tools.sources.items import StoredBytes, clean_caption, safe_key
from data_tools.sources.webdataset import check_stats, find_tars, stats_path
from runtime.errors import DataError
from runtime.files import sha256_of
from runtime.progress import progress

BROKEN, NO_TEXT, NO_IMAGE = "broken places in tars", "images without a caption", "captions without an image"
NOT_PLAIN, UNREADABLE = "links, devices and odd paths", "unreadable images"


@dataclass(frozen=True, slots=True)
class _Task:
    tar: Path
    prefixed: bool
    """Keys begin with the tar's name, because several tars have the same ones."""

    @property
    def index(self) -> Path:
        return self.tar.with_suffix(".index.parquet")


@dataclass(frozen=True, slots=True)
class _Indexed:
    shard: Shard
    lines: list[dict[str, Any]]
    renamed: int
    named: bool
    """An image id is its key: the sample states none."""


def index_folder(folder: Path, workers: int = 0, piece: tuple[int, int] = (0, 1)) -> Manifest | None:
    """Index the tars of a folder; called again it goes on, and takes up tars that are new or have changed.

    Samples without a readable image header or a caption are left out and listed in `dropped.jsonl`. `piece` (number, of how many)
    takes every so manieth tar only; None where other pieces have to finish yet. `DataError`: no tars, or shards of our own.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    if (folder / MANIFEST_NAME).is_file() and not read_manifest(folder, check=False).source.get("indexed"):
        raise DataError(
            f"{folder} was made by `ligature shard` and has its index; `ligature inspect --full` verifies it"
        )
    tars = find_tars(folder)
    prefixed = any(_note(_Task(tar, False)).get("prefixed") for tar in tars)
    while True:
        tasks = [_Task(tar, prefixed) for tar in tars]
        found = _index(tasks, workers, piece)
        if found is None:
            return None
        if prefixed or not _keys_meet(tasks):
            return _finish(folder, found, prefixed)
        prefixed = True  # once more, with keys that differ from tar to tar


def _index(tasks: Sequence[_Task], workers: int, piece: tuple[int, int]) -> list[_Indexed] | None:
    done = {task: found for task in tasks if (found := _finished(task))}
    mine = [task for number, task in enumerate(tasks) if number % piece[1] == piece[0]]
    todo = [task for task in mine if task not in done]
    with progress("indexing", len(mine), "tars", done=len(mine) - len(todo)) as bar:
        for task, found in run_parallel(_index_tar, todo, workers):
            done[task] = found
            bar.advance()
    for task in tasks:
        if task not in done and (late := _finished(task)):
            done[task] = late
    return [done[task] for task in tasks] if len(done) == len(tasks) else None


def _index_tar(task: _Task) -> _Indexed:
    contents = walk_tar(task.tar)
    lines = [_line(task.tar.name, problem, BROKEN) for problem in contents.problems]
    lines += [_line(f"{task.tar.name}/{name}", "not a plain file: never read", NOT_PLAIN) for name in contents.skipped]
    rows: list[tuple] = []
    image_ids: list[str] = []
    renamed, named, taken, samples = 0, False, set[str](), 0
    for group in group_members(contents.members):
        samples += group.image is not None
        name = f"{task.tar.name}/{group.name}"
        row, image_id, why = _row(task.tar, group)
        if row is None:
            lines.append(_line(name, *why))
            continue
        # The last part of the path, as webdataset's key would have it were it not for dots.
        key, changed = safe_key(f"{PurePosixPath(group.name).name}.jpg")
        key = f"{task.tar.stem}_{key}" if task.prefixed else key
        if key in taken:
            key, changed = _free(key, taken), True
        taken.add(key)
        renamed += changed or task.prefixed
        rows.append((key, *row))
        image_ids.append(image_id or key)
        named = named or not image_id
    if stats_path(task.tar).is_file():
        lines += [_line(task.tar.name, problem, BROKEN) for problem in check_stats(task.tar, samples)]
    note = {
        "bytes": task.tar.stat().st_size, "sha256": sha256_of(task.tar), "lines": lines, "renamed": renamed,
        "prefixed": task.prefixed, "named": named,
    }  # fmt: skip
    write_index(task.index, ShardIndex.from_rows(rows, image_ids), note)
    return _as_indexed(task, len(rows), sum(row[-1] for row in rows), note)


def _row(tar: Path, group: Group) -> tuple[tuple | None, str | None, tuple[str, str]]:
    """A sample's row of the index without its key, its image id; or None, with why it is left out."""
    from data_tools.pixels.decode import MAX_BYTES, read_size

    path = str(tar)
    if group.image is None:
        return None, None, ("no image", NO_IMAGE)
    if large := [text.size for text in group.texts.values() if text.size > MAX_BYTES]:
        return None, None, (f"a text of {large[0]:,} bytes", NO_TEXT)
    texts = {kind: StoredBytes(path, text.offset, text.size)() for kind, text in group.texts.items()}
    image_id = parse_image_id(texts["json"]) if "json" in texts else None
    kind, captions = _choose_text(texts)
    if not captions:
        return None, None, ("no .txt with words, nor a list `captions` in .json", NO_TEXT)
    try:
        width, height = read_size(StoredBytes(path, group.image.offset, group.image.size)())
    except ValueError as error:
        return None, None, (str(error), UNREADABLE)
    text = group.texts[kind]
    row = (
        group.image.offset,
        group.image.size,
        group.image_format,
        text.offset,
        text.size,
        kind,
        width,
        height,
        len(captions),
    )
    return row, image_id, ("", "")


def _choose_text(texts: dict[str, bytes]) -> tuple[str, list[str]]:
    """Return the member that a reader of the index will take captions from, and these captions: none where neither is fit."""
    for kind in ("json", "txt"):
        if kind in texts:
            with suppress(DataError):
                captions = parse_captions(texts[kind], kind)
                if all(map(clean_caption, captions)):
                    return kind, captions
    return "", []


def _line(source: str, reason: str, counted_as: str) -> dict[str, Any]:
    return {"key": None, "source": source, "reason": reason, "counted_as": counted_as}


def _free(key: str, taken: set[str]) -> str:
    number = 2
    while f"{key}_{number}" in taken:
        number += 1
    return f"{key}_{number}"


def _note(task: _Task) -> dict[str, Any]:
    try:
        return read_index_note(task.index) if task.index.is_file() else {}
    except DataError:
        return {}  # cut by a crash of the machine: made again


def _finished(task: _Task) -> _Indexed | None:
    """What an earlier run found in this tar; None where it has not, or the tar has changed since."""
    note = _note(task)
    if task.tar.stat().st_size != note.get("bytes") or note.get("prefixed") != task.prefixed:
        return None
    rows = read_index(task.index)
    return _as_indexed(task, len(rows), int(rows.captions.sum()), note)


def _as_indexed(task: _Task, samples: int, captions: int, note: dict[str, Any]) -> _Indexed:
    shard = Shard(
        task.tar.name, samples, captions, note["bytes"], note["sha256"], task.index.name, sha256_of(task.index)
    )
    return _Indexed(shard, note["lines"], note["renamed"], note.get("named", False))


def _keys_meet(tasks: Sequence[_Task]) -> bool:
    """Whether two tars have the same key. Holds 8 bytes a sample."""
    import numpy as np

    numbers = [np.fromiter(map(hash_image_id, read_index(task.index).key), np.int64) for task in tasks]
    every = np.concatenate(numbers)
    return len(np.unique(every)) < len(every)


def _finish(folder: Path, found: list[_Indexed], prefixed: bool) -> Manifest:
    shards = tuple(each.shard for each in found if each.shard.samples)
    lines = [line for each in found for line in each.lines]
    write_lines(folder / DROPPED_NAME, lines)
    if not shards:
        raise DataError(f"no sample of {folder} has an image and a caption; see {folder / DROPPED_NAME}")
    source = {
        "indexed": True, "kind": "webdataset", "keys_made_safe": sum(each.renamed for each in found),
        "keys_begin_with_tar": prefixed,
    }  # fmt: skip
    dropped = dict(Counter(line["counted_as"] for line in lines))
    manifest = Manifest(folder, shards, source, dropped, any(each.named for each in found))
    write_manifest(manifest)
    return manifest
