"""The loop that pretraining and fine-tuning share: batch, step, log, validate, checkpoint, stop when asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data_tools.stream import ShardStream
from pretrain.config import LoopConfig
from runtime.errors import Interrupted
from runtime.interrupts import watch_interrupts
from runtime.metrics import MetricsLog
from runtime.progress import progress
from runtime.ranks import Ranks, sum_over_ranks
from runtime.run_folder import RunFolder

TakeStep = Callable[[dict[str, Any], float, int], dict[str, Tensor]]
"""(batch, epochs consumed before it, steps taken before it) -> figures of the step, scalars."""
Validate = Callable[[], dict[str, float]]
"""-> figures, `validation/rsum` among them."""
Save = Callable[[int, float, bool], None]
"""(step, best rsum so far, whether this step is the best) -> a committed checkpoint."""


def run_loop(
    run: RunFolder,
    config: LoopConfig,
    stream: ShardStream,
    step: int,
    best: float,
    take_step: TakeStep,
    validate: Validate | None,
    save: Save,
    ranks: Ranks,
    device: torch.device,
) -> None:
    """From `step` to the last one. Raises Interrupted, its state saved, when any rank was asked to stop."""
    steps = config.total_steps(len(stream.reader))
    log = MetricsLog(run.path, step, run.lease) if ranks.first else None
    with watch_interrupts() as interrupts, progress(run.path.name, steps, "steps", step, silent=not ranks.first) as bar:
        batches = iter(stream)
        while step < steps:
            began = time.monotonic()
            epoch = stream.epoch
            batch = next(batches)
            waited = time.monotonic() - began
            figures = take_step(batch, epoch, step)
            step += 1
            last, improved = step == steps, False

            if step % config.log_every == 0 or last:
                taken = time.monotonic() - began
                figures |= {"epoch": torch.tensor(stream.epoch), "quarantined": torch.tensor(len(stream.bad))}
                figures |= {"samples_per_second": torch.tensor(config.global_batch / taken)}
                figures |= {"data_wait": torch.tensor(waited / taken)}
                shown = over_ranks(figures, device, ranks)
                bar.note = f"loss {shown['loss']:.3f}  {shown['samples_per_second']:.0f} samples/s"
                if log:
                    log.write(step, {f"train/{name}": value for name, value in shown.items()})
            if validate and (step % config.validate_every == 0 or last):
                scores = validate()
                improved, best = scores["validation/rsum"] > best, max(best, scores["validation/rsum"])
                found = (scores[f"validation/{way}_R@10"] for way in ("image_to_text", "text_to_image"))
                bar.note = "validation R@10 {:.1f} / {:.1f}".format(*found)
                if log:
                    log.write(step, scores)
            bar.advance(1)

            stopping = interrupts.agreed()
            if improved or last or stopping or step % config.checkpoint_every == 0:
                save(step, best, improved)
            if stopping and not last:
                where = run.checkpoints.path_of(step)
                raise Interrupted(
                    f"stopped at step {step} of {steps}, saved in {where}; the same command goes on from there"
                )
    if log:
        log.close()
        run.finish({"steps": step, "best_rsum": best, "quarantined": len(stream.bad)})


def over_ranks(figures: dict[str, Tensor], device: torch.device, ranks: Ranks) -> dict[str, float]:
    """The mean of each figure over the ranks."""
    stacked = torch.stack([value.to(device).float().reshape(()) for value in figures.values()])
    return dict(zip(figures, (sum_over_ranks(stacked) / ranks.world).tolist(), strict=True))


def mean_figures(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each named figure over the micro-batches of a step."""
    return {name: torch.stack([part[name].float().reshape(()) for part in parts]).mean() for name in parts[0]}
