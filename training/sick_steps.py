"""Sick steps: a loss or gradient that is not finite, or a gradient far outside its history, must not reach the weights.

Every rank judges by the same two numbers (the loss summed over ranks, the global gradient norm), so all skip alike: the
optimizer, the teacher and the queue stay as they were, and Adam's own count of steps with them. The data go on, and so does the
learning rate, both of which are functions of the step. After `in_a_row` sick steps it is not the samples: the weights, which have not
moved meanwhile, are where gradients are large. If the loss is no higher there than before, they are on a steeper slope, as when a
young model leaves its plateau, and large is the new usual. Otherwise they are not to be trusted any more: the run goes back to the
last checkpoint before them and on with the data after them (Chowdhery et al. 2022, PaLM, section 5.1), or stops.
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
"""History begins to judge when it is filled to one part in so many."""


class SickSteps:
    """Judges steps, counts the skipped ones, and says when there are too many."""

    def __init__(self, config: SickStepConfig) -> None:
        self.config = config
        self.norms: deque[float] = deque(maxlen=config.window)
        self.losses: deque[float] = deque(maxlen=config.window)
        self.streak: list[tuple[float, float]] = []
        """Loss and norm of each of the last steps, if they were sick."""
        self.skipped = 0
        """Steps skipped since the run began, as far as the weights remember."""
        self.returns = 0
        """Times the run went back since the last checkpoint that followed a healthy step."""
        self.reason = ""
        """Why the step judged last was skipped; empty where it was not."""
        self.steeper = ""
        """Why the step judged last was applied although its gradient was large; empty where it was not."""
        self.judged: tuple[float, float] = (0.0, 0.0)

    def admits(self, loss: float, norm: float) -> bool:
        """Whether a step may be applied, by its loss and gradient norm over all ranks (before clipping). Called once a step."""
        self.judged = loss, norm
        self.reason = self._complaint(loss, norm)
        self.steeper = ""
        if self.reason:
            self.streak.append((loss, norm))
            if self._is_steeper():
                self.steeper = f"{self.reason} for {self.in_a_row} steps, and the loss no higher than before: this is its usual now"
                self.reason = ""
                self.norms.clear()
                self.losses.clear()
        if self.reason:
            self.skipped += 1
        else:
            self.norms.append(norm)
            self.losses.append(loss)
            self.streak.clear()
        return not self.reason

    def _is_steeper(self) -> bool:
        """Whether the last steps had large gradients all, of losses no higher than those before (their median than the highest)."""
        finite = all(map(math.isfinite, chain.from_iterable(self.streak)))
        if not (self.exhausted and finite and self.losses):
            return False
        return statistics.median(loss for loss, _ in self.streak) <= max(self.losses)

    def _complaint(self, loss: float, norm: float) -> str:
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
        """Write a skipped step down, with every rank's loss and sample keys, and say it. A collective."""
        told = gather_values((own_loss, keys))
        if not ranks.first:
            return
        loss, norm = self.judged
        entry = {
            "step": step,
            "reason": self.reason,
            "loss": _number(loss),
            "gradient_norm": _number(norm),
            "in_a_row": self.in_a_row,
            "ranks": [{"loss": _number(own), "keys": theirs} for own, theirs in told],
        }
        try:
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            where = f"its samples are in {log}"
        except OSError as error:  # a full disk is the checkpoint's business; what is skipped must be known all the same
            where = f"{log} cannot be written ({error.strerror}); rank 0 read {', '.join(keys[:8])} …"
        print(f"ligature: skipped step {step}: {self.reason} ({self.in_a_row} in a row); {where}", file=sys.stderr)

    @property
    def in_a_row(self) -> int:
        return len(self.streak)

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were sick that skipping does not help."""
        return self.in_a_row >= self.config.in_a_row

    def count_return(self, step: int, log: Path) -> int:
        """Count a return to the last good checkpoint. -> the last step that was not sick.

        Raises SickRun where the recipe wants to stop, or returning did not help."""
        told = f"{self.in_a_row} steps in a row were sick, up to step {step} ({self.reason}); see {log}"
        if self.config.then == "stop":
            raise SickRun(f"{told}; lower optimizer.lr, set optimizer.clip_norm, or look at the samples")
        if self.returns >= self.config.returns:
            raise SickRun(f"{told}; going back to the last good checkpoint did not help {self.returns} times")
        print(
            f"ligature: {told}; going back to the last checkpoint before them, and on with the data after them",
            file=sys.stderr,
        )
        healthy = step - self.in_a_row
        self.returns += 1
        self.streak.clear()
        return healthy

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: a resumed run judges as the undisturbed one would."""
        streak = [[_number(loss), _number(norm)] for loss, norm in self.streak]
        return {"norms": list(self.norms), "losses": list(self.losses), "skipped": self.skipped, "streak": streak}

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint (none: one made before steps were judged; without losses: before those were kept). How often the
        run went back is no part of it: that is why it is loaded."""
        fresh: dict[str, Any] = SickSteps(self.config).state_dict()
        state = fresh | (state or {})
        self.norms = deque(state["norms"], maxlen=self.config.window)
        self.losses = deque(state["losses"], maxlen=self.config.window)
        self.streak = [(float(loss), float(norm)) for loss, norm in state["streak"]]
        self.skipped = state["skipped"]


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN
