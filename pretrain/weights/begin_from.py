"""A fresh run that begins where another model ended: a run of ours, an export, an imported ALBEF."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

from torch import Tensor

from pretrain.model.alignment_model import AlignmentModel
from pretrain.weights.load import at_resolution, load_model
from runtime.checkpoint import read_tensors
from runtime.errors import CheckpointError

ENCODERS = ("image_encoder.", "text_encoder.")
"""What must be there whole; heads, fusion layers and codebook may be new, or left behind."""


def begin_from(source: Path, model: AlignmentModel) -> tuple[list[str], dict[str, Tensor] | None]:
    """Copy the weights of `source` into `model`, position embeddings interpolated to its resolution.

    -> lines that report what was and was not used, and the averages of the teacher, where `source` has one. Its queue stays
    behind: a new run's images have other numbers. Raises CheckpointError where sizes differ or `source` is fine-tuned.
    """
    start = load_model(source)
    if start.training != "pretrained":
        raise CheckpointError(
            f"checkpoint: {start.folder} is {start.training}, so what is pretrained from it would not be scored zero-shot; give one "
            "that is pretrained alone"
        )
    teacher = None
    if (start.folder / "teacher.safetensors").is_file():
        averaged = copy.deepcopy(start.network)
        averages = read_tensors(start.folder, "teacher")
        averaged.load_state_dict(averages, strict=False)  # it has no matching head, temperature and codebook
        averaged = at_resolution(averaged, model.config.image.image_size)
        teacher = {name: weight.data for name, weight in averaged.named_parameters() if name in averages}
    network = at_resolution(start.network, model.config.image.image_size)
    _check(model, network, start.folder)
    mine, theirs = dict(model.named_parameters()), dict(network.named_parameters())
    shared = mine.keys() & theirs.keys()
    for name in shared:
        mine[name].data.copy_(theirs[name])
    return [
        f"{len(shared)} tensors and the tokenizer from {start.folder}; the teacher begins as "
        + ("its teacher" if teacher else "the student: it has none"),
        f"random, because it has none: {_parts(mine.keys() - theirs.keys())}",
        f"not used of it: {_parts(theirs.keys() - mine.keys())}",
    ], teacher


def _check(model: AlignmentModel, network: AlignmentModel, folder: Path) -> None:
    """Raise CheckpointError where the recipe's model is not of the folder's kind and sizes."""
    mine, theirs = _kind(model), _kind(network)
    for name in sorted(mine.keys() | theirs.keys()):
        one, other = (kind.get(name, "missing") for kind in (mine, theirs))
        if one != other and ("missing" not in (one, other) or name.startswith(ENCODERS)):
            raise CheckpointError(
                f"checkpoint: {name} is {other} in {folder} and {one} in the recipe; give the recipe the sizes in its model.json"
            )


def _kind(model: AlignmentModel) -> dict[str, object]:
    """What must agree where both have it: the weights' shapes, and what leaves no trace in names and shapes."""
    config = model.config
    kind: dict[str, object] = {name: list(weight.shape) for name, weight in model.named_parameters()}
    kind["attention heads of image and text"] = [model.image_encoder.vit.blocks[0].attn.num_heads, config.text.heads]
    if config.fusion.layers:
        kind["fusion.kind"] = config.fusion.kind
    if config.levels:
        kind["levels"] = config.levels
    return kind


def _parts(names: set[str]) -> str:
    """How many tensors of which part: `codebook (1), fusion_encoder (26)`."""
    counted = Counter(name.split(".")[0] for name in sorted(names))
    return ", ".join(f"{part} ({count})" for part, count in counted.items()) or "nothing"
