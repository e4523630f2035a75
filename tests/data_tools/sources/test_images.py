"""Images are found by path or base name, inside their folder or tar only."""

from __future__ import annotations

import os
import random

import pytest
from source_files import raises_one_line, write_tar

from data_tools.sources import open_images
from runtime.errors import DataError


def test_a_base_name_shared_by_several_files_is_refused(images):
    (images / "sub" / "a.jpg").write_bytes(b"other")
    (images / "two").mkdir()
    (images / "two" / "c.jpg").write_bytes(b"other")
    store = open_images(images)
    assert store.find("a.jpg")() == b"a.jpg" and store.find("sub/a.jpg")() == b"other"
    raises_one_line(DataError, "sub/c.jpg or two/c.jpg", lambda: store.find("c.jpg"))


def test_an_annotation_cannot_reach_outside_the_folder(images):
    (images.parent / "secret.jpg").write_bytes(b"secret")
    store = open_images(images)
    assert store.find("../secret.jpg") is None and store.find(str(images.parent / "secret.jpg")) is None


def test_a_tar_is_read_by_offset_and_links_are_no_images(tmp_path):
    long = "folder/" * 20 + "long.jpg"
    store = open_images(write_tar(tmp_path / "i.tar", {"./x/a.jpg": b"AAA", "x/link.jpg": None, long: b"L" * 700}))
    assert store.find("a.jpg")() == b"AAA" and store.find("x/a.jpg")() == b"AAA" and store.find("y/a.jpg")() == b"AAA"
    assert store.find(long)() == store.find("long.jpg")() == b"L" * 700
    assert store.find("link.jpg") is None


def test_a_tar_that_shrinks_after_indexing_is_an_error(tmp_path):
    path = write_tar(tmp_path / "i.tar", {"a.jpg": b"A" * 4000})
    stored = open_images(path).find("a.jpg")
    os.truncate(path, 2000)
    with pytest.raises(OSError, match="ends 2,512 bytes early"):
        stored()


def test_compressed_cut_and_damaged_tars_give_a_one_line_error(tmp_path):
    raises_one_line(
        DataError, "unpack it", lambda: open_images(write_tar(tmp_path / "i.tar.gz", {"a.jpg": b"A"}, "w:gz"))
    )
    noise = random.Random(0).randbytes(3000)
    raises_one_line(
        DataError, "unpack it", lambda: open_images(write_tar(tmp_path / "j.tar.gz", {"a.jpg": noise}, "w:gz"))
    )
    path = write_tar(tmp_path / "i.tar", {"a.jpg": b"A" * 4000, "b.jpg": b"B"})
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    raises_one_line(DataError, "cut at byte 2,000, inside a.jpg", lambda: open_images(path))
    path.write_bytes(whole[:4608] + b"x" * 20 + whole[4628:])
    raises_one_line(DataError, "broken header at byte 4,608", lambda: open_images(path))
    raises_one_line(DataError, "no images at", lambda: open_images(tmp_path / "none"))
