"""A user's own scores or embeddings, from any model, in the form that protocols take.

Tested in tests/finetune/test_evaluate.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.in_order.collection import open_collection
from finetune.config import EvaluateRecipe
from finetune.heads.base import Scored
from runtime.errors import DataError
from runtime.files import sha256_of


@dataclass
class OwnScores:
    """Scores of a file, and the images and captions that they belong to."""

    scored: Scored
    caption_image: np.ndarray
    """(captions,) the image of each caption"""
    keys: list[str]
    """The images' names."""
    policy: str
    """Captions per image, in the record's words."""


def read_own_scores(recipe: EvaluateRecipe) -> OwnScores:
    """Read the file that `recipe.scores` names.

    Raises:
        DataError: the file cannot be read, or does not fit the data.
    """
    path = Path(recipe.scores)
    arrays = _read(path)
    to_text, to_image = _matrices(path, arrays, recipe.similarity)
    images, captions = to_text.shape
    if recipe.data:
        collection = open_collection(
            recipe.data, recipe.captions_per_image, recipe.images, recipe.split, captions_only=True
        )
        if (len(collection), len(collection.captions)) != (images, captions):
            raise DataError(
                f"{path} scores {images:,} images and {captions:,} captions, but {recipe.data} has {len(collection):,} and "
                f"{len(collection.captions):,} (captions_per_image: {recipe.captions_per_image or 'all'}); the order must be "
                "that of the data, every caption included or --captions_per_image stated"
            )
        if not np.array_equal(arrays.get("caption_image", collection.caption_image), collection.caption_image):
            raise DataError(f"{path}: caption_image differs from {recipe.data}; bring the captions into its order")
        caption_image, keys = collection.caption_image, collection.keys
        policy = "all" if recipe.captions_per_image is None else f"first {recipe.captions_per_image}"
    elif "caption_image" in arrays:
        caption_image, keys = arrays["caption_image"], [str(image) for image in range(images)]
        policy = "as the file has them"
    else:
        raise DataError(
            f"{path} does not say which image each caption describes; give --data, or an integer array `caption_image` in a .npz"
        )
    name = f"own {'scores' if 'scores' in arrays else 'embeddings'}"
    digest = sha256_of(path)[:16]
    return OwnScores(Scored("own", name, to_text, to_image, digest, recipe.training), caption_image, keys, policy)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"no file {path}; --scores takes .npy, .npz or .safetensors")
    try:
        if path.suffix == ".npy":
            return {"scores": np.load(path, mmap_mode="r", allow_pickle=False)}
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)  # through torch: numpy has no bfloat16
            return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}
    except Exception as error:  # the libraries raise nearly any exception on a broken file
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); write it again") from error
    raise DataError(f"{path} is of an unknown format; --scores takes .npy, .npz or .safetensors")


def _matrices(path: Path, arrays: dict[str, np.ndarray], similarity: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the file's scores, (images, captions) and (captions, images)."""
    if "scores" in arrays:
        scores = _floating(path, "scores", arrays["scores"])
        backward: Any = arrays.get("text_to_image")
        return scores, scores.T if backward is None else _floating(path, "text_to_image", backward)
    if not {"image", "text"} <= arrays.keys():
        raise DataError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; it needs `scores`, or `image` and `text`"
        )
    image, text = (_floating(path, name, arrays[name]).astype(np.float32) for name in ("image", "text"))
    if image.shape[1] != text.shape[1]:
        raise DataError(f"{path}: image embeddings are {image.shape[1]} wide, text embeddings {text.shape[1]}")
    if similarity == "cosine":
        lengths = [np.linalg.norm(side, axis=1, keepdims=True) for side in (image, text)]
        for name, length in zip(("image", "text"), lengths, strict=True):
            if not (length > 0).all():  # catches NaN too
                raise DataError(
                    f"{path}: {name} embedding {int(np.argmin(length > 0))} has length 0, so no cosine; use --similarity dot, or mend it"
                )
        image, text = image / lengths[0], text / lengths[1]
    scores = image @ text.T
    return scores, scores.T


def _floating(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(
            f"{path}: {name} is {array.dtype} of shape {array.shape}; it must have a floating-point type and two axes"
        )
    return array
