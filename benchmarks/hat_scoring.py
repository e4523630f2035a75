"""HAT's exact scoring against SCAN's formula with its attended vectors, in blocks of 128 x 128, with equal threads.

    python -m benchmarks.hat_scoring [--images 16] [--captions 128] [--threads 1] [--width 768]
    python -m benchmarks.hat_scoring --shortlists --checkpoint HAT --shortlist_from DUAL --data SHARDS

The first form measures the claim: at least 6 x for i-t (image to text) and 3 x for t-i (text to image), over the three levels
of HAT's Swin: 784, 196 and 49 regions, captions of 6 to 24 words. SCAN's formula goes caption by caption over a block of 128
images, as its public code does. Both sides get the same random tokens and as many threads, and stand beside the rate of a plain
matrix product. Times are the least of the repeats, taken in turn.

The aims hold for SCAN's own blocks, `--images 128`: 2 minutes for t-i, a quarter of an hour for i-t. In smaller blocks SCAN's
temporaries stay in the cache, and the ratio is lower. The exit code is 1 where a ratio falls short, or where the scores differ
by more than 1e-4.

The second form reranks a dual head's shortlist: time and R@K by its size, against all pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.ratios import Ratios, clock
from finetune.heads.hat_scoring import CAPTIONS, blocks
from finetune.heads.stacked_attention import Direction, context_gram, pair_scores
from runtime.host_memory import keep_freed_memory

REGIONS = (784, 196, 49)
AIMS = {"image_to_text": 6.0, "text_to_image": 3.0}


def scan(regions: Tensor, words: Tensor, lengths: list[int], direction: Direction) -> Tensor:
    """Return scores (images, captions) by SCAN's formula with its attended vectors, one caption at a time.

    Written from the paper.

    Args:
        regions: (images, regions, width).
        words: (captions, longest caption, width).
        lengths: words of each caption.
        direction: which side asks.
    """
    columns = []
    for caption, length in zip(words, lengths, strict=True):
        text = caption[None, :length].expand(len(regions), -1, -1)
        query, context = (regions, text) if direction == "image_to_text" else (text, regions)
        similarity = functional.leaky_relu(context @ query.transpose(1, 2), 0.1)
        similarity = similarity / (similarity.norm(dim=2, keepdim=True) + 1e-8)
        attention = functional.softmax(9 * similarity.transpose(1, 2), dim=2)
        attended = attention @ context
        columns.append(functional.cosine_similarity(query, attended, dim=2).mean(1))
    return torch.stack(columns, dim=1)


def exact(regions: Tensor, words: Tensor, lengths: list[int], direction: Direction) -> Tensor:
    """Return the same scores as `hat_scores` computes them.

    Captions come in the order of their lengths, in blocks that stay in the cache; each image's Gram matrix is made once.
    """
    gram = context_gram(regions) if direction == "text_to_image" else None
    columns = []
    for start in range(0, len(words), CAPTIONS):
        own_lengths = torch.tensor(lengths[start : start + CAPTIONS])
        mask = torch.arange(int(own_lengths.max()))[None] < own_lengths[:, None]
        part = words[start : start + CAPTIONS, : mask.shape[1]]
        rows = [
            pair_scores(regions[block], part, mask, direction, gram=None if gram is None else gram[block])
            for block in blocks(len(regions), regions.shape[1], mask.numel())
        ]
        columns.append(torch.cat(rows))
    return torch.cat(columns, dim=1)


def least(work: Callable[[], object], repeats: int) -> float:
    """Return the seconds of the quickest run, by `benchmarks.ratios.clock`."""
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def product_rate(width: int) -> float:
    """Return the FLOP/s of a plain float32 matrix product of about the sizes that HAT multiplies."""
    a, b = torch.randn(1664, width), torch.randn(width, 1568)
    a @ b
    return 2 * a.shape[0] * width * b.shape[1] / least(lambda: a @ b, 10)


def claim(options: argparse.Namespace) -> bool:
    """Measure the claim; return whether every aim is met and the scores agree."""
    torch.manual_seed(0)
    lengths = sorted(
        (6 + torch.randint(0, 10, (options.captions,)) + torch.randint(0, 10, (options.captions,))).tolist()
    )
    words = torch.randn(options.captions, max(lengths), options.width)
    rate, correct, ratios = product_rate(options.width), True, Ratios()
    print(f"{options.images} images x {options.captions} captions of {sum(lengths) / len(lengths):.1f} words, {options.width} wide, "
          f"{torch.get_num_threads()} thread(s), matrix product {rate / 1e9:.1f} GFLOP/s")  # fmt: skip
    for direction, aim in AIMS.items():
        if options.direction not in (None, direction):
            continue
        times, useful = {"scan": 0.0, "exact": 0.0}, {"scan": 0.0, "exact": 0.0}
        for count in REGIONS:
            regions = torch.randn(options.images, count, options.width)
            difference = (
                (scan(regions, words, lengths, direction) - exact(regions, words, lengths, direction)).abs().max()
            )
            if difference > 1e-4:
                print(f"{direction}, {count} regions: the scores differ by {difference:.1e}")
                correct = False
            pairs = 2.0 * options.images * count * sum(lengths)
            gram = sum(length * length for length in lengths) * 2.0 * options.images * count
            if direction == "text_to_image":
                # Of large quadratic forms, and of their Gram matrices, the upper half alone is computed.
                gram = (0.5 if count > 256 else 1.0) * pairs * count + (
                    0.5 if count > 256 else 1.0
                ) * 2 * options.images * count**2 * options.width
            useful["scan"] += 2 * pairs * options.width
            useful["exact"] += pairs * options.width + gram
            best = {"scan": float("inf"), "exact": float("inf")}
            for _ in range(options.repeats):
                best["scan"] = min(best["scan"], least(partial(scan, regions, words, lengths, direction), 1))
                best["exact"] = min(best["exact"], least(partial(exact, regions, words, lengths, direction), 1))
            print(f"  {direction}, {count:3} regions: SCAN {best['scan']:.3f} s, exact {best['exact']:.3f} s, "
                  f"{best['scan'] / best['exact']:.1f} x, differ by {difference:.0e}")  # fmt: skip
            for side in times:
                times[side] += best[side]
        ratio = times["scan"] / times["exact"]
        shares = {side: useful[side] / times[side] / rate for side in times}
        ratios.record(f"{direction}: SCAN's time / ours", ratio, at_least=aim)
        print(f"  share of the matrix product's rate: exact {shares['exact']:.0%}, "
              f"SCAN {shares['scan']:.0%}; {1e3 * times['exact'] / options.images / options.captions:.3f} ms a pair")  # fmt: skip
    return not ratios.close() and correct


def shortlists(options: argparse.Namespace) -> bool:
    """Print time and recall by the size of the shortlist. Times include encoding: a user waits for that too."""
    from finetune.config import EvaluateRecipe
    from finetune.evaluate import evaluate

    rows = []
    for size in [*options.sizes, None]:
        out = Path(options.out) / f"shortlist-{size or 'all'}.json"
        settings = {"shortlist_from": options.shortlist_from, "shortlist": size} if size else {}
        start = time.perf_counter()
        (record,) = evaluate(
            EvaluateRecipe(
                checkpoint=options.checkpoint, data=options.data, dataset="benchmark", split="as given", out=str(out),
                workers=0, **settings,
            )
        )  # fmt: skip
        rows.append((size, time.perf_counter() - start, record))
    print(
        f"\n{'list':>6} {'seconds':>8} {'TR R@1':>7} {'R@5':>6} {'R@10':>6} {'IR R@1':>7} {'R@5':>6} {'R@10':>6}  ceiling TR / IR"
    )
    for size, seconds, record in rows:
        recalls = [record[direction][f"R@{k}"] for direction in AIMS for k in (1, 5, 10)]
        ceiling = record.get("shortlist", {}).get("recall", {})
        ceilings = " / ".join(f"{value:.1f}" for value in ceiling.values()) or "-"
        print(f"{size or 'all':>6} {seconds:8.1f} " + " ".join(f"{value:6.1f}" for value in recalls) + f"  {ceilings}")
    (Path(options.out) / "shortlists.json").write_text(json.dumps([(size, seconds) for size, seconds, _ in rows]))
    return True


def main() -> int:
    """Run the form that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--direction", choices=list(AIMS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--shortlists", action="store_true")
    parser.add_argument("--checkpoint")
    parser.add_argument("--shortlist_from")
    parser.add_argument("--data")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--out", default="runs/hat_scoring")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as an evaluation on a CPU does; it serves SCAN's side too
    with torch.no_grad():
        return 0 if (shortlists if options.shortlists else claim)(options) else 1


if __name__ == "__main__":
    sys.exit(main())
