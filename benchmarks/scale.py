"""Five billion samples in 500,000 shards: what a rank pays for them at start, at resume, and on the way.

The shipped manifest, training set, order, stream and cursor are driven on a synthetic manifest; only the reading of tars is
replaced, by samples made up from their number. Prints each figure beside its aim, and exits 1 where one falls short. Seconds are
this process's own, so that other work on the machine does not count.
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


def write_manifest_of(folder: Path, shards: int, samples: int) -> None:
    """A manifest like any other, of tars that nobody wrote; every 100th shard is a bit shorter, as real ones are."""
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
    data = TrainingSet(str(folder))
    picture = io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, "PNG")

    def made_up(samples: np.ndarray) -> list:
        text = b'{"captions": ["a word"]}'
        return [RawSample(str(n), "", picture.getvalue(), text, "json", int(n)) for n in samples]

    data.reader.read = made_up  # type: ignore[method-assign]
    return ShardStream(data, BATCH, rank, WORLD)


def peak() -> float:
    """Bytes this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def timed(what):
    began = time.process_time()
    made = what()
    return made, time.process_time() - began


def shuffle_quality(shards: int, samples: int, block: int, window: int, batch: int = 1024) -> dict[str, float]:
    """Of batches at ten places of an epoch, beside a uniform permutation of the same set: distinct shards and blocks, and how
    often two of a batch come from one shard, as a multiple of chance."""
    order = SampleOrder(np.full(shards, samples), 0, block, window)
    starts = np.linspace(0, order.samples - batch, 10).astype(np.int64)
    batches = [order.at(start + np.arange(batch)) for start in starts]

    def pairs(owners: np.ndarray) -> float:
        counts = np.unique(owners, return_counts=True)[1]
        return float((counts * (counts - 1)).sum() / (batch * (batch - 1)))

    return {
        "shards in a batch": float(np.mean([len(np.unique(one // samples)) for one in batches])),
        "of, if uniform": shards * (1 - (1 - 1 / shards) ** batch),
        "pairs of one shard, %": 100 * float(np.mean([pairs(one // samples) for one in batches])),
        "of, if uniform, %": 100 * (samples - 1) / (shards * samples - 1),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=500_000)
    parser.add_argument("--samples", type=int, default=10_000, help="of each shard")
    options = parser.parse_args(arguments)
    told = Ratios()

    def tell(what: str, value: float, unit: str, aim: float | None = None) -> None:
        told.record(what, value, at_most=aim, unit=unit)

    with tempfile.TemporaryDirectory() as scratch:
        folder, bare = Path(scratch), peak()
        write_manifest_of(folder, options.shards, options.samples)
        stream, opened = timed(lambda: open_stream(folder))
        total = len(stream)
        print(f"{total:,} samples in {options.shards:,} shards; rank 0 of {WORLD}, batches of {BATCH}")
        _, first = timed(lambda: next(iter(stream)))
        tell("start: manifest read, stream opened, first batch", opened + first, "s", START_AIM)
        tell("  of which opening", opened, "s")
        state, cursors = stream.state_dict(), {}
        for name, consumed in {
            "the end of the first epoch": total - BATCH * WORLD,
            "the middle of the eighth": 7 * total + total // 2,
        }.items():
            fresh = ShardStream(stream.data, BATCH, 3, WORLD)
            fresh.load_state_dict({**state, "samples": consumed})
            batch, taken = timed(lambda fresh=fresh: next(iter(fresh)))
            assert batch["positions"][0] == consumed + 3 * BATCH
            tell(f"resume at {name}", taken, "s", RESUME_AIM)
            cursors[name] = fresh.state_dict()
        assert all(len(str(cursor)) < 500 for cursor in cursors.values())

        # Ranks side by side, at the seam of two epochs: nothing lost, nothing twice, on either side of it.
        steps, ranks = 3, 8
        seam = total - 2 * BATCH * ranks
        found = []
        for rank in range(ranks):
            one = ShardStream(stream.data, BATCH, rank, ranks)
            one.examples.walk = stream.examples.walk
            one.load_state_dict({**state, "samples": seam})
            found.append([batch["keys"] for batch in itertools.islice(one, steps)])
        in_order = [key for step in range(steps) for rank in range(ranks) for key in found[rank][step]]
        before, after = in_order[: total - seam], in_order[total - seam :]
        assert len(set(before)) == len(before) and len(set(after)) == len(after)
        walk = stream.examples.walk
        expected, _ = walk.at(seam + np.arange(len(in_order)))
        assert in_order == [str(sample) for sample in expected]
        some = np.unique(np.random.default_rng(0).integers(0, total, 20_000))
        places = np.concatenate(
            [np.arange(start, start + 500) for start in some[:: len(some) // 20] if start + 500 < total]
        )
        places = np.unique(places)
        assert len(np.unique(walk.at(places)[0])) == len(places)

        window = 1_000_000 // WINDOW + 1
        count = min(window * WINDOW, total)
        _, taken = timed(lambda: [walk.at(np.arange(at, at + BATCH)) for at in range(0, count, BATCH * 16)])
        tell("the order itself, a window's share of 16 ranks", 1e6 * taken / (count / 16), "us a sample")
        tell("memory for it at most", (peak() - bare) / 1e9, "GB", MEMORY_AIM / 1e9)
        tell("  beside that of torch and the other imports", bare / 1e9, "GB")
    for block, size in ((BLOCK, WINDOW), (0, WINDOW), (BLOCK, 1 << 20)):
        figures = shuffle_quality(min(options.shards, 10_000), options.samples, block, size)
        listed = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        print(f"block {block or 'a shard'}, window {size:,}: {listed}")
    return told.close()


if __name__ == "__main__":
    sys.exit(main())
