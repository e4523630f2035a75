"""Flickr's token file: every caption in order, and a malformed line by its number."""

from __future__ import annotations

import pytest
from source_files import raises_one_line, write_tokens

from data_tools.sources import collect
from runtime.errors import DataError


def test_flickr_keeps_the_order_of_images_and_captions(tmp_path, images):
    path = write_tokens(
        tmp_path, "b.jpg#1\t second  one ", "a.jpg#0\tan\u00a0a", "b.jpg#0\tfirst\tone", "", "c.jpg#0\tc"
    )
    collected = collect(path, images)
    assert [(item.key, item.captions) for item in collected.items] == [
        ("b", ["second one", "first one"]), ("a", ["an a"]), ("c", ["c"]),
    ]  # fmt: skip
    assert [item.read() for item in collected.items] == [b"b.jpg", b"a.jpg", b"sub/c.jpg"]
    assert (collected.kind, collected.dropped, collected.renamed) == ("flickr", {}, 0)
    assert collected.items[2].source == "c.jpg" and collected.items[2].image_id == "c" and collected.items[2].size == 9


def test_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path, images):
    path = write_tokens(tmp_path, "a.jpg#0\tone", "b.jpg#0\ttwo", encoding="utf-8-sig", end="\r\n")
    assert [(item.key, item.captions) for item in collect(path, images).items] == [("a", ["one"]), ("b", ["two"])]


@pytest.mark.parametrize("line", ["a.jpg#0 no tab", "a.jpg\tno number", "#0\tno name", "a.jpg#x\tno number"])
def test_a_malformed_line_is_named(tmp_path, images, line):
    path = write_tokens(tmp_path, "a.jpg#0\tone", line)
    raises_one_line(DataError, "line 2: not", lambda: collect(path, images))


@pytest.mark.parametrize(("split", "count"), [("train", 6000), ("dev", 1000)])
def test_flickr8k_is_read_whole(data, split, count):
    folder = data / "flickr8k"
    collected = collect(folder / "Flickr8k.token.txt", folder / "flickr8k_images_224.tar",
                    names=folder / f"Flickr_8k.{split}Images.txt")  # fmt: skip
    assert len(collected.items) == count and sum(len(item.captions) for item in collected.items) == 5 * count
    assert not collected.dropped and all(len(item.captions) == 5 for item in collected.items)
    assert collected.items[-1].read()[:3] == b"\xff\xd8\xff"
