"""A folder -> a model that encodes images and texts: `from pretrain import load_model`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from data_tools.pixels.transforms import EvaluationTransform
from data_tools.tokenizer import CaptionTokenizer, load_tokenizer
from pretrain.config import ModelConfig
from pretrain.model.alignment_model import AlignmentModel
from runtime.checkpoint import checkpoint_hash, read_tensors, resolve_pointer, verify_checkpoint
from runtime.errors import CheckpointError
from runtime.files import read_json
from runtime.recipe import build_config

Images = Tensor | Sequence[Image.Image]
Texts = Sequence[str]


class ImageTextModel:
    """An alignment model with its tokenizer and its transform, in evaluation mode."""

    def __init__(
        self, network: AlignmentModel, tokenizer: CaptionTokenizer, folder: Path, training: str, device: torch.device
    ) -> None:
        self.network = network.eval().requires_grad_(False).to(device)
        self.tokenizer, self.device, self.folder = tokenizer, device, folder
        self.training = training
        """`pretrained` or `fine-tuned-on X`, as score records say it."""
        self.transform = EvaluationTransform(network.config.image.image_size)
        """A PIL image -> (3, size, size) uint8."""

    @property
    def hash(self) -> str:
        """Names the checkpoint's content in score records."""
        return checkpoint_hash(self.folder)

    def encode_image(self, images: Images) -> Tensor:
        """images: (batch, 3, size, size) uint8, or PIL images -> unit-norm features (batch, feature_dim)."""
        self._need_features()
        return self.network.image_features(self.network.image_encoder(self._pixels(images)))

    def encode_text(self, texts: Texts) -> Tensor:
        """texts: strings -> unit-norm features (batch, feature_dim)."""
        self._need_features()
        ids, mask = self.tokenizer(list(texts))
        return self.network.text_features(self.network.text_encoder(ids.to(self.device), mask.to(self.device)))

    def match(self, images: Images, texts: Texts) -> Tensor:
        """The probability that image i and text i belong together, by the fusion encoder: (batch,)."""
        if not self.network.config.fusion.layers:
            raise CheckpointError(
                f"{self.folder} has no fusion encoder, so no matching probability; use encode_image and encode_text"
            )
        ids, mask = (part.to(self.device) for part in self.tokenizer(list(texts)))
        read = self.network.fusion_encoder.prepare_images(self.network.image_encoder(self._pixels(images)))
        return torch.softmax(self.network.match(self.network.text_encoder(ids, mask), mask, read), -1)[:, 1]

    def _need_features(self) -> None:
        if not self.network.config.text.layers:
            raise CheckpointError(
                f"{self.folder} has no text layers, so no features to compare; use match, or fine-tune it with --head vldeformer"
            )

    def _pixels(self, images: Images) -> Tensor:
        if not isinstance(images, Tensor):
            images = torch.stack([self.transform(image) for image in images])
        return images.to(self.device)


def find_checkpoint(source: str | Path) -> Path:
    """A run's folder (its best checkpoint, else its latest), a checkpoint's, or an exported model's -> the folder to load."""
    source = Path(source)
    for name in ("best", "latest"):
        if found := resolve_pointer(source / "checkpoints", name):
            return found
    if (source / "model.json").is_file():
        return source
    reason = (
        "it has no checkpoint yet"
        if (source / "config.yaml").is_file()
        else "no such folder"
        if not source.exists()
        else "it has no model.json"
    )
    raise CheckpointError(f"{source} is neither a run nor a checkpoint: {reason}")


def load_model(source: str | Path, device: str | torch.device = "cpu", image_size: int | None = None) -> ImageTextModel:
    """Load a model from a run folder or a checkpoint, every file verified by its hash. Imports no DeepSpeed.

    image_size: pixels a side, where another resolution is wanted than the model's own. Raises CheckpointError where the folder is
    incomplete, altered or of another shape.
    """
    folder = find_checkpoint(source)
    verify_checkpoint(folder)
    about = read_json(folder / "model.json")
    if (head := about.get("head", "dual")) != "dual":
        raise CheckpointError(
            f"{folder} holds a {head} head, not an alignment model; `ligature evaluate` scores it, and fine-tuning starts from "
            "the checkpoint that it came from"
        )
    tokenizer = load_tokenizer(folder, about["caption_tokens"])
    network = AlignmentModel(build_config(ModelConfig, about["model"]), tokenizer.vocabulary)
    load_weights(network, read_tensors(folder, "model"), folder)
    if image_size:
        network = at_resolution(network, image_size)
    return ImageTextModel(network, tokenizer, folder, about["training"], torch.device(device))


def at_resolution(network: AlignmentModel, image_size: int) -> AlignmentModel:
    """The same model for images of another size, its position embeddings interpolated (bicubic, as ALBEF)."""
    if image_size == network.config.image.image_size:
        return network
    image = dataclasses.replace(network.config.image, image_size=image_size)
    resized = AlignmentModel(
        dataclasses.replace(network.config, image=image), network.text_encoder.words.num_embeddings
    )
    network.image_encoder.set_image_size(image_size)
    resized.load_state_dict(network.state_dict())
    return resized


def load_weights(network: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Copy weights by name; a missing, extra or misshapen one is a CheckpointError that names it."""
    copy_weights(network.state_dict(), weights, folder)


def copy_weights(own: dict[str, Tensor], weights: dict[str, Tensor], folder: Path) -> None:
    """Copy `weights` of a checkpoint's folder into tensors of the same names."""
    for name in sorted(own.keys() ^ weights.keys()):
        raise CheckpointError(
            f"{folder} does not fit its own model.json: {name} is {'missing' if name in own else 'not of this model'}"
        )
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            raise CheckpointError(f"{folder}: {name} is {tuple(weight.shape)}, the model has {tuple(own[name].shape)}")
        own[name].data.copy_(weight)


def describe_model(model: Any, caption_tokens: int, training: str) -> dict[str, Any]:
    """The `model.json` from which `load_model` rebuilds a model."""
    return {"model": dataclasses.asdict(model), "caption_tokens": caption_tokens, "training": training}
