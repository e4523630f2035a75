"""List the members of any tar: every member that can be found, and everything that is wrong with the rest.

Python's tarfile takes a broken header for the end of the archive, and so do readers built on it. The rest of a shard then
vanishes silently. This walk goes on at the next good header and reports the bytes it skipped. Nothing is unpacked, so links,
devices and odd paths do no harm.
"""

from __future__ import annotations

import mmap
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import DataError

BLOCK = tarfile.BLOCKSIZE
IMAGE_FORMATS = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
"""The image format that an index records, by file extension."""
KNOWN = {*IMAGE_FORMATS, "json", "txt"}
"""Extensions of members that belong to a sample."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of a tar. Its `size` bytes begin at `offset`."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class TarContents:
    """The members of a tar, and what is wrong with it."""

    members: list[Member] = field(default_factory=list)
    """Regular files, in the order of the tar."""
    problems: list[str] = field(default_factory=list)
    """Phrases that say what is broken and at which byte; empty when the tar is whole."""
    skipped: list[str] = field(default_factory=list)
    """Names of members that are never read: links, devices, sparse files, and paths that lead out of the tar."""


def walk_tar(path: str | Path) -> TarContents:
    """List an uncompressed tar (ustar, GNU or pax).

    Raises:
        DataError: The file is missing, or it is not an uncompressed tar.
    """
    contents = TarContents()
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < BLOCK:
                raise DataError(
                    f"{path} is not an uncompressed tar: it has less than one block; fetch or unpack it again"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _walk(path, data, contents)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return contents


def _walk(path: str | Path, data: mmap.mmap, contents: TarContents) -> None:
    position, broken_since, empty_blocks = 0, -1, 0
    # What an extended header says about the member after it.
    long_name: str | None = None
    real_size: int | None = None
    sparse = False
    while position + BLOCK <= len(data):
        block = data[position : position + BLOCK]
        # Empty blocks need not be the end: behind a hole of zeros the samples go on.
        if not block.strip(b"\0"):
            empty_blocks += 1
            position += BLOCK
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.size < 0:  # base-256 numbers have a sign, and the walk would go backwards
                raise tarfile.HeaderError("negative size")
        except tarfile.HeaderError:
            # A broken header at the very start means another kind of file, such as a compressed tar.
            if position == 0:
                raise DataError(f"{path} is not an uncompressed tar; unpack it first") from None
            broken_since = position if broken_since < 0 else broken_since
            position, long_name, real_size = position + BLOCK, None, None
            continue
        if broken_since >= 0:
            skipped_bytes = position - broken_since
            contents.problems.append(f"broken header at byte {broken_since:,}: {skipped_bytes:,} bytes skipped")
        elif empty_blocks:
            contents.problems.append(f"empty blocks before byte {position:,}, where the tar goes on")
        broken_since, empty_blocks = -1, 0
        body, size = position + BLOCK, header.size if real_size is None else real_size
        name = long_name or header.name
        if body + size > len(data):
            contents.problems.append(f"cut at byte {len(data):,}, inside {name}")
            return
        position = body + -(-size // BLOCK) * BLOCK
        extension = data[body : body + size] if header.type in _EXTENDED_HEADERS else b""
        if header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = extension.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type == tarfile.XHDTYPE:
            records = _pax_records(extension)
            long_name = records.get("path", long_name)
            real_size = int(records["size"]) if records.get("size", "").isdigit() else None
            sparse = any(key.startswith("GNU.sparse") for key in records)
        elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            if header.type != tarfile.DIRTYPE and not name.endswith("/"):
                if header.type in _REGULAR and not sparse and not _leads_out(name):
                    contents.members.append(Member(name, body, size))
                else:
                    contents.skipped.append(name)
            long_name, real_size, sparse = None, None, False
    if broken_since >= 0:
        contents.problems.append(f"broken header at byte {broken_since:,}: nothing readable after it")
    elif len(data) % BLOCK:
        contents.problems.append(f"cut at byte {len(data):,}, inside a block")
    # The format ends a tar with two empty blocks.
    elif empty_blocks < 2:
        contents.problems.append(f"ends at byte {len(data):,} without an end mark: it may be cut there")


_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENDED_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)


def _leads_out(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


def _pax_records(content: bytes) -> dict[str, str]:
    r"""Return the `<length> <key>=<value>\n` records of a pax header, up to the first that does not parse."""
    records = {}
    while content:
        length = content.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(content):
            break
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return records


@dataclass(slots=True)
class Group:
    """The members of one sample."""

    name: str
    """Their path without extension."""
    image: Member | None = None
    image_format: str = ""
    """The image's format as an index records it."""
    texts: dict[str, Member] = field(default_factory=dict)
    """The text members, under `json` and `txt`."""


def group_members(members: Iterable[Member]) -> list[Group]:
    """Group members into samples, in the order of their first members.

    A name ends at its last dot, so `a.v1.jpg` and `a.v2.jpg` stay two samples; the webdataset library makes one of them. A name
    that comes again begins another sample of that name.
    """
    groups: list[Group] = []
    latest: dict[str, Group] = {}
    for member in members:
        name, _, extension = member.name.rpartition(".")
        kind = extension.lower()
        if kind not in KNOWN or not name:
            continue
        group = latest.get(name)
        repeated = group is not None and (group.image is not None if kind in IMAGE_FORMATS else kind in group.texts)
        if group is None or repeated:
            group = latest[name] = Group(name)
            groups.append(group)
        if kind in IMAGE_FORMATS:
            group.image, group.image_format = member, IMAGE_FORMATS[kind]
        else:
            group.texts[kind] = member
    return groups
