"""The rank that the others wait for is named when it begins to fall behind, and every rank's figures are written down."""

from __future__ import annotations

import pytest

from runtime import straggler as stragglers
from runtime.files import read_json
from runtime.ranks import Ranks
from runtime.straggler import StragglerWatch


@pytest.fixture
def gathered(monkeypatch):
    """Own work in seconds of ranks 1 and 2, which the gather adds to this rank's row; all steps take 2 s."""
    own_work = [0.5, 0.5]

    def gather(row):
        return [row, *((0.1, seconds, 2.0, f"node-{rank}") for rank, seconds in enumerate(own_work, 1))]

    monkeypatch.setattr(stragglers, "gather_values", gather)
    return own_work


def report(watch, step: int, folder) -> dict[str, float]:
    """Report two steps: own work 0.4 and 0.6 s, 0.2 s of data wait, 2 s in all."""
    watch.add(0.2, 0.4, 2.0)
    watch.add(0.2, 0.6, 2.0)
    return watch.report(step, folder)


def test_figures_are_means_over_the_steps_since_the_last_report(gathered, tmp_path):
    watch = StragglerWatch(Ranks(0, 3))
    for step in (2, 4):
        figures = report(watch, step, tmp_path)
        assert figures == pytest.approx(
            {
                "step_seconds": 2.0,
                "data_wait": (0.2 + 0.1 + 0.1) / 3 / 2.0,
                "own_work_slowest": 0.5,
                "own_work_median": 0.5,
                "slowest_rank": 0.0,
            }
        )


def test_a_rank_that_falls_behind_is_named_once(gathered, tmp_path, capsys):
    watch = StragglerWatch(Ranks(0, 3))
    report(watch, 2, tmp_path)
    assert capsys.readouterr().err == ""
    gathered[1] = 1.5
    assert report(watch, 4, tmp_path)["slowest_rank"] == 2.0
    assert capsys.readouterr().err == (
        "ligature: rank 2 (node-2) falls behind at step 4: 1.5 s of own work a step (0.1 s of it waiting for data) where the "
        "median rank has 0.5 s; all ranks wait 1 s (50%) of each step for it\n"
    )
    report(watch, 6, tmp_path)
    assert capsys.readouterr().err == ""
    gathered[1] = 0.5  # it catches up and falls behind again: that is news
    report(watch, 8, tmp_path)
    gathered[1] = 1.5
    report(watch, 10, tmp_path)
    assert "falls behind at step 10" in capsys.readouterr().err


@pytest.mark.parametrize("usual", [0.5, 0.1])
def test_a_slightly_busier_rank_is_not_named(gathered, tmp_path, capsys, usual):
    gathered[:] = [usual, 1.45 * 0.5 if usual == 0.5 else 0.28]
    watch = StragglerWatch(Ranks(0, 3))
    watch.add(0.0, usual, 2.0)
    # 1.45 times the median is too little; nearly three times a small one is less than a tenth of the step beyond it.
    watch.report(2, tmp_path)
    assert capsys.readouterr().err == ""


def test_other_ranks_are_silent_and_write_nothing(gathered, tmp_path, capsys):
    gathered[1] = 1.5
    report(StragglerWatch(Ranks(1, 3)), 2, tmp_path)
    assert capsys.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_every_ranks_figures_are_written_now_and_then(gathered, tmp_path):
    watch = StragglerWatch(Ranks(0, 3))
    report(watch, 2, tmp_path)
    content = read_json(tmp_path / "ranks.json")
    assert content["step"] == 2 and [row["rank"] for row in content["ranks"]] == [0, 1, 2]
    assert content["ranks"][1] == {
        "rank": 1,
        "data_wait_seconds": 0.1,
        "own_work_seconds": 0.5,
        "step_seconds": 2.0,
        "host": "node-1",
    }
    report(watch, 4, tmp_path)
    assert read_json(tmp_path / "ranks.json")["step"] == 2  # not before WRITE_EVERY seconds are over


def test_a_folder_that_has_gone_is_not_made_again(gathered, tmp_path):
    report(StragglerWatch(Ranks(0, 3)), 2, tmp_path / "gone")
    assert not (tmp_path / "gone").exists()
