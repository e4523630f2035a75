"""Shards are plain WebDataset with the same bytes after any kills, and nothing broken has a final name."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiny_shards import write_shards

from data_tools.making.inspection import verify
from data_tools.making.shard_file import Encoding
from data_tools.making.writer import ShardOptions, shard
from data_tools.shards.manifest import read_index, read_manifest
from data_tools.sources import CaptionedImage, collect
from runtime.errors import DataError, LigatureError, RecipeError

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("LIGATURE_SHARED", ROOT.parent / "shared"))


def picture(seed, size=(40, 30), form="JPEG", mode="RGB", **options):
    """An encoded image of noise: no two alike, and no smaller than its pixels deserve."""
    shape = (*size[::-1], len(mode)) if len(mode) > 1 else size[::-1]
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def make_source(folder, count=10, size=(40, 30)):
    """A token file with two captions an image, and its images."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "captions.token", "w", encoding="utf-8") as file:
        for number in range(count):
            (folder / f"image{number:02d}.jpg").write_bytes(picture(number, size))
            file.write(f"image{number:02d}.jpg#0\tscene {number}\nimage{number:02d}.jpg#1\tthe café {number}\n")
    return folder / "captions.token"


def items_of(annotation):
    return collect(annotation, annotation.parent).items


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def reference(source, tmp_path_factory):
    """The folder an uninterrupted run in one process gives: 10 images, 3 a shard."""
    out = tmp_path_factory.mktemp("reference") / "shards"
    write_shards(items_of(source), out, shard_samples=3, workers=1, source={"kind": "flickr"})
    return out


# -- What is written


