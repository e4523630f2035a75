"""Every kind of source is recognised, and the real annotation files are read whole."""

from __future__ import annotations

import pytest
from source_files import coco_json, karpathy_json, raises_one_line, write_tokens, write_value

from data_tools.sources import KINDS, Choice, clean_caption, collect, detect_kind
from data_tools.sources.items import Dropped
from runtime.errors import DataError, RecipeError


def test_each_kind_of_source_is_recognised(tmp_path, images):
    assert detect_kind(write_tokens(tmp_path, "a.jpg#0\tone")) == "flickr"
    assert detect_kind(write_value(tmp_path, coco_json([(1, "a.jpg")], []))) == "coco"
    assert detect_kind(write_value(tmp_path, karpathy_json(("a.jpg", "val", {})))) == "karpathy"
    path = write_value(tmp_path, [{"picture": "a.jpg", "words": "one"}])
    raises_one_line(DataError, "cannot tell", lambda: detect_kind(path))
    raises_one_line(DataError, "cannot read", lambda: detect_kind(tmp_path / "none.json"))
    raises_one_line(RecipeError, "did you mean 'karpathy'", lambda: collect(path, images, kind="karpaty"))
    assert set(KINDS) == {"flickr", "coco", "karpathy", "albef", "multi30k", "table", "folder", "webdataset"}


@pytest.mark.parametrize(
    ("name", "kind", "split", "count", "captions"),
    [
        ("coco/captions_val2017.json.gz", "coco", None, 5000, 25014),
        ("coco/captions_val2014_subset4800.json.gz", "coco", None, 4800, 24019),
        ("coco/coco_karpathy_test.json.gz", "albef", None, 5000, 25010),
        ("coco/coco_karpathy_val.json.gz", "albef", None, 5000, 25010),
        ("coco/coco_test.json.gz", "albef", None, 5000, 25010),
        ("flickr30k/flickr30k_test.json", "albef", None, 970, 4850),
        ("flickr30k/multi30k_task2", "multi30k", "train", 28129, 140645),
        ("flickr30k/multi30k_task2", "multi30k", "val", 986, 4930),
        ("flickr30k/multi30k_task2", "multi30k", "test_2016", 970, 4850),
    ],
)
def test_annotations_are_read_whole(data, name, kind, split, count, captions):
    dropped = Dropped()
    path = data / "annotations" / name
    assert detect_kind(path) == kind
    entries = list(KINDS[kind].read(path, Choice(split), dropped))
    assert len(entries) == len({entry.image_id for entry in entries}) == count
    assert sum(len(entry.captions) for entry in entries) == captions and not dropped.counts
    assert all(clean_caption(caption) and len(caption) > 1 for entry in entries for caption in entry.captions)
