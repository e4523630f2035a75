"""The engine on real processes under real DeepSpeed: ZeRO stages, worlds and accumulation change nothing; state goes round.

Losses cannot show an error of scale, which AdamW hides: gradients are compared as well, by their norm and, parameter by
parameter, in Adam's moments, which are sums of gradients and of their squares.
"""

from __future__ import annotations

import engine_jobs
import pytest
import tiny
import torch
from gloo_pool import GlooPool

from runtime.errors import RecipeError

STEPS = 5
STAGES = (0, 1, 2, 3)


def changes(stage: int = 1, precision: str = "fp32", **more):
    return {"training__zero_stage": stage, "training__precision": precision, **more}


@pytest.fixture(scope="module")
def runs(gloo_pool, lone_process):
    """Runs of five steps, made once each: runs(world, stage, precision, **recipe changes) -> what rank 0 tells."""
    made: dict = {}

    def run(world: int, stage: int = 1, precision: str = "fp32", **more):
        key = (world, stage, precision, *sorted(more.items()))
        if key not in made:
            pool = gloo_pool if world == 2 else lone_process
            made[key] = pool.run(engine_jobs.train, changes(stage, precision, **more), STEPS, raw_gradients=True)
        return made[key][0]

    run.every_rank = lambda *key: made[key]
    return run


def losses_of(results, name: str = "loss") -> list[float]:
    return [figures[name] for figures in results.losses]


