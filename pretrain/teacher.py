"""The momentum teacher: a float32 average of the student's float32 masters, outside the DeepSpeed engine."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pretrain.model.alignment_model import AlignmentModel


class Teacher:
    """`model` is what to encode with, in evaluation mode, in the compute precision; `averages` are the float32 weights.

    It has encoders, projections and the MLM head; matching head, temperature and codebook have no teacher (as in ALBEF).
    """

    def __init__(self, student: AlignmentModel, momentum: float, precision: torch.dtype = torch.float32) -> None:
        model = copy.deepcopy(student).float()
        model.codebook = None
        del model.matching_head, model.temperature
        self.momentum = momentum
        self.averages: dict[str, Tensor] = {name: parameter.data for name, parameter in model.named_parameters()}
        # bf16 cannot hold an average: steps of (1 - momentum) are lost below its resolution. It is a cast, made after each update.
        self.model = model if precision == torch.float32 else copy.deepcopy(model)
        for parameter in self.model.parameters():
            # Parameters alone: `.to(precision)` would round the pixels' mean and deviation too, which DeepSpeed leaves to the student.
            parameter.data = parameter.data.to(precision)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, masters: Iterable[tuple[str, Tensor]]) -> None:
        """averages <- momentum * averages + (1 - momentum) * masters; called after an optimizer step, and only then."""
        pairs = [(self.averages[name], master) for name, master in masters if name in self.averages]
        assert len(pairs) == len(self.averages), "every weight of the teacher has a master"
        torch._foreach_lerp_([average for average, _ in pairs], [master for _, master in pairs], 1 - self.momentum)
        self._cast()

    @torch.no_grad()
    def distance(self, masters: Iterable[tuple[str, Tensor]]) -> Tensor:
        """How far the student is from its teacher: |masters - averages| / |masters|, over all weights that have a teacher."""
        pairs = [
            (self.averages[name], master.to(self.averages[name])) for name, master in masters if name in self.averages
        ]
        apart = nn.utils.get_total_norm(torch._foreach_sub([m for _, m in pairs], [average for average, _ in pairs]))
        return apart / nn.utils.get_total_norm([master for _, master in pairs])

    def load(self, averages: dict[str, Tensor]) -> None:
        """Restore the float32 weights by name."""
        for name, average in self.averages.items():
            average.copy_(averages[name])
        self._cast()

    def _cast(self) -> None:
        if next(self.model.parameters()).dtype != torch.float32:
            for name, parameter in self.model.named_parameters():
                parameter.data.copy_(self.averages[name])
