"""The watchdog names a rank that died or hangs within the recipe's limit, and stops the others with what each was doing.

Without it the other ranks wait in a collective until its timeout (30 minutes) or for ever. A thread on each rank writes a beat
to the store through which the ranks joined. A beat holds the number of beats so far, the number of phases that the main thread
has entered, and the phase it is in. Rank 0 reads every rank's beats and the others read rank 0's alone. So a thousand ranks
cost a thousand small reads per beat.

A rank is lost in one of three ways:

dead    it has sent no new beat for `MISSED_BEATS` beats
hung    it beats, but its main thread has entered no new phase for the limit. Where every rank stands still, the others wait
        for the ranks that have entered the fewest phases
failed  it stopped because of an error of its own, and its last beat says which
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from runtime.errors import LigatureError, RankLost
from runtime.ranks import Ranks, barrier, rendezvous_store

MISSED_BEATS = 6
"""Beats that a rank may miss before it counts as dead."""
CONNECTION_WORDS = (
    "gloo",
    "nccl",
    "connection closed",
    "connection reset",
    "connection was",
    "broken pipe",
    "timed out",
    "socket",
)
"""Words of the errors that torch.distributed raises when another rank has gone."""
TOGETHER = "computing with the others"
"""The phase in which a rank waits for the others in a collective."""

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OWN_FOLDERS = tuple(
    os.path.join(_ROOT, floor)
    for floor in ("runtime", "data_tools", "retrieval", "training", "pretrain", "finetune", "launch", "tests")
)
"""Folders of our own code. A rank's location in the verdict is its innermost frame in one of them."""

_watches = 0
"""Watches that this process has started."""


