"""The full pretraining step: samples a second, utilisation, where the time goes, and how much memory it needs.

    python -m benchmarks.pretrain_step [--config pretrain/codis_base.yaml] [--batch 8] [--steps 3] [--profile] [--key value …]

Student, teacher, transport, optimizer, EMA and queue run as `ligature pretrain` runs them under DeepSpeed. Batches are made up,
with full captions and a full queue; starting weights are random, and data cost nothing. `--key value` sets keys of the recipe. On
a CPU it runs in fp32, on a GPU in the recipe's precision.

Utilisation is needed FLOPs / time / rate of a large matrix product of the same precision. The product is measured in the same
process between the steps, and the median of the steps counts. Needed FLOPs are counted by hand in `pretrain/budget.py` and
compared with torch's own counter, which watches the first step. Aims: 0.7 on a CPU, 0.5 on a GPU; 12 GB of host memory at
batch 8 on a CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tokenizers import Tokenizer, models
from torch import Tensor

from benchmarks.flops import flop_counter
from benchmarks.ratios import MatrixProduct, Ratios, seconds
from data_tools.tokenizer import SPECIAL, CaptionTokenizer
from pretrain.budget import Budget
from pretrain.config import PretrainRecipe, divide_batch
from pretrain.engine import Engine
from pretrain.model.alignment_model import AlignmentModel
from pretrain.step_profile import StepProfile
from pretrain.task import PretrainTask
from runtime.ranks import Ranks, join
from runtime.recipe import read_recipe

AIMS = {"cpu": 0.7, "cuda": 0.5}
MEMORY_AIM = 12.0
"""GB of host memory that batch 8 of codis_base may need."""


class Step:
    """A recipe's training step on made-up batches."""

    def __init__(self, recipe: PretrainRecipe, ranks: Ranks, device: torch.device, words: int | None = None) -> None:
        self.recipe, self.device, self.number = recipe, device, 0
        self.micro_batch, accumulation = divide_batch(
            recipe.training.global_batch, recipe.training.micro_batch, ranks.world
        )
        self.local, self.words = self.micro_batch * accumulation, words or recipe.data.caption_tokens
        self.budget = Budget(recipe, self.micro_batch)
        tokenizer = made_up_tokenizer(self.budget.vocabulary, recipe.data.caption_tokens)
        torch.manual_seed(recipe.training.seed)
        model = AlignmentModel(recipe.model, tokenizer.vocabulary).to(device)
        self.task = PretrainTask(recipe, model, tokenizer, ranks, device)
        self.engine = Engine(
            self.task.student,
            recipe.optimizer,
            recipe.training.for_world_size(ranks.world),
            self.micro_batch,
            accumulation,
            device,
        )
        self.task.gathered = self.engine.gathered
        queue = self.task.queue
        queue.filled = queue.length
        for features in (queue.image, queue.text):
            torch.nn.functional.normalize(features.normal_(), dim=-1, out=features)

    def batch(self) -> dict[str, Tensor]:
        """Return a batch as ShardStream yields it, with captions of `words` words."""
        size, views = self.recipe.model.image.image_size, 2 if self.recipe.teacher.second_view else 1
        generator = torch.Generator().manual_seed(self.number)
        ids = torch.randint(len(SPECIAL), self.budget.vocabulary, (self.local, self.words), generator=generator)
        ids[:, 0], ids[:, -1] = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
        numbers = torch.arange(self.local) + self.number * self.local
        images = torch.randint(0, 256, (views, self.local, 3, size, size), generator=generator, dtype=torch.uint8)
        mask = torch.ones_like(ids, dtype=torch.bool)
        return {"images": images, "ids": ids, "mask": mask, "image_ids": numbers, "positions": numbers}

    def take(self) -> None:
        """Take one training step as `pretrain.train` does. On a GPU it is still running when this returns."""
        micro_batches, _ = self.task.prepare(self.next_batch, 2.0, self.micro_batch)
        for inputs in micro_batches:
            loss, _ = self.engine.module(inputs)
            self.engine.backward(loss)
            self.engine.step()
        self.task.finish(self.engine.masters())

    def ready(self) -> Step:
        """Make the next batch, outside of what is timed; return self."""
        self.next_batch = self.batch()
        self.number += 1
        return self


