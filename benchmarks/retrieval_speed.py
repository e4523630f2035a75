"""VLDeformer's speed protocol (section 4.4 of its paper): all pairs by fusion and by separate encodings, and one query over 10,000 images.

    python -m benchmarks.retrieval_speed [--size small|paper] [--model single_stream|cross_attention] [--threads 1] [--device cuda]

Both sides are one model with random weights, which cost the same as trained ones. *Fusion* sends every pair of an image and a text
through the fusion layers. *Encoded* sends images and texts through their encoders once and compares vectors. For a single stream
the encoders are the same layers, decomposed (VLDeformer); for cross-attention they give the features of pretraining. Both sides
encode each image once, offline, and that time counts. Texts and images are random; captions have 6 to 20 words.

All pairs of n images and n texts, n = 1,000, 5,000 and 10,000. A few batches of each kind of work are timed in turn; the total is
their median times the number of batches. The paper does so for fusion; on a CPU the encodings are extrapolated too, unless
`--whole` runs them all. The vectors are compared in full. The ratio of the two sides must be at least 0.7 of the ratio that their
FLOPs predict, counted by torch's FlopCounterMode on the same calls. A slow baseline proves nothing: fusion must run at half or
more of the rate of a plain matrix product, timed in the same turns.

One query over 10,000 images. Its words are encoded, then `retrieval.index.nearest` finds the exact first ten among vectors on
disk. It reads them in blocks of the paper's batch sizes, and in one block, as `ligature search` does. The first queries warm up
and do not count; the very first is shown. The query's 95th percentile must be at most three times that of its own text encoding.
With fewer than 10,000 queries, P99.99 lies between the two slowest. A fusion query takes too long for percentiles: its average,
fastest and slowest are extrapolated from batches of pairs. Words come as token ids; tokenizing takes some 0.1 ms.

`small` takes about a minute on one busy core. `paper` has the paper's batch sizes and a base-sized model, for a GPU. The exit code
is 1 where an aim is missed.
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
from pretrain.encode import Encodings
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from retrieval import index as search_index

COUNTS, GALLERY, TOP, WARM_UP = (1000, 5000, 10_000), 10_000, 10, 10
FUSION_WARM_UP = 2
VOCABULARY, WORDS = 8000, (6, 20)
RATIO_AIM, RATE_AIM, QUERY_AIM = 0.7, 0.5, 3.0


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of the batches."""

    image_size: int
    width: int
    layers: int
    """Layers of the image encoder, and of fusion; with `cross_attention` half of those are the text encoder's."""
    batch: int
    """Pairs, images or texts at once, in the part on all pairs."""
    rounds: int
    query_batches: tuple[int, ...]
    """Images compared with one query at once."""
    queries: int


SIZES = {
    "small": Size(112, 384, 6, 48, 4, (25, 50, 100), 300),
    "paper": Size(224, 768, 12, 400, 5, (250, 500, 1000), 1000),
}


