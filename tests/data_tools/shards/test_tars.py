"""The tar walker lists what tarfile lists, and keeps every good member around damage."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from data_tools.shards.tars import group_members, walk_tar
from runtime.errors import DataError


def packed(path, members, form=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def some(count=6, seed=0):
    rng = random.Random(seed)
    return {f"{k:03d}.{e}": rng.randbytes(rng.randrange(1, 1500)) for k in range(count) for e in ("jpg", "txt")}


def contents(path, members):
    whole = path.read_bytes()
    return {member.name: whole[member.offset : member.offset + member.size] for member in members}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_whole_tar_is_listed_as_tarfile_lists_it(tmp_path, form):
    members = some() | {"f/" * 40 + "deep.jpg": b"D", "empty.txt": b""}
    if form != tarfile.USTAR_FORMAT:
        members |= {"ключ" * 40 + ".jpg": b"K" * 700}
    path = packed(tmp_path / "t.tar", members, form)
    walked = walk_tar(path)
    assert not walked.problems and not walked.skipped
    with tarfile.open(path) as tar:
        assert [(m.name, m.offset, m.size) for m in walked.members] == [(m.name, m.offset_data, m.size) for m in tar]
    assert contents(path, walked.members) == members


def test_links_devices_and_odd_paths_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in [("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dev.jpg", tarfile.CHRTYPE),
                           ("fifo.jpg", tarfile.FIFOTYPE), ("folder", tarfile.DIRTYPE), ("/etc/a.jpg", tarfile.REGTYPE),
                           ("../b.jpg", tarfile.REGTYPE), ("good.jpg", tarfile.REGTYPE)]:  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(member)
    walked = walk_tar(tmp_path / "t.tar")
    assert [member.name for member in walked.members] == ["good.jpg"] and not walked.problems
    assert walked.skipped == ["link.jpg", "hard.jpg", "dev.jpg", "fifo.jpg", "/etc/a.jpg", "../b.jpg"]


def test_every_cut_and_every_broken_header_is_noticed_and_costs_only_its_own(tmp_path):
    """Exhaustive: each block of a small tar cut off, and each one overwritten."""
    members = some(3)
    path = packed(tmp_path / "t.tar", members)
    content = path.read_bytes()
    whole = walk_tar(path).members
    end = whole[-1].offset + -(-whole[-1].size // 512) * 512
    heads = {member.offset - 512: member.name for member in whole}
    for at in range(512, end + 512, 512):
        path.write_bytes(content[:at])
        walked = walk_tar(path)
        assert walked.problems, at
        kept = [m for m in whole if m.offset + m.size <= at]
        assert {m.name for m in walked.members} == {m.name for m in kept}
    for at in range(512, end, 512):
        path.write_bytes(content[:at] + b"\xff" * 512 + content[at + 512 :])
        walked = walk_tar(path)
        lost = {heads[at]} if at in heads else set()
        assert {m.name for m in walked.members} == {m.name for m in whole} - lost
        assert bool(walked.problems) == bool(lost)
        path.write_bytes(content[:at] + bytes(512) + content[at + 512 :])  # a hole: tarfile takes two for the end
        if at in heads:
            assert {m.name for m in walk_tar(path).members} == {m.name for m in whole} - lost and walk_tar(
                path
            ).problems


def test_a_negative_size_is_a_broken_header(tmp_path):
    """Base-256 can say one: the walk would come by the same header for ever."""
    path = packed(tmp_path / "t.tar", some(3))
    content, head = bytearray(path.read_bytes()), walk_tar(path).members[2].offset - 512
    content[head + 124 : head + 136] = (-1024).to_bytes(12, "big", signed=True)
    content[head + 148 : head + 156] = b" " * 8
    content[head + 148 : head + 156] = b"%06o\0 " % sum(content[head : head + 512])
    assert tarfile.TarInfo.frombuf(content[head : head + 512], "utf-8", "strict").size == -1024
    path.write_bytes(content)
    walked = walk_tar(path)
    assert [member.name for member in walked.members] == ["000.jpg", "000.txt", "001.txt", "002.jpg", "002.txt"]
    assert len(walked.problems) == 1 and f"broken header at byte {head:,}" in walked.problems[0]


def test_a_file_that_is_no_tar_gives_a_one_line_error(tmp_path):
    for content in (b"", b"x" * 100, random.Random(0).randbytes(5000)):
        (tmp_path / "t.tar").write_bytes(content)
        with pytest.raises(DataError, match="not an uncompressed tar"):
            walk_tar(tmp_path / "t.tar")
    with pytest.raises(DataError, match="cannot read"):
        walk_tar(tmp_path / "none.tar")


def test_members_are_grouped_in_any_order_and_names_end_at_the_last_dot(tmp_path):
    names = [
        "b.jpg",
        "a.txt",
        "b.json",
        "x.v1.JPEG",
        "a.jpg",
        "x.v2.jpg",
        "b.txt",
        "b.jpg",
        ".jpg",
        "a.cls",
        "d/a.webp",
    ]
    walked = group_members(walk_tar(packed(tmp_path / "t.tar", {name: name.encode() for name in names[:7]})).members)
    assert [(g.name, g.image_format, sorted(g.texts)) for g in walked] == [
        ("b", "jpg", ["json", "txt"]), ("a", "jpg", ["txt"]), ("x.v1", "jpg", []), ("x.v2", "jpg", []),
    ]  # fmt: skip
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    again = group_members(walk_tar(tmp_path / "t.tar").members)
    assert [g.name for g in again] == ["b", "a", "x.v1", "x.v2", "b", "d/a"]  # b comes twice, and stays two
