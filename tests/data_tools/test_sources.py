"""Readers of captioned images: everything an annotation file says, and one line for what it cannot mean."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from data_tools.sources import (
    KINDS,
    clean_caption,
    coco_captions,
    collect,
    detect_kind,
    flickr_tokens,
    karpathy,
    open_images,
    safe_key,
)
from runtime.errors import DataError, LigatureError, RecipeError

SHARED = Path(os.environ.get("LIGATURE_SHARED", Path(__file__).parents[2].parent / "shared"))


@pytest.fixture
def data():
    """The real data, or a skip with its reason (a failure where CI promises to have it)."""
    if not (SHARED / "data").is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"no data in {SHARED}")
        pytest.skip(f"no data in {SHARED}; set LIGATURE_SHARED")
    return SHARED / "data"


@pytest.fixture
def images(tmp_path):
    """A folder with files a.jpg, b.jpg, sub/c.jpg; sources open no image, so any bytes do."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (folder / name).write_bytes(name.encode())
    return folder


def tokens(tmp_path, *lines, encoding="utf-8", end="\n"):
    path = tmp_path / "captions.token"
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


def written(tmp_path, value, name="captions.json"):
    path = tmp_path / name
    path.write_text(json.dumps(value))
    return path


def coco(images, notes):
    return {
        "info": {},
        "images": [{"id": number, "file_name": name} for number, name in images],
        "annotations": [{"id": k, "image_id": number, "caption": text} for k, (number, text) in enumerate(notes)],
    }


def karpathy_json(*rows):
    return {"images": [{"filename": f, "split": s, "sentences": [{"raw": f"a {f}"}], **more} for f, s, more in rows]}


def one_line(kind, match, call):
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


# -- Flickr's token file


def test_flickr_keeps_the_order_of_images_and_captions(tmp_path, images):
    path = tokens(tmp_path, "b.jpg#1\t second  one ", "a.jpg#0\tan\u00a0a", "b.jpg#0\tfirst\tone", "", "c.jpg#0\tc")
    found = collect(path, images)
    assert [(item.key, item.captions) for item in found.items] == [
        ("b", ["second one", "first one"]), ("a", ["an a"]), ("c", ["c"]),
    ]  # fmt: skip
    assert [item.read() for item in found.items] == [b"b.jpg", b"a.jpg", b"sub/c.jpg"]
    assert (found.kind, found.dropped, found.renamed) == ("flickr", {}, 0)
    assert found.items[2].source == "c.jpg" and found.items[2].image_id == "c" and found.items[2].size == 9


def test_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path, images):
    path = tokens(tmp_path, "a.jpg#0\tone", "b.jpg#0\ttwo", encoding="utf-8-sig", end="\r\n")
    assert [(item.key, item.captions) for item in collect(path, images).items] == [("a", ["one"]), ("b", ["two"])]


@pytest.mark.parametrize("names", ["b.jpg\na.jpg\n", "b\na", "elsewhere/b.jpg\r\na.jpg\r\n\r\n"])
def test_a_list_of_names_chooses_but_does_not_order(tmp_path, images, names):
    path = tokens(tmp_path, "a.jpg#0\tone", "c.jpg#0\tthree", "b.jpg#0\ttwo")
    (tmp_path / "names.txt").write_text(names)
    assert [item.key for item in collect(path, images, names=tmp_path / "names.txt").items] == ["a", "b"]


def test_a_listed_image_without_captions_is_counted_and_a_foreign_list_is_refused(tmp_path, images):
    path = tokens(tmp_path, "a.jpg#0\tone")
    (tmp_path / "names.txt").write_text("a.jpg\nz.jpg\n")
    assert collect(path, images, names=tmp_path / "names.txt").dropped == {"images without a caption": 1}
    (tmp_path / "names.txt").write_text("y.jpg\nz.jpg\n")
    one_line(DataError, "none of the 2 images", lambda: collect(path, images, names=tmp_path / "names.txt"))


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path, images):
    path = tokens(tmp_path, "a.jpg#0\tone", "b.jpg#0\tcafé", encoding="latin-1")
    one_line(DataError, r"captions.token, line 2: byte 0xe9", lambda: collect(path, images))
    path.write_bytes(b"\xef\xbb\xbf\xff" + b"a.jpg#0\tone\n")
    one_line(DataError, "line 1: byte 0xff", lambda: collect(path, images, kind="flickr"))