class Sides:
    """One model as fusion and as separate encoders, and random inputs for it."""

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
        """Return random images (count, 3, size, size) uint8."""
        shape = (count, 3, *2 * [self.model.config.image.image_size])
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    def texts(self, count: int) -> tuple[Tensor, Tensor]:
        """Return token ids and mask (count, longest), with [CLS] and [SEP]."""
        lengths = torch.from_numpy(self.random.integers(WORDS[0] + 2, WORDS[1] + 3, count))
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return (torch.randint(5, VOCABULARY, mask.shape) * mask).to(self.device), mask.to(self.device)

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the images' vectors (images, width): the encoded side's offline work."""
        if self.decomposed:
            return self.decomposed.encode_image(images)
        return self.model.image_features(self.model.image_encoder(images))

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the texts' vectors (texts, width)."""
        if self.decomposed:
            return self.decomposed.encode_text(ids, mask)
        return self.model.text_features(self.model.text_encoder(ids, mask), mask)

    def encodings(self, images: int, texts: int) -> Encodings:
        """Return what fusion reads, made beforehand, on the device."""
        ids, mask = self.texts(texts)
        tokens = self.model.image_encoder(self.images(images))
        states = self.model.text_encoder(ids, mask)
        longest = WORDS[1] + 2
        states, mask = pad(states, (0, 0, 0, longest - states.shape[1])), pad(mask, (0, longest - mask.shape[1]))
        return Encodings(torch.zeros(0), torch.zeros(0), tokens, states, mask)

    def fuse(self, encodings: Encodings) -> Callable[[], Tensor]:
        """Return a function that scores every pair of these images and texts with the product's own code."""
        assert encodings.image_tokens is not None and encodings.text_mask is not None
        shape = (len(encodings.image_tokens), len(encodings.text_mask))
        image, text = (grid.flatten() for grid in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        image, text = image.to(self.device), text.to(self.device)
        return lambda: match_pairs(self.model, encodings, image, text, self.device)


def count_flops(work: Callable[[], object]) -> float:
    """Return the multiplications and additions of matrix products; attention counts in its plain form."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return float(counter.get_total_flops())


@dataclass
class Cost:
    """The cost of one image, text or pair."""

    seconds: float
    flops: float


def all_pairs(sides: Sides, size: Size, whole: bool, ratios: Ratios) -> None:
    """Measure all pairs. `whole`: encode all images and texts instead of extrapolating."""
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
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(size.rounds + 1):
        for name, (_, work) in works.items():
            elapsed = seconds(work, device)
            if turn:  # the first turn warms up
                times[name].append(elapsed)
    costs = {
        name: Cost(statistics.median(times[name]) / count, count_flops(work) / count)
        for name, (count, work) in works.items()
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
        # In a single stream words have no layers of their own. Cross-attention reads each text's states, made once.
        encoded_once = [costs["image tokens"]] + ([] if sides.decomposed else [costs["text"]])
        fusion = count * sum(cost.seconds for cost in encoded_once) + count**2 * costs["pair"].seconds
        counted = (count * sum(cost.flops for cost in encoded_once) + count**2 * costs["pair"].flops) / (
            count * (costs["image"].flops + costs["text"].flops) + 2 * count**2 * sides.width
        )
        ratio = fusion / (encoding + comparing)
        shares.append(ratio / counted)
        print(
            f"{count:7,} {fusion:14,.0f} {encoding:10,.2f} {comparing:10,.3f} {ratio:8,.0f}x {counted:8,.0f}x {ratio / counted:6.2f}"
        )
    ratios.record("all pairs: the measured ratio / what FLOPs predict, at least", min(shares), at_least=RATIO_AIM)
    ratios.record("fusion, share of the matrix product's rate", share, at_least=RATE_AIM)


def one_query(sides: Sides, size: Size, queries: int, ratios: Ratios) -> None:
    """Measure the latency of single queries over GALLERY images by the wall clock: what a user waits for."""
    print(f"one query over {GALLERY:,} images, milliseconds: {queries:,} queries after {WARM_UP} of warm-up")
    print(f"{'':12} {'batch':>6} {'first':>8} {'avg':>8} {'min':>8} {'max':>8} {'P95':>8} {'P99.99':>8} {'memory':>9}")
    with tempfile.TemporaryDirectory() as folder:
        rows = normalize(torch.randn(GALLERY, sides.width), dim=-1).numpy()
        np.save(Path(folder, "vectors.npy"), rows)
        vectors = np.load(Path(folder, "vectors.npy"), mmap_mode="r")
        texts = [sides.texts(1) for _ in range(queries + WARM_UP)]
        for batch in (*size.query_batches, GALLERY):
            search_index.BLOCK_ROWS = batch
            reset_peak(sides.device)
            encoding, whole = [], []
            for ids, mask in texts:
                start = time.perf_counter()
                query = sides.encode_texts(ids, mask).float().cpu().numpy()
                encoded = time.perf_counter()
                search_index.nearest(vectors, query, TOP)
                encoding.append(encoded - start)
                whole.append(time.perf_counter() - start)
            print_latency("encoded", batch, whole, peak(sides.device))
            print_latency("  its words", batch, encoding, "")
            p95 = [float(np.percentile(times[WARM_UP:], 95)) for times in (whole, encoding)]
            ratios.record(
                f"one query in batches of {batch}: P95 / that of its text encoding", p95[0] / p95[1], at_most=QUERY_AIM
            )
        for batch in size.query_batches:
            work = sides.fuse(sides.encodings(batch, 1))
            times = [
                seconds(work, sides.device, time.perf_counter) * GALLERY / batch
                for _ in range(FUSION_WARM_UP + size.rounds)
            ]
            reset_peak(sides.device)
            work()
            kept = [1e3 * time for time in times[FUSION_WARM_UP:]]
            figures = [1e3 * times[0], statistics.mean(kept), min(kept), max(kept)]
            shown = " ".join(f"{figure:8,.0f}" for figure in figures)
            print(
                f"{'fusion':12} {batch:6} {shown} {'':17} {peak(sides.device):>9}  extrapolated from {size.rounds} batches"
            )


def print_latency(name: str, batch: int, times: list[float], memory: str) -> None:
    """Print one row: the first query, then statistics without the warm-up. `times`: seconds."""
    first, kept = times[0], np.array(times[WARM_UP:])
    figures = [first, kept.mean(), kept.min(), kept.max(), np.percentile(kept, 95), np.percentile(kept, 99.99)]
    print(f"{name:12} {batch:6} " + " ".join(f"{1e3 * figure:8.2f}" for figure in figures) + f" {memory:>9}")


def reset_peak(device: torch.device) -> None:
    """Start a new peak of memory from what is held now (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> str:
    """Return the most memory since `reset_peak`: allocated on the GPU, or held by the whole process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    status = Path("/proc/self/status").read_text()
    return f"{int(status.split('VmHWM:')[1].split()[0]) / 1e6:.2f} GB"


def main() -> int:
    """Measure both parts; return the exit code."""
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
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.retrieval_speed", *sys.argv[1:]], environment)
    torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    overrides = {name: getattr(options, name) for name in ("batch", "rounds", "queries", "query_batches")}
    size = Size(**{**vars(size), **{name: value for name, value in overrides.items() if value}})
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
    ratios = Ratios()
    with torch.inference_mode():
        all_pairs(sides, size, options.whole, ratios)
        one_query(sides, size, size.queries, ratios)
    return ratios.close()


if __name__ == "__main__":
    sys.exit(main())