def test_webdataset_reads_the_shards(source, reference):
    import webdataset

    manifest = read_manifest(reference)
    assert [shard.samples for shard in manifest.shards] == [3, 3, 3, 1]
    tars = [str(reference / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    items = items_of(source)
    assert [sample["__key__"] for sample in samples] == [item.key for item in items]
    for sample, item in zip(samples, items, strict=True):
        assert sample["jpg"] == item.read()
        expected = {"captions": item.captions, "image_id": item.image_id, "source": item.source}
        assert json.loads(sample["json"]) == expected


def test_the_index_gives_every_member_by_one_seek(source, reference):
    items = {item.key: item for item in items_of(source)}
    for shard_ in read_manifest(reference).shards:
        index = read_index(reference / shard_.index)
        tar = os.open(reference / shard_.name, os.O_RDONLY)
        for row, key in enumerate(index.key):
            image = os.pread(tar, int(index.image_size[row]), int(index.image_offset[row]))
            text = os.pread(tar, int(index.text_size[row]), int(index.text_offset[row]))
            assert image == items.pop(key).read() and len(json.loads(text)["captions"]) == index.captions[row] == 2
            assert (index.width[row], index.height[row], index.image_format[row]) == (40, 30, "jpg")
        os.close(tar)
    assert not items


def test_long_and_foreign_keys_keep_right_offsets(tmp_path):
    keys = ["k" * 150, "ключ-" * 40, "plain"]
    write_shards([CaptionedImage(key, ["x"], "1", lambda: picture(0), key) for key in keys], tmp_path / "o", workers=1)
    index = read_index(tmp_path / "o/shard-000000.parquet")
    whole = (tmp_path / "o/shard-000000.tar").read_bytes()
    for offset, size in zip(index.image_offset, index.image_size, strict=True):
        assert whole[offset : offset + size] == picture(0)
    with tarfile.open(tmp_path / "o/shard-000000.tar") as tar:
        assert [name.removesuffix(".jpg") for name in tar.getnames()[::2]] == keys == index.key


def test_headers_hold_no_times_or_users(reference):
    with tarfile.open(reference / "shard-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644 and member.isreg()


def test_several_processes_write_the_same_bytes(source, reference, tmp_path):
    write_shards(items_of(source), tmp_path / "o", shard_samples=3, workers=2, source={"kind": "flickr"})
    assert contents(tmp_path / "o") == contents(reference)
    assert verify(tmp_path / "o", full=True).fingerprint == read_manifest(reference).fingerprint


# -- Killed, and run again

KILLED = """
import os, signal, sys
from pathlib import Path
from data_tools.making import shard_file
from data_tools.making import writer
from data_tools.sources import collect
import runtime.files

source, out, point = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def dies_at(count, function, after=False):
    def call(*arguments, **options):
        nonlocal count
        count -= 1
        if count == 0 and not after:
            die()
        result = function(*arguments, **options)
        return die() if count == 0 else result
    return call

if point == "image":
    shard_file.Encoding.apply = dies_at(5, shard_file.Encoding.apply)
elif point == "rename":
    runtime.files.os.replace = dies_at(4, os.replace)  # plan, tar, index, tar
elif point == "index":
    shard_file.write_index = dies_at(2, shard_file.write_index)
elif point == "manifest":
    writer.write_manifest = die
elif point == "plan":
    writer.write_manifest = dies_at(1, writer.write_manifest, after=True)
items = collect(source, source.parent).items
options = writer.WriteOptions(shard_samples=3, workers=1)
writer.write_shards(items, out, options, writer.Origin({"kind": "flickr"}))
"""


def run(script, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("point", ["image", "rename", "index", "manifest", "plan"])
def test_a_killed_and_resumed_writer_gives_the_same_bytes(source, reference, tmp_path, point):
    script, out = tmp_path / "killed.py", tmp_path / "o"
    script.write_text(KILLED)
    process = run(script, source, out, point)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    expected = contents(reference)
    left = {name: digest for name, digest in contents(out).items() if name.startswith("shard-")}
    assert left and left.items() <= expected.items()  # whatever has a final name is whole
    assert (out / "manifest.json").exists() == (point == "plan")
    before = {name: (out / name).stat().st_mtime_ns for name in left if (out / name).with_suffix(".parquet").exists()}
    write_shards(items_of(source), out, shard_samples=3, workers=1, source={"kind": "flickr"})
    assert contents(out) == expected
    assert all((out / name).stat().st_mtime_ns == moment for name, moment in before.items())  # not written twice


ORPHANED = """
import dataclasses, os, sys, time
from pathlib import Path
from data_tools.sources import collect
from data_tools.making.writer import Origin, WriteOptions, write_shards

class Blocked:
    def __init__(self, marker): self.marker = marker
    def __call__(self):
        Path(self.marker).write_text(str(os.getpid()))
        time.sleep(600)

if __name__ == "__main__":
    source, out = Path(sys.argv[1]), sys.argv[2]
    items = collect(source, source.parent).items
    items[7] = dataclasses.replace(items[7], read=Blocked(sys.argv[3]))
    write_shards(items, out, WriteOptions(shard_samples=3, workers=2), Origin({"kind": "flickr"}))
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_processes_of_a_killed_writer_die_with_it(source, reference, tmp_path):
    script, out, marker = tmp_path / "orphaned.py", tmp_path / "o", tmp_path / "worker"
    script.write_text(ORPHANED)
    process = run(script, source, out, marker)
    wait_for(lambda: marker.exists() and marker.read_text())
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not alive(int(marker.read_text())))
    write_shards(items_of(source), out, shard_samples=3, workers=1, source={"kind": "flickr"})
    assert contents(out) == contents(reference)


# -- A folder that is complete, of another plan, or damaged


def test_a_complete_folder_is_left_alone(source, reference, capsys):
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    manifest = write_shards(items_of(source), reference, shard_samples=3, source={"kind": "flickr"})
    assert manifest.samples == 10 and "complete already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in reference.iterdir()} == before


def test_another_plan_is_refused_and_named(source, reference, tmp_path):
    items = items_of(source)
    for change, words in [
        ({"shard_samples": 4}, "shard_samples was 3, now 4"), ({"quality": 80}, "quality was 90, now 80"),
        ({"source": {"kind": "coco"}}, "kind was 'flickr', now 'coco'"), ({"items": items[1:]}, "other images"),
    ]:  # fmt: skip
        arguments = {"items": items, "shard_samples": 3, "source": {"kind": "flickr"}, **change}
        with pytest.raises(DataError, match=words):
            write_shards(out=reference, **arguments)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(reference, unfinished)
    (unfinished / "plan.json").write_text(json.dumps(read_manifest(reference).source))
    (unfinished / "manifest.json").unlink()
    with pytest.raises(DataError, match="shard_samples was 3, now 4"):
        write_shards(items, unfinished, shard_samples=4, source={"kind": "flickr"})


def test_a_folder_with_something_else_is_refused(source, tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(DataError, match="not empty"):
        write_shards(items_of(source), tmp_path, workers=1)
    with pytest.raises(LigatureError, match="cannot write into"):
        write_shards(items_of(source), tmp_path / "thesis.txt", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000002.parquet"])
@pytest.mark.parametrize("harm", [Path.unlink, cut])
def test_the_same_command_mends_a_damaged_folder(source, reference, tmp_path, name, harm):
    out = tmp_path / "o"
    shutil.copytree(reference, out)
    harm(out / name)
    if harm is cut and name.endswith("parquet"):  # sizes of indexes are not promised, their hashes are
        (out / "manifest.json").unlink()
        (out / "plan.json").write_text(json.dumps(read_manifest(reference).source))
    write_shards(items_of(source), out, shard_samples=3, workers=1, source={"kind": "flickr"})
    assert contents(out) == contents(reference)


# -- Broken images


def test_broken_images_are_set_aside_and_too_many_stop(tmp_path):
    annotation = make_source(tmp_path / "s")
    cut(tmp_path / "s/image04.jpg")
    (tmp_path / "s/image09.jpg").write_bytes(b"<html>404</html>")
    items, out = items_of(annotation), tmp_path / "o"
    words = r"of 10 images cannot be decoded, more than the share 0.1.*image04.jpg"
    with pytest.raises(DataError, match=words) as caught:
        write_shards(items, out, shard_samples=3, workers=1, max_bad_share=0.1)
    assert "\n" not in str(caught.value) and not (out / "manifest.json").exists()
    first = (out / "shard-000000.tar").stat().st_mtime_ns

    manifest = write_shards(items, out, shard_samples=3, workers=1, max_bad_share=0.2)  # the same plan: it goes on
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first
    assert manifest.samples == 8 and manifest.captions == 16 and manifest.dropped == {"unreadable images": 2}
    # The last shard had only a broken image: it is not written.
    assert [shard.samples for shard in manifest.shards] == [3, 2, 3] and not (out / "shard-000003.tar").exists()
    lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert [(line["key"], line["source"]) for line in lines] == [("image04", "image04.jpg"), ("image09", "image09.jpg")]
    assert "truncated" in lines[0]["reason"] and "cannot identify" in lines[1]["reason"]

    write_shards(items, tmp_path / "two", shard_samples=3, workers=2, max_bad_share=0.2)
    assert contents(tmp_path / "two") == contents(out)


def test_an_image_that_vanished_is_set_aside(tmp_path):
    items = items_of(make_source(tmp_path / "s", count=2))
    (tmp_path / "s/image01.jpg").unlink()
    manifest = write_shards(items, tmp_path / "o", workers=1, max_bad_share=0.5)
    assert manifest.samples == 1 and "FileNotFoundError: No such" in (tmp_path / "o/dropped.jsonl").read_text()


def test_nothing_but_broken_images_is_an_error(tmp_path):
    items = [CaptionedImage("a", ["x"], "1", lambda: b"", "a.jpg")]
    with pytest.raises(DataError, match="none of the images"):
        write_shards(items, tmp_path / "o", workers=1, max_bad_share=1.0)
    assert not (tmp_path / "o/manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": "a.b"}, "dot, slash or blank"), ({"key": ""}, "is empty"), ({"key": "image01"}, "comes twice"),
        ({"captions": []}, "no list"), ({"captions": [""]}, "no list"), ({"captions": "abc"}, "no list"),
    ],
)  # fmt: skip
def test_items_that_break_the_contract_are_refused_before_anything_is_written(source, tmp_path, change, words):
    items = items_of(source)
    items[0] = dataclasses.replace(items[0], **change)
    with pytest.raises(DataError, match=words):
        write_shards(items, tmp_path / "o", workers=1)
    assert not (tmp_path / "o").exists()


# -- One image


def test_bytes_are_kept_unless_they_must_change():
    for form, extension in [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")]:
        raw = picture(1, form=form)
        assert Encoding(None, None, 90).apply(raw) == (raw, extension, 40, 30)
        assert Encoding(30, None, 90).apply(raw)[0] is raw  # never enlarged, never encoded again without need
    data, extension, width, height = Encoding(None, None, 90).apply(picture(1, form="GIF", mode="L"))
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 30)) and extension == "jpg"
    assert (width, height) == (40, 30)


def test_the_shorter_side_is_reduced_upright():
    sideways = Image.Exif()
    sideways[0x0112] = 6
    for raw, size in [(picture(1, (64, 48)), (32, 24)), (picture(1, (64, 48), exif=sideways), (24, 32))]:
        data, extension, *found = Encoding(24, None, 90).apply(raw)
        assert tuple(found) == Image.open(io.BytesIO(data)).size == size and extension == "jpg"


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    data = Encoding(32, None, 95).apply(buffer.getvalue())[0]
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert pixels.shape == (32, 32, 3) and abs(pixels.mean() - 127.5) < 2
    assert pixels[0].mean() < 8 and pixels[-1].mean() > 247


def test_an_image_with_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr("data_tools.pixels.decode.MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="40 x 30 pixels are more than 1,000"):
        Encoding(None, None, 90).apply(picture(1))


def test_pillow_does_not_accept_truncated_files():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# -- No space left


def whole(out):
    """Every tar under a final name reads to its end, and nothing temporary is left."""
    assert not list(out.glob(".*"))
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 6 and path.stat().st_size % 10240 == 0
    assert not (out / "manifest.json").exists()


def test_no_space_left_gives_a_one_line_error_and_leaves_nothing_half_written(source, reference, tmp_path, monkeypatch):
    calls = 0

    def full(tar, member, data, original=tarfile.TarFile.addfile):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tar, member, data)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(LigatureError, match="shard-000001.tar: No space left on device; free some space") as caught:
            write_shards(items_of(source), tmp_path / "o", shard_samples=3, workers=1, source={"kind": "flickr"})
    assert "\n" not in str(caught.value)
    whole(tmp_path / "o")
    write_shards(items_of(source), tmp_path / "o", shard_samples=3, workers=1, source={"kind": "flickr"})
    assert contents(tmp_path / "o") == contents(reference)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 500 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=500k", "none", str(disk)]
    if mount is None or os.geteuid() or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_is_really_full(tmp_path, small_disk, workers):
    items = items_of(make_source(tmp_path / "s", count=9, size=(400, 300)))
    options = {"shard_samples": 3, "workers": workers}
    write_shards(items, tmp_path / "whole", **options)
    with pytest.raises(LigatureError, match="No space left on device; free some space") as caught:
        write_shards(items, small_disk / "o", **options)
    assert "\n" not in str(caught.value)
    whole(small_disk / "o")
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    write_shards(items, small_disk / "o", **options)
    assert contents(small_disk / "o") == contents(tmp_path / "whole")


# -- The command's function


def test_shard_prints_its_result_and_what_was_dropped(tmp_path, capsys):
    annotation = make_source(tmp_path / "s", count=4)
    (tmp_path / "s/a.b.jpg").write_bytes(picture(9))
    with open(annotation, "a") as file:
        file.write("gone.jpg#0\tx\nimage00.jpg#2\t \na.b.jpg#0\ty\n")
    options = ShardOptions(annotation, tmp_path / "o", workers=1)
    with pytest.raises(DataError, match="gone.jpg"):
        shard(options)
    assert not (tmp_path / "o").exists()

    manifest = shard(dataclasses.replace(options, allow_missing=True))
    line = capsys.readouterr().out
    for words in [
        "5 images, 9 captions, 1 shards",
        "1  empty captions",
        "first: gone.jpg (absent)",
        "1 keys made safe",
    ]:
        assert words in line
    assert manifest.dropped == {"empty captions": 1, "absent images": 1}
    listed = json.loads((tmp_path / "o/dropped.jsonl").read_text())
    assert listed == {"key": None, "source": "gone.jpg", "reason": "absent", "counted_as": "absent images"}
    assert str(tmp_path) not in (tmp_path / "o/manifest.json").read_text()


def test_images_are_held_out_by_cuts(source, tmp_path):
    train = shard(ShardOptions(source, tmp_path / "train", start=0, count=7, workers=1))
    held = shard(ShardOptions(source, tmp_path / "held", start=7, count=500, workers=1))
    keys = [read_index(tmp_path / name / "shard-000000.parquet").key for name in ("train", "held")]
    assert (train.samples, held.samples) == (7, 3) and keys[0] + keys[1] == [item.key for item in items_of(source)]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("shard_samples", 0), ("resize_shorter", 0), ("quality", 101), ("workers", -1), ("max_bad_share", 1.5),
        ("start", -1), ("count", 0),
    ],
)  # fmt: skip
def test_impossible_options_are_named(tmp_path, option, value):
    with pytest.raises(RecipeError, match=rf"{option}.*{value}"):
        ShardOptions(tmp_path / "captions", tmp_path / "o", **{option: value})


def test_real_images_from_a_tar_keep_their_bytes(tmp_path):
    folder = SHARED / "data/flickr8k"
    if not folder.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"no data in {SHARED}")
        pytest.skip(f"no data in {SHARED}; set LIGATURE_SHARED")
    annotation, start = folder / "Flickr8k.token.txt", random.Random(0).randrange(6000)
    manifest = shard(ShardOptions(annotation, tmp_path / "o", folder / "flickr8k_images_224.tar", count=60, start=start,
                                  shard_samples=25, workers=1))  # fmt: skip
    assert (manifest.samples, manifest.captions, len(manifest.shards)) == (60, 300, 3)
    written = tmp_path / "o/shard-000001.tar"
    with tarfile.open(folder / "flickr8k_images_224.tar") as given, tarfile.open(written) as tar:
        for name in tar.getnames()[:6:2]:
            assert tar.extractfile(name).read() == given.extractfile(f"Images/{name}").read()


def test_the_writer_is_light_to_import(tmp_path):
    script = tmp_path / "light.py"
    script.write_text(
        "import sys, data_tools.making.writer, data_tools.making.inspection\n"
        "assert not {'torch', 'PIL', 'pyarrow', 'numpy'} & sys.modules.keys(), sys.modules.keys()"
    )
    process = run(script)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == 0
