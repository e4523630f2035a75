"""`ligature plan`: print what a pretraining run will take, before it is paid for.

Tested in tests/launch/test_plan.py.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from launch.plan import Cluster, Pace, count_samples
from pretrain.budget import Budget
from pretrain.config import PretrainRecipe, divide_batch
from runtime.errors import RecipeError
from runtime.recipe import OptionParser, read_recipe

if TYPE_CHECKING:
    from rich.table import Table

STAGES = (0, 1, 2, 3)
"""Stages of ZeRO."""
ASSUMPTIONS = (
    ("gpu-memory", 80.0, "GB of a GPU"),
    ("peak-tflops", 0.0, "a GPU's peak in TFLOP/s (default 989 in bf16, 67 in fp32: H100 SXM, dense)"),
    ("utilisation", 0.4, "share of the peak that is reached"),
    ("gpu-gbps", 3600.0, "gigabits a second that a GPU sends within a node"),
    ("network-gbps", 400.0, "gigabits a second that a GPU sends to other nodes"),
    ("overlap", 0.5, "share of the traffic that hides behind arithmetic"),
    ("disk-gb", 1.0, "GB a second that one process writes to the run's disk"),
)
"""Options that a cluster is described by: name, default, help."""


def run(arguments: list[str]) -> None:
    """Print the plan of a recipe on a cluster. Options that do not describe the cluster are the recipe's own."""
    parser = OptionParser(
        "ligature plan",
        description="Estimate memory, arithmetic, traffic and time of a pretraining run, by formulas. All other options are "
        "the recipe's, as for `ligature pretrain`.",
    )
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes")
    parser.add_argument("--gpus-per-node", type=int, required=True, help="GPUs of each node")
    parser.add_argument("--samples", type=int, help="samples of the training data (default: counted in data.train)")
    for name, default, about in ASSUMPTIONS:
        note = f" (default {default:g})" if default else ""
        parser.add_argument(f"--{name}", type=float, default=default, help=about + note)
    options, rest = parser.parse_known_args(arguments)
    check_cluster(options)
    recipe = read_recipe(PretrainRecipe, rest, "ligature plan")
    cluster = Cluster(
        options.nodes,
        options.gpus_per_node,
        options.gpu_memory,
        options.peak_tflops or (989.0 if recipe.training.precision == "bf16" else 67.0),
        options.utilisation,
        options.gpu_gbps,
        options.network_gbps,
        options.overlap,
        options.disk_gb,
    )
    print_plan(recipe, cluster, options.samples or count_samples(recipe))


def check_cluster(options: Namespace) -> None:
    """Raise RecipeError if a number of the cluster is out of its range."""
    for name, least in (("nodes", 1), ("gpus_per_node", 1), ("samples", 1), ("peak_tflops", 0), ("overlap", 0)):
        if (value := getattr(options, name)) is not None and not value >= least:
            raise RecipeError(f"--{name.replace('_', '-')} is {value:g}; it must be {least} or more")
    for name in ("gpu_memory", "utilisation", "gpu_gbps", "network_gbps", "disk_gb"):
        if not getattr(options, name) > 0:
            raise RecipeError(f"--{name.replace('_', '-')} is {getattr(options, name):g}; it must be above 0")
    for name in ("utilisation", "overlap"):
        if getattr(options, name) > 1:
            raise RecipeError(f"--{name} is {getattr(options, name):g}; it is a share, at most 1")


def print_plan(recipe: PretrainRecipe, cluster: Cluster, samples: int | None) -> None:
    """Print the tables, the checkpoint's size, the run's length and what they assume.

    Args:
        recipe: The recipe of the run.
        cluster: The machines.
        samples: Number of training samples; None: not known.
    """
    from rich.console import Console

    console = Console(highlight=False)
    training = recipe.training.for_world_size(cluster.world)
    micro_batch, accumulation = divide_batch(training.global_batch, training.micro_batch, cluster.world)
    budget = Budget(recipe, micro_batch)
    console.print(
        f"[bold]{recipe.name}[/bold] on {cluster.nodes} x {cluster.gpus_per_node} GPUs, {training.precision}: global batch "
        f"{training.global_batch:,} = {cluster.world} ranks x {accumulation} accumulated x {micro_batch}\n"
    )
    console.print(sizes_table(budget))
    console.print(stages_table(budget, cluster))
    pace = Pace.of(budget, training.zero_stage, cluster)
    step_seconds = training.global_batch / pace.samples_per_second
    lines = [
        f"Checkpoint: {format_bytes(budget.checkpoint_bytes)}, written in {budget.checkpoint_bytes / 1e9 / cluster.disk_gb:.0f} s "
        f"by one process (every {training.checkpoint_every:,} steps: {training.checkpoint_every * step_seconds / 60:.0f} min)."
    ]
    if samples or training.steps:
        steps = training.total_steps(samples or 0)
        seconds = steps * step_seconds
        epochs = f" ({training.epochs:g} epochs of {samples:,} samples)" if samples and not training.steps else ""
        lines.append(
            f"ZeRO {training.zero_stage}: {steps:,} steps{epochs} take {seconds / 86400:.1f} days, "
            f"{seconds * cluster.world / 3600:,.0f} GPU-hours; one step takes {step_seconds:.3g} s."
        )
    else:
        lines.append("Days are not known without the data; give --samples, or set data.train to a folder of shards.")
    console.print("\n".join(lines))
    console.print(format_assumptions(budget, cluster), style="dim")


