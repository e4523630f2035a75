"""WebDataset tars: captions, keys, img2dataset's counts, and damage."""

from __future__ import annotations

from pathlib import Path

from source_files import raises_one_line, write_img2dataset, write_tar

from data_tools.sources import collect
from runtime.errors import DataError


def test_img2dataset_tars_are_held_against_their_stats(tmp_path):
    write_img2dataset(tmp_path, "00000.tar", {"000000001": "one", "000000000": " zero \n"}, stats=2)
    write_img2dataset(tmp_path, "00001.tar", {"000010000": "", "000010001": "two"}, stats=2)
    collected = collect(tmp_path)
    assert [(item.key, item.captions) for item in collected.items] == [
        ("000000001", ["one"]), ("000000000", ["zero"]), ("000010001", ["two"]),
    ]  # fmt: skip
    assert collected.items[2].read() == b"image 000010001" and collected.dropped["images without a caption"] == 1
    assert (
        len(collect(Path(f"{tmp_path}/{{00000..00001}}.tar")).items)
        == len(collect(Path(f"{tmp_path}/*.tar")).items)
        == 3
    )
    raises_one_line(DataError, "1 of 3 tars .*00002.tar", lambda: collect(Path(f"{tmp_path}/{{00000..00002}}.tar")))

    (tmp_path / "00000_stats.json").unlink()
    raises_one_line(DataError, "00000.tar has no 00000_stats.json", lambda: collect(tmp_path))
    (tmp_path / "00000_stats.json").write_text('{"successes": 3}')
    raises_one_line(DataError, "holds 2 images, 00000_stats.json says 3", lambda: collect(tmp_path))
    assert len(collect(tmp_path, allow_missing=True).items) == 3


def test_tars_with_the_same_keys_dots_and_one_without_text(tmp_path):
    write_img2dataset(tmp_path, "a.tar", {"1": "one", "x.v1": "two", "x.v2": "three"})
    write_tar(tmp_path / "b.tar", {"1.png": b"P", "1.json": b'{"captions": ["p", "q"], "image_id": 7}', "2.jpg": b"J",
                                "3.txt": b"t", "4.jpg": b"4", "4.json": b'{"caption": "four"}', "l.jpg": None})  # fmt: skip
    collected = collect(tmp_path)
    assert {item.key: item.captions for item in collected.items} == {
        "a_1": ["one"], "x_v1": ["two"], "x_v2": ["three"], "b_1": ["p", "q"], "4": ["four"],
    }  # fmt: skip
    assert collected.items[3].image_id == "7" and collected.renamed == 4
    assert collected.dropped == {
        "images without a caption": 1, "captions without an image": 1, "links, devices and odd paths": 1,
    }  # fmt: skip


def test_a_broken_tar_stops_or_gives_its_good_samples(tmp_path):
    write_img2dataset(tmp_path, "a.tar", {str(number): f"caption {number}" for number in range(4)})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:3072] + b"\xff" * 512 + content[3584:])  # the header of 1.jpg
    raises_one_line(DataError, "a.tar: broken header at byte 3,072.*--allow_missing", lambda: collect(tmp_path))
    collected = collect(tmp_path, allow_missing=True)
    assert [item.key for item in collected.items] == ["0", "2", "3"]
    assert collected.dropped == {"broken places in tars": 1, "captions without an image": 1}


def test_the_cc12m_shard_is_read_whole(data):
    collected = collect(data / "cc12m_test")
    assert (collected.kind, len(collected.items), collected.dropped, collected.renamed) == ("webdataset", 32, {}, 0)
    assert all(len(item.captions) == 1 and item.read()[:3] == b"\xff\xd8\xff" for item in collected.items)
    assert collected.items[0].key == "000000003" and collected.items[0].captions == [
        "Red Square is a city square in Moscow, Russia."
    ]
