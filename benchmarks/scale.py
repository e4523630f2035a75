"""Five billion samples in 500,000 shards: what a rank pays for them at start, at resume, and on the way.

The product's manifest, training set, order, stream and cursor read a synthetic manifest. Only the reading of tars is replaced:
samples are made up from their numbers. The benchmark prints each figure beside its aim, and exits with 1 where one falls short.
Seconds are this process's own, so that other work on the machine does not count.

Tested in tests/data_tools/stream/test_scale.py.
"""

from __future__ import annotations

import argparse
import io
import itertools
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.ratios import Ratios
from data_tools.shards.reader import RawSample
from data_tools.stream.order import BLOCK, WINDOW, SampleOrder
from data_tools.stream.shard_stream import ShardStream
from data_tools.stream.training_set import TrainingSet

START_AIM, MEMORY_AIM, RESUME_AIM = 10.0, 1e9, 10.0
BATCH, WORLD = 64, 512


def write_synthetic_manifest(folder: Path, shards: int, samples: int) -> None:
    """Write a manifest of tars that do not exist. Every 100th shard is a bit shorter, as in real folders."""
    counts = [samples - (number % 100 == 7) * min(13, samples - 1) for number in range(shards)]
    totals = f'"samples": {sum(counts)}, "captions": {sum(counts)}, "bytes": {shards * 10**6}'
    with open(folder / "manifest.json", "w") as file:
        file.write(
            f'{{"format": "ligature-shards", "version": 1, {totals}, "source": {{}}, "dropped": {{}}, "shards": ['
        )
        for number, count in enumerate(counts):
            name, sha = f"shard-{number:06d}", f"{number:064x}"
            file.write(
                f'{", " if number else ""}\n{{"name": "{name}.tar", "samples": {count}, "captions": {count}, "bytes": 1000000, '
                f'"sha256": "{sha}", "index": "{name}.parquet", "index_sha256": "{sha}"}}'
            )
        file.write("]}")


def open_stream(folder: Path, rank: int = 0) -> ShardStream:
    """Open a rank's stream on the synthetic manifest, with a reader that makes samples up."""
    data = TrainingSet(str(folder))
    picture = io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, "PNG")

    def make_samples(samples: np.ndarray) -> list:
        text = b'{"captions": ["a word"]}'
        return [RawSample(str(n), "", picture.getvalue(), text, "json", int(n)) for n in samples]

    data.reader.read = make_samples  # type: ignore[method-assign]
    return ShardStream(data, BATCH, rank, WORLD)


def peak_bytes() -> float:
    """Return the most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def timed(work):
    """Return what `work` returns, and this process's seconds for it."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def shuffle_quality(shards: int, samples: int, block: int, window: int, batch: int = 1024) -> dict[str, float]:
    """Return how well batches at ten positions of an epoch are mixed, beside a uniform permutation of the same samples.

    Args:
        shards: shards of the set.
        samples: samples of each shard.
        block: block of the order; 0: a whole shard.
        window: window of the order.
        batch: batch size.
    """
    order = SampleOrder(np.full(shards, samples), 0, block, window)
    starts = np.linspace(0, order.samples - batch, 10).astype(np.int64)
    batches = [order.at(start + np.arange(batch)) for start in starts]

    def pairs(owners: np.ndarray) -> float:
        counts = np.unique(owners, return_counts=True)[1]
        return float((counts * (counts - 1)).sum() / (batch * (batch - 1)))

    return {
        "shards in a batch": float(np.mean([len(np.unique(samples_of // samples)) for samples_of in batches])),
        "of, if uniform": shards * (1 - (1 - 1 / shards) ** batch),
        "pairs of one shard, %": 100 * float(np.mean([pairs(samples_of // samples) for samples_of in batches])),
        "of, if uniform, %": 100 * (samples - 1) / (shards * samples - 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=500_000)
    parser.add_argument("--samples", type=int, default=10_000, help="samples of each shard (default 10,000)")
    options = parser.parse_args(arguments)
    ratios = Ratios()

    def record(name: str, value: float, unit: str, aim: float | None = None) -> None:
        ratios.record(name, value, at_most=aim, unit=unit)

    with tempfile.TemporaryDirectory() as scratch:
        folder, bare = Path(scratch), peak_bytes()
        write_synthetic_manifest(folder, options.shards, options.samples)
        stream, opened = timed(lambda: open_stream(folder))
        total = len(stream)
        print(f"{total:,} samples in {options.shards:,} shards; rank 0 of {WORLD}, batches of {BATCH}")
        _, first = timed(lambda: next(iter(stream)))
        record("start: manifest read, stream opened, first batch", opened + first, "s", START_AIM)
        record("  of which opening", opened, "s")
        state, cursors = stream.state_dict(), {}
        for name, consumed in {
            "the end of the first epoch": total - BATCH * WORLD,
            "the middle of the eighth": 7 * total + total // 2,
        }.items():
            fresh = ShardStream(stream.data, BATCH, 3, WORLD)
            fresh.load_state_dict({**state, "samples": consumed})
            batch, resume_seconds = timed(lambda fresh=fresh: next(iter(fresh)))
            assert batch["positions"][0] == consumed + 3 * BATCH
            record(f"resume at {name}", resume_seconds, "s", RESUME_AIM)
            cursors[name] = fresh.state_dict()
        assert all(len(str(cursor)) < 500 for cursor in cursors.values())

        # Ranks side by side across the seam of two epochs: on either side nothing is lost and nothing comes twice.
        steps, ranks = 3, 8
        seam = total - 2 * BATCH * ranks
        rank_keys = []
        for rank in range(ranks):
            own_stream = ShardStream(stream.data, BATCH, rank, ranks)
            own_stream.examples.walk = stream.examples.walk
            own_stream.load_state_dict({**state, "samples": seam})
            rank_keys.append([batch["keys"] for batch in itertools.islice(own_stream, steps)])
        in_order = [key for step in range(steps) for rank in range(ranks) for key in rank_keys[rank][step]]
        before, after = in_order[: total - seam], in_order[total - seam :]
        assert len(set(before)) == len(before) and len(set(after)) == len(after)
        walk = stream.examples.walk
        expected, _ = walk.at(seam + np.arange(len(in_order)))
        assert in_order == [str(sample) for sample in expected]
        some = np.unique(np.random.default_rng(0).integers(0, total, 20_000))
        positions = np.concatenate(
            [np.arange(start, start + 500) for start in some[:: len(some) // 20] if start + 500 < total]
        )
        positions = np.unique(positions)
        assert len(np.unique(walk.at(positions)[0])) == len(positions)

        window = 1_000_000 // WINDOW + 1
        count = min(window * WINDOW, total)
        _, order_seconds = timed(lambda: [walk.at(np.arange(at, at + BATCH)) for at in range(0, count, BATCH * 16)])
        record("the order itself, a window's share of 16 ranks", 1e6 * order_seconds / (count / 16), "us a sample")
        record("memory for it at most", (peak_bytes() - bare) / 1e9, "GB", MEMORY_AIM / 1e9)
        record("  beside that of torch and the other imports", bare / 1e9, "GB")
    for block, size in ((BLOCK, WINDOW), (0, WINDOW), (BLOCK, 1 << 20)):
        figures = shuffle_quality(min(options.shards, 10_000), options.samples, block, size)
        listed = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        print(f"block {block or 'a shard'}, window {size:,}: {listed}")
    return ratios.close()


if __name__ == "__main__":
    sys.exit(main())
