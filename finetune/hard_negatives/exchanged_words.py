"""Matching against a caption's own opposite: 'a circle left of a star' beside 'a circle right of a star', of one image.

Both are made of the same kind of words and equally likely without the image, so that only looking tells them apart. Negatives drawn
from a batch seldom are that near; what is told by a word alone is then learned late or not at all (docs/shapes.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from data_tools.tokenizer import CaptionTokenizer
from pretrain.objectives.state import StudentState
from runtime.errors import RecipeError
from runtime.ranks import sum_over_ranks


def exchange_table(pairs: list[str], tokenizer: CaptionTokenizer) -> Tensor:
    """(vocabulary,) what each token becomes; itself, where it is of no pair. pairs: 'left right', one token each.

    A word of several pairs becomes what the first of them says. Raises RecipeError for a word that is no token of its own.
    """
    table, named = torch.arange(tokenizer.vocabulary), set[int]()
    for pair in pairs:
        ids = []
        for word in pair.split():
            pieces = tokenizer.pipeline.encode(word, add_special_tokens=False).ids
            if len(pieces) != 1 or tokenizer.pipeline.id_to_token(pieces[0]) == "[UNK]":
                raise RecipeError(f"exchanged.words holds {word!r}, which is no token of this vocabulary; leave it out")
            ids += pieces
        for one, other in (ids, ids[::-1]):
            if one not in named:
                table[one] = other
                named.add(one)
    return table


class ExchangedWords:
    """The two-way choice between each caption and itself with every word of a pair exchanged, told of the caption's image."""

    def __init__(self, pairs: list[str], tokenizer: CaptionTokenizer) -> None:
        self.table = exchange_table(pairs, tokenizer)

    def __call__(self, state: StudentState) -> dict[str, Tensor]:
        """-> `exchanged`: log(1 + e^(m' - m)), the mean over captions that hold such a word, of the matching logit m (match minus no
        match) of the caption and m' of its altered form; and `exchanged_right`, the share of them with m > m'."""
        text, model = state.batch.text, state.model
        altered = self.table.to(text.ids.device)[text.ids]
        has = (altered != text.ids).any(1)
        own = torch.arange(len(has), device=has.device)
        states = torch.cat([state.text_states, model.text_encoder(altered, text.mask)])
        mask = torch.cat([text.mask, text.mask])
        logits = model.match(states, mask, state.prepared_images, torch.cat([own, own])).float()
        margin = torch.sub(*(logits[:, 1] - logits[:, 0]).chunk(2))
        # Of the global batch, as this rank's share: the mean over ranks is then the loss of all, however they lie.
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        count = sum_over_ranks(has.sum()).clamp(min=1) / world
        return {
            "exchanged": (functional.softplus(-margin) * has).sum() / count,
            "exchanged_right": ((margin > 0) & has).sum() / count,
        }
