"""Export a checkpoint as a plain safetensors folder: weights, `model.json` and tokenizer, and nothing of its training.

Tested in tests/pretrain/weights/test_albef.py.
"""

from __future__ import annotations

from pathlib import Path

from pretrain.weights.load import describe_model, load_model
from runtime.checkpoint import write_checkpoint
from runtime.errors import CheckpointError
from runtime.files import read_json


def export(source: Path, out: Path) -> str:
    """Write the model of a run or checkpoint to a folder that `load_model`, fine-tuning and evaluation read.

    Optimizer, teacher, queue and schedule stay behind.

    Args:
        source: a run's folder or a checkpoint's.
        out: the folder to write; it must not exist.

    Returns:
        A line that reports what was written.

    Raises:
        CheckpointError: `out` exists, or `source` is no whole checkpoint.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; choose another folder, or remove it")
    model = load_model(source)
    description = read_json(model.folder / "model.json")
    exported = describe_model(model.network.config, model.tokenizer.caption_tokens, model.training)
    if "fusion_tuned" in description:  # it tells whether fine-tuning trained the fusion encoder
        exported["fusion_tuned"] = description["fusion_tuned"]
    write_checkpoint(out, {"model": model.network.state_dict()}, {"model": exported}, model.tokenizer.save)
    millions = sum(parameter.numel() for parameter in model.network.parameters()) / 1e6
    return f"{out}: {millions:.1f} M parameters of {model.folder}, {model.training}"