def sizes_table(budget: Budget) -> Table:
    """Return the table of parameters and FLOPs by part of the model."""
    table = _table("", "parameters", "", "FLOPs a sample", "share")
    parts = [(name, f"{count / 1e6:,.1f} M") for name, count in budget.parameters.items()]
    flops = [
        (name, f"{count / 1e9:,.2f} G", f"{count / budget.flops_per_sample:.0%}")
        for name, count in budget.flops.items()
    ]
    flops += [("", "", "")] * (len(parts) - len(flops))
    for part, share in zip(parts, flops, strict=True):
        table.add_row(*part, *share)
    table.add_row(
        "all",
        f"{budget.total_parameters / 1e6:,.1f} M",
        "all",
        f"{budget.flops_per_sample / 1e9:,.2f} G",
        "",
        style="bold",
    )
    return table


def stages_table(budget: Budget, cluster: Cluster) -> Table:
    """Return the table of memory, traffic and pace under each ZeRO stage."""
    headings = [f"ZeRO {stage}" + " *" * (stage == budget.recipe.training.zero_stage) for stage in STAGES]
    table = _table("per GPU", *headings)
    memory = [budget.memory(stage, cluster.world) for stage in STAGES]
    for part in memory[0]:
        last = part == "fullest moment"
        table.add_row(
            part,
            *(_mark_fit(parts[part], cluster) if last else format_bytes(parts[part]) for parts in memory),
            end_section=last,
        )
    paces = [Pace.of(budget, stage, cluster) for stage in STAGES]
    sent = [sum(budget.traffic(stage, cluster.world).values()) for stage in STAGES]
    table.add_row("sent a step", *(format_bytes(count) for count in sent))
    table.add_row("arithmetic a step", *(f"{pace.compute * 1e3:,.0f} ms" for pace in paces))
    table.add_row("traffic a step", *(f"{pace.traffic * 1e3:,.0f} ms" for pace in paces))
    table.add_row("samples a second", *(f"{pace.samples_per_second:,.0f}" for pace in paces), style="bold")
    return table


def format_assumptions(budget: Budget, cluster: Cluster) -> str:
    """Return what the figures assume, in words."""
    return (
        f"\nAssumed: {cluster.peak_tflops:g} TFLOP/s a GPU, {cluster.utilisation:.0%} of it reached; {cluster.bytes_per_second / 1e9:g} GB/s sent by a GPU, "
        f"{cluster.overlap:.0%} of it behind arithmetic; data never waited for; captions of {budget.caption_tokens} tokens, "
        f"{budget.masked_words:.1f} of them masked; vocabulary {budget.vocabulary:,}; queue full; teacher whole on every GPU. Memory leaves out the CUDA "
        f"context (about 1 GB) and fragmentation (plan for 10 %). * is the recipe's stage.\n"
    )


def format_bytes(count: float) -> str:
    """Return a number of bytes in GB (10^9), or in MB below 0.01 GB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"


def _mark_fit(count: float, cluster: Cluster) -> str:
    """Return the bytes in green if they fit with room for CUDA's context and fragmentation, in red if they do not fit."""
    room = cluster.gpu_memory * 1e9
    colour = "green" if count * 1.1 + 1e9 < room else "yellow" if count < room else "red"
    note = {"green": "", "yellow": " (tight)", "red": " (too much)"}[colour]
    return f"[bold {colour}]{format_bytes(count)}{note}[/]"


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if not column or number == 0 else "right")
    return table
