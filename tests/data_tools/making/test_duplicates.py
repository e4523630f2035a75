"""Duplicates are found by bytes and by appearance, and excluded images never enter a folder."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from tiny_shards import write_shards

from data_tools.making.duplicates import LOOK_DISTANCE, find_duplicates
from data_tools.making.fingerprints import (
    FLAT,
    HASHED,
    RECORD,
    UNREADABLE,
    fingerprint,
    fingerprints,
    list_images,
    look_of,
)
from data_tools.making.writer import ShardOptions, shard
from data_tools.shards.manifest import read_index
from data_tools.sources import CaptionedImage, collect
from runtime.errors import DataError, Interrupted, RecipeError

PAIR = "2851198725_37b6027625.jpg", "3050606344_af711c726c.jpg"
"""The two names under which Flickr8k's train split has one picture (data/README.md)."""


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos(shared_data):
    """(name, image) of ten COCO pictures."""
    with tarfile.open(shared_data / "data/coco_mini/coco_mini_images_256.tar") as tar:
        members = [member for member in tar if member.isreg()][::24]
        return [(m.name, Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB")) for m in members]


def bits_between(a, b):
    return int(np.bitwise_count(a["look"] ^ b["look"]).sum())


# -- One picture


def test_looks_are_the_signs_of_scipys_cosine_transform():
    from scipy.fft import dctn

    grey = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    expected = dctn(grey.astype(float), type=2)[:16, :16]
    low, all_ = expected[:8, :8].ravel()[1:], expected.ravel()[1:]
    bits = np.unpackbits(look_of(grey).view(np.uint8), bitorder="little")
    # scipy's axis order of coefficients is ours; the low block comes first, in its own order.
    assert bits.sum() == (all_ > np.median(all_)).sum() == 127 and bits[63] == 0
    norm = np.sqrt(2.0)  # scipy leaves the first row and column as large as the others; so do we
    assert norm and (bits[:63] == (low > np.median(all_))).all()


def test_a_picture_saved_again_looks_the_same_and_another_does_not(photos):
    worst, originals = 0, []
    for _, image in photos:
        original = fingerprint(encoded(image, quality=90))
        originals.append(original)
        width, height = image.size
        for copy in [
            encoded(image, quality=30), encoded(image, "PNG"), encoded(image, "WEBP", quality=60),
            encoded(image.resize((width // 3, height // 3), Image.Resampling.BICUBIC), quality=85),
            encoded(image.resize((224, 224), Image.Resampling.BICUBIC), quality=85),
            encoded(ImageEnhance.Brightness(image).enhance(1.2), quality=85), encoded(image.convert("L"), quality=85),
        ]:  # fmt: skip
            worst = max(worst, bits_between(original, fingerprint(copy)))
        assert bits_between(original, fingerprint(encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))) > 90
    others = min(bits_between(a, b) for n, a in enumerate(originals) for b in originals[:n])
    assert worst <= LOOK_DISTANCE < others, (worst, others)


def test_a_picture_turned_by_exif_looks_like_the_upright_one(photos):
    image = photos[0][1]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert bits_between(fingerprint(encoded(image)), fingerprint(turned)) <= LOOK_DISTANCE


def test_flat_and_broken_images_have_no_looks():
    assert fingerprint(encoded(Image.new("RGB", (40, 40), "grey")))["state"] == FLAT
    broken = fingerprint(encoded(Image.new("RGB", (40, 40)))[:200])
    assert broken["state"] == UNREADABLE and not broken["look"].any()


# -- Many


def planted(seed, count=120):
    """Random records, and copies of some at the end: the same bytes, the same look, near looks, looks too far; flat and broken."""
    rng = np.random.default_rng(seed)
    records = np.zeros(count, RECORD)
    records["content"], records["look"] = rng.integers(0, 2**63, (count, 2)), rng.integers(0, 2**63, (count, 4))
    copies = records[rng.integers(0, count, 80)].copy()
    for number, copy in enumerate(copies):
        kind = number % 5
        if kind:
            copy["content"] = rng.integers(0, 2**63, 2)
        flips = {0: (0, 0), 1: (0, 0), 2: (4, LOOK_DISTANCE - 4), 3: (2, 10), 4: (3, LOOK_DISTANCE - 2)}[kind]
        places = [*rng.choice(63, flips[0], replace=False), *(64 + rng.choice(191, flips[1], replace=False))]
        for place in places:
            copy["look"][place // 64] ^= np.uint64(1) << np.uint64(place % 64)
    whole = np.concatenate([records, copies])
    whole["state"][rng.integers(0, len(whole), 10)] = UNREADABLE
    whole["state"][rng.integers(0, len(whole), 10)] = FLAT
    return whole


def brute(records, rule, protected):
    of = np.full(len(records), -1)
    for j in range(protected, len(records)):
        for i in range(j):
            states = {records["state"][i], records["state"][j]}
            if of[i] >= 0 or UNREADABLE in states or (i >= protected and rule == "keep"):
                continue
            exact = (records["content"][i] == records["content"][j]).all()
            near = states == {HASHED} and bits_between(records[i], records[j]) <= LOOK_DISTANCE
            if exact or (near and (i < protected or rule == "drop_near")):
                of[j] = i
                break
    return of


@pytest.mark.parametrize(("rule", "protected"), [("drop_near", 0), ("drop_exact", 0), ("drop_near", 60), ("keep", 60)])
def test_the_search_finds_what_brute_force_finds(rule, protected):
    records = planted(protected)
    actual, expected = find_duplicates(records, rule, protected), brute(records, rule, protected)
    assert ((actual.original >= 0) == (expected >= 0)).all() and (expected >= 0).sum() > 12
    gone = np.flatnonzero(actual.original >= 0)
    assert (actual.original[actual.original[gone]] < 0).all() and (
        actual.original[gone] < gone
    ).all()  # what a copy names is kept
    for number in gone:
        a, b = records[number], records[actual.original[number]]
        distance = actual.distance[number]
        assert (distance == -1 and (a["content"] == b["content"]).all()) or bits_between(
            a, b
        ) <= LOOK_DISTANCE + distance


def test_many_identical_looks_cost_no_quadratic_time():
    records = np.zeros(200_000, RECORD)
    records["content"][:, 0] = np.arange(len(records))
    records["look"] = np.random.default_rng(0).integers(0, 2**63, 4)
    actual = find_duplicates(records)
    assert actual.original[0] == -1 and (actual.original[1:] == 0).all()


def test_an_empty_list_has_no_duplicates():
    assert len(find_duplicates(np.empty(0, RECORD)).original) == 0


# -- In a shard folder


def items_of(images):
    """Samples whose images are held in memory."""
    return [
        CaptionedImage(f"k{n}", [f"caption {n}"], f"k{n}", Held(raw), f"k{n}.jpg", len(raw))
        for n, raw in enumerate(images)
    ]


class Held:
    def __init__(self, raw):
        self.raw = raw

    def __call__(self):
        return self.raw


def test_the_pair_of_flickr8k_is_found(shared_data, tmp_path, capsys):
    folder = shared_data / "data/flickr8k"
    names = (folder / "Flickr_8k.trainImages.txt").read_text().split()
    (tmp_path / "names.txt").write_text("\n".join([*names[::200], *PAIR]))
    options = {"annotation": folder / "Flickr8k.token.txt", "images": folder / "flickr8k_images_224.tar",
               "names": tmp_path / "names.txt", "workers": 1}  # fmt: skip
    manifest = shard(ShardOptions(out=tmp_path / "o", duplicates="drop_near", **options))
    assert manifest.dropped == {"near duplicates": 1} or manifest.dropped == {"exact duplicates": 1}
    printed = capsys.readouterr().out
    assert f"first: {PAIR[1]} (copy of {PAIR[0]})" in printed
    lines = [json.loads(line) for line in (tmp_path / "o/dropped.jsonl").read_text().splitlines()]
    assert [(line["source"], line["copy_of"]) for line in lines] == [PAIR[::-1]] and not list(
        (tmp_path / "o").glob(".*")
    )
    kept = shard(ShardOptions(out=tmp_path / "kept", **options))
    assert kept.samples == manifest.samples + 1 and not kept.dropped


def test_an_excluded_dataset_is_left_out_in_whatever_form_it_is_given(photos, tmp_path):
    """As a shard folder, a folder of images, and a tar; what is excluded lies there smaller and saved again."""
    raw = [encoded(image) for _, image in photos[:8]]
    theirs = [encoded(image.resize((image.width // 2, image.height // 2)), quality=60) for _, image in photos[2:4]]
    write_shards(items_of([raw[0], encoded(photos[8][1])]), tmp_path / "shards", workers=1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.jpg").write_bytes(theirs[0])
    with tarfile.open(tmp_path / "test.tar", "w") as tar:
        member = tarfile.TarInfo("val/y.jpg")
        member.size = len(theirs[1])
        tar.addfile(member, io.BytesIO(theirs[1]))
    places = [tmp_path / "shards", tmp_path / "folder", tmp_path / "test.tar"]
    items = items_of([*raw, raw[5]])  # k8 is a copy of k5, which stays: only exclusion was asked for
    manifest = write_shards(items, tmp_path / "o", workers=1, exclude=places)
    assert manifest.dropped == {"images of an excluded dataset": 3}
    assert read_index(tmp_path / "o/shard-000000.parquet").key == ["k1", "k4", "k5", "k6", "k7", "k8"]
    lines = [json.loads(line) for line in (tmp_path / "o/dropped.jsonl").read_text().splitlines()]
    assert [(line["key"], line["copy_of"]) for line in lines] == [
        ("k0", "shards"),
        ("k2", "folder"),
        ("k3", "test.tar"),
    ]
    with pytest.raises(DataError, match="other options"):
        write_shards(items, tmp_path / "o", workers=1, exclude=places[:2])
    with pytest.raises(DataError, match="every one of the 1 images"):
        write_shards(items[:1], tmp_path / "p", workers=1, exclude=places[:1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in .*--exclude takes"):
        list_images(tmp_path / "empty")


def test_exact_copies_are_dropped_and_broken_images_kept_distinct(photos, tmp_path):
    raw = [encoded(image) for _, image in photos[:3]]
    images = [raw[0], raw[1], raw[0], b"broken", b"broken", encoded(photos[1][1], quality=50), raw[2]]
    manifest = write_shards(items_of(images), tmp_path / "o", workers=1, duplicates="drop_exact", max_bad_share=1)
    assert manifest.dropped == {"exact duplicates": 1, "unreadable images": 2} and manifest.samples == 4
    manifest = write_shards(items_of(images), tmp_path / "p", workers=1, duplicates="drop_near", max_bad_share=1)
    assert manifest.dropped == {"exact duplicates": 1, "near duplicates": 1, "unreadable images": 2}
    with pytest.raises(RecipeError, match="duplicates is 'drop'; it must be one of keep, drop_exact, drop_near"):
        ShardOptions(tmp_path / "a", tmp_path / "b", duplicates="drop")


def test_slices_look_at_their_own_images_and_wait_for_the_others(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.making.fingerprints.CHUNK", 3)
    raw = [encoded(image) for _, image in photos[:8]]
    items = items_of([*raw, raw[1]])
    arguments = {"out": tmp_path / "o", "workers": 1, "duplicates": "drop_near", "shard_samples": 3}
    with pytest.raises(Interrupted, match="slice 0/2 has fingerprinted its images") as caught:
        write_shards(items, job_slice=(0, 2), **arguments)
    assert caught.value.exit_code == 75 and "\n" not in str(caught.value)
    assert write_shards(items, job_slice=(1, 2), **arguments) is None  # it has what it needs, and wrote its shards
    manifest = write_shards(items, job_slice=(0, 2), **arguments)
    assert manifest.samples == 8
    write_shards(items, **{**arguments, "out": tmp_path / "whole"})
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("o", "whole")]
    assert files[0] == files[1]


def test_fingerprints_are_kept_until_the_folder_is_complete(photos, tmp_path, monkeypatch):
    items = items_of([encoded(image) for _, image in photos[:4]])
    first = fingerprints(tmp_path, "images", [item.read for item in items], 1)
    monkeypatch.setattr("data_tools.making.fingerprints.fingerprint", None)  # would fail if called
    again = fingerprints(tmp_path, "images", [item.read for item in items], 1)
    assert (first == again).all() and len(list(tmp_path.glob(".images-*.npy"))) == 1


def test_collected_tars_are_searched_too(shared_data, tmp_path):
    """CC12M's shard against itself: every image is excluded by its own bytes."""
    folder = shared_data / "data/cc12m_test"
    items = collect(folder).items[:6]
    with pytest.raises(DataError, match="every one of the 6 images"):
        write_shards(items, tmp_path / "o", workers=1, exclude=[folder])
