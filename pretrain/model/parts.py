"""The parts of a model: which one a parameter belongs to, how fast it learns there, and from which epoch.

Three parts are encoders: `image`, `text` and `fusion`. Every other parameter (projections, heads, codebook, temperature, a learned
query) belongs to `new`. A model names its encoders by `parts()`. Pretraining and every head of fine-tuning read this file alone.

To let a new kind of encoder take part: give it `layers`, or nothing where it is a timm model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.models import group_parameters
from torch import Tensor, nn

from runtime.errors import RecipeError
from training.config import OptimizerConfig

TOWERS = ("image", "text")
"""The parts that `optimizer.layer_decay` slows down, layer by layer."""


@dataclass(frozen=True)
class Part:
    """An encoder within a model."""

    module: nn.Module
    """Its parameters are the part's."""
    layers: Sequence[nn.Module]
    """Its layers, lowest first."""

    def depths(self) -> dict[int, int]:
        """Return how many layers lie above each parameter, by the parameter's id; 0 at the top.

        A timm model groups its parameters itself. Elsewhere what the module holds before its first layer (embeddings) lies below all
        layers, and what it holds after them (a last norm, a pooling) belongs to the top one.
        """
        if (matcher := getattr(self.module, "group_matcher", None)) is not None:
            # Any: timm's annotation promises the inverse dictionary, which it returns without `reverse`.
            numbers: Any = group_parameters(self.module, matcher(coarse=False), reverse=True)
            top = max(numbers.values())
            return {id(parameter): top - numbers[name] for name, parameter in self.module.named_parameters()}
        layer_of = {id(p): number for number, layer in enumerate(self.layers, 1) for p in layer.parameters()}
        depths, reached, top = {}, 0, len(self.layers)
        for parameter in self.module.parameters():
            number = layer_of.get(id(parameter), top if reached == top else 0)
            reached = max(reached, number)
            depths[id(parameter)] = top - number
        return depths


def encoder_parts(image_encoder: Any, text_encoder: Any) -> dict[str, Part]:
    """Return the parts of an image encoder (`pretrain/model/image_encoder.py`) and a text encoder.

    The image encoder's learned query is none of its published model, and so `new`.
    """
    return {
        "image": Part(image_encoder.vit, image_encoder.layers()),
        "text": Part(text_encoder, list(text_encoder.layers)),
    }


def has_weight_decay(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter takes weight decay: matrices do; biases, norms and the temperature do not.

    This is ALBEF's rule, except that its 0-d temperature takes decay.
    """
    return parameter.ndim > 1 and not name.endswith(".bias")


def parameter_groups(
    named: Mapping[str, nn.Parameter], parts: Mapping[str, Part], optimizer: OptimizerConfig
) -> list[dict[str, Any]]:
    """Return AdamW's groups. Two of them, with and without weight decay, where all parameters learn at one rate.

    Args:
        named: the parameters that learn, by name.
        parts: the model's encoders by name.
        optimizer: the rates.

    Returns:
        Groups with `lr_share`, their share of the learning rate, and `part`, their part where it waits for an epoch, else "".
    """
    homes: dict[int, tuple[str, int]] = {}
    for part, encoder in parts.items():
        depths = encoder.depths() if optimizer.layer_decay < 1 and part in TOWERS else {}
        homes |= {id(parameter): (part, depths.get(id(parameter), 0)) for parameter in encoder.module.parameters()}
    groups: dict[tuple[str, float], tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for name, parameter in named.items():
        part, depth = homes.get(id(parameter), ("new", 0))
        share = getattr(optimizer.rates, part) * optimizer.layer_decay**depth
        waits = part if optimizer.freeze_until.of(part) else ""
        groups.setdefault((waits, share), ([], []))[not has_weight_decay(name, parameter)].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay, "lr_share": share, "part": waits}
        for (waits, share), both in groups.items()
        for parameters, weight_decay in zip(both, (optimizer.weight_decay, 0.0), strict=True)
        if parameters
    ]


class Freezing:
    """Keeps parts of a model from learning until their epoch.

    A frozen part has no gradient, no dropout and no optimizer step: it is what it was, to the bit, and Adam begins with it when it
    thaws. What is frozen is a function of the epoch, so a resumed run follows it.

    Attributes:
        waiting: the parts that learn later.
        frozen: those that do not learn in the present step.
    """

    def __init__(self, root: nn.Module, parts: Mapping[str, Part], until: Mapping[str, float]) -> None:
        """Name the parts that wait. Nothing is frozen before `apply`, except what never learns.

        Args:
            root: the module whose `train` sets the training mode of the whole model.
            parts: the model's encoders by name.
            until: the epoch from which a part learns; infinite: never, and its parameters are no longer among those that learn.

        Raises:
            RecipeError: a part that should thaw has no weights that could learn.
        """
        self.root, self.frozen = root, frozenset[str]()
        self._until = {name: epoch for name, epoch in until.items() if epoch > 0 and name in parts}
        self._modules = {name: parts[name].module for name in self._until}
        self._learning: dict[str, list[nn.Parameter]] = {}
        for name, epoch in self._until.items():
            learning = [parameter for parameter in parts[name].module.parameters() if parameter.requires_grad]
            if math.isinf(epoch):
                parts[name].module.requires_grad_(False)
            elif not learning:
                raise RecipeError(
                    f"optimizer.freeze_until.{name} is {epoch:g}, but that encoder does not learn at all; set it to 0, or let it learn"
                )
            self._learning[name] = [] if math.isinf(epoch) else learning
        self.waiting = frozenset(name for name, learning in self._learning.items() if learning)

    def apply(self, epoch: float) -> frozenset[str]:
        """Freeze and release the parts for a training step, and return the frozen ones.

        Args:
            epoch: epochs consumed before the step.
        """
        frozen = frozenset(name for name, until in self._until.items() if epoch < until)
        if frozen != self.frozen:
            self.root.train()
            for name, learning in self._learning.items():
                for parameter in learning:
                    parameter.requires_grad_(name not in frozen)
        for name in frozen:  # in every step, because a validation sets the mode of the whole model
            self._modules[name].eval()
        self.frozen = frozen
        return frozen

    def caveat(self, epochs: float) -> str:
        """Return a warning where a run of this many epochs ends before a part learns, or an empty string."""
        asleep = [f"{name} ({until:g})" for name, until in self._until.items() if epochs <= until < math.inf]
        return (
            f"the run ends after {epochs:.3g} epochs, so these parts never learn: {', '.join(asleep)}" if asleep else ""
        )