@pytest.mark.parametrize("line", ["a.jpg#0 no tab", "a.jpg\tno number", "#0\tno name", "a.jpg#x\tno number"])
def test_a_malformed_line_is_named(tmp_path, images, line):
    path = tokens(tmp_path, "a.jpg#0\tone", line)
    one_line(DataError, "line 2: not", lambda: collect(path, images))


def test_empty_captions_are_counted_and_their_images_dropped(tmp_path, images):
    path = tokens(tmp_path, "a.jpg#0\t ", "a.jpg#1\tone", "b.jpg#0\t", "b.jpg#1\t\u2003")
    found = collect(path, images)
    assert [(item.key, item.captions) for item in found.items] == [("a", ["one"])]
    assert found.dropped == {"empty captions": 3, "images without a caption": 1}


# -- COCO


def test_coco_joins_captions_to_images(tmp_path, images):
    value = coco([(7, "b.jpg"), (3, "a.jpg"), (5, "c.jpg")], [(3, "x"), (7, "y"), (9, "orphan"), (3, "z")])
    found = collect(written(tmp_path, value), images)
    assert found.kind == "coco"
    assert [(item.key, item.image_id, item.captions) for item in found.items] == [
        ("b", "7", ["y"]), ("a", "3", ["x", "z"]),
    ]  # fmt: skip
    assert found.dropped == {"captions of unlisted images": 1, "images without a caption": 1}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[1", "line 1: not valid JSON"),
        ("[]", "no list 'images'"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [{"id": 1}], "annotations": []}', "image 0 does not fit.*file_name"),
        ('{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', "annotation 0 does not fit.*caption"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": 5}]}', "is int"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}', "present and captioned, of 1"),
    ],
)
def test_a_json_of_another_shape_is_one_line(tmp_path, images, value, words):
    path = tmp_path / "captions.json"
    path.write_text(value)
    one_line(DataError, words, lambda: collect(path, images, kind="coco"))


def test_a_gzip_cut_short_is_one_line(tmp_path, images):
    path = tmp_path / "captions.json.gz"
    path.write_bytes(gzip.compress(json.dumps(coco([(1, "a.jpg")], [(1, "x")])).encode())[:-12])
    one_line(DataError, "broken gzip", lambda: collect(path, images, kind="coco"))
    one_line(DataError, "broken gzip", lambda: detect_kind(path))


# -- Karpathy


@pytest.fixture
def split_json(tmp_path):
    rows = [("a.jpg", "train", {}), ("b.jpg", "restval", {"cocoid": 42}), ("c.jpg", "test", {"filepath": "sub"})]
    return written(tmp_path, karpathy_json(*rows))


def test_karpathy_respects_its_splits(split_json, images):
    def keys(**options):
        return [item.key for item in collect(split_json, images, **options).items]

    assert keys(split="train") == ["a"]
    assert keys(split="train", restval=True) == ["a", "b"]
    assert keys(split="test") == ["c"]
    assert collect(split_json, images, split="test").items[0].source == "sub/c.jpg"
    assert [item.image_id for item in collect(split_json, images, split="restval").items] == ["42"]


def test_karpathy_asks_for_a_split_it_has(tmp_path, split_json, images):
    splits = r"one of: train \(1\), restval \(1\), test \(1\)"
    one_line(RecipeError, "several splits.*" + splits, lambda: collect(split_json, images))
    one_line(RecipeError, "no split 'val'.*" + splits, lambda: collect(split_json, images, split="val"))
    one_line(RecipeError, "--restval", lambda: collect(split_json, images, split="test", restval=True))
    path = written(tmp_path, karpathy_json(("a.jpg", "val", {})))
    assert len(collect(path, images).items) == 1


