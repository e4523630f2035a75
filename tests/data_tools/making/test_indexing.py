"""Tars made elsewhere become a shard folder in place, unchanged, and bad samples are listed."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_tools.making.indexing import index_folder
from data_tools.making.inspection import describe, verify
from data_tools.making.writer import ShardOptions, shard
from data_tools.shards.manifest import read_index, read_manifest
from data_tools.shards.reader import ShardReader
from launch.cli import main
from runtime.errors import DataError


def picture(seed=0, size=(24, 16), form="JPEG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def packed(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def samples(first, count, text="a caption"):
    for number in range(first, first + count):
        yield f"{number:09d}.jpg", picture(number)
        yield f"{number:09d}.txt", f"{text} {number}".encode()


@pytest.fixture
def folder(tmp_path):
    """Two tars as img2dataset leaves them, with stats and its own parquet."""
    folder = tmp_path / "cc"
    folder.mkdir()
    for number in range(2):
        packed(folder / f"0000{number}.tar", samples(10 * number, 3))
        (folder / f"0000{number}_stats.json").write_text('{"count": 5, "successes": 3}')
        (folder / f"0000{number}.parquet").write_bytes(b"img2dataset's own")
    return folder


def test_the_cc12m_shard_is_first_class_and_agrees_with_webdataset(shared_data, tmp_path):
    import webdataset

    shutil.copytree(shared_data / "data/cc12m_test", tmp_path / "cc")
    (tar,) = (tmp_path / "cc").glob("*.tar")
    before = tar.read_bytes()
    manifest = index_folder(tmp_path / "cc", workers=1)
    assert (manifest.samples, manifest.captions, manifest.dropped) == (32, 32, {}) and tar.read_bytes() == before
    reader = ShardReader(tmp_path / "cc")
    theirs = list(webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False))
    assert [reader[n].key for n in range(32)] == [sample["__key__"] for sample in theirs]
    for number, sample in enumerate(theirs):
        raw, metadata = reader[number], json.loads(sample["json"])
        assert raw.image == sample["jpg"] and raw.captions == [sample["txt"].decode().strip()]
    index = read_index(tar.with_suffix(".index.parquet"))
    sizes = [Image.open(io.BytesIO(sample["jpg"])).size for sample in theirs]
    assert (
        list(zip(index.width.tolist(), index.height.tolist(), strict=True)) == sizes
        and metadata["width"] == sizes[-1][0]
    )
    assert verify(tmp_path / "cc", full=True).fingerprint == manifest.fingerprint


def test_indexing_again_takes_up_what_is_new_and_touches_nothing_else(folder):
    first = index_folder(folder, workers=1)
    assert (first.samples, len(first.shards)) == (6, 2) and not first.dropped
    assert (folder / "00000.parquet").read_bytes() == b"img2dataset's own"
    moment = (folder / "00000.index.parquet").stat().st_mtime_ns
    packed(folder / "00002.tar", samples(20, 2))
    packed(folder / "00001.tar", samples(10, 4))
    second = index_folder(folder, workers=1)
    assert second.samples == 9 and (folder / "00000.index.parquet").stat().st_mtime_ns == moment
    reasons = [json.loads(line)["reason"] for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert reasons == ["00001.tar holds 4 images, 00001_stats.json says 3"]


def test_slices_index_their_own_tars(folder):
    assert index_folder(folder, 1, (1, 2)) is None and not (folder / "00000.index.parquet").exists()
    whole = index_folder(folder, 1, (0, 2))
    for path in folder.glob("*.index.parquet"):
        path.unlink()
    assert index_folder(folder, 1).fingerprint == whole.fingerprint


def test_bad_samples_are_left_out_and_listed_and_good_ones_kept(tmp_path):
    captions = json.dumps({"captions": ["one", "two"], "image_id": 7}).encode()
    members = [
        ("a.jpg", picture(1)), ("a.json", captions), ("a.txt", b"not this"), ("b.v1.png", picture(2, form="PNG")),
        ("b.v1.txt", b"dotted"), ("no text.jpg", picture(3)), ("d.jpg", b"<html>"), ("d.txt", b"no image"),
        ("e.txt", b"alone"), ("f.jpg", picture(4)), ("f.txt", b"\xff\xfe"), ("g.jpg", picture(5)), ("g.txt", b" \n"),
        ("sub/a.jpg", picture(6)), ("sub/a.txt", b"the same key"), ("h.jpg", picture(7)), ("h.json", b"{broken"),
        ("h.txt", b"json is broken"), ("i.jpg", picture(8)), ("i.json", b'{"captions": ["abc", 1]}'), ("j.jpg", picture(10)), ("j.json", b'{"captions": "a lone string"}'), ("z.jpg", picture(9)), ("z.txt", b"cut"),
    ]  # fmt: skip
    packed(tmp_path / "x.tar", members)
    with tarfile.open(tmp_path / "x.tar") as tar:
        end = tar.getmember("z.jpg").offset_data
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[: end + 100])
    manifest = index_folder(tmp_path, workers=1)
    reader = ShardReader(tmp_path)
    actual = {reader[n].key: reader[n].captions for n in range(len(reader))}
    assert actual == {
        "a": ["one", "two"],
        "b_v1": ["dotted"],
        "a_2": ["the same key"],
        "h": ["json is broken"],
        "j": ["a lone string"],
    }
    assert manifest.dropped == {
        "broken places in tars": 1, "images without a caption": 4, "unreadable images": 1, "captions without an image": 1,
    }  # fmt: skip
    assert manifest.source["keys_made_safe"] == 2
    listed = {json.loads(line)["source"] for line in (tmp_path / "dropped.jsonl").read_text().splitlines()}
    assert listed == {"x.tar", *(f"x.tar/{name}" for name in ("no text", "d", "e", "f", "g", "i"))}


def test_keys_shared_by_tars_get_their_tars_name(tmp_path):
    for name in ("a", "b"):
        packed(tmp_path / f"{name}.tar", samples(0, 2, name))
    manifest = index_folder(tmp_path, workers=1)
    keys = [key for shard in manifest.shards for key in read_index(tmp_path / shard.index).key]
    assert keys == ["a_000000000", "a_000000001", "b_000000000", "b_000000001"]
    assert manifest.source["keys_begin_with_tar"] and manifest.source["keys_made_safe"] == 4
    image_ids = [n for shard in manifest.shards for n in read_index(tmp_path / shard.index).image_id]
    assert len(set(image_ids)) == 4  # two pictures of one name are two pictures
    packed(tmp_path / "c.tar", samples(0, 1))
    assert index_folder(tmp_path, workers=1).samples == 5


def ids(*folders):
    reader = ShardReader({str(folder): folder for folder in folders})
    actual = [sample.image_id for sample in reader.read(range(len(reader)))]
    assert actual == [reader[number].image_id for number in range(len(reader))] and min(actual) >= 0
    return actual


def test_a_file_name_is_another_picture_in_another_folder_and_a_stated_id_is_not(tmp_path):
    for name in ("cc", "sbu", "coco"):
        (tmp_path / name).mkdir()
        packed(tmp_path / name / "0.tar", samples(0, 2, name))
    cc, sbu, coco, small = (tmp_path / name for name in ("cc", "sbu", "coco", "small"))
    stated = [(f"{n}.{kind}", data) for n in range(2) for kind, data in [
        ("jpg", picture(n)), ("json", json.dumps({"captions": ["x"], "image_id": f"{n:09d}"}).encode()),
    ]]  # fmt: skip
    packed(coco / "0.tar", stated)
    assert [index_folder(folder, workers=1).ids_are_names for folder in (cc, sbu, coco)] == [True, True, False]
    assert ids(cc) == ids(sbu) == ids(coco)  # alone each has the ids of its index
    assert len(set(ids(cc, sbu, coco))) == 6
    shutil.copytree(coco, tmp_path / "again")
    shutil.copytree(cc, tmp_path / "copy")
    assert len(set(ids(coco, tmp_path / "again"))) == len(set(ids(cc, tmp_path / "copy"))) == 2

    # Written anew, and written anew once more: the ids are in the json by then, and are names all the same.
    for source, out, names in [(cc, small, True), (small, tmp_path / "smaller", True), (coco, tmp_path / "o", False)]:
        assert shard(ShardOptions(source, out, resize_shorter=12, workers=1)).ids_are_names == names
        assert read_manifest(out).ids_are_names == names and ids(out) == ids(cc)
    assert len(set(ids(small, sbu))) == 4

    for folder in (cc, sbu):  # a manifest of before says nothing
        value = json.loads((folder / "manifest.json").read_text())
        del value["ids_are_names"]
        (folder / "manifest.json").write_text(json.dumps(value))
    assert len(set(ids(cc, sbu))) == 2


def test_folders_that_are_not_foreign_are_refused(drawn, tmp_path):
    with pytest.raises(DataError, match="made by `ligature shard`"):
        index_folder(drawn / "test")
    with pytest.raises(DataError, match="no tars in"):
        index_folder(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        index_folder(tmp_path / "none")
    packed(tmp_path / "x.tar", [("a.jpg", b"no"), ("a.txt", b"x")])
    with pytest.raises(DataError, match="no sample of .* see .*dropped.jsonl"):
        index_folder(tmp_path, workers=1)


# -- The command


def test_the_command_indexes_verifies_describes_and_writes_a_page(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["inspect", str(folder)]) == 1 and "ligature inspect --index" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--index", "--full", "--html", str(page), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "samples       6" in out and "caption words" in out and str(page) in out
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 6 and "http" not in text and "a caption 12" in text
    assert "<script" not in text and text.count("<figure>") == 6
    content = bytearray((folder / "00001.tar").read_bytes())
    content[600] ^= 1
    (folder / "00001.tar").write_bytes(content)
    assert main(["inspect", str(folder), "--quick"]) == 0
    assert main(["inspect", str(folder), "--full", "--workers", "1"]) == 1
    assert "00001.tar has other bytes" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--quick", "--full"]) == 2
    assert main(["inspect", str(folder), "--slice", "0/2"]) == 2


def test_describe_reads_captions_of_a_part_of_many_samples(folder, monkeypatch):
    index_folder(folder, workers=1)
    monkeypatch.setattr("data_tools.making.inspection.CAPTIONS_READ", 4)
    actual = describe(folder)
    assert (actual["captions_read_of"], actual["samples"], actual["images"]) == (3, 6, 6)
    assert read_manifest(folder).captions == 6
