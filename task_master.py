#!/usr/bin/env python3
"""Serve tasks to task_workers on this and other hosts, and collect the outcomes.

    reader --submit--> Ledger <--lease/report-- server threads  <==TCP==>  slots of task_worker.py
                         |
    sink   <--records----'

    submit            lease                report ok / last error
    ------> READY ----------------> LEASED ---------------------> DONE
              ^                       |
              '-- release, retry, ----'
                  connection lost

Nothing is lost: a task is READY, LEASED to one live connection, or DONE. It runs at least once and is recorded
exactly once. Its record is written before it is DONE, so that a master that was killed can be resumed.

    python3 task_master.py --workers 2
    python3 task_master.py --tasks tasks.jsonl --results results.jsonl --workers 4 --function mailer:send
"""
# Theory of operation.
#
# Every connection is served by a thread of its own (that is how BaseManager works), so the thread is the identity of
# the caller, and the end of the thread is the end of what it held. Hence
#  - a lease needs no clock and no number: when its connection ends, for whatever reason, `drop` makes its tasks READY;
#  - what remains is to notice that a peer is gone: the system's keepalive sees a vanished host, the limit on silence
#    a stopped process (a worker's slot sends a beat every 15 s, however long its task takes).
# A report is decided by the ledger, its records are written, the tasks are DONE, then it is answered: the answer is the
# acknowledgement. Meanwhile the master itself holds the tasks (RECORDER). One lock guards that, and nothing else waits
# for it, so a slow disk stops no lease and no beat. A worker that gets no answer reports again over its next connection;
# an outcome for a task that has a record is dropped. Hence at least once, and recorded once.
# Tasks and outcomes are JSON texts from end to end: the worker writes the members of a record that tell the outcome, the
# master adds those that it knows better. Batches cross as one text with a line for each, so a thousand tasks cost a
# thousand joins and splits, not a thousand messages. The protocol is a table at the top of task_worker.py.

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    if os.path.dirname(os.path.realpath(__file__)) in sys.path[:1]:
        del sys.path[0]  # a file there could stand in for a module of the standard library
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for a Ctrl-C before `main` can take it

import argparse
import array
import collections
import contextlib
import enum
import errno
import functools
import gc
import heapq
import importlib.util
import io
import itertools
import json
import pickle
import queue
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
import types
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import managers
from typing import Any, BinaryIO, Callable, NamedTuple

WORKER_FILE = os.path.join(os.path.dirname(os.path.realpath(__file__)), "task_worker.py")
if "task_worker" not in sys.modules:  # the one beside this file, wherever Python would look
    _spec = importlib.util.spec_from_file_location("task_worker", WORKER_FILE)
    if not (_spec and _spec.loader and os.path.exists(WORKER_FILE)):
        sys.stderr.write(f"task_master: task_worker.py is missing: copy it to {os.path.dirname(WORKER_FILE)}\n")
        raise SystemExit(2)
    sys.modules["task_worker"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["task_worker"])

# fmt: off
from task_worker import (  # noqa: E402, I001
    BEAT_INTERVAL, COUNT, DEFAULT_KEY_FILE, ERROR, FINAL, LOADING, PLAIN_WARNING, PROTOCOL, RESULT, SILENCE_LIMIT,
    TEXT_LIMIT, Failure, Parser, PlainConnection, add_connection_options, add_function_options, bounded, catch_signals, check_key,
    check_spec, check_template, describe_error, encode_json, encode_result, explain_error, format_error, format_outcome,
    is_loopback, make_tls_context, prepare_process, pack, parse_host, read_key, show_address, unpack, write_all, write_last_line,
)
# fmt: on

__all__ = ["Failure", "Record", "TaskMaster"]

READY_LIMIT = 50_000  # tasks that are READY; the reader waits while there are more
READY_BYTES = 64 << 20  # and characters of their text
LEASE_LIMIT = 10_000  # tasks that one connection may hold
LEASE_BYTES = 8 << 20  # characters of text in one lease, unless a single task has more
LEASE_PART = 16  # a slot gets at least a sixteenth of what it asked for
IDLE_POLLS = 25.0  # requests for tasks a second from all idle slots together, at most (but each may ask every second)
PLAIN_SIZE = 1000  # characters of an outcome, on average; larger ones are read faster as JSON
VALUE_LIMIT = 2_000_000  # strings and lists in an outcome, some 60 bytes of memory each while it is checked
OBJECT_LIMIT = 200_000  # values in a plain client's message
LARGE = 1 << 20  # bytes; larger messages are received one at a time
LARGE_LIMIT = 20.0  # seconds for each LARGE bytes of one
TOO_SLOW = "a large message came too slowly, or not to its end: return less, or write it to a file"
OTHER_KEY = "its key is another one: copy the key file of this host there (TASK_AUTHKEY comes first)"
PENDING_LIMIT = 256  # connections that have not finished the handshake; the oldest must give way
BACKLOG = 1024  # connections that the system holds for us; multiprocessing's 16 would lose those of many workers
GAP_LIMIT = 10_000_000  # ids without a record, in a row, that a results file may have
SYNC_INTERVAL = 0.7  # seconds that records may wait for their fsync; with LOOK_INTERVAL that is less than one
PROGRESS_INTERVAL = 30.0  # seconds between lines of progress where there is no terminal
HANGING = 5.0  # seconds that a task must run, and longer than all the rest should take, to be shown first
LOOK_INTERVAL = 0.2  # seconds between looks at signals and the clock
GOODBYE = 7.0  # seconds for the workers to hear that the job is over: a process may take 5 to leave before its slot asks
WORKER_GRACE = 10.0  # seconds for a worker that we have started to leave by itself
OUTPUT_GRACE = 5.0  # seconds for what it has printed to be read after its end
RESTARTS = 5  # of a local worker that ends without having reported anything
PACK_LIMIT = 20 << 20  # bytes of the module or package of --function that go to a host
RETRY_PAUSE = 60.0  # seconds between attempts to reach a host, at most
CALLER_LIMIT = 50_000  # records that may wait for the caller of TaskMaster.run
DOUBT_AFTER = 10  # error outcomes in a row after which a worker gets one task at a time
FIRST_PAUSE, LAST_PAUSE = 0.25, 60.0  # seconds before such a worker's next task, doubled each time
OTHERS_TIME = 2.0  # seconds after the first worker came, while others may be on their way, and may do better
AVOID_TIME = 10.0  # seconds that a retry is left for another worker, whose processes may all be busy for hours
AVOID_LIMIT, AVOID_PAUSE = 1000, 0.1  # retries that one lease leaves for others, and seconds until a worker may ask again
KINDS_LIMIT = 1000  # kinds of failures that are told apart
KINDS_SHOWN = 10  # kinds of failures in the summary, and retries of each kind that are told


def refuse_constant(name: str) -> Any:
    """For JSON: NaN and the like are not part of it."""
    raise ValueError(f"{name} is not JSON")


def check_digits(text: str) -> int:
    """For JSON: an integer, if Python can read it (see sys.set_int_max_str_digits), as a small one."""
    if len(text) > 4300:
        raise ValueError(f"an integer of {len(text)} digits")
    return len(text)


# What json.loads calls, in a third of its time. The rough one reads numbers as small integers, of which Python keeps one each.
scan_strictly = json.JSONDecoder(parse_constant=refuse_constant).scan_once  # type: ignore[attr-defined]
scan_roughly = json.JSONDecoder(parse_constant=refuse_constant, parse_int=check_digits, parse_float=len).scan_once  # type: ignore[attr-defined]


