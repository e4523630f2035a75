"""How fast encoded images become training views, beside the usual torchvision code and the fastest full decode; and sharding.

    python -m benchmarks.streaming [--rounds 7] [--without-sharding]

One process, one thread, CPU time. Arms take turns on the same images (A B C A B C …) and the best round of each counts, so that
other work on the machine affects all alike. The benchmark prints a ratio beside each aim, and exits with 1 where one falls short.

The images are the 32 JPEGs of ../shared/data/cc12m_test (`LIGATURE_SHARED` names another folder) as they are, and re-encoded at
640 x 480. The same images also come with the shorter side at 288, as `ligature shard --resize_shorter 288` writes them. Without
that folder as many images are drawn, and a line says so: the figures of docs/data.md hold for the photographs.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision import transforms as plain_transforms
from torchvision.transforms import InterpolationMode

from benchmarks.ratios import Ratios
from data_tools import ShardStream
from data_tools.config import AugmentConfig
from data_tools.making.shard_file import Encoding
from data_tools.making.writer import WriteOptions, write_shards
from data_tools.pixels.decode import decode_image, decode_pixels
from data_tools.pixels.packed import PackedImages
from data_tools.pixels.transforms import TrainTransform
from data_tools.pixels.views import draw_views
from data_tools.sources.items import CaptionedImage

SIZE, BATCH, AGREEMENT_VIEWS = 256, 64, 200
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Arm = Callable[[], object]


def photographs() -> list[bytes]:
    """Return the shard's JPEGs, and each again at 640 x 480; drawn images where there is no such shard."""
    shared = Path(os.environ.get("LIGATURE_SHARED", Path(__file__).parents[2] / "shared"))
    path = shared / "data" / "cc12m_test" / "cc12m-train-0000.tar"
    if not path.is_file():
        print(f"no photographs at {path}: 64 images are drawn instead, and the aims are not about them")
        return draw_jpegs(64)
    with tarfile.open(path) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")]
        raw = [file.read() for file in files if file]
    return raw + [encode_jpeg(decode_image(data).resize((640, 480), Image.Resampling.LANCZOS)) for data in raw]


def draw_jpegs(count: int) -> list[bytes]:
    """Return JPEGs of 640 x 480: a gradient under coarse grain, about as many bytes as photographs."""
    random, (y, x) = np.random.default_rng(0), np.mgrid[0:480, 0:640]
    images = []
    for _ in range(count):
        gradient = np.stack([x * random.uniform(0, 0.4) + y * random.uniform(0, 0.5) for _ in range(3)], -1)
        grain = np.kron(random.normal(0, 30, (60, 80, 3)), np.ones((8, 8, 1)))
        images.append(encode_jpeg(Image.fromarray(np.clip(gradient + grain, 0, 255).astype(np.uint8))))
    return images


def encode_jpeg(image: Image.Image) -> bytes:
    """Return an image as JPEG of quality 90."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def torchvision_transform(operations: int) -> Callable[[bytes], torch.Tensor]:
    """Return what most training scripts do with an encoded image."""
    steps: list = [
        plain_transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
        plain_transforms.RandomHorizontalFlip(),
    ]
    if operations:
        steps.append(plain_transforms.RandAugment(operations, 7, num_magnitude_bins=11))
    steps += [plain_transforms.ToTensor(), plain_transforms.Normalize(MEAN, STD)]
    transform = plain_transforms.Compose(steps)
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


def batches_of(images: list[bytes], transform: TrainTransform) -> Arm:
    """Return an arm that decodes and transforms images as a loader's worker does, and joins them into batches."""

    def run() -> None:
        for start in range(0, len(images), BATCH):
            views = [transform(decode_pixels(data), seed) for seed, data in enumerate(images[start : start + BATCH])]
            torch.stack(views, dim=1) if isinstance(views[0], torch.Tensor) else PackedImages.join(views)

    return run


def each(function: Callable[[bytes], object], images: list[bytes]) -> Arm:
    """Return an arm that calls a function on each image."""

    def run() -> None:
        for data in images:
            function(data)

    return run


