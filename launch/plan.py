"""`ligature plan`: what a pretraining run will take, before it is paid for. Formulas are in `pretrain/budget.py`; no torch is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.budget import Budget
from pretrain.config import PretrainRecipe, divide_batch
from runtime.errors import RecipeError
from runtime.recipe import OptionParser

if TYPE_CHECKING:
    from rich.table import Table

STAGES = (0, 1, 2, 3)


@dataclass
class Cluster:
    """What the machines are taken to do; every number is an assumption that an option changes."""

    nodes: int
    gpus_per_node: int
    gpu_memory: float
    """GB (10^9 bytes)."""
    peak_tflops: float
    utilisation: float
    """Share of the peak that a step's arithmetic reaches."""
    gpu_gbps: float
    """Gigabits a second that a GPU sends within its node."""
    network_gbps: float
    """… and between nodes."""
    overlap: float
    """Share of the traffic that hides behind arithmetic."""
    disk_gb: float
    """GB a second that one process writes to the run's disk."""

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def bytes_per_second(self) -> float:
        return (self.network_gbps if self.nodes > 1 else self.gpu_gbps) / 8 * 1e9


def plan(arguments: list[str]) -> None:
    """Print the plan of a recipe on a cluster. Options that are not the cluster's are the recipe's own, as for `pretrain`."""
    parser = OptionParser(
        "ligature plan",
        description="Memory, arithmetic, traffic and time of a pretraining run, in closed form. Other options are the recipe's.",
    )
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--samples", type=int, help="samples of the training data (default: counted in data.train)")
    for name, default, about in (
        ("gpu-memory", 80.0, "GB of a GPU"),
        ("peak-tflops", 0.0, "a GPU's peak; default 989 in bf16, 67 in fp32 (H100 SXM, dense)"),
        ("utilisation", 0.4, "share of the peak that is reached"),
        ("gpu-gbps", 3600.0, "gigabits a second a GPU sends within a node"),
        ("network-gbps", 400.0, "gigabits a second a GPU sends to other nodes"),
        ("overlap", 0.5, "share of the traffic that hides behind arithmetic"),
        ("disk-gb", 1.0, "GB a second written to the run's disk"),
    ):
        parser.add_argument(
            f"--{name}", type=float, default=default, help=f"{about} (default {default:g})" * bool(default) or about
        )
    options, rest = parser.parse_known_args(arguments)
    for name in ("nodes", "gpus_per_node"):
        if getattr(options, name) < 1:
            raise RecipeError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be 1 or more")
    from runtime.recipe import read_recipe

    recipe = read_recipe(PretrainRecipe, rest, "ligature plan")
    peak = options.peak_tflops or (989.0 if recipe.training.precision == "bf16" else 67.0)
    cluster = Cluster(
        options.nodes,
        options.gpus_per_node,
        options.gpu_memory,
        peak,
        options.utilisation,
        options.gpu_gbps,
        options.network_gbps,
        options.overlap,
        options.disk_gb,
    )
    samples = options.samples or count_samples(recipe)
    show(recipe, cluster, samples)


def count_samples(recipe: PretrainRecipe) -> int | None:
    """Samples of the recipe's shards, before any selection, where they are at hand."""
    train = recipe.data.train
    folders = [Path(folder) for folder in ([train] if isinstance(train, str) else train) if folder]
    if not folders or not all((folder / "manifest.json").is_file() for folder in folders):
        return None
    from data_tools.shards.manifest import read_manifest

    return sum(read_manifest(folder, check=False).samples for folder in folders)


@dataclass
class Pace:
    """How fast a run goes on a cluster, by the plan."""

    compute: float
    """Seconds of arithmetic a step."""
    traffic: float
    """Seconds of communication a step, before overlap."""
    samples_per_second: float

    @classmethod
    def of(cls, budget: Budget, stage: int, cluster: Cluster) -> Pace:
        batch = budget.recipe.training.global_batch
        compute = budget.flops_per_sample * batch / cluster.world / (cluster.peak_tflops * 1e12 * cluster.utilisation)
        traffic = sum(budget.traffic(stage, cluster.world).values()) / cluster.bytes_per_second
        hidden = min(cluster.overlap * traffic, compute)
        return cls(compute, traffic, batch / (compute + traffic - hidden))