class Watchdog:
    """Publishes what this rank is doing, and ends this process when another rank is lost. `watch_ranks` makes it."""

    def __init__(self, ranks: Ranks, limit: float, store: Any = None) -> None:
        self.ranks, self.limit = ranks, limit
        self.beat_seconds = min(5.0, limit / 20)
        self.own_work = 0.0
        """Seconds from a step's start until this rank first waited for the others, of the current step or else the last one."""
        self._store = store
        self._phases, self._phase, self._step = 0, "starting", 0
        self._step_start = time.monotonic()
        self._beats = 0
        self._error = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._main = threading.main_thread().ident

    def enter_phase(self, phase: str, step: int) -> None:
        """Record that the main thread enters a phase of a step. Every rank enters the same phases in the same order."""
        if step != self._step:
            self._step_start = time.monotonic()
        self._phase, self._step = phase, step
        self._phases += 1

    def enter_collective(self) -> None:
        """Record that the main thread is about to wait for the others, which ends its own work of this step.

        Later calls within a step change nothing.
        """
        if self._phase == TOGETHER:
            return
        if _device_is_idle(self._step):
            self.own_work = time.monotonic() - self._step_start
        self.enter_phase(TOGETHER, self._step)

    def _watch(self) -> None:
        """Send beats and read those of other ranks until `stop`. Ends the process when a rank is lost."""
        statuses: dict[int, RankStatus] = {}
        watched = range(self.ranks.world) if self.ranks.first else (0, self.ranks.rank)
        while not self._stopped.wait(self.beat_seconds):
            try:
                self._send_beat()
                if self.ranks.world > 1 and not self.ranks.first and self._store.check(["verdict"]):
                    self._store.add("acknowledged", 1)
                    self._end_process("")  # rank 0 prints the verdict for all
                beats = self._store.multi_get([f"beat/{rank}" for rank in watched])
            except Exception as error:  # torch's store errors have no base class of their own
                # `stop` or `leave` may be ending the watch already. Then the missing store is no news.
                if self._stopped.wait(2 * self.beat_seconds):
                    return
                reason = f"the ranks' store does not answer ({_first_line(error)})"
                self._end_process(f"rank 0 is gone: {reason}; {self._describe_this_rank()}")
                return
            now = time.monotonic()
            for rank, text in zip(watched, beats, strict=True):
                statuses.setdefault(rank, RankStatus(now)).update(json.loads(text), now)
            verdict = diagnose(statuses, self.ranks, self.limit, MISSED_BEATS * self.beat_seconds, now)
            if verdict:
                if self.ranks.first:
                    self._publish_verdict(verdict, len(statuses))
                self._end_process(verdict)

    def _send_beat(self) -> None:
        self._beats += 1
        beat = {
            "beats": self._beats,
            "phases": self._phases,
            "activity": f"{self._phase}, step {self._step}" if self._step else self._phase,
            "location": _innermost_frame(self._main),
            "host": platform.node(),
            "pid": os.getpid(),
            "error": self._error,
        }
        self._store.set(f"beat/{self.ranks.rank}", json.dumps(beat))

    def _describe_this_rank(self) -> str:
        return f"this rank {self.ranks.rank} was {self._phase}, step {self._step} ({_innermost_frame(self._main)})"

    def _publish_verdict(self, verdict: str, ranks: int) -> None:
        """Write the verdict for the others, and wait until those that can have read it: the store ends with this process."""
        self._store.set("verdict", verdict)
        deadline = time.monotonic() + 3 * self.beat_seconds
        while time.monotonic() < deadline and self._store.add("acknowledged", 0) < ranks - 1:
            time.sleep(self.beat_seconds / 20)

    def _end_process(self, verdict: str) -> None:
        """End the process at once, because the main thread may wait in a collective that nothing else ends."""
        if self._stopped.is_set():
            return
        if verdict:
            os.write(2, f"ligature: {verdict}\n".encode())
        sys.stdout.flush()
        # sys.exit would end this thread alone.
        os._exit(RankLost.exit_code)

    def start(self) -> None:
        """Begin to watch. A collective: every rank calls it."""
        if self._store is None:
            global _watches
            _watches += 1  # every rank counts alike, so no watch reads the keys of an earlier one
            self._store = rendezvous_store(f"watch-{_watches}")
        # A store that is gone must be noticed about as soon as a rank that is silent.
        self._store.set_timeout(timedelta(seconds=max(1.0, MISSED_BEATS * self.beat_seconds)))
        self._send_beat()
        barrier()  # after it every rank's first beat is in the store
        self._thread.start()

    def stop(self) -> None:
        """End the watch after an orderly end of the work. A collective: every rank calls it."""
        # The store ends with rank 0. If rank 0 went ahead, the others would take its end for a fault.
        barrier()
        self._stopped.set()
        self._thread.join()

    def leave(self, error: BaseException) -> None:
        """Tell the other ranks, which may be waiting for this one, that it stops because of an error.

        A broken connection is usually another rank's fault. The watching thread then gets time to find out whose, and ends
        this process with that verdict.
        """
        text = _first_line(error)
        if not isinstance(error, LigatureError) and any(word in text.lower() for word in CONNECTION_WORDS):
            self._thread.join((MISSED_BEATS + 6) * self.beat_seconds)
        self._stopped.set()
        self._thread.join()
        if self.ranks.world == 1:
            return
        self._error = text if isinstance(error, LigatureError) else f"{type(error).__name__}: {text}"
        try:
            self._send_beat()
            count = self._store.add("left", 1)
            if not self.ranks.first:
                return
            # The store ends with this process. Ranks that leave because of the same error get time to do so. Then the rest are told.
            deadline = time.monotonic() + 2 * self.beat_seconds
            while count < self.ranks.world and time.monotonic() < deadline:
                time.sleep(self.beat_seconds / 20)
                count = self._store.add("left", 0)
            if count < self.ranks.world:
                self._publish_verdict("rank 0 left", self.ranks.world - count + 1)
        except Exception as store_error:  # rank 0 and the store have gone before us; our own error is what counts
            print(f"ligature: cannot tell rank 0 of this error ({_first_line(store_error)})", file=sys.stderr)


class RankStatus:
    """A rank's latest beat, and when its beats and phases last changed by the clock of the rank that watches."""

    def __init__(self, now: float) -> None:
        self.beat: dict[str, Any] = {"beats": -1, "phases": -1, "error": ""}
        self.last_beat = self.last_phase = now

    def update(self, beat: dict[str, Any], now: float) -> None:
        """Record the beat that the store holds at `now`, in seconds."""
        if beat["beats"] != self.beat["beats"]:
            self.last_beat = now
        if beat["phases"] != self.beat["phases"]:
            self.last_phase = now
        self.beat = beat


def diagnose(statuses: dict[int, RankStatus], ranks: Ranks, limit: float, dead_after: float, now: float) -> str:
    """Return one line that names the ranks to blame and what the others were doing, or an empty text while all is well.

    Args:
        statuses: by rank; all ranks on rank 0, and two of them elsewhere.
        ranks: this process among the ranks.
        limit: seconds without a new phase after which a rank counts as hung.
        dead_after: seconds without a beat after which a rank counts as dead.
        now: seconds, by the clock of the statuses.
    """
    dead = [
        rank for rank, status in statuses.items() if now - status.last_beat > dead_after and not status.beat["error"]
    ]
    # A failed rank printed its own error. The others may be failing by the same one, so they get a little time.
    failed = [
        rank
        for rank, status in statuses.items()
        if status.beat["error"] and now - status.last_phase > dead_after / 2 and rank not in dead
    ]
    if failed:
        blamed, fault = failed, f"stopped ({statuses[failed[0]].beat['error']})"
    elif dead:
        silence = now - min(statuses[rank].last_beat for rank in dead)
        blamed, fault = dead, f"died or lost its network: nothing heard for {silence:.0f} s"
    else:
        # Only rank 0 sees all ranks, and while one of them still moves, the others just wait for it.
        if len(statuses) < ranks.world or any(now - status.last_phase <= limit for status in statuses.values()):
            return ""
        fewest = min(status.beat["phases"] for status in statuses.values())
        blamed = [rank for rank, status in statuses.items() if status.beat["phases"] == fewest]
        standstill = now - max(statuses[rank].last_phase for rank in blamed)
        fault = f"hangs: no progress for {standstill:.0f} s"
    if len(blamed) == ranks.world and ranks.world > 1:
        activities = _format_activities(statuses, list(statuses))
        return f"no rank makes progress: {activities}; a collective hangs, look at the network"
    others = [rank for rank in statuses if rank not in blamed]
    return (
        f"{_format_names(blamed, statuses)} {fault}; it was {_format_activities(statuses, blamed)}"
        + (f". The others: {_format_activities(statuses, others)}" if others else "")
        + ". Stopping; start the run again to go on from its last checkpoint"
    )


def _format_names(ranks: list[int], statuses: dict[int, RankStatus]) -> str:
    """Return the ranks with their hosts and process ids, eight of them at most."""
    names = ", ".join(
        f"{rank} ({statuses[rank].beat.get('host', '?')}, pid {statuses[rank].beat.get('pid', '?')})"
        for rank in ranks[:8]
    )
    return f"rank{'s' * (len(ranks) > 1)} {names}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _format_activities(statuses: dict[int, RankStatus], ranks: list[int]) -> str:
    """Return what these ranks were doing, with one clause for all that did the same."""
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        beat = statuses[rank].beat
        groups.setdefault(f"{beat.get('activity', '?')} ({beat.get('location', '?')})", []).append(rank)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(
        f"rank{'s' * (len(members) > 1)} {_format_spans(members)} {activity}" for activity, members in groups.items()
    )


def _format_spans(ranks: list[int]) -> str:
    """Return ranks with consecutive ones joined: [0, 1, 2, 5] as `0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)


def _innermost_frame(thread: int | None) -> str:
    """Return the innermost frame of a thread in our own code, as `task.py:103 prepare`."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        folder, name = os.path.split(frame.f_code.co_filename)
        if folder.startswith(OWN_FOLDERS) and name != "watchdog.py":
            return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside our code"


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split())[:300]


def _device_is_idle(step: int) -> bool:
    """Return whether the device has finished, so that the clock measures this rank's work. False in nine of ten GPU steps.

    The host runs ahead of the GPU, so the clock is right only after the host has waited for it. Waiting costs time.
    """
    import torch

    if torch.cuda.is_initialized():
        if step % 10:
            return False
        torch.cuda.synchronize()
    return True


@contextmanager
def watch_ranks(ranks: Ranks, limit: float) -> Iterator[Watchdog]:
    """Watch all ranks while the block runs.

    When a rank is lost, this process ends with `RankLost.exit_code`, whatever its main thread waits for. When the block
    raises an error, the other ranks are told.

    Args:
        ranks: this process among the ranks.
        limit: seconds without progress after which a rank counts as hung.
    """
    watchdog = Watchdog(ranks, limit)
    watchdog.start()
    try:
        yield watchdog
    except BaseException as error:
        watchdog.leave(error)
        raise
    watchdog.stop()