def best_times(arms: dict[str, Arm], rounds: int, clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Return the seconds of each arm's best round; the arms take turns."""
    best = dict.fromkeys(arms, float("inf"))
    for number in range(rounds + 1):  # the first round warms up
        for name, arm in arms.items():
            start = clock()
            arm()
            if number:
                best[name] = min(best[name], clock() - start)
    return best


def speed(images: list[bytes], small: list[bytes], operations: int, rounds: int, folder: Path, ratios: Ratios) -> None:
    """Print the table of one RandAugment setting (`operations` for each view) and record its ratios."""

    def ours(where: str, views: int = 1) -> TrainTransform:
        return TrainTransform(SIZE, AugmentConfig(operations=operations, where=where), views)  # type: ignore[arg-type]

    def streamed(name: str, where: str) -> Arm:
        stream = iter(ShardStream(folder / name, BATCH, transform=ours(where)))
        return lambda: next(stream)

    arms = {
        "a": each(torchvision_transform(operations), images),
        "a, 288": each(torchvision_transform(operations), small),
        "b": each(simplejpeg.decode_jpeg, images),
        "b, 288": each(simplejpeg.decode_jpeg, small),
        "ours": batches_of(images, ours("workers")),
        "ours, 288": batches_of(small, ours("workers")),
        "two views": batches_of(images, ours("workers", 2)),
        "device": batches_of(images, ours("device")),
        "device, 288": batches_of(small, ours("device")),
        "stream": streamed("whole", "workers"),
        "stream, 288": streamed("288", "workers"),
        "stream device, 288": streamed("288", "device"),
    }
    best = best_times(arms, rounds)
    rows: list[tuple[str, str, str, float | None]] = [
        ("(a) torchvision, as usual", "a", "b", None),
        ("(a) on 288 px shards", "a, 288", "b, 288", None),
        ("(b) the fastest full decode alone", "b", "b", None),
        ("(b) on 288 px shards", "b, 288", "b, 288", None),
        ("views, same bytes", "ours", "b", 2.2),
        ("views, 288 px shards", "ours, 288", "b, 288", 5.0),
        ("two views of each image, same bytes", "two views", "b", None),
        ("augment.where: device, same bytes", "device", "b", None),
        ("augment.where: device, 288 px shards", "device, 288", "b, 288", 10.0),
        ("ShardStream without workers, same bytes", "stream", "b", None),
        ("ShardStream, 288 px shards", "stream, 288", "b, 288", None),
        ("ShardStream, device, 288 px shards", "stream device, 288", "b, 288", None),
    ]
    print(f"\nRandAugment {'on' if operations else 'off'}{'':31}images/s   x (a)   share of (b)")
    for label, arm, ceiling, _ in rows:
        print(
            f"{label:42}{len(images) / best[arm]:9.0f} {best['a'] / best[arm]:7.2f} {best[ceiling] / best[arm]:14.0%}"
        )
    for label, arm, _, aim in rows:
        if aim is not None:
            ratios.record(
                f"{label}, RandAugment {'on' if operations else 'off'}, x (a)", best["a"] / best[arm], at_least=aim
            )


def agreement(images: list[bytes], ratios: Ratios) -> None:
    """Compare pixels with Pillow's of the same crops, in levels of 255."""
    differences: dict[str, list[np.ndarray]] = {"workers": [], "device": []}
    for seed in range(AGREEMENT_VIEWS):
        data = images[seed % len(images)]
        image, pixels = decode_image(data), decode_pixels(data)
        view = draw_views((image.height, image.width), AugmentConfig(operations=0), 1, seed)[0]
        crop = image.crop((view.left, view.top, view.left + view.width, view.top + view.height))
        plain = crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        plain = plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.mirrored else plain
        for where, values in differences.items():
            views = TrainTransform(SIZE, AugmentConfig(operations=0, where=where), 1)(pixels, seed)  # type: ignore[arg-type]
            ours = (views if isinstance(views, torch.Tensor) else views.render("cpu")[:, 0])[0].permute(1, 2, 0).numpy()
            values.append(np.abs(ours.astype(np.int16) - np.asarray(plain)))
    print(f"\nPixels beside Pillow's of the same {AGREEMENT_VIEWS} crops (levels of 255; RandAugment off)")
    for where, values in differences.items():
        mean, largest = float(np.mean(values)), int(np.max(values))
        ratios.record(f"augment.where: {where}, mean absolute difference", mean, at_most=0.05)
        print(f"  largest {largest}")


def sharding(images: list[bytes], folder: Path, count: int = 1024) -> None:
    """Print the MB/s of source that `ligature shard` reads, by processes: with bytes kept, and reduced to 288 px."""
    source, size = folder / "source", 0
    source.mkdir()
    for number in range(count):
        data = images[number % len(images)]
        (source / f"{number:05}.jpg").write_bytes(data)
        (source / f"{number:05}.txt").write_text(f"image {number}")
        size += len(data)
    cores = len(os.sched_getaffinity(0))
    print(
        f"\nSharding {count:,} images, {size / 1e6:.0f} MB, {cores} cores (wall clock of the command, its start included)"
    )
    for workers in sorted({1, 2, *(n for n in (4, 8, 16) if n <= cores)}):
        rates = []
        for resize in ([], ["--resize_shorter", "288"]):
            out = folder / f"out-{workers}-{len(resize)}"
            command = [
                sys.executable,
                "-m",
                "launch.cli",
                "shard",
                str(source),
                "--out",
                str(out),
                "--workers",
                str(workers),
            ]
            start = time.monotonic()
            subprocess.run([*command, "--shard_samples", "64", *resize], check=True, capture_output=True)
            elapsed = time.monotonic() - start
            rates.append(f"{size / 1e6 / elapsed:6.1f} MB/s ({count / elapsed:5.0f} images/s)")
        print(
            f"{workers:2} process{'es' if workers > 1 else '  '}  bytes kept {rates[0]}   reduced to 288 px {rates[1]}"
        )


def write_folders(images: dict[str, list[bytes]], folder: Path) -> None:
    """Write a shard folder for each list of images, to be streamed."""
    for name, encoded in images.items():
        items = [
            CaptionedImage(f"k{number:05}", ["some words"], str(number), lambda data=data: data, "")  # type: ignore[misc]
            for number, data in enumerate(encoded)
        ]
        with redirect_stderr(io.StringIO()):
            write_shards(items, folder / name, WriteOptions(workers=1))


def main() -> int:
    """Measure speed, agreement and sharding; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each arm that count (default 7)")
    parser.add_argument("--without-sharding", action="store_true", help="leave out the speed of sharding")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    images = photographs()
    assert len(images) == BATCH
    small = [Encoding(288).apply(data)[0] for data in images]
    print(f"{len(images)} images, {sum(map(len, images)) / 1e3 / len(images):.0f} kB each; at 288 px "
          f"{sum(map(len, small)) / 1e3 / len(images):.0f} kB; views of {SIZE} px, torch {torch.__version__}")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_folders({"whole": images, "288": small}, folder)
        ratios = Ratios()
        for operations in (0, 2):
            speed(images, small, operations, options.rounds, folder, ratios)
        agreement(images, ratios)
        if not options.without_sharding:
            sharding(images, folder)
    return ratios.close()


if __name__ == "__main__":
    sys.exit(main())
