"""VLDeformer's speed protocol (section 4.4 of its paper): all pairs by fusion and by two encodings, and one query over 10,000 images.

    python -m benchmarks.retrieval_speed [--size small|paper] [--model single_stream|cross_attention] [--threads 1] [--device cuda]

Two sides of one model with random weights, which cost the same as trained ones. *Fusion*: every pair of an image and a text goes
through the fusion layers. *Encoded*: images and texts go through their encoders once, and vectors are compared; of a single
stream these are the same layers taken apart (VLDeformer), of cross-attention the features of pretraining. Both sides encode each
image once, offline, and that time is counted in. Text and image are random; captions have 6 to 20 words.

All pairs of n images and n texts, n = 1,000, 5,000 and 10,000: a few batches of each kind of work are timed, in turn, and the
rest is their median times the number of batches (the paper does so for fusion; on a CPU the encodings are extrapolated too,
`--whole` runs them all). Comparing the vectors is run whole. The ratio of the two sides stands beside the ratio that their FLOPs
predict, counted by torch's FlopCounterMode on the same calls: at least 0.7 of it. A slow baseline proves nothing, so fusion must
run at half or more of the rate of a plain matrix product, timed in the same turns.

One query over 10,000 images: its words encoded, then the exact first ten out of vectors on disk (`retrieval.index.nearest`), by
blocks of as many rows as the paper's batches hold, and in one block, as `ligature search` does. The first queries are warm-up
and left out (the very first is shown). The query's 95th percentile must be at most three times that of its own text encoding.
P99.99 of fewer than 10,000 queries lies between the two slowest. Of fusion, a query takes too long for percentiles: its average,
fastest and slowest are extrapolated, a batch of pairs at a time. Words are token ids already: making them takes some 0.1 ms.

`small` takes about a minute on one busy core; `paper` has its batch sizes and a base-sized model, for a GPU. Exits 1 where an aim
is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, pad
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ratios import Ratios, seconds
from finetune.heads.decomposed import Decomposed
from finetune.heads.fusion import match_pairs
from pretrain.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from pretrain.encode import Encodings
from pretrain.model.alignment_model import AlignmentModel
from retrieval import index as search_index

COUNTS, GALLERY, TOP, WARM_UP = (1000, 5000, 10_000), 10_000, 10, 10
FUSION_WARM_UP = 2
VOCABULARY, WORDS = 8000, (6, 20)
RATIO_AIM, RATE_AIM, QUERY_AIM = 0.7, 0.5, 3.0


@dataclass(frozen=True)
class Size:
    image_size: int
    width: int
    layers: int
    """Of the image encoder, and of fusion (`cross_attention`: half of them for the text, half for fusion)."""
    batch: int
    """Pairs, images or texts at once, for all pairs."""
    rounds: int
    query_batches: tuple[int, ...]
    """Images compared with one query at once."""
    queries: int


SIZES = {
    "small": Size(112, 384, 6, 48, 4, (25, 50, 100), 300),
    "paper": Size(224, 768, 12, 400, 5, (250, 500, 1000), 1000),
}


class Sides:
    """The model as fusion and as two encodings, and the inputs."""

    def __init__(self, kind: str, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        heads, text_layers = size.width // 64, 0 if kind == "single_stream" else size.layers // 2
        config = ModelConfig(
            image=ImageEncoderConfig(
                architecture="vit_base_patch16_224", image_size=size.image_size, patch=16, width=size.width,
                depth=size.layers, heads=heads,
            ),
            text=TextEncoderConfig(width=size.width, layers=text_layers, heads=heads, feed_forward=4 * size.width, positions=64),
            fusion=FusionEncoderConfig(kind=kind, layers=size.layers - text_layers),  # type: ignore[arg-type]
            codewords=0,
        )  # fmt: skip
        self.device = device
        self.model = AlignmentModel(config, VOCABULARY).eval().requires_grad_(False).to(device)
        self.decomposed = Decomposed(self.model, "mean") if kind == "single_stream" else None
        self.width = self.decomposed.width if self.decomposed else config.feature_dim
        self.random = np.random.default_rng(0)

    def images(self, count: int) -> Tensor:
        shape = (count, 3, *2 * [self.model.config.image.image_size])
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    def texts(self, count: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask, [CLS] and [SEP] counted with the words, padded to the longest."""
        lengths = torch.from_numpy(self.random.integers(WORDS[0] + 2, WORDS[1] + 3, count))
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return (torch.randint(5, VOCABULARY, mask.shape) * mask).to(self.device), mask.to(self.device)

    def encode_images(self, images: Tensor) -> Tensor:
        """The encoded side's offline work, from pixels to vectors."""
        if self.decomposed:
            return self.decomposed.encode_image(images)
        return self.model.image_features(self.model.image_encoder(images))

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.decomposed:
            return self.decomposed.encode_text(ids, mask)
        return self.model.text_features(self.model.text_encoder(ids, mask))

    def encodings(self, images: int, texts: int) -> Encodings:
        """What fusion reads, made beforehand; all of it on the device."""
        ids, mask = self.texts(texts)
        tokens = self.model.image_encoder(self.images(images))
        states = self.model.text_encoder(ids, mask)
        longest = WORDS[1] + 2
        states, mask = pad(states, (0, 0, 0, longest - states.shape[1])), pad(mask, (0, longest - mask.shape[1]))
        return Encodings(torch.zeros(0), torch.zeros(0), tokens, states, mask)

    def fuse(self, encodings: Encodings) -> Callable[[], Tensor]:
        """Scores every pair of these images and texts, by the product's own function."""
        assert encodings.image_tokens is not None and encodings.text_mask is not None
        shape = (len(encodings.image_tokens), len(encodings.text_mask))
        image, text = (grid.flatten() for grid in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        image, text = image.to(self.device), text.to(self.device)
        return lambda: match_pairs(self.model, encodings, image, text, self.device)


def flops(work: Callable[[], object]) -> float:
    """Multiplications and additions of matrix products; attention is counted in its plain form."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return float(counter.get_total_flops())


@dataclass
class Cost:
    """Of one image, text or pair."""

    seconds: float
    flops: float


def all_pairs(sides: Sides, size: Size, whole: bool, told: Ratios) -> None:
    device, rows = sides.device, size.batch * 60
    per_side = max(1, round(size.batch**0.5))
    encodings = sides.encodings(per_side, per_side)
    pairs = per_side * per_side
    pixels, (ids, mask) = sides.images(size.batch), sides.texts(size.batch)
    left, right = torch.randn(rows, size.width, device=device), torch.randn(size.width, 4 * size.width, device=device)
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "pair": (pairs, sides.fuse(encodings)),
        "image": (size.batch, lambda: sides.encode_images(pixels)),
        "image tokens": (size.batch, lambda: sides.model.image_encoder(pixels)),
        "text": (size.batch, lambda: sides.encode_texts(ids, mask)),
        "product": (1, lambda: left @ right),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(size.rounds + 1):
        for name, (_, work) in works.items():
            took = seconds(work, device)
            if turn:  # the first is warm-up
                taken[name].append(took)
    costs = {
        name: Cost(statistics.median(taken[name]) / count, flops(work) / count) for name, (count, work) in works.items()
    }
    product = costs["product"]
    rate = product.flops / product.seconds
    share = costs["pair"].flops / costs["pair"].seconds / rate
    print(
        f"matrix product {rate / 1e9:,.0f} GFLOP/s ({rows} x {size.width} x {4 * size.width}); medians of {size.rounds} batches, one warm-up batch"
    )
    for name in ("pair", "image", "image tokens", "text"):
        cost = costs[name]
        print(f"  {name:12} {1e3 * cost.seconds:9.3f} ms  {cost.flops / 1e9:8.3f} GFLOP  {cost.flops / cost.seconds / rate:4.0%} of the product's rate, "
              f"{works[name][0]} at once")  # fmt: skip
    shares = []
    print("all pairs, seconds (fusion: extrapolated from the batches above; encoding: "
          f"{'run whole' if whole else 'extrapolated too'}; comparing: run whole)")  # fmt: skip
    print(f"{'n':>7} {'fusion':>14} {'encoding':>10} {'comparing':>10} {'ratio':>9} {'by FLOPs':>9} {'share':>6}")
    for count in COUNTS:
        vectors = [normalize(torch.randn(count, sides.width, device=device), dim=-1) for _ in range(2)]
        comparing = seconds(lambda pair=vectors: pair[1] @ pair[0].T, device)
        encoding = count * (costs["image"].seconds + costs["text"].seconds)
        if whole:
            encoding = sum(
                seconds(work, device)
                for _ in range(-(-count // size.batch))
                for work in (works["image"][1], works["text"][1])
            )
        # Words enter a single stream without layers of their own; other fusion reads each text's states, made once too.
        once = [costs["image tokens"]] + ([] if sides.decomposed else [costs["text"]])
        fusion = count * sum(cost.seconds for cost in once) + count**2 * costs["pair"].seconds
        counted = (count * sum(cost.flops for cost in once) + count**2 * costs["pair"].flops) / (
            count * (costs["image"].flops + costs["text"].flops) + 2 * count**2 * sides.width
        )
        ratio = fusion / (encoding + comparing)
        shares.append(ratio / counted)
        print(
            f"{count:7,} {fusion:14,.0f} {encoding:10,.2f} {comparing:10,.3f} {ratio:8,.0f}x {counted:8,.0f}x {ratio / counted:6.2f}"
        )
    told.record("all pairs: the measured ratio / what FLOPs predict, at least", min(shares), at_least=RATIO_AIM)
    told.record("fusion, share of the matrix product's rate", share, at_least=RATE_AIM)


def one_query(sides: Sides, size: Size, queries: int, told: Ratios) -> None:
    """Latency of single queries over GALLERY images, by wall clock: what a user waits for."""
    print(f"one query over {GALLERY:,} images, milliseconds: {queries:,} queries after {WARM_UP} of warm-up")
    print(f"{'':12} {'batch':>6} {'first':>8} {'avg':>8} {'min':>8} {'max':>8} {'P95':>8} {'P99.99':>8} {'memory':>9}")
    with tempfile.TemporaryDirectory() as folder:
        rows = normalize(torch.randn(GALLERY, sides.width), dim=-1).numpy()
        np.save(Path(folder, "vectors.npy"), rows)
        vectors = np.load(Path(folder, "vectors.npy"), mmap_mode="r")
        texts = [sides.texts(1) for _ in range(queries + WARM_UP)]
        for batch in (*size.query_batches, GALLERY):
            search_index.BLOCK_ROWS = batch
            forget_peak(sides.device)
            encoding, whole = [], []
            for ids, mask in texts:
                began = time.perf_counter()
                query = sides.encode_texts(ids, mask).float().cpu().numpy()
                encoded = time.perf_counter()
                search_index.nearest(vectors, query, TOP)
                encoding.append(encoded - began)
                whole.append(time.perf_counter() - began)
            line("encoded", batch, whole, peak(sides.device))
            line("  its words", batch, encoding, "")
            p95 = [float(np.percentile(times[WARM_UP:], 95)) for times in (whole, encoding)]
            told.record(
                f"one query in batches of {batch}: P95 / that of its text encoding", p95[0] / p95[1], at_most=QUERY_AIM
            )
        for batch in size.query_batches:
            work = sides.fuse(sides.encodings(batch, 1))
            times = [
                seconds(work, sides.device, time.perf_counter) * GALLERY / batch
                for _ in range(FUSION_WARM_UP + size.rounds)
            ]
            forget_peak(sides.device)
            work()
            kept = [1e3 * time for time in times[FUSION_WARM_UP:]]
            figures = [1e3 * times[0], statistics.mean(kept), min(kept), max(kept)]
            shown = " ".join(f"{figure:8,.0f}" for figure in figures)
            print(
                f"{'fusion':12} {batch:6} {shown} {'':17} {peak(sides.device):>9}  extrapolated from {size.rounds} batches"
            )


def line(name: str, batch: int, times: list[float], memory: str) -> None:
    first, kept = times[0], np.array(times[WARM_UP:])
    figures = [first, kept.mean(), kept.min(), kept.max(), np.percentile(kept, 95), np.percentile(kept, 99.99)]
    print(f"{name:12} {batch:6} " + " ".join(f"{1e3 * figure:8.2f}" for figure in figures) + f" {memory:>9}")


def forget_peak(device: torch.device) -> None:
    """Linux: what is in memory now becomes the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> str:
    """The most memory since `forget_peak`: allocated on the GPU, or of the whole process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    status = Path("/proc/self/status").read_text()
    return f"{int(status.split('VmHWM:')[1].split()[0]) / 1e6:.2f} GB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--model", choices=["single_stream", "cross_attention"], default="single_stream")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, help="pairs, images or texts at once, for all pairs")
    parser.add_argument("--query_batches", type=int, nargs="+", help="images compared with one query at once")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--whole", action="store_true", help="encode all images and texts instead of extrapolating")
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(options.threads):  # numpy's BLAS reads it when it is imported
        told = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.retrieval_speed", *sys.argv[1:]], told)
    torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    given = {name: getattr(options, name) for name in ("batch", "rounds", "queries", "query_batches")}
    size = Size(**{**vars(size), **{name: value for name, value in given.items() if value}})
    device = torch.device(options.device)
    sides = Sides(options.model, size, device)
    millions = sum(parameter.numel() for parameter in sides.model.parameters()) / 1e6
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{options.threads} thread(s) of {os.cpu_count()} cores"
    )
    print(f"{options.model}, {options.size}: {millions:.0f} M parameters, {sides.model.image_encoder.tokens} image tokens, "
          f"{WORDS[0]} to {WORDS[1]} words, {name}, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    told = Ratios()
    with torch.inference_mode():
        all_pairs(sides, size, options.whole, told)
        one_query(sides, size, size.queries, told)
    return told.close()


if __name__ == "__main__":
    sys.exit(main())