def show(recipe: PretrainRecipe, cluster: Cluster, samples: int | None) -> None:
    """Print the tables."""
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
    chosen = Pace.of(budget, training.zero_stage, cluster)
    saved = budget.checkpoint_bytes
    lines = [
        f"Checkpoint: {gigabytes(saved)}, written in {saved / 1e9 / cluster.disk_gb:.0f} s by one process "
        f"(every {training.checkpoint_every:,} steps: {training.checkpoint_every * training.global_batch / chosen.samples_per_second / 60:.0f} min)."
    ]
    if samples or training.steps:
        steps = training.total_steps(samples or 0)
        seconds = steps * training.global_batch / chosen.samples_per_second
        over = f" ({training.epochs:g} epochs of {samples:,} samples)" if samples and not training.steps else ""
        lines.append(
            f"ZeRO {training.zero_stage}: {steps:,} steps{over} take {seconds / 86400:.1f} days, "
            f"{seconds * cluster.world / 3600:,.0f} GPU-hours; one step {chosen.samples_per_second and training.global_batch / chosen.samples_per_second:.3g} s."
        )
    else:
        lines.append("Days are not known without the data: give --samples, or data.train a folder of shards.")
    console.print("\n".join(lines))
    console.print(assumptions(budget, cluster), style="dim")


def sizes_table(budget: Budget) -> Table:
    """Parameters and FLOPs by part."""
    table = _table("", "parameters", "", "FLOPs a sample", "share")
    parts = [(name, f"{count / 1e6:,.1f} M") for name, count in budget.parameters.items()]
    flops = [
        (name, f"{count / 1e9:,.2f} G", f"{count / budget.flops_per_sample:.0%}")
        for name, count in budget.flops.items()
    ]
    flops += [("", "", "")] * (len(parts) - len(flops))
    for part, spent in zip(parts, flops, strict=True):
        table.add_row(*part, *spent)
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
    """Memory, traffic and pace under each ZeRO stage."""
    named = [f"ZeRO {stage}" + " *" * (stage == budget.recipe.training.zero_stage) for stage in STAGES]
    table = _table("per GPU", *named)
    memory = [budget.memory(stage, cluster.world) for stage in STAGES]
    for part in memory[0]:
        fits = part == "fullest moment"
        table.add_row(
            part, *(_fitting(one[part], cluster) if fits else gigabytes(one[part]) for one in memory), end_section=fits
        )
    paces = [Pace.of(budget, stage, cluster) for stage in STAGES]
    sent = [sum(budget.traffic(stage, cluster.world).values()) for stage in STAGES]
    table.add_row("sent a step", *(gigabytes(one) for one in sent))
    table.add_row("arithmetic a step", *(f"{one.compute * 1e3:,.0f} ms" for one in paces))
    table.add_row("traffic a step", *(f"{one.traffic * 1e3:,.0f} ms" for one in paces))
    table.add_row("samples a second", *(f"{one.samples_per_second:,.0f}" for one in paces), style="bold")
    return table


def assumptions(budget: Budget, cluster: Cluster) -> str:
    """What the figures rest on, in words."""
    return (
        f"\nAssumed: {cluster.peak_tflops:g} TFLOP/s a GPU, {cluster.utilisation:.0%} of it reached; {cluster.bytes_per_second / 1e9:g} GB/s sent by a GPU, "
        f"{cluster.overlap:.0%} of it behind arithmetic; data never waited for; captions of {budget.caption_tokens} tokens, "
        f"{budget.masked_words:.1f} of them masked; vocabulary {budget.vocabulary:,}; queue full; teacher whole on every GPU. Memory leaves out the CUDA "
        f"context (about 1 GB) and fragmentation (plan for 10 %). * is the recipe's stage.\n"
    )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"


def _fitting(count: float, cluster: Cluster) -> str:
    """Green where it fits with room for the CUDA context and fragmentation, red where it does not fit at all."""
    room = cluster.gpu_memory * 1e9
    colour = "green" if count * 1.1 + 1e9 < room else "yellow" if count < room else "red"
    note = {"green": "", "yellow": " (tight)", "red": " (too much)"}[colour]
    return f"[bold {colour}]{gigabytes(count)}{note}[/]"


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if not column or number == 0 else "right")
    return table
