"""Begin a new run from another model: one of our runs, an export, or an imported model."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

from torch import Tensor

from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.transformers_tower import TransformersTower
from pretrain.weights.architecture import architecture_of
from pretrain.weights.load import at_resolution, load_model
from runtime.checkpoint import read_tensors
from runtime.errors import CheckpointError
from runtime.files import read_json

ENCODERS = ("image_encoder.", "text_encoder.")
"""Parts that both models must have whole. Heads, fusion layers and codebook may be new, or be left behind."""


def begin_from(source: Path, model: AlignmentModel) -> tuple[list[str], dict[str, Tensor] | None]:
    """Copy the weights of `source` into `model`; position embeddings are interpolated to the resolution of `model`.

    The queue of `source` stays behind: a new run numbers its images anew.

    Args:
        source: a run's folder or a checkpoint's.
        model: the new run's model.

    Returns:
        Lines that report what was and was not used, and the teacher's weights by name if `source` has a teacher.

    Raises:
        CheckpointError: the models' sizes differ, or `source` is fine-tuned.
    """
    start = load_model(source)
    if start.training != "pretrained":
        raise CheckpointError(
            f"checkpoint: {start.folder} is {start.training}, so a model pretrained from it would not be scored zero-shot; give a "
            "checkpoint that is only pretrained"
        )
    teacher = None
    if (start.folder / "teacher.safetensors").is_file():
        averaged = copy.deepcopy(start.network)
        averages = read_tensors(start.folder, "teacher")
        averaged.load_state_dict(averages, strict=False)  # a teacher has no matching head, temperature or codebook
        averaged = at_resolution(averaged, model.config.image.image_size)
        teacher = {name: weight.data for name, weight in averaged.named_parameters() if name in averages}
    network = at_resolution(start.network, model.config.image.image_size)
    _check(model, network, start.folder)
    # An imported dual encoder has random parts where our model needs some; they count as missing.
    untrained = tuple(f"{part}." for part in read_json(start.folder / "model.json").get("untrained", []))
    mine, theirs = model.state_dict(), network.state_dict()
    theirs = {name: weight for name, weight in theirs.items() if not name.startswith(untrained)}
    shared = mine.keys() & theirs.keys()
    for name in shared:
        mine[name].data.copy_(theirs[name])
    return [
        f"{len(shared)} tensors and the tokenizer from {start.folder}; the teacher begins as "
        + ("its teacher" if teacher else "the student: it has none"),
        f"random, because it has none: {count_by_part(mine.keys() - theirs.keys())}",
        f"not used of it: {count_by_part(theirs.keys() - mine.keys())}",
    ], teacher


def _check(model: AlignmentModel, network: AlignmentModel, folder: Path) -> None:
    """Raise CheckpointError if the recipe's model differs from the folder's in kind or sizes."""
    ours, theirs = _properties(model), _properties(network)
    for name in sorted(ours.keys() | theirs.keys()):
        own, other = ours.get(name, "missing"), theirs.get(name, "missing")
        if own != other and ("missing" not in (own, other) or name.startswith(ENCODERS)):
            raise CheckpointError(
                f"checkpoint: {name} is {other} in {folder} and {own} in the recipe; give the recipe the sizes in its model.json"
            )


def _properties(model: AlignmentModel) -> dict[str, object]:
    """Return what must agree wherever both models have it: the shapes of weights, and settings that no shape shows."""
    config = model.config
    properties: dict[str, object] = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    vit = config.image.kind == "vit"
    image_heads = model.image_encoder.vit.blocks[0].attn.num_heads if vit else 0
    properties["attention heads of image and text"] = [image_heads, config.text.heads]
    properties["kind and poolings"] = [config.image.kind, config.image.pooling, model.text_encoder.pooling]
    properties["kind of the text encoder"] = config.text.arguments.get("model_type", config.text.kind)
    if not vit:
        properties["model.image.architecture"] = config.image.architecture
    if isinstance(model.image_encoder, TransformersTower):
        properties["model.image.arguments"] = architecture_of(model.image_encoder.vit.config)
    if config.fusion.layers:
        properties["fusion.kind"] = config.fusion.kind
    if config.levels:
        properties["levels"] = config.levels
    return properties


def count_by_part(names: set[str]) -> str:
    """Return how many tensors there are of each part, as in `codebook (1), fusion_encoder (26)`."""
    counted = Counter(name.split(".")[0] for name in sorted(names))
    return ", ".join(f"{part} ({count})" for part, count in counted.items()) or "nothing"
