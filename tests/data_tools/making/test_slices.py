"""Several jobs, or jobs killed at any step, write the same bytes as one uninterrupted run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_shards import write_shards

from data_tools.making.plan import cut
from data_tools.making.shard_file import Encoding
from data_tools.making.writer import ShardOptions, read_slice
from data_tools.shards.manifest import read_manifest
from data_tools.sources import CaptionedImage
from runtime.errors import RecipeError

ROOT = Path(__file__).parents[3]


class Noise:
    """An image made when it is read."""

    def __init__(self, seed, side=32):
        self.seed, self.side = seed, side

    def __call__(self):
        if self.seed < 0:
            return b"broken"
        shape = (self.side, self.side, 3)
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(self.seed).integers(0, 256, shape, dtype=np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()


def items_of(seeds):
    return [
        CaptionedImage(f"k{n:02d}", [f"caption {n}"], str(seed), Noise(seed), f"k{n:02d}.jpg", 1000)
        for n, seed in enumerate(seeds)
    ]


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


# -- Slices


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 2, 0, 0)])
def test_slices_in_any_order_give_the_bytes_of_one_run(tmp_path, order):
    items = items_of([*range(10), -1])
    arguments = {"shard_samples": 2, "workers": 1, "max_bad_share": 1}
    whole = write_shards(items, tmp_path / "whole", **arguments)
    for place, number in enumerate(order[:-1]):
        done = write_shards(items, tmp_path / "o", job_slice=(number, 3), **arguments)
        assert (done is None) == (len(set(order[: place + 1])) < 3)
    last = write_shards(items, tmp_path / "o", job_slice=(order[-1], 3), **arguments)
    assert last.fingerprint == whole.fingerprint and contents(tmp_path / "o") == contents(tmp_path / "whole")


def test_a_whole_run_finishes_what_slices_left_and_partials_of_others_are_left_alone(tmp_path):
    items = items_of(range(6))
    arguments = {"shard_samples": 2, "workers": 1}
    theirs = tmp_path / "o/.shard-000001.tar.0123.partial"
    assert write_shards(items, tmp_path / "o", job_slice=(0, 3), **arguments) is None
    theirs.write_bytes(b"another job is writing this")
    mine = tmp_path / "o/.shard-000000.tar.0123.partial"
    mine.write_bytes(b"of a job that was killed")
    assert write_shards(items, tmp_path / "o", job_slice=(0, 3), **arguments) is None
    assert theirs.exists() and not mine.exists()
    write_shards(items, tmp_path / "o", **arguments)
    write_shards(items, tmp_path / "whole", **arguments)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["manifest.json", "dropped.jsonl"])
def test_slices_that_finish_at_the_same_moment_both_end_well(tmp_path, monkeypatch, name):
    items, arguments = items_of([*range(3), -1]), {"shard_samples": 2, "workers": 1, "max_bad_share": 1}
    out, replace, others = tmp_path / "o", os.replace, []

    def meanwhile(source, target):
        if Path(target).name == name and not others:  # ours is written, not yet in place: the other slice finishes
            others.append(None)
            others.append(write_shards(items, out, job_slice=(0, 2), **arguments))
        replace(source, target)

    assert write_shards(items, out, job_slice=(0, 2), **arguments) is None
    monkeypatch.setattr(os, "replace", meanwhile)
    last = write_shards(items, out, job_slice=(1, 2), **arguments)
    whole = write_shards(items, tmp_path / "whole", **arguments)
    assert last == others[1] and last.fingerprint == whole.fingerprint
    assert contents(out) == contents(tmp_path / "whole")


def test_more_slices_than_shards_still_finish_the_folder(tmp_path):
    items = items_of(range(3))
    results = [write_shards(items, tmp_path / "o", shard_samples=2, workers=1, job_slice=(n, 5)) for n in range(5)]
    assert results[0] is None and results[1].samples == 3 and read_manifest(tmp_path / "o").samples == 3


@pytest.mark.parametrize("text", ["3/3", "x", "1", "-1/4", "1/0", "0/4/2"])
def test_invalid_slices_are_refused(text):
    with pytest.raises(RecipeError, match="I/N"):
        ShardOptions(Path("a"), Path("b"), slice=text)
    assert read_slice("3/8") == (3, 8) and read_slice(None) == (0, 1)


# -- Shards of a size


def test_shards_stay_within_their_bytes(tmp_path):
    items = items_of(range(40))
    for place, item in enumerate(items):
        items[place] = CaptionedImage(item.key, item.captions, item.image_id, item.read, item.source, len(item.read()))
    manifest = write_shards(items, tmp_path / "o", shard_samples=None, shard_bytes=30_000, workers=1)
    sizes = [shard.bytes for shard in manifest.shards]
    assert len(sizes) > 3 and max(sizes) <= 30_000 + 10240 and min(sizes[:-1]) > 30_000 * 0.6  # tars end on 10 KiB
    both = write_shards(items, tmp_path / "p", shard_samples=3, shard_bytes=30_000, workers=1)
    assert {shard.samples for shard in both.shards} == {3, 1}


def test_sizes_of_encoded_images_are_estimated():
    items = [CaptionedImage(f"k{n}", ["x"], "1", Noise(n, 96), "s", len(Noise(n, 96)())) for n in range(70)]
    ranges = cut(items, None, 40_000, Encoding(32, None, 90))
    written = [sum(2048 + len(Encoding(32, None, 90).apply(items[n].read())[0]) for n in part) for part in ranges]
    assert all(0.8 * 40_000 < size < 1.1 * 40_000 for size in written[:-1]) and len(written) > 3
    assert [n for part in ranges for n in part] == list(range(70))


def test_reencoding_is_upright_and_of_one_format():
    raw = Noise(0, 64)()
    for form in ("jpg", "webp"):
        data, extension, width, height = Encoding(None, form, 80).apply(raw)
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == ({"jpg": "JPEG", "webp": "WEBP"}[form], (64, 64))
        assert (extension, width, height) == (form, 64, 64) and data != raw
    with pytest.raises(RecipeError, match="reencode is 'gif'"):
        ShardOptions(Path("a"), Path("b"), reencode="gif")


# -- A folder of our own as a source


def test_a_shard_folder_is_a_source_that_keeps_captions_and_image_ids(tmp_path):
    from data_tools.making.writer import shard
    from data_tools.shards.manifest import read_index

    first = write_shards(items_of([0, 1, 2, 3, 0]), tmp_path / "o", shard_samples=2, workers=1)
    again = shard(ShardOptions(tmp_path / "o", tmp_path / "p", resize_shorter=16, workers=1))
    assert (again.samples, again.captions) == (5, first.captions)
    old = [read_index(tmp_path / "o" / each.index) for each in first.shards]
    new = read_index(tmp_path / "p/shard-000000.parquet")
    assert new.key == [key for index in old for key in index.key] and set(new.width) == {16}
    assert new.image_id.tolist() == [number for index in old for number in index.image_id]
    assert new.image_id[0] == new.image_id[4] and len(set(new.image_id)) == 4


# -- Killed at every step

KILLED = """
import contextlib, json, os, signal, sys, tarfile
from pathlib import Path

