"""Which steps are sick, and what follows many of them. Whole runs are in tests/end_to_end/test_faults.py."""

from __future__ import annotations

import json
import math

import pytest
import sick_jobs

from runtime.errors import RecipeError, SickRun
from runtime.ranks import Ranks
from training.config import SickStepConfig
from training.sick_steps import SickSteps


def after(norms: list[float], **config) -> SickSteps:
    sick = SickSteps(SickStepConfig(window=8, **config))
    for norm in norms:
        assert sick.admits(1.0, norm)
    return sick


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_never_applied(bad):
    sick = after([])
    assert not sick.admits(bad, 1.0) and "loss" in sick.reason
    assert not sick.admits(1.0, bad) and "gradient" in sick.reason
    assert sick.skipped == sick.in_a_row == 2
    assert sick.admits(1.0, 1.0) and (sick.skipped, sick.in_a_row, sick.reason) == (2, 0, "")


def test_a_norm_is_judged_by_the_median_of_its_history_once_there_is_enough():
    assert after([1.0]).admits(1.0, 1e6), "one norm is no history"
    sick = after([1.0, 3.0, 2.0])
    assert sick.admits(1.0, 20.0) and not sick.admits(1.0, 26.0)  # the median is 2, then 2.5
    assert list(sick.norms) == [1.0, 3.0, 2.0, 20.0], "a sick norm is no part of the history"
    assert after([1.0] * 8, norm_factor=0.0).admits(1.0, 1e9)


def test_old_norms_leave_the_history():
    sick = after([1.0] * 8)
    for norm in (4.0, 9.0) * 4:
        sick.admits(1.0, norm)
    assert sick.admits(1.0, 60.0)


def test_lasting_large_gradients_at_no_higher_loss_become_normal():
    """A run that leaves its plateau: its norm rises within a few steps, and its loss does not."""
    sick = after([1.0] * 8, in_a_row=3)
    assert [sick.admits(loss, 20.0 + number) for number, loss in enumerate((0.9, 1.1, 1.0))] == [False, False, True]
    assert "22 is 22 times its usual 1 for 3 steps" in sick.steeper and not sick.exhausted
    assert sick.skipped == 2 and list(sick.norms) == [22.0] and list(sick.losses) == [1.0]
    assert all(sick.admits(1.0, 25.0) for _ in range(3)) and not sick.steeper
    assert not sick.admits(1.0, 260.0), "outliers of the new level are sick"


@pytest.mark.parametrize(
    "streak",
    [[(1.0, 20.0), (1.2, 20.0), (1.3, 20.0)], [(1.0, 20.0), (1.0, math.inf), (1.0, 20.0)], [(math.nan, 1.0)] * 3],
    ids=["the loss is higher", "one is not finite", "none is finite"],
)
def test_lasting_large_gradients_at_a_higher_loss_stay_sick(streak):
    sick = after([1.0] * 8, in_a_row=3)
    assert not any(sick.admits(*step) for step in streak) and sick.exhausted and not sick.steeper


def test_a_resumed_run_remembers_its_consecutive_sick_steps():
    whole = after([1.0] * 8, in_a_row=3)
    for step in [(1.0, 20.0), (1.0, 21.0)]:
        whole.admits(*step)
    other = SickSteps(whole.config)
    other.load(json.loads(json.dumps(whole.state_dict())))
    assert other.in_a_row == 2 and other.admits(1.0, 22.0) and other.steeper


def test_the_state_survives_json_and_gives_the_same_verdicts():
    sick = after([1.0, 3.0, 2.0])
    sick.admits(math.nan, 1.0)
    other = SickSteps(sick.config)
    other.load(json.loads(json.dumps(sick.state_dict())))
    assert other.state_dict() == sick.state_dict() and not other.admits(1.0, 26.0)


def test_a_run_goes_back_a_limited_number_of_times():
    sick = after([1.0] * 8, in_a_row=2, returns=1)
    for _ in range(2):
        sick.admits(math.nan, 1.0)
    assert sick.exhausted and sick.count_return(12, "log") == 10
    for _ in range(2):
        sick.admits(math.nan, 1.0)
    with pytest.raises(SickRun, match="did not help 1 times"):
        sick.count_return(14, "log")
    with pytest.raises(SickRun, match="up to step 2"):
        stopping = SickSteps(SickStepConfig(then="stop"))
        stopping.admits(math.nan, 1.0)
        stopping.count_return(2, "log")


def test_a_log_that_cannot_be_written_still_names_the_samples(tmp_path, capsys):
    sick = after([])
    sick.admits(math.nan, 1.0)
    sick.record(3, math.nan, ["k7", "k8"], Ranks(), tmp_path / "gone" / "sick_steps.jsonl")
    assert "k7, k8" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["window", "in_a_row", "returns"])
def test_a_recipe_with_a_zero_is_refused(key):
    with pytest.raises(RecipeError, match=key):
        SickStepConfig(**{key: 0})


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16")]
)
def test_a_refused_step_changes_nothing_and_leaves_the_next_undisturbed(gloo_pool, stage, precision):
    """After a NaN on one rank, and after a gradient refused for its size, both ranks keep weights, moments and Adam's count."""
    for result in gloo_pool.run(sick_jobs.refuse_and_go_on, stage, precision):
        assert result["asked"] == [(False, True), (True, True)], (
            "a NaN's norm is not finite; both refusals are asked for once"
        )
        assert result["applied"] == [True, False, False, True]
        assert result["unchanged"], "a refused step left a mark"
        assert result["as undisturbed"], "the step after it differs from an undisturbed run's"