def made_up_tokenizer(vocabulary: int, caption_tokens: int) -> CaptionTokenizer:
    """Return a tokenizer of `vocabulary` meaningless words: which words they are makes no difference to the time."""
    words = {
        token: number for number, token in enumerate([*SPECIAL, *(f"w{n}" for n in range(vocabulary - len(SPECIAL)))])
    }
    return CaptionTokenizer(Tokenizer(models.WordPiece(vocab=words, unk_token="[UNK]")), caption_tokens)


def read_step_recipe(config: str, batch: int, changes: list[str], device: str) -> PretrainRecipe:
    """Return a recipe with random starting weights and one micro-batch of `batch` samples a step."""
    fixed = ["--training.global_batch", batch, "--training.micro_batch", batch, "--training.device", device]
    fixed += ["--model.image.weights", "none", "--model.text.weights", "none", "--data.train", "none"]
    fixed += ["--training.precision", "fp32"] if device == "cpu" else []
    return read_recipe(PretrainRecipe, ["--config", config, *map(str, fixed), *changes], "pretrain_step")


def read_memory(name: str) -> float:
    """Return this process's host memory in GB. `name`: `VmRSS` for now, `VmHWM` for the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e9


def measure(step: Step, rounds: int, product: MatrixProduct) -> tuple[list[float], list[float]]:
    """Return the seconds of each step, and the matrix product's FLOP/s around it (mean of before and after)."""
    times, rates, before = [], [], product.rate()
    for _ in range(rounds):
        times.append(seconds(step.ready().take, step.device))
        after = product.rate()
        rates.append((before + after) / 2)
        before = after
    return times, rates


def main(arguments: list[str] | None = None) -> int:
    """Measure the step; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pretrain/codis_base.yaml")
    parser.add_argument("--batch", type=int, help="samples a step (default 8; on a GPU the recipe's micro-batch)")
    parser.add_argument("--steps", type=int, default=3, help="steps that count; two more warm up")
    parser.add_argument("--words", type=int, help="words of each caption (default: data.caption_tokens)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="then take one more step and print its time by part")
    parser.add_argument(
        "--short",
        action="store_true",
        help="a small model, for seconds instead of minutes; its figures are not comparable",
    )
    options, changes = parser.parse_known_args(arguments)
    torch.set_num_threads(options.threads)
    ranks, device = join("auto")
    kind = device.type
    if options.short:
        options.config = "pretrain/flickr8k_cpu.yaml"
        changes = ["--model.image.image_size", "128", "--data.vocabulary", "2000", *changes]
    batch = options.batch or (16 if options.short else 8 if kind == "cpu" else 64)
    recipe = read_step_recipe(options.config, batch, changes, kind)
    step = Step(recipe, ranks, device, options.words)
    ratios = Ratios()
    with flop_counter() as counter:
        step.ready().take()
    step.ready().take()
    precision = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    times, rates = measure(step, options.steps, MatrixProduct(precision, device))

    counted, needed = counter.get_total_flops() / batch, step.budget.flops_per_sample
    print(f"{recipe.name}: {step.budget.total_parameters / 1e6:.1f} M parameters, batch {batch}, {recipe.training.precision}, {kind}, "
          f"{options.threads} thread(s), ZeRO {step.engine.stage}")  # fmt: skip
    for part, flops in step.budget.flops.items():
        print(f"  {part}: {flops / 1e9:.2f} GFLOP a sample ({flops / needed:.1%})")
    ratios.record("FLOPs by torch's counter / by hand", counted / needed, 0.97, 1.03)
    step_seconds = statistics.median(times)
    ratios.record("samples a second", batch / step_seconds)
    ratios.record("matrix product, GFLOP/s", statistics.median(rates) / 1e9)
    shares = [needed * batch / time / rate for time, rate in zip(times, rates, strict=True)]
    ratios.record("utilisation", statistics.median(shares), None if options.short else AIMS[kind])
    if kind == "cpu":
        # The matrix product's own three matrices are small beside the peak.
        ratios.record("host memory at the fullest moment, GB", read_memory("VmHWM"), at_most=MEMORY_AIM)
    else:
        ratios.record("device memory at the fullest moment, GB", torch.cuda.max_memory_allocated() / 1e9)
    if options.profile:
        profile = StepProfile(1, step.task.student.model, step.task.teacher.model, step.device)
        step.ready()
        profile.start()
        step.take()
        print("\n" + profile.stop())
    return ratios.close()


if __name__ == "__main__":
    sys.exit(main())
