"""Write captioned images as a shard folder, with several processes or several jobs, and list what is left out.

The items and the options alone decide which images a shard holds. A run that was killed therefore resumes at the first
incomplete shard, and ends with the same bytes as an uninterrupted one. The number of slices makes no difference either.
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

from data_tools.making.plan import DUPLICATES, Excluded, check_items, cut, digest_of, leave_out_copies, read_excluded
from data_tools.making.shard_file import WRITTEN, Encoding, ShardTask, Written, finished_shard, write_shard
from data_tools.processes import run_parallel
from data_tools.shards.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from data_tools.sources import CaptionedImage, Choice, collect
from runtime.errors import DataError, LigatureError, RecipeError
from runtime.files import read_json, write_json, write_text
from runtime.progress import progress

PLAN_NAME, DROPPED_NAME = "plan.json", "dropped.jsonl"
"""The plan of an unfinished folder, and the report of images that were left out."""
SHARD_SAMPLES = 1000
"""Default number of images per shard."""
UNREADABLE = "unreadable images"
"""Reason that images which do not decode are counted under."""


@dataclass
class ShardOptions:
    """The options of `ligature shard`: a source, a cut of it, and how to write it."""

    annotation: Path
    """Source of the captions: a caption file (COCO, Karpathy, ALBEF or BLIP json, Flickr's tokens, CSV, TSV, parquet), Multi30K's folder, a folder of name.jpg + name.txt, or tars (a folder of them, one tar, or a pattern such as '{00000..01242}.tar')."""
    out: Path
    """Shard folder to write. The same command resumes an unfinished folder."""
    images: Path | None = None
    """Folder or uncompressed tar with the images. Default: the caption file's own folder."""
    kind: str = "auto"
    """flickr, coco, karpathy, albef, multi30k, table, folder or webdataset. Default: auto, which looks into the source."""
    split: str | None = None
    """Split of a Karpathy json or of Multi30K."""
    names: Path | None = None
    """File with one image name per line. Only these images are taken."""
    restval: bool = False
    """Let Karpathy's `restval` images join the train split."""
    image_column: str | None = None
    """Column of a table that holds image paths. Default: one of the usual names."""
    caption_column: str | None = None
    """Column of a table that holds captions. Default: one of the usual names."""
    start: int = 0
    """Number of the first image to take, in the source's order after split and names."""
    count: int | None = None
    """Number of images to take from `start`. Default: all. Cuts that do not overlap never share an image."""
    allow_missing: bool = False
    """Leave out absent images and broken parts of tars, counted and listed, instead of stopping."""
    shard_samples: int | None = None
    """Maximum number of images in a shard. Default: 1000, or what `shard_megabytes` holds."""
    shard_megabytes: float | None = None
    """Maximum size of a shard in megabytes (10^6 bytes), estimated from 64 images if images are encoded again."""
    resize_shorter: int | None = None
    """Reduce larger images until their shorter side has this many pixels. They are encoded again. Default: no image is resized."""
    reencode: str | None = None
    """jpg or webp: encode every image again. Default: only resized images and foreign formats, as JPEG."""
    quality: int = 90
    """Quality of JPEG or WebP where an image is encoded, 1 to 100."""
    duplicates: str = "keep"
    """keep; drop_exact: leave out files that came before; drop_near: also leave out images that look like an earlier one."""
    exclude: list[Path] = field(default_factory=list)
    """Another dataset: its images and their near-duplicates are left out. A shard folder, a folder of images or tars, or a tar. May be given several times."""
    slice: str | None = None
    """I/N, from 0/N to N-1/N: write only this part, as one task of a job array. The last task to finish completes the folder."""
    workers: int = 0
    """Number of writing processes. Default: 0, one per core."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the images cannot be decoded."""

    def __post_init__(self) -> None:
        if self.start < 0 or (self.count is not None and self.count < 1):
            raise RecipeError(f"start is {self.start}, count is {self.count}; use 0 or more, and 1 or more")
        self.write_options()  # refuses values out of range before anything is read

    def write_options(self) -> WriteOptions:
        """Return the options that `write_shards` takes. Raises RecipeError where one is out of its range."""
        shard_bytes = None if self.shard_megabytes is None else round(self.shard_megabytes * 1e6)
        return WriteOptions(
            SHARD_SAMPLES if self.shard_samples is None and shard_bytes is None else self.shard_samples,
            shard_bytes,
            self.resize_shorter,
            self.reencode,
            self.quality,
            self.duplicates,
            self.exclude,
            read_slice(self.slice),
            self.workers,
            self.max_bad_share,
        )


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How samples are written as shards. Values out of range are a RecipeError."""

    shard_samples: int | None = SHARD_SAMPLES
    """Maximum number of images in a shard; None: no limit."""
    shard_bytes: int | None = None
    """Maximum size of a shard in bytes, estimated; None: no limit."""
    resize_shorter: int | None = None
    reencode: str | None = None
    quality: int = 90
    """These three say what becomes of an image's bytes, see `Encoding`."""
    duplicates: str = "keep"
    """One of DUPLICATES."""
    exclude: Sequence[Path] = ()
    """Datasets that no image may be a copy of."""
    job_slice: tuple[int, int] = (0, 1)
    """Number of this slice, and number of slices: only shards of this number modulo the slices are written."""
    workers: int = 0
    """Processes that write one shard each at a time; 0: one per core; 1: this process alone. With several, the caller's main
    module must be importable (`if __name__ == "__main__":`)."""
    max_bad_share: float = 0.01
    """Share of the images that may fail to decode."""

    def __post_init__(self) -> None:
        for name, allowed in [("duplicates", DUPLICATES), ("reencode", (None, *WRITTEN))]:
            if (value := getattr(self, name)) not in allowed:
                raise RecipeError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
        for name, low, high in [
            ("shard_samples", 1, None), ("shard_bytes", 1, None), ("resize_shorter", 1, None),
            ("quality", 1, 100), ("workers", 0, None), ("max_bad_share", 0, 1),
        ]:  # fmt: skip
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                bounds = f"{low} or more" if high is None else f"{low} to {high}"
                raise RecipeError(f"{name} is {value}; it must be {bounds}")

    @property
    def encoding(self) -> Encoding:
        """What becomes of an image's bytes."""
        return Encoding(self.resize_shorter, self.reencode, self.quality)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a manifest says of the samples' source."""

    description: Mapping[str, Any] = field(default_factory=dict)
    """Free description. It decides, with the options, whether a folder belongs to this command."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Number of captions or images that the source left out, by reason."""
    listed: Sequence[dict[str, Any]] = ()
    """A line of `dropped.jsonl` for each image among them."""
    ids_are_names: bool = False
    """Image ids mean nothing outside this folder."""


def read_slice(text: str | None) -> tuple[int, int]:
    """Parse `3/8` as slice 3 of 8. None is the whole, slice 0 of 1."""
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise RecipeError(f"slice is {text!r}; it must be I/N, from 0/N to N-1/N (--slice $SLURM_ARRAY_TASK_ID/8)")
    return int(match[1]), int(match[2])


def shard(options: ShardOptions) -> Manifest | None:
    """Read the source, write its shards, and print a summary.

    Returns:
        The folder's manifest, or None where other slices have still to finish.
    """
    choice = Choice(options.split, options.restval, options.image_column, options.caption_column, options.workers)
    collected = collect(
        options.annotation, options.images, kind=options.kind, choice=choice, names=options.names,
        start=options.start, count=options.count, allow_missing=options.allow_missing,
    )  # fmt: skip
    # Names without folders: the manifest must not depend on where the source lies.
    images = (options.images or options.annotation.parent).resolve().name
    description = {
        "annotation": options.annotation.name, "images": images, "kind": collected.kind, "split": options.split,
        "names": options.names.name if options.names else None, "restval": options.restval, "start": options.start,
        "count": options.count, "keys_made_safe": collected.renamed,
    }  # fmt: skip
    origin = Origin(description, collected.dropped, collected.listed, collected.ids_are_names)
    manifest = write_shards(collected.items, options.out, options.write_options(), origin)
    if manifest is None:
        print(f"slice {options.slice} of {options.out} is done; the slice that finishes last completes the folder")
    else:
        print(summary(manifest))
    return manifest


def summary(manifest: Manifest) -> str:
    """Return a line with counts of a folder, then a table of what was dropped and why, with the first example of each."""
    renamed = manifest.source.get("keys_made_safe", 0)
    lines = [
        f"{manifest.folder}: {manifest.samples:,} images, {manifest.captions:,} captions, "
        f"{len(manifest.shards):,} shards, {manifest.bytes / 1e6:,.1f} MB; "
        + (f"dropped, listed in {DROPPED_NAME}:" if manifest.dropped else "dropped: nothing")
    ]
    examples = _first_dropped(manifest.folder / DROPPED_NAME)
    width = max([0, *map(len, manifest.dropped)])
    for reason, count in manifest.dropped.items():
        lines.append(f"  {count:>9,}  {reason:{width}}  {examples.get(reason, '')}".rstrip())
    if renamed:
        lines.append(
            f"  {renamed:,} keys made safe (a dot, slash or blank became _; a name in several folders its whole path)"
        )
    return "\n".join(lines)


def _first_dropped(path: Path) -> dict[str, str]:
    """Return the first example of each reason, as `source (why)`."""
    examples: dict[str, str] = {}
    with suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        for line in map(json.loads, file):
            why = f"copy of {line['copy_of']}" if "copy_of" in line else line["reason"]
            examples.setdefault(line["counted_as"], f"first: {line['source']} ({why})")
    return examples


# -- The folder -------------------------------------------------------------------------------------------------------


def write_shards(
    items: Iterable[CaptionedImage],
    out: str | Path,
    options: WriteOptions | None = None,
    origin: Origin | None = None,
) -> Manifest | None:
    """Write a shard folder, or this slice's part of it.

    Called again with the same items and options, it resumes, or finds the folder complete. An image that does not decode is left
    out, counted, and listed in `dropped.jsonl`.

    Args:
        items: The samples, in the order of the shards.
        out: Folder to write. Several slices on several machines may write into it at once.
        options: How to write; None: the defaults.
        origin: What the manifest says of the source; None: nothing.

    Returns:
        The folder's manifest, or None where other slices have still to finish.

    Raises:
        DataError: Too many images do not decode, or `out` holds something else.
        LigatureError: No space is left.
        Interrupted: Duplicates are dropped, and other slices have not fingerprinted their images yet.
    """
    items, out, options, origin = list(items), Path(out), options or WriteOptions(), origin or Origin()
    check_items(items)
    excluded = read_excluded(options.exclude)
    plan = _plan(items, options, excluded, origin)
    slice_number, slices = options.job_slice
    if complete := _open_folder(out, plan, sliced=slices > 1):
        return complete

    kept, copies = leave_out_copies(items, out, options.duplicates, excluded, options.workers, options.job_slice)
    ranges = cut(kept, options.shard_samples, options.shard_bytes, options.encoding)
    tasks = [
        ShardTask(out, number, kept[rows.start : rows.stop], options.encoding) for number, rows in enumerate(ranges)
    ]
    mine = tasks[slice_number::slices]
    written = _write_tasks(out, mine, options)
    if slices > 1:
        names = {path.name for path in out.iterdir()}
        if not all(task.tar.name in names and task.index.name in names for task in tasks):
            return None
        for task in tasks:
            if task.number not in written and (finished := finished_shard(task)):
                written[task.number] = finished
        if len(written) < len(tasks):
            return None
    in_order = [written[number] for number in sorted(written)]
    _refuse_too_many(out, in_order, len(kept), options.max_bad_share)
    try:
        return _finish(out, in_order, plan, origin, [*origin.listed, *copies])
    except LigatureError:
        if not (out / MANIFEST_NAME).is_file():
            raise
        # Another slice finished at the same moment, with the same bytes, and removed the files that this one was writing.
        return read_manifest(out)


def _plan(items: list[CaptionedImage], options: WriteOptions, excluded: Excluded, origin: Origin) -> dict[str, Any]:
    """Return everything that decides the shards' bytes, as reading it back from JSON would return it."""
    plan = {
        **origin.description,
        "shard_samples": options.shard_samples, "shard_bytes": options.shard_bytes,
        "resize_shorter": options.resize_shorter, "reencode": options.reencode, "quality": options.quality,
        "duplicates": options.duplicates,
        "excluded": {path.resolve().name: excluded.counts[path] for path in options.exclude},
        "items_sha256": digest_of(items),
    }  # fmt: skip
    # Tuples become lists, for example, so that an equal plan compares as equal to the one that was stored.
    return json.loads(json.dumps(plan))


def _write_tasks(out: Path, tasks: list[ShardTask], options: WriteOptions) -> dict[int, Written]:
    """Write those of the shards that an earlier run has not, and return all of them by number."""
    for task in tasks:
        for leftover in out.glob(f".{task.tar.stem}.*.partial"):
            leftover.unlink(missing_ok=True)
    written = {task.number: finished for task in tasks if (finished := finished_shard(task))}
    todo = [task for task in tasks if task.number not in written]
    count, remaining = (sum(len(task.items) for task in part) for part in (tasks, todo))
    bad = sum(len(finished.unreadable) for finished in written.values())
    with progress("sharding", count, "images", done=count - remaining) as bar:
        for task, result in run_parallel(write_shard, todo, options.workers):
            written[task.number] = result
            bad += len(result.unreadable)
            bar.advance(len(task.items), f"{bad:,} unreadable" if bad else None)
            # The run ends in an error now, so the remaining shards would be written in vain.
            if bad > options.max_bad_share * count:
                break
    _refuse_too_many(out, [written[number] for number in sorted(written)], count, options.max_bad_share)
    return written


def _refuse_too_many(out: Path, written: list[Written], count: int, max_bad_share: float) -> None:
    """Raise where more than the allowed share is unreadable, after listing those images in `dropped.jsonl`."""
    lines = [line for result in written for line in result.unreadable]
    if len(lines) <= max_bad_share * count:
        return
    write_lines(out / DROPPED_NAME, [{**line, "counted_as": UNREADABLE} for line in lines])
    raise DataError(
        f"{len(lines):,} of {count:,} images cannot be decoded, more than the share {max_bad_share:g} allowed; "
        f"the first: {lines[0]['source']} ({lines[0]['reason']}); see {out / DROPPED_NAME}, "
        "mend them or raise --max_bad_share"
    )


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write the report of what was dropped, one JSON object per line."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _open_folder(out: Path, plan: dict[str, Any], sliced: bool) -> Manifest | None:
    """Prepare a folder for this plan. Return its manifest if it is complete, and refuse a folder of another plan."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in out.iterdir()}
    except OSError as error:
        raise LigatureError(f"cannot write into {out}: {error.strerror}; choose another --out") from None
    if MANIFEST_NAME in names:
        manifest = read_manifest(out, check=False)
        _same_plan(out, manifest.source, plan)
        if not (damage := manifest.find_damage()):
            _remove_traces(out)
            print(f"{out} is complete already, from the same source with the same options: nothing to do")
            return manifest
        print(f"{out}: {damage[0]}; writing what is missing")
        # The plan comes first: after a kill, a folder without plan and manifest would be refused as someone else's.
        write_json(out / PLAN_NAME, plan)
        (out / MANIFEST_NAME).unlink(missing_ok=True)
    elif PLAN_NAME in names:
        _same_plan(out, read_json(out / PLAN_NAME), plan)
    # Partial files alone are left by a run that was killed before it wrote its plan.
    elif any(not name.endswith(".partial") for name in names):
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
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    name = next((name for name in differing if name != "items_sha256"), None)
    difference = f"{name} was {old.get(name)!r}, now {new.get(name)!r}" if name else "other images or captions"
    raise DataError(
        f"{out} holds shards made with other options ({difference}); choose another --out, or remove that folder first"
    )


def _finish(
    out: Path, written: list[Written], plan: dict[str, Any], origin: Origin, lines: list[dict[str, Any]]
) -> Manifest:
    """Write the report and the manifest, then remove the working files.

    The order matters: after a kill between any two steps, the same command can still finish the folder.
    """
    lines += [{**line, "counted_as": UNREADABLE} for result in written for line in result.unreadable]
    totals = Counter(origin.dropped)
    totals.update(line["counted_as"] for line in lines if line["counted_as"] not in origin.dropped)
    shards = tuple(result.shard for result in written if result.shard.samples)
    if lines:
        write_lines(out / DROPPED_NAME, lines)
    if not shards:
        raise DataError(f"none of the images can be decoded; see {out / DROPPED_NAME}")
    manifest = Manifest(out, shards, plan, dict(totals), origin.ids_are_names)
    for result in written:
        if not result.shard.samples:  # all its images were broken; readers need not handle empty shards
            (out / result.shard.name).unlink(missing_ok=True)
            (out / result.shard.index).unlink(missing_ok=True)
    write_manifest(manifest)
    _remove_traces(out)
    return manifest


def _remove_traces(out: Path) -> None:
    """Remove the files that only an unfinished folder needs: the plan, fingerprints, and partial files of killed processes."""
    (out / PLAN_NAME).unlink(missing_ok=True)
    for pattern in (".*.npy", ".*.partial"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)
