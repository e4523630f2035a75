"""Matching against a caption's own opposite: 'a circle left of a star' beside 'a circle right of a star', for one image.

Both captions have the same kind of words and are equally likely without the image, so only the image tells them apart.
Negatives drawn from a batch are seldom that near. A model then learns late, or never, what a single word decides
(docs/shapes.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from data_tools.tokenizer import CaptionTokenizer
from finetune.heads.base import world_size
from pretrain.objectives.state import StudentState
from runtime.errors import RecipeError
from runtime.ranks import sum_over_ranks


def exchange_table(pairs: list[str], tokenizer: CaptionTokenizer) -> Tensor:
    """Return the token that each token is exchanged for; a token of no pair stays itself.

    Args:
        pairs: pairs of words, as in 'left right'. The first pair that holds a word decides what it is exchanged for.
        tokenizer: the model's own.

    Returns:
        (vocabulary,) token ids.

    Raises:
        RecipeError: a word is not one token of the vocabulary.
    """
    table, paired = torch.arange(tokenizer.vocabulary), set[int]()
    for pair in pairs:
        ids = []
        for word in pair.split():
            pieces = tokenizer.pipeline.encode(word, add_special_tokens=False).ids
            if len(pieces) != 1 or tokenizer.pipeline.id_to_token(pieces[0]) == "[UNK]":
                raise RecipeError(
                    f"exchanged.words holds {word!r}, which is not one token of this vocabulary; leave it out"
                )
            ids += pieces
        for token, opposite in (ids, ids[::-1]):
            if token not in paired:
                table[token] = opposite
                paired.add(token)
    return table


class ExchangedWords:
    """The loss of choosing, by its image, between a caption and its altered form with every word of a pair exchanged."""

    def __init__(self, pairs: list[str], tokenizer: CaptionTokenizer) -> None:
        self.table = exchange_table(pairs, tokenizer)

    def count(self, ids: Tensor) -> Tensor:
        """Return how many captions of the global batch hold a word of a pair, as a mean over the ranks, 0-d. A collective.

        Args:
            ids: (texts, words) this rank's captions.
        """
        has_pair_word = (self.table.to(ids.device)[ids] != ids).any(1)
        return sum_over_ranks(has_pair_word.sum()).clamp(min=1) / world_size()

    def __call__(self, state: StudentState, count: Tensor | None = None) -> dict[str, Tensor]:
        """Compare each caption with its altered form.

        Let m be the matching logit (match minus no match) of a caption and m' that of its altered form. The mean is over the
        captions that hold a word of a pair.

        Args:
            state: of the captions and their images.
            count: what sums are divided by, where `state` is a part of a batch; None: `count` of these captions.

        Returns:
            `exchanged`, the mean of log(1 + e^(m' - m)); and `exchanged_right`, the share of captions with m > m'.
        """
        text, model = state.batch.text, state.model
        altered = self.table.to(text.ids.device)[text.ids]
        has_pair_word = (altered != text.ids).any(1)
        own = torch.arange(len(text.ids), device=altered.device)
        states = torch.cat([state.text_states, model.text_encoder(altered, text.mask)])
        mask = torch.cat([text.mask, text.mask])
        logits = model.match(states, mask, state.prepared_images, torch.cat([own, own]))
        margin = torch.sub(*(logits[:, 1] - logits[:, 0]).chunk(2))
        # Divided by the count of the global batch, so that the mean over the ranks is its loss, however captions are spread.
        count = self.count(text.ids) if count is None else count
        return {
            "exchanged": (functional.softplus(-margin) * has_pair_word).sum() / count,
            "exchanged_right": ((margin > 0) & has_pair_word).sum() / count,
        }
