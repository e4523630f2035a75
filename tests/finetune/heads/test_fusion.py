"""The fusion head's re-ranking of a shortlist."""

import dual_jobs
import numpy as np
import pytest
import torch

from finetune.heads import fusion
from finetune.heads.fusion import fusion_scores, match_pairs
from finetune.shortlist import make_shortlists
from pretrain.encode import Encodings
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from runtime.ranks import Ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    image = ImageEncoderConfig("vit_tiny_patch16_224", image_size=32, patch=16, width=32, depth=1, heads=2)
    text = TextEncoderConfig(width=32, layers=1, heads=2, feed_forward=64, positions=16)
    network = AlignmentModel(ModelConfig(image, text, FusionEncoderConfig(layers=2), feature_dim=16, codewords=0), 50)
    for parameter in network.parameters():  # BERT's start makes all pairs nearly alike
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return network.eval()


@pytest.fixture(scope="module")
def encodings(model):
    torch.manual_seed(1)
    lengths = torch.tensor([3, 7, 5, 4, 6, 7, 3, 5, 4])
    mask = torch.arange(8)[None] < lengths[:, None]
    ids = torch.randint(5, 50, (9, 8)) * mask
    with torch.no_grad():
        tokens = model.image_encoder(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8))
        states = model.text_encoder(ids, mask)
        return Encodings(model.image_features(tokens), model.text_features(states, mask), tokens, states, mask)


def test_a_pair_scores_the_same_as_when_scored_alone(model, encodings):
    image, text = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 8, 5, 1])
    actual = match_pairs(model, encodings, image, text, CPU)
    for number in range(4):
        mask = encodings.text_mask[text[number]][None]
        with torch.no_grad():
            read = model.fusion_encoder.prepare_images(encodings.image_tokens[image[number]][None])
            fused = model.fusion_encoder(encodings.text_states[text[number]][None], mask, read)
            logits = model.matching_logits(fused)[0]
        assert actual[number].item() == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)


def in_new_order(model, encodings, similarity, size):
    lists = make_shortlists(similarity, size, np.zeros(3, dtype=int), np.repeat(np.arange(3), 3))
    return lists.rerank(similarity, fusion_scores(model, encodings, lists, Ranks(), CPU))


def test_a_full_shortlist_is_ordered_by_matching_alone(model, encodings):
    similarity = (encodings.image @ encodings.text.T).numpy()
    to_text, to_image = in_new_order(model, encodings, similarity, 100)  # larger than either gallery
    image, text = torch.arange(3).repeat_interleave(9), torch.arange(9).repeat(3)
    matching = match_pairs(model, encodings, image, text, CPU).view(3, 9).numpy()
    assert np.array_equal(to_text.argsort(1), matching.argsort(1))
    assert np.array_equal(to_image.argsort(1), matching.T.argsort(1))


def test_each_pair_is_scored_once_in_batches_of_limited_size(model, encodings, monkeypatch):
    similarity, batches = (encodings.image @ encodings.text.T).numpy(), []

    def scored(model, encodings, image, text, device):
        batches.append(list(zip(image.tolist(), text.tolist(), strict=True)))
        return match_pairs(model, encodings, image, text, device)

    monkeypatch.setattr(fusion, "PAIRS", 4)
    expected = in_new_order(model, encodings, similarity, 100)
    monkeypatch.setattr(fusion, "match_pairs", scored)
    actual = in_new_order(model, encodings, similarity, 100)
    assert [len(pairs) for pairs in batches] == [4] * 6 + [3] and len(
        {pair for pairs in batches for pair in pairs}
    ) == 27
    assert all(np.array_equal(*both) for both in zip(expected, actual, strict=True))


def test_two_ranks_give_the_same_bits_as_one(model, encodings, gloo_pool, lone_process):
    similarity = (encodings.image @ encodings.text.T).numpy()
    lists = make_shortlists(similarity, 4, np.zeros(3, dtype=int), np.repeat(np.arange(3), 3))
    (alone,) = lone_process.run(dual_jobs.fusion_on_this_rank, model, encodings, lists)
    for actual in gloo_pool.run(dual_jobs.fusion_on_this_rank, model, encodings, lists):
        assert all(np.array_equal(*both) for both in zip(alone, actual, strict=True))


def test_items_off_the_shortlist_keep_their_order_below_it(model, encodings):
    similarity = (encodings.image @ encodings.text.T).numpy()
    to_text, _ = in_new_order(model, encodings, similarity, 4)
    for row in range(3):
        dual, reranked = np.argsort(-similarity[row]), np.argsort(-to_text[row])
        assert set(reranked[:4]) == set(dual[:4])
        assert np.array_equal(reranked[4:], dual[4:])
