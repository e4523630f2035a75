"""The watchdog: a rank that died or hangs is named within the recipe's limit, and the others stop, saying what each was doing.

Without it the others wait in a collective, for as long as its timeout (30 minutes) or for ever. A thread of each rank writes a
beat to the store that the ranks met at: how often it has beaten, how many phases its main thread has entered, and which one it
is in. Rank 0 reads them all, the others read rank 0's alone, so that a thousand ranks cost a thousand small reads a beat.

died    no new beat for six beats
hung    beats, but its main thread entered no new phase for the limit; where all stand still, the ones that entered the fewest
        phases are those the others wait for
left    it stopped by an error of its own, and wrote down which
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

MISSED = 6
"""Beats that a rank may miss before it counts as dead."""
FAILURES = (
    "gloo",
    "nccl",
    "connection closed",
    "connection reset",
    "connection was",
    "broken pipe",
    "timed out",
    "socket",
)
"""What an error of torch.distributed says when another rank has gone."""

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OURS = tuple(
    os.path.join(_ROOT, floor)
    for floor in ("runtime", "data_tools", "retrieval", "training", "pretrain", "finetune", "launch", "tests")
)

_watches = 0


class Watchdog:
    """What this rank is doing, told to the others; made by `watch_ranks`."""

    def __init__(self, ranks: Ranks, limit: float, store: Any = None) -> None:
        self.ranks, self.limit = ranks, limit
        self.beat = min(5.0, limit / 20)
        self.own_work = 0.0
        """Seconds from the step's start until this rank first needed the others, of the step that is being taken or was last."""
        self._store = store
        self._phases, self._phase, self._step = 0, "starting", 0
        self._since = self._step_began = time.monotonic()
        self._beats = 0
        self._left = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._main = threading.main_thread().ident

    def enter_phase(self, phase: str, step: int) -> None:
        """The main thread enters a phase of a step. Every rank enters the same phases in the same order."""
        now = time.monotonic()
        if step != self._step:
            self._step_began = now
        self._phase, self._step, self._since = phase, step, now
        self._phases += 1

    def enter_collective(self) -> None:
        """The main thread is about to wait for the others: its own work of this step ends. Later calls in a step count nothing."""
        if self._phase == TOGETHER:
            return
        if _device_idle(self._step):
            self.own_work = time.monotonic() - self._step_began
        self.enter_phase(TOGETHER, self._step)

    def _watch(self) -> None:
        seen: dict[int, RankStatus] = {}
        watched = range(self.ranks.world) if self.ranks.first else (0, self.ranks.rank)
        while not self._stopped.wait(self.beat):
            try:
                self._tell()
                if self.ranks.world > 1 and not self.ranks.first and self._store.check(["verdict"]):
                    self._store.add("acknowledged", 1)
                    self._end("")  # rank 0 speaks for all
                told = self._store.multi_get([f"beat/{rank}" for rank in watched])
            except Exception as error:  # torch's store errors share no type of their own with its other ones
                if self._stopped.wait(2 * self.beat):
                    return
                self._end(
                    f"rank 0 is gone: the ranks' store does not answer ({_first_line(error)}); {self._own_words()}"
                )
                return
            now = time.monotonic()
            for rank, text in zip(watched, told, strict=True):
                seen.setdefault(rank, RankStatus(now)).update(json.loads(text), now)
            if verdict := diagnose(seen, self.ranks, self.limit, MISSED * self.beat, now):
                if self.ranks.first:
                    self._spread(verdict, len(seen))
                self._end(verdict)

    def _tell(self) -> None:
        self._beats += 1
        frame = _innermost(self._main)
        beat = {
            "beat": self._beats,
            "phases": self._phases,
            "doing": f"{self._phase}, step {self._step}" if self._step else self._phase,
            "for": round(time.monotonic() - self._since, 1),
            "at": frame,
            "host": platform.node(),
            "pid": os.getpid(),
            "left": self._left,
        }
        self._store.set(f"beat/{self.ranks.rank}", json.dumps(beat))

    def _own_words(self) -> str:
        return f"this rank {self.ranks.rank} was {self._phase}, step {self._step} ({_innermost(self._main)})"

    def _spread(self, verdict: str, ranks: int) -> None:
        """Tell the others before the store goes with this process; those that can, answer."""
        self._store.set("verdict", verdict)
        deadline = time.monotonic() + 3 * self.beat
        while time.monotonic() < deadline and self._store.add("acknowledged", 0) < ranks - 1:
            time.sleep(self.beat / 20)

    def _end(self, verdict: str) -> None:
        """Leave at once: the main thread may wait in a collective that nothing ends."""
        if self._stopped.is_set():
            return
        if verdict:
            os.write(2, f"ligature: {verdict}\n".encode())
        sys.stdout.flush()
        os._exit(RankLost.exit_code)

    def start(self) -> None:
        if self._store is None:
            global _watches
            _watches += 1  # every rank counts alike: nothing a former watch wrote is read
            self._store = rendezvous_store(f"watch-{_watches}")
        self._store.set_timeout(timedelta(seconds=max(1.0, MISSED * self.beat)))
        self._tell()
        barrier()  # from here on every rank's beat is there to be read
        self._thread.start()

    def stop(self) -> None:
        barrier()
        self._stopped.set()
        self._thread.join()

    def leave(self, error: BaseException) -> None:
        """This rank stops by an error: tell the others, who may be waiting for it. Where the error is that of a broken connection,
        wait first for the verdict on who broke it, which ends this process."""
        text = _first_line(error)
        if not isinstance(error, LigatureError) and any(word in text.lower() for word in FAILURES):
            self._thread.join((MISSED + 6) * self.beat)
        self._stopped.set()
        self._thread.join()
        if self.ranks.world == 1:
            return
        self._left = text if isinstance(error, LigatureError) else f"{type(error).__name__}: {text}"
        try:
            self._tell()
            count = self._store.add("left", 1)
            if not self.ranks.first:
                return
            # The store goes with this process: those that leave by the same error get time to, the others are told.
            deadline = time.monotonic() + 2 * self.beat
            while count < self.ranks.world and time.monotonic() < deadline:
                time.sleep(self.beat / 20)
                count = self._store.add("left", 0)
            if count < self.ranks.world:
                self._spread("rank 0 left", self.ranks.world - count + 1)
        except Exception as lost:  # the store is with rank 0, which has gone before us; our own error counts
            print(f"ligature: rank 0 cannot be told ({_first_line(lost)})", file=sys.stderr)