def test_a_split_of_a_file_without_splits_is_refused(tmp_path, images):
    path = tokens(tmp_path, "a.jpg#0\tone")
    one_line(RecipeError, "--names", lambda: collect(path, images, split="train"))


# -- Kinds, keys, cuts


def test_kinds_are_told_apart(tmp_path, images):
    assert detect_kind(tokens(tmp_path, "a.jpg#0\tone")) == "flickr"
    assert detect_kind(written(tmp_path, coco([(1, "a.jpg")], []))) == "coco"
    assert detect_kind(written(tmp_path, karpathy_json(("a.jpg", "val", {})))) == "karpathy"
    path = written(tmp_path, [{"image": "a.jpg", "caption": "one"}])
    one_line(DataError, "cannot tell", lambda: detect_kind(path))
    one_line(DataError, "cannot read", lambda: detect_kind(tmp_path / "none.json"))
    one_line(RecipeError, "did you mean 'karpathy'", lambda: collect(path, images, kind="karpaty"))
    assert set(KINDS) == {"flickr", "coco", "karpathy"}


@pytest.mark.parametrize(
    ("name", "key", "changed"),
    [
        ("sub/a.jpg", "a", False), ("a.b.jpg", "a_b", True), ("dir\\a.jpg", "dir_a", True), ("a b.jpg", "a_b", True),
        ("2258277193_586949ec62.jpg.1", "2258277193_586949ec62_jpg", True), ("naïve-1.png", "naïve-1", False),
    ],
)  # fmt: skip
def test_keys_are_made_safe_and_said(name, key, changed):
    assert safe_key(name) == (key, changed)


def test_keys_that_meet_are_refused(tmp_path, images):
    for name in ("x.y.jpg", "x_y.jpg"):
        (images / name).write_bytes(b"x")
    path = tokens(tmp_path, "x.y.jpg#0\tone")
    assert collect(path, images).renamed == 1
    path = tokens(tmp_path, "x.y.jpg#0\tone", "x_y.jpg#0\ttwo")
    one_line(DataError, "x.y.jpg and x_y.jpg share the key x_y", lambda: collect(path, images))


def test_lone_surrogates_are_no_caption():
    assert clean_caption("a \ud83d dog") == "" and clean_caption(" a\n\u2003dog ") == "a dog"


def test_cuts_of_a_source_never_overlap(tmp_path, images):
    path = tokens(tmp_path, "a.jpg#0\tone", "b.jpg#0\t", "c.jpg#0\tthree")
    assert [item.key for item in collect(path, images, count=2).items] == ["a"]  # b has no caption, c is not its heir
    assert [item.key for item in collect(path, images, start=2).items] == ["c"]
    one_line(RecipeError, "past the end", lambda: collect(path, images, start=3))


# -- Images


def test_absent_images_stop_or_are_counted(tmp_path, images):
    path = tokens(tmp_path, "y.jpg#0\tx", "a.jpg#0\tone", "z.jpg#0\tx")
    one_line(DataError, "2 of 3 images .* the first: y.jpg.*--allow_missing", lambda: collect(path, images))
    found = collect(path, images, allow_missing=True)
    assert [item.key for item in found.items] == ["a"]
    assert found.absent == ["y.jpg", "z.jpg"] and found.dropped == {"absent images": 2}


def test_a_base_name_that_several_files_bear_is_refused(images):
    (images / "sub" / "a.jpg").write_bytes(b"other")
    (images / "two").mkdir()
    (images / "two" / "c.jpg").write_bytes(b"other")
    store = open_images(images)
    assert store.find("a.jpg")() == b"a.jpg" and store.find("sub/a.jpg")() == b"other"
    one_line(DataError, "sub/c.jpg or two/c.jpg", lambda: store.find("c.jpg"))


