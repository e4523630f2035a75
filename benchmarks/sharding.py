"""Sharding by process count: megabytes of images a second, kept as they are and reduced to a shorter side of 288.

`python -m benchmarks.sharding` draws noise-over-gradient JPEGs of 640 x 480 and shards them by 1, 2 … processes, as many as there are
cores. By the wall, so on a quiet machine; every image is decoded once on the way in, to know that it can be.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.ratios import Ratios
from data_tools.writer import ShardOptions, shard

DRAWN = 32
"""Different images; the rest are copies with other names."""


def write_source(folder: Path, images: int) -> Path:
    """A COCO captions json and its images. -> the json."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:480, 0:640]
    drawn = []
    for _ in range(DRAWN):
        gradient = np.stack([x * random.uniform(0, 0.4) + y * random.uniform(0, 0.5) for _ in range(3)], -1)
        grain = np.kron(random.normal(0, 30, (60, 80, 3)), np.ones((8, 8, 1)))
        picture = io.BytesIO()
        Image.fromarray(np.clip(gradient + grain, 0, 255).astype(np.uint8)).save(picture, "jpeg", quality=90)
        drawn.append(picture.getvalue())
    for number in range(images):
        (folder / f"{number:06d}.jpg").write_bytes(drawn[number % DRAWN])
    listed = [{"id": number, "file_name": f"{number:06d}.jpg"} for number in range(images)]
    said = [{"id": number, "image_id": number, "caption": f"picture {number}"} for number in range(images)]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": listed, "annotations": said}))
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    options = parser.parse_args(arguments)
    told, cores = Ratios(), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        source = write_source(Path(scratch), options.images)
        megabytes = sum(path.stat().st_size for path in Path(scratch).glob("*.jpg")) / 1e6
        print(f"{options.images:,} JPEGs of 640 x 480, {megabytes:,.0f} MB")
        for what, resize in (("kept", None), ("reduced to 288", 288)):
            rates = {}
            for workers in sorted({1, 2, cores}):
                out = Path(scratch) / f"{what}-{workers}"
                began = time.perf_counter()
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    shard(ShardOptions(source, out, resize_shorter=resize, shard_samples=250, workers=workers))
                rates[workers] = megabytes / (time.perf_counter() - began)
                print(f"{what}, {workers} process{'es' * (workers > 1)}: {rates[workers]:,.0f} MB/s")
            told.tell(f"sharding, {what}, all cores beside one process", rates[cores] / rates[1])
    return told.close()


if __name__ == "__main__":
    sys.exit(main())
