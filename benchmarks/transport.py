"""Transport plans of a training step against POT's `sinkhorn_log`, at equal distance from the exact plan.

    python -m benchmarks.transport [--samples 512] [--codewords 4000] [--threads 1]

The problems are those of a step with 512 samples, 4,000 codewords and both modalities. The distance of a plan is its cost,
rounded to its marginals (Altschuler et al. 2017), above the cost of `ot.emd`'s plan; the worse of the two modalities counts.

Ours is `proximal_point` at the recipes' default, both modalities at once. POT gets float32 torch tensors, one modality after
the other. It may take as many iterations as it needs to come as near as ours: it continues from its own potentials, 25
iterations at a time, until it is there or has taken `--patience` times as long as ours. Its best regularisation of a list
counts. Times are taken in turns. Aim: ours takes at most 0.25 of POT's time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ot
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.ratios import MatrixProduct, Ratios, seconds
from pretrain.transport import proximal_point

AIM = 0.25
REGULARISATIONS = (0.005, 0.0025, 0.00125)
PIECE = 25
"""Iterations of POT between two measurements of its distance."""


def problems(samples: int, codewords: int, clustered: bool, width: int = 256) -> Tensor:
    """Return costs, 1 - cosine of two modalities' features with one codebook, (2, samples, codewords)."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape, generator=generator), dim=-1)

    if not clustered:
        return 1 - unit(2, samples, width) @ unit(codewords, width).T
    centres = unit(32, width)

    def clustered_features(*shape: int) -> Tensor:
        # A few large clusters and many small ones, as captions have.
        own_centre = (torch.rand(*shape, generator=generator) ** 2 * len(centres)).long()
        return normalize(centres[own_centre] + 0.5 * unit(*shape, width), dim=-1)

    return 1 - clustered_features(2, samples) @ clustered_features(codewords).T


def excess_cost(cost: Tensor, plan: Tensor, least: float) -> float:
    """Return the cost of a plan, rounded to uniform marginals, above the least possible cost."""
    cost, plan = cost.double().cpu(), plan.double().cpu()
    n, k = cost.shape
    plan = plan * (1 / n / plan.sum(1)).clamp(max=1)[:, None]
    plan = plan * (1 / k / plan.sum(0)).clamp(max=1)
    rows, columns = 1 / n - plan.sum(1), 1 / k - plan.sum(0)
    plan = plan + rows[:, None] * columns / rows.sum().clamp(min=1e-300)
    return float((cost * plan).sum()) - least


def pot_seconds(cost: Tensor, regularisation: float, least: float, distance: float, patience: float) -> float | None:
    """Return the seconds until POT's plan is within `distance` of the exact cost; None where they exceed `patience`."""
    n, k = cost.shape
    a, b = torch.full((n,), 1 / n), torch.full((k,), 1 / k)
    total, state = 0.0, {"warmstart": None}

    def work() -> None:
        plan, log = ot.bregman.sinkhorn_log(
            a, b, cost, regularisation, numItermax=PIECE, stopThr=0, log=True, warn=False, **state
        )
        state["plan"], state["warmstart"] = plan, (log["log_u"], log["log_v"])

    while total < patience:
        state.pop("plan", None)
        total += seconds(work)
        if excess_cost(cost, state["plan"], least) <= distance:
            return total
    return None


def main(arguments: list[str] | None = None) -> int:
    """Measure both sides; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--codewords", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--patience",
        type=float,
        default=8.0,
        help="times our time that POT may take, for each modality and regularisation (default 8)",
    )
    parser.add_argument("--short", action="store_true", help="128 samples, 500 codewords")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if options.short:
        options.samples, options.codewords, options.patience = 128, 500, 15.0
    ratios, cells = Ratios(), 2 * options.samples * options.codewords
    print(
        f"2 x {options.samples} x {options.codewords}, {options.threads} thread(s), {MatrixProduct().rate() / 1e9:.0f} GFLOP/s"
    )
    for kind in ("clustered", "random"):
        cost = problems(options.samples, options.codewords, kind == "clustered")
        marginals = [torch.full((size,), 1 / size, dtype=torch.float64).numpy() for size in cost.shape[1:]]
        least = [ot.emd2(*marginals, matrix.double().numpy(), numItermax=10**7) for matrix in cost]
        plan = proximal_point(cost).plan
        times = [seconds(lambda cost=cost: proximal_point(cost)) for _ in range(3)]
        distances = [excess_cost(*problem) for problem in zip(cost, plan, least, strict=True)]
        ours = statistics.median(times)
        exponentials = [seconds(lambda cost=cost: torch.exp(cost)) for _ in range(5)]
        print(f"{kind}: ours {1e3 * ours:.0f} ms, {max(distances):.1e} above the exact cost; "
              f"{ours / min(exponentials):.0f} times one exponential of all {cells / 1e6:.1f} M entries")  # fmt: skip
        theirs = []
        for regularisation in REGULARISATIONS:
            pot_times = []
            for matrix, value in zip(cost, least, strict=True):
                pot_time = pot_seconds(matrix, regularisation, value, max(distances), options.patience * ours)
                pot_times.append(pot_time)
                if pot_time is None:
                    break
            times.append(seconds(lambda cost=cost: proximal_point(cost)))
            if None in pot_times:
                print(f"  POT at {regularisation}: not as near as ours within {options.patience:g} times our time")
            else:
                theirs.append(sum(time for time in pot_times if time is not None))
                print(f"  POT at {regularisation}: {1e3 * theirs[-1]:.0f} ms")
        ours = statistics.median(times)
        # Where POT never comes as near, it took at least its patience on one modality.
        ratios.record(
            f"{kind}: our time / POT's at equal distance",
            ours / min(theirs, default=options.patience * ours),
            at_most=AIM,
        )
    if torch.cuda.is_available():
        on_gpu = problems(options.samples, options.codewords, True).cuda()
        proximal_point(on_gpu)
        times = [seconds(lambda: proximal_point(on_gpu), on_gpu.device) for _ in range(10)]
        ratios.record("on the GPU, ms", 1e3 * statistics.median(times), at_most=1.0)
    return ratios.close()


if __name__ == "__main__":
    sys.exit(main())
