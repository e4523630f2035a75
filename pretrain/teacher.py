"""The momentum teacher: a float32 average of the student's float32 masters, outside the DeepSpeed engine."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pretrain.model.alignment_model import AlignmentModel


class Teacher:
    """A momentum copy of the student's encoders, projections and masked-language head.

    Matching head, temperature and codebook have no teacher (as in ALBEF).

    Attributes:
        model: encodes, in evaluation mode and in the compute precision.
        averages: the float32 weights by name.
        momentum: share of the average that each update keeps.
    """

    def __init__(self, student: AlignmentModel, momentum: float, precision: torch.dtype = torch.float32) -> None:
        model = copy.deepcopy(student).float()
        model.drop_codebook()
        del model.matching_head, model.temperature
        self.momentum = momentum
        self.averages: dict[str, Tensor] = {
            name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        # bf16 cannot hold an average: steps of (1 - momentum) are lost below its resolution. So a bf16 model is a cast of the averages.
        self.model = model if precision == torch.float32 else copy.deepcopy(model)
        for parameter in self.model.parameters():
            # Parameters alone: `.to(precision)` would round the pixels' mean and deviation too, and the student's are not rounded.
            parameter.data = parameter.data.to(precision)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, masters: Iterable[tuple[str, Tensor]]) -> None:
        """Set averages to momentum * averages + (1 - momentum) * masters. Call it after an optimizer step, and only then.

        Args:
            masters: name and float32 weight of every parameter of the student; those without a teacher are ignored.
        """
        pairs = [(self.averages[name], master) for name, master in masters if name in self.averages]
        assert len(pairs) == len(self.averages), "every weight of the teacher has a master"
        torch._foreach_lerp_([average for average, _ in pairs], [master for _, master in pairs], 1 - self.momentum)
        self._cast()

    @torch.no_grad()
    def distance(self, masters: Iterable[tuple[str, Tensor]]) -> Tensor:
        """Return |masters - averages| / |masters| over all weights that have a teacher; arguments as in `update`."""
        pairs = [
            (self.averages[name], master.to(self.averages[name])) for name, master in masters if name in self.averages
        ]
        averages, masters_with_teacher = [average for average, _ in pairs], [master for _, master in pairs]
        difference = nn.utils.get_total_norm(torch._foreach_sub(masters_with_teacher, averages))
        return difference / nn.utils.get_total_norm(masters_with_teacher)

    def load(self, averages: dict[str, Tensor]) -> None:
        """Restore the float32 weights by name."""
        for name, average in self.averages.items():
            average.copy_(averages[name])
        self._cast()

    def _cast(self) -> None:
        if next(self.model.parameters()).dtype != torch.float32:
            for name, parameter in self.model.named_parameters():
                if name in self.averages:  # frozen weights have no average
                    parameter.data.copy_(self.averages[name])
