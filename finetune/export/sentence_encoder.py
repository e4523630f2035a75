"""Format `sentence-transformers`: the Hugging Face folder, and three files that tell sentence-transformers which methods to call.

sentence-transformers (5.4 and later) hands images to `get_image_features` and texts to `get_text_features`; a module of our own is not
needed.

Tested in tests/finetune/export/test_sentence_encoder.py.
"""

from __future__ import annotations

from pathlib import Path

from finetune.export import hugging_face
from finetune.export.source import Source
from runtime.errors import CheckpointError
from runtime.files import write_json

MODULE = "sentence_transformers.base.modules.transformer.Transformer"


def write(source: Source, folder: Path) -> list[str]:
    """Fill `folder`; return what the format leaves out.

    Raises:
        CheckpointError: The model has no text features, or transformers makes other features of what was written.
    """
    if not source.has_features:
        raise CheckpointError(
            f"{source.folder} has no text layers, so a text has no vector, which is all that sentence-transformers holds; use --format hf"
        )
    notes = hugging_face.write(source, folder)
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": MODULE}])
    methods = {"text": "get_text_features", "image": "get_image_features"}
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {
                modality: {"method": method, "method_output_name": None} for modality, method in methods.items()
            },
            "module_output_name": "sentence_embedding",
        },
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {"model_type": "SentenceTransformer", "prompts": {}, "similarity_fn_name": "cosine"},
    )
    matching = (
        ["sentence-transformers does not call the fusion encoder; transformers does"] if source.has_matching else []
    )
    return [*notes, *matching]
