"""How fast encoded images become training views, beside the plain way and beside the fastest full decode; and sharding.

    python -m benchmarks.streaming [--rounds 7] [--without-sharding]

One process, one thread, CPU time. Arms take turns on the same images (A B C A B C …) and each counts by its best round, so
that what else runs on the machine falls on all alike. Prints a ratio beside each aim; exits 1 where one falls short.
Images: the 32 JPEGs of ../shared/data/cc12m_test (`LIGATURE_SHARED` names another folder) as they are, and re-encoded at
640 x 480; the same with the shorter side at 288, as `ligature shard --resize_shorter 288` writes them. Without that folder as
many are drawn, and it says so: the figures of docs/data.md are of the photographs.
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
    """The shard's JPEGs, and each again at 640 x 480; drawn ones where there is no such shard."""
    shared = Path(os.environ.get("LIGATURE_SHARED", Path(__file__).parents[2] / "shared"))
    path = shared / "data" / "cc12m_test" / "cc12m-train-0000.tar"
    if not path.is_file():
        print(f"no photographs at {path}: 64 images are drawn instead, and the aims are not about them")
        return drawn(64)
    with tarfile.open(path) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")]
        raw = [file.read() for file in files if file]
    return raw + [reencoded(decode_image(data).resize((640, 480), Image.Resampling.LANCZOS)) for data in raw]


def drawn(count: int) -> list[bytes]:
    """JPEGs of 640 x 480: a gradient under coarse grain, about as large as photographs are."""
    random, (y, x) = np.random.default_rng(0), np.mgrid[0:480, 0:640]
    found = []
    for _ in range(count):
        gradient = np.stack([x * random.uniform(0, 0.4) + y * random.uniform(0, 0.5) for _ in range(3)], -1)
        grain = np.kron(random.normal(0, 30, (60, 80, 3)), np.ones((8, 8, 1)))
        found.append(reencoded(Image.fromarray(np.clip(gradient + grain, 0, 255).astype(np.uint8))))
    return found


def reencoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def plain_way(operations: int) -> Callable[[bytes], torch.Tensor]:
    """What most training scripts do."""
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
    """Images decoded and transformed as a loader's worker does, joined into batches."""

    def run() -> None:
        for start in range(0, len(images), BATCH):
            made = [transform(decode_pixels(data), seed) for seed, data in enumerate(images[start : start + BATCH])]
            torch.stack(made, dim=1) if isinstance(made[0], torch.Tensor) else PackedImages.join(made)

    return run


def each(function: Callable[[bytes], object], images: list[bytes]) -> Arm:
    def run() -> None:
        for data in images:
            function(data)

    return run


def best_times(arms: dict[str, Arm], rounds: int, clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Seconds of each arm's best round; the arms take turns."""
    best = dict.fromkeys(arms, float("inf"))
    for number in range(rounds + 1):  # the first warms up
        for name, arm in arms.items():
            began = clock()
            arm()
            if number:
                best[name] = min(best[name], clock() - began)
    return best


def speed(images: list[bytes], small: list[bytes], operations: int, rounds: int, folder: Path, found: Ratios) -> None:
    """Print the table of one setting."""

    def ours(where: str, views: int = 1) -> TrainTransform:
        return TrainTransform(SIZE, AugmentConfig(operations=operations, where=where), views)  # type: ignore[arg-type]

    def streamed(name: str, where: str) -> Arm:
        stream = iter(ShardStream(folder / name, BATCH, transform=ours(where)))
        return lambda: next(stream)

    arms = {
        "a": each(plain_way(operations), images),
        "a, 288": each(plain_way(operations), small),
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
        ("(a) the plain way", "a", "b", None),
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
            found.record(
                f"{label}, RandAugment {'on' if operations else 'off'}, x (a)", best["a"] / best[arm], at_least=aim
            )


def agreement(images: list[bytes], told: Ratios) -> None:
    """Pixels beside Pillow's of the same crops, in levels of 255."""
    apart: dict[str, list[np.ndarray]] = {"workers": [], "device": []}
    for seed in range(AGREEMENT_VIEWS):
        data = images[seed % len(images)]
        image, pixels = decode_image(data), decode_pixels(data)
        view = draw_views((image.height, image.width), AugmentConfig(operations=0), 1, seed)[0]
        crop = image.crop((view.left, view.top, view.left + view.width, view.top + view.height))
        plain = crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        plain = plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.mirrored else plain
        for where, found in apart.items():
            made = TrainTransform(SIZE, AugmentConfig(operations=0, where=where), 1)(pixels, seed)  # type: ignore[arg-type]
            seen = (made if isinstance(made, torch.Tensor) else made.render("cpu")[:, 0])[0].permute(1, 2, 0).numpy()
            found.append(np.abs(seen.astype(np.int16) - np.asarray(plain)))
    print(f"\nPixels beside Pillow's of the same {AGREEMENT_VIEWS} crops (levels of 255; RandAugment off)")
    for where, found in apart.items():
        mean, largest = float(np.mean(found)), int(np.max(found))
        told.record(f"augment.where: {where}, mean absolute difference", mean, at_most=0.05)
        print(f"  largest {largest}")


def sharding(images: list[bytes], folder: Path, count: int = 1024) -> None:
    """MB/s of source read by `ligature shard`, by processes: bytes kept, and reduced to 288 px."""
    source, size = folder / "source", 0
    source.mkdir()
    for number in range(count):
        data = images[number % len(images)]
        (source / f"{number:05}.jpg").write_bytes(data)
        (source / f"{number:05}.txt").write_text(f"image {number}")
        size += len(data)
    cores = len(os.sched_getaffinity(0))
    print(
        f"\nSharding {count:,} images, {size / 1e6:.0f} MB, {cores} cores (wall-clock of the command, its start counts)"
    )
    for workers in sorted({1, 2, *(n for n in (4, 8, 16) if n <= cores)}):
        told = []
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
            began = time.monotonic()
            subprocess.run([*command, "--shard_samples", "64", *resize], check=True, capture_output=True)
            taken = time.monotonic() - began
            told.append(f"{size / 1e6 / taken:6.1f} MB/s ({count / taken:5.0f} images/s)")
        print(f"{workers:2} process{'es' if workers > 1 else '  '}  bytes kept {told[0]}   reduced to 288 px {told[1]}")


def write_folders(images: dict[str, list[bytes]], folder: Path) -> None:
    """One batch's worth of samples each, to be streamed."""
    for name, encoded in images.items():
        items = [
            CaptionedImage(f"k{number:05}", ["some words"], str(number), lambda data=data: data, "")  # type: ignore[misc]
            for number, data in enumerate(encoded)
        ]
        with redirect_stderr(io.StringIO()):
            write_shards(items, folder / name, WriteOptions(workers=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count, of each arm")
    parser.add_argument("--without-sharding", action="store_true", help="leave out the sharding speeds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    images = photographs()
    assert len(images) == BATCH
    small = [Encoding(288).apply(data)[0] for data in images]
    print(f"{len(images)} images, {sum(map(len, images)) / 1e3 / len(images):.0f} kB each; at 288 px "
          f"{sum(map(len, small)) / 1e3 / len(images):.0f} kB; views of {SIZE} px, torch {torch.__version__}")  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_folders({"whole": images, "288": small}, folder)
        told = Ratios()
        for operations in (0, 2):
            speed(images, small, operations, options.rounds, folder, told)
        agreement(images, told)
        if not options.without_sharding:
            sharding(images, folder)
    return told.close()


if __name__ == "__main__":
    sys.exit(main())
