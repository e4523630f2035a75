"""What a folder of the `transformers` library says about an image encoder: its configuration, pixel statistics and crop.

The recipe's fields are filled in, so that a checkpoint's model.json holds them and needs the folder no more.

Tested in tests/pretrain/model/test_transformers_tower.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.model.config import ImageEncoderConfig, ModelConfig, PreprocessingConfig
from pretrain.weights.packages import PREFIX, model_folder
from runtime.errors import CheckpointError, RecipeError
from runtime.files import read_json

BOOKKEEPING = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id"}
"""Entries of a configuration that do not describe an architecture."""
RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that an evaluation image can be resized with."""


def read_architecture(config: ImageEncoderConfig) -> None:
    """Fill in `architecture`, `arguments` and `preprocessing` from `weights`, where the recipe leaves them out.

    Raises:
        CheckpointError: `weights` names nothing that can be read.
        RecipeError: It is another family than `architecture`, or its images are made ready in a way that we do not have.
    """
    stated = config.preprocessing
    whole = stated.mean and stated.std and stated.crop is not None and stated.resample != "own"
    if config.weights == "none" or (config.arguments and whole):
        return
    source = published_folder(config.weights, "model.image.weights")
    if not config.arguments:
        from transformers import AutoConfig

        found = read_part(source, AutoConfig, "configuration", "model.image.weights")
        found = getattr(found, "vision_config", found)
        if config.architecture not in (ImageEncoderConfig.architecture, found.model_type):
            raise RecipeError(
                f"model.image.architecture is {config.architecture}, but {config.weights} holds a {found.model_type}; leave it out"
            )
        config.architecture, config.arguments = found.model_type, architecture_of(found)
    if not whole:
        from transformers import AutoImageProcessor

        own = read_preprocessing(
            read_part(source, AutoImageProcessor, "image processor", "model.image.weights"), config.weights
        )
        config.preprocessing = PreprocessingConfig(
            stated.mean or own.mean,
            stated.std or own.std,
            own.crop if stated.crop is None else stated.crop,
            own.resample if stated.resample == "own" else stated.resample,
        )


def adopt_architecture(model: ModelConfig, folder: Path | None) -> None:
    """Fill in a recipe's image encoder from the model.json of a checkpoint that its run goes on or begins from."""
    if folder is None or model.image.kind != "transformers" or model.image.arguments:
        return
    image = read_json(folder / "model.json")["model"]["image"]
    if image.get("kind") == "transformers":
        model.image.architecture, model.image.arguments = image["architecture"], image["arguments"]
        model.image.preprocessing = PreprocessingConfig(**image["preprocessing"])


def architecture_of(configuration: Any) -> dict[str, Any]:
    """Return the entries of a `transformers` configuration that its class knows and that describe the architecture."""
    known = type(configuration)().to_dict()
    return {
        name: value
        for name, value in configuration.to_dict().items()
        if name in known and name not in BOOKKEEPING | {"model_type"}
    }


def read_preprocessing(processor: Any, source: str) -> PreprocessingConfig:
    """Return what an image processor of the library does, in our words.

    Args:
        processor: The library's image processor.
        source: Where it is from, for errors.

    Raises:
        RecipeError: It does something that evaluation images here are not made ready by.
    """
    size = dict(getattr(processor, "size", None) or {})
    crop_size = dict(getattr(processor, "crop_size", None) or {})
    shorter, height, width = size.get("shortest_edge"), size.get("height"), size.get("width")
    cropped = crop_size.get("height") if getattr(processor, "do_center_crop", False) else None
    crop: float | None = None
    if shorter and cropped:
        crop = cropped / shorter
    elif height == width and not shorter and cropped in (None, height):  # SigLIP 2 has no size: any grid of patches
        crop = 0.0
    resample = RESAMPLING.get(int(getattr(processor, "resample", 3)))
    if crop is None or crop > 1 or resample is None or not getattr(processor, "do_resize", True):
        raise RecipeError(
            f"model.image.preprocessing: images of {source} are resized in a way that is not known here; state crop and resample"
        )
    normalised = getattr(processor, "do_normalize", True)
    mean, std = (processor.image_mean, processor.image_std) if normalised else ([0.0] * 3, [1.0] * 3)
    return PreprocessingConfig(list(mean), list(std), crop, resample)  # type: ignore[arg-type]


def published_folder(source: str, key: str) -> str:
    """Return the folder or the hub's name of a published model.

    Args:
        source: A folder, a name on the hub or `package:NAME`.
        key: The recipe key that holds it, for errors.

    Raises:
        CheckpointError: A path leads nowhere, or a package is not installed.
    """
    folder = Path(source)
    if source.startswith(PREFIX) or folder.is_dir():
        return model_folder(source, key)
    # A path, not a name: asking the hub for it would take most of a minute.
    if folder.is_absolute() or source.startswith(".") or len(folder.parts) > 2:
        raise CheckpointError(f"{key}: no folder {source}; give a model's folder, or its name on the hub")
    return source


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's own tables of what it loads off the terminal: our report says the same in a line."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def read_part(source: str, kind: Any, what: str, key: str) -> Any:
    """Read the configuration or another part of a published model.

    Args:
        source: A folder or a name on the hub.
        kind: The library's class that reads it, such as `AutoConfig`.
        what: What it reads, for errors.
        key: Where `source` was named, for errors.

    Raises:
        CheckpointError: There is none.
    """
    try:
        with quiet():
            return kind.from_pretrained(source)
    except Exception as error:  # files of other kinds and the hub fail in many ways
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{key}: no {what} in `{source}` ({reason}); without network, give a folder") from error
