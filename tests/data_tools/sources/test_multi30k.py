"""Multi30K's folder: lines are joined by number."""

from __future__ import annotations

import gzip

import pytest
from source_files import raises_one_line

from data_tools.sources import KINDS, Choice, clean_caption, collect
from data_tools.sources.items import Dropped
from runtime.errors import DataError, RecipeError


@pytest.fixture
def multi30k(tmp_path):
    folder = tmp_path / "task2"
    (folder / "raw").mkdir(parents=True)
    (folder / "image_splits").mkdir()
    (folder / "image_splits/val_images.txt").write_text("a.jpg\nb.jpg\n")
    for number in "12":
        text = (
            f"one\u2028 {number}\ntwo {number}\n"  # a line end of Unicode's inside a caption is not one of the file's
        )
        (folder / f"raw/val.{number}.en.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def test_multi30k_joins_lines_by_number(multi30k, images):
    collected = collect(multi30k, images, choice=Choice("val"))
    assert [(item.key, item.captions) for item in collected.items] == [
        ("a", ["one 1", "one 2"]),
        ("b", ["two 1", "two 2"]),
    ]
    raises_one_line(RecipeError, "several splits.*one of: val", lambda: collect(multi30k, images))
    with gzip.open(multi30k / "raw/val.2.en.gz", "at") as file:
        file.write("three\n")
    raises_one_line(DataError, "3 lines and val_images.txt 2", lambda: collect(multi30k, images, choice=Choice("val")))


def test_two_copies_of_flickr30k_agree(data):
    """Multi30K's test split and ALBEF's json hold the same captions of the same images (the README says so)."""
    folder = data / "annotations/flickr30k"
    one = {
        e.image_id: e.captions
        for e in KINDS["multi30k"].read(folder / "multi30k_task2", Choice("test_2016"), Dropped())
    }
    two = {e.image_id: e.captions for e in KINDS["albef"].read(folder / "flickr30k_test.json", Choice(), Dropped())}
    assert one.keys() == two.keys()
    same = sum(sorted(map(clean_caption, one[key])) == sorted(map(clean_caption, two[key])) for key in one)
    assert same == 970
