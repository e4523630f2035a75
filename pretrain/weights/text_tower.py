"""The configuration and the starting weights of a text encoder of `transformers`: whole, or an error that names the tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import torch

from data_tools.tokenizer import ABSENT, CaptionTokenizer
from pretrain.model.config import ModelConfig, TextEncoderConfig
from pretrain.model.transformers_text import FIXED_LENGTH, TOWERS, TransformersText, make_encoder, without_pooler
from pretrain.weights.architecture import BOOKKEEPING, published_folder, quiet
from runtime.errors import CheckpointError, DataError, RecipeError
from runtime.files import read_json
from runtime.recipe import build_config

Pooling = Literal["class", "mean", "last", "own"]
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files by one of which a folder is known to hold weights."""
POOLINGS: dict[str, Pooling] = {"cls_token": "class", "mean_tokens": "mean", "lasttoken": "last"}
"""The poolings of sentence-transformers that we have, by their names there."""


def describe_encoder(config: TextEncoderConfig) -> TextEncoderConfig:
    """Complete the description of a text encoder of kind `transformers` from its weights, without loading them. A bert needs none.

    Args:
        config: `model.text` of a recipe, which names `weights`, or whose `arguments` hold all.

    Returns:
        The same with `arguments`, sizes and pooling, from which the encoder is made again without its weights.

    Raises:
        CheckpointError: The weights are not there.
        RecipeError: They are no text encoder's.
    """
    if config.kind == "bert":
        return config
    pooling: Pooling = config.pooling
    arguments = dict(config.arguments)
    if config.weights != "none":
        from transformers import AutoConfig

        source = find_folder(config.weights)
        try:
            stored = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except Exception as error:
            # Missing files, no network, unknown models: each layer of the library raises other kinds.
            raise CheckpointError(
                f"model.text.weights: cannot read the configuration of `{config.weights}` ({_line(error)}); without network, give a folder"
            ) from error
        if f"{stored.model_type}_text_model" in TOWERS:  # of a dual encoder, the text half
            stored = stored.text_config
        known = {name: value for name, value in stored.to_dict().items() if name not in BOOKKEEPING}
        arguments = known | {"model_type": stored.model_type} | arguments
        if pooling == "own" and stored.model_type not in TOWERS:
            pooling = sentence_pooling(source) or "class"
    with torch.device("meta"):
        tower = TransformersText(dataclasses.replace(config, arguments=arguments), 1)
    settings = tower.model.config
    return dataclasses.replace(
        config,
        arguments=arguments,
        pooling=pooling,
        width=tower.width,
        layers=len(tower.layers),
        heads=settings.num_attention_heads,
        feed_forward=getattr(settings, "intermediate_size", None) or settings.hidden_dim,  # DistilBERT's name
        positions=tower.positions,
    )


def find_folder(weights: str) -> str:
    """Return the folder or the hub's name that `model.text.weights` means.

    Raises:
        CheckpointError: A folder or a package is named that does not exist, or a folder without configuration or weights.
    """
    source = published_folder(weights, "model.text.weights")
    folder = Path(source)
    if not folder.is_dir():
        return source
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in WEIGHTS):
        raise CheckpointError(
            f"model.text.weights: {source} lacks config.json or weights (model.safetensors); give a folder that transformers saved"
        )
    return source


