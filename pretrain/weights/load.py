"""Load a model that encodes images and texts from a folder: `from pretrain import load_model`.

Tested in tests/pretrain/weights/test_albef.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data_tools.tokenizer import CaptionTokenizer, load_tokenizer
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import ModelConfig
from pretrain.weights.inputs import read_images, read_texts
from runtime.checkpoint import checkpoint_hash, read_tensors, resolve_pointer, verify_checkpoint
from runtime.errors import CheckpointError, DataError
from runtime.files import read_json
from runtime.recipe import build_config

ImageInput = Image.Image | np.ndarray | str | Path | Tensor
Images = ImageInput | Sequence[ImageInput]
Texts = str | Sequence[str]


class ImageTextModel:
    """An alignment model in evaluation mode, with its tokenizer and its image transform."""

    def __init__(
        self, network: AlignmentModel, tokenizer: CaptionTokenizer, folder: Path, training: str, device: torch.device
    ) -> None:
        self.network = network.eval().requires_grad_(False).to(device)
        self.tokenizer, self.device, self.folder = tokenizer, device, folder
        self.training = training
        """`pretrained` or `fine-tuned-on X`, as in score records."""
        self.transform = network.evaluation_transform()
        """Turns a PIL image into (3, size, size) uint8."""

    @property
    def hash(self) -> str:
        """The hash that names the checkpoint's content in score records."""
        return checkpoint_hash(self.folder)

    def encode_image(self, images: Images) -> Tensor:
        """Return the images' unit-norm features.

        Args:
            images: one or many of PIL images, paths and (height, width, 3) uint8 arrays, or a uint8 tensor
                (batch, 3, size, size) that is transformed already.

        Returns:
            (batch, feature_dim); one image gives one row.

        Raises:
            DataError: an image is of another kind, shape or type.
            CheckpointError: the model has no text layers.
        """
        self._need_features()
        return self.network.image_features(self.network.image_encoder(self._pixels(images)))

    def encode_text(self, texts: Texts) -> Tensor:
        """Return the unit-norm features of one string or many, (batch, feature_dim); one string gives one row."""
        self._need_features()
        ids, mask = self.tokenizer(read_texts(texts))
        ids, mask = ids.to(self.device), mask.to(self.device)
        return self.network.text_features(self.network.text_encoder(ids, mask), mask)

    def match(self, images: Images, texts: Texts) -> Tensor:
        """Return the probability that image i and text i belong together, by the fusion encoder.

        Args:
            images: one or many, as for `encode_image`.
            texts: as many strings.

        Returns:
            (batch,)

        Raises:
            CheckpointError: the model has no fusion encoder.
            DataError: there are not as many texts as images, or one is of another kind.
        """
        if not self.network.config.fusion.layers:
            raise CheckpointError(
                f"{self.folder} has no fusion encoder, so no matching probability; use encode_image and encode_text"
            )
        words, pixels = read_texts(texts), self._pixels(images)
        if len(words) != len(pixels):
            raise DataError(f"match scores pairs: {len(pixels)} images need as many texts, not {len(words)}")
        ids, mask = (part.to(self.device) for part in self.tokenizer(words))
        prepared = self.network.fusion_encoder.prepare_images(self.network.image_encoder(pixels))
        logits = self.network.match(self.network.text_encoder(ids, mask), mask, prepared)
        return torch.softmax(logits, -1)[:, 1]

    def _need_features(self) -> None:
        if not self.network.config.text.layers:
            raise CheckpointError(
                f"{self.folder} has no text layers, so no features to compare; use match, or fine-tune it with --head vldeformer"
            )

    def _pixels(self, images: Images) -> Tensor:
        return read_images(images, self.transform).to(self.device)


def find_checkpoint(source: str | Path) -> Path:
    """Return the folder to load a model from.

    Args:
        source: a run's folder, a checkpoint's, or an exported model's. Of a run it is the best checkpoint, else the latest.

    Raises:
        CheckpointError: there is no model in `source`.
    """
    source = Path(source)
    for name in ("best", "latest"):
        if checkpoint := resolve_pointer(source / "checkpoints", name):
            return checkpoint
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
    """Load a model from a run folder or a checkpoint. Every file is verified by its hash. DeepSpeed is not imported.

    Args:
        source: a run's folder, a checkpoint's, or an exported model's.
        device: where to put the model.
        image_size: pixels a side, to read images at another resolution than the model's own.

    Raises:
        CheckpointError: the folder is incomplete or altered, or its weights do not fit its description.
    """
    folder = find_checkpoint(source)
    verify_checkpoint(folder)
    description = read_json(folder / "model.json")
    if (head := description.get("head", "dual")) != "dual":
        raise CheckpointError(
            f"{folder} holds a {head} head, not an alignment model; `ligature evaluate` scores it, and fine-tuning starts from "
            "the checkpoint it was tuned from"
        )
    tokenizer = load_tokenizer(folder, description["caption_tokens"])
    network = AlignmentModel(build_config(ModelConfig, description["model"]), tokenizer.vocabulary)
    load_weights(network, read_weights(folder), folder)
    if image_size:
        network = at_resolution(network, image_size)
    return ImageTextModel(network, tokenizer, folder, description["training"], torch.device(device))


def at_resolution(network: AlignmentModel, image_size: int) -> AlignmentModel:
    """Return the model for images of another size, with position embeddings interpolated (bicubic, as ALBEF does).

    Args:
        network: the model. Unless it has the size already, it is changed on the way: use the returned one.
        image_size: pixels a side.
    """
    if image_size == network.config.image.image_size:
        return network
    image = dataclasses.replace(network.config.image, image_size=image_size)
    resized = AlignmentModel(
        dataclasses.replace(network.config, image=image), network.text_encoder.words.num_embeddings
    )
    network.image_encoder.set_image_size(image_size)
    resized.load_state_dict(network.state_dict())
    return resized


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights that a checkpoint's model is used with: averages (`training.ema_momentum`) where it holds any."""
    averages = read_tensors(folder, "ema") if (folder / "ema.safetensors").is_file() else {}
    return read_tensors(folder, "model") | averages


def load_weights(network: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Copy a checkpoint's weights into a module by name; see `copy_weights`."""
    copy_weights(network.state_dict(), weights, folder)


def copy_weights(own: dict[str, Tensor], weights: dict[str, Tensor], folder: Path) -> None:
    """Copy a checkpoint's weights into tensors of the same names.

    Args:
        own: the tensors to fill.
        weights: the tensors of the checkpoint.
        folder: the checkpoint, for messages.

    Raises:
        CheckpointError: a weight is missing, extra or of another shape; the message names it.
    """
    for name in sorted(own.keys() ^ weights.keys()):
        raise CheckpointError(
            f"{folder} does not fit its own model.json: {name} is {'missing' if name in own else 'not of this model'}"
        )
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            raise CheckpointError(f"{folder}: {name} is {tuple(weight.shape)}, the model has {tuple(own[name].shape)}")
        own[name].data.copy_(weight)


def describe_model(model: Any, caption_tokens: int, training: str) -> dict[str, Any]:
    """Return the content of `model.json`, from which `load_model` rebuilds a model."""
    return {"model": dataclasses.asdict(model), "caption_tokens": caption_tokens, "training": training}
