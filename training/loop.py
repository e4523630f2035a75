"""The loop that pretraining and fine-tuning share: batch, step, log, validate, checkpoint, stop when asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.stream.shard_stream import ShardStream
from runtime.checkpoint_writer import CheckpointWriter, Write
from runtime.errors import Interrupted, LigatureError
from runtime.interrupts import watch_interrupts
from runtime.metrics import MetricsLog
from runtime.progress import progress
from runtime.ranks import Ranks, any_rank, join, sum_over_ranks
from runtime.run_folder import RunFolder
from runtime.straggler import StragglerWatch
from runtime.watchdog import Watchdog, watch_ranks
from training.config import LoopConfig
from training.profile import profiled
from training.sick_steps import SickSteps


@dataclass
class Stage:
    """What a stage brings to the loop."""

    take_step: Callable[[dict[str, Any], float, int], dict[str, Tensor]]
    """(batch, epochs consumed before it, steps taken before it) -> figures of the step, scalars, `loss` among them. It asks
    `sick.admits` before it applies anything."""
    validate: Callable[[], dict[str, float]] | None
    """-> figures, `validation/rsum` among them."""
    save: Callable[[int, float, bool], Write | None]
    """(step, best rsum so far, whether this step is the best) -> what is left to do on the first rank once all state has been
    copied to host memory."""
    go_back: Callable[[int], int]
    """Restore weights, optimizer, teacher and queue from the newest checkpoint not after a step, the data's cursor left where it
    is. -> that checkpoint's step."""


def run_loop(
    run: RunFolder,
    config: LoopConfig,
    stream: ShardStream,
    stage: Stage,
    sick: SickSteps,
    watchdog: Watchdog,
    ranks: Ranks,
    device: torch.device,
    step: int,
    best: float,
) -> None:
    """From `step` to the last one. Raises Interrupted, its state saved, when any rank was asked to stop."""
    steps = config.total_steps(len(stream))
    log = MetricsLog(run.path, step, run.lease) if ranks.first else None
    straggler = StragglerWatch(ranks)
    sick_log = run.path / "sick_steps.jsonl"
    writing, standing, stalled = False, best, 0.0

    def settled() -> bool:
        """Wait for the checkpoint being written, if any. -> whether it stands; where not, its step was not the best one either."""
        nonlocal best, standing, writing
        watchdog.enter_phase("waiting for a checkpoint to be written", step)
        stands = not any_rank(not writer.finish())
        best = standing = best if stands else standing
        sick.returns = 0 if writing and stands else sick.returns
        writing = False
        return stands

    counting = progress(run.path.name, steps, "steps", step, silent=not ranks.first)
    with CheckpointWriter() as writer, watch_interrupts() as interrupts, counting as bar:
        if interrupts.received_on_any_rank():
            raise Interrupted(f"stopped at step {step} of {steps}, before a step was taken; the same command goes on")
        batches = iter(stream)
        while step < steps:
            began = time.monotonic()
            epoch = stream.epoch
            watchdog.enter_phase("reading data", step + 1)
            with profiled("data wait"):
                batch = next(batches)
            waited = time.monotonic() - began
            watchdog.enter_phase("its own part of the step", step + 1)
            figures = stage.take_step(batch, epoch, step)
            step += 1
            last, improved = step == steps, False
            straggler.add(waited, watchdog.own_work, time.monotonic() - began)

            if sick.steeper and ranks.first:
                print(f"ligature: step {step}: {sick.steeper}", file=sys.stderr)
            if sick.reason:
                sick.note(step, float(figures["loss"]), batch["keys"], ranks, sick_log)
                if sick.exhausted:
                    settled()
                    healthy = sick.give_up_or_return(step, sick_log)
                    watchdog.enter_phase("going back to a checkpoint", step)
                    step = stage.go_back(healthy)
                    bar.done = step
                    if log:
                        log.forget_after(step)
                    continue

            if step % config.log_every == 0 or last:
                figures |= {"epoch": torch.tensor(stream.epoch)}
                figures |= {"skipped_steps": torch.tensor(sick.skipped)}
                shown = over_ranks(figures, device, ranks) | straggler.report(step, run.path)
                shown |= {"samples_per_second": config.global_batch / shown["step_seconds"]}
                shown |= {"checkpoint_stall": stalled, "quarantined": float(stream.count_bad())}
                stalled = 0.0
                bar.note = f"loss {shown['loss']:.3f}  {shown['samples_per_second']:.0f} samples/s"
                if log:
                    log.write(step, {f"train/{name}": value for name, value in shown.items()})
            writer.check()
            if stage.validate and (step % config.validate_every == 0 or last):
                settled()
                watchdog.enter_phase("validating", step)
                scores = stage.validate()
                improved = scores["validation/rsum"] > best
                found = (scores[f"validation/{way}_R@10"] for way in ("image_to_text", "text_to_image"))
                bar.note = "validation R@10 {:.1f} / {:.1f}".format(*found)
                if log:
                    log.write(step, scores)
            bar.advance(1)

            stopping = interrupts.received_on_any_rank()
            # Nothing is kept of a sick streak but what a signal asks for: the last good checkpoint must not be pushed out by it.
            due = (improved or step % config.checkpoint_every == 0) and not sick.in_a_row
            if due or last or stopping:
                began = time.monotonic()
                settled()
                best = scores["validation/rsum"] if improved else best
                watchdog.enter_phase("saving a checkpoint", step)
                writer.start(stage.save(step, best, improved))
                writing, stalled = True, stalled + time.monotonic() - began
            saved = (stopping or last) and settled()
            if stopping and not last:
                where = f"saved in {run.checkpoints.path_of(step)}" if saved else "NOT saved"
                raise Interrupted(f"stopped at step {step} of {steps}, {where}; the same command goes on from there")
            if last and not saved:
                raise LigatureError(
                    f"all {steps} steps are taken, but the last checkpoint cannot be written; make room and start again"
                )
    if log:
        log.close()
        run.finish({"steps": step, "best_rsum": best, "quarantined": stream.count_bad(), "skipped_steps": sick.skipped})


def hold_run(recipe: Any, train: Callable[[Any, RunFolder, Ranks, torch.device, Watchdog], None]) -> Path:
    """One rank's way through a run: meet the others, hold the run's folder, train, leave it. A finished run does nothing. -> the folder."""
    run = RunFolder(recipe)
    run.check(recipe)
    if not run.finished():
        ranks, device = join(recipe.training.device, recipe.training.rank_timeout)
        try:
            with watch_ranks(ranks, recipe.training.rank_timeout) as watchdog:
                train(recipe, run, ranks, device, watchdog)
        finally:
            run.close()
    return run.path


def over_ranks(figures: dict[str, Tensor], device: torch.device, ranks: Ranks) -> dict[str, float]:
    """The mean of each figure over the ranks."""
    stacked = torch.stack([value.to(device).float().reshape(()) for value in figures.values()])
    return dict(zip(figures, (sum_over_ranks(stacked) / ranks.world).tolist(), strict=True))


def mean_figures(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each named figure over the micro-batches of a step."""
    return {name: torch.stack([part[name].float().reshape(()) for part in parts]).mean() for name in parts[0]}