import numpy, pyarrow.parquet  # before the forks, which then cost nothing
from test_slices import contents, items_of
from tiny_shards import write_shards
from data_tools.making import duplicates
from data_tools.making import fingerprints
from runtime.errors import Interrupted

base, slices = Path(sys.argv[1]), int(sys.argv[2])
fingerprints.CHUNK = 3
ITEMS = items_of([0, 1, 2, 1, 3, -1, -1])  # k03 goes as a copy, k02 as excluded; the last shard is all broken

def write(out, job_slice):
    with contextlib.suppress(Interrupted):
        write_shards(ITEMS, out, shard_samples=2, workers=1, job_slice=job_slice, duplicates="drop_near", max_bad_share=1,
                     exclude=[base / "excluded"], dropped={"empty captions": 1})

os.fsync = lambda descriptor: None  # a killed process loses nothing that was written; a dead machine is not tested here
STEPS = [(os, "replace"), (os, "unlink"), (os, "mkdir"), (tarfile.TarFile, "addfile"), (numpy, "save")]

def child(out, job_slice, kill_at=None):
    pid = os.fork()
    if pid == 0:
        try:
            left = kill_at
            def dying(function):
                def call(*arguments, **options):
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments, **options)
                return call
            if kill_at is not None:
                for owner, name in STEPS:
                    setattr(owner, name, dying(getattr(owner, name)))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            write(out, job_slice)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def main():
    write_shards(items_of([2]), base / "excluded", workers=1)
    write(base / "whole", (0, 1))
    expected = contents(base / "whole")
    assert len(expected) == 6, expected  # manifest, dropped.jsonl, two tars, two indexes
    for at in range(1, 500):
        out = base / f"killed-{at}"
        for number in range(slices - 1):
            assert child(out, (number, slices)) == 0  # the others have done what they can
        died = child(out, (slices - 1, slices), at)
        final = {name: digest for name, digest in contents(out).items() if not name.startswith(".")} if out.is_dir() else {}
        for name, digest in final.items():
            # Shards have their final bytes or none; a shard that is empty in the end may still be there.
            assert expected.get(name, digest) == digest, (at, name)
        for _ in range(min(slices, 2)):
            for number in range(slices):
                assert child(out, (number, slices)) == 0, at
        assert contents(out) == expected, (at, contents(out), expected)
        if died == 0:
            return print(json.dumps(at))
        assert died == -signal.SIGKILL, died

main()
"""


@pytest.mark.parametrize("slices", [1, 2])
def test_killed_at_every_step_and_run_again_it_ends_with_the_same_bytes(tmp_path, slices):
    """Exhaustive: before each rename, removal, new folder, member and block of fingerprints of a small run."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path), str(slices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) > (25 if slices == 1 else 10)
