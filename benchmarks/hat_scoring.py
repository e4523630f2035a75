"""HAT's exact scoring against SCAN's formula with its attended vectors, in blocks of 128 x 128, with equal threads.

    python -m benchmarks.hat_scoring [--images 16] [--captions 128] [--threads 1] [--width 768]
    python -m benchmarks.hat_scoring --shortlists --checkpoint HAT --shortlist_from DUAL --data SHARDS

The first form is the claim: at least 6 x for i-t and 3 x for t-i over the three levels of HAT's Swin (784, 196 and 49 regions;
captions of 6 to 24 words). SCAN's formula goes caption by caption over a block of 128 images, as its public code does; both
sides get the same random tokens and as many threads. Each is shown with its share of the rate of a plain matrix product. Times
are the least of the repeats, taken in turn. The aims are of SCAN's own blocks, `--images 128` (2 minutes for t-i, a quarter of an hour
for i-t); in smaller ones SCAN's temporaries stay in the cache and the ratio is lower. Exits 1 where a ratio falls short, or
where the scores differ by more than 1e-4.

The second form re-ranks a dual head's shortlist: time and R@K by its size, against all pairs.
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
from finetune.heads.hat_scoring import CAPTIONS, blocks, keep_freed_memory
from finetune.heads.stacked_attention import Direction, context_gram, pair_scores

REGIONS = (784, 196, 49)
AIMS = {"image_to_text": 6.0, "text_to_image": 3.0}


def scan(regions: Tensor, words: Tensor, lengths: list[int], direction: Direction) -> Tensor:
    """The formula with its attended vectors, written from the paper: one caption at a time against all images of the block."""
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
    """As `hat_scores` does it: captions in their order of length, blocks that stay in the cache, a Gram matrix once an image."""
    gram = context_gram(regions) if direction == "text_to_image" else None
    columns = []
    for start in range(0, len(words), CAPTIONS):
        told = torch.tensor(lengths[start : start + CAPTIONS])
        mask = torch.arange(int(told.max()))[None] < told[:, None]
        part = words[start : start + CAPTIONS, : mask.shape[1]]
        rows = [
            pair_scores(regions[few], part, mask, direction, gram=None if gram is None else gram[few])
            for few in blocks(len(regions), regions.shape[1], mask.numel())
        ]
        columns.append(torch.cat(rows))
    return torch.cat(columns, dim=1)


def least(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the quickest run: of this thread where there is one, so that other work on the machine does not count."""
    times = []
    for _ in range(repeats):
        began = clock()
        work()
        times.append(clock() - began)
    return min(times)


def product_rate(width: int) -> float:
    """FLOP/s of a plain float32 matrix product of a fitting size."""
    a, b = torch.randn(1664, width), torch.randn(width, 1568)
    a @ b
    return 2 * a.shape[0] * width * b.shape[1] / least(lambda: a @ b, 10)


def claim(options: argparse.Namespace) -> bool:
    torch.manual_seed(0)
    lengths = sorted(
        (6 + torch.randint(0, 10, (options.captions,)) + torch.randint(0, 10, (options.captions,))).tolist()
    )
    words = torch.randn(options.captions, max(lengths), options.width)
    rate, fine, told = product_rate(options.width), True, Ratios()
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
                fine = False
            pairs = 2.0 * options.images * count * sum(lengths)
            gram = sum(length * length for length in lengths) * 2.0 * options.images * count
            if direction == "text_to_image":  # the upper half of each quadratic form, and the matrices themselves
                gram = (0.5 if count > 256 else 1.0) * pairs * count + (
                    0.5 if count > 256 else 1.0
                ) * 2 * options.images * count**2 * options.width
            useful["scan"] += 2 * pairs * options.width
            useful["exact"] += pairs * options.width + gram
            took = {"scan": float("inf"), "exact": float("inf")}
            for _ in range(options.repeats):
                took["scan"] = min(took["scan"], least(partial(scan, regions, words, lengths, direction), 1))
                took["exact"] = min(took["exact"], least(partial(exact, regions, words, lengths, direction), 1))
            print(f"  {direction}, {count:3} regions: SCAN {took['scan']:.3f} s, exact {took['exact']:.3f} s, "
                  f"{took['scan'] / took['exact']:.1f} x, differ by {difference:.0e}")  # fmt: skip
            for side in times:
                times[side] += took[side]
        ratio = times["scan"] / times["exact"]
        shares = {side: useful[side] / times[side] / rate for side in times}
        told.record(f"{direction}: SCAN's time / ours", ratio, at_least=aim)
        print(f"  share of the matrix product's rate: exact {shares['exact']:.0%}, "
              f"SCAN {shares['scan']:.0%}; {1e3 * times['exact'] / options.images / options.captions:.3f} ms a pair")  # fmt: skip
    return not told.close() and fine


def shortlists(options: argparse.Namespace) -> bool:
    """Time and recall by the length of the list. The times hold encoding too: that is what a user waits for."""
    from finetune.config import EvaluateRecipe
    from finetune.evaluate import evaluate

    rows = []
    for size in [*options.sizes, None]:
        out = Path(options.out) / f"shortlist-{size or 'all'}.json"
        more = {"shortlist_from": options.shortlist_from, "shortlist": size} if size else {}
        began = time.perf_counter()
        (record,) = evaluate(
            EvaluateRecipe(
                checkpoint=options.checkpoint, data=options.data, dataset="benchmark", split="as given", out=str(out),
                workers=0, **more,
            )
        )  # fmt: skip
        rows.append((size, time.perf_counter() - began, record))
    print(
        f"\n{'list':>6} {'seconds':>8} {'TR R@1':>7} {'R@5':>6} {'R@10':>6} {'IR R@1':>7} {'R@5':>6} {'R@10':>6}  ceiling TR / IR"
    )
    for size, seconds, record in rows:
        recalls = [record[way][f"R@{k}"] for way in AIMS for k in (1, 5, 10)]
        ceiling = record.get("shortlist", {}).get("recall", {})
        told = " / ".join(f"{value:.1f}" for value in ceiling.values()) or "-"
        print(f"{size or 'all':>6} {seconds:8.1f} " + " ".join(f"{value:6.1f}" for value in recalls) + f"  {told}")
    (Path(options.out) / "shortlists.json").write_text(json.dumps([(size, seconds) for size, seconds, _ in rows]))
    return True


def main() -> int:
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
    keep_freed_memory()  # as an evaluation on a CPU does; SCAN's side has it too
    with torch.no_grad():
        return 0 if (shortlists if options.shortlists else claim)(options) else 1


if __name__ == "__main__":
    sys.exit(main())
