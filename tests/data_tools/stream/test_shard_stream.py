"""ShardStream gives one endless order for any number of ranks and workers, resumes anywhere, and replaces broken samples."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image
from tiny_shards import write_shards

from data_tools import ShardStream
from data_tools.config import AugmentConfig
from data_tools.pixels.transforms import TrainTransform
from data_tools.shards.manifest import hash_image_id, read_index, read_manifest
from data_tools.shards.reader import ShardReader
from data_tools.sources import CaptionedImage
from data_tools.stream import quarantine
from data_tools.stream.order import SampleOrder
from data_tools.stream.quarantine import Quarantine
from data_tools.tokenizer import train_tokenizer
from runtime.errors import DataError

SIZES = (1, 5, 12, 37)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def tiny_image(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(folder: Path, samples: int, shard_samples: int = 5) -> Path:
    def item(number: int) -> CaptionedImage:
        data = tiny_image(number)
        return CaptionedImage(
            f"k{number:03}", [f"image {number}", "a word"], str(number), lambda: data, f"{number}.png"
        )

    write_shards([item(number) for number in range(samples)], folder, shard_samples=shard_samples, workers=1)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {samples: make_folder(root / str(samples), samples) for samples in SIZES}


@pytest.fixture
def copy(folders, tmp_path):
    """A folder of 37 samples to break."""
    shutil.copytree(folders[37], tmp_path / "shards")
    return tmp_path / "shards"


def overwrite(folder: Path, key: str, member: str = "image") -> None:
    """Damage the bytes of one sample inside its tar."""
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        index = read_index(folder / shard.index)
        if key in index.key:
            row = index.key.index(key)
            with open(folder / shard.name, "r+b") as tar:
                tar.seek(int(getattr(index, f"{member}_offset")[row]))
                tar.write(b"\0" * int(getattr(index, f"{member}_size")[row]))
            return
    raise KeyError(key)


def take(folder, batches: int, batch_size: int, world: int = 1, workers: int = 0, state=None, **options):
    """Walk `batches` global batches as `world` ranks -> (batches in the global order, every rank's cursor)."""
    streams = [ShardStream(folder, batch_size, rank, world, workers, **options) for rank in range(world)]
    batches_by_rank = []
    for stream in streams:
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
        iterator = iter(stream)
        batches_by_rank.append([next(iterator) for _ in range(batches)])
        iterator.close()
    in_order = list(itertools.chain.from_iterable(zip(*batches_by_rank, strict=True)))
    return in_order, [stream.state_dict() for stream in streams]


def joined(batches, name: str) -> list:
    return [
        value for batch in batches for value in (batch[name].tolist() if torch.is_tensor(batch[name]) else batch[name])
    ]


def expected_keys(folder, seed: int, positions) -> list[str]:
    reader = ShardReader(folder)
    order = SampleOrder(reader.counts, seed)
    return [reader.key(order[position]) for position in positions]


SEGMENTS = some.lists(
    some.tuples(some.integers(1, 8), some.integers(1, 7), some.integers(0, 4)), min_size=1, max_size=4
)


@settings(max_examples=40)
@given(samples=some.sampled_from(SIZES), seed=some.integers(0, 2**31), segments=SEGMENTS)
def test_ranks_and_resumes_walk_the_one_endless_order(folders, samples, seed, segments):
    """Each segment is another life of the run: (ranks, batch size, batches until it ends)."""
    state, walked = None, []
    for world, batch_size, batches in segments:
        batches_by_rank, states = take(folders[samples], batches, batch_size, world, state=state, seed=seed)
        assert all(len(batch["keys"]) == batch_size for batch in batches_by_rank)
        assert all(state_dict == states[0] for state_dict in states)
        state = states[0]
        walked += batches_by_rank
    positions = joined(walked, "positions")
    assert positions == list(range(len(positions)))
    assert state["samples"] == len(positions)
    assert joined(walked, "keys") == expected_keys(folders[samples], seed, positions)


WORKED = some.lists(
    some.tuples(some.integers(1, 8), some.integers(0, 3), some.integers(1, 7), some.integers(1, 3)),
    min_size=2,
    max_size=2,
)


@settings(max_examples=4)
@given(seed=some.integers(0, 2**31), block=some.integers(0, 6), segments=WORKED)
def test_workers_that_read_ahead_lose_and_repeat_nothing(folders, seed, block, segments):
    """(ranks, workers, batch size, batches) of each life of the run; each ends with its workers batches ahead."""
    state, walked, options = None, [], {"seed": seed, "block": block, "window": 10}
    for world, workers, batch_size, batches in segments:
        batches_by_rank, states = take(folders[37], batches, batch_size, world, workers, state=state, **options)
        state = states[0]
        assert all(state_dict == state for state_dict in states)
        walked += batches_by_rank
    positions = joined(walked, "positions")
    assert positions == list(range(len(positions)))
    plain, _ = take(folders[37], 1, len(positions), **options)
    assert joined(walked, "keys") == joined(plain, "keys")


@pytest.mark.parametrize(("samples", "world", "batch_size"), [(37, 3, 4), (12, 8, 5), (5, 2, 7), (1, 2, 2)])
def test_every_epoch_holds_every_sample_exactly_once(folders, samples, world, batch_size):
    batches = -(-3 * samples // (world * batch_size))
    keys = joined(take(folders[samples], batches, batch_size, world)[0], "keys")
    for epoch in range(3):
        assert sorted(keys[epoch * samples : (epoch + 1) * samples]) == [f"k{number:03}" for number in range(samples)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(folders, workers):
    plain, state = take(folders[37], 9, 5, seed=3)
    worked, worked_state = take(folders[37], 9, 5, workers=workers, seed=3)
    assert joined(worked, "keys") == joined(plain, "keys")
    assert joined(worked, "captions") == joined(plain, "captions")
    assert worked_state == state


def test_a_cursor_taken_between_prefetched_batches_loses_and_repeats_nothing(folders):
    """Workers have read ahead of the batch the cursor stands at; then another world, other workers, another batch size."""
    first, states = take(folders[37], 4, 5, workers=3, seed=3)
    second, states = take(folders[37], 3, 2, world=2, workers=1, state=states[0], seed=3)
    third, _ = take(folders[37], 5, 7, workers=2, state=states[1], seed=3)
    positions = joined(first + second + third, "positions")
    assert positions == list(range(4 * 5 + 3 * 2 * 2 + 5 * 7))


def test_the_cursor_may_be_taken_while_iterating(folders):
    stream = ShardStream(folders[37], 5, workers=2)
    for count, batch in enumerate(stream, start=1):
        assert stream.state_dict()["samples"] == 5 * count == batch["positions"][-1] + 1
        if count == 4:
            break
    again = ShardStream(folders[37], 5)
    again.load_state_dict(stream.state_dict())
    assert next(iter(again))["positions"].tolist() == [20, 21, 22, 23, 24]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("move", [iter, lambda stream: stream.load_state_dict(stream.state_dict())])
def test_an_iterator_ends_when_its_cursor_is_moved(folders, workers, move):
    """Two of them would count each other's batches."""
    stream = ShardStream(folders[12], 3, workers=workers)
    batches = iter(stream)
    next(batches)
    move(stream)
    with pytest.raises(RuntimeError, match="take a new one"):
        next(batches)
    assert stream.state_dict()["samples"] == 3


def test_epochs_are_counted_with_their_fraction(folders):
    stream = ShardStream(folders[12], 3, world_size=2)
    batches = iter(stream)
    next(batches)
    assert stream.epoch == 0.5
    next(batches)
    assert stream.epoch == 1.0


def test_other_shards_are_refused(folders):
    state = ShardStream(folders[37], 5).state_dict()
    with pytest.raises(DataError, match="is not the data this run was reading") as error:
        ShardStream(folders[12], 5).load_state_dict(state)
    assert "\n" not in str(error.value)


def test_another_seed_is_refused(folders):
    state = ShardStream(folders[37], 5, seed=1).state_dict()
    with pytest.raises(DataError, match="with seed 1, not 2"):
        ShardStream(folders[37], 5, seed=2).load_state_dict(state)


def test_a_cursor_of_another_order_is_refused(folders):
    state = ShardStream(folders[37], 5, block=3).state_dict()
    with pytest.raises(DataError, match=r"with block 3, not 4.*data\.shuffle\.block"):
        ShardStream(folders[37], 5, block=4).load_state_dict(state)
    with pytest.raises(DataError, match=r"with window 65536, not 8.*data\.shuffle\.window"):
        ShardStream(folders[37], 5, window=8).load_state_dict(state)


def test_an_unstated_block_size_is_the_cursors(folders):
    """Remote shards have other blocks than those on a disk; a run may go on from a copy."""
    first, states = take(folders[37], 2, 5, block=2, window=8)
    rest, _ = take(folders[37], 5, 5, state=states[0], window=8)
    whole, _ = take(folders[37], 7, 5, block=2, window=8)
    assert joined(first + rest, "keys") == joined(whole, "keys")


def test_a_cursor_of_an_older_ligature_gives_a_one_line_error(folders):
    stream = ShardStream(folders[37], 5)
    state = {
        key: value for key, value in stream.state_dict().items() if key in ("samples", "fingerprint", "seed", "bad")
    }
    with pytest.raises(DataError, match="cursor has version 1") as error:
        stream.load_state_dict(state)
    assert "\n" not in str(error.value)


def test_the_same_shards_elsewhere_are_the_same_data(folders, copy):
    ShardStream(copy, 5).load_state_dict(ShardStream(folders[37], 5).state_dict())


@pytest.mark.parametrize(("batch_size", "rank", "world"), [(0, 0, 1), (4, 1, 1), (4, -1, 2), (4, 0, 0)])
def test_an_impossible_position_is_refused(folders, batch_size, rank, world):
    with pytest.raises(ValueError):
        ShardStream(folders[5], batch_size, rank, world)


def test_captions_change_with_the_epoch_and_all_are_used(folders):
    batches, _ = take(folders[5], 20, 5)
    pairs = {(key, caption) for batch in batches for key, caption in zip(batch["keys"], batch["captions"], strict=True)}
    assert len(pairs) == 2 * 5


def test_images_belong_to_their_keys_and_ids_to_their_samples(folders):
    batches, _ = take(folders[37], 8, 5)
    for batch in batches:
        for key, image, number in zip(batch["keys"], batch["images"], batch["image_ids"].tolist(), strict=True):
            assert image.getpixel((0, 0))[0] == int(key[1:]) and number == hash_image_id(str(int(key[1:])))


def test_a_batch_holds_views_and_tokens(drawn):
    reader = ShardReader(drawn / "train")
    tokenizer = train_tokenizer([caption for i in range(64) for caption in reader.captions(i)], 200, 12)
    stream = ShardStream(
        drawn / "train", 6, transform=TrainTransform(24, AugmentConfig(), views=2), tokenizer=tokenizer
    )
    batch = next(iter(stream))
    assert batch["images"].shape == (2, 6, 3, 24, 24) and batch["images"].dtype == torch.uint8
    assert batch["ids"].shape == batch["mask"].shape and batch["mask"].dtype == torch.bool
    for ids, mask, caption in zip(batch["ids"], batch["mask"], batch["captions"], strict=True):
        assert ids[mask].tolist() == tokenizer.encode([caption])[0]
        assert (ids[~mask] == 0).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_a_function_of_seed_and_position(drawn, workers):
    def pixels(world: int, batch_size: int, seed: int) -> torch.Tensor:
        transform = TrainTransform(16, AugmentConfig(), views=2)
        batches, _ = take(
            drawn / "train", 24 // (world * batch_size), batch_size, world, workers, transform=transform, seed=seed
        )
        return torch.cat([batch["images"] for batch in batches], dim=1)

    assert torch.equal(pixels(1, 12, seed=0), pixels(2, 4, seed=0))
    assert not torch.equal(pixels(1, 12, seed=0), pixels(1, 12, seed=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_torchs_global_generator_is_left_alone(drawn, workers):
    before = torch.get_rng_state()
    take(drawn / "train", 2, 4, workers=workers, transform=TrainTransform(16, AugmentConfig(), views=1))
    assert torch.equal(torch.get_rng_state(), before)


def quarantined(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_broken_image_has_a_stand_in_that_is_a_function_of_seed_and_position(copy):
    overwrite(copy, "k007")
    clean = expected_keys(copy, 0, range(72))
    walks = [
        take(copy, 72 // (world * size), size, world, workers, max_bad_share=1)[0]
        for world, size, workers in [(1, 6, 0), (3, 4, 0), (1, 9, 2)]
    ]
    keys = [joined(walk, "keys") for walk in walks]
    assert keys[0] == keys[1] == keys[2]
    assert joined(walks[0], "captions") == joined(walks[1], "captions")
    changed = [place for place, (key, was) in enumerate(zip(keys[0], clean, strict=True)) if key != was]
    assert changed == [place for place, key in enumerate(clean) if key == "k007"] != []


def test_broken_images_do_not_all_have_the_same_stand_in(copy):
    broken = [f"k{number:03}" for number in range(8)]
    for key in broken:
        overwrite(copy, key)
    was = expected_keys(copy, 0, range(74))
    keys = joined(take(copy, 2, 37, max_bad_share=1)[0], "keys")
    stand_ins = [key for key, before in zip(keys, was, strict=True) if before in broken]
    assert len(stand_ins) == 16 and len(set(stand_ins)) > 8 and not set(stand_ins) & set(broken)


def test_bad_samples_that_another_rank_met_are_counted(copy, tmp_path):
    for key in ("k003", "k007", "k020", "k030"):
        overwrite(copy, key)
    options = {"quarantine": tmp_path / "quarantine.jsonl", "max_bad_share": 0.5}
    ranks = [ShardStream(copy, 9, rank, 2, 0, **options) for rank in range(2)]
    assert ranks[0].count_bad() == 0 and not (tmp_path / "quarantine.jsonl").exists()
    for rank in ranks:
        iterator = iter(rank)
        for _ in range(2):
            next(iterator)
        iterator.close()
    assert len(ranks[0].bad) < 4, "the first rank met some alone"
    assert [rank.count_bad() for rank in ranks] == [4, 4]


def test_a_broken_image_is_listed_once_with_shard_key_and_reason(copy, tmp_path):
    overwrite(copy, "k007")
    for world in (1, 2):  # and again in the next life of the run
        take(copy, 10, 8, world, quarantine=tmp_path / "run" / "quarantine.jsonl", max_bad_share=0.5)
    (line,) = quarantined(tmp_path / "run" / "quarantine.jsonl")
    assert line == {"shard": "shard-000001.tar", "key": "k007", "reason": "cannot identify image file"}


def test_broken_captions_are_set_aside_too(copy, tmp_path):
    overwrite(copy, "k011", "text")
    batches, _ = take(copy, 5, 8, quarantine=tmp_path / "quarantine.jsonl", max_bad_share=0.5)
    assert "k011" not in joined(batches, "keys")
    assert quarantined(tmp_path / "quarantine.jsonl")[0]["key"] == "k011"


def test_the_cursor_remembers_broken_samples(copy, tmp_path):
    overwrite(copy, "k007")
    _, (state,) = take(copy, 5, 8, max_bad_share=0.5)
    assert state["bad"] == ["shard-000001.tar/k007"]
    take(copy, 5, 8, state=state, quarantine=tmp_path / "quarantine.jsonl", max_bad_share=0.5)
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_bad_samples_of_other_ranks_count_for_all(copy, tmp_path):
    """Each rank alone would stay below the share."""
    for key in ("k001", "k002", "k003", "k004"):
        overwrite(copy, key)
    with pytest.raises(DataError, match="4 of 37 samples"):
        take(copy, 10, 2, 2, quarantine=tmp_path / "quarantine.jsonl", max_bad_share=0.1)
    assert len(quarantined(tmp_path / "quarantine.jsonl")) == 4


def test_a_quarantine_line_cut_by_a_crash_does_no_harm(copy, tmp_path):
    overwrite(copy, "k007")
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"shard": "s", "key": "k001", "reason": "r"}\n{"shard": "s", "ke')
    take(copy, 5, 8, quarantine=path, max_bad_share=0.5)
    assert json.loads(path.read_text().splitlines()[-1])["key"] == "k007"


def test_a_cut_line_that_was_read_before_does_no_harm_either(tmp_path):
    listed = Quarantine(tmp_path / "q.jsonl")
    listed.path.write_text('{"shard": "s", "key": "k001", "reason": "r"}\n{"shard": "s", "ke')
    assert listed.add([]) == {"s/k001"}
    listed.add([{"shard": "s", "key": "k002", "reason": "r"}])
    assert Quarantine(listed.path).add([]) == {"s/k001", "s/k002"}


def test_bad_samples_wait_in_memory_for_a_disk_that_takes_them(copy, tmp_path, monkeypatch, capsys):
    for key in ("k007", "k011", "k020"):
        overwrite(copy, key)
    path, modes, broken = tmp_path / "q.jsonl", [], True

    def opened(path, mode):
        modes.append(mode)
        if broken and mode != "rb":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open(path, mode)

    monkeypatch.setattr(quarantine, "open", opened, raising=False)
    path.write_text("")
    stream = ShardStream(copy, 5, quarantine=path, max_bad_share=0.5)
    assert stream.count_bad() == 0 and modes == ["rb"]
    walked = iter(stream)
    for _ in range(8):
        next(walked)
    assert stream.count_bad() == 3 and modes.count("ab+") > 1
    assert capsys.readouterr().err.count("Read-only file system; its lines wait in memory") == 1
    broken = False
    assert stream.count_bad() == 3
    assert sorted(line["key"] for line in quarantined(path)) == ["k007", "k011", "k020"]
    path.unlink()
    assert stream.count_bad() == 3 and modes[-1] == "rb" and not path.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_stop_the_run_with_one_line(copy, tmp_path, workers):
    for number in range(4):
        overwrite(copy, f"k{number:03}")
    with pytest.raises(DataError) as error:
        take(copy, 20, 4, workers=workers, quarantine=tmp_path / "quarantine.jsonl", max_bad_share=0.1)
    message = str(error.value)
    assert "\n" not in message
    assert "4 of 37 samples" in message and "max_bad_share 10.00%" in message and "quarantine.jsonl" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_dataset_gives_a_one_line_error(copy, workers):
    for number in range(37):
        overwrite(copy, f"k{number:03}")
    with pytest.raises(DataError, match="samples in a row cannot be read") as error:
        take(copy, 1, 4, workers=workers, max_bad_share=1)
    assert "\n" not in str(error.value)


def walked_once(folder, tmp_path, workers: int = 0) -> tuple[list[str], list[dict[str, str]]]:
    """-> the keys of one epoch and a bit, and what is in quarantine after it; everything in it there once."""
    path = tmp_path / "quarantine.jsonl"
    keys = joined(take(folder, 10, 8, workers=workers, quarantine=path, max_bad_share=0.9)[0], "keys")
    lines = quarantined(path) if path.exists() else []
    assert len({line["key"] for line in lines}) == len(lines)
    return keys, lines


def of_shard(number: int) -> set[str]:
    return {f"k{5 * number + row:03}" for row in range(5)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["between members", "within an image", "within a header"])
def test_of_a_shard_cut_short_only_the_tail_is_lost(copy, tmp_path, workers, where):
    index = read_index(copy / "shard-000002.parquet")
    at = {"between members": -512, "within an image": 20, "within a header": -200}[where]
    with open(copy / "shard-000002.tar", "r+b") as tar:
        tar.truncate(int(index.image_offset[3]) + at)
    keys, lines = walked_once(copy, tmp_path, workers)
    assert set(keys) == {f"k{number:03}" for number in range(37)} - {"k013", "k014"}
    assert {line["key"] for line in lines} == {"k013", "k014"}
    assert all(line["shard"] == "shard-000002.tar" and "cut short" in line["reason"] for line in lines)


def test_a_cut_between_image_and_captions_is_no_sample(copy, tmp_path):
    """The webdataset library yields the half of it."""
    with open(copy / "shard-000002.tar", "r+b") as tar:
        tar.truncate(int(read_index(copy / "shard-000002.parquet").text_offset[3]) - 512)
    keys, lines = walked_once(copy, tmp_path)
    assert {line["key"] for line in lines} == {"k013", "k014"} and not {"k013", "k014"} & set(keys)


@pytest.mark.parametrize("harm", ["one bit", "zeros", "another size"])
def test_a_bad_header_costs_its_own_sample(copy, tmp_path, harm):
    """The webdataset library drops the rest of the shard without a word."""
    at = int(read_index(copy / "shard-000002.parquet").text_offset[1]) - 512
    with open(copy / "shard-000002.tar", "r+b") as tar:
        tar.seek(at)
        header = bytearray(tar.read(512))
        if harm == "one bit":
            header[3] ^= 4
        elif harm == "zeros":
            header[:] = bytes(512)
        else:
            header[124:135] = b"00000000001"
        tar.seek(at)
        tar.write(header)
    keys, lines = walked_once(copy, tmp_path)
    assert [line["key"] for line in lines] == ["k011"] and "header" in lines[0]["reason"]
    assert of_shard(2) - {"k011"} <= set(keys)


def test_bytes_moved_within_a_shard_are_detected(copy, tmp_path):
    """As many bytes as promised, but not where the index has them: nothing of it may be taken for a sample."""
    path = copy / "shard-000002.tar"
    content = path.read_bytes()
    at = int(read_index(copy / "shard-000002.parquet").image_offset[2]) - 512
    path.write_bytes(content[:at] + bytes(512) + content[at:-512])
    keys, lines = walked_once(copy, tmp_path)
    assert {line["key"] for line in lines} == {"k012", "k013", "k014"} and {"k010", "k011"} <= set(keys)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("lost", "reason"), [("shard-000002.tar", "the shard is missing"), ("shard-000002.parquet", "shard-000002.parquet")]
)
def test_a_missing_shard_costs_its_own_samples(copy, tmp_path, workers, lost, reason):
    (copy / lost).unlink()
    keys, lines = walked_once(copy, tmp_path, workers)
    assert set(keys) == {f"k{number:03}" for number in range(37)} - of_shard(2)
    assert len(lines) == 5 and all(reason in line["reason"] and line["shard"] == "shard-000002.tar" for line in lines)


def test_an_index_of_another_shard_is_refused(copy, tmp_path):
    shutil.copy(copy / "shard-000001.parquet", copy / "shard-000002.parquet")
    keys, lines = walked_once(copy, tmp_path)
    assert set(keys) == {f"k{number:03}" for number in range(37)} - of_shard(2)
    assert all("its sha256 is not the one that the manifest states" in line["reason"] for line in lines)


def test_lost_shards_beyond_the_share_stop_the_run_with_one_line(copy, tmp_path):
    (copy / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"of 37 samples of .* max_bad_share 5.00%") as error:
        take(copy, 10, 8, quarantine=tmp_path / "quarantine.jsonl", max_bad_share=0.05)
    assert "\n" not in str(error.value)


def test_samples_known_to_be_bad_are_not_read_again(copy):
    """A cursor makes the same stand-ins, even where the sample can be read by now."""
    overwrite(copy, "k007")
    first, (state,) = take(copy, 5, 8, max_bad_share=0.5)
    shutil.rmtree(copy)
    make_folder(copy, 37)
    again, _ = take(copy, 5, 8, state={**state, "samples": 0}, max_bad_share=0.5)
    assert joined(again, "keys") == joined(first, "keys") and "k007" not in joined(again, "keys")


def test_a_bug_in_a_transform_is_not_reported_as_a_broken_image(drawn, tmp_path):
    def transform(image, seed):
        raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="a mistake of ours"):
        take(drawn / "train", 1, 4, transform=transform, quarantine=tmp_path / "quarantine.jsonl", max_bad_share=1)
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_a_folder_without_samples_gives_a_one_line_error(tmp_path):
    from data_tools.shards.manifest import Manifest, write_manifest

    write_manifest(Manifest(tmp_path, ()))
    with pytest.raises(DataError, match="holds no samples"):
        ShardStream(tmp_path, 4)


def test_first_batches_of_the_drawn_set_are_uniform_over_shards(drawn):
    """A shuffle that stayed within shards would show one or two of the four here."""
    stream = ShardStream(drawn / "train", 16)
    numbers = {stream.reader.key(sample): sample for sample in range(64)}
    assert len({numbers[key] // 16 for key in next(iter(stream))["keys"]}) == 4
