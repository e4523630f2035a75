"""Export a checkpoint: load it, let a format fill a folder, add the model card. The folder is complete or absent.

Tested in tests/finetune/export/test_export.py.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

from finetune.export.card import write_card
from finetune.export.formats import FORMATS
from finetune.export.source import load_source
from runtime.errors import CheckpointError, RecipeError
from runtime.files import committed_folder


def export(source: Path, out: Path, kind: str = "ligature") -> list[str]:
    """Write the model of a run or checkpoint to a folder.

    Optimizer, teacher, queue, codebook and word head stay behind, unless the format is our own.

    Args:
        source: A run's folder or a checkpoint's.
        out: The folder to write; it must not exist.
        kind: A name in `FORMATS`.

    Returns:
        Lines that report what was written and what the format leaves out.

    Raises:
        CheckpointError: `out` exists, `source` is no whole checkpoint, or the format cannot hold its model.
        RecipeError: A package that the format needs is not installed.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; choose another folder, or remove it")
    form = FORMATS[kind]
    if missing := [name for name in form.needs if find_spec(name) is None]:
        raise RecipeError(f"--format {kind} needs {', '.join(missing)}; pip install 'ligature-pretrain[export]'")
    loaded = load_source(source, out, kind)
    module, _, name = form.write.partition(":")
    with committed_folder(out) as folder:
        notes = getattr(importlib.import_module(module), name)(loaded, folder)
        write_card(folder, loaded, kind, notes)
    millions = sum(parameter.numel() for parameter in loaded.network.parameters()) / 1e6
    return [f"{out}: {millions:.1f} M parameters of {loaded.folder}, {loaded.training}", *notes]
