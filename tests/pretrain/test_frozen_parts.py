"""Rates by part and freezing under DeepSpeed: AdamW by its formula, at any ZeRO stage, in any world, and resumed to the bit."""

from __future__ import annotations

import engine_jobs
import pytest
import tiny
import torch
from adamw import Formula

from pretrain.model.parts import parameter_groups

STEPS, LR = 4, 1e-3
RATES = {
    "checkpoint": "elsewhere",
    "optimizer__rates": {"image": 0.1, "text": 0.5, "fusion": 1.0, "new": 2.0},
    "optimizer__layer_decay": 0.65,
    # A job's epoch is half its step: the text encoder learns from the second step, the image encoder from the third.
    "optimizer__freeze_until": {"image": 1.0, "text": 0.5},
}
WAITS = {"image_encoder.vit.": 2, "text_encoder.": 1}


def changes(stage: int, precision: str = "fp32", **more):
    return {"training__zero_stage": stage, "training__precision": precision, **RATES, **more}


def sleeping(name: str) -> int:
    """Steps that a parameter takes no part in."""
    return next((steps for start, steps in WAITS.items() if name.startswith(start)), 0)


@pytest.fixture(scope="module")
def alone(lone_process):
    """The run on one process without ZeRO."""
    return lone_process.run(engine_jobs.train, changes(0), STEPS, raw_gradients=True)[0]


def test_each_part_follows_adamws_formula_at_its_rate_from_its_step_on(alone):
    recipe = tiny.recipe(**changes(0))
    model = tiny.model(recipe)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(dict(model.named_parameters()), model.parts(), recipe.optimizer)
    assert len(groups) > 8
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            expected = Formula(parameter, group["weight_decay"])
            for step, gradients in enumerate(alone.gradients):
                assert (name in gradients) == (step >= sleeping(name)), f"{name} at step {step}"
                if name in gradients:
                    expected.step(gradients[name], LR * group["lr_share"])
            error = (alone.state.masters[name].double() - expected.weight).abs().max()
            assert error < 1e-6, f"{name}: {error}"
    assert alone.state.part_steps == {"image": STEPS - 2, "text": STEPS - 1}


def test_the_norm_counts_what_learns(alone):
    for norm, gradients in zip(alone.norms, alone.gradients, strict=True):
        assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(list(gradients.values()))), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_at_any_zero_stage_train_the_same_and_resume_to_the_bit(gloo_pool, alone, stage):
    half = gloo_pool.run(engine_jobs.train, changes(stage), 1, raw_gradients=True)[0]
    start = dict(tiny.model(tiny.recipe(**changes(stage))).named_parameters())
    for name, master in half.state.masters.items():
        moments = [half.state.moments[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")]
        if sleeping(name):
            assert torch.equal(master, start[name]) and not any(moment.any() for moment in moments), name
        else:
            assert any(moment.any() for moment in moments), name
    whole = gloo_pool.run(engine_jobs.train, changes(stage), STEPS)[0]
    assert [figures["loss"] for figures in whole.losses] == pytest.approx([f["loss"] for f in alone.losses], rel=1e-5)
    assert whole.norms == pytest.approx(alone.norms, rel=1e-5)
    assert whole.state.part_steps == alone.state.part_steps
    # Resumed while both parts sleep, and the state of another stage and world in the middle.
    resumed = gloo_pool.run(engine_jobs.train, changes(stage), STEPS - 1, half.state)[0]
    for part in ("masters", "moments", "teacher"):
        ours, theirs = getattr(resumed.state, part), getattr(whole.state, part)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part
    assert [figures["loss"] for figures in resumed.losses] == [figures["loss"] for figures in whole.losses[1:]]


@pytest.mark.parametrize(("stage", "more"), [(0, {}), (1, {}), (3, {}), (2, {"training__offload_optimizer": True})])
def test_bf16_and_offload_leave_a_sleeping_part_alone(lone_process, stage, more):
    results = lone_process.run(engine_jobs.train, changes(stage, "bf16", **more), 2)[0].state
    start = dict(tiny.model(tiny.recipe(**changes(stage))).named_parameters())
    asleep = [name for name in results.masters if sleeping(name) == 2]
    assert len(asleep) > 20 and all(torch.equal(results.masters[name], start[name]) for name in asleep)
    assert not any(results.moments[f"exp_avg.{name}"].any() for name in asleep)
    awake = [name for name in results.masters if sleeping(name) < 2 and not name.endswith(".bias")]
    moved = [name for name in awake if not torch.equal(results.masters[name], start[name])]
    assert len(moved) > len(awake) // 2 and "text_encoder.words.weight" in moved
    assert results.part_steps == {"image": 0, "text": 1}


@pytest.mark.parametrize("stage", [1, 3])
def test_encoders_frozen_for_the_whole_run_are_the_same_on_two_ranks(gloo_pool, lone_process, stage):
    frozen = {"checkpoint": "elsewhere", "model__image__frozen": True, "model__text__frozen": True}
    settings = {"training__zero_stage": stage, **frozen}
    ranks = gloo_pool.run(engine_jobs.train, settings, 3, raw_gradients=True)
    alone = lone_process.run(engine_jobs.train, settings | {"training__zero_stage": 0}, 3, raw_gradients=True)[0]
    start = dict(tiny.model(tiny.recipe(**settings)).named_parameters())
    for rank in ranks:
        assert [f["loss"] for f in rank.losses] == pytest.approx([f["loss"] for f in alone.losses], rel=1e-5)
        assert rank.norms == pytest.approx(alone.norms, rel=1e-5)
        assert len(rank.constants) > 40 and not rank.constants.keys() & rank.state.masters.keys()
        for name, constant in rank.constants.items():
            assert torch.equal(constant, start[name]) and torch.equal(rank.parameters[name], start[name]), name
        for name, weight in alone.state.masters.items():
            if not name.endswith("key_value.bias"):  # keys' biases have no gradient, and Adam steps by its rounding
                torch.testing.assert_close(rank.state.masters[name], weight, atol=1e-5, rtol=0)
