"""Masked words are drawn in the stated shares from seed and position, and the loss equals the full formula."""

from __future__ import annotations

import pytest
import tiny
import torch
from scipy import stats

from pretrain.config import MaskedLanguageConfig
from pretrain.model.alignment_model import TextBatch
from pretrain.objectives.masked_language import MaskedLanguage, mask_words, masked_language_loss, word_logits
from pretrain.objectives.state import MaskedText

TOKENIZER = tiny.tokenizer()
SPECIALS = (TOKENIZER.pad, TOKENIZER.cls, TOKENIZER.sep)
SEED = 7


def texts(count: int) -> tuple[TextBatch, torch.Tensor]:
    ids, mask = tiny.captions(count, torch.Generator().manual_seed(3))
    return TextBatch(ids, mask), torch.arange(count)


def words_of(text: TextBatch) -> torch.Tensor:
    return text.mask & ~torch.isin(text.ids, torch.tensor(SPECIALS))


def test_15_percent_are_chosen_of_which_80_are_masked_10_are_others_and_10_stay():
    text, positions = texts(30_000)
    altered, chosen = mask_words(text, positions, TOKENIZER, 0.15, SEED)
    words = int(words_of(text).sum())
    assert stats.binomtest(int(chosen.sum()), words, 0.15).pvalue > 1e-3
    became_mask = chosen & (altered == TOKENIZER.mask)
    stayed = chosen & (altered == text.ids)
    other = chosen & ~became_mask & ~stayed
    # A tenth is replaced by a token drawn from the whole vocabulary, which may be [MASK] or the word itself.
    vocabulary, count = TOKENIZER.vocabulary, int(chosen.sum())
    expected = torch.tensor([0.8 + 0.1 / vocabulary, 0.1 + 0.1 / vocabulary, 0.1 * (1 - 2 / vocabulary)]) * count
    observed = torch.tensor([int(part.sum()) for part in (became_mask, stayed, other)])
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3
    assert len(altered[other].unique()) == vocabulary - 1, "every token but [MASK] is seen as a replacement"


def test_special_tokens_and_padding_are_never_chosen_and_what_is_not_chosen_is_not_altered():
    text, positions = texts(2000)
    altered, chosen = mask_words(text, positions, TOKENIZER, 0.9, SEED)
    assert not (chosen & ~words_of(text)).any()
    assert torch.equal(altered[~chosen], text.ids[~chosen])


def test_the_choice_is_a_function_of_seed_and_position_however_the_batch_is_split_or_padded():
    text, positions = texts(64)
    altered, chosen = mask_words(text, positions, TOKENIZER, 0.3, SEED)
    for part in (slice(0, 1), slice(10, 17), slice(63, 64)):
        some, which = mask_words(TextBatch(text.ids[part], text.mask[part]), positions[part], TOKENIZER, 0.3, SEED)
        assert torch.equal(some, altered[part]) and torch.equal(which, chosen[part])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    some, _ = mask_words(TextBatch(text.ids[order], text.mask[order]), positions[order], TOKENIZER, 0.3, SEED)
    assert torch.equal(some, altered[order])
    wider = TextBatch(torch.nn.functional.pad(text.ids, (0, 5)), torch.nn.functional.pad(text.mask, (0, 5)))
    some, _ = mask_words(wider, positions, TOKENIZER, 0.3, SEED)
    assert torch.equal(some[:, : text.ids.shape[1]], altered)


def test_another_seed_or_position_chooses_other_words():
    text, positions = texts(64)
    _, chosen = mask_words(text, positions, TOKENIZER, 0.3, SEED)
    for seed, moved in ((SEED + 1, positions), (SEED, positions + 64)):
        assert not torch.equal(mask_words(text, moved, TOKENIZER, 0.3, seed)[1], chosen)


@pytest.mark.parametrize("distill_weight", [0.0, 0.4, 1.0])
def test_the_loss_equals_that_of_the_full_tensor_of_logits(distill_weight):
    """ALBEF's: over batch x length x vocabulary, labels -100 where no word is masked, teacher's softmax as soft target."""
    text, positions = texts(6)
    network, teacher = tiny.model().double(), tiny.model(seed=1).double()
    altered, chosen = mask_words(text, positions, TOKENIZER, 0.4, SEED)
    altered, places = TextBatch(altered, text.mask), chosen.flatten().nonzero()[:, 0]
    tokens = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def full(model):
        states = model.text_encoder(altered.ids, altered.mask)
        fused = model.fusion_encoder(states, altered.mask, model.fusion_encoder.prepare_images(tokens))
        return model.masked_language_head(fused, model.text_encoder.words.weight)

    def few(model):
        return word_logits(model, altered, places, model.fusion_encoder.prepare_images(tokens))

    labels = torch.where(chosen, text.ids, -100)
    log_probability = torch.log_softmax(full(network), -1)
    hard = torch.nn.functional.nll_loss(log_probability.flatten(0, 1), labels.flatten(), ignore_index=-100)
    soft = -(torch.softmax(full(teacher), -1) * log_probability).sum(-1)[chosen].mean()
    wanted = (1 - distill_weight) * hard + distill_weight * soft
    masked = MaskedText(
        altered, places, text.ids[chosen], float(chosen.sum()), few(teacher) if distill_weight else None
    )
    loss = masked_language_loss(few(network), masked, distill_weight)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6), "logits are rounded to float32"


def test_micro_batches_with_unequal_counts_average_to_the_loss_of_the_whole_batch():
    task = tiny.task(tiny.recipe())
    objective = MaskedLanguage(MaskedLanguageConfig())

    def losses(micro_batch: int) -> list[torch.Tensor]:
        micro_batches, _ = task.prepare(tiny.batch(16, step=1), 1.0, micro_batch)
        assert micro_batch == 16 or len({len(inputs.masked.word_indices) for inputs in micro_batches}) > 1
        return [objective(tiny.state(task.student.model, inputs))["masked_language"] for inputs in micro_batches]

    (whole,) = losses(16)
    for micro_batch in (2, 4, 8):
        torch.testing.assert_close(torch.stack(losses(micro_batch)).mean(), whole)


def test_a_batch_without_a_masked_word_costs_nothing_and_still_has_a_graph():
    task = tiny.task(tiny.recipe(objectives__masked_language__share=0.0))
    (inputs,), _ = task.prepare(tiny.batch(4), 1.0, 4)
    loss = MaskedLanguage(MaskedLanguageConfig())(tiny.state(task.student.model, inputs))["masked_language"]
    loss.backward()
    assert loss == 0 and loss.isfinite()
