"""Sick steps: a loss or gradient that is not finite, or a gradient far outside its history, must not reach the weights.

Every rank judges by the same two numbers: the loss summed over ranks, and the global gradient norm. So all ranks skip the
same steps. A skipped step leaves the optimizer, the teacher, the queue and Adam's own step count as they were. The data and
the learning rate move on, because both are functions of the step.

After `in_a_row` sick steps the samples are not to blame. The weights have not moved meanwhile, so gradients are large where
they are. If the loss there is no higher than before, the weights are on a steeper slope, as when a young model leaves its
plateau. Large gradients then count as usual. Otherwise the weights are not trusted any more. The run goes back to the last
checkpoint before the sick steps and continues with the data after them (Chowdhery et al. 2022, PaLM, section 5.1), or stops.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import deque
from itertools import chain
from pathlib import Path
from typing import Any

from runtime.errors import SickRun
from runtime.ranks import Ranks, gather_values
from training.config import SickStepConfig

ENOUGH = 4
"""Norms are judged once 1/ENOUGH of the window is filled."""


class SickSteps:
    """Judges each step, counts the skipped ones, and knows when too many were sick in a row."""

    def __init__(self, config: SickStepConfig) -> None:
        self.config = config
        self.norms: deque[float] = deque(maxlen=config.window)
        self.losses: deque[float] = deque(maxlen=config.window)
        self.streak: list[tuple[float, float]] = []
        """(loss, gradient norm) of each sick step since the last applied step."""
        self.skipped = 0
        """Steps skipped in the history of the present weights. Going back to a checkpoint restores its count."""
        self.returns = 0
        """Times the run went back since it last saved a checkpoint."""
        self.reason = ""
        """Why the last step was skipped; empty if it was applied."""
        self.steeper = ""
        """Why the last step was applied in spite of its large gradient; empty otherwise."""
        self.judged: tuple[float, float] = (0.0, 0.0)
        """(loss, gradient norm) of the last step."""
        self.frozen: frozenset[str] = frozenset()
        """The parts of the model that did not learn in the steps of the history."""

    def begin_step(self, frozen: frozenset[str]) -> None:
        """Begin the history anew when other parts of the model learn than before: their gradients have another norm.

        Args:
            frozen: the parts that do not learn in the coming step.
        """
        if frozen != self.frozen:
            self.norms.clear()
            self.losses.clear()
            self.frozen = frozen

    def admits(self, loss: float, norm: float) -> bool:
        """Return whether a step may be applied. Call it once a step.

        Args:
            loss: the step's mean loss over all ranks.
            norm: the global gradient norm, before clipping.
        """
        self.judged = loss, norm
        self.reason = self._complaint(loss, norm)
        self.steeper = ""
        if self.reason:
            self.streak.append((loss, norm))
            if self._is_steeper():
                self.steeper = f"{self.reason} for {self.in_a_row} steps, and the loss is no higher than before; such gradients count as usual from now on"
                self.reason = ""
                # The old norms would make the next steps sick too, so the history begins anew with this step.
                self.norms.clear()
                self.losses.clear()
        if self.reason:
            self.skipped += 1
        else:
            # Only applied steps count as history. Sick norms would raise the median until they passed.
            self.norms.append(norm)
            self.losses.append(loss)
            self.streak.clear()
        return not self.reason

    def _is_steeper(self) -> bool:
        """Return whether a full row of sick steps is a steeper slope: all finite, and the loss no higher than before.

        The row's median loss is compared with the highest loss of the history.
        """
        finite = all(map(math.isfinite, chain.from_iterable(self.streak)))
        if not (self.exhausted and finite and self.losses):
            return False
        return statistics.median(loss for loss, _ in self.streak) <= max(self.losses)

    def _complaint(self, loss: float, norm: float) -> str:
        """Return what is wrong with a step; empty if nothing is."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if self.config.norm_factor and len(self.norms) * ENOUGH >= self.config.window:
            usual = statistics.median(self.norms)
            if norm > self.config.norm_factor * usual:
                return f"the gradient's norm {norm:.3g} is {norm / max(usual, 1e-12):.0f} times its usual {usual:.3g}"
        return ""

    def record(self, step: int, own_loss: float, keys: list[str], ranks: Ranks, log: Path) -> None:
        """Append a skipped step to the log, and report it on the first rank's stderr. A collective.

        Args:
            step: training steps taken, this one included.
            own_loss: this rank's loss.
            keys: this rank's sample keys.
            ranks: this process among the processes of the run.
            log: path of `sick_steps.jsonl`.
        """
        # This comes before the return below, because every rank must reach the collective.
        losses_and_keys = gather_values((own_loss, keys))
        if not ranks.first:
            return
        loss, norm = self.judged
        entry = {
            "step": step,
            "reason": self.reason,
            "loss": _number(loss),
            "gradient_norm": _number(norm),
            "in_a_row": self.in_a_row,
            "ranks": [{"loss": _number(own), "keys": theirs} for own, theirs in losses_and_keys],
        }
        try:
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            where = f"its samples are in {log}"
        except OSError as error:  # a full disk must not stop the run here; the skipped step is reported all the same
            where = f"{log} cannot be written ({error.strerror}); rank 0 read {', '.join(keys[:8])} …"
        print(f"ligature: skipped step {step}: {self.reason} ({self.in_a_row} in a row); {where}", file=sys.stderr)

    @property
    def in_a_row(self) -> int:
        """Sick steps since the last step that was applied."""
        return len(self.streak)

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were sick that skipping no longer helps."""
        return self.in_a_row >= self.config.in_a_row

    def count_return(self, step: int, log: Path) -> int:
        """Count a return to the last good checkpoint, and report it on stderr.

        Args:
            step: training steps taken, the sick ones included.
            log: path of `sick_steps.jsonl`, for the messages.

        Returns:
            The last step before the row of sick ones.

        Raises:
            SickRun: the recipe says to stop, or the run has gone back `returns` times already.
        """
        message = f"{self.in_a_row} steps in a row were sick, up to step {step} ({self.reason}); see {log}"
        if self.config.then == "stop":
            raise SickRun(f"{message}; lower optimizer.lr, set optimizer.clip_norm, or look at the samples")
        if self.returns >= self.config.returns:
            raise SickRun(f"{message}; going back to the last good checkpoint did not help {self.returns} times")
        print(
            f"ligature: {message}; going back to the last checkpoint before them, and on with the data after them",
            file=sys.stderr,
        )
        healthy = step - self.in_a_row
        self.returns += 1
        self.streak.clear()
        return healthy

    def state_dict(self) -> dict[str, Any]:
        """Return the history as JSON values, so that a resumed run judges as the undisturbed one would."""
        streak = [[_number(loss), _number(norm)] for loss, norm in self.streak]
        history: dict[str, Any] = {"norms": list(self.norms), "losses": list(self.losses)}
        return history | {"skipped": self.skipped, "streak": streak, "frozen": sorted(self.frozen)}

    def load(self, state: dict[str, Any] | None) -> None:
        """Restore the history of a checkpoint. `returns` is kept: it counts how often this very method took the run back.

        Args:
            state: a `state_dict`. Old checkpoints have none, or one without losses; what is missing starts empty.
        """
        fresh: dict[str, Any] = SickSteps(self.config).state_dict()
        state = fresh | (state or {})
        self.norms = deque(state["norms"], maxlen=self.config.window)
        self.losses = deque(state["losses"], maxlen=self.config.window)
        # `_number` has stored NaN and infinity as text, which float() reads.
        self.streak = [(float(loss), float(norm)) for loss, norm in state["streak"]]
        self.skipped = state["skipped"]
        self.frozen = frozenset(state["frozen"])


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN
