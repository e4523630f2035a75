"""Hard negatives are drawn with the right weights and never show the same image."""

from __future__ import annotations

import pytest
import tiny
import torch
from scipy import stats

from pretrain.config import MatchingConfig
from pretrain.objectives.matching import Matching, draw_negatives
from pretrain.task import PretrainTask
from runtime.errors import RecipeError

DRAWS = 100_000


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(similarity: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Counts of 100,000 draws for each row: (rows, columns)."""
    rows, columns = similarity.shape
    column, exists = draw_negatives(similarity.expand(DRAWS, -1, -1), same.expand(DRAWS, -1, -1), uniform(DRAWS, rows))
    assert column.shape == exists.shape == (DRAWS, rows) and exists.all()
    return torch.stack([torch.bincount(column[:, row], minlength=columns) for row in range(rows)])


@pytest.mark.parametrize("temperature", [0.07, 0.5, 5.0])
def test_100_000_draws_fit_the_weights_and_none_is_the_same_image(temperature):
    ids = torch.tensor([1, 2, 3, 1, 5, 6])
    same = ids[:, None] == ids
    similarity = tiny.unit(6, 4, seed=1) @ tiny.unit(6, 4, seed=2).T / temperature
    counts = drawn(similarity, same)
    assert not counts[same].any()
    expected_counts = torch.softmax(similarity.double(), -1).masked_fill(same, 0)
    expected_counts = DRAWS * expected_counts / expected_counts.sum(-1, keepdim=True)
    for row in range(6):
        common = expected_counts[row] >= 5  # the chi-square distribution needs cells that are not nearly empty
        assert counts[row][~common].sum() <= 5 * expected_counts[row][~common].sum() + 20
        observed = torch.cat([counts[row][common], counts[row][~common].sum()[None]]).double()
        expected = torch.cat([expected_counts[row][common], expected_counts[row][~common].sum()[None]])
        fits = expected > 0
        if fits.sum() > 1:
            assert stats.chisquare(observed[fits], expected[fits], sum_check=False).pvalue > 1e-3, row


def test_equal_similarities_are_drawn_evenly():
    same = torch.eye(5, dtype=torch.bool)
    for value in (0.0, 1000.0, -1000.0):
        counts = drawn(torch.full((5, 5), value), same)
        assert stats.chisquare(counts[0, 1:].double()).pvalue > 1e-3
        assert not counts.diagonal().any()


def test_a_similarity_saturated_by_the_smallest_temperature_still_draws_a_negative():
    """In float32 softmax every weight but the positive's is 0 here: ALBEF's multinomial dies of it."""
    similarity = torch.full((4, 4), -1.0)
    similarity.fill_diagonal_(1.0)
    similarity[0, 2] = 0.5
    logits, same = similarity.expand(1000, 4, 4) / 0.001, torch.eye(4, dtype=torch.bool).expand(1000, 4, 4)
    column, exists = draw_negatives(logits, same, uniform(1000, 4))
    assert exists.all() and (column[:, 0] == 2).all(), "the only near one"
    assert (column != torch.arange(4)).all()
    assert all(len(column[:, row].unique()) == 3 for row in range(1, 4)), "ties are drawn alike"


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53, 0.5])
def test_the_ends_of_the_unit_interval_are_drawn_too(number):
    ids = torch.tensor([1, 1, 2, 2])
    same = ids[:, None] == ids
    similarity = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 50
    column, exists = draw_negatives(similarity, same, torch.full((4,), number, dtype=torch.float64))
    assert exists.all() and not same[torch.arange(4), column].any()


def test_a_row_without_any_negative_is_flagged():
    ids = torch.tensor([1, 1, 1])
    column, exists = draw_negatives(torch.randn(3, 3), ids[:, None] == ids, uniform(3))
    assert not exists.any() and ((column >= 0) & (column < 3)).all()
    column, exists = draw_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), uniform(1))
    assert not exists.any() and column.tolist() == [0]


def test_draws_are_a_function_of_their_numbers():
    similarity, same = torch.randn(2, 5, 5), torch.eye(5, dtype=torch.bool).expand(2, 5, 5)
    first, _ = draw_negatives(similarity, same, uniform(2, 5))
    again, _ = draw_negatives(similarity, same, uniform(2, 5))
    assert torch.equal(first, again)


def prepared(size: int, pool: int | None = None, image_ids=None, **more):
    """A task's student state for a batch of this size."""
    changes = {"objectives__matching__pool": pool, "training__global_batch": size} | more
    task: PretrainTask = tiny.task(tiny.recipe(**changes))
    batch = tiny.batch(size)
    if image_ids is not None:
        batch["image_ids"] = torch.tensor(image_ids)
    (inputs,), _ = task.prepare(batch, 1.0, size)
    return tiny.state(task.student.model, inputs)


def test_the_loss_is_the_cross_entropy_of_matched_and_wrong_pairs():
    state = prepared(6)
    objective, model = Matching(MatchingConfig()), state.model
    keys, draws = state.batch.keys, state.batch.draws
    assert not torch.allclose(keys.image, state.image, atol=1e-2), "the teacher sees another view"
    wrong_image, _ = objective.draw(state, state.text, keys.image, draws[:, 0])
    wrong_text, _ = objective.draw(state, state.image, keys.text, draws[:, 1])
    total, right = 0.0, 0
    for sample in range(6):
        for text, image, label in (
            (sample, sample, 1),
            (sample, wrong_image[sample], 0),
            (wrong_text[sample], sample, 0),
        ):
            read = model.fusion_encoder.prepare_images(state.image_tokens[image, None])
            fused = model.fusion_encoder(state.text_states[text, None], state.batch.text.mask[text, None], read)
            logits = model.matching_logits(fused)[0].double()
            total -= torch.log_softmax(logits, -1)[label].item()
            right += int(logits.argmax() == label)
    losses = objective(state)
    assert losses["matching"].item() == pytest.approx(total / 18, rel=1e-5)
    assert losses["matching_accuracy"].item() == pytest.approx(right / 18)


def test_negatives_come_from_the_samples_own_pool():
    state = prepared(8, pool=4, image_ids=list(range(8)))
    wrong, exists = Matching(MatchingConfig(pool=4)).draw(state, state.text, state.image, state.batch.draws[:, 0])
    assert exists.all() and torch.equal(wrong // 4, torch.arange(8) // 4)
    assert (wrong != torch.arange(8)).all()


def test_a_batch_of_one_learns_from_its_positive_alone():
    state = prepared(1)
    loss = Matching(MatchingConfig())(state)["matching"]
    logits = state.model.matching_logits(
        state.model.fusion_encoder(state.text_states, state.batch.text.mask, state.prepared_images)
    )
    torch.testing.assert_close(loss, -torch.log_softmax(logits, -1)[0, 1])


def test_samples_whose_pool_is_all_one_image_add_no_false_negatives():
    state = prepared(4, pool=2, image_ids=[7, 7, 1, 2])
    losses = Matching(MatchingConfig(pool=2))(state)
    assert losses["matching"].isfinite()
    _, exists = Matching(MatchingConfig(pool=2)).draw(state, state.text, state.image, state.batch.draws[:, 0])
    assert exists.tolist() == [False, False, True, True]


def test_a_pool_that_does_not_divide_the_micro_batch_is_refused():
    state = prepared(6)
    with pytest.raises(RecipeError, match="pool 4 does not divide the micro-batch 6"):
        Matching(MatchingConfig(pool=4))(state)


def test_negatives_from_all_ranks_are_the_nearby_ones_where_the_micro_batch_is_the_global_batch():
    nearby = Matching(MatchingConfig())(prepared(8))
    everywhere = MatchingConfig(negatives="all_ranks")
    from_all = Matching(everywhere)(prepared(8, objectives__matching={"negatives": "all_ranks"}))
    torch.testing.assert_close(from_all["matching"], nearby["matching"])


def test_negatives_from_all_ranks_reach_beyond_the_micro_batch_and_never_the_same_image():
    changes = {"objectives__matching": {"negatives": "all_ranks"}, "training__global_batch": 16}
    task: PretrainTask = tiny.task(tiny.recipe(**changes))
    batch = tiny.batch(16)
    inputs, _ = task.prepare(batch, 1.0, 4)
    chosen = []
    for part in inputs:
        state, objective = tiny.state(task.student.model, part), Matching(MatchingConfig(negatives="all_ranks"))
        rows, exists = objective.draw_from_all(state, state.text, part.keys.image, part.draws[:, 0])
        assert exists.all() and (batch["image_ids"][rows] != part.image_ids).all()
        chosen.append(bool((rows // 4 != part.rows // 4).any()))
    assert any(chosen)


@pytest.mark.parametrize("negatives", ["nearby", "all_ranks"])
def test_negatives_share_a_codeword_where_possible(negatives):
    """Four images at codeword 0, three at 1, one alone at 2, which takes its negative from anywhere."""
    state = prepared(8, image_ids=list(range(8)), objectives__matching={"negatives": negatives})
    codes = torch.tensor([0, 0, 1, 0, 1, 0, 1, 2])
    features = torch.nn.functional.normalize(state.model.codewords().detach()[codes] + 0.01 * tiny.unit(8, 16), dim=-1)
    objective = Matching(MatchingConfig(negatives=negatives, same_codeword=True))
    draw = objective.draw if negatives == "nearby" else objective.draw_from_all
    drawn_rows = set()
    for seed in range(20):
        wrong, exists = draw(state, state.text * 0.1, features, uniform(8, seed=seed))
        assert exists.all() and (codes[wrong][:7] == codes[:7]).all() and (wrong != torch.arange(8)).all()
        drawn_rows |= set(wrong[:1].tolist())
    assert drawn_rows == {1, 3, 5}, "all of those that share it"


def test_options_that_fine_tuning_cannot_serve_are_refused():
    state = prepared(4)
    with pytest.raises(RecipeError, match="all_ranks is for pretraining"):
        Matching(MatchingConfig(negatives="all_ranks"))(state)
    state.model.codebook = None
    with pytest.raises(RecipeError, match="same_codeword needs a model with a codebook"):
        Matching(MatchingConfig(same_codeword=True))(state)
