"""Readers of captioned images: everything an annotation file says, and one line for what it cannot mean."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
from pathlib import Path

import pytest

from data_tools.sources import KINDS, Choice, clean_caption, collect, detect_kind, open_images, safe_key
from data_tools.sources.items import Dropped
from runtime.errors import DataError, RecipeError

SHARED = Path(os.environ.get("LIGATURE_SHARED", Path(__file__).parents[3].parent / "shared"))


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
        return [item.key for item in collect(split_json, images, choice=Choice(**options)).items]

    assert keys(split="train") == ["a"]
    assert keys(split="train", restval=True) == ["a", "b"]
    assert keys(split="test") == ["c"]
    assert collect(split_json, images, choice=Choice("test")).items[0].source == "sub/c.jpg"
    assert [item.image_id for item in collect(split_json, images, choice=Choice("restval")).items] == ["42"]


def test_karpathy_asks_for_a_split_it_has(tmp_path, split_json, images):
    splits = r"one of: train \(1\), restval \(1\), test \(1\)"
    one_line(RecipeError, "several splits.*" + splits, lambda: collect(split_json, images))
    one_line(RecipeError, "no split 'val'.*" + splits, lambda: collect(split_json, images, choice=Choice("val")))
    one_line(RecipeError, "--restval", lambda: collect(split_json, images, choice=Choice("test", True)))
    path = written(tmp_path, karpathy_json(("a.jpg", "val", {})))
    assert len(collect(path, images).items) == 1


def test_a_split_of_a_file_without_splits_is_refused(tmp_path, images):
    path = tokens(tmp_path, "a.jpg#0\tone")
    one_line(RecipeError, "--names", lambda: collect(path, images, choice=Choice("train")))


# -- ALBEF and BLIP


def test_a_caption_string_is_one_caption_and_lines_of_an_image_are_joined(tmp_path, images):
    rows = [
        {"image": "a.jpg", "caption": "abc", "image_id": "coco_7"}, {"image": "b.jpg", "caption": ["x", "y"]},
        {"image": "a.jpg", "caption": "second", "image_id": "coco_7"}, {"image": "sub/c.jpg", "caption": "", "image_id": 3},
    ]  # fmt: skip
    found = collect(written(tmp_path, rows), images)
    assert found.kind == "albef" and found.dropped == {"empty captions": 1, "images without a caption": 1}
    assert [(item.key, item.image_id, item.captions) for item in found.items] == [
        ("a", "coco_7", ["abc", "second"]), ("b", "b", ["x", "y"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"image": "a.jpg"}, "no list of images"), ([{"url": "http://x/1.jpg", "caption": "x"}], "img2dataset"),
        ([{"image": "a.jpg", "caption": 5}], "entry 0"), ([{"image": "a.jpg", "caption": {"a": 1}}], "entry 0"),
        ([{"image": "a.jpg", "caption": [["x"]]}], "is list, not text"), ([{"image": "a.jpg"}], "entry 0 .*'caption'"),
        ([["a.jpg", "x"]], "entry 0"),
    ],
)  # fmt: skip
def test_an_albef_json_of_another_shape_is_one_line(tmp_path, images, rows, words):
    one_line(DataError, words, lambda: collect(written(tmp_path, rows), images, kind="albef"))


# -- Multi30K


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
    found = collect(multi30k, images, choice=Choice("val"))
    assert [(item.key, item.captions) for item in found.items] == [("a", ["one 1", "one 2"]), ("b", ["two 1", "two 2"])]
    one_line(RecipeError, "several splits.*one of: val", lambda: collect(multi30k, images))
    with gzip.open(multi30k / "raw/val.2.en.gz", "at") as file:
        file.write("three\n")
    one_line(DataError, "3 lines and val_images.txt 2", lambda: collect(multi30k, images, choice=Choice("val")))


# -- Tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'filepath,title\na.jpg,"one, two"\nb.jpg,three\na.jpg,"fo\nur"\n'),
        ("t.tsv", "caption\timage\none, two\ta.jpg\nthree\tb.jpg\nfo ur\ta.jpg\n"),
        (
            "t.txt",
            "\ufeffimage_name| comment_number| comment\r\na.jpg| 0| one, two\r\nb.jpg| 0| three\r\na.jpg| 1| fo ur\r\n",
        ),
        ("t.csv.gz", "Image;Text\na.jpg;one, two\nb.jpg;three\n\na.jpg;fo ur\n"),
    ],
)
def test_tables_of_every_dress_say_the_same(tmp_path, images, name, text):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = collect(path, images)
    assert found.kind == "table"
    assert [(item.key, item.captions) for item in found.items] == [("a", ["one, two", "fo ur"]), ("b", ["three"])]


def test_a_parquet_table_may_hold_strings_lists_and_image_ids(tmp_path, images):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"image": ["a.jpg", "b.jpg", "sub/c.jpg"], "text": [["one", "two"], None, ["three"]], "image_id": [1, 2, 1]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    found = collect(tmp_path / "t.parquet", images)
    expected = [("a", "1", ["one", "two"]), ("c", "1", ["three"])]  # one picture under two names
    assert [(item.key, item.image_id, item.captions) for item in found.items] == expected
    pq.write_table(pa.table({"image": ["a.jpg"], "text": ["abc"]}), tmp_path / "t.parquet")
    assert collect(tmp_path / "t.parquet", images).items[0].captions == ["abc"]
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    one_line(DataError, "not a readable parquet", lambda: collect(tmp_path / "t.parquet", images))


def test_columns_are_named_where_they_cannot_be_known(tmp_path, images):
    path = tmp_path / "t.csv"
    path.write_text("bild,wort\na.jpg,one\n")
    one_line(RecipeError, "columns bild, wort; .*--image_column", lambda: collect(path, images, kind="table"))
    choice = Choice(image_column="bild", caption_column="Wort")
    assert collect(path, images, kind="table", choice=choice).items[0].captions == ["one"]
    one_line(RecipeError, "no column 'x'", lambda: collect(path, images, kind="table", choice=Choice(image_column="x")))
    path.write_text("image,caption\na.jpg,one, two\n")
    one_line(DataError, "line 2: 3 cells, the header has 2", lambda: collect(path, images))


# -- Folders and tars that hold their images


def test_a_folder_of_pairs_gives_a_caption_a_line(tmp_path):
    for name, text in {"x/1.jpg": "one\n\ntwo\n", "y/1.jpg": "three", "b.v1.png": "four", "alone.jpg": None}.items():
        path = tmp_path / "pairs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
        if text is not None:
            path.with_suffix(".txt").write_text(text)
    found = collect(tmp_path / "pairs")
    assert found.kind == "folder" and found.dropped == {"images without a caption": 1} and found.renamed == 3
    assert {item.key: (item.captions, item.read()) for item in found.items} == {
        "b_v1": (["four"], b"b.v1.png"), "x_1": (["one", "two"], b"x/1.jpg"), "y_1": (["three"], b"y/1.jpg"),
    }  # fmt: skip
    assert [line["source"] for line in found.listed] == ["alone.jpg"]


def img2dataset(folder, tar, samples, stats=None):
    members = {}
    for key, caption in samples.items():
        members[f"{key}.jpg"] = f"image {key}".encode()
        members[f"{key}.json"] = json.dumps({"caption": "of the json", "key": key, "width": 5}).encode()
        members[f"{key}.txt"] = caption.encode()
    packed(folder / tar, members)
    if stats is not None:
        (folder / tar.replace(".tar", "_stats.json")).write_text(json.dumps({"count": 9, "successes": stats}))


def test_img2dataset_tars_are_held_against_their_stats(tmp_path):
    img2dataset(tmp_path, "00000.tar", {"000000001": "one", "000000000": " zero \n"}, stats=2)
    img2dataset(tmp_path, "00001.tar", {"000010000": "", "000010001": "two"}, stats=2)
    found = collect(tmp_path)
    assert [(item.key, item.captions) for item in found.items] == [
        ("000000001", ["one"]), ("000000000", ["zero"]), ("000010001", ["two"]),
    ]  # fmt: skip
    assert found.items[2].read() == b"image 000010001" and found.dropped["images without a caption"] == 1
    assert (
        len(collect(Path(f"{tmp_path}/{{00000..00001}}.tar")).items)
        == len(collect(Path(f"{tmp_path}/*.tar")).items)
        == 3
    )
    one_line(DataError, "1 of 3 tars .*00002.tar", lambda: collect(Path(f"{tmp_path}/{{00000..00002}}.tar")))

    (tmp_path / "00000_stats.json").unlink()
    one_line(DataError, "00000.tar has no 00000_stats.json", lambda: collect(tmp_path))
    (tmp_path / "00000_stats.json").write_text('{"successes": 3}')
    one_line(DataError, "holds 2 images, 00000_stats.json says 3", lambda: collect(tmp_path))
    assert len(collect(tmp_path, allow_missing=True).items) == 3


def test_tars_with_the_same_keys_dots_and_one_without_text(tmp_path):
    img2dataset(tmp_path, "a.tar", {"1": "one", "x.v1": "two", "x.v2": "three"})
    packed(tmp_path / "b.tar", {"1.png": b"P", "1.json": b'{"captions": ["p", "q"], "image_id": 7}', "2.jpg": b"J",
                                "3.txt": b"t", "4.jpg": b"4", "4.json": b'{"caption": "four"}', "l.jpg": None})  # fmt: skip
    found = collect(tmp_path)
    assert {item.key: item.captions for item in found.items} == {
        "a_1": ["one"], "x_v1": ["two"], "x_v2": ["three"], "b_1": ["p", "q"], "4": ["four"],
    }  # fmt: skip
    assert found.items[3].image_id == "7" and found.renamed == 4
    assert found.dropped == {
        "images without a caption": 1, "captions without an image": 1, "links, devices and odd paths": 1,
    }  # fmt: skip


def test_pictures_of_one_name_in_several_tars_or_folders_are_different_images(tmp_path):
    for tar in ("a.tar", "b.tar"):
        img2dataset(tmp_path, tar, {"000": "zero", **({"001": "one"} if tar == "a.tar" else {})})
    assert [item.image_id for item in collect(tmp_path).items] == ["a/000.jpg", "001", "b/000.jpg"]
    assert [item.image_id for item in collect(tmp_path, start=2).items] == ["b/000.jpg"]  # a cut changes no id

    images = tmp_path / "images"
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(name.encode())
    names = ["a/1.jpg", "b/1.jpg", "b/2.jpg", "a/1.jpg"]
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n" + "".join(f"{name},x\n" for name in names))
    sources = [
        (table, True), (written(tmp_path, [{"image": name, "caption": "x"} for name in names]), True),
        (tokens(tmp_path, *(f"{name}#{n}\tx" for n, name in enumerate(names))), False),
        (written(tmp_path, karpathy_json(*((name, "test", {}) for name in names[:3])), "karpathy.json"), False),
    ]  # fmt: skip
    for path, ids_are_names in sources:
        found = collect(path, images)
        assert [item.image_id for item in found.items] == ["a/1.jpg", "b/1.jpg", "2"], path
        assert found.ids_are_names == ids_are_names
    table.write_text(
        "image,caption,image_id\na/1.jpg,x,7\nb/1.jpg,x,7\nb/2.jpg,x,\n"
    )  # a stated id stays, no cell is none
    assert [item.image_id for item in collect(table, images).items] == ["7", "7", "2"]


def test_a_broken_tar_stops_or_gives_what_is_good(tmp_path):
    img2dataset(tmp_path, "a.tar", {str(number): f"caption {number}" for number in range(4)})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:3072] + b"\xff" * 512 + content[3584:])  # the header of 1.jpg
    one_line(DataError, "a.tar: broken header at byte 3,072.*--allow_missing", lambda: collect(tmp_path))
    found = collect(tmp_path, allow_missing=True)
    assert [item.key for item in found.items] == ["0", "2", "3"]
    assert found.dropped == {"broken places in tars": 1, "captions without an image": 1}


# -- Kinds, keys, cuts


def test_kinds_are_told_apart(tmp_path, images):
    assert detect_kind(tokens(tmp_path, "a.jpg#0\tone")) == "flickr"
    assert detect_kind(written(tmp_path, coco([(1, "a.jpg")], []))) == "coco"
    assert detect_kind(written(tmp_path, karpathy_json(("a.jpg", "val", {})))) == "karpathy"
    path = written(tmp_path, [{"picture": "a.jpg", "words": "one"}])
    one_line(DataError, "cannot tell", lambda: detect_kind(path))
    one_line(DataError, "cannot read", lambda: detect_kind(tmp_path / "none.json"))
    one_line(RecipeError, "did you mean 'karpathy'", lambda: collect(path, images, kind="karpaty"))
    assert set(KINDS) == {"flickr", "coco", "karpathy", "albef", "multi30k", "table", "folder", "webdataset"}


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
    assert found.dropped == {"absent images": 2}
    assert [(line["source"], line["reason"]) for line in found.listed] == [("y.jpg", "absent"), ("z.jpg", "absent")]


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
    noise = random.Random(0).randbytes(3000)
    one_line(DataError, "unpack it", lambda: open_images(packed(tmp_path / "j.tar.gz", {"a.jpg": noise}, "w:gz")))
    path = packed(tmp_path / "i.tar", {"a.jpg": b"A" * 4000, "b.jpg": b"B"})
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    one_line(DataError, "cut at byte 2,000, inside a.jpg", lambda: open_images(path))
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
    found = list(KINDS[kind](path, Choice(split), dropped))
    assert len(found) == len({entry.image_id for entry in found}) == count
    assert sum(len(entry.captions) for entry in found) == captions and not dropped.counts
    assert all(clean_caption(caption) and len(caption) > 1 for entry in found for caption in entry.captions)


def test_two_copies_of_flickr30k_agree(data):
    """Multi30K's test split and ALBEF's json hold the same captions of the same images (the README says so)."""
    folder = data / "annotations/flickr30k"
    one = {e.image_id: e.captions for e in KINDS["multi30k"](folder / "multi30k_task2", Choice("test_2016"), Dropped())}
    two = {e.image_id: e.captions for e in KINDS["albef"](folder / "flickr30k_test.json", Choice(), Dropped())}
    assert one.keys() == two.keys()
    same = sum(sorted(map(clean_caption, one[key])) == sorted(map(clean_caption, two[key])) for key in one)
    assert same == 970


def test_the_cc12m_shard_is_read_whole(data):
    found = collect(data / "cc12m_test")
    assert (found.kind, len(found.items), found.dropped, found.renamed) == ("webdataset", 32, {}, 0)
    assert all(len(item.captions) == 1 and item.read()[:3] == b"\xff\xd8\xff" for item in found.items)
    assert found.items[0].key == "000000003" and found.items[0].captions == [
        "Red Square is a city square in Moscow, Russia."
    ]
