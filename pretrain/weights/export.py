"""A checkpoint -> a plain safetensors folder: weights, `model.json`, tokenizer; no optimizer, teacher, queue or schedule."""

from __future__ import annotations

from pathlib import Path

from pretrain.weights.load import describe_model, load_model
from runtime.checkpoint import write_checkpoint
from runtime.errors import CheckpointError
from runtime.files import read_json


def export(source: Path, out: Path) -> str:
    """Write the model of a run or checkpoint to `out`, which `load_model`, fine-tuning and evaluation read. -> a line about it."""
    if out.exists():
        raise CheckpointError(f"{out} exists; choose another folder, or remove it")
    model = load_model(source)
    told = read_json(model.folder / "model.json")
    about = describe_model(model.network.config, model.tokenizer.caption_tokens, model.training)
    about |= {name: told[name] for name in ("fusion_tuned",) if name in told}
    write_checkpoint(out, {"model": dict(model.network.named_parameters())}, {"model": about}, model.tokenizer.save)
    millions = sum(parameter.numel() for parameter in model.network.parameters()) / 1e6
    return f"{out}: {millions:.1f} M parameters of {model.folder}, {model.training}"