def assert_same_gradients(one, other, relative: float) -> None:
    """Raw gradients of the first step, parameter by parameter, agree to `relative` of the largest entry of each; and, over
    all steps, Adam's moments, which are sums of gradients and of their squares."""
    for mine, theirs in ((one.gradients[0], other.gradients[0]), (one.state.moments, other.state.moments)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            expected = theirs[name]
            noise = 1e-7 if "bias" in name else 0.0  # of biases of keys, whose gradient is zero
            # A square doubles the relative error, as seen with torch 2.9.
            squares = 2 if name.startswith("exp_avg_sq") else 1
            assert (tensor - expected).abs().max() <= squares * relative * expected.abs().max() + noise, name


def test_raw_gradients_are_those_of_every_weight_and_step(runs):
    results = runs(2, 3)
    assert len(results.gradients) == STEPS
    assert {name for name, weight in tiny.model().named_parameters()} == results.gradients[0].keys()
    norm = torch.nn.utils.get_total_norm(list(results.gradients[0].values()))
    assert float(norm) == pytest.approx(results.norms[0], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_stages_give_the_same_losses_and_gradients(runs, stage):
    results, expected = runs(2, stage), runs(2, 1)
    assert losses_of(results) == pytest.approx(losses_of(expected), rel=1e-6)
    assert results.norms == pytest.approx(expected.norms, rel=1e-6)
    assert_same_gradients(results, expected, 1e-6)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_stages_agree_over_twenty_steps(gloo_pool, twenty_steps, stage):
    results = gloo_pool.run(engine_jobs.train, changes(stage), 20)[0]
    assert losses_of(results) == pytest.approx(losses_of(twenty_steps), rel=1e-6)


@pytest.fixture(scope="module")
def twenty_steps(gloo_pool):
    return gloo_pool.run(engine_jobs.train, changes(1), 20)[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_the_optimizer_changes_rounding_alone(runs, stage):
    """Its AdamW is the fused one, which multiplies in another order."""
    results, expected = runs(2, stage, training__offload_optimizer=True), runs(2, 1)
    assert losses_of(results) == pytest.approx(losses_of(expected), rel=1e-6)
    assert_same_gradients(results, expected, 1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_recomputed_activations_are_the_same(runs, stage):
    results, expected = (
        runs(2, stage, training__checkpoint_activations=True, model__text__dropout=0.1),
        runs(2, 1, model__text__dropout=0.1),
    )
    assert losses_of(results) == pytest.approx(losses_of(expected), rel=1e-6)
    assert_same_gradients(results, expected, 1e-6)


def test_small_parameters_kept_whole_at_stage_3_change_nothing(gloo_pool, runs):
    results = gloo_pool.run(engine_jobs.train, changes(3), STEPS, raw_gradients=True, kept_whole=500)[0]
    assert losses_of(results) == pytest.approx(losses_of(runs(2, 1)), rel=1e-6)
    assert_same_gradients(results, runs(2, 1), 1e-6)


def test_plans_from_the_students_own_features_are_refused_at_stage_3():
    with pytest.raises(RecipeError, match="objectives.codebook.features is student.*zero_stage"):
        tiny.recipe(objectives__codebook__features="student", training__zero_stage=3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_that_travel_in_many_buckets_are_the_same(gloo_pool, runs, stage):
    """Some parameters are larger than a bucket."""
    results = gloo_pool.run(engine_jobs.train, changes(stage), STEPS, raw_gradients=True, bucket=1500)[0]
    assert losses_of(results) == pytest.approx(losses_of(runs(2, 1)), rel=1e-6)
    assert_same_gradients(results, runs(2, 1), 1e-6)


def test_the_losses_fall(runs):
    losses = losses_of(runs(2, 1))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro_batch", [16, 8, 4], ids=["whole batch", "2 accumulated", "4 accumulated"])
def test_one_process_computes_what_two_do(runs, stage, micro_batch):
    results, expected = runs(1, stage, training__micro_batch=micro_batch), runs(2, 1)
    for name in ("loss", "contrastive", "matching", "masked_language", "codebook", "transport_cost"):
        assert losses_of(results, name) == pytest.approx(losses_of(expected, name), rel=1e-5), name
    assert results.norms == pytest.approx(expected.norms, rel=1e-5)
    assert_same_gradients(results, expected, 1e-5)
    for name, weight in results.state.masters.items():
        difference = (weight - expected.state.masters[name]).abs()
        if name.endswith(("qkv.bias", "query_key_value.bias", "key_value.bias")):
            # A bias of the keys shifts all logits of a query alike: its gradient is zero, and Adam makes steps of its rounding.
            *others, keys, values = difference.chunk(2 if name.endswith(".key_value.bias") else 3)
            assert keys.max() <= 2 * STEPS * 1e-3, name
            difference = torch.cat([*others, values])
        assert difference.max() < 1e-5, name


def test_two_processes_that_accumulate_compute_the_same(runs):
    results, expected = runs(2, 2, training__micro_batch=4), runs(2, 1)
    assert losses_of(results) == pytest.approx(losses_of(expected), rel=1e-5)
    assert_same_gradients(results, expected, 1e-5)


def test_teacher_and_queue_are_the_same_in_any_world(runs):
    one, two = runs(1, 1, training__micro_batch=16).state, runs(2, 1).state
    assert torch.equal(one.queue["image_ids"], two.queue["image_ids"])
    assert torch.equal(one.queue["counters"], two.queue["counters"])
    torch.testing.assert_close(one.queue["image"], two.queue["image"], atol=1e-4, rtol=0)
    torch.testing.assert_close(one.queue["text"], two.queue["text"], atol=1e-4, rtol=0)


def test_every_rank_ends_with_the_same_weights_teacher_and_queue(runs):
    runs(2, 3)
    first, second = runs.every_rank(2, 3, "fp32")
    for part in engine_jobs.PARTS:
        ours, theirs = getattr(first.state, part), getattr(second.state, part)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
    assert all(torch.equal(weight, second.parameters[name]) for name, weight in first.parameters.items())


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_scales_gradients_and_reports_the_norm_before_it(runs, stage):
    clipped, plain = runs(2, stage, optimizer__clip_norm=1.0), runs(2, stage)
    assert clipped.norms[0] == pytest.approx(plain.norms[0], rel=1e-6) and plain.norms[0] > 1
    expected = runs(2, 1, optimizer__clip_norm=1.0)
    assert losses_of(clipped) == pytest.approx(losses_of(expected), rel=1e-5)
    # One step in, the first moment is a tenth of the clipped gradient; after five its norm is at most 1 - 0.9**5.
    first_moments = [moment for name, moment in clipped.state.moments.items() if name.startswith("exp_avg.")]
    assert 0 < torch.nn.utils.get_total_norm(first_moments) <= 1 - 0.9**STEPS + 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_trains_with_float32_masters_moments_and_teacher(runs, stage):
    results, plain = runs(2, stage, "bf16"), runs(2, 1)
    state = results.state
    for tensors in (state.masters, state.moments, state.teacher):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for name, weight in results.parameters.items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, state.masters[name].bfloat16()), name
        assert not torch.equal(weight.float(), state.masters[name]), f"{name} holds no more than bf16 does"
    for name, weight in results.teacher_compute.items():
        assert torch.equal(weight, state.teacher[name].bfloat16()), name
    assert losses_of(results) == pytest.approx(losses_of(plain), rel=2e-2)


def test_bf16_stages_agree(runs):
    for stage in (0, 2, 3):
        assert losses_of(runs(2, stage, "bf16")) == pytest.approx(losses_of(runs(2, 1, "bf16")), rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_masters_start_from_the_float32_weights(lone_process, stage):
    """DeepSpeed by itself makes them from weights that are bf16 already, and at stage 0 decays them once."""
    start = lone_process.run(engine_jobs.train, changes(stage, "bf16"), 0)[0].state
    for name, weight in tiny.model().named_parameters():
        assert torch.equal(start.masters[name], weight), name
    assert not any(moment.any() for moment in start.moments.values())


@pytest.mark.parametrize("stage", [0, 1])
def test_student_and_teacher_see_the_same_pixels_in_bf16(lone_process, stage):
    """The pixel statistics stay float32 in both."""
    assert lone_process.run(engine_jobs.buffer_types, "bf16", stage) == [
        {"student": ["torch.float32"] * 2, "teacher": ["torch.float32"] * 2}
    ]


@pytest.fixture(scope="module")
def saved(gloo_pool):
    """State after two steps at ZeRO 1 on two ranks, as the first rank gathers it, by precision."""
    return {
        precision: gloo_pool.run(engine_jobs.train, changes(1, precision), 2)[0].state for precision in ("fp32", "bf16")
    }


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_state_saved_at_zero_1_on_two_ranks_loads_anywhere_and_goes_on(
    gloo_pool, lone_process, saved, runs, world, stage, precision
):
    pool = gloo_pool if world == 2 else lone_process
    state = saved[precision]
    results = pool.run(engine_jobs.train, changes(stage, precision), STEPS - state.step, state)
    for rank in results:
        for part in engine_jobs.PARTS:
            loaded, expected = getattr(rank.loaded, part), getattr(state, part)
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[name], expected[name]) for name in expected), part
    assert losses_of(results[0]) == losses_of(runs(2, 1, precision))[state.step :], "a resumed run is the run itself"
    if precision == "fp32" and stage == 2 and world == 2:
        final, expected = results[0].state, runs(2, 1).state
        assert all(torch.equal(final.masters[name], expected.masters[name]) for name in expected.masters)


def test_state_saved_by_one_process_loads_on_two(gloo_pool, lone_process, runs):
    state = lone_process.run(engine_jobs.train, changes(0), 2)[0].state
    results = gloo_pool.run(engine_jobs.train, changes(2), STEPS - 2, state)[0]
    assert losses_of(results) == pytest.approx(losses_of(runs(2, 1))[2:], rel=1e-6)


@pytest.fixture(scope="module", params=[3, 4])
def larger_pool(request):
    """Three and four processes."""
    pool = GlooPool(request.param)
    yield pool
    pool.close()


WORLDS = {"training__global_batch": 24, "training__micro_batch": 12, "objectives__matching__pool": 2}
"""A batch that divides by 1, 2, 3 and 4."""


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def checkpoint(request, gloo_pool, tmp_path_factory):
    """A checkpoint written by two ranks at ZeRO 2, the digest of every tensor it was made from, and the two steps after it."""
    folder = tmp_path_factory.mktemp("saved") / "step-00000002"
    results = gloo_pool.run(engine_jobs.save, changes(2, request.param, **WORLDS), 2, folder)[0]
    gone_on = gloo_pool.run(engine_jobs.resume, changes(2, request.param, **WORLDS), folder, 2)[0]
    return request.param, folder, results, losses_of(gone_on)


def test_a_checkpoint_of_two_ranks_loads_on_three_and_four(checkpoint, larger_pool):
    """At every stage, every tensor by its digest, on every rank; and the run goes on as on two."""
    precision, folder, digests, after = checkpoint
    for stage in STAGES:
        for results in larger_pool.run(engine_jobs.resume, changes(stage, precision, **WORLDS), folder, 2):
            assert engine_jobs.digests(results.loaded) == digests
        assert losses_of(results) == pytest.approx(after, rel=1e-5 if precision == "fp32" else 2e-2)


def test_starting_potentials_of_plans_are_in_the_checkpoint(lone_process, tmp_path):
    warm = changes(1, transport__warm_start=True, **WORLDS)
    whole, cold = (
        losses_of(lone_process.run(engine_jobs.train, recipe, 4)[0]) for recipe in (warm, changes(1, **WORLDS))
    )
    digests = lone_process.run(engine_jobs.save, warm, 2, tmp_path / "step-00000002")[0]
    (results,) = lone_process.run(engine_jobs.resume, warm, tmp_path / "step-00000002", 2)
    assert engine_jobs.digests(results.loaded) == digests and "transport.potentials" in digests
    assert losses_of(results) == whole[2:] != cold[2:]


def test_a_checkpoint_of_two_ranks_loads_on_one(checkpoint, lone_process):
    precision, folder, digests, after = checkpoint
    for stage in STAGES:
        (results,) = lone_process.run(engine_jobs.resume, changes(stage, precision, **WORLDS), folder, 2)
        assert engine_jobs.digests(results.loaded) == digests
        assert losses_of(results) == pytest.approx(after, rel=1e-5 if precision == "fp32" else 2e-2)


def test_digests_detect_a_tensor_that_was_reset(checkpoint, lone_process):
    precision, folder, digests, _ = checkpoint
    fresh = lone_process.run(engine_jobs.train, changes(1, precision, **WORLDS), 0)[0].state
    results = engine_jobs.digests(fresh)
    assert results.keys() == digests.keys() and len(results) > 100
    assert {"teacher.image_projection.weight", "queue.counters", "moments.exp_avg.codebook", "masters.codebook"} <= {
        name for name in results if results[name] != digests[name]
    }


def test_a_state_of_another_model_is_refused_by_name(lone_process, saved):
    assert lone_process.run(engine_jobs.load_a_misfit, saved["fp32"]) == [
        (
            "the checkpoint and the recipe's model have different parameters, first codebook; use the checkpoint's recipe",
            "codebook is (15, 16) in the checkpoint and (16, 16) in the recipe; use the checkpoint's recipe",
        )
    ]