def sentence_pooling(source: str) -> Pooling | None:
    """Return the pooling that a folder of sentence-transformers names, or None where it is not one.

    Raises:
        RecipeError: It pools in a way that we do not have.
    """
    from transformers.utils import cached_file

    path = cached_file(
        source, "config.json", subfolder="1_Pooling",
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    if path is None:
        return None
    modes = [name.removeprefix("pooling_mode_") for name, on in read_json(Path(path)).items() if on is True]
    modes = [name for name in modes if name != "include_prompt"]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise RecipeError(
            f"model.text.pooling is own, but {source} pools by {' and '.join(modes) or 'nothing'}; set it to class, mean or last"
        )
    return POOLINGS[modes[0]]


def load_text_tower(tower: TransformersText, config: TextEncoderConfig) -> list[str]:
    """Start a text encoder of `transformers` from `model.text.weights`.

    Returns:
        Names in the source that were not used.

    Raises:
        CheckpointError: A tensor of the encoder is missing there or has another shape, or nothing can be read.
    """
    source, model_class = find_folder(config.weights), type(tower.model)
    try:
        with quiet():
            model, loading = model_class.from_pretrained(
                source, config=tower.model.config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
                **without_pooler(model_class),
            )  # fmt: skip
    except Exception as error:  # a download or a foreign file fails in many ways: all of them stop the run
        raise CheckpointError(
            f"model.text.weights: cannot load `{config.weights}` into a {tower.kind} ({_line(error)}); without network, give a folder"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(
            f"model.text.weights: {config.weights} lacks {missing[0]} and {len(missing) - 1} more tensors of a {tower.kind}; "
            "it must be started whole"
        )
    if mismatched := sorted(loading["mismatched_keys"]):
        name, stored, own = mismatched[0]
        raise CheckpointError(
            f"model.text.weights: {name} is {tuple(stored)} in {config.weights} and {tuple(own)} by model.text.arguments; take them out"
        )
    tower.model.load_state_dict(model.state_dict())
    return sorted(loading["unexpected_keys"])


def fit_tokenizer(config: TextEncoderConfig, tokenizer: CaptionTokenizer) -> TextEncoderConfig:
    """Hold a tokenizer against the text encoder that will read it, and tell each what it must know of the other.

    Args:
        config: `model.text`, described.
        tokenizer: The run's. Where the encoder reads captions of one length, it pads to it from now on.

    Returns:
        The description; of a SigLIP, with the padding id of the tokenizer, because padding is read.

    Raises:
        RecipeError: Captions may be longer than the encoder reads.
        DataError: The tokenizer is another model's.
    """
    if config.kind == "bert":
        tokenizer.require_bert()
        return config
    arguments = config.arguments
    kind, longest = arguments["model_type"], config.positions
    if tokenizer.caption_tokens > longest:
        raise RecipeError(
            f"data.caption_tokens {tokenizer.caption_tokens} is more than the {longest} that a {kind} reads; lower it"
        )
    if kind in FIXED_LENGTH:
        if tokenizer.caption_tokens != longest:
            raise RecipeError(
                f"a {kind} reads captions padded to {longest} tokens; set data.caption_tokens to {longest}"
            )
        tokenizer.length = longest
        return dataclasses.replace(config, arguments=arguments | {"pad_token_id": max(tokenizer.pad, 0)})
    with torch.device("meta"):
        model, settings = make_encoder(arguments)
    words = model.get_input_embeddings().num_embeddings
    if tokenizer.vocabulary > words:
        raise DataError(
            f"the tokenizer has {tokenizer.vocabulary} tokens and the {kind} only {words}; set data.tokenizer to that of model.text.weights"
        )
    # CLIP's published configurations name special tokens that its tokenizer does not have.
    if kind not in TOWERS and tokenizer.pad not in (settings.pad_token_id, ABSENT):
        raise DataError(
            f"the tokenizer's padding is token {tokenizer.pad} and the {kind}'s {settings.pad_token_id}; set data.tokenizer to that of model.text.weights"
        )
    return config


def described_by(folder: Path, config: TextEncoderConfig) -> TextEncoderConfig:
    """Complete the description of a text encoder from the model.json of a checkpoint instead of its weights. A bert needs none.

    Raises:
        RecipeError: The checkpoint's text encoder is of another kind.
    """
    if config.kind == "bert":
        return config
    stored = build_config(ModelConfig, read_json(folder / "model.json")["model"]).text
    if stored.kind != "transformers":
        raise RecipeError(
            f"model.text.kind is transformers, but the text encoder of {folder} is a bert; set it to bert, with its sizes"
        )
    pooling = stored.pooling if config.pooling == "own" else config.pooling
    return dataclasses.replace(
        stored, weights=config.weights, frozen=config.frozen, dropout=config.dropout, pooling=pooling
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