def test_an_annotation_cannot_reach_outside_the_folder(images):
    (images.parent / "secret.jpg").write_bytes(b"secret")
    store = open_images(images)
    assert store.find("../secret.jpg") is None and store.find(str(images.parent / "secret.jpg")) is None


def packed(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))
    return path


def test_a_tar_is_read_by_offset_and_links_are_no_images(tmp_path):
    long = "folder/" * 20 + "long.jpg"
    store = open_images(packed(tmp_path / "i.tar", {"./x/a.jpg": b"AAA", "x/link.jpg": None, long: b"L" * 700}))
    assert store.find("a.jpg")() == b"AAA" and store.find("x/a.jpg")() == b"AAA" and store.find("y/a.jpg")() == b"AAA"
    assert store.find(long)() == store.find("long.jpg")() == b"L" * 700
    assert store.find("link.jpg") is None


def test_a_tar_that_shrinks_after_indexing_is_an_error(tmp_path):
    path = packed(tmp_path / "i.tar", {"a.jpg": b"A" * 4000})
    found = open_images(path).find("a.jpg")
    os.truncate(path, 2000)
    with pytest.raises(OSError, match="ends 2,512 bytes early"):
        found()


def test_compressed_cut_and_damaged_tars_are_one_line(tmp_path):
    one_line(DataError, "unpack it", lambda: open_images(packed(tmp_path / "i.tar.gz", {"a.jpg": b"A"}, "w:gz")))
    path = packed(tmp_path / "i.tar", {"a.jpg": b"A" * 4000, "b.jpg": b"B"})
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    one_line(DataError, "unexpected end", lambda: open_images(path))
    path.write_bytes(whole[:4608] + b"x" * 20 + whole[4628:])
    one_line(DataError, "broken header at byte 4,608", lambda: open_images(path))
    one_line(DataError, "no images at", lambda: open_images(tmp_path / "none"))


# -- Real files


@pytest.mark.parametrize(("split", "count"), [("train", 6000), ("dev", 1000)])
def test_flickr8k_is_read_whole(data, split, count):
    folder = data / "flickr8k"
    found = collect(folder / "Flickr8k.token.txt", folder / "flickr8k_images_224.tar",
                    names=folder / f"Flickr_8k.{split}Images.txt")  # fmt: skip
    assert len(found.items) == count and sum(len(item.captions) for item in found.items) == 5 * count
    assert not found.dropped and all(len(item.captions) == 5 for item in found.items)
    assert found.items[-1].read()[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize(("split", "count", "captions"), [("train", 80, 400), ("val", 159, 795)])
def test_coco_mini_is_read_whole(data, split, count, captions):
    folder = data / "coco_mini"
    found = collect(folder / f"annotations/captions_{split}2017.json", folder / "coco_mini_images_256.tar")
    assert len(found.items) == count and sum(len(item.captions) for item in found.items) == captions
    assert not found.dropped


@pytest.mark.parametrize(
    ("name", "count", "captions"),
    [("captions_val2017.json.gz", 5000, 25014), ("captions_val2014_subset4800.json.gz", 4800, 24019)],
)
def test_coco_captions_are_read_whole(data, name, count, captions):
    dropped: Counter[str] = Counter()
    path = data / "annotations/coco" / name
    assert detect_kind(path) == "coco"
    found = list(coco_captions(path, None, False, dropped))
    assert len(found) == count and sum(len(entry.captions) for entry in found) == captions and not dropped
    assert all(clean_caption(caption) for entry in found for caption in entry.captions)


def test_readers_share_one_shape(tmp_path):
    assert list(flickr_tokens(tokens(tmp_path), None, False, Counter())) == []
    with pytest.raises(LigatureError):
        list(karpathy(written(tmp_path, karpathy_json()), "train", False, Counter()))
