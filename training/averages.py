"""The exponential moving average of the weights that a run trains: what `training.ema_momentum` validates and saves.

It is kept in float32, after every applied step, beside the weights, which go on without it. A checkpoint holds it as `ema.safetensors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """A moving average that starts as the weights themselves.

    Attributes:
        weights: the averages by name, float32.
        momentum: share of the average that each update keeps.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]], momentum: float) -> None:
        self.weights = {name: weight.detach().to(torch.float32, copy=True) for name, weight in weights}
        self.momentum = momentum

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Set averages to momentum * averages + (1 - momentum) * weights. Call it after an applied step, and only then."""
        now = dict(weights)
        torch._foreach_lerp_(
            list(self.weights.values()), [now[name].detach() for name in self.weights], 1 - self.momentum
        )

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Restore the averages by name."""
        for name, average in self.weights.items():
            average.copy_(saved[name])

    @contextmanager
    def in_place_of(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Put the averages into a model for a while.

        Args:
            weights: the model's live tensors by name; afterwards they hold what they held before.
        """
        kept = {name: weights[name].detach().clone() for name in self.weights}
        try:
            for name, average in self.weights.items():
                weights[name].data.copy_(average)
            yield
        finally:
            for name, weight in kept.items():
                weights[name].data.copy_(weight)
