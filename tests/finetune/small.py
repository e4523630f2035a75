"""A small pretrained checkpoint and the arguments to fine-tune it, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

from launch.cli import main

RECIPE = """
name: pretrain
data: {vocabulary: 200, caption_tokens: 32, workers: 0, augment: {crop_scale: [1.0, 1.0], flip: false, operations: 0}}
model:
  image: {architecture: vit_tiny_patch16_224, image_size: 32, patch: 8, width: 32, depth: 2, heads: 2}
  text: {width: 32, layers: 2, heads: 2, feed_forward: 64, positions: 32}
  fusion: {layers: 1}
  feature_dim: 16
  codewords: 8
teacher: {queue: 16}
training: {global_batch: 8, micro_batch: 8, steps: 1, precision: fp32, device: cpu}
"""
TUNE = ["--dataset", "shapes", "--training.device", "cpu", "--training.precision", "fp32", "--training.log_every", "1"]
TUNE += ["--training.global_batch", "8", "--training.checkpoint_every", "2", "--data.workers", "0"]
HAT = ["--head", "hat", "--hat.levels", "[[1,1],[2,2]]", "--hat.width", "24", "--hat.frozen_epochs", "0.4"]


SINGLE = ["--model.fusion.kind", "single_stream"]


def pretrain(folder: Path, drawn: Path, *more: str) -> Path:
    """One step of pretraining. -> the run's folder."""
    (folder / "small.yaml").write_text(RECIPE)
    recipe = ["--config", str(folder / "small.yaml"), "--runs", str(folder), "--data.train", str(drawn / "train")]
    assert main(["pretrain", *recipe, *more]) == 0
    return folder / "pretrain"


def finetune(checkpoint: Path | None, drawn: Path, runs: Path, *more: str, steps: int = 6) -> list[str]:
    """The command of a short fine-tuning."""
    data = ["--data.train", str(drawn / "train"), "--data.validation", str(drawn / "validation")]
    start = ["--checkpoint", str(checkpoint)] if checkpoint else []
    return ["finetune", *start, "--runs", str(runs), *data, *TUNE, "--training.steps", str(steps), *more]


def evaluate(checkpoint: Path, drawn: Path, out: Path, *more: str) -> list[str]:
    about = [
        "--data",
        str(drawn / "test"),
        "--dataset",
        "shapes",
        "--split",
        "test",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    return ["evaluate", "--checkpoint", str(checkpoint), "--out", str(out), *about, "--batch_size", "8", *more]
