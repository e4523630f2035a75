"""Turn WebDataset tars made elsewhere (img2dataset's, open_clip's) into a shard folder, without copying a byte.

Each tar gets `<tar>.index.parquet` beside it, and `manifest.json` comes last. img2dataset's own `<tar>.parquet` is another file,
and is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.making.writer import DROPPED_NAME, write_lines
from data_tools.processes import run_parallel
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
"""Reasons under which the report counts what is left out."""


@dataclass(frozen=True, slots=True)
class _Task:
    """One tar to index."""

    tar: Path
    prefixed: bool
    """Whether keys begin with the tar's name, because several tars have the same keys."""

    @property
    def index(self) -> Path:
        return self.tar.with_suffix(".index.parquet")


@dataclass(frozen=True, slots=True)
class _Indexed:
    """The result of indexing one tar."""

    shard: Shard
    lines: list[dict[str, Any]]
    """Lines of `dropped.jsonl`."""
    renamed: int
    """Number of keys that were changed."""
    ids_are_names: bool
    """Whether some sample states no image id, so that its key stands for one."""


def index_folder(folder: Path, workers: int = 0, job_slice: tuple[int, int] = (0, 1)) -> Manifest | None:
    """Index the tars of a folder. A second call resumes, and also indexes tars that are new or have changed.

    Samples without a readable image header or a caption are left out, and listed in `dropped.jsonl`.

    Args:
        folder: Folder of the tars.
        workers: Number of processes, see `run_parallel`.
        job_slice: Number of this slice, and number of slices; each indexes its own tars.

    Returns:
        The folder's manifest, or None where other slices have still to finish.

    Raises:
        DataError: The folder holds no tars, no usable sample, or shards that Ligature wrote.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; give a folder of tars")
    if (folder / MANIFEST_NAME).is_file() and not read_manifest(folder, check=False).source.get("indexed"):
        raise DataError(
            f"{folder} was made by `ligature shard` and has its index; `ligature inspect --full` verifies it"
        )
    tars = find_tars(folder)
    # A run that was killed after it had begun to prefix the keys goes on with prefixes.
    prefixed = any(_note(_Task(tar, False)).get("prefixed") for tar in tars)
    while True:
        tasks = [_Task(tar, prefixed) for tar in tars]
        results = _index(tasks, workers, job_slice)
        if results is None:
            return None
        if prefixed or not _share_keys(tasks):
            return _finish(folder, results, prefixed)
        prefixed = True  # index all tars again, with keys that differ from tar to tar


def _index(tasks: Sequence[_Task], workers: int, job_slice: tuple[int, int]) -> list[_Indexed] | None:
    """Index this slice's tars. Return the results of all tars, or None where other slices have still to finish."""
    results = {task: finished for task in tasks if (finished := _finished(task))}
    mine = tasks[job_slice[0] :: job_slice[1]]
    todo = [task for task in mine if task not in results]
    with progress("indexing", len(mine), "tars", done=len(mine) - len(todo)) as bar:
        for task, result in run_parallel(_index_tar, todo, workers):
            results[task] = result
            bar.advance()
    for task in tasks:  # other slices may have finished theirs meanwhile
        if task not in results and (finished := _finished(task)):
            results[task] = finished
    return [results[task] for task in tasks] if len(results) == len(tasks) else None


def _index_tar(task: _Task) -> _Indexed:
    contents = walk_tar(task.tar)
    lines = [_line(task.tar.name, problem, BROKEN) for problem in contents.problems]
    lines += [_line(f"{task.tar.name}/{name}", "not a plain file: never read", NOT_PLAIN) for name in contents.skipped]
    rows: list[tuple] = []
    image_ids: list[str] = []
    renamed, ids_are_names, keys, images = 0, False, set[str](), 0
    for group in group_members(contents.members):
        images += group.image is not None
        name = f"{task.tar.name}/{group.name}"
        row, image_id, (reason, counted_as) = _row(task.tar, group)
        if row is None:
            lines.append(_line(name, reason, counted_as))
            continue
        # The last part of the path, as the webdataset library would take it, but with its dots made safe.
        key, changed = safe_key(f"{PurePosixPath(group.name).name}.jpg")
        key = f"{task.tar.stem}_{key}" if task.prefixed else key
        if key in keys:
            key, changed = _free_key(key, keys), True
        keys.add(key)
        renamed += changed or task.prefixed
        rows.append((key, *row))
        image_ids.append(image_id or key)
        ids_are_names = ids_are_names or not image_id
    if stats_path(task.tar).is_file():
        lines += [_line(task.tar.name, problem, BROKEN) for problem in check_stats(task.tar, images)]
    note = {
        "bytes": task.tar.stat().st_size, "sha256": sha256_of(task.tar), "lines": lines, "renamed": renamed,
        "prefixed": task.prefixed, "named": ids_are_names,
    }  # fmt: skip
    write_index(task.index, ShardIndex.from_rows(rows, image_ids), note)
    return _as_indexed(task, len(rows), sum(row[-1] for row in rows), note)


def _row(tar: Path, group: Group) -> tuple[tuple | None, str | None, tuple[str, str]]:
    """Return a sample's index row without its key, and its image id; or None, None, and why it is left out.

    The reason is a phrase for the report, and what it is counted as.
    """
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
        return None, None, ("no .txt with words, nor `captions` in .json", NO_TEXT)
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
    """Return the format of the member that readers of the index will take captions from, and its captions.

    The captions are an empty list where neither member is fit.
    """
    for kind in ("json", "txt"):
        if kind in texts:
            with suppress(DataError):
                captions = parse_captions(texts[kind], kind)
                if all(map(clean_caption, captions)):
                    return kind, captions
    return "", []


def _line(source: str, reason: str, counted_as: str) -> dict[str, Any]:
    return {"key": None, "source": source, "reason": reason, "counted_as": counted_as}


def _free_key(key: str, keys: set[str]) -> str:
    number = 2
    while f"{key}_{number}" in keys:
        number += 1
    return f"{key}_{number}"


def _note(task: _Task) -> dict[str, Any]:
    try:
        return read_index_note(task.index) if task.index.is_file() else {}
    except DataError:
        return {}  # cut by a crash of the machine; the index is written again


def _finished(task: _Task) -> _Indexed | None:
    """Return what an earlier run found in this tar, or None where there is nothing or the tar has changed since."""
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


def _share_keys(tasks: Sequence[_Task]) -> bool:
    """Return whether a key occurs in several tars. Keys are compared by their hashes, 8 bytes each."""
    import numpy as np

    hashes = np.concatenate([np.fromiter(map(hash_image_id, read_index(task.index).key), np.int64) for task in tasks])
    return len(np.unique(hashes)) < len(hashes)


def _finish(folder: Path, results: list[_Indexed], prefixed: bool) -> Manifest:
    shards = tuple(result.shard for result in results if result.shard.samples)
    lines = [line for result in results for line in result.lines]
    write_lines(folder / DROPPED_NAME, lines)
    if not shards:
        raise DataError(f"no sample of {folder} has an image and a caption; see {folder / DROPPED_NAME}")
    source = {
        "indexed": True, "kind": "webdataset", "keys_made_safe": sum(result.renamed for result in results),
        "keys_begin_with_tar": prefixed,
    }  # fmt: skip
    dropped = dict(Counter(line["counted_as"] for line in lines))
    manifest = Manifest(folder, shards, source, dropped, any(result.ids_are_names for result in results))
    write_manifest(manifest)
    return manifest
