"""Images to index are found in folders and tars of any shape, and unreadable ones are named with their reason."""

from __future__ import annotations

import io
import os
import shutil
import tarfile

import pytest
import torch
from PIL import Image

from data_tools.in_order.gallery import find_images, open_gallery
from data_tools.pixels.transforms import EvaluationTransform
from data_tools.shards.manifest import read_manifest
from runtime.errors import DataError

LOOK = EvaluationTransform(16)


def picture(colour: str, kind: str = "PNG") -> bytes:
    room = io.BytesIO()
    Image.new("RGB", (20, 24), colour).save(room, kind)
    return room.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name, content in {
        "b.PNG": picture("red"),
        "a/deep/er/c.jpg": picture("blue", "JPEG"),
        "a/d.bmp": picture("white", "BMP"),
        "a/broken.png": picture("red")[:40],
        "z.webp": b"",
        "notes.txt": b"no image",
        ".hidden.png": picture("red"),
        ".cache/e.png": picture("red"),
    }.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "photos"


def test_images_are_found_at_any_depth_of_a_folder(folder):
    gallery = open_gallery(str(folder))
    names = ["a/broken.png", "a/d.bmp", "a/deep/er/c.jpg", "b.PNG", "z.webp"]
    assert [gallery.name(number) for number in range(len(gallery))] == names == find_images(folder)
    (first, last) = gallery.batches(LOOK, range(5), 3, 0)
    assert first.numbers == [1, 2] and first.pixels.shape == (2, 3, 16, 16) and last.numbers == [3]
    assert torch.equal(last.pixels[0], LOOK(Image.new("RGB", (20, 24), "red")))
    assert [number for number, _ in first.broken + last.broken] == [0, 4]
    assert all(reason for _, reason in first.broken + last.broken)


def test_workers_give_the_same_batches(folder):
    gallery = open_gallery(str(folder))
    alone, helped = (list(gallery.batches(LOOK, range(5), 2, workers)) for workers in (0, 2))
    assert [one.numbers for one in alone] == [one.numbers for one in helped]
    assert [one.broken for one in alone] == [one.broken for one in helped]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(alone, helped, strict=True) if a.pixels is not None)


def test_a_batch_may_hold_only_unreadable_images(folder):
    (only,) = open_gallery(str(folder)).batches(LOOK, range(4, 5), 3, 0)
    assert only.pixels is None and only.numbers == [] and len(only.broken) == 1


def test_a_stored_list_of_names_is_kept(folder):
    listed = open_gallery(str(folder))
    (folder / "new.png").write_bytes(picture("red"))
    (folder / "b.PNG").unlink()
    again = open_gallery(str(folder), listed.names)
    assert len(again) == 5 and again.fingerprint == listed.fingerprint != open_gallery(str(folder)).fingerprint
    (batch,) = again.batches(LOOK, range(3, 4), 1, 0)
    assert batch.broken == [(3, "No such file or directory")]


def test_a_name_that_is_no_utf_8_is_listed(folder):
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write(picture("red"))
    gallery = open_gallery(str(folder))
    number = next(n for n in range(len(gallery)) if "\\xff" in gallery.name(n))
    (batch,) = gallery.batches(LOOK, range(number, number + 1), 1, 0)
    assert "UTF-8" in batch.broken[0][1]


def test_images_of_a_tar_are_read(folder, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(folder, "photos")
    gallery = open_gallery(str(tmp_path / "photos.tar"))
    names = {gallery.name(number) for number in range(len(gallery))}
    assert {f"photos/{name}" for name in find_images(folder)} <= names
    found = [batch for batch in gallery.batches(LOOK, range(len(gallery)), 1, 0) if batch.numbers]
    assert {gallery.name(batch.numbers[0]) for batch in found} >= {"photos/b.PNG", "photos/a/d.bmp"}


def test_images_of_missing_and_truncated_shards_are_listed_as_broken(drawn, tmp_path):
    out = tmp_path / "train"
    shutil.copytree(drawn / "train", out)
    shards = [out / shard.name for shard in read_manifest(out).shards]
    shards[0].unlink()
    os.truncate(shards[1], shards[1].stat().st_size // 2)
    gallery = open_gallery(str(out))
    batches = list(gallery.batches(LOOK, range(len(gallery)), 8, 0))
    good = [number for batch in batches for number in batch.numbers]
    broken = [number for batch in batches for number, _ in batch.broken]
    assert len(good) + len(broken) == 64 and set(range(16)) <= set(broken) and set(range(32, 64)) <= set(good)
    assert 16 < len(broken) < 32
    assert len(gallery.captions(40)) >= 1 and gallery.captions(0) == []
    assert batches[0].broken[0][1] == "the shard is missing"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no images at"),
        (lambda folder: folder.mkdir(), "holds no images"),
        (lambda folder: (folder.mkdir(), (folder / "0.tar").write_bytes(b"")), "inspect .* --index"),
        (lambda folder: folder.write_bytes(b"x" * 2000), "tar"),
    ],
)
def test_an_empty_gallery_is_refused(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(DataError, match=message):
        open_gallery(str(tmp_path / "x"))
