"""A manifest is read back as written, and a damaged folder gives a one-line error."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

from data_tools.making.inspection import describe, verify
from data_tools.shards.manifest import (
    Manifest,
    Shard,
    ShardIndex,
    read_index,
    read_index_note,
    read_manifest,
    write_index,
    write_manifest,
)
from runtime.errors import DataError
from runtime.files import sha256_of

ROWS = [("a", 512, 4, "jpg", 1536, 30, "json", 20, 10, 2), ("bé", 2560, 9, "png", 3584, 7, "txt", 30, 40, 1)]


@pytest.fixture
def folder(tmp_path):
    """A folder of two shards, with texts where the index says and nothing for images."""
    shards = []
    for number, rows in enumerate([ROWS, ROWS[:1]]):
        name = f"shard-{number:06d}"
        content = bytearray(4096)
        content[1536:1566] = b'{"captions": ["one two", "3"]}'
        content[3584:3591] = b"a b c d"
        (tmp_path / f"{name}.tar").write_bytes(content)
        index = tmp_path / f"{name}.parquet"
        write_index(index, ShardIndex.from_rows(rows))
        hashes = sha256_of(tmp_path / f"{name}.tar"), sha256_of(index)
        captions = sum(row[-1] for row in rows)
        shards.append(Shard(f"{name}.tar", len(rows), captions, 4096, hashes[0], index.name, hashes[1]))
    write_manifest(Manifest(tmp_path, tuple(shards), {"kind": "test"}, {"absent images": 3}))
    return tmp_path


def test_a_manifest_reads_back_as_it_was_written(folder):
    manifest = read_manifest(folder)
    assert (manifest.samples, manifest.captions, manifest.bytes) == (3, 5, 8192)
    assert [shard.name for shard in manifest.shards] == ["shard-000000.tar", "shard-000001.tar"]
    assert manifest.source == {"kind": "test"} and manifest.dropped == {"absent images": 3}
    value = json.loads((folder / "manifest.json").read_text())
    assert (value["format"], value["version"], value["samples"]) == ("ligature-shards", 1, 3)


def test_the_fingerprint_depends_on_content_and_order_not_on_the_place(folder, tmp_path_factory):
    manifest = read_manifest(folder)
    moved = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, moved)
    assert read_manifest(moved).fingerprint == manifest.fingerprint
    assert Manifest(folder, manifest.shards[::-1]).fingerprint != manifest.fingerprint
    assert Manifest(folder, manifest.shards[:1]).fingerprint != manifest.fingerprint


def test_an_index_reads_back_with_its_types_and_note(tmp_path):
    path = tmp_path / "index.parquet"
    write_index(path, ShardIndex.from_rows(ROWS), {"why": "é"})
    index = read_index(path)
    assert len(index) == 2 and index.key == ["a", "bé"] and index.image_format == ["jpg", "png"]
    assert index.image_offset.tolist() == [512, 2560] and index.image_offset.dtype == np.int64
    assert index.width.dtype == index.captions.dtype == np.int32
    assert read_index_note(path) == {"why": "é"}
    write_index(path, ShardIndex.from_rows([]))
    assert len(read_index(path)) == 0 and read_index_note(path) == {}


def test_an_index_has_the_promised_columns(tmp_path):
    import pyarrow.parquet as pq

    write_index(tmp_path / "index.parquet", ShardIndex.from_rows(ROWS))
    schema = pq.read_schema(tmp_path / "index.parquet")
    actual = {name: str(schema.field(name).type) for name in schema.names}
    long, short = "int64", "int32"
    assert actual == {
        "key": "string", "image_offset": long, "image_size": long, "image_format": "string", "text_offset": long,
        "text_size": long, "text_format": "string", "width": short, "height": short, "captions": short, "image_id": long,
    }  # fmt: skip


def test_image_ids_join_samples_of_one_picture_and_older_indexes_are_still_read(tmp_path):
    import pyarrow.parquet as pq

    index = ShardIndex.from_rows([ROWS[0], ROWS[1], ("c", *ROWS[1][1:])], ["7", "9", "7"])
    write_index(tmp_path / "index.parquet", index)
    actual = read_index(tmp_path / "index.parquet").image_id
    assert actual[0] == actual[2] != actual[1] and actual.dtype == np.int64 and (actual >= 0).all()
    # BLAKE2b's first 8 bytes, big-endian, without the last bit: stated by the standard library, not by our function.
    assert actual[0] == int(hashlib.blake2b(b"7", digest_size=8).hexdigest(), 16) // 2

    pq.write_table(pq.read_table(tmp_path / "index.parquet").drop_columns(["image_id"]), tmp_path / "old.parquet")
    old = read_index(tmp_path / "old.parquet")
    assert (
        len(set(old.image_id)) == 3
        and (old.image_id == ShardIndex.from_rows([(k, *ROWS[0][1:]) for k in old.key]).image_id).all()
    )


def replace(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no shard folder"),
        (lambda folder: (folder / "manifest.json").unlink(), "ligature inspect --index"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "not a manifest"),
        (lambda folder: replace(folder, format="other"), "not a manifest"),
        (lambda folder: replace(folder, version=9), "version 9"),
        (lambda folder: replace(folder, samples=4), "altered"),
        (lambda folder: replace(folder, shards=[{"name": "x"}]), "incomplete or altered"),
        (lambda folder: (folder / "shard-000001.tar").unlink(), "shard-000001.tar is missing"),
        (lambda folder: (folder / "shard-000001.parquet").unlink(), "shard-000001.parquet is missing"),
        (lambda folder: (folder / "shard-000000.tar").write_bytes(b"short"), "5 bytes, not 4,096"),
    ],
)
def test_a_damaged_folder_gives_a_one_line_error(folder, harm, words):
    harm(folder)
    with pytest.raises(DataError, match=words) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"PAR1 but not really"])
def test_a_missing_or_foreign_index_gives_a_one_line_error(tmp_path, content):
    path = tmp_path / "index.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="index.parquet") as caught:
        read_index(path)
    assert "\n" not in str(caught.value)


def test_verify_finds_damage_that_only_hashes_show_and_lists_all_of_it(folder):
    assert verify(folder, full=True).samples == 3
    for name in ("shard-000000.tar", "shard-000001.parquet"):
        content = bytearray((folder / name).read_bytes())
        content[100] ^= 1
        (folder / name).write_bytes(content)
    verify(folder)  # sizes are right
    with pytest.raises(DataError, match=r"shard-000000.tar has other bytes.*shard-000001.parquet has other bytes"):
        verify(folder, full=True)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match="shard-000001.tar is missing"):
        verify(folder)


def test_describe_measures_captions_and_sides(folder):
    actual = describe(folder)
    assert (actual["samples"], actual["captions"], actual["shards"]) == (3, 5, 2)
    assert actual["image_formats"] == {"jpg": 2, "png": 1}
    assert actual["quantiles"]["caption_words"]["1"] == 4 and actual["quantiles"]["caption_words"]["0"] == 1
    assert actual["quantiles"]["shorter_side"]["1"] == 30
