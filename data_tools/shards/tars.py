"""What lies where in a tar, of whatever origin: every member that can be found, and everything that is wrong with the rest.

Python's tarfile takes a broken header for the end, and so do readers built on it: the rest of a shard vanishes silently. Here the
walk goes on at the next good header and says what it passed over. Nothing is unpacked: links, devices and odd paths harm no one.
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
"""Extension -> the name an index gives it."""
KNOWN = {*IMAGE_FORMATS, "json", "txt"}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of a tar: its bytes are at `offset`, `size` of them."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class TarContents:
    members: list[Member] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is broken, in words, with the place; nothing when the tar is whole."""
    skipped: list[str] = field(default_factory=list)
    """Members that are links, devices, sparse, or named to lie elsewhere: never read."""


def walk_tar(path: str | Path) -> TarContents:
    """List an uncompressed tar (ustar, GNU or pax). Raises `DataError` when it is none, or not there."""
    found = TarContents()
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < BLOCK:
                raise DataError(
                    f"{path} is not an uncompressed tar: it has less than one block; fetch or unpack it again"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _walk(path, data, found)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return found


def _walk(path: str | Path, data: mmap.mmap, found: TarContents) -> None:
    at, broken_since, empty_blocks = 0, -1, 0
    long_name: str | None = None
    real_size: int | None = None
    sparse = False
    while at + BLOCK <= len(data):
        block = data[at : at + BLOCK]
        if not block.strip(b"\0"):
            empty_blocks += 1
            at += BLOCK
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.size < 0:  # base-256 has a sign, and the walk would go backwards
                raise tarfile.HeaderError("negative size")
        except tarfile.HeaderError:
            if at == 0:
                raise DataError(f"{path} is not an uncompressed tar; unpack it first") from None
            broken_since = at if broken_since < 0 else broken_since
            at, long_name, real_size = at + BLOCK, None, None
            continue
        if broken_since >= 0:
            found.problems.append(f"broken header at byte {broken_since:,}: {at - broken_since:,} bytes passed over")
        elif empty_blocks:
            found.problems.append(f"empty blocks before byte {at:,}, where the tar goes on")
        broken_since, empty_blocks = -1, 0
        body, size = at + BLOCK, header.size if real_size is None else real_size
        name = long_name or header.name
        if body + size > len(data):
            found.problems.append(f"cut at byte {len(data):,}, inside {name}")
            return
        at = body + -(-size // BLOCK) * BLOCK
        content = data[body : body + size] if header.type in _ABOUT_THE_NEXT else b""
        if header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type == tarfile.XHDTYPE:
            records = _pax_records(content)
            long_name = records.get("path", long_name)
            real_size = int(records["size"]) if records.get("size", "").isdigit() else None
            sparse = any(key.startswith("GNU.sparse") for key in records)
        elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            if header.type != tarfile.DIRTYPE and not name.endswith("/"):
                plain = header.type in _REGULAR and not sparse and not _elsewhere(name)
                if plain:
                    found.members.append(Member(name, body, size))
                else:
                    found.skipped.append(name)
            long_name, real_size, sparse = None, None, False
    if broken_since >= 0:
        found.problems.append(f"broken header at byte {broken_since:,}: nothing readable after it")
    elif len(data) % BLOCK:
        found.problems.append(f"cut at byte {len(data):,}, inside a block")
    elif empty_blocks < 2:
        found.problems.append(f"ends at byte {len(data):,} without an end mark: it may be cut there")


_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_ABOUT_THE_NEXT = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)


def _elsewhere(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


def _pax_records(content: bytes) -> dict[str, str]:
    """`<length> <key>=<value>\\n` records of a pax header; what does not parse is left out."""
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
    texts: dict[str, Member] = field(default_factory=dict)
    """`json` and `txt`, those that are there."""


def group_members(members: Iterable[Member]) -> list[Group]:
    """Members -> samples, in the order of their first members. A name ends at its last dot, so `a.v1.jpg` and `a.v2.jpg` stay two
    (the webdataset library makes one of them). A name that comes again begins another sample of that name."""
    groups: list[Group] = []
    latest: dict[str, Group] = {}
    for member in members:
        name, _, extension = member.name.rpartition(".")
        kind = extension.lower()
        if kind not in KNOWN or not name:
            continue
        group = latest.get(name)
        taken = group is not None and (group.image is not None if kind in IMAGE_FORMATS else kind in group.texts)
        if group is None or taken:
            group = latest[name] = Group(name)
            groups.append(group)
        if kind in IMAGE_FORMATS:
            group.image, group.image_format = member, IMAGE_FORMATS[kind]
        else:
            group.texts[kind] = member
    return groups
