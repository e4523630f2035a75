"""Gradients in micro-batches that equal those of the whole batch (GradCache: Gao et al. 2021).

A contrastive loss compares all samples of a batch, so it is no mean over micro-batches, and adding up their losses' gradients
gives another gradient. Here the encoders first run without a graph, micro-batch by micro-batch, and only their outputs are
kept. The loss of the whole batch gives the gradient of each output. Then each micro-batch runs again, with a graph and the
same dropout, and brings its outputs' gradient into the weights. What it costs is one more forward pass of the encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor, nn

from data_tools.stream.order import derived_seed
from runtime.ranks import Ranks, sum_over_ranks

T = TypeVar("T")

IMAGES, TEXTS, PAIRS = 0, 1, 2
"""What a pass encodes. Each kind has its own random numbers."""


class MicroBatches:
    """The rows of one rank's batch in micro-batches. Whenever a micro-batch runs again, dropout draws the same numbers."""

    def __init__(
        self, rows: int, size: int, seed: tuple[int, ...], autocast: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Divide the rows.

        Args:
            rows: samples of this rank's batch.
            size: samples of a micro-batch; the last one has what is left.
            seed: numbers that the random numbers of all micro-batches derive from, such as seed, step and rank.
            autocast: makes the context of a forward pass. Backward passes run outside of it.
        """
        self.parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
        self.seed, self.autocast = seed, autocast

    def run(self, forward: Callable[[slice], T], kind: int) -> Iterator[tuple[slice, T]]:
        """Run each micro-batch when its turn comes.

        Args:
            forward: called with the micro-batch's rows.
            kind: what it encodes: IMAGES, TEXTS or PAIRS.

        Yields:
            The rows and the result.
        """
        for number, part in enumerate(self.parts):
            torch.manual_seed(derived_seed(*self.seed, number, kind))
            with self.autocast():
                result = forward(part)
            yield part, result


class CachedOutput:
    """An encoder's output for the whole batch, kept without the encoder's graph.

    Losses read `output` and leave their gradient there; `backward` brings it through the encoder.
    """

    def __init__(self, micro_batches: MicroBatches, encode: Callable[[slice], Tensor], kind: int) -> None:
        """Encode the whole batch; `encode` is called with rows and returns (rows, …), `kind` as in `MicroBatches.run`."""
        self.micro_batches, self.encode, self.kind = micro_batches, encode, kind
        with torch.no_grad():
            parts = [part for _, part in micro_batches.run(encode, kind)]
        self.output = torch.cat(parts).requires_grad_()

    def backward(self) -> None:
        """Add the gradient of the encoder's weights. Call it once, after all losses."""
        gradient, self.output.grad = self.output.grad, None
        assert gradient is not None, "a loss reads the output"
        for rows, part in self.micro_batches.run(self.encode, self.kind):
            if not part.requires_grad:  # a frozen encoder
                return
            part.backward(gradient[rows])


def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Replace each gradient by its mean over the ranks, as DDP would have. A collective.

    Args:
        parameters: the same on every rank; those without a gradient, which are the same too, are left out.
        ranks: the run's ranks.
    """
    if ranks.world > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = sum_over_ranks(parameter.grad) / ranks.world