TOGETHER = "computing with the others"


class RankStatus:
    """When a rank's beats and phases were last seen to change, by the watching rank's own clock."""

    def __init__(self, now: float) -> None:
        self.beat: dict[str, Any] = {"beat": -1, "phases": -1, "left": ""}
        self.beaten = self.moved = now

    def update(self, beat: dict[str, Any], now: float) -> None:
        if beat["beat"] != self.beat["beat"]:
            self.beaten = now
        if beat["phases"] != self.beat["phases"]:
            self.moved = now
        self.beat = beat


def diagnose(seen: dict[int, RankStatus], ranks: Ranks, limit: float, missing: float, now: float) -> str:
    """The line that names who is to blame and what the others were doing; empty while all is well."""
    gone = [rank for rank, one in seen.items() if now - one.beaten > missing and not one.beat["left"]]
    # One that left said why itself; the others may be leaving too, so they are given a little time.
    left = [
        rank for rank, one in seen.items() if one.beat["left"] and now - one.moved > missing / 2 and rank not in gone
    ]
    if left:
        blamed, fault = left, f"stopped ({seen[left[0]].beat['left']})"
    elif gone:
        blamed, fault = (
            gone,
            f"died or lost its network: nothing heard for {now - min(seen[r].beaten for r in gone):.0f} s",
        )
    else:
        if len(seen) < ranks.world or any(now - one.moved <= limit for one in seen.values()):
            return ""
        least = min(one.beat["phases"] for one in seen.values())
        blamed = [rank for rank, one in seen.items() if one.beat["phases"] == least]
        fault = f"hangs: no progress for {now - max(seen[r].moved for r in blamed):.0f} s"
    if len(blamed) == ranks.world and ranks.world > 1:
        return f"no rank makes progress: {_words(seen, list(seen))}; a collective hangs, look at the network"
    others = [rank for rank in seen if rank not in blamed]
    return (
        f"{_names(blamed, seen)} {fault}; it was {_words(seen, blamed)}"
        + (f". The others: {_words(seen, others)}" if others else "")
        + ". Stopping; start the run again to go on from its last checkpoint"
    )


def _names(blamed: list[int], seen: dict[int, RankStatus]) -> str:
    shown = ", ".join(
        f"{rank} ({seen[rank].beat.get('host', '?')}, pid {seen[rank].beat.get('pid', '?')})" for rank in blamed[:8]
    )
    return f"rank{'s' * (len(blamed) > 1)} {shown}" + (f" and {len(blamed) - 8} more" if len(blamed) > 8 else "")


def _words(seen: dict[int, RankStatus], some: list[int]) -> str:
    """What ranks were doing, those that did the same in one clause."""
    groups: dict[str, list[int]] = {}
    for rank in some:
        beat = seen[rank].beat
        groups.setdefault(f"{beat.get('doing', '?')} ({beat.get('at', '?')})", []).append(rank)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"rank{'s' * (len(own) > 1)} {_spans(own)} {words}" for words, own in groups.items())


def _spans(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> `0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)


def _innermost(thread: int | None) -> str:
    """`task.py:103 prepare`: where the main thread stands in our own code."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        folder, name = os.path.split(frame.f_code.co_filename)
        if folder.startswith(OURS) and name != "watchdog.py":
            return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside our code"


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split())[:300]


def _device_idle(step: int) -> bool:
    """Whether the clock tells of this rank's work: on a GPU the host runs ahead, and waits for it in one step of ten only."""
    import torch

    if torch.cuda.is_initialized():
        if step % 10:
            return False
        torch.cuda.synchronize()
    return True


@contextmanager
def watch_ranks(ranks: Ranks, limit: float) -> Iterator[Watchdog]:
    """Watch all ranks while the block runs. limit: seconds without progress. When one is lost this process ends with
    `RankLost.exit_code`, whatever its main thread waits for; an error of the block's own is told to the other ranks."""
    watchdog = Watchdog(ranks, limit)
    watchdog.start()
    try:
        yield watchdog
    except BaseException as error:
        watchdog.leave(error)
        raise
    watchdog.stop()
