"""Collecting: lists of names, cuts, keys, image ids, and what is dropped or absent."""

from __future__ import annotations

import pytest
from source_files import karpathy_json, raises_one_line, write_img2dataset, write_tokens, write_value

from data_tools.sources import Choice, collect
from runtime.errors import DataError, RecipeError


@pytest.mark.parametrize("names", ["b.jpg\na.jpg\n", "b\na", "elsewhere/b.jpg\r\na.jpg\r\n\r\n"])
def test_a_list_of_names_chooses_but_does_not_order(tmp_path, images, names):
    path = write_tokens(tmp_path, "a.jpg#0\tone", "c.jpg#0\tthree", "b.jpg#0\ttwo")
    (tmp_path / "names.txt").write_text(names)
    assert [item.key for item in collect(path, images, names=tmp_path / "names.txt").items] == ["a", "b"]


def test_a_listed_image_without_captions_is_counted_and_a_foreign_list_is_refused(tmp_path, images):
    path = write_tokens(tmp_path, "a.jpg#0\tone")
    (tmp_path / "names.txt").write_text("a.jpg\nz.jpg\n")
    assert collect(path, images, names=tmp_path / "names.txt").dropped == {"images without a caption": 1}
    (tmp_path / "names.txt").write_text("y.jpg\nz.jpg\n")
    raises_one_line(DataError, "none of the 2 images", lambda: collect(path, images, names=tmp_path / "names.txt"))


def test_empty_captions_are_counted_and_their_images_dropped(tmp_path, images):
    path = write_tokens(tmp_path, "a.jpg#0\t ", "a.jpg#1\tone", "b.jpg#0\t", "b.jpg#1\t\u2003")
    collected = collect(path, images)
    assert [(item.key, item.captions) for item in collected.items] == [("a", ["one"])]
    assert collected.dropped == {"empty captions": 3, "images without a caption": 1}


def test_a_split_of_a_file_without_splits_is_refused(tmp_path, images):
    path = write_tokens(tmp_path, "a.jpg#0\tone")
    raises_one_line(RecipeError, "--names", lambda: collect(path, images, choice=Choice("train")))


def test_pictures_of_one_name_in_several_tars_or_folders_are_different_images(tmp_path):
    for tar in ("a.tar", "b.tar"):
        write_img2dataset(tmp_path, tar, {"000": "zero", **({"001": "one"} if tar == "a.tar" else {})})
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
        (table, True), (write_value(tmp_path, [{"image": name, "caption": "x"} for name in names]), True),
        (write_tokens(tmp_path, *(f"{name}#{n}\tx" for n, name in enumerate(names))), False),
        (write_value(tmp_path, karpathy_json(*((name, "test", {}) for name in names[:3])), "karpathy.json"), False),
    ]  # fmt: skip
    for path, ids_are_names in sources:
        collected = collect(path, images)
        assert [item.image_id for item in collected.items] == ["a/1.jpg", "b/1.jpg", "2"], path
        assert collected.ids_are_names == ids_are_names
    table.write_text(
        "image,caption,image_id\na/1.jpg,x,7\nb/1.jpg,x,7\nb/2.jpg,x,\n"
    )  # a stated id stays, no cell is none
    assert [item.image_id for item in collect(table, images).items] == ["7", "7", "2"]


def test_colliding_keys_are_refused(tmp_path, images):
    for name in ("x.y.jpg", "x_y.jpg"):
        (images / name).write_bytes(b"x")
    path = write_tokens(tmp_path, "x.y.jpg#0\tone")
    assert collect(path, images).renamed == 1
    path = write_tokens(tmp_path, "x.y.jpg#0\tone", "x_y.jpg#0\ttwo")
    raises_one_line(DataError, "x.y.jpg and x_y.jpg share the key x_y", lambda: collect(path, images))


def test_cuts_of_a_source_never_overlap(tmp_path, images):
    path = write_tokens(tmp_path, "a.jpg#0\tone", "b.jpg#0\t", "c.jpg#0\tthree")
    assert [item.key for item in collect(path, images, count=2).items] == ["a"]  # b has no caption, c is not its heir
    assert [item.key for item in collect(path, images, start=2).items] == ["c"]
    raises_one_line(RecipeError, "past the end", lambda: collect(path, images, start=3))


def test_absent_images_stop_or_are_counted(tmp_path, images):
    path = write_tokens(tmp_path, "y.jpg#0\tx", "a.jpg#0\tone", "z.jpg#0\tx")
    raises_one_line(DataError, "2 of 3 images .* the first: y.jpg.*--allow_missing", lambda: collect(path, images))
    collected = collect(path, images, allow_missing=True)
    assert [item.key for item in collected.items] == ["a"]
    assert collected.dropped == {"absent images": 2}
    assert [(line["source"], line["reason"]) for line in collected.listed] == [("y.jpg", "absent"), ("z.jpg", "absent")]