class Console:
    """Standard output and error; on a terminal with a line of progress below, which goes before another line comes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks = {1: self._lock if os.isatty(1) else contextlib.nullcontext(), 2: self._lock}  # a pipe blocks nobody else
        self.is_terminal = os.isatty(2)
        self.blank = b""  # what clears the progress, while there is one

    def write(self, data: bytes, descriptor: int = 2) -> None:
        """Write whole lines, or only clear the progress. Raises OSError when standard output does not take them."""
        with self._locks[descriptor]:
            blank, self.blank = self.blank, b""
            if blank or descriptor == 2:
                with contextlib.suppress(OSError):
                    write_all(blank + data if descriptor == 2 else blank, 2)
            if descriptor == 1:
                write_all(data, 1)

    def show(self, parts: list[str]) -> None:
        """Progress on a terminal, the most important part first: as many as fit."""
        width = 80
        with contextlib.suppress(OSError):
            width = os.get_terminal_size(2).columns or 80
        width -= 3  # a column to spare, and two for the ^C that a terminal shows
        while len(", ".join(parts)) > width and len(parts) > 1:
            parts = parts[:-1]
        if len(parts[0]) > width:
            parts = [re.sub(r"^\[[#-]*\] +", "", parts[0])]  # without the bar
        text = re.sub(r"\s", " ", ", ".join(parts))  # a command may have several lines
        text = text if len(text) <= width else text[: width - 3] + "..."
        with self._lock, contextlib.suppress(OSError):
            write_all(("\r" + text.ljust(width)).encode("utf-8", "replace"), 2)
            self.blank = b"\r" + b" " * width + b"\r"


console = Console()


def say(text: str) -> None:
    """One line on standard error."""
    console.write(f"task_master: {text}\n".encode("utf-8", "replace"))


remove_controls = functools.partial(re.sub, r"[\x00-\x1f\x7f-\x9f]", " ")  # characters that a terminal obeys


# ---- ledger: every decision about a task ---------------------------------------------------------------------------

READY, LEASED, DONE = "ready", "leased", "done"
MOVES = {
    (READY, LEASED): "leased",
    (LEASED, READY): "released, to be retried, or its connection was lost",
    (LEASED, LEASED): "reported, or lost too often: the RECORDER holds it until it is written",
    (LEASED, DONE): "written",
}
RECORDER = "recorder"  # the holder of tasks whose records are being written


class Phase(enum.IntEnum):
    """Of a job. It only goes up, but another job may begin when one is OVER."""

    OPEN = 0  # there may be more tasks
    ENDED = 1  # there are no more to come; then OVER when all are DONE
    OVER = 2  # also before the first job
    DRAINING = 3  # nothing is leased any more; then CLOSED when nothing is LEASED
    CLOSED = 4
    FAILED = 5  # nothing can be recorded any more


class Task:
    """A task until it is DONE; its state is changed by `Ledger._move` alone."""

    __slots__ = ("attempts", "avoids", "holder", "id", "losses", "ok", "outcome", "state", "text")  # few: row `python`

    def __init__(self, task_id: int, text: str) -> None:
        self.id = task_id
        self.text = text  # JSON
        self.state = READY
        self.attempts = 0  # times that it was started, as far as the master knows
        self.losses = 0  # of those, the ones that ended with their connection
        self.holder: object = None  # who has leased it
        self.avoids: tuple[Standing | None, float] | None = None  # on whom it failed, and from when another one is to retry it
        self.ok = False  # whether the last attempt gave a result
        self.outcome = ""  # of the last attempt, as members of a record; the ledger does not look into it


class Standing:
    """How a worker has done: one that lacks a program or a mount fails at once, and eats the queue (HTCondor's black hole)."""

    def __init__(self, proven: bool = False) -> None:
        self.proven = proven  # whether it ever had a result
        self.recent: collections.deque[bool] = collections.deque(maxlen=DOUBT_AFTER)  # whether the last outcomes were ok
        self.failing = False  # whether nothing has worked of late
        self.pause = 0.0  # seconds before its next task, while it is in doubt
        self.resumes_at = 0.0  # when it may have the next one, if it is in doubt or has left retries for others

    def note(self, oks: list[bool]) -> None:
        """Take note of whether its last outcomes were ok, at most DOUBT_AFTER of them."""
        self.recent.extend(oks)
        self.proven = self.proven or any(oks)
        self.failing = len(self.recent) == DOUBT_AFTER and not any(self.recent)

    def is_good(self) -> bool:
        """Whether it has had results at least half of the time of late; also when it has not reported yet."""
        return 2 * sum(self.recent) >= len(self.recent)


Sink = Callable[["list[Task]", str], None]  # takes tasks that have their last outcome and the worker's name, to record them


class Outcomes(NamedTuple):
    """What running some tasks once gave, in columns: a tuple for each task would be one more to make (row `python`)."""

    ids: list[int]
    oks: list[bool]
    finals: list[bool]  # whether another run could not change it
    texts: list[str]  # members of records


class Ledger:
    """The state of every task and of the job: pure decisions under one lock, without I/O; `now` is in seconds, of any clock."""

    def __init__(self, retries: int = 0, redeliveries: int = 2, retry_delay: float = 0.0, others_time: float = 0.0) -> None:
        self._retries, self._redeliveries, self._retry_delay = retries, redeliveries, retry_delay
        self._others_time = others_time  # seconds after the first worker during which others may come
        self._lock = threading.RLock()  # a signal handler of the caller may call `close` while its thread holds this
        # Signals `wait_ready`: a task can be leased (once for each one that waits), or `lease` returns None from now on.
        self._leasable = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)  # signals `submit`: there is room for READY tasks, or no more are wanted
        self._over = threading.Condition(self._lock)  # signals `wait_over`, and `wait_ready` of a worker that pauses
        self._ready: collections.deque[Task] = collections.deque()  # in the order of leasing; some may not be READY any more
        self._delayed: list[tuple[float, int, Task]] = []  # a heap: when READY tasks may be retried
        self._ready_bytes = 0
        self._tasks: dict[int, Task] = {}  # all that are not DONE
        self._held: dict[object, dict[int, Task]] = {}  # by holder: any hashable object that stands for a connection
        self._recording = 0  # how many the RECORDER holds
        self._slots: dict[object, Standing] = {}  # by holder: its worker
        self._workers: dict[object, Standing] = {}
        self._others_until = 0.0  # when this time is over; 0: no worker has come
        self._gate_closed = False  # while whoever takes the records cannot take more
        self.phase = Phase.OVER
        self.reason: BaseException | None = None  # why the job ends early
        self.submitted = self.done = self.failed = self.retried = self.redelivered = 0

    def begin(self) -> None:
        """There will be tasks. Raises Failure when the last job is not over, or was ended early."""
        with self._lock:
            if self.phase != Phase.OVER:
                raise Failure("this TaskMaster was closed, or a run of it ended early: make another one")
            self.phase, self.reason = Phase.OPEN, None

    def end(self, phase: Phase, reason: BaseException | None = None) -> None:
        """Bring the job nearer to its end; the first reason counts."""
        with self._lock:
            self.reason = self.reason or reason
            self.phase = max(self.phase, phase)
            self._look_whether_over()
            self._leasable.notify_all()
            self._room.notify_all()

    def is_over(self) -> bool:
        """Whether nothing can change any more."""
        return self.phase in (Phase.OVER, Phase.CLOSED, Phase.FAILED)

    def wait_over(self, timeout: float | None) -> bool:
        """Block until nothing can change any more, for `timeout` seconds at most. Returns whether that is so."""
        with self._lock:
            return self._over.wait_for(self.is_over, timeout)

    def submit(self, tasks: Iterable[tuple[int, str]]) -> bool:
        """Add tasks as (id, JSON text), if they have one. Blocks while too many are READY. Returns False when none are wanted."""
        new = {task_id: Task(task_id, text) for task_id, text in tasks if text}
        with self._lock:
            while self.phase <= Phase.ENDED and not self._has_room():
                self._room.wait()
            if self.phase > Phase.ENDED:
                return False
            self.submitted += len(new)
            self._tasks.update(new)
            self._put_last([*new.values()])
            return True

    def submit_failed(self, task_id: int, text: str, outcome: str) -> Task:
        """Add a task that has failed before it could be leased. Returns it, to be recorded and then settled."""
        task = Task(task_id, text)
        task.outcome = outcome
        with self._lock:
            self.submitted += 1
            self._tasks[task_id] = task
            self._move([task], LEASED, RECORDER)
        return task

    def enlist(self, holder: object, worker: object, now: float) -> None:
        """Count a holder among the slots between which the READY tasks are divided, as one of a worker's, until it is dropped."""
        with self._lock:
            self._others_until = self._others_until or now + self._others_time
            self._slots[holder] = self._workers.setdefault(worker, Standing())

    def wait_ready(self, holder: object, timeout: float, now: float) -> bool:
        """Block until `lease` would return tasks or None, for `timeout` seconds at most. Returns whether it would."""
        with self._lock:
            standing = self._slots.get(holder)
            if standing and self._is_paused(holder, standing, now):
                # Not on `_leasable`: it would eat a signal for others. At most 1 s: `_over` is not told of a drain.
                pause = max(standing.resumes_at - now, len(self._slots) / IDLE_POLLS)
                return self._over.wait_for(lambda: self.phase > Phase.OVER, min(timeout, pause, 1.0))
            self._queue_due(now)
            due_in = self._delayed[0][0] - now if self._delayed else timeout
            timeout = min(timeout, due_in, max(1.0, len(self._slots) / IDLE_POLLS))
            return self._leasable.wait_for(lambda: self.phase > Phase.OVER or self._can_lease(), timeout)

    def lease(self, holder: object, limit: int, now: float) -> list[Task] | None:
        """Up to `limit` tasks for a holder, [] when there is none yet, None when the job is over. Never blocks."""
        with self._lock:
            if self.phase > Phase.OVER:
                return None
            standing = self._slots.get(holder) or Standing(proven=True)  # a plain client has none
            self._queue_due(now)
            if not self._ready or self._gate_closed or self._is_paused(holder, standing, now):
                self._wake_next()  # the signal was perhaps for a task that this holder must not have
                return []
            share = len(self._ready) // (len(self._slots) or 1)  # of what is READY, but not down to a few tasks a call
            limit = max(1, min(limit, max(share, limit // LEASE_PART)))
            doubtful = self.is_in_doubt(holder, now)
            asked = (1 if doubtful or not standing.proven else limit, len(self._held.get(holder, ())), standing, now)
            patience = LAST_PAUSE if standing.failing else AVOID_TIME
            lease = self._take(*asked, float("inf")) or self._take(*asked, patience)  # then what nobody else has taken in time
            self._move(lease, LEASED, holder)
            if doubtful and lease:
                standing.pause = min(LAST_PAUSE, 2 * standing.pause or FIRST_PAUSE)
                standing.resumes_at = now + standing.pause
            elif not doubtful:
                standing.pause = 0.0
            if not lease and self._ready:  # what is there is left for others
                standing.resumes_at = now + AVOID_PAUSE
            self._wake_next()
            return lease

    def release(self, holder: object, task_ids: Iterable[int]) -> None:
        """Take back tasks that the holder did not start, free of charge; those it does not hold are ignored."""
        with self._lock:
            held = self._held.get(holder, {})
            tasks = [held[task_id] for task_id in dict.fromkeys(task_ids) if task_id in held]
            self._move(tasks, READY)
            self._put_first(tasks)
            self._wake_next()

    def report(self, holder: object, outcomes: Outcomes, now: float) -> tuple[list[Task], list[Task]]:
        """Take outcomes. Returns tasks to record and then settle, and tasks to be retried. EOFError: nothing is recorded now."""
        last: list[Task] = []
        retried: list[Task] = []
        with self._lock:
            standing = self._slots.get(holder)
            if standing:
                standing.note(outcomes.oks[-DOUBT_AFTER:])
            if self.phase == Phase.FAILED or (self.phase == Phase.CLOSED and self._tasks):
                raise EOFError
            for task_id, ok, final, outcome in zip(*outcomes):
                task = self._tasks.get(task_id)
                if task is None or task.holder is RECORDER:
                    continue  # it has a record
                again = not ok and not final and task.attempts - task.losses < self._retries
                if task.holder is not holder and (again or (not ok and outcome == task.outcome)):
                    continue  # it runs again anyway; or this error was counted before, and the answer was lost
                task.ok, task.outcome = ok, outcome
                task.attempts += 1
                (retried if again else last).append(task)
            self._move(last, LEASED, RECORDER)
            if retried:
                self._move(retried, READY)
                self.retried += len(retried)
                for task in retried:
                    delay = self._retry_delay and self._retry_delay * 2 ** (task.attempts - task.losses - 1)
                    task.avoids = (standing, now + delay)
                    self._ready_bytes += len(task.text)
                    heapq.heappush(self._delayed, (now + delay, task.id, task))
                self._queue_due(now)
        return last, retried

    def settle(self, tasks: list[Task]) -> None:
        """The records of these tasks are written."""
        with self._lock:
            self._move(tasks, DONE)
            for task in tasks:
                del self._tasks[task.id]
                self.failed += not task.ok
            self.done += len(tasks)
            self._look_whether_over()

    def drop(self, holder: object) -> tuple[list[Task], list[Task]]:
        """A connection has ended. Returns its tasks, READY again, and those lost too often, to record as failed and settle."""
        with self._lock:
            lost = [*self._held.get(holder, {}).values()]
            for task in lost:
                task.losses += 1
                task.attempts += 1
            again = [task for task in lost if task.losses <= self._redeliveries]
            given_up = [task for task in lost if task.losses > self._redeliveries]
            self._move(given_up, LEASED, RECORDER)
            self._move(again, READY)
            self._put_last(again)  # since their worker may come again and again, and be the only one that is free
            self.redelivered += len(again)
            self._held.pop(holder, None)
            if self._slots.pop(holder, None):
                connected = {*self._slots.values()}
                self._workers = {worker: other for worker, other in self._workers.items() if other in connected}
        return again, given_up

    def is_in_doubt(self, holder: object, now: float) -> bool:
        """Whether a holder's worker fails while another one does not, or while others have had no time to come."""
        with self._lock:
            standing = self._slots.get(holder)
            if not standing or not standing.failing:
                return False
            others = [other for other in self._workers.values() if other is not standing]
            return any(map(Standing.is_good, others)) or (not others and not standing.proven and now < self._others_until)

    def close_gate(self, closed: bool) -> None:
        """Lease nothing while whoever takes the records cannot take more."""
        with self._lock:
            self._gate_closed = closed
            self._wake_next()

    def first_held(self) -> dict[object, int]:
        """By holder: the id of the task that it has leased first, of those that it holds."""
        with self._lock:
            return {holder: next(iter(held)) for holder, held in self._held.items() if held}

    def counts(self) -> dict[str, int]:
        """How many tasks are in each state."""
        with self._lock:
            leased = self._recording + sum(map(len, self._held.values()))
            return {READY: len(self._tasks) - leased, LEASED: leased, DONE: self.done}

    def audit(self) -> None:
        """Prove that no task is missing and none is counted twice. Raises AssertionError."""
        with self._lock:
            states = collections.Counter(task.state for task in self._tasks.values())
            held = [(task, holder) for holder, tasks in self._held.items() for task in tasks.values()]
            ready = [task for task in [*self._ready, *[task for _, _, task in self._delayed]] if task.state == READY]
            problems = {
                "submitted is not ready + leased + done": self.submitted - self.done - states[READY] - states[LEASED],
                "a ready task cannot be leased": len({task.id for task in ready}) - states[READY],
                "a task is queued twice": len(ready) - states[READY],
                "a leased task has no holder": len(held) + self._recording - states[LEASED],
                "a holder has a task that is not leased to it": len([1 for task, holder in held if task.holder != holder]),
            }
            found = [f"{problem} ({count})" for problem, count in problems.items() if count]
            if found:
                raise AssertionError("; ".join(found))

    # Called with the lock held

    def _move(self, tasks: list[Task], state: str, holder: object = None) -> None:
        """The one gate: all tasks move, or none. A task has a holder exactly while it is LEASED. Raises AssertionError."""
        if not tasks:
            return
        for old in {task.state for task in tasks}:
            if (old, state) not in MOVES:
                raise AssertionError(f"from {old} to {state}")  # a defect of this program: MOVES does not have it
        for task in tasks:
            if task.holder is not None and task.holder is not RECORDER:
                del self._held[task.holder][task.id]
            task.state, task.holder = state, holder
        if holder is RECORDER:
            self._recording += len(tasks)
        elif holder is not None:
            self._held.setdefault(holder, {}).update(zip([task.id for task in tasks], tasks))
        if state == DONE:
            self._recording -= len(tasks)
        if state == READY:
            self._look_whether_over()

    def _put_first(self, tasks: list[Task]) -> None:
        """Let READY tasks be leased before all others: behind them their failures would be seen late, by --max-failures too."""
        self._ready_bytes += sum([len(task.text) for task in tasks])
        self._ready.extendleft(reversed(tasks))

    def _put_last(self, tasks: list[Task]) -> None:
        """Let READY tasks be leased after all others."""
        self._ready_bytes += sum([len(task.text) for task in tasks])
        self._ready.extend(tasks)
        self._wake_next()  # also after a loss: the holder was perhaps woken for one, and has died

    def _queue_due(self, now: float) -> None:
        """Let the retries whose delay is over be leased."""
        due = []
        while self._delayed and self._delayed[0][0] <= now:
            due.append(heapq.heappop(self._delayed)[2])
        if due:
            self._ready.extendleft(reversed(due))  # their sizes have counted since they failed
            self._wake_next()

    def _wake_next(self) -> None:
        """Wake one that waits for tasks; it wakes the next if it leaves some. So a thousand do not wake for a few tasks."""
        if self._can_lease():
            self._leasable.notify()
        if self._has_room():
            self._room.notify_all()

    def _look_whether_over(self) -> None:
        if self.phase == Phase.ENDED and not self._tasks:
            self.phase = Phase.OVER
        if self.phase == Phase.DRAINING and not self._recording and not any(self._held.values()):
            self.phase = Phase.CLOSED
        if self.is_over():
            self._over.notify_all()

    def _has_room(self) -> bool:
        return len(self._ready) + len(self._delayed) < READY_LIMIT and self._ready_bytes < READY_BYTES

    def _can_lease(self) -> bool:
        """Whether there is a task, and it may be leased now."""
        while self._ready and self._ready[0].state != READY:
            self._ready_bytes -= len(self._ready.popleft().text)  # recorded after a late report
        return bool(self._ready) and not self._gate_closed

    def _is_paused(self, holder: object, standing: Standing, now: float) -> bool:
        """Whether a holder's worker has to wait before its next task; a pause that a doubt brought ends with the doubt."""
        return standing.resumes_at > now and (not standing.pause or self.is_in_doubt(holder, now))

    def _take(self, limit: int, held: int, standing: Standing, now: float, patience: float) -> list[Task]:
        """Up to `limit` of the tasks to lease next, while they are together small enough and need not be leased alone.

        What has failed on this worker is left for others that do not fail, if there are any, for `patience` seconds.
        """
        tasks: list[Task] = []
        left: list[Task] = []
        others = self.retried > 0 and any(other is not standing and not other.failing for other in self._workers.values())
        room, ready = LEASE_BYTES, self._ready
        limit = min(limit, LEASE_LIMIT // 2, LEASE_LIMIT - held)  # half: it leases anew before its report is read
        while ready and len(tasks) < limit and len(left) < AVOID_LIMIT:
            task = ready.popleft()
            self._ready_bytes -= len(task.text)
            if task.state != READY:  # recorded after a late report
                continue
            if others and task.avoids and task.avoids[0] is standing and now - task.avoids[1] < patience:
                left.append(task)
                continue
            room -= len(task.text)
            alone = task.losses or not self._redeliveries  # it was lost before, or must not be lost
            if tasks and (alone or room < 0):
                self._put_first([task])
                break
            tasks.append(task)
            if alone:
                break
        if left:
            (self._put_first if len(left) < AVOID_LIMIT // 5 else self._put_last)(left)  # many would be in the way
        return tasks


# ---- queues: what workers and plain clients can call ---------------------------------------------------------------


this_thread = threading.local()  # its `peer` is the one whose request it serves


class TaskQueue:
    """What `get_task_queue` gives a client."""

    exposed = ("join", "lease", "release", "beat", "get", "get_nowait", "qsize", "empty")

    def __init__(self, master: TaskMaster) -> None:
        self._master = master

    def join(self, protocol: str, statement: str = "{}") -> dict[str, Any]:
        """Make the caller a slot, which runs what `statement` says. In the answer `refused` tells why it gets no tasks, if so."""
        this_thread.peer.end_handshake(SILENCE_LIMIT)
        refused = self._master._welcome(this_thread.peer, int(protocol), json.loads(statement))
        return {"protocol": PROTOCOL, "run": self._master.run_id, "timeout": self._master.timeout, "refused": refused}

    def lease(self, limit: str, wait: str) -> str | None:
        """Lines `ID TEXT` of up to `limit` tasks; "" when there was none for `wait` seconds, None when the job is over."""
        if this_thread.peer.joined_at is None:
            raise ValueError("lease without join")
        tasks = self._lease(int(limit), float(wait))
        return None if tasks is None else "\n".join([f"{task.id} {task.text}" for task in tasks])

    def release(self, task_ids: str) -> None:
        """Hand back tasks that were not started; their ids are separated by blanks."""
        self._master.ledger.release(this_thread.peer, parse_ids(task_ids))

    def beat(self) -> str | None:
        """The caller lives: its connection has been heard of. Returns a text when the job is over."""
        return "over" if self._master.ledger.phase > Phase.OVER else None

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """One task's value, as of `queue.Queue.get`. Raises queue.Empty when there is none in time, or the job is over."""
        if len(this_thread.peer.taken) >= LEASE_LIMIT:
            raise ValueError(f"{LEASE_LIMIT} tasks taken: put a result for each")
        give_up_at = time.monotonic() + (0.0 if not block else 1e9 if timeout is None else timeout)
        while True:
            tasks = self._lease(1, max(0.0, min(1.0, give_up_at - time.monotonic())))
            if tasks:
                taken, value = (tasks[0].id, time.monotonic()), json.loads(tasks[0].text)
                try:
                    pickle.dumps(value)
                    this_thread.peer.taken.append(taken)
                    return value
                except RecursionError as error:
                    this_thread.peer.taken.appendleft(taken)
                    self._master._take_result(this_thread.peer, describe_error(error))
            elif tasks is None or time.monotonic() >= give_up_at:
                raise queue.Empty

    def get_nowait(self) -> Any:
        """One task's value. Raises queue.Empty when there is none now."""
        return self.get(False)

    def qsize(self) -> int:
        """How many tasks are READY."""
        return self._master.ledger.counts()[READY]

    def empty(self) -> bool:
        """Whether no task is READY."""
        return not self.qsize()

    def _lease(self, limit: int, wait: float) -> list[Task] | None:
        peer, ledger = this_thread.peer, self._master.ledger
        if wait > 0:
            ledger.wait_ready(peer, wait, time.monotonic())
        if peer.poll(0):  # its end: it waits for our answer, so it says nothing
            raise EOFError  # it died while it waited: a task given to it would count as lost
        peer.moved_at = time.monotonic()
        return ledger.lease(peer, limit, peer.moved_at)


class ResultQueue:
    """What `get_result_queue` gives a client."""

    exposed = ("report", "put")

    def __init__(self, master: TaskMaster) -> None:
        self._master = master

    def report(self, run_id: str, busy: str, outcomes: str) -> None:
        """Take the seconds spent, and a line of ids with a line for the outcome of each; returns when they are recorded."""
        if run_id == self._master.run_id:  # else they are of another master, and dropped
            self._master._report(this_thread.peer, parse_report(outcomes), float(busy))

    def put(self, result: Any) -> None:
        """The result of the oldest task that this connection took with `get`. Raises ValueError when there is none."""
        if not this_thread.peer.taken:
            raise ValueError("put without get: this connection holds no task")
        try:
            members = RESULT + encode_result(result)
        except (TypeError, ValueError, RecursionError) as error:
            members = describe_error(error)
        self._master._take_result(this_thread.peer, members)


# Outcomes, a line each, whose results are numbers, short words or strings without escapes: most are, and need no closer look.
match_plain_outcomes = re.compile(
    r'(?:"result": (?:-?(?:0|[1-9][0-9]{0,300})(?:\.[0-9]+)?|true|false|null|"[^"\\\x00-\x1f]*"), '
    r'"started_at": [0-9]{1,12}\.[0-9]{3}, "seconds": (?:0|[1-9][0-9]{0,9})\.[0-9]{6}(?:\n|\Z))+'
).fullmatch


def parse_ids(text: str) -> list[int]:
    """Ids that are separated by blanks. Raises ValueError, also for more than a connection may hold."""
    if text.count(" ") >= LEASE_LIMIT or "," in text:
        raise ValueError("too many ids, or commas")
    ids: list[int] = json.loads(f"[{text.replace(' ', ',')}]")  # in half the time of int(); other values are no task's id
    return ids


def parse_report(text: str) -> Outcomes:
    """The outcomes in a report, the last one for each id. Raises ValueError."""
    first, _, rest = text.partition("\n")
    ids = parse_ids(first)
    if rest.count("\n") + 1 != len(ids):
        raise ValueError("not as many outcomes as ids")
    texts = rest.split("\n")
    plain = len(rest) < PLAIN_SIZE * len(ids) and match_plain_outcomes(rest) and not rest.endswith("\n")
    if plain and len({*ids}) == len(ids):  # as nearly always
        return Outcomes(ids, [True] * len(ids), [False] * len(ids), texts)
    return Outcomes(*map(list, zip(*[(task_id, *check_outcome(text)) for task_id, text in dict(zip(ids, texts)).items()])))


def has_many_values(text: str) -> bool:
    """Whether a JSON text has more than VALUE_LIMIT strings, lists and objects."""
    if sum(map(text.count, '"[{')) <= VALUE_LIMIT:
        return False  # even with those in its strings
    # Empty its strings. (A pattern that knows escapes would take 100 bytes of memory a character.)
    text = re.sub('"[^"]*"', '""', text.replace("\\\\", "").replace('\\"', ""))
    return sum(map(text.count, '"[{')) > VALUE_LIMIT


def check_outcome(outcome: str, scan: Callable[..., Any] = scan_roughly) -> tuple[bool, bool, str]:
    """Whether an outcome is ok, whether it is final, and its text for the results file; an error for what `scan` cannot read."""
    try:
        if has_many_values(outcome):
            raise ValueError(f"it has more than {VALUE_LIMIT} strings, lists and objects: write it to a file")
        error = load_outcome(outcome, scan)[1]
    except ValueError as problem:
        return False, True, format_outcome(format_error("ValueError", f"what the worker sent cannot be read: {problem}"))
    final = bool(error and error.get("final"))
    return error is None, final, outcome.replace("\r", " ").replace(FINAL + "}", "}", final)  # once, if it is final


def load_outcome(outcome: str, scan: Callable[..., Any] = scan_strictly) -> tuple[Any, dict[str, Any] | None, Any, Any]:
    """The result, the error, `started_at` and `seconds`. Raises ValueError when it is no outcome."""
    try:
        members, end = scan("{" + outcome + "}", 0)
    except (StopIteration, RecursionError):
        raise ValueError("it is no JSON, or nested too deeply") from None
    if [*members][1:] != ["started_at", "seconds"] or end != len(outcome) + 2 or not outcome.startswith((RESULT, ERROR)):
        raise ValueError("it is no outcome")
    error, times = members.get("error"), (members["started_at"], members["seconds"])
    if any(type(value) not in (int, float, type(None)) for value in times) or ("error" in members) != isinstance(error, dict):
        raise ValueError("it has an error that is no object, or tells no time")
    return members.get("result"), error, *times


# ---- server --------------------------------------------------------------------------------------------------------


class Peer(PlainConnection):
    """A connection, which holds leases. A worker sends text (see task_worker.py), a plain client pickles; we answer alike."""

    def __init__(self, sock: socket.socket, address: tuple[Any, ...], large: threading.Lock) -> None:
        super().__init__(sock)
        self._large = large
        self.host = address[0] if address else ""  # a peer that has gone may have none; later as its name says
        self.name = ""  # what it calls itself, when the handshake is done
        self.joined_at: float | None = None  # as a slot
        self.moved_at = 0.0  # when it last leased or reported
        self.taken: collections.deque[tuple[int, float]] = collections.deque()  # by `get`: task id, time of taking
        self.expired: set[int] = set()  # of those, the tasks whose time limit is over
        self.problem = ""  # why its last message was refused
        self._pickles = False  # how the last request came
        self._has_turn = False  # whether it holds `_large`

    def recv(self) -> Any:
        """The next (id, method, args, kwds). Raises EOFError for what is not plain data, ValueError for what is no request."""
        data = self.recv_bytes()
        self._pickles = data[:1] == pickle.PROTO  # which begins no text
        try:
            request = load_plain(data) if self._pickles else read_call(data)
        except Exception as error:
            self.problem = f"it sent something that is not plain data ({type(error).__name__}: {error})"
            self.close()
            raise EOFError(self.problem) from None
        shape = [*map(type, request)] if isinstance(request, tuple) else []
        if shape not in ([str, str, tuple, dict], [type(None), str, tuple, dict]):  # the server looks things up by it
            raise ValueError("this is no request")
        if not hasattr(this_thread, "peer") and request[1] not in QueueServer.public:
            raise ValueError("there is no such function")  # the base class relies on an assert for that
        return request

    def send(self, answer: tuple[str, Any]) -> None:
        """Send (kind, value), the kind `#RETURN` or that of an error; to a worker as a text, as JSON, or as nothing."""
        self.end_turn()
        kind, value = answer
        if kind == "#TRACEBACK" and "AuthenticationError: " in value:  # of the handshake
            self.problem = OTHER_KEY
        if self._pickles:
            self.send_bytes(pickle.dumps(answer, 4))
        elif value is None or isinstance(value, str):
            self.send_bytes(pack(kind + " none") if value is None else pack(kind + " text", value))
        else:
            self.send_bytes(pack(kind + " json", json.dumps(value, default=repr)))

    def fill(self, size: int) -> None:
        """As for any connection; but large messages come one at a time, to keep memory small, and must not come slowly."""
        if size <= LARGE:
            super().fill(size)
            return
        self._has_turn = self._large.acquire()
        silence_limit = self.sock.gettimeout()
        for part in range(LARGE, size + LARGE, LARGE):
            self.deadline = time.monotonic() + LARGE_LIMIT
            try:
                super().fill(min(part, size))
            except EOFError:
                if time.monotonic() > self.deadline:
                    self.problem = TOO_SLOW
                raise
        self.end_handshake(silence_limit)

    def end_turn(self) -> None:
        """Let the next large message come; called with each answer, so before the next request, and at the end."""
        if self._has_turn:
            self._has_turn = False
            self._large.release()


def read_call(message: bytes) -> tuple[str, str, tuple[str, ...], dict[str, Any]]:
    """What a worker asks for, as BaseManager has it. Raises ValueError."""
    (name, method, *arguments), text = unpack(message)
    return name, method, (*arguments, text) if text else tuple(arguments), {}


# The plain clients' pickles: what they may hold.
PLAIN_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT SHORT_BINUNICODE BINUNICODE "
    "BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT SETITEM SETITEMS MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET"
).split()


class PlainUnpickler(pickle._Unpickler):  # a few bytes can make the one in C allocate gigabytes (CPython issue 115952)
    """Reads a pickle that holds nothing but plain data: no opcode that imports, calls or sets attributes is known."""

    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in PLAIN_OPCODES}

    def load_setitem(self) -> None:
        self.load_setitems([self.stack.pop(-2), self.stack.pop()])  # type: ignore[attr-defined]

    def load_setitems(self, items: list[Any] | None = None) -> None:
        items = self.pop_mark() if items is None else items  # type: ignore[attr-defined]
        if not all(isinstance(key, (str, bytes, int, float, type(None))) for key in items[::2]):
            raise pickle.UnpicklingError("a key is no scalar")  # to hash tuples nested deeply would overflow the stack
        self.stack[-1].update(zip(items[::2], items[1::2]))  # type: ignore[attr-defined]

    dispatch.update({pickle.SETITEMS[0]: load_setitems, pickle.SETITEM[0]: load_setitem})  # type: ignore[dict-item]


def load_plain(data: bytes) -> Any:
    """The plain data in a pickle. Raises whatever comes when it is something else, or more than OBJECT_LIMIT objects."""
    import pickletools

    if len(data) > OBJECT_LIMIT and any(count > OBJECT_LIMIT for count, _ in enumerate(pickletools.genops(data))):
        raise pickle.UnpicklingError("too many objects")  # each takes a byte at least, and many more in memory
    value = PlainUnpickler(io.BytesIO(data)).load()
    if count_objects(value) > OBJECT_LIMIT:
        raise pickle.UnpicklingError("too many objects, with those that it holds more than once")
    return value


def count_objects(value: Any) -> float:
    """How many objects JSON would have for a value, up to about OBJECT_LIMIT; 600 characters or digits count as one, too."""
    count, stack = 1.0, [value]
    while stack and count <= OBJECT_LIMIT:  # a list may stand in itself, or in another one many times
        item = stack.pop()
        if isinstance(item, (list, tuple, dict)):
            parts = [*item, *item.values()] if isinstance(item, dict) else item
            stack += parts
            count += len(parts)
        elif isinstance(item, (str, bytes)):
            count += len(item) / 600
        elif isinstance(item, int):
            count += item.bit_length() / 1800
    return count


# The base class wants something that has an address; QueueServer puts a socket in its place.
managers.listener_client["plain"] = (types.SimpleNamespace, None)  # type: ignore[attr-defined]


class QueueServer(managers.Server):
    """The server of BaseManager, with what a hostile or dying peer could use against it taken away."""

    public = ["dummy", "create", "accept_connection", "incref", "decref"]  # no shutdown, nothing to look around with
    fallback_mapping: dict[str, Any] = {}  # nor `#GETVALUE`, which would pickle the object itself

    def __init__(self, master: TaskMaster, registry: Any) -> None:
        super().__init__(registry, master.address, master.authkey, "plain")
        family, *_, bound = socket.getaddrinfo(*master.address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = master.address[0] == "::" and socket.has_dualstack_ipv6()
        self.listener = socket.create_server(bound[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)
        self.listener.settimeout(LOOK_INTERVAL)  # close does not wake a thread that accepts
        self.stop_event = threading.Event()
        self._master = master
        self._pending: dict[Peer, None] = {}  # in the handshake, oldest first
        # Held by the connection that receives or serves a large message. It is the server's own: a fork may leave it locked.
        self._large = threading.Lock()
        self._accepting = threading.Thread(target=self.accepter, daemon=True)
        self.start = self._accepting.start  # in this process, so that the queues need not be pickled for a child
        # They live as long as the server: the counts of BaseManager can reach 0 while another client connects.
        for typeid, (make, exposed, *_) in registry.items():
            self.id_to_obj[typeid] = (make(), set(exposed), {})

    def create(self, _conn: Any, typeid: str) -> tuple[str, tuple[str, ...]]:
        """The id and the methods of one of the queues."""
        return typeid, tuple(self.id_to_obj[typeid][1])

    def incref(self, _conn: Any, ident: str) -> None: ...

    def decref(self, _conn: Any, ident: str) -> None: ...

    def stop(self) -> None:
        """Close the port and every connection. Blocks until the port is free."""
        self.stop_event.set()
        with contextlib.suppress(OSError):  # where the system can do that, it wakes a thread that accepts
            self.listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()  # it holds the socket while it accepts
        self.listener.close()
        for conn in [*self._pending, *self._master.peers]:
            conn.cut()

    def accepter(self) -> None:
        while not self.stop_event.is_set():
            try:
                conn = Peer(*self.listener.accept(), self._large)
            except OSError as error:
                if not isinstance(error, socket.timeout):  # out of file descriptors, say
                    self.stop_event.wait(LOOK_INTERVAL)
                continue
            self._pending[conn] = None
            for oldest in [*self._pending][:-PENDING_LIMIT]:
                self._pending.pop(oldest, None)
                oldest.cut()
            try:
                threading.Thread(target=self.handle_request, args=(conn,), daemon=True).start()
            except RuntimeError:  # out of threads
                self._forget(conn)

    def handle_request(self, conn: Any) -> None:
        """Serve a connection to its end, in a thread of its own; then the master's `goodbye` or `refuse` is called."""
        try:
            if self._master.context:
                conn.secure(self._master.context, server_side=True)
            super().handle_request(conn)
        except (SystemExit, EOFError):
            pass
        except OSError as error:
            reason = str(getattr(error, "reason", None) or "")  # of TLS, if the peer is at fault and not the network
            if reason in ("HTTP_REQUEST", "WRONG_VERSION_NUMBER", "UNEXPECTED_MESSAGE", "RECORD_LAYER_FAILURE"):
                conn.problem = "it does not speak TLS: start it with --tls, or both with --no-tls"
            elif "BINDER" in reason or "DECRYPT" in reason:
                conn.problem = OTHER_KEY
        finally:
            conn.end_turn()
            self._forget(conn)
            if hasattr(this_thread, "peer"):
                self._master._goodbye(this_thread.peer)
            elif conn.problem:
                self._master._refuse(conn.host, conn.problem)

    def accept_connection(self, conn: Any, name: str) -> None:
        """The handshake is done, and the peer stays: `name` is what it calls itself."""
        name = re.sub(r"[^!-~]|[\"\\]", "?", str(name)[:100])  # it goes into records and onto terminals
        conn.name = name if "/" in name else f"{conn.host}/{name}"
        conn.host = conn.name.rpartition("/")[0]
        this_thread.peer = conn
        self._master.peers.add(conn)
        self._pending.pop(conn, None)
        conn.end_handshake(None)  # a plain client may be silent while it works; only the system's keepalive watches it
        conn.send(("#RETURN", self._master.run_id))
        self.serve_client(conn)

    def _forget(self, conn: Peer) -> None:
        self._pending.pop(conn, None)
        conn.close()


def make_server(master: TaskMaster) -> QueueServer:
    """Bind the port. Raises Failure when that cannot be."""

    class QueueManager(managers.BaseManager):
        """The tutorial's manager: a class for each master, since each registers its own two queues."""

    QueueManager.register("get_task_queue", lambda: TaskQueue(master), exposed=TaskQueue.exposed)
    QueueManager.register("get_result_queue", lambda: ResultQueue(master), exposed=ResultQueue.exposed)
    try:
        return QueueServer(master, QueueManager._registry)  # type: ignore[attr-defined]
    except OSError as error:
        hint = "is --host one of this machine?"
        if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
            error.strerror = os.strerror(error.errno)  # without what Python adds
        if error.errno == errno.EADDRINUSE:
            hint = "stop what listens there, on macOS perhaps AirPlay Receiver, or choose another --port"
        raise Failure(f"cannot listen on {show_address(master.address)}: {explain_error(error)} ({hint})", 3) from None


# ---- input ---------------------------------------------------------------------------------------------------------


class BadTask(list[str]):
    """A batch of one task that cannot be one: its line as a JSON string, and what is wrong with it."""

    def __init__(self, text: str, problem: str) -> None:
        super().__init__([text])
        self.problem = problem


def check_json(text: str) -> str:
    """The JSON text of one value, on one line and without the white space around it. Raises ValueError when it is none."""
    text = text.strip(" \t\r\n")
    try:
        json.loads(text, parse_constant=refuse_constant)
        text.encode()
    except json.JSONDecodeError as error:
        shown = " ".join(text.split())
        shown = shown if len(shown) < 40 else shown[:40] + "..."
        reason = f"{error.msg.lower().removesuffix(' at')} at column {error.colno}"
        raise ValueError(f"{shown} is not JSON: {reason} (a value a line; --text takes any, jq -c '.[]' splits lists)") from None
    except UnicodeEncodeError:
        raise ValueError("it is not UTF-8 (--text takes it as it is)") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return text.replace("\r", " ").replace("\n", " ")  # which are between values: no string may have them


def check_size(size: int) -> None:
    """Raises ValueError when a task has too many bytes for a message."""
    if size > TEXT_LIMIT:
        raise ValueError(f"the task has {size} bytes or more, at most {TEXT_LIMIT} are possible: put a path there instead")


def parse_line(line: bytes, as_text: bool) -> str:
    """The JSON text of the task on a line. Raises ValueError."""
    text = json.dumps(line.decode("utf-8", "surrogateescape")) if as_text else ""
    check_size(max(len(line), len(text)))
    return text or check_json(line.decode("utf-8"))


def parse_plain_lines(lines: list[bytes]) -> list[str]:
    """The JSON texts if each line is one value and nothing else, as nearly always; [] when they need a closer look."""
    try:
        text = b"\n".join(lines).decode()
        texts = text.split("\n")
        ends = [end for _, end in map(scan_strictly, texts, itertools.repeat(0))]
    except (ValueError, RecursionError):
        return []
    return texts if ends == [*map(len, texts)] and max(ends) <= TEXT_LIMIT and "\r" not in text else []


def read_tasks(descriptor: int, name: str, as_text: bool, null: bool) -> Iterator[list[str]]:
    """The tasks of a stream, in batches as they arrive. Raises Failure when the first one is bad: the format is wrong."""
    number = count = 0  # lines and tasks so far
    for lines in read_lines(descriptor, name, b"\0" if null else b"\n"):
        if lines and not number:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            if not null and (b"\0" in lines[0] or lines[0].startswith((b"\xff\xfe", b"\xfe\xff"))):
                raise Failure(f"{name}: it has zero bytes or begins like UTF-16: convert it to UTF-8, or use -0 for zero bytes")
        tasks = [] if as_text else parse_plain_lines(lines)
        for line_number, line in enumerate(lines[len(tasks) :], number + len(tasks) + 1):
            try:
                if line if null else line.strip():
                    tasks.append(parse_line(line if null else line.removesuffix(b"\r"), as_text))
            except ValueError as error:
                if not count and not tasks:
                    raise Failure(f"{name}, line {line_number}: {error}") from None
                if tasks:
                    yield tasks
                text = json.dumps(line[:LARGE].decode("utf-8", "surrogateescape"))
                yield BadTask(text, f"{name}, line {line_number}: {error}")
                count, tasks = count + len(tasks) + 1, []
        number, count = number + len(lines), count + len(tasks)
        yield tasks


def skip_recorded(batches: Iterable[list[str]], results: ResultsFile) -> Iterator[list[str]]:
    """The tasks with "" for each that has a record already. Raises Refusal when these are not the tasks of the records."""
    task_id = 0
    for tasks in batches:
        tasks[:] = ["" if results.has(number, text) else text for number, text in enumerate(tasks, task_id)]
        yield tasks
        task_id += len(tasks)
    if task_id < results.least:
        raise Refusal(f"the results file {results.given} belongs to other tasks: the input has only {task_id}, it has more")


def read_chunks(descriptor: int, name: str) -> Iterator[bytes]:
    """What can be read, in pieces as they arrive. Raises Failure, also for a file that gets other content meanwhile."""
    is_file = os.path.isfile(descriptor) and os.fstat(descriptor).st_size > 0  # else it may be one of /proc
    known = b""
    try:
        while True:
            if known:  # read it again, since half a line of this list and half of another are no task
                os.lseek(descriptor, -len(known), os.SEEK_CUR)
            # To wait in sys.stdin.buffer would crash the interpreter at its end.
            chunk = os.read(descriptor, len(known) + (1 << 18))
            if not chunk.startswith(known):
                raise Failure(f"{name} was overwritten meanwhile: the rest is not run (give each job a file of its own)")
            if len(chunk) == len(known):
                return
            yield chunk[len(known) :]
            known = chunk[-100:] if is_file else b""
    except OSError as error:
        raise Failure(f"cannot read {name}: {explain_error(error)}") from None


def read_lines(descriptor: int, name: str, end: bytes) -> Iterator[list[bytes]]:
    """Lines without their end, in batches as they arrive; one too long comes cut, as far as it was read. Raises Failure."""
    rest = bytearray()
    skipping = False  # what comes is the rest of a line that was too long
    for chunk in read_chunks(descriptor, name):
        if skipping:
            _, found, chunk = chunk.partition(end)
            skipping = not found
        rest += chunk
        if end in chunk or len(rest) > TEXT_LIMIT:
            *lines, last = bytes(rest).split(end)
            if len(last) > TEXT_LIMIT:
                lines, last, skipping = [*lines, last], b"", True
            rest = bytearray(last)
            yield lines
    if not os.path.isfile(descriptor):
        yield []  # the signal that ended the writer may come here, too: its last line may be cut
    if rest:
        yield [bytes(rest)]


# ---- output --------------------------------------------------------------------------------------------------------


class Refusal(Failure):
    """The input is not the one that it should be: the job does not even finish what was read."""


# Records as they were written, of tasks that are whole numbers or strings without escapes; and the two ends of any record.
find_plain_records = re.compile(
    r'^\{"id": ([0-9]{1,15}), "task": (-?[0-9]+|"[^"\\\n\0]*"), "(?:(result)|error)": [^\n\0]*\}$', re.MULTILINE
).findall
match_record = re.compile(r'\{"id": ([0-9]{1,15}), "task": ').match
match_end = re.compile(r', "started_at": [^,"\0]*, "seconds": [^,"\0]*, "worker": "[^"\\]*", "attempts": [0-9]+\}\s*\Z').match


class ResultsFile:
    """The records, appended one line each: the memory of the job. Raises Failure when the file cannot be used."""

    def __init__(self, path: str, resume: bool) -> None:
        self.given = self.path = path
        self._new_path = ""  # of the copy that is to take its place
        self._offsets = array.array("q")  # by task id: where its last record begins, -1 where there is none
        self._tasks = array.array("q")  # by task id: the hash of the task, odd if it has a result; 0 where there is none
        self._stale = array.array("q")  # where lines begin that are blank, or replaced by a later record
        self._end = 0  # of the records that were there before
        self._torn = False  # whether there is part of one behind them
        self._line_end = b""  # if the last of them lacks it; `_end` counts it, so `_written` begins at -1
        self._written = 0  # bytes that this job has appended
        self._unsynced_since: float | None = None
        with self._explaining(2):
            self._open()
            if self.regular and os.fstat(self._fd).st_size:
                if not resume:
                    raise Failure(f"the results file {path} is not empty: name another, or carry on with --resume")
                self._load()
        self.least = len(self._tasks)  # how many tasks the job has, at least
        self.kept = sum(task & 1 for task in self._tasks)  # how many tasks have a result
        self.repeated = len(self._tasks) - self._offsets.count(-1) - self.kept  # how many tasks failed, and run again

    @contextlib.contextmanager
    def _explaining(self, status: int = 1) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "is the path right?" if status == 2 else "what is missing there was not acknowledged, --resume runs it again"
            raise Failure(f"cannot write the results file {self.given}: {explain_error(error)} ({hint})", status) from None

    def _open(self) -> None:
        """Open and lock the file. Raises OSError, Failure."""
        flags = os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self.regular = not os.path.exists(self.given) or os.path.isfile(self.given)
        self._fd = os.open(self.given, flags | (os.O_RDWR if self.regular else os.O_WRONLY), 0o666)
        if self.regular:
            self.path = os.path.realpath(self.given)
            lock_file(self._fd, self.given)
            if self._was_replaced():  # between the opening and the locking, by a master that has finished
                os.close(self._fd)
                self._open()

    def _was_replaced(self) -> bool:
        """Whether the path leads to another file by now, or to none, or the file has become shorter."""
        size = self._end + self._written  # first, since it may grow meanwhile
        status = os.fstat(self._fd)
        try:
            return status.st_size < size or not os.path.samestat(os.stat(self.path), status)
        except FileNotFoundError:
            return True

    def write(self, tasks: list[Task], worker: str) -> None:
        """Append the records of tasks; when this returns, they survive the end of this process. Raises Failure."""
        data = self._line_end + format_records(tasks, worker).encode("utf-8", "replace")
        with self._explaining():
            if self._torn:  # cut now, when it is known that this is the file of this job
                os.ftruncate(self._fd, self._end)
                self._torn = False
            write_all(data, self._fd)
        self._written, self._line_end = self._written + len(data), b""
        self._unsynced_since = self._unsynced_since or time.monotonic()

    def sync(self, interval: float = SYNC_INTERVAL) -> None:
        """Make what was written survive a power cut, if it has waited for `interval` seconds. Raises Failure."""
        since = self._unsynced_since
        with self._explaining():
            if since and self.regular and time.monotonic() - since >= interval:
                self._unsynced_since = None
                os.fsync(self._fd)
            if self.regular and self._was_replaced():
                raise Failure(f"the results file {self.given} was removed, replaced or cut meanwhile: its records are lost", 1)

    def _load(self) -> None:
        """Note which tasks have a result, and where a torn end begins. Raises OSError, Failure."""
        number = 1
        torn = b""
        with open(self._fd, "rb", closefd=False, buffering=1 << 20) as file:
            while lines := file.readlines(1 << 20):
                if not lines[-1].endswith(b"\n"):
                    torn = lines.pop()
                *offsets, self._end = itertools.accumulate(map(len, lines), initial=self._end)
                text = b"".join(lines).decode("utf-8", "replace")
                plain = find_plain_records(text)
                ids = [int(task_id) for task_id, _, _ in plain]
                whole = len(ids) == len(lines) == text.count('{"id": ') == text.count(RESULT) + text.count(ERROR)
                if whole and max(ids, default=0) - len(self._offsets) < GAP_LIMIT:
                    self._note(ids, offsets, [hash(task) | 1 if result else hash(task) & -2 for _, task, result in plain])
                else:
                    for position, line in enumerate(lines):
                        self._load_line(number + position, offsets[position], line)
                number += len(lines)
        if torn and not is_torn(torn):
            self._load_line(number, self._end, torn)  # which refuses what is no record
            self._line_end, self._written = b"\n", -1
            self._end, torn = self._end + len(torn) + 1, b""
        self._torn = bool(torn)

    def _load_line(self, number: int, offset: int, line: bytes) -> None:
        if not line.strip():
            return self._stale.append(offset)
        try:
            task_id, text, ok = read_record(line.decode())
            return self._note([task_id], [offset], [hash(text) | 1 if ok else hash(text) & -2])
        except (ValueError, RecursionError, StopIteration):
            remedy = "mend or remove that line, or name another file"
            raise Failure(f"{self.given}, line {number}: this is no record of a job ({remedy})") from None

    def _note(self, ids: list[int], offsets: list[int], hashes: list[int]) -> None:
        """Remember where the last record of each task is, and its hash (see `_tasks`). Raises ValueError."""
        known, tasks = self._offsets, self._tasks
        missing = max(ids, default=0) + 1 - len(known)
        if min(ids, default=0) < 0 or missing > GAP_LIMIT:
            raise ValueError("no job leaves such a gap")
        known.extend(array.array("q", [-1]) * missing)
        tasks.extend(array.array("q", [0]) * missing)
        for task_id, offset, task in zip(ids, offsets, hashes):
            if known[task_id] >= 0:
                self._stale.append(known[task_id])
            known[task_id], tasks[task_id] = offset, task

    def has(self, task_id: int, text: str) -> bool:
        """Whether a task has a result that is kept. Raises Refusal when its record is of another task."""
        known = self._tasks[task_id] if task_id < len(self._tasks) else 0
        if known and (known | 1) != (hash(text) | 1):  # it may have another spelling
            with self._explaining(2), open(self.path, "rb") as file:
                file.seek(self._offsets[task_id])
                line = file.readline().decode("utf-8", "replace")
            recorded = read_record(line)[1]
            was_bad = "".join(line.split()).endswith('"attempts":0}')  # a line that was no task, and may have been mended
            read = functools.partial(json.loads, parse_float=lambda text: x if (x := float(text)) % 1 else int(x))  # jq: 1.0 is 1
            if not was_bad and json.dumps(read(recorded), sort_keys=True) != json.dumps(read(text), sort_keys=True):
                problem = f"the results file {self.given} belongs to other tasks: its task {task_id} is not {text[:60]}"
                raise Refusal(f"{problem} (has their folder changed? is --text as before?)")
        return bool(known & 1)

    def finish(self, ordered: bool) -> None:
        """Put the lines in order, if wanted, without those that a later record has replaced; close the file. Raises Failure."""
        self.write([], "")  # which cuts a torn end
        self.sync(0.0)
        try:
            if self.regular and (ordered or self.repeated or self._stale):
                self._rewrite(ordered)
        except (OSError, ValueError) as error:
            reason = explain_error(error) if isinstance(error, OSError) else "another program has written there"
            say(f"cannot rewrite {self.given}{' in order' * ordered}: {reason} (the last record of an id counts)")
        finally:
            os.close(self._fd)

    def discard(self) -> None:
        """Remove a new file that has not taken the place of the old one yet. A signal handler may call this."""
        with contextlib.suppress(OSError):
            os.unlink(self._new_path)

    def _rewrite(self, ordered: bool) -> None:
        """Copy the last record of each task into a new file, which then takes the place of the old one. Raises OSError."""
        path = self._new_path = f"{self.path}.{random.getrandbits(64):x}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        try:
            with open(fd, "wb", buffering=1 << 20) as new, open(self.path, "rb", buffering=1 << 13) as old:
                new.writelines(self._choose_lines(old, ordered))
                new.flush()
                os.fsync(fd)
            status = os.fstat(self._fd)
            if hasattr(os, "chown"):
                os.chown(path, status.st_uid, status.st_gid)
            os.chmod(path, stat.S_IMODE(status.st_mode))
            if os.name == "nt":
                os.dup2(os.open(os.devnull, os.O_RDONLY), self._fd)  # Windows replaces no file that is open
            os.replace(path, self.path)
        finally:
            self.discard()

    def _choose_lines(self, file: BinaryIO, ordered: bool) -> Iterator[bytes]:
        """The last record of each task, in the order of the ids if wanted."""
        offset = file.seek(self._end)
        for line in itertools.takewhile(lambda line: line.endswith(b"\n"), file):
            self._note([int(line[7 : line.index(b",")])], [offset], [1])
            offset += len(line)
        for offset in self._offsets if ordered else ():
            if offset >= 0:
                file.seek(offset)
                yield file.readline()
        stale = {*self._stale}
        offset = file.seek(0)
        for line in () if ordered else file:
            if offset not in stale and line.endswith(b"\n"):  # a full disk may have torn the last one
                yield line
            offset += len(line)


def is_torn(line: bytes) -> bool:
    """Whether a last line without its end is a part of a record, or zeros that a power cut has left."""
    try:
        json.loads(line.decode())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):  # it is not whole
        return b'{"id":'.startswith(line.lstrip(b"\0 \t\r\n")[:20].replace(b" ", b"")[:6])
    except ValueError:
        pass  # it is whole, and no record
    return False


def read_record(line: str) -> tuple[int, str, bool]:
    """The id, the task as JSON text, and whether there is a result. Raises ValueError or RecursionError for what is no record."""
    match = match_record(line)
    with contextlib.suppress(ValueError, StopIteration):
        end = scan_strictly(line, match.end())[1] if match else 0
        ok = line.startswith(f", {RESULT}", end)
        if match and (ok or line.startswith(f", {ERROR}", end)):
            _, last = scan_strictly(line, end + len(f", {RESULT if ok else ERROR}"))
            if match_end(line, last):
                return int(match[1]), line[match.end() : end], ok
    record = json.loads(line, parse_constant=lambda name: None)  # of another program, which may have filled it with NaN
    if not isinstance(record, dict) or type(record.get("id")) is not int or "task" not in record:
        raise ValueError("no record")
    return record["id"], json.dumps(record["task"]), "result" in record and not record.get("error")


def format_records(tasks: list[Task], worker: str) -> str:
    """Lines of the results file, put together from JSON texts: those of workers were checked when they came."""
    lines = [
        f'{{"id": {task.id}, "task": {task.text}, {task.outcome}, "worker": "{worker}", "attempts": {task.attempts}}}\n'
        for task in tasks
    ]
    return "".join(lines)


def lock_file(fd: int, path: str) -> None:
    """Keep other masters out until `fd` is closed. Raises Failure when one is there."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(fd, 1 << 40, os.SEEK_SET)  # a byte that nobody reads: locks on Windows keep readers out
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise Failure(f"the results file {path} is being written by another master: stop it, or name another") from None
        say(f"cannot lock {path}: {explain_error(error)} (see that no other master writes there)")


def show_value(text: str) -> str:
    """A value for a person: a string as it is, any other as JSON."""
    return str(json.loads(text)) if text.startswith('"') else text


class Printer:
    """The lines on standard output, in the tutorial's words."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._heading = ["Try get results...\n"]  # printed once: when all tasks are put, or before the first result

    def put(self, batches: Iterable[list[str]]) -> Iterator[list[str]]:
        """The tasks, each said before it can be leased."""
        for texts in batches:
            with self._lock:  # a full pipe takes a part of it
                print_text("".join([f"Put task {show_value(text)}...\n" for text in texts]), sys.stdout.encoding)
            yield texts
        self.write([])

    def write(self, tasks: list[Task], _worker: str = "") -> None:
        """The results; errors are told on standard error."""
        texts = [task.outcome[len(RESULT) :].rpartition(', "started_at": ')[0] for task in tasks if task.ok]
        lines = [f"Result: {show_value(text)}\n" for text in texts]
        with self._lock:
            print_text("".join([*self._heading, *lines]), sys.stdout.encoding)
            self._heading = []


def print_text(text: str, encoding: str = "utf-8") -> None:
    """Whole lines on standard output; what the encoding does not have is shown as an escape. Raises Failure."""
    try:
        console.write(text.encode(encoding, "backslashreplace"), 1)
    except OSError as error:
        raise Failure(f"cannot write to standard output: {explain_error(error)}", 1) from None


# ---- workers that the master starts --------------------------------------------------------------------------------


class LocalWorker:
    """The task_worker.py beside this file, run on this host for this master alone; it ends with its standard input."""

    def __init__(self, master: TaskMaster, arguments: list[str], name: str = "") -> None:
        self.host = name or socket.gethostname()
        self.name = ""  # of the one that runs, as for its peers
        self.reason = "it has left"  # when it has ended: why it is not started again
        self.status = 1  # and the master's exit status, if no other worker is left
        self.ended = threading.Event()
        self._master, self._arguments = master, arguments
        self._environment = {"TASK_AUTHKEY": os.fsdecode(master.authkey), "TASK_RUN": master.run_id, "TASK_HOST": name}
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()

    def run(self) -> None:
        """Run it, and again if it ends too early, until the job is over or there is no hope; blocks as long."""
        while self._master.ledger.phase <= Phase.OVER and not self._stopping.is_set():
            status = self._run_once()
            if self._master.ledger.phase > Phase.OVER or not self._may_go_on(status):
                break
        self.ended.set()
        self._master._look_for_workers()

    def stop(self, connected: set[str]) -> None:
        """Let it leave by itself if it is among these, then end it with all that it has started; blocks until it has `ended`."""
        self._stopping.set()
        if not self.ended.wait(WORKER_GRACE if self.name in connected else 0.0):
            self.end()
        while not self.ended.wait(WORKER_GRACE):
            if self._process:
                self._process.kill()

    def end(self) -> None:
        """Have it leave at once. A signal handler may call this."""
        if self._process and self._process.stdin:
            self._process.stdin.close()

    def _run_once(self) -> int:
        """Run it to its end, and return the exit status. Each line that it prints goes to `_show`."""
        host, port = self._master.address
        command, environ, stdout = self._find_command({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
        try:  # in a session of its own: Ctrl-C in the terminal is for the master, which then drains
            process = self._process = subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.name = f"{self.host}/{process.pid}"
            reader = threading.Thread(target=self._relay, args=(process,), daemon=True)
            reader.start()
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: an argument has a zero byte; RuntimeError: no threads
            say(f"cannot run {command[0]}: {explain_error(error)}")
            self.end()
            if self._process:
                self._process.wait()
            return 2 if isinstance(error, ValueError) else 255
        if self._stopping.is_set():
            self.end()
        process.wait()
        reader.join(OUTPUT_GRACE)  # another user's process, which the worker could not kill, may keep the pipe
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        return process.returncode

    def _relay(self, process: subprocess.Popen[bytes]) -> None:
        """Give each line that it prints to `_show`; blocks until nobody can write there."""
        with process.stdout or contextlib.nullcontext():
            while process.stdout and (line := process.stdout.readline(1 << 16)):
                self._show(process, line)

    def _find_command(self, host: str, port: int) -> tuple[list[str], dict[str, str], int]:
        """The command line for a master at this address, the environment, and where output goes: not into the progress."""
        command = [sys.executable, WORKER_FILE, *self._arguments, "--host", host, "--port", str(port)]
        return command, {**os.environ, **self._environment}, subprocess.PIPE if console.is_terminal else 2

    def _show(self, _process: subprocess.Popen[bytes], line: bytes) -> None:
        console.write(line)

    def _may_go_on(self, status: int) -> bool:
        """Whether to start it again; 2 and 3 are final where none has worked. Blocks until it is time for that."""
        self._master.restarts += 1
        self.reason = f"the local worker ended with exit status {status}"
        if (status in (2, 3) and self.host not in self._master.hosts) or self._master.restarts > RESTARTS:
            self.reason += ", see standard error"
            self.status = 2 if status == 2 else 1
            return False
        self._master._log(f"{self.reason}: starting another")
        return not self._stopping.wait(1.0)


SSH = (
    "ssh -T -o BatchMode=yes -o ExitOnForwardFailure=yes -o ClearAllForwardings=no -o ControlPath=none -o LogLevel=INFO "
    "-o ConnectTimeout=30 -o ServerAliveInterval=15"
).split()
# Trying again would not help: told to leave (0), an old Python, a full disk (1), no such function (2), no Python (127).
HOPELESS = (0, 1, 2, 3, 126, 127)
find_hopeless = re.compile(  # in what ssh says
    r"Permission denied \(|Too many authentication failures|Host key (verification failed|for .* has changed)|"
    r"no matching .* found|(?<!stdio )forwarding (failed|is disabled)|administratively prohibited|"
    r"Could not resolve hostname(?!.*emporary)|Bad (owner|configuration)|invalid characters|"
    r"Cannot execute command-line and remote"
).search
# No part of [N/]HOST[:PYTHON] may begin with `-`: ssh would take it for an option.
match_ssh_host = re.compile(r"(?:([1-9]\d*)/)?(?!-)([^\s/:,\[\]]+)(?::(?![-:]|\d+$)(\S.*))?").fullmatch
# What runs on the host comes in two stages. LOADER is an argument: every login shell leaves it as it is, and a Python that is
# too old can read it. It runs BOOTSTRAP, which comes through standard input, with the key and the files behind it.
LOADER = (
    "import sys;del sys.path[0];sys.version_info<(3,9)and sys.exit('Python '+sys.version.split()[0]+' is too old there: "
    "3.9 or newer is needed');import signal;signal.alarm(60);exec(sys.stdin.buffer.readline())"
)
BOOTSTRAP = """
import io, os, signal, subprocess, sys, tempfile, time, zipfile
worker, data = None, b""
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: worker and worker.send_signal(number))
while len(data) < size:
    signal.alarm(60)
    data += sys.stdin.buffer.read(min(1 << 18, size - len(data))) or sys.exit(255)
signal.alarm(0)
with tempfile.TemporaryDirectory(prefix="task_worker-") as folder:
    archive = zipfile.ZipFile(io.BytesIO(data))
    for member in archive.infolist():
        os.chmod(archive.extract(member, folder), member.external_attr >> 16 | 0o600)
    command = [sys.executable, folder + "/task_worker.py", *arguments]
    worker = subprocess.Popen(command, cwd=folder, env={**os.environ, **environment})
    print("task_worker", worker.pid, "started", flush=True)
    status = worker.wait()
    time.sleep(2 * (status < 0))  # what is being killed may still write there
    if left := {*os.listdir(folder)} - {name.split("/")[0] for name in archive.namelist()} - {"__pycache__"}:
        print("task_worker: tasks wrote to relative paths, which are removed:", *sorted(left)[:5], flush=True)
sys.exit(status if status >= 0 else 128 - status)
"""


def check_ssh_host(text: str) -> str:
    """A type for argparse: [N/]HOST[:PYTHON]."""
    if not match_ssh_host(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host: it takes one [N/]HOST[:PYTHON], ports go into ~/.ssh/config")
    return text


class SshWorker(LocalWorker):
    """A worker on another host, started through `ssh`, which takes it `files`; started again when the network has failed."""

    def __init__(self, master: TaskMaster, arguments: list[str], text: str, files: bytes) -> None:
        processes, host, python = match_ssh_host(text).groups()  # type: ignore[union-attr]
        super().__init__(master, arguments + [f"--processes={processes}"] * bool(processes), host)
        self._python, self._files = python or "python3", files
        self._pause = 1.0  # seconds before the last attempt
        self._known = False  # whether a worker has run there
        self._said: list[str] | None = None  # by ssh, and by the host's shell; None when the worker runs

    def end(self) -> None:
        """Kill ssh, and its own ssh to a jump host: the worker leaves when its standard input ends."""
        if self._process and self._process.returncode is None:
            with contextlib.suppress(OSError, AttributeError):  # it has just ended; or the system has no groups
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()

    def _find_command(self, host: str, port: int) -> tuple[list[str], dict[str, str], int]:
        self._said = []
        forward = ["-R", f"127.0.0.1:0:{show_address((host, port))}"]
        return [*SSH, *forward, self.host, self._python, "-c", f'"{LOADER}"'], {**os.environ}, subprocess.PIPE

    def _show(self, process: subprocess.Popen[bytes], line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        if self._said is None:
            console.write(f"{self.host}: {text}\n".encode("utf-8", "replace"))
        elif allocated := re.search(rf"Allocated port (\d+) for remote forward to .*:{self._master.address[1]}$", text):
            threading.Thread(target=self._feed, args=(process, allocated[1]), daemon=True).start()
        elif started := re.search(r"task_worker (\d+) started$", text):
            self._said, self._pause, self._known = None, 1.0, True
            self.name = f"{self.host}/{started[1]}"
        elif text:
            self._said.append(text.removeprefix("ssh: "))

    def _feed(self, process: subprocess.Popen[bytes], port: str) -> None:
        """Send what the host needs, then every 15 s a byte that says that the master lives; blocks until ssh has ended."""
        names = {"size": len(self._files), "environment": self._environment, "arguments": [*self._arguments, f"--port={port}"]}
        parts = [f"globals().update({names!a}); exec({BOOTSTRAP!a})\n".encode(), self._files]  # not a copy for each host
        with contextlib.suppress(OSError, ValueError):
            while process.stdin:
                process.stdin.writelines(parts)
                process.stdin.flush()
                parts = [b"\0"]
                time.sleep(BEAT_INTERVAL)

    def _may_go_on(self, status: int) -> bool:
        """Not if trying again would not help. The reason is told in the words of ssh or of the host's shell."""
        before, fatal = self.reason, [*filter(find_hopeless, self._said or [])]
        # What has worked before may do so again: a host that has just started may lack its mounts, a network its names.
        comes_back = self._known and self._said is not None and "Host key" not in "".join(fatal)
        hopeless = (status in HOPELESS or bool(fatal)) and not comes_back
        if self._said is None:
            lost = status in (255, -9)  # of ssh
            self.reason = "the connection was lost" if lost else f"its worker ended with exit status {status}, see above"
        else:
            said = [*fatal, *self._said[::-1], f"ssh ended with exit status {status}"]
            self.reason = f"{said[0]} (try: ssh {self.host} {self._python})"
        if hopeless or self._said is None or self.reason != before:
            self._master._log(f"{self.host}: {self.reason}; {'given up' if hopeless else 'trying again'}")
        self._pause = min(RETRY_PAUSE, 2 * self._pause)
        return not hopeless and not self._stopping.wait(self._pause * random.uniform(0.5, 1.0))


def make_ssh_workers(master: TaskMaster, arguments: list[str], ssh: Any, function: str | None) -> list[SshWorker]:
    """A worker for each --ssh. Raises Failure for what is no host, without ssh, and when the files cannot travel."""
    if not isinstance(ssh, (list, tuple)):
        raise Failure(f"ssh: it takes a list of hosts, {ssh!r} is none")
    hosts = [check_argument("ssh", text, check_ssh_host) for text in ssh]
    if hosts and not shutil.which("ssh"):
        raise Failure("--ssh needs the program ssh, which is not on the PATH: install OpenSSH's client")
    files = pack_files(function) if hosts else b""
    return [SshWorker(master, arguments, text, files) for text in hosts]


def pack_files(function: str | None) -> bytes:
    """A zip of task_worker.py and of the function's module or whole package, if the current folder has it. Raises Failure."""
    import pathlib  # here, as they would take a fortieth of the time to start
    import zipfile

    content, top = io.BytesIO(), re.split("[.:]", function or "")[0]
    module, package = pathlib.Path(f"{top}.py"), pathlib.Path(top)
    is_module = module.is_file() and not (package / "__init__.py").exists()  # as Python has it
    paths = [] if not function else [module] if is_module else [*package.rglob("*")]
    paths = [path for path in paths if path.is_file() and not re.search(r"/(\.|__pycache__/)", path.as_posix())]
    if sum([path.stat().st_size for path in paths]) > PACK_LIMIT:
        raise Failure(f"--function {function}: {os.path.abspath(top)} has more than 20 MiB, too much for --ssh")
    try:
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            archive.write(WORKER_FILE, "task_worker.py")
            for path in paths:
                archive.write(path)
    except (OSError, UnicodeError) as error:  # UnicodeError: the name of a file
        raise Failure(f"--function {function}: cannot pack {os.path.abspath(top)} for --ssh: {explain_error(error)}") from None
    return content.getvalue()


# ---- master --------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """What became of one task. `ok` tells whether there is a result or an error (type, message, traceback)."""

    id: int
    task: Any
    result: Any
    error: dict[str, Any] | None
    started_at: float | None
    seconds: float | None
    worker: str
    attempts: int

    @property
    def ok(self) -> bool:
        """Whether the task has a result."""
        return self.error is None


class Host:
    """What the summary says of the workers on a host."""

    def __init__(self) -> None:
        self.slots: collections.Counter[str] = collections.Counter()  # connected now, by worker
        self.processes = 0  # connected at most
        self.runs = self.failed = 0  # outcomes, and those that were errors
        self.busy = self.connected = 0.0  # seconds, of all slots together

    def describe(self) -> str:
        """`4 processes, 120 runs, 3 failed, 97 % busy`."""
        parts = [count_things(self.processes, "process")] if self.processes else []
        parts += [count_things(self.runs, "run"), f"{self.failed} failed"]
        if self.connected:
            parts.append(f"{100 * min(1.0, self.busy / self.connected):.0f} % busy")
        return ", ".join(parts)


def count_things(number: int, noun: str) -> str:
    """`1 task`, `2 tasks`, `2 processes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


class TaskMaster:
    """The queues, their server, and workers if wanted; a context manager.

    The arguments are those of the command line, but `authkey` is the key itself; without it the key is looked for as there.
    `port` 0 takes a free one (`address` tells which). `quiet` is for the workers that it starts; `log` is called with each line
    about workers, retries and failures; what it raises ends the job. Raises Failure when it cannot start.
    """

    _running = False  # whether somebody takes the records of a run
    _pid = 0  # of the process that has opened it
    _server: QueueServer | None = None
    _failures_left = 0  # that end the job when there are none left; below 0 there is no limit

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 5000,
        authkey: bytes | None = None,
        *,
        workers: int = 0,
        ssh: Sequence[str] = (),
        function: str | None = None,
        command: str | None = None,
        timeout: float | None = None,
        retries: int = 0,
        retry_delay: float = 0.0,
        redeliveries: int = 2,
        max_failures: int | None = None,
        tasks_per_process: int | None = None,
        tls: bool | None = None,
        quiet: bool = True,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        given = locals()
        checked = check_arguments(given)
        self.address, self.timeout = (checked["host"], checked["port"]), checked["timeout"]
        self.run_id = os.urandom(8).hex()
        self.ledger = Ledger(checked["retries"], checked["redeliveries"], checked["retry_delay"], 0.0 if workers else OTHERS_TIME)
        self.failures: dict[str, list[Any]] = {}  # by kind: how many, and what is said of the first
        self.hosts: dict[str, Host] = collections.defaultdict(Host)
        self.refused = collections.Counter[str]()  # connections, by host and reason
        self._max_failures, self._take_line = checked["max_failures"], log
        encrypted = not is_loopback(self.address[0]) if tls is None else tls
        arguments = make_arguments(given, encrypted)
        self.authkey = find_key() if authkey is None else check_key(authkey, "authkey")
        self.context = make_tls_context(self.authkey, self.address[0], server_side=True) if encrypted else None
        self._what = {"function": function, "command": command} if workers or ssh or function or command else None  # of the job
        self._digest = ("", "")  # of the function's module, and the host that stated it
        self.started: list[LocalWorker] = [*make_ssh_workers(self, arguments, ssh, function)]
        self.started += [LocalWorker(self, [f"--processes={workers}", *arguments])] if workers else []
        self.restarts = 0  # of a local worker, since something was reported
        self._retried = collections.Counter[str]()  # retries, by kind of their error
        self._doubted: set[str] = set()  # workers that were said to fail all their tasks
        self._recording = threading.Lock()  # guards the output, and the order of deciding and writing
        self._counting = threading.Lock()  # guards what is counted for the summary
        self.peers: set[Peer] = set()  # all that are connected
        self._sink: Sink = lambda tasks, worker: None
        self._next_id = 0  # of the tasks to come

    def __enter__(self) -> TaskMaster:
        if not self._server:
            self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Open the port and start the workers. Raises Failure."""
        if LOADING in os.environ:
            remedy = 'put what makes it below `if __name__ == "__main__":` there'
            raise Failure(f"this TaskMaster is made while a worker loads the module: {remedy}")
        server = make_server(self)
        self.address = server.listener.getsockname()[:2]
        if len(self.authkey) < 16 and not is_loopback(self.address[0]):
            server.listener.close()
            few = f"the key has {len(self.authkey)} bytes, too few to listen on {self.address[0]}"
            raise Failure(f"{few}: use 16 random bytes or more")
        self._server, self._pid = server, os.getpid()
        server.start()
        for worker in self.started:
            threading.Thread(target=worker.run, daemon=True).start()
        if self.timeout:
            threading.Thread(target=self._limit_clients, args=(server.stop_event,), daemon=True).start()

    def close(self) -> None:
        """Let the workers leave, or lose them when the job is not done; close the port. Blocks for half a minute at most."""
        if self._server and self._pid == os.getpid():  # else it is that of the process which has forked this one
            finished = self.ledger.is_over() and self.ledger.phase != Phase.FAILED
            connected = {peer.name for peer in [*self.peers] if finished and not self.ledger.first_held()}
            self.ledger.end(Phase.CLOSED, None if finished else Failure("this TaskMaster was closed before its tasks were done"))
            ended = {worker.name for worker in self.started if self.ledger.first_held()}  # at once, below: a task still runs
            give_up_at = time.monotonic() + GOODBYE
            while finished and {peer.name for peer in [*self.peers]} - ended and time.monotonic() < give_up_at:
                time.sleep(0.01)
            self._server.stop()
            for worker in self.started:
                threading.Thread(target=worker.stop, args=(connected,)).start()
            for worker in self.started:
                worker.ended.wait()

    def run(self, tasks: Iterable[Any]) -> Iterator[Record]:
        """Run tasks (any values that JSON has), read lazily; yields their records as they come, with ids from 0.

        Waits for ever while there is no worker. A call that is left early ends it. Raises Failure when the job cannot
        go on, and TypeError or ValueError for a task that is not JSON, after the records of those before it.
        """
        if not self._server:
            raise Failure("this TaskMaster is not open: use `with TaskMaster(...) as master:`, or call start()")
        if self._pid != os.getpid():
            raise Failure("this TaskMaster was opened by the process that has forked this one: make another one here")
        if self._running:
            raise Failure("a run is under way: let the loop over its records end first, or make another TaskMaster")
        records: queue.SimpleQueue[Any] = queue.SimpleQueue()
        first, taken = self._next_id, self.ledger.done
        size = taken_size = 0  # characters of what was recorded, and of what was taken

        def look_at_gate() -> None:
            self.ledger.close_gate(self.ledger.done - taken > CALLER_LIMIT or size - taken_size > READY_BYTES)

        def sink(tasks: list[Task], worker: str) -> None:
            nonlocal size
            size += sum([len(task.text) + len(task.outcome) for task in tasks])
            look_at_gate()
            records.put((tasks, worker, size))

        def finish() -> None:
            self.ledger.wait_over(None)
            records.put(None)

        self._begin(encode_tasks(tasks), sink)  # if two threads come here at once, it refuses one
        self._running = True
        try:
            threading.Thread(target=finish, daemon=True).start()
            for settled, worker, size_then in iter(records.get, None):
                yield from make_records(settled, worker, first)
                taken, taken_size = taken + len(settled), size_then
                look_at_gate()
        except BaseException:
            self.ledger.end(Phase.CLOSED)  # the caller has lost interest
            raise
        finally:
            self._running = False
        self.ledger.audit()
        if self.ledger.reason:
            raise self.ledger.reason

    def _begin(self, batches: Iterable[list[str]], sink: Sink) -> None:
        """Start reading tasks. `sink` gets those that have their last outcome; what it raises ends the job. Raises as `begin`."""
        self.ledger.begin()
        self._sink, self._failures_left = sink, self._max_failures or 0
        threading.Thread(target=self._read, args=(batches,), daemon=True).start()
        self._look_for_workers()

    def _read(self, batches: Iterable[list[str]]) -> None:
        try:
            for tasks in batches:
                first, self._next_id = self._next_id, self._next_id + len(tasks)
                if isinstance(tasks, BadTask) and tasks[0]:  # "" has a result, from before the line was changed
                    outcome = format_outcome(format_error("ValueError", tasks.problem))
                    with self._recording:
                        self._record([self.ledger.submit_failed(first, tasks[0], outcome)], "")
                elif not self.ledger.submit(enumerate(tasks, first)):
                    break
            self.ledger.end(Phase.ENDED)
        except BaseException as error:  # what the caller's own iterable raises is for the caller
            self.ledger.end(Phase.FAILED if isinstance(error, Refusal) else Phase.ENDED, error)

    def _longest(self) -> tuple[float, str]:
        """The seconds since some task was started, the longest of all, and which one on which host it is; (0, "") if none."""
        now, first_held = time.monotonic(), self.ledger.first_held()
        busy = [(now - peer.moved_at, f"task {first_held[peer]} on {peer.host}") for peer in [*self.peers] if peer in first_held]
        return max(busy, default=(0.0, ""))

    def _look_for_workers(self) -> None:
        """Stop the job as if drained when no started worker is left, and no other one is connected."""
        gone = [f"{worker.host}: {worker.reason}" for worker in self.started if worker.ended.is_set()]
        if gone and len(gone) == len(self.started) and not self.peers and self.ledger.phase < Phase.OVER:
            status = 1 if self.ledger.done else max([worker.status for worker in self.started])
            self.ledger.end(Phase.DRAINING, Failure(f"no worker is left ({'; '.join(gone)})", status))

    # Called by the server's threads

    def _welcome(self, peer: Peer, protocol: int, statement: dict[str, Any]) -> str | None:
        """A slot has connected. Returns why it gets no tasks, None if it does."""
        runs = {"function": statement.get("function"), "command": statement.get("command")}
        problem = ""
        with self._counting:
            if protocol != PROTOCOL:
                problem = f"it speaks protocol {protocol}, this master {PROTOCOL}: copy task_worker.py to its host"
            elif statement and runs != (self._what or runs):
                problem = f"the job is for {describe_function(self._what)}, this worker runs {describe_function(runs)}"
            else:
                self._what = self._what or (runs if statement else None)
                host = self.hosts[peer.host]
                first = not host.slots[peer.name]
                host.slots[peer.name] += 1
                host.processes = max(host.processes, sum(host.slots.values()))
                peer.joined_at = peer.moved_at = time.monotonic()
                digest, stated_by = self._digest
                self._digest = (digest, stated_by) if digest else (str(statement.get("digest")), peer.name)
        if problem:
            self._refuse(peer.host, problem)
            return problem
        self.ledger.enlist(peer, str(statement.get("id", peer.name)), peer.moved_at)
        if first and self.ledger.phase <= Phase.OVER:
            self._log(f"worker {peer.name} connected")
            if digest not in ("", statement.get("digest")):
                module = f"the module of {runs['function']}"
                self._log(f"{module} has another text for {peer.name} than for {stated_by}: copy it there")
        return None

    def _refuse(self, host: str, problem: str) -> None:
        """A connection was refused: say so once for a host and a reason."""
        text = remove_controls(f"{host}: {problem[:1000]}")
        with self._counting:
            self.refused[text] += 1
            first = self.refused[text] == 1
        if first:
            self._log(f"refused a connection from {text}")

    def _report(self, peer: Peer, outcomes: Outcomes, busy: float) -> None:
        """Record the outcomes that are a task's last. When this returns, they are acknowledged."""
        peer.moved_at = time.monotonic()
        with self._recording:
            last, retried = self.ledger.report(peer, outcomes, peer.moved_at)
            self._record(last, peer.name)
        if self.restarts and peer.name == self.started[-1].name:  # the local worker
            self.restarts = 0
        failed = outcomes.oks.count(False)
        with self._counting:
            host = self.hosts[peer.host]
            host.runs += len(outcomes.ids)
            host.failed += failed
            host.busy += busy
        if failed and peer.name not in self._doubted and self.ledger.is_in_doubt(peer, peer.moved_at) and (last or retried):
            self._doubted.add(peer.name)
            problem = f"fails all its tasks ({explain_outcome([*last, *retried][-1])})"
            self._log(f"worker {peer.name} {problem}: it gets one now and then, while others do better or may come")
        for task in retried:
            kind = find_kind(explain_outcome(task), self._retried)
            self._retried[kind] += 1
            if self._retried[kind] <= KINDS_SHOWN:
                self._log(f"task {task.id} is retried: {explain_outcome(task)} on {peer.name}, attempt {task.attempts}")

    def _take_result(self, peer: Peer, members: str) -> None:
        """Record what a plain client returned for the oldest task that it took."""
        task_id, taken_at = peer.taken.popleft()
        seconds = time.monotonic() - taken_at
        outcome = format_outcome(members, time.time() - seconds, seconds)
        self._report(peer, Outcomes([task_id], [outcome.startswith(RESULT)], [True], [outcome]), seconds)

    def _goodbye(self, peer: Peer) -> None:
        """A connection has ended: what it held is READY again, or given up."""
        if peer.problem:
            self._log(f"closed the connection of {peer.name}: {peer.problem}")
        if peer.problem not in ("", TOO_SLOW) and peer.taken:
            with contextlib.suppress(EOFError):
                self._take_result(peer, format_error("TypeError", f"the result cannot be recorded: {peer.problem}"))
        again, given_up = self.ledger.drop(peer)
        last = False  # of its worker's connections
        with self._counting:
            self.peers.discard(peer)
            if peer.joined_at is not None:
                host = self.hosts[peer.host]
                host.slots[peer.name] -= 1
                last = not host.slots[peer.name]
                host.connected += time.monotonic() - peer.joined_at
        if again and not self.ledger.is_over():
            shown = ", ".join([f"{task.id} (attempt {task.attempts})" for task in again[:5]])
            more = f" and {len(again) - 5} more" if len(again) > 5 else ""
            self._log(f"redelivered since {peer.name} was lost: task {shown}{more}")
        self._look_for_workers()
        if last and self.ledger.phase < Phase.DRAINING:
            self._log(f"worker {peer.name} disconnected")
        for task in given_up:
            times = "once" if task.losses == 1 else f"{task.losses} times"
            task.outcome = format_outcome(format_error("WorkerLost", f"its worker was lost {times}; it may have run"))
        with self._recording, contextlib.suppress(EOFError):
            self._record(given_up, peer.name)

    def _record(self, tasks: list[Task], worker: str) -> None:
        """Write records, then the tasks are DONE. Called with `_recording` held. Raises EOFError when that cannot be."""
        if not tasks:
            return
        if self.ledger.phase == Phase.FAILED:
            raise EOFError  # nothing may be written behind a torn line
        try:
            self._sink(tasks, worker)
        except BaseException as error:
            self.ledger.end(Phase.FAILED, error)
            raise EOFError from error  # which is no acknowledgement
        try:
            for task in tasks:
                if not task.ok:
                    self._note_failure(task, worker)  # before the job can be over
        finally:
            self.ledger.settle(tasks)

    def _note_failure(self, task: Task, worker: str) -> None:
        """Say what is the first of its kind, count the others, and end the job when there are too many."""
        text = explain_outcome(task)
        kind = find_kind(text, self.failures)
        count = self.failures.setdefault(kind, [0, f"{text} (task {task.id}, on {worker or 'no worker'}: {task.text[:60]})"])
        count[0] += 1
        if count[0] == 1:
            self._log(f"task {task.id} failed: {count[1]}, attempt {task.attempts}")
        self._failures_left -= 1
        if not self._failures_left:
            self.ledger.end(Phase.DRAINING, Failure(f"stopped, as --max-failures {self._max_failures} asks", 1))

    def _log(self, text: str) -> None:
        """A line for the caller; what `log` raises ends the job."""
        try:
            self._take_line(text)
        except BaseException as error:
            self.ledger.end(Phase.FAILED, error)

    def _limit_clients(self, closed: threading.Event) -> None:
        """The time limit for plain clients, which could hold a task for ever."""
        error = format_error("TimeoutError", f"no result within the time limit of {self.timeout:g} s")
        while not closed.wait(LOOK_INTERVAL):
            taken = [(peer, task_id, time.monotonic() - since) for peer in [*self.peers] for task_id, since in [*peer.taken]]
            for peer, task_id, seconds in taken:
                if seconds > self.timeout and task_id not in peer.expired:
                    peer.expired.add(task_id)
                    outcome = format_outcome(error, time.time() - seconds, seconds)
                    with contextlib.suppress(EOFError):
                        self._report(peer, Outcomes([task_id], [False], [False], [outcome]), 0.0)


def describe_function(what: dict[str, Any] | None) -> str:
    """`--function mailer:send`, `--command ...`, or the demonstration."""
    given = [f"--{name} {' '.join(str(value).split())}" for name, value in (what or {}).items() if value]
    return given[0] if given else "the demonstration (no --function)"


def explain_outcome(task: Task) -> str:
    """The error of a task, for a person, on one line."""
    error = load_outcome(task.outcome)[1] or {}
    text = " ".join(remove_controls(f"{error.get('type')}: {error.get('message')}").split())
    return text if len(text) < 200 else f"{text[:80]} ... {text[-110:]}"  # the reason is often in the end


def find_kind(text: str, known: dict[str, Any]) -> str:
    """The kind of an error: its text without quoted words, file names and numbers; "others" when too many are known."""
    kind = re.sub(r"'[^']*'|\"[^\"]*\"|[^\s'\"]*[/.]\w[^\s'\"]*|[0-9]+", "...", text)[:200]
    return kind if kind in known or len(known) < KINDS_LIMIT else "others"


def encode_tasks(tasks: Iterable[Any]) -> Iterator[list[str]]:
    """Tasks as JSON texts: in batches if all of them are there, else singly as they come. Raises TypeError, ValueError."""
    texts: list[str] = []
    size = 1000 if isinstance(tasks, Sequence) else 1
    try:
        for task in tasks:
            text = repr(task) if type(task) is int else encode_json(task)  # as the worker does, for time
            check_size(len(text))
            texts.append(text)
            if len(texts) == size:
                yield texts
                texts = []
    except Exception:  # the tasks before it count
        yield texts
        raise
    yield texts


def make_records(tasks: list[Task], worker: str, first: int) -> Iterator[Record]:
    """Tasks as Records, one after another so that Python has less garbage to look for; their ids count from `first`."""
    values = scan_strictly(f"[{','.join([task.text for task in tasks])}]", 0)[0]  # at once, which takes half the time
    for task, value in zip(tasks, values):
        try:
            member, end = scan_strictly(task.outcome, len(RESULT if task.ok else ERROR))
            started_at, seconds = parse_times(task.outcome[end:])
            result, error = (member, None) if task.ok else (None, member)
        except (ValueError, RecursionError, StopIteration):  # not as our workers write it, or too deep for this stack
            result, error, started_at, seconds = load_outcome(check_outcome(task.outcome, scan_strictly)[2])
        columns = (task.id - first, value, result, error, started_at, seconds, worker, task.attempts)
        yield tuple.__new__(Record, columns)  # half the time of Record(*columns)


@functools.lru_cache(1000)
def parse_times(text: str) -> tuple[Any, Any]:
    """`started_at` and `seconds`, of the end of an outcome; most tasks are tiny, so the same times come again and again."""
    started_at, seconds = scan_strictly("{" + text[2:] + "}", 0)[0].values()
    return started_at, seconds


def check_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of TaskMaster, read as the command line would. Raises Failure for the first wrong one."""
    for name in ("tls", "quiet"):
        if given[name] not in (True, False, None):
            raise Failure(f"{name}: it takes True or False, not {given[name]!r}")
    if not callable(given["log"]):
        raise Failure(f"log: it takes a function, not {given['log']!r}")
    return {name: check_argument(name, given[name], kind) for name, kind in TYPES.items()}


def check_argument(name: str, value: Any, kind: Callable[[str], Any]) -> Any:
    """An argument of TaskMaster, as the command line would read it. Raises Failure."""
    if value is None and name in ("timeout", "max_failures", *WORKER_OPTIONS):
        return None
    if name in ("function", "command") and not isinstance(value, str):
        raise Failure(f"{name}: it takes text, as in {'mailer:send' if name == 'function' else 'sha256sum {}'!r}, not {value!r}")
    try:
        read = kind(str(value))
    except argparse.ArgumentTypeError as error:
        raise Failure(f"{name}: {error}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float) if isinstance(read, float) else type(read)):
        kind_name = type(read).__name__
        raise Failure(f"{name}: it takes {'an' if kind_name == 'int' else 'a'} {kind_name}, not {value!r}")
    return read


def make_arguments(given: dict[str, Any], encrypted: bool) -> list[str]:
    """What a worker's command line has from the arguments of TaskMaster. Raises Failure for a function and a command."""
    if given["function"] is not None and given["command"] is not None:
        raise Failure("function and command: give one of them")
    values = [f"--{name.replace('_', '-')}={given[name]}" for name in WORKER_OPTIONS if given[name] is not None]
    return [*values, "--tls" if encrypted else "--no-tls", *["--quiet"] * bool(given["quiet"])]


def find_key(path: str | None = None) -> bytes:
    """The key, made if none is there. Raises Failure."""
    try:
        return read_key(path)
    except FileNotFoundError:
        path = os.path.expanduser(DEFAULT_KEY_FILE)
    made = f"{path}.{random.getrandbits(64):x}"
    try:
        with open(made, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(os.urandom(32).hex() + "\n")
        with contextlib.suppress(FileExistsError):  # another master was faster
            os.link(made, path)  # whole or not at all
            say(f"made the key file {path}: workers on other hosts need a copy")
    except OSError as error:
        raise Failure(f"cannot make the key file {path}: {explain_error(error)} (or name one with --authkey-file)") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(made)
    return read_key(path)


# ---- command line --------------------------------------------------------------------------------------------------

NUMBER = bounded(int, 0, 1e9, "a number: it takes a whole number from 0")
TYPES: dict[str, Callable[[str], Any]] = {  # of the options that are arguments of TaskMaster, too
    "host": parse_host,
    "port": bounded(int, 0, 65535, "a port: it takes 0 (any free one) to 65535"),
    "workers": bounded(int, 0, 4096, "a count: it takes 0 to 4096"),
    "timeout": bounded(float, 0.001, 1e9, "a time: it takes seconds, at least 0.001"),
    "retries": NUMBER,
    "retry_delay": bounded(float, 0, 1e9, "a time: it takes seconds"),
    "redeliveries": NUMBER,
    "max_failures": COUNT,
    "tasks_per_process": COUNT,
    "function": check_spec,
    "command": check_template,
}
WORKER_OPTIONS = ("function", "command", "tasks_per_process")  # that are passed to a worker


def make_parser() -> Parser:
    """The options of the master."""
    parser = Parser(
        prog="task_master",
        usage="%(prog)s [OPTION ...] [TASK ...]",
        description="Serve tasks to task_workers on this and other hosts, and collect the outcomes.",
        epilog="examples:\n  task_master.py --workers 2\n"
        "  task_master.py --tasks in --results out --workers 4 --function mailer:send\n",
    )
    add = parser.add_argument_group("tasks").add_argument
    add("task", nargs="*", metavar="TASK", help="a JSON value (default: ten random integers)")
    add("--tasks", metavar="FILE", action="append", help="JSON Lines, one task a line; -: standard input")
    add("--text", action="store_true", help="a task is a line of text, not of JSON")
    add("-0", "--null", action="store_true", help="a task is a text before a zero byte (find -print0)")
    parser._has_negative_number_optionals.clear()  # of -0; so that --port -1 is a bad port, and -5 a TASK
    add = parser.add_argument_group("results").add_argument
    add("--results", metavar="FILE", help="a record of each task; -: standard output")
    add("--resume", action="store_true", help="carry on with the job of the results file")
    add("--ordered", action="store_true", help="put the file in the order of the tasks")
    group = parser.add_argument_group("workers")
    group.add_argument("--workers", type=TYPES["workers"], default=0, metavar="N", help="start so many processes here, too")
    text = "start a worker (of N processes) on a host, through ssh (repeatable)"
    group.add_argument("--ssh", type=check_ssh_host, action="append", default=[], metavar="[N/]HOST[:PYTHON]", help=text)
    add_function_options(group)
    add = parser.add_argument_group("limits").add_argument
    add("--timeout", type=TYPES["timeout"], metavar="S", help="seconds that a task may take (default: no limit)")
    add("--retries", type=NUMBER, default=0, metavar="N", help="of a task, after errors (default: %(default)s)")
    text = "seconds before a retry, doubled each time (default: %(default)g)"
    add("--retry-delay", type=TYPES["retry_delay"], default=0.0, metavar="S", help=text)
    add("--redeliveries", type=NUMBER, default=2, metavar="N", help="of a task, after lost workers (default: %(default)s)")
    add("--max-failures", type=COUNT, metavar="N", help="failed tasks that end the job (default: no limit)")
    group = parser.add_argument_group("where workers reach it")
    add_connection_options(group, 0, "where to listen (default: %(default)s; 0.0.0.0: any)", ", made if missing")
    return parser


def open_input(options: argparse.Namespace) -> Iterator[list[str]]:
    """The tasks as JSON texts, in batches. Raises Failure when there can be none."""
    as_text = options.text or options.null
    if options.task:
        try:
            return iter([[json.dumps(text) if as_text else check_json(text) for text in options.task]])
        except ValueError as error:
            raise Failure(f"TASK {' '.join(options.task)[:60]}: {error}; --tasks reads a file") from None
    if options.tasks is None:
        return iter([[str(random.randint(0, 10000)) for _ in range(10)]])
    try:
        descriptor = os.dup(0) if options.tasks == "-" else os.open(options.tasks, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise Failure(f"cannot read the tasks file {options.tasks}: {explain_error(error)} (is the path right?)") from None
    name = "standard input" if options.tasks == "-" else options.tasks
    batches = read_tasks(descriptor, name, as_text, options.null)
    if os.path.isfile(descriptor) or os.path.isdir(descriptor):  # then a bad first line is known before anything is done
        return itertools.chain([next(batches, [])], batches)
    return batches


def show_time(seconds: float) -> str:
    """A time for a person: 0:07, 3:07, 12:40:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_rate(rate: float) -> str:
    """A rate for a person: 1500, 15, 1.5, 0.015."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


class Job:
    """One run of the command line."""

    def __init__(self, options: argparse.Namespace, argv: list[str]) -> None:
        self._options, self._argv = options, argv
        self._log: Callable[[str], None] = (lambda text: None) if options.quiet else say
        self._stopped_by = 0  # signal number
        self._drained = False  # because of it: it came before the job was over
        self._began_at = self._worked_at = self._shown_at = self._looked_at = time.monotonic()
        self._shown_done = -1  # how many tasks were done then: if there are no others, there is nothing to show
        limits = {name: getattr(options, name) for name in [*TYPES, "ssh", "tls", "quiet"]}
        self._master = TaskMaster(authkey=find_key(options.authkey_file), log=self._log, **limits)
        self._results: ResultsFile | None = None
        self._kept = 0  # results of earlier runs
        self._batches, self._sink = self._connect_ends()

    def _connect_ends(self) -> tuple[Iterable[list[str]], Sink]:
        """Where tasks come from and where records go."""
        options = self._options
        batches = open_input(options)  # before a results file is made
        if not options.task and options.tasks is None and (options.function or options.command):
            self._log("no tasks are given, by TASK or --tasks: ten random numbers are used")
        if options.retry_delay and not options.retries:
            self._log("--retry-delay is not used, as there are no --retries")
        if options.tasks_per_process and not (options.workers or options.ssh):
            self._log("--tasks-per-process is not used, as no workers are started here: give it to task_worker.py")
        if options.results == "-":
            return batches, lambda *recorded: print_text(format_records(*recorded))  # UTF-8, whatever the terminal is set to
        if not options.results:
            printer = Printer()
            return printer.put(batches), printer.write
        if (options.ordered or options.resume) and os.path.exists(options.results) and not os.path.isfile(options.results):
            raise Failure(f"--ordered and --resume read the results file, and {options.results} is none: name a file")
        results = self._results = ResultsFile(options.results, options.resume)
        self._kept = results.kept
        if self._kept or results.repeated:
            told = f"{self._kept} done are kept, {results.repeated} failed are repeated"
            if options.task or (options.tasks != "-" and os.path.isfile(options.tasks)):  # a stream is compared on the way
                count = sum(map(len, skip_recorded(open_input(options), results)))
                told += f", {count - self._kept} to do"
            self._log(f"resuming {options.results}: {told}")
            batches = skip_recorded(batches, results)
        elif options.resume:
            self._log(f"resuming {options.results}: it has no records yet")
        return batches, results.write

    def run(self) -> int:
        """Run the job; returns the exit status. Raises Failure."""
        try:
            catch_signals(self._handle_signal)
            with self._master as master:
                say(f"listening on {show_address(master.address)}")
                if self._options.tls is False and not is_loopback(master.address[0]):
                    say(PLAIN_WARNING)
                master._begin(self._read_until_stopped(), self._sink)
                while not master.ledger.wait_over(LOOK_INTERVAL):
                    self._look()
        finally:
            console.write(b"")
        master.ledger.audit()
        return self._conclude()

    def _read_until_stopped(self) -> Iterator[list[str]]:
        """The tasks until a signal comes: if it has ended their writer, too, the last line may be cut."""
        for tasks in self._batches:
            since = time.monotonic()
            while (self._stopped_by or not tasks) and self._looked_at < since and self._master.ledger.phase <= Phase.ENDED:
                time.sleep(0.01)  # for the main thread, which takes the signals
            if self._master.ledger.phase > Phase.ENDED:
                break
            yield tasks

    def _look(self) -> None:
        ledger, now, quiet = self._master.ledger, time.monotonic(), self._options.quiet
        if self._stopped_by and not self._drained:
            self._drained = True
            ledger.end(Phase.DRAINING)
            say("draining: waiting for the tasks that run (once more to leave at once)")
        self._looked_at = now  # from before the look: a signal that came later was not seen
        self._worked_at = self._worked_at if self._master.hosts else now  # when the first worker came
        if self._results:
            try:
                self._results.sync()
            except Failure as failure:
                ledger.end(Phase.FAILED, failure)
        if console.is_terminal and not quiet:
            console.show(self._describe_progress())
        elif now - self._shown_at >= PROGRESS_INTERVAL and ledger.submitted > self._shown_done and not quiet:
            self._shown_at, self._shown_done = now, ledger.done
            say(", ".join(self._describe_progress()))

    def _describe_progress(self) -> list[str]:
        """What one wants to know, the most important part first."""
        ledger, spent = self._master.ledger, time.monotonic() - self._began_at
        done = self._kept + ledger.done
        total = self._kept + ledger.submitted if ledger.phase in (Phase.ENDED, Phase.OVER) else None
        working = time.monotonic() - self._worked_at if self._master.hosts else spent
        rate = ledger.done / max(working, 0.1)
        left = (total - done) / rate if total and rate else 0.0
        seconds, task = self._master._longest()
        longest = [f"longest {show_time(seconds)} ({task})"] if seconds >= 1 else []
        hangs = seconds > max(left, HANGING)  # then there must be room for it, and the estimate is void
        share = done / total if total else 1.0
        bar = f"[{'#' * int(20 * share):-<20}] " if not hangs else ""
        parts = [f"{done} done" if total is None else f"{bar}{int(100 * share):3} %  {done} of {total}"]
        parts += [f"{ledger.failed} failed"] if ledger.failed else []
        parts += longest if hangs else []
        parts += [f"{show_rate(rate)}/s", show_time(spent)]
        parts += [f"{show_time(left)} left"] if left and not hangs else []
        slots = [count for host in [*self._master.hosts.values()] if (count := sum(host.slots.values()))]
        if slots:
            parts.append(f"{count_things(sum(slots), 'process')} on {count_things(len(slots), 'host')}")
        else:
            parts.insert(0, self._describe_waiting())
        return parts if hangs else parts + longest

    def _describe_waiting(self) -> str:
        """What the job waits for when nobody works."""
        if coming := [worker.host for worker in self._master.started if not worker.ended.is_set()]:
            return f"waiting for the worker on {', '.join(coming)}"
        (host, port), options = self._master.address, self._options
        host = socket.gethostname() if host in ("0.0.0.0", "::") else host
        what = {"--host": host, "--port": str(port), "--function": options.function, "--command": options.command}
        what["--authkey-file"] = options.authkey_file
        words = [word for name, value in what.items() if value not in (None, "5000", "127.0.0.1") for word in (name, value)]
        tls = [] if options.tls is None else ["--tls" if options.tls else "--no-tls"]
        return f"no worker: {shlex.join(['python3', 'task_worker.py', *words, *tls])}"

    def _handle_signal(self, number: int, _frame: object) -> None:
        """The first one drains (in `_look`: a handler must not wait for anything), the second leaves at once."""
        if self._stopped_by:
            write_last_line(f"{console.blank.decode()}task_master: leaving at once; {self._tell_resume()}")
            if self._results:
                self._results.discard()
            for worker in self._master.started:
                worker.end()
            os._exit(128 + number)
        self._stopped_by = number

    def _tell_resume(self) -> str:
        """How to carry on."""
        if not self._results or not self._results.regular or not (self._options.task or self._options.tasks):
            return "what is not done is not remembered: use --tasks FILE and --results FILE to be able to resume"
        argv = [sys.executable, self._argv[0], *["--resume"] * (not self._options.resume), *self._argv[1:]]
        hints = ["the same input"] if self._options.tasks and not os.path.isfile(self._options.tasks) else []
        hints += ["a higher limit, since what failed is repeated"] if self._options.max_failures else []
        hint = f" (with {' and '.join(hints)})" if hints else ""
        return f"to carry on: {shlex.join(argv)}{hint}"

    def _conclude(self) -> int:
        """Say how it went; returns the exit status. Raises Failure."""
        ledger, problem = self._master.ledger, self._master.ledger.reason
        if self._results and not isinstance(problem, Refusal):  # else the file is not ours
            try:
                self._results.finish(self._options.ordered)
            except Failure as failure:
                problem = problem or failure
        if ledger.done or not problem:
            self._summarize()
        if self._drained or getattr(problem, "status", 0) == 1:
            say(f"stopped; {self._tell_resume()}")
        if problem:
            raise problem
        if self._drained:
            return 128 + self._stopped_by
        return 1 if ledger.failed else 0

    def _summarize(self) -> None:
        """What failed, which hosts did the work, and how much there was."""
        master, ledger, seconds = self._master, self._master.ledger, time.monotonic() - self._began_at
        kinds = sorted(master.failures.values(), key=lambda kind: -kind[0])
        if kinds:
            self._log(f"{ledger.failed} failed:")
        for count, example in kinds[:KINDS_SHOWN]:
            self._log(f"{count:7} x {example}")
        if more := sum([count for count, _ in kinds[KINDS_SHOWN:]]):
            self._log(f"        and {more} of other kinds, see the records with an error")
        for text, count in [*master.refused.items()]:  # a connection may still come
            self._log(f"refused {count_things(count, 'connection')} from {text}")
        for name, host in [*master.hosts.items()]:
            self._log(f"host {name}: {host.describe()}")
        kept = f", {self._kept} kept from before" if self._kept else ""
        self._log(
            f"{self._kept + ledger.done - ledger.failed} done, {ledger.failed} failed, {ledger.retried} retried, "
            f"{ledger.redelivered} redelivered, {show_time(seconds)}, {show_rate(ledger.done / seconds)} tasks/s{kept}"
        )


def check_options(parser: Parser, options: argparse.Namespace) -> None:
    """Ends the program when options do not go together, or a stream is closed that they need."""
    *earlier, options.tasks = options.tasks or [None]  # argparse alone would drop the earlier ones without a word
    no_file, no_tasks = options.results in (None, "-"), not options.task and options.tasks is None
    problems = {
        "standard output is closed, where the results should go: use --results FILE": not sys.stdout and no_file,
        "standard input is closed, where the tasks should come from: use --tasks FILE": not sys.stdin and options.tasks == "-",
        f"TASK {' '.join(options.task)[:60]} and --tasks: give one of them": options.task and options.tasks is not None,
        "--tasks takes one FILE: join several with cat, and give --tasks -": earlier,
        "--text and -0 need tasks: give TASK or --tasks FILE (-: standard input)": (options.text or options.null) and no_tasks,
        "--resume needs the --results FILE of the job to carry on": options.resume and no_file,
        "--resume needs the tasks again, as TASK or with --tasks FILE": options.resume and no_tasks,
        "--results takes the name of a file, and has none": options.results == "",
        "--ordered needs --results FILE: the file is put in order in the end": options.ordered and no_file,
    }
    for problem in [problem for problem, is_so in problems.items() if is_so]:
        parser.error(problem)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    prepare_process()
    gc.set_threshold(100_000, 50, 100)  # tasks come and go by the thousand, and make no cycles: a quarter less time
    sys.setswitchinterval(0.0005)  # seconds; slots wait for the threads that answer them, not for the one that reads
    parser = make_parser()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        options = parser.parse_args(argv)
        check_options(parser, options)
        return Job(options, [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]).run()
    except Failure as failure:
        say(str(failure))
        return failure.status
    except KeyboardInterrupt:  # before there was anything to drain
        return 128 + signal.SIGINT


if __name__ == "__main__":
    os._exit(main())  # at once: to take this process apart would take 20 ms (row `cold`)
