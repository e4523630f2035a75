"""Any text encoder of the `transformers` library as a text encoder: BERT, RoBERTa, XLM-R, MPNet, ModernBERT, CLIP's and SigLIP's, ...

`text_encoder.py` states the interface. The encoder is made from `model.text.arguments`, its config.json, which travels in a
checkpoint's model.json: nothing is asked of a hub. `pretrain/weights/text_tower.py` fills them in and loads weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from pretrain.model.config import TextEncoderConfig
from pretrain.model.text_encoder import pool
from runtime.errors import RecipeError

TOWERS = {
    "clip_text_model": "CLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
}
"""Text encoders of dual encoders, which pool by their last token, and the classes that `AutoModel` does not know them by."""
FIXED_LENGTH = ("siglip_text_model", "siglip2_text_model")
"""Encoders that read captions padded to all their positions, padding included, and pool by the last position."""


class TransformersText(nn.Module):
    """Token ids -> word states, by an encoder of `transformers` as its authors made it.

    Attributes:
        width: Width of the word states.
        pooled_width: Width of the global state.
        positions: Tokens in the longest caption it can read.
        fixed_length: Tokens of every caption, padding included, where it reads no other length; else None.
        pad: Id of its padding token.
    """

    def __init__(self, config: TextEncoderConfig, vocabulary: int) -> None:
        """Make the encoder with random weights.

        Args:
            config: Its `arguments` are complete.
            vocabulary: Tokens of the tokenizer; the encoder may have more.

        Raises:
            RecipeError: `transformers` cannot make it, it is no text encoder, or it has fewer tokens than the tokenizer.
        """
        super().__init__()
        self.model, settings = make_encoder(config.arguments)
        self.kind: str = settings.model_type
        self.pooling, self.width, self.pad = config.pooling, int(settings.hidden_size), settings.pad_token_id or 0
        self.positions = _positions(self.model)
        self.fixed_length = self.positions if self.kind in FIXED_LENGTH else None
        self.pooled_width: int = settings.projection_size if self._has_head() else self.width
        if self.words.num_embeddings < vocabulary:
            raise RecipeError(
                f"the tokenizer has {vocabulary} tokens and the {self.kind} only {self.words.num_embeddings}; "
                "set data.tokenizer to the tokenizer of model.text.weights"
            )

    @property
    def words(self) -> nn.Embedding:
        """The word embeddings."""
        return self.model.get_input_embeddings()

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        return _layers(self.model)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode captions; see `TextEncoder.forward`."""
        return self._run(ids, mask, False).last_hidden_state

    def layer_states(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Return the embeddings, then the states after each layer, (texts, words, width) each; the last are `forward`'s, normed as there."""
        output = self._run(ids, mask, True)
        return [*output.hidden_states[:-1], output.last_hidden_state]

    def global_state(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool states (texts, words, width) as `model.text.pooling` says, to (texts, pooled_width). Padding does not count."""
        if self.pooling != "own":
            return pool(states, mask, self.pooling)
        if self._has_head():
            return self.model.head(states[:, -1])
        return pool(states, mask, "last" if self.kind in TOWERS else "class")

    def _run(self, ids: Tensor, mask: Tensor, all_states: bool) -> Any:
        # Some count positions by what is not padding, and a batch is padded with 0, which may be a word here.
        ids = ids.masked_fill(~mask, self.pad)
        if self.fixed_length is None:
            return self.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=all_states)
        if ids.shape[1] != self.fixed_length:
            raise RecipeError(
                f"a {self.kind} reads captions of {self.fixed_length} tokens, padding included, not of {ids.shape[1]}; "
                f"set data.caption_tokens to {self.fixed_length}"
            )
        return self.model(input_ids=ids, output_hidden_states=all_states)

    def _has_head(self) -> bool:
        """Return whether a layer follows the last token, as SigLIP's does."""
        return self.pooling == "own" and self.kind in FIXED_LENGTH

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the encoder, but keep its buffers' precision: rotary frequencies in bf16 would be other positions."""
        precise = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)
        for module, name, values in precise:
            moved = cast(Tensor, module._buffers[name])
            if moved.dtype != values.dtype:
                module._buffers[name] = values.to(moved.device)
        return self


def make_encoder(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Make a text encoder of `transformers` with random weights, without the pooling layer that we do not use.

    Args:
        arguments: Its configuration by the names of config.json, `model_type` among them.

    Returns:
        The encoder and its configuration.

    Raises:
        RecipeError: There is no such encoder, or it is not one that reads whole captions.
    """
    import transformers  # here, because importing it takes long, and most models have no such encoder
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = arguments.get("model_type", "")
    where = f"model.text.arguments: a {kind or 'model without model_type'}"
    settings = {name: value for name, value in arguments.items() if name != "model_type"}
    if kind not in TOWERS and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise RecipeError(
            f"{where} is not a text encoder; name one, such as a BERT, RoBERTa, MPNet or CLIP's text model"
        )
    try:
        config = transformers.AutoConfig.for_model(kind, **settings)
        if config.is_encoder_decoder or getattr(config, "is_decoder", False):
            raise RecipeError(f"{where} is a decoder, not a text encoder; name an encoder")
        known: Any = transformers.MODEL_MAPPING  # type: ignore[attr-defined]
        model_class = getattr(transformers, TOWERS[kind]) if kind in TOWERS else known[type(config)]
        # One attention on every machine: `transformers` may prefer a package that is installed on some alone.
        config._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
        model = model_class(config, **without_pooler(model_class))
    except (KeyError, ValueError, TypeError, AssertionError, RuntimeError, AttributeError) as error:
        raise RecipeError(f"{where} cannot be made: {' '.join(str(error).split())[:200]}") from error
    words = model.get_input_embeddings()
    parts = inspect.signature(model.forward).parameters
    fits = isinstance(words, nn.Embedding) and words.embedding_dim == config.hidden_size and "attention_mask" in parts
    if not fits or _find_layers(model) is None:
        raise RecipeError(
            f"{where} has no word embeddings of its states' width, or no list of layers; name another encoder"
        )
    return model, config


def without_pooler(model_class: Any) -> dict[str, bool]:
    """Return the argument that leaves out a model's pooling layer, where it has one. BERT's is random in most published encoders."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}


def _find_layers(model: Any) -> nn.ModuleList | None:
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((found for found in lists if len(found) == model.config.num_hidden_layers), None)


def _layers(model: Any) -> nn.ModuleList:
    found = _find_layers(model)
    assert found is not None, "make_encoder refuses encoders without a list of layers"
    return found


def _positions(model: Any) -> int:
    """Return the tokens in the longest caption. RoBERTa and its kin count positions from beyond their padding id."""
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2].startswith("position_embedding")
    ]
    offset = tables[0].padding_idx if tables else None
    return int(model.config.max_position_embeddings) - (0 if offset is None else offset + 1)
