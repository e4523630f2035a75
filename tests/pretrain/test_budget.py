"""The planner's formulas against the model itself: counted parameters, counted operations, autograd's saved tensors, a measured run."""

from __future__ import annotations

import budget_jobs
import pytest
import tiny
from gloo_pool import GlooPool

from pretrain.budget import Budget, vocabulary_size

SHAPES = [
    {},
    {"objectives__codebook__weight": 0.0, "model__codewords": 0, "objectives__contrastive__intra_modal": False},
    {"model__codebook_update": "average", "model__codebook_centered": True},
    {"objectives__masked_language__weight": 0.0, "transport__samples": "batch+queue", "model__text__layers": 3},
    {"teacher__distill_weight": 0.0, "model__fusion__layers": 3, "model__image__depth": 3, "model__image__width": 48},
    {"model__fusion": {"kind": "single_stream", "layers": 2}, "model__image__width": 48},
]
AGAIN = {"training__checkpoint_activations": True}


def budget(**changes) -> Budget:
    return Budget(tiny.recipe(data__vocabulary=tiny.tokenizer().vocabulary, **changes))


@pytest.mark.parametrize("changes", SHAPES)
def test_counted_parameters_equal_the_models(changes):
    counted = budget_jobs.parameters(tiny.model(tiny.recipe(**changes)))
    planned = budget(**changes)
    assert (planned.total_parameters, planned.teacher) == counted


DEEP = {"model__image__patch": 8, "model__image__width": 192, "model__image__depth": 8}
"""Most of the work is the image encoder's."""


@pytest.mark.parametrize("changes", [*SHAPES, AGAIN, AGAIN | DEEP, AGAIN | DEEP | {"model__image__drop_path": 0.1}])
def test_flops_are_torchs_count_within_2_percent(lone_process, changes):
    counted = lone_process.run(budget_jobs.count_flops, changes)[0]
    planned = budget(**changes).flops_per_sample
    assert planned == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("changes", SHAPES)
def test_planned_activations_match_what_autograd_keeps(lone_process, changes):
    """Within 15 %: softmaxes of attention, norms' statistics and the like are left out."""
    kept = lone_process.run(budget_jobs.saved_bytes, changes)[0]
    assert budget(**changes).activation_bytes == pytest.approx(kept, rel=0.15)


def test_an_absent_layer_is_not_the_largest():
    one = {"model__fusion": {"kind": "single_stream", "layers": 1}}
    kept, again = budget(**one).activation_bytes, budget(**one, **AGAIN).activation_bytes
    assert again < kept


def test_words_are_counted_where_the_tokenizer_is_at_hand(tmp_path):
    tiny.tokenizer().save(tmp_path / "folder")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    counted = [vocabulary_size(str(tmp_path / name)) for name in ("folder", "words", "bert-base-uncased")]
    assert counted == [tiny.tokenizer().vocabulary, 3, 30522] and vocabulary_size("train") is None


LARGER = {
    "model__image__width": 384,
    "model__image__depth": 6,
    "model__image__patch": 8,
    "model__text__width": 384,
    "model__text__layers": 3,
    "model__text__feed_forward": 1536,
    "model__fusion__layers": 3,
    "teacher__queue": 4096,
}


@pytest.mark.parametrize("stage", [0, 1])
def test_planned_memory_matches_a_measured_run_within_15_percent(stage):
    changes = LARGER | {"training__zero_stage": stage}
    assert planned_peak(changes, stage) == pytest.approx(measured_peak(changes), rel=0.15)


def test_planned_savings_of_recomputed_activations_match_a_run_within_20_percent():
    """Of a model with many tokens and little width, whose activations are half of its memory."""
    changes = LARGER | {"model__image__patch": 4, "model__image__width": 192, "model__image__depth": 12}
    changes["training__zero_stage"] = 0
    saved = planned_peak(changes, 0) - planned_peak(changes | AGAIN, 0)
    assert saved == pytest.approx(measured_peak(changes) - measured_peak(changes | AGAIN), rel=0.2)


def planned_peak(changes, stage: int) -> float:
    recipe = tiny.recipe(data__vocabulary=tiny.tokenizer().vocabulary, **changes)
    return Budget(recipe, 16).memory(stage, 1, gpu=False)["fullest moment"]


def measured_peak(changes) -> float:
    """In a process of its own: what other tests left in a pool's memory would be used again and not be seen."""
    process = GlooPool(1)
    try:
        return process.run(budget_jobs.peak_bytes, changes)[0]
    finally:
        process.close()
