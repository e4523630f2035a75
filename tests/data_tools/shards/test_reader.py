"""The reader finds any sample by the index and reports bad samples in one line."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import tarfile

import pytest

from data_tools.shards import reader as module
from data_tools.shards.manifest import Manifest, Shard, ShardIndex, write_index, write_manifest
from data_tools.shards.reader import BrokenSample, RawSample, ShardReader
from runtime.errors import DataError
from runtime.files import sha256_of

TEXTS = [
    ("one", "json", json.dumps({"captions": ["a café", "two"]}).encode()),
    ("two", "txt", b" a single caption \n"),
    ("not_utf8", "txt", b"caf\xe9"),
    ("not_json", "json", b'{"captions": ['),
    ("no_captions", "json", b'{"words": []}'),
    ("empty", "json", b'{"captions": []}'),
    ("numbers", "json", b'{"captions": [1]}'),
    ("an_object", "json", b'{"captions": {"a": "b"}}'),
    ("too_deep", "json", b'{"captions": ' + b"[" * 100_000),
]


@pytest.fixture
def folder(tmp_path):
    """Two shards with the same samples but for their names."""
    shards = []
    for number in range(2):
        tar_path, rows = tmp_path / f"{number}.tar", []
        with tarfile.open(tar_path, "w", format=tarfile.GNU_FORMAT) as tar:
            for key, kind, text in TEXTS:
                places = []
                for extension, data in (("jpg", f"{key}{number}".encode()), (kind, text)):
                    member = tarfile.TarInfo(f"{key}{number}.{extension}")
                    member.size = len(data)
                    places += [tar.offset + tarfile.BLOCKSIZE, len(data)]
                    tar.addfile(member, io.BytesIO(data))
                rows.append((f"{key}{number}", *places[:2], "jpg", *places[2:], kind, 4, 3, 1))
        index = tmp_path / f"{number}.parquet"
        write_index(index, ShardIndex.from_rows(rows))
        sizes = len(rows), len(rows), tar_path.stat().st_size
        shards.append(Shard(tar_path.name, *sizes, sha256_of(tar_path), index.name, sha256_of(index)))
    write_manifest(Manifest(tmp_path, tuple(shards)))
    return tmp_path


def test_samples_are_numbered_through_the_shards(folder):
    reader = ShardReader(folder)
    assert len(reader) == 2 * len(TEXTS)
    assert [reader.key(sample) for sample in (0, 1, 9, 10, 16)] == ["one0", "two0", "one1", "two1", "an_object1"]
    assert reader.locate(8) == (0, 8) and reader.locate(9) == (1, 0)


def test_a_sample_has_its_bytes_and_its_captions(folder):
    sample = ShardReader(folder)[9]
    assert (sample.key, sample.shard, sample.image, sample.captions) == ("one1", "1.tar", b"one1", ["a café", "two"])


def test_a_text_member_is_one_caption(folder):
    assert ShardReader(folder).captions(1) == ["a single caption"]


def test_a_string_is_one_caption():
    sample = RawSample("key", "0.tar", b"", b'{"captions": "red dog"}', "json", 0)
    assert sample.captions == ["red dog"]


@pytest.mark.parametrize("sample", range(2, len(TEXTS)), ids=[key for key, _, _ in TEXTS[2:]])
def test_invalid_captions_give_a_one_line_error_with_the_key(folder, sample):
    with pytest.raises(DataError, match=f"sample {TEXTS[sample][0]}0: ") as error:
        ShardReader(folder).captions(sample)
    assert "\n" not in str(error.value)


def test_a_huge_member_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 3)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("it was read"))
    with pytest.raises(DataError, match="sample one0: a member of 4 bytes is more than 3"):
        ShardReader(folder)[0]


def test_a_reader_sent_to_another_process_opens_its_own_files(folder):
    reader = ShardReader(folder)
    assert reader[0].image == b"one0"
    sent = pickle.loads(pickle.dumps(reader))
    reader.close()
    assert sent[0].image == b"one0"


def test_no_more_shards_stay_open_than_stated(folder, monkeypatch):
    monkeypatch.setattr(module, "OPEN_SHARDS", 1)
    reader = ShardReader(folder)
    before = len(os.listdir("/proc/self/fd"))
    for sample in (0, 9, 0, 9, 1, 10):
        assert reader[sample].key == TEXTS[sample % 9][0] + str(sample // 9)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_index_that_cannot_be_read_leaves_no_file_open(folder):
    reader = ShardReader(folder)
    (folder / "0.parquet").write_bytes(b"PAR1 nothing")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(DataError, match=r"its index 0\.parquet cannot be read"):
            reader[0]
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_fails_costs_the_samples_it_fails_at(folder, monkeypatch):
    read, reader = os.pread, ShardReader(folder)
    bad = reader.read([1])[0].image

    def failing(descriptor, length, offset):
        data = read(descriptor, length, offset)
        if bad in data:
            raise OSError(errno.EIO, "Input/output error")
        return data

    monkeypatch.setattr(module.os, "pread", failing)
    results = reader.read(range(3))
    assert [sample.key for sample in results] == ["one0", "two0", "not_utf80"]
    assert [isinstance(sample, BrokenSample) for sample in results] == [False, True, False]
    assert "Input/output error" in results[1].reason
