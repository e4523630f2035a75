"""Captioned images -> a shard folder: several processes, or several jobs; resumable; what is left out is listed.

Which images a shard holds is a function of the items and the options alone, so a run that was killed goes on at the first shard
that is not complete and ends with the bytes of an uninterrupted one, in however many slices it was written.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.making.plan import DUPLICATES, check_items, cut, digest_of, leave_out_copies, read_excluded
from data_tools.making.processes import run_parallel
from data_tools.making.shard_file import WRITTEN, Encoding, ShardTask, Written, finished_shard, write_shard
from data_tools.shards.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from data_tools.sources import CaptionedImage, Choice, collect
from runtime.errors import DataError, LigatureError, RecipeError
from runtime.files import read_json, write_json, write_text
from runtime.progress import progress

PLAN_NAME, DROPPED_NAME = "plan.json", "dropped.jsonl"
SHARD_SAMPLES = 1000
"""Images a shard, where nothing is said."""
UNREADABLE = "unreadable images"


@dataclass
class ShardOptions:
    """What `ligature shard` is asked: a source, a cut of it, and how to write it."""

    annotation: Path
    """A caption file (COCO, Karpathy, ALBEF or BLIP json, Flickr's tokens, CSV, TSV, parquet), Multi30K's folder, a folder of name.jpg + name.txt, or tars: a folder of them, one, or a pattern such as '{00000..01242}.tar'."""
    out: Path
    """Shard folder to write; the same command again goes on with it."""
    images: Path | None = None
    """Folder or uncompressed tar with the images; none: the caption file's own folder."""
    kind: str = "auto"
    """flickr, coco, karpathy, albef, multi30k, table, folder or webdataset; auto looks into the source."""
    split: str | None = None
    """Split of a Karpathy json or of Multi30K."""
    names: Path | None = None
    """File with one image name a line: only these are taken."""
    restval: bool = False
    """Let Karpathy's `restval` images join the train split."""
    image_column: str | None = None
    """Column of a table that holds image paths; none: one of the usual names."""
    caption_column: str | None = None
    """Column of a table that holds captions; none: one of the usual names."""
    start: int = 0
    """First image to take, in the source's order after split and names."""
    count: int | None = None
    """How many images to take from `start`; none: all. Cuts that do not overlap never share an image."""
    allow_missing: bool = False
    """Leave out images that are absent and what is broken in tars, counted and listed, instead of stopping."""
    shard_samples: int | None = None
    """Images a shard at most; none: 1000, or what `shard_megabytes` holds."""
    shard_megabytes: float | None = None
    """Size a shard stays within, in 10^6 bytes (estimated from 64 images where they are encoded again)."""
    resize_shorter: int | None = None
    """Pixels that the shorter side is reduced to, re-encoded; smaller images, and none: bytes are kept."""
    reencode: str | None = None
    """jpg or webp: every image is encoded again; none: only what is resized or of a foreign format, as JPEG."""
    quality: int = 90
    """Quality of JPEG or WebP, where an image is encoded."""
    duplicates: str = "keep"
    """keep; drop_exact: leave out files that came before; drop_near: and images that look like an earlier one."""
    exclude: list[Path] = field(default_factory=list)
    """Another dataset, whose images and their near-duplicates are left out: a shard folder, a folder of images or tars, a tar. May be given several times."""
    slice: str | None = None
    """I/N, from 0/N to N-1/N: do this part only, as one task of a job array; the last to finish completes the folder."""
    workers: int = 0
    """Writing processes; 0: one a core."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the images cannot be decoded."""

    def __post_init__(self) -> None:
        if self.start < 0 or (self.count is not None and self.count < 1):
            raise RecipeError(f"start {self.start}, count {self.count}: start is 0 or more and count 1 or more")
        _check(**self.writing())

    def writing(self) -> dict[str, Any]:
        """What `write_shards` is to be told."""
        size = None if self.shard_megabytes is None else round(self.shard_megabytes * 1e6)
        samples = SHARD_SAMPLES if self.shard_samples is None and size is None else self.shard_samples
        return {
            "shard_samples": samples, "shard_bytes": size, "resize_shorter": self.resize_shorter,
            "reencode": self.reencode, "quality": self.quality, "duplicates": self.duplicates,
            "exclude": self.exclude, "piece": read_slice(self.slice), "workers": self.workers,
            "max_bad_share": self.max_bad_share,
        }  # fmt: skip


def read_slice(text: str | None) -> tuple[int, int]:
    """`3/8` -> (3, 8); none -> (0, 1), the whole."""
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise RecipeError(f"slice is {text!r}; it must be I/N, from 0/N to N-1/N (--slice $SLURM_ARRAY_TASK_ID/8)")
    return int(match[1]), int(match[2])


def _check(*, reencode: str | None, duplicates: str, **numbers: Any) -> None:
    for name, value, allowed in [("duplicates", duplicates, DUPLICATES), ("reencode", reencode, (None, *WRITTEN))]:
        if value not in allowed:
            raise RecipeError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    for name, low, high in [
        ("shard_samples", 1, None), ("shard_bytes", 1, None), ("resize_shorter", 1, None),
        ("quality", 1, 100), ("workers", 0, None), ("max_bad_share", 0, 1),
    ]:  # fmt: skip
        value = numbers[name]
        if value is not None and (value < low or (high is not None and value > high)):
            bounds = f"{low} or more" if high is None else f"{low} to {high}"
            raise RecipeError(f"{name} is {value}; it must be {bounds}")


def shard(options: ShardOptions) -> Manifest | None:
    """Read the source, write its shards, print what came of it (stdout). None: other slices have to finish yet."""
    choice = Choice(options.split, options.restval, options.image_column, options.caption_column, options.workers)
    found = collect(
        options.annotation, options.images, kind=options.kind, choice=choice, names=options.names,
        start=options.start, count=options.count, allow_missing=options.allow_missing,
    )  # fmt: skip
    # Names without folders: the manifest must not depend on where the source lies.
    images = (options.images or options.annotation.parent).resolve().name
    source = {
        "annotation": options.annotation.name, "images": images, "kind": found.kind, "split": options.split,
        "names": options.names.name if options.names else None, "restval": options.restval, "start": options.start,
        "count": options.count, "keys_made_safe": found.renamed,
    }  # fmt: skip
    manifest = write_shards(
        found.items, options.out, source=source, dropped=found.dropped, listed=found.listed,
        ids_are_names=found.ids_are_names, **options.writing(),
    )  # fmt: skip
    if manifest is None:
        print(f"slice {options.slice} of {options.out} is done; the slice that finishes last completes the folder")
    else:
        print(summary(manifest))
    return manifest


def summary(manifest: Manifest) -> str:
    """One line: images, captions, shards; then a table of what was dropped and why, with the first example."""
    renamed = manifest.source.get("keys_made_safe", 0)
    lines = [
        f"{manifest.folder}: {manifest.samples:,} images, {manifest.captions:,} captions, "
        f"{len(manifest.shards):,} shards, {manifest.bytes / 1e6:,.1f} MB; "
        + (f"dropped, listed in {DROPPED_NAME}:" if manifest.dropped else "dropped: nothing")
    ]
    examples = _first_dropped(manifest.folder / DROPPED_NAME)
    wide = max([0, *map(len, manifest.dropped)])
    for reason, count in manifest.dropped.items():
        lines.append(f"  {count:>9,}  {reason:{wide}}  {examples.get(reason, '')}".rstrip())
    if renamed:
        lines.append(
            f"  {renamed:,} keys made safe (a dot, slash or blank became _; a name in several folders its whole path)"
        )
    return "\n".join(lines)


def _first_dropped(path: Path) -> dict[str, str]:
    """The first example of each reason, as `source (why)`."""
    found: dict[str, str] = {}
    with suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        for line in map(json.loads, file):
            why = f"copy of {line['copy_of']}" if "copy_of" in line else line["reason"]
            found.setdefault(line["counted_as"], f"first: {line['source']} ({why})")
    return found


# -- The folder -------------------------------------------------------------------------------------------------------


def write_shards(
    items: Iterable[CaptionedImage],
    out: str | Path,
    *,
    shard_samples: int | None = SHARD_SAMPLES,
    shard_bytes: int | None = None,
    resize_shorter: int | None = None,
    reencode: str | None = None,
    quality: int = 90,
    duplicates: str = "keep",
    exclude: Sequence[Path] = (),
    piece: tuple[int, int] = (0, 1),
    workers: int = 0,
    max_bad_share: float = 0.01,
    source: Mapping[str, Any] | None = None,
    dropped: Mapping[str, int] | None = None,
    listed: Sequence[dict[str, Any]] = (),
    ids_are_names: bool = False,
) -> Manifest | None:
    """Write a shard folder; called again with the same items and options it goes on, or finds it complete.

    `workers` processes write one shard each at a time (0: one a core; 1: this process alone); with more than one, the
    caller's main module must be importable (`if __name__ == "__main__":`). `piece` (number, of how many) writes every so
    manieth shard only, beside other processes on any machine that sees the folder; None where those have to finish yet.
    `source` describes the samples; `dropped` and `listed` are what the source left out already; `ids_are_names`: image
    ids mean nothing outside this folder. An image that does not
    decode is left out, counted, and listed in `dropped.jsonl`. `DataError`: too many of those, or `out` holds something
    else. `LigatureError`: no space left. `Interrupted`: duplicates are sought, and other slices have not looked yet.
    """
    options: dict[str, Any] = {
        "shard_samples": shard_samples, "shard_bytes": shard_bytes, "resize_shorter": resize_shorter,
        "reencode": reencode, "quality": quality, "duplicates": duplicates,
    }  # fmt: skip
    _check(**options, workers=workers, max_bad_share=max_bad_share)
    items, out, encoding = list(items), Path(out), Encoding(resize_shorter, reencode, quality)
    check_items(items)
    excluded = read_excluded(exclude)
    options["excluded"] = {path.resolve().name: excluded.counts[path] for path in exclude}
    plan = json.loads(json.dumps({**(source or {}), **options, "items_sha256": digest_of(items)}))
    if complete := _open_folder(out, plan, sliced=piece[1] > 1):
        return complete

    kept, copies = leave_out_copies(items, out, duplicates, excluded, workers, piece)
    ranges = cut(kept, shard_samples, shard_bytes, encoding)
    tasks = [ShardTask(out, k, kept[part.start : part.stop], encoding) for k, part in enumerate(ranges)]
    mine = [task for task in tasks if task.number % piece[1] == piece[0]]
    for task in mine:
        for leftover in out.glob(f".{task.tar.stem}.*.partial"):
            leftover.unlink(missing_ok=True)
    written = {task.number: found for task in mine if (found := finished_shard(task))}
    todo = [task for task in mine if task.number not in written]
    count, left = (sum(len(task.items) for task in part) for part in (mine, todo))
    bad = sum(len(found.unreadable) for found in written.values())
    with progress("sharding", count, "images", done=count - left) as bar:
        for task, found in run_parallel(write_shard, todo, workers):
            written[task.number] = found
            bad += len(found.unreadable)
            bar.advance(len(task.items), f"{bad:,} unreadable" if bad else None)
            if bad > max_bad_share * count:
                break
    _refuse_too_many(out, [written[number] for number in sorted(written)], count, max_bad_share)
    if piece[1] > 1:
        names = {path.name for path in out.iterdir()}
        if not all(task.tar.name in names and task.index.name in names for task in tasks):
            return None
        others = {task.number: found for task in tasks if (found := written.get(task.number) or finished_shard(task))}
        if len(others) < len(tasks):
            return None
        written = others
    in_order = [written[number] for number in sorted(written)]
    _refuse_too_many(out, in_order, len(kept), max_bad_share)
    try:
        return _finish(out, in_order, plan, dropped or {}, [*listed, *copies], ids_are_names)
    except LigatureError:
        if not (out / MANIFEST_NAME).is_file():
            raise
        # Another slice finished at the same moment, the same bytes, and swept away what we were writing.
        return read_manifest(out)


def _refuse_too_many(out: Path, written: list[Written], count: int, max_bad_share: float) -> None:
    """Raise where more than the allowed share is unreadable; those found so far are listed."""
    lines = [line for found in written for line in found.unreadable]
    if len(lines) <= max_bad_share * count:
        return
    write_lines(out / DROPPED_NAME, [{**line, "counted_as": UNREADABLE} for line in lines])
    raise DataError(
        f"{len(lines):,} of {count:,} images cannot be decoded, more than the share {max_bad_share:g} allowed; "
        f"the first: {lines[0]['source']} ({lines[0]['reason']}); see {out / DROPPED_NAME}, "
        "mend them or raise --max_bad_share"
    )


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """The report of what was dropped: one JSON object a line."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _open_folder(out: Path, plan: dict[str, Any], sliced: bool) -> Manifest | None:
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
            _remove_traces(out)
            print(f"{out} is complete already, from the same source with the same options: nothing to do")
            return manifest
        print(f"{out}: {damaged[0]}; writing what is missing")
        write_json(out / PLAN_NAME, plan)
        (out / MANIFEST_NAME).unlink(missing_ok=True)
    elif PLAN_NAME in found:
        _same_plan(out, read_json(out / PLAN_NAME), plan)
    elif any(not name.endswith(".partial") for name in found):
        raise DataError(f"{out} is not empty and holds no shards of this command; choose another --out")
    if not sliced:  # other slices may be writing theirs
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


def _finish(
    out: Path,
    written: list[Written],
    plan: dict[str, Any],
    dropped: Mapping[str, int],
    lines: list[dict[str, Any]],
    ids_are_names: bool,
) -> Manifest:
    """Report, manifest, and no trace of the work: in this order, so that a kill between any two leaves what can be finished."""
    lines += [{**line, "counted_as": UNREADABLE} for found in written for line in found.unreadable]
    totals = Counter(dropped)
    totals.update(line["counted_as"] for line in lines if line["counted_as"] not in dropped)
    shards = tuple(found.shard for found in written if found.shard.samples)
    if lines:
        write_lines(out / DROPPED_NAME, lines)
    if not shards:
        raise DataError(f"none of the images can be decoded; see {out / DROPPED_NAME}")
    manifest = Manifest(out, shards, plan, dict(totals), ids_are_names)
    for found in written:
        if not found.shard.samples:  # every image of it was broken: readers need not know empty shards
            (out / found.shard.name).unlink(missing_ok=True)
            (out / found.shard.index).unlink(missing_ok=True)
    write_manifest(manifest)
    _remove_traces(out)
    return manifest


def _remove_traces(out: Path) -> None:
    """What only an unfinished folder needs: the plan, the fingerprints of its images, and what killed processes left."""
    (out / PLAN_NAME).unlink(missing_ok=True)
    for pattern in (".*.npy", ".*.partial"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)
