"""The loop that pretraining and fine-tuning share: batch, step, log, validate, checkpoint, stop when asked.

`TrainingLoop.run` is the order of events. Every method below it is one of them. Methods marked "a collective" are
reached by all ranks in the same step.

Tested in tests/end_to_end/test_interrupt.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoint_writer import CheckpointWriter
from runtime.errors import Interrupted, LigatureError
from runtime.interrupts import Interrupts, watch_interrupts
from runtime.metrics import MetricsLog
from runtime.progress import Progress, progress
from runtime.ranks import any_rank, sum_over_ranks
from runtime.straggler import StragglerWatch
from training.config import LoopConfig
from training.context import RunContext
from training.profile import profiled
from training.resume import find_healthy
from training.stage import LoopState, Stage
from training.trackers import Trackers, open_trackers


class TrainingLoop:
    """Takes a stage from its current step to its last one."""

    writer: CheckpointWriter
    interrupts: Interrupts
    bar: Progress
    trackers: Trackers

    def __init__(self, context: RunContext, config: LoopConfig, stage: Stage, state: LoopState) -> None:
        self.context, self.config, self.stage, self.state = context, config, stage, state
        self.steps = config.total_steps(len(state.stream))
        first, folder = context.ranks.first, context.folder
        self.log = MetricsLog(folder.path, state.step, folder.lease) if first else None
        self.straggler = StragglerWatch(context.ranks)
        self.sick_log = folder.path / "sick_steps.jsonl"
        self._writing = False
        self._best_on_disk = state.best_rsum
        """The best rsum among the checkpoints known to be on disk."""
        self._stalled = 0.0
        """Seconds spent on checkpoints since they were last logged."""

    def run(self) -> None:
        """Train up to the last step and mark the run as finished.

        Raises:
            Interrupted: a rank was asked to stop; the message says whether the state is saved.
            SickRun: too many steps in a row were sick.
            LigatureError: the last checkpoint cannot be written.
        """
        state, first = self.state, self.context.ranks.first
        bar = progress(self.context.folder.path.name, self.steps, "steps", state.step, silent=not first)
        with (
            open_trackers(self.context, self.config) as self.trackers,
            CheckpointWriter() as self.writer,
            watch_interrupts() as self.interrupts,
            bar as self.bar,
        ):
            if self.interrupts.received_on_any_rank():
                raise Interrupted(
                    f"stopped at step {state.step} of {self.steps}, before a step was taken; the same command goes on"
                )
            batches = iter(state.stream)
            while state.step < self.steps:
                batch, figures = self.take_step(batches)
                self.report_sick_step(batch, figures)
                if state.sick.reason and state.sick.exhausted:
                    self.go_back()
                    # The iterator stays where it is, so the run continues with the data after the sick steps.
                    continue
                if state.step % self.config.log_every == 0 or self.at_last_step:
                    self.log_step(figures)
                # A lost lease stops the run here, long before its next checkpoint would.
                self.writer.check()
                new_best = None
                if self.stage.validates and (state.step % self.config.validate_every == 0 or self.at_last_step):
                    new_best = self.validate()
                self.bar.advance(1)
                self.save_or_stop(new_best)
        self.finish()

    @property
    def at_last_step(self) -> bool:
        """Whether no step is left to take."""
        return self.state.step == self.steps

    def take_step(self, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read a batch and train on it, measuring how long each took. A collective.

        Returns:
            The batch, and the step's figures as `Stage.take_step` returns them.
        """
        state, watchdog = self.state, self.context.watchdog
        start = time.monotonic()
        # Read before `next`, which moves the cursor past this batch.
        epoch = state.stream.epoch
        watchdog.enter_phase("reading data", state.step + 1)
        with profiled("data wait"):
            batch = next(batches)
        waited = time.monotonic() - start
        watchdog.enter_phase("its own part of the step", state.step + 1)
        figures = self.stage.take_step(batch, epoch, state.step)
        state.step += 1
        self.straggler.add(waited, watchdog.own_work, time.monotonic() - start)
        return batch, figures

    def report_sick_step(self, batch: dict[str, Any], figures: dict[str, Tensor]) -> None:
        """Report a step that was skipped, or one with a large gradient that was applied. A collective."""
        step, sick, ranks = self.state.step, self.state.sick, self.context.ranks
        if sick.steeper and ranks.first:
            print(f"ligature: step {step}: {sick.steeper}", file=sys.stderr)
        if sick.reason:
            sick.record(step, float(figures["loss"]), batch["keys"], ranks, self.sick_log)

    def go_back(self) -> None:
        """Restore the last checkpoint before a row of sick steps, and continue with the data after them. A collective."""
        state = self.state
        # The checkpoint that is being written may be the one to go back to.
        self.wait_for_checkpoint()
        healthy = state.sick.count_return(state.step, self.sick_log)
        self.context.watchdog.enter_phase("going back to a checkpoint", state.step)
        state.step = self.stage.restore(find_healthy(self.context, healthy))["step"]
        self.bar.done = state.step
        if self.log:
            self.log.forget_after(state.step)

    def log_step(self, figures: dict[str, Tensor]) -> None:
        """Log the step's figures, averaged over the ranks. A collective."""
        state, folder = self.state, self.context.folder
        figures |= {"epoch": torch.tensor(state.stream.epoch)}
        figures |= {"skipped_steps": torch.tensor(state.sick.skipped)}
        means = mean_over_ranks(figures, self.context) | self.straggler.report(state.step, folder.path)
        means |= {"samples_per_second": self.config.global_batch / means["step_seconds"]}
        means |= {"checkpoint_stall": self._stalled, "quarantined": float(state.stream.count_bad())}
        self._stalled = 0.0
        self.bar.note = f"loss {means['loss']:.3f}  {means['samples_per_second']:.0f} samples/s"
        self.write({f"train/{name}": value for name, value in means.items()})

    def write(self, figures: dict[str, float]) -> None:
        """Log figures of the present step, on the first rank."""
        if self.log:
            self.log.write(self.state.step, figures)
            self.trackers.write(self.state.step, figures)

    def validate(self) -> float | None:
        """Validate and log the scores. A collective.

        Returns:
            The new best rsum, or None when it is no better than the best so far.
        """
        state = self.state
        # A checkpoint that cannot be written does not count as the best, so wait until its outcome is known.
        self.wait_for_checkpoint()
        self.context.watchdog.enter_phase("validating", state.step)
        validation = self.stage.validate()
        self.bar.note = f"validation {validation.summary}"
        self.write({f"validation/{name}": value for name, value in validation.figures.items()})
        value = validation.figures[validation.best_by]
        return value if value > state.best_rsum else None

    def save_or_stop(self, new_best: float | None) -> None:
        """Save a checkpoint when one is due, and stop when a rank was asked to. A collective.

        Args:
            new_best: the rsum of this step's validation, if it is the best so far.
        """
        state, last = self.state, self.at_last_step
        # Asked in every step, because a signal may reach a single rank and all must stop at the same step.
        stopping = self.interrupts.received_on_any_rank()
        improved = new_best is not None
        # During a row of sick steps save only when stopping, so that the last good checkpoint is not pushed out.
        due = (improved or state.step % self.config.checkpoint_every == 0) and not state.sick.in_a_row
        if due or last or stopping:
            self.start_checkpoint(new_best)
        # Any other write goes on beside the next steps.
        saved = (stopping or last) and self.wait_for_checkpoint()
        if stopping and not last:
            where = f"saved in {self.context.folder.checkpoints.path_of(state.step)}" if saved else "NOT saved"
            raise Interrupted(
                f"stopped at step {state.step} of {self.steps}, {where}; the same command goes on from there"
            )
        if last and not saved:
            raise LigatureError(
                f"all {self.steps} steps are taken, but the last checkpoint cannot be written; make room and start again"
            )

    def start_checkpoint(self, new_best: float | None) -> None:
        """Copy all state to host memory and begin to write it. A collective."""
        state, start = self.state, time.monotonic()
        self.wait_for_checkpoint()
        # Set before `save`, because the checkpoint stores it.
        state.best_rsum = state.best_rsum if new_best is None else new_best
        self.context.watchdog.enter_phase("saving a checkpoint", state.step)
        self.writer.start(self.stage.save(improved=new_best is not None))
        self._writing, self._stalled = True, self._stalled + time.monotonic() - start

    def wait_for_checkpoint(self) -> bool:
        """Wait for the checkpoint being written, if any. A collective.

        Returns:
            Whether it is on disk. If it is not, its step no longer counts as the best one.
        """
        state = self.state
        self.context.watchdog.enter_phase("waiting for a checkpoint to be written", state.step)
        # Only the first rank writes, but the best score decides on every rank when the next save is due.
        on_disk = not any_rank(not self.writer.finish())
        if on_disk:
            self._best_on_disk = state.best_rsum
        else:
            state.best_rsum = self._best_on_disk
        if self._writing and on_disk:
            state.sick.returns = 0  # a checkpoint after the return: going back has helped
        self._writing = False
        return on_disk

    def finish(self) -> None:
        """Close the log and mark the run as finished."""
        state = self.state
        if self.log:
            self.log.close()
            self.context.folder.finish(
                {
                    "steps": state.step,
                    "best_rsum": state.best_rsum,
                    "quarantined": state.stream.count_bad(),
                    "skipped_steps": state.sick.skipped,
                }
            )


def mean_over_ranks(figures: dict[str, Tensor], context: RunContext) -> dict[str, float]:
    """Return the mean of each figure over the ranks. A collective."""
    # Stacked, so that all figures take one collective.
    stacked = torch.stack([value.to(context.device).float().reshape(()) for value in figures.values()])
    return dict(zip(figures, (sum_over_ranks(stacked) / context.ranks.world).tolist(), strict=True))
