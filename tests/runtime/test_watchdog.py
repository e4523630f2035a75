"""A rank that dies, hangs or errs: the others stop in time, with a line that names it and says what each was doing."""

from __future__ import annotations

import pytest
import watchdog_jobs
from rank_processes import start_ranks

from runtime.ranks import Ranks
from runtime.watchdog import RankStatus, diagnose

LIMIT = 6.0
FAULTS = [
    ("killed", 1),
    ("killed", 0),
    ("hung", 1),
    ("hung", 0),
    ("stopped", 1),
    ("error", 1),
    ("error", 0),
    ("bug", 1),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Every scenario at once, for they mostly wait: (fault, culprit) -> exit codes and logs."""
    folder = tmp_path_factory.mktemp("watchdog")
    started = {
        (fault, culprit): start_ranks(
            folder / f"{fault}-{culprit}", 2, watchdog_jobs.step_with_a_fault, fault, culprit, LIMIT
        )
        for fault, culprit in FAULTS
    }
    started["absent", 1] = start_ranks(folder / "absent", 2, watchdog_jobs.only_come, 2.0)
    started["together", 0] = start_ranks(folder / "together", 2, watchdog_jobs.all_leave, LIMIT)
    outcomes = {}
    for case, ranks in started.items():
        if case[0] == "stopped":  # it can neither end nor be waited for
            ranks.processes[0].join(60)
            ranks.processes[1].kill()
        outcomes[case] = ranks.wait()
    return outcomes


@pytest.mark.parametrize(("fault", "culprit"), [case for case in FAULTS if case[0] in ("killed", "stopped")])
def test_a_dead_ranks_fellow_stops_with_its_name(ended, fault, culprit):
    codes, logs = ended[fault, culprit]
    assert codes[1 - culprit] == 76, logs
    verdict = logs[1 - culprit]
    assert f"rank {culprit}" in verdict and "computing with the others, step 3" in verdict, verdict
    assert "died or lost its network" in verdict or "does not answer" in verdict, verdict
    if culprit == 1:  # what it was last heard of doing: it may have died within its first beat
        assert "; it was " in verdict and "step 3 (watchdog_jobs.py" in verdict, verdict


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_hung_rank_is_distinguished_from_those_that_wait_for_it(ended, culprit):
    codes, logs = ended["hung", culprit]
    assert codes == [76, 76], logs
    verdict = logs[0]
    assert (
        f"rank {culprit} (" in verdict
        and "hangs: no progress for" in verdict
        and "it was reading data, step 3" in verdict
    )
    assert "The others: computing with the others, step 3" in verdict


@pytest.mark.parametrize(("fault", "culprit", "code"), [("error", 1, 1), ("error", 0, 1), ("bug", 1, 1)])
def test_a_rank_that_fails_prints_its_own_line_and_the_others_stop(ended, fault, culprit, code):
    codes, logs = ended[fault, culprit]
    assert codes[culprit] == code and codes[1 - culprit] == 76, logs
    assert ("shard-00007.tar is broken" if fault == "error" else "ZeroDivisionError") in logs[culprit]
    if culprit == 1:
        assert "rank 1 (" in logs[0] and (
            "shard-00007" in logs[0] if fault == "error" else "division by zero" in logs[0]
        )


def test_a_rank_that_never_joins_is_named(ended):
    codes, logs = ended["absent", 1]
    assert codes == [76, 0] and "of 2 ranks 1 did not come" in logs[0], logs


def test_ranks_that_stop_by_the_same_error_keep_its_code(ended):
    codes, logs = ended["together", 0]
    assert codes == [1, 1] and all("all is broken" in log for log in logs), logs


def test_of_a_thousand_ranks_those_that_entered_the_fewest_phases_are_named():
    statuses = {rank: RankStatus(0.0) for rank in range(1000)}
    for rank, status in statuses.items():
        late = rank in (17, 18, 700)
        beat = {"beats": 1, "phases": 40 - late, "error": "", "host": "n", "pid": rank, "location": "x.py:1 f"}
        status.update(beat | {"activity": "reading data, step 9" if late else "computing with the others, step 9"}, 0.0)
        status.update(status.beat | {"beats": 2}, 99.0)
    assert diagnose(statuses, Ranks(0, 1000), 100.0, 30.0, 99.0) == ""
    verdict = diagnose(statuses, Ranks(0, 1000), 50.0, 30.0, 99.0)
    assert verdict.startswith("ranks 17 (n, pid 17), 18 (n, pid 18), 700 (n, pid 700) hangs: no progress for 99 s")
    assert "ranks" not in verdict.split("The others: ")[1] and "computing with the others, step 9 (x.py:1 f)" in verdict


def test_no_rank_is_blamed_where_all_are_in_the_same_phase():
    statuses = {rank: RankStatus(0.0) for rank in range(3)}
    for status in statuses.values():
        status.update(
            {"beats": 2, "phases": 4, "error": "", "activity": "computing with the others, step 9", "location": "a"},
            0.0,
        )
        status.last_beat = 99.0
    assert "a collective hangs" in diagnose(statuses, Ranks(0, 3), 50.0, 30.0, 99.0)
