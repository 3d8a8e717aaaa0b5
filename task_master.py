#!/usr/bin/env python3
"""Serve tasks to task_workers on this and other hosts, and collect the outcomes.

    reader --submit--> Ledger <--lease/report-- server threads  <==TCP==>  slots of task_worker.py
                         |
    results file <--records

    submit            lease                report ok / last error
    ------> READY ----------------> LEASED ---------------------> DONE
              ^                       |
              '-- release, retry, ----'
                  connection lost

Nothing is lost: a task is READY, LEASED to one live connection, or DONE. It runs at least once and is recorded
exactly once. Its record is written before it counts as done, so that a master that was killed can be resumed.

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
# A report settles tasks and writes their records while it holds the one lock that guards the output, then returns,
# and the return is the acknowledgement. A worker that gets none reports again over its next connection; an outcome
# for a task that has a record already is counted and dropped. Hence at least once, and recorded once.
# Tasks and outcomes are JSON texts from end to end. The worker writes the members of a record that hold its outcome, the
# master adds those that it knows better, and never reads a result, but to see whether it is JSON. Batches cross as one
# text with a line for each, so a thousand tasks cost a thousand joins and splits, not a thousand messages.

from __future__ import annotations

import argparse
import array
import collections
import contextlib
import errno
import functools
import gc
import io
import itertools
import json
import os
import pickle
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import managers
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, NamedTuple, NoReturn

if TYPE_CHECKING:
    import ssl

__version__ = "1.1.0"

# ---- wire: the same text stands in both files, so that each can be copied alone ------------------------------------

PROTOCOL = 2  # of what the two queues expect and return; both ends state theirs
MESSAGE_LIMIT = 64 << 20  # bytes; a longer message is refused before it is read
TEXT_LIMIT = 60 << 20  # bytes of one task or one result as JSON text: a message has room for it
HANDSHAKE_LIMIT = 10.0  # seconds for a new connection to prove that it knows the key
SILENCE_LIMIT = 60.0  # seconds without a word after which a peer is given up
DEFAULT_KEY_FILE = "~/.task_authkey"


class Failure(Exception):
    """Ends the program with one line on standard error and an exit status (2: usage, 3: no connection)."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def pack(words: str, text: str = "") -> bytes:
    """A message: a line of words, and behind it text as it is, so that a batch of tasks or outcomes is encoded but once."""
    return f"{words}\n{text}".encode("utf-8", "replace")


def unpack(message: bytes) -> tuple[list[str], str]:
    """The words (some, and a rest) and the text of a message. Raises ValueError when it is not text."""
    words, _, text = message.decode().partition("\n")
    return words.split(" ", 4), text


class PlainConnection:
    """Messages over a socket, framed as `multiprocessing.connection` frames them.

    Whatever ends or spoils the connection (reset, silence, a message too long) is an EOFError.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline: float | None = time.monotonic() + HANDSHAKE_LIMIT  # for all reading, until it is set to None
        self._buffer = bytearray()
        sock.settimeout(HANDSHAKE_LIMIT)
        tune_socket(sock)

    def secure(self, context: ssl.SSLContext, server_side: bool = False) -> None:
        """Put TLS in the place of the plain socket; blocks for the handshake. Raises OSError."""
        self.sock = context.wrap_socket(self.sock, server_side=server_side)

    def settle(self, silence_limit: float | None) -> None:
        """End the handshake: from now on only `silence_limit` seconds without a byte end the connection."""
        self.deadline = None
        self.sock.settimeout(silence_limit)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads; close alone would not
        self.sock.close()

    def send_bytes(self, *messages: bytes) -> None:
        """Send messages; blocks until the system has taken them all, EOFError when it takes nothing for too long."""
        view = memoryview(b"".join([struct.pack("!i", len(data)) + data for data in messages]))
        try:
            while view:
                view = view[self.sock.send(view) :]
        except OSError as error:
            raise EOFError(str(error)) from error

    def recv_bytes(self, maxlength: int = MESSAGE_LIMIT) -> bytes:
        """The next message; blocks until it is there, EOFError when the peer is silent for too long."""
        (size,) = struct.unpack("!i", self._read(4))
        if not 0 <= size <= min(maxlength, MESSAGE_LIMIT):
            self.close()
            raise EOFError("the peer announced a message that is too long")
        return self._read(size)

    def _read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            try:
                if self.deadline is not None:
                    self.sock.settimeout(max(0.001, self.deadline - time.monotonic()))
                data = self.sock.recv(max(1 << 16, min(size - len(self._buffer), 1 << 20)))
            except OSError as error:
                raise EOFError(str(error)) from error
            if not data:
                raise EOFError("the peer closed the connection")
            self._buffer += data
        data = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        return data


def tune_socket(sock: socket.socket) -> None:
    """Send at once, and notice a vanished peer within 30 s, idle (keepalive) or with data on the way (user timeout)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 15, "TCP_KEEPALIVE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
    for name, value in {**options, "TCP_USER_TIMEOUT": 30_000}.items():
        if hasattr(socket, name):  # not every system has each
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def make_tls_context(authkey: bytes, server_side: bool) -> ssl.SSLContext:
    """TLS 1.3 with the authkey as pre-shared key (RFC 8446, section 2.2), so that there are no certificates to make.

    Raises Failure where Python cannot do that.
    """
    import hmac  # here, as they would take a tenth of the time to start
    import ssl

    if not getattr(ssl, "HAS_PSK", False):
        raise Failure(
            f"--tls needs Python 3.13 or newer, this is {sys.version.split()[0]}: use an SSH tunnel instead (see README)"
        )
    key = hmac.digest(authkey, b"task_master TLS 1.3 pre-shared key", "sha256")  # not the key that answers challenges
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if server_side:
        context.num_tickets = 0
        context.set_psk_server_callback(lambda identity: key)
    else:
        context.check_hostname = False  # and CERT_REQUIRED stays: without a CA no certificate will do, only the key
        context.set_psk_client_callback(lambda hint: ("task_worker", key))
    return context


def show_address(address: tuple[Any, ...]) -> str:
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


def is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "localhost")


def bounded(kind: Callable[[str], Any], low: float, high: float, noun: str) -> Callable[[str], Any]:
    """A type for argparse: a number from `low` to `high`."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not {noun}")

    return parse


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help tells more)\n")


def write_error(text: str, descriptor: int = 2) -> None:
    """Write to standard error, at once and whole, also from a signal handler; nothing happens when nobody can read it."""
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode("utf-8", "replace"))


def open_standard_streams() -> list[str]:
    """Put the null device in the place of those that are closed, lest a connection or a file takes their numbers.

    Returns the names of those.
    """
    closed = []
    for descriptor, name in enumerate(["stdin", "stdout", "stderr"]):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_WRONLY), True)  # takes the lowest number that is free
            setattr(sys, name, open(descriptor, "w", closefd=False))  # noqa: SIM115
            closed.append(name)
    return closed


def make_poll(file: Any) -> Callable[[float], object]:
    """A function that waits some seconds for a socket or a pipe, and returns whether it is readable.

    It is made once, where `Connection.poll` makes a selector in each call. Windows knows no `poll`, but pipes that have one.
    """
    if hasattr(select, "poll"):
        selector = select.poll()
        selector.register(file.fileno(), select.POLLIN)
        return lambda timeout: selector.poll(timeout * 1000)
    return getattr(file, "poll", None) or (lambda timeout: select.select([file], [], [], timeout)[0])


def raise_file_limit() -> None:
    """Allow as many open files as the system lets us: every slot needs some, at both ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def explain_error(error: BaseException) -> str:
    """What the system says, without its number: `connection refused`."""
    text = str(getattr(error, "strerror", None) or error or type(error).__name__)
    return text[:1].lower() + text[1:]


def read_key(path: str | None) -> bytes:
    """The key: TASK_AUTHKEY, else the named file, else ~/.task_authkey. FileNotFoundError when only that is missing."""
    if "TASK_AUTHKEY" in os.environ:
        return check_key(os.fsencode(os.environ["TASK_AUTHKEY"]), "TASK_AUTHKEY")
    source = os.path.expanduser(path or DEFAULT_KEY_FILE)
    try:
        with open(source, "rb") as file:
            if os.name == "posix" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise Failure(f"the key file {source} can be read by others: chmod 600 {source}")
            return check_key(file.read(4096), source)
    except OSError as error:
        if path is None and isinstance(error, FileNotFoundError):
            raise
        raise Failure(f"cannot read the key file {source}: {explain_error(error)} (copy it from the master's host)") from None


def check_key(key: bytes, source: str) -> bytes:
    """The key without the white space around it. Raises Failure when it cannot be one."""
    if not key.strip():
        raise Failure(f"the key in {source} is empty: put at least 16 random bytes there")
    if b"\0" in key:
        raise Failure(f"the key in {source} has a zero byte, which no environment can carry: use letters and digits")
    return key.strip()


# ---- end of the wire -----------------------------------------------------------------------------------------------

READY_LIMIT = 50_000  # tasks read and not yet leased; the reader waits while there are more
READY_BYTES = 64 << 20  # and characters of their text
LEASE_LIMIT = 10_000  # tasks in one lease
LEASE_BYTES = 8 << 20  # characters of text in one lease, unless a single task has more
LEASE_FLOOR = 16  # a slot gets this part of what it asked for even if its share is smaller
IDLE_POLLS = 25.0  # requests for tasks a second from all idle slots together, at most (but each may ask every second)
CONTAINER_LIMIT = 8 << 20  # lists and objects in an outcome, some 64 bytes of memory each while it is checked
PENDING_LIMIT = 256  # connections that have not finished the handshake; the oldest must give way
BACKLOG = 1024  # connections that the system holds for us; multiprocessing's 16 would lose those of a large farm
SYNC_INTERVAL = 0.7  # seconds that records may wait for their fsync; with LOOK_INTERVAL that is less than one
PROGRESS_INTERVAL = 30.0  # seconds between lines of progress where there is no terminal
RATE_SPAN = 10.0  # seconds over which the rate is taken, more while RATE_TASKS take longer
RATE_TASKS = 20
LOOK_INTERVAL = 0.2  # seconds between looks at signals, local workers and the clock
GOODBYE = 2.0  # seconds for the workers to hear that the job is over
WORKER_GRACE = 10.0  # seconds for the local worker to leave by itself
WINDOW = 50_000  # records that may wait for their turn, or for the caller of TaskMaster.run
WINDOW_BYTES = 64 << 20  # and characters in them
WORKER_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "task_worker.py")


class Console:
    """Standard error, with a line of progress below the others on a terminal: it is cleared before they are written."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may write, too
        self.is_terminal = os.isatty(2)
        self._shown = 0  # columns of the progress on the screen
        self._next_at = time.monotonic() + PROGRESS_INTERVAL

    def __enter__(self) -> None:
        """While other lines are written, no progress is on the screen."""
        self._lock.acquire()
        self.clear()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def write(self, text: str) -> None:
        """Write whole lines to standard output. Raises OSError."""
        with self:
            sys.stdout.write(text)
            sys.stdout.flush()

    def say(self, text: str) -> None:
        """One line on standard error."""
        with self:
            write_error(f"task_master: {text}\n")

    def show(self, parts: list[str]) -> None:
        """Progress, the most important part first: as much as fits on a terminal, elsewhere a line now and then."""
        if not self.is_terminal:
            if time.monotonic() >= self._next_at:
                self._next_at += PROGRESS_INTERVAL
                self.say(", ".join(parts))
            return
        width = 80
        with contextlib.suppress(OSError):
            width = os.get_terminal_size(2).columns or 80
        width -= 3  # a column to spare, and two for the ^C that a terminal shows
        while len(", ".join(parts)) > width and len(parts) > 1:
            parts = parts[:-1]
        text = ", ".join(parts)[:width]
        with self._lock:
            shown, self._shown = self._shown, max(self._shown, len(text))  # first: a signal handler may clear it
            write_error("\r" + text.ljust(min(shown, width)))
            self._shown = len(text)

    def clear(self) -> None:
        with self._lock:
            if self._shown:
                write_error("\r" + " " * self._shown + "\r")
            self._shown = 0


console = Console()
say = console.say


# ---- ledger: every decision about a task ---------------------------------------------------------------------------

NEW, READY, LEASED, DONE = "new", "ready", "leased", "done"
MOVES = {
    (NEW, READY): "submitted",
    (READY, LEASED): "leased",
    (LEASED, READY): "released, to be retried, or its connection was lost",
    (LEASED, DONE): "reported, or lost too often",
    (READY, DONE): "reported late, by the worker that had been given up",
}


class IllegalMove(Exception):
    """A defect of this program: a task was to change its state in a way that MOVES does not have."""


class Task:
    """A task until it is DONE; its state is changed by `Ledger._move` alone."""

    __slots__ = ("failures", "holder", "id", "losses", "ok", "outcome", "state", "text", "worker")

    def __init__(self, task_id: int, text: str) -> None:
        self.id = task_id
        self.text = text  # JSON
        self.state = NEW
        self.failures = 0  # error outcomes so far
        self.losses = 0  # times that its connection was lost
        self.holder: object = None  # who has leased it
        self.ok = False  # whether the last attempt gave a result
        self.outcome = ""  # of the last attempt, as members of a record; the ledger does not look into it
        self.worker = ""  # that it came from

    @property
    def attempts(self) -> int:
        """How often it was run, as far as the master knows."""
        return self.failures + self.losses + self.ok


Sink = Callable[["list[Task]"], None]  # takes settled tasks, to record them


class Ledger:
    """The state of every task: pure decisions under one lock, without I/O.

    A holder is any hashable object that stands for a connection.
    """

    def __init__(self, retries: int = 0, redeliveries: int = 2, batch: int | None = None) -> None:
        self._retries, self._redeliveries, self._batch = retries, redeliveries, batch
        self._lock = threading.Lock()
        # notified while a task is READY, once for each one that waits; and when `lease` begins to return None.
        # Awaited in `wait_ready`
        self._tasks_ready = threading.Condition(self._lock)
        # notified when leasing leaves room for more READY tasks, and when the ledger is closed; awaited in `submit`
        self._room = threading.Condition(self._lock)
        self._ready: collections.deque[Task] = collections.deque()  # in the order of leasing; some may be DONE since
        self._ready_bytes = 0
        self._tasks: dict[int, Task] = {}  # all that are not DONE
        self._held: dict[object, dict[int, Task]] = {}
        self._slots: set[object] = set()
        self._counts = {NEW: 0, READY: 0, LEASED: 0, DONE: 0}
        self._horizon: int | None = None
        self.ended = self.closed = False  # since `end` or `close` was called
        self.submitted = self.failed = self.retried = self.redelivered = self.dropped = 0

    def submit(self, tasks: Iterable[tuple[int, str]]) -> bool:
        """Add tasks as (id, JSON text). Blocks while READY_LIMIT tasks wait. Returns False when the ledger is closed."""
        new = {task_id: Task(task_id, text) for task_id, text in tasks}
        with self._lock:
            self._room.wait_for(lambda: self.closed or self._has_room())
            if self.closed:
                return False
            self._counts[NEW] += len(new)
            self.submitted += len(new)
            self._tasks.update(new)
            self._make_ready([*new.values()])
            return True

    def end(self) -> None:
        """There will be no more tasks."""
        with self._lock:
            self.ended = True

    def begin(self) -> None:
        """There will be tasks again, after `end`."""
        with self._lock:
            self.ended = False

    def close(self) -> None:
        """Lease nothing any more: from now on `lease` returns None."""
        with self._lock:
            self.closed = True
            self._tasks_ready.notify_all()
            self._room.notify_all()

    def over(self) -> bool:
        """Whether nothing is left to wait for: all is DONE, or the ledger was closed and nothing is LEASED."""
        with self._lock:
            if self.closed:
                return not self._counts[LEASED]
            return self.ended and not self._tasks

    def enlist(self, holder: object) -> None:
        """Count a holder among the slots between which the READY tasks are divided, until it is dropped."""
        with self._lock:
            self._slots.add(holder)

    def wait_ready(self, timeout: float) -> bool:
        """Block until `lease` would return something, for `timeout` seconds at most. Returns whether it would."""
        timeout = min(timeout, max(1.0, len(self._slots) / IDLE_POLLS))
        with self._lock:
            return self._tasks_ready.wait_for(lambda: self.closed or self._next_ready() is not None, timeout)

    def lease(self, holder: object, limit: int) -> list[Task] | None:
        """Up to `limit` tasks for a holder, [] when there is none yet, None when the ledger is closed. Never blocks.

        Slots share what is READY, but calls for a handful of tiny tasks would cost more than a fair share is worth. A
        task that was lost before, or may not be lost, is leased alone.
        """
        with self._lock:
            if self.closed:
                return None
            share = self._counts[READY] // (2 * len(self._slots) or 1)
            limit = min(limit, LEASE_LIMIT, self._batch or limit, max(share, limit // LEASE_FLOOR))
            lease = self._take(max(1, limit))
            for task in lease:
                task.holder = holder
            self._held.setdefault(holder, {}).update(zip([task.id for task in lease], lease))
            self._move(lease, LEASED)
            if self._has_room():
                self._room.notify_all()
            self._wake_next()
            return lease

    def release(self, holder: object, task_ids: Iterable[int]) -> None:
        """Take back tasks that the holder did not run, free of charge; those it does not hold are ignored."""
        with self._lock:
            held = self._held.get(holder, {})
            self._make_ready([held[task_id] for task_id in dict.fromkeys(task_ids) if task_id in held])

    def report(self, holder: object, outcomes: list[tuple[int, bool, str]]) -> tuple[list[Task], list[Task]]:
        """Take outcomes: (id, whether it is ok, the outcome).

        Returns the tasks that are settled by them, to be recorded now, and those that are retried.
        """
        settled: list[Task] = []
        retried: list[Task] = []
        with self._lock:
            for task_id, ok, outcome in outcomes:
                task = self._tasks.get(task_id)
                if task is None or (not ok and task.holder is not holder and task.failures < self._retries):
                    self.dropped += 1  # it has a record, or it is going to be run again anyway
                    continue
                task.ok, task.outcome = ok, outcome
                if not ok:
                    task.failures += 1
                    if task.failures <= self._retries:
                        retried.append(task)
                        self._make_ready([task])  # at once, so that a second outcome in the same report is late
                        continue
                    self.failed += 1
                settled.append(task)
                del self._tasks[task_id]  # at once, so that a second one is dropped
            self._move(settled, DONE)
            self.retried += len(retried)
        return settled, retried

    def drop(self, holder: object) -> tuple[list[Task], list[Task]]:
        """The holder's connection has ended: its tasks are READY again.

        Returns those, and the ones that were lost too often and are to be recorded as failed now.
        """
        again: list[Task] = []
        given_up: list[Task] = []
        with self._lock:
            for task in self._held.get(holder, {}).values():
                task.losses += 1
                (given_up if task.losses > self._redeliveries else again).append(task)
            for task in given_up:
                del self._tasks[task.id]
            self.failed += len(given_up)
            self.redelivered += len(again)
            self._move(given_up, DONE)
            self._make_ready(again)
            self._held.pop(holder, None)
            self._slots.discard(holder)
            self._wake_next()  # it may have been woken, and have died
        return again, given_up

    def set_horizon(self, task_id: int) -> None:
        """Lease no task from this id on, and always the one with the lowest id, since the others may wait for it."""
        with self._lock:
            if self._horizon is None:
                self._sort_ready()
            self._horizon = task_id
            self._wake_next()

    def counts(self) -> dict[str, int]:
        """How many tasks are in each state, and how many slots there are."""
        with self._lock:
            return {**self._counts, "slots": len(self._slots)}

    def audit(self) -> None:
        """Prove that no task is missing and none is counted twice. Raises AssertionError."""
        with self._lock:
            states = collections.Counter(task.state for task in self._tasks.values())
            held = [task for tasks in self._held.values() for task in tasks.values()]
            ready = [task for task in self._ready if task.state == READY]
            problems = {
                "a task is in none of the three states": self._counts[NEW],
                "submitted is not ready + leased + done": self.submitted - sum(self._counts.values()),
                "ready tasks are not counted right": states[READY] - self._counts[READY],
                "leased tasks are not counted right": states[LEASED] - self._counts[LEASED],
                "a ready task cannot be leased": len({task.id for task in ready}) - states[READY],
                "a task is queued twice": len(ready) - states[READY],
                "a leased task has no holder": len(held) - states[LEASED],
                "a holder has a task that is not leased": sum(task.state != LEASED for task in held),
            }
            found = [f"{problem} ({count})" for problem, count in problems.items() if count]
            if found:
                raise AssertionError("; ".join(found))

    # Called with the lock held

    def _move(self, tasks: list[Task], state: str) -> None:
        """The one gate: all of these tasks change to `state`, or none does. Who has leased one holds it while it is LEASED."""
        before = [task.state for task in tasks]
        for old in set(before):
            if (old, state) not in MOVES:
                raise IllegalMove(f"from {old} to {state}")
        for old in set(before):
            self._counts[old] -= before.count(old)
        self._counts[state] += len(tasks)
        for task in tasks:
            task.state = state
        if state != LEASED:
            for task in tasks:
                if task.holder is not None:
                    del self._held[task.holder][task.id]
                    task.holder = None

    def _make_ready(self, tasks: list[Task]) -> None:
        fresh = not tasks or tasks[0].state == NEW
        self._move(tasks, READY)
        self._ready_bytes += sum([len(task.text) for task in tasks])
        self._ready.extend(tasks)
        if self._horizon is not None and not fresh:
            self._sort_ready()
        self._wake_next()

    def _wake_next(self) -> None:
        """Wake one that waits for tasks; it wakes the next if it leaves some. So a thousand do not wake for a few tasks."""
        if self._next_ready():
            self._tasks_ready.notify()

    def _sort_ready(self) -> None:
        self._ready = collections.deque(sorted(self._ready, key=lambda task: task.id))

    def _has_room(self) -> bool:
        return self._counts[READY] < READY_LIMIT and self._ready_bytes < READY_BYTES

    def _next_ready(self) -> Task | None:
        """The task to lease next, if there is one that may be leased."""
        while self._ready and self._ready[0].state != READY:
            self._ready_bytes -= len(self._ready.popleft().text)  # settled by a late report
        if not self._ready or (self._horizon is not None and self._ready[0].id >= self._horizon):
            return None
        return self._ready[0]

    def _take(self, limit: int) -> list[Task]:
        """Up to `limit` of the tasks to lease next, while they are together small enough and need not be leased alone."""
        tasks: list[Task] = []
        room = LEASE_BYTES
        while len(tasks) < limit and (task := self._next_ready()):
            room -= len(task.text)
            alone = task.losses or not self._redeliveries
            if tasks and (alone or room < 0):
                break
            tasks.append(self._ready.popleft())
            self._ready_bytes -= len(task.text)
            if alone:
                break
        return tasks


# ---- queues: what workers and plain clients can call ---------------------------------------------------------------


class Peer:
    """The other end of one connection: the holder of its leases."""

    def __init__(self, name: str, conn: PlainConnection) -> None:
        self.name = name
        self.conn = conn
        self._poll = make_poll(conn.sock)
        self.enlisted_at: float | None = None  # as a slot
        self.taken: collections.deque[tuple[int, float]] = collections.deque()  # by `get`: task id, time of taking

    def is_gone(self) -> bool:
        """Whether it has closed the connection. Asked while it waits for an answer, so it has nothing to say."""
        return bool(self._poll(0))


_this_thread = threading.local()


def caller() -> Peer:
    """The peer whose request this thread serves."""
    peer: Peer = _this_thread.peer
    return peer


class TaskQueue:
    """What `get_task_queue` gives a client."""

    exposed = ("settings", "lease", "release", "beat", "get", "qsize")

    def __init__(self, master: TaskMaster) -> None:
        self._master = master
        self._ledger = master.ledger

    def settings(self, protocol: int) -> dict[str, Any]:
        """How to work for this master. The caller is a slot from now on: it may not be silent for SILENCE_LIMIT."""
        caller().conn.settle(SILENCE_LIMIT)
        self._master.welcome(caller(), protocol)
        return {"protocol": PROTOCOL, "run": self._master.run_id, "timeout": self._master.timeout}

    def lease(self, limit: int, wait: float) -> str | None:
        """Lines `ID TEXT` of up to `limit` tasks; "" when there was none for `wait` seconds, None when the job is over."""
        tasks = self._lease(int(limit), float(wait))
        return None if tasks is None else "\n".join([f"{task.id} {task.text}" for task in tasks])

    def release(self, task_ids: str) -> None:
        """Hand back tasks that were not run; their ids are separated by blanks."""
        self._ledger.release(caller(), map(int, task_ids.split()))

    def beat(self) -> None:
        """The caller lives: its connection has been heard of."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """One task's value, as of `queue.Queue.get`; its result is expected by `ResultQueue.put`.

        Raises queue.Empty when there is none in time, or when the job is over.
        """
        give_up_at = time.monotonic() + (1e9 if timeout is None else timeout)
        while True:
            tasks = self._lease(1, max(0.0, min(1.0, give_up_at - time.monotonic())) if block else 0.0)
            if tasks:
                caller().taken.append((tasks[0].id, time.perf_counter()))
                return json.loads(tasks[0].text)
            if tasks is None or not block or time.monotonic() >= give_up_at:
                raise queue.Empty

    def qsize(self) -> int:
        """How many tasks are READY."""
        return self._ledger.counts()[READY]

    def _lease(self, limit: int, wait: float) -> list[Task] | None:
        if wait > 0:
            ready = self._ledger.wait_ready(wait)
            if caller().is_gone():
                raise EOFError  # it died while it waited: a task given to it would count as lost
            if not ready:
                return []
        return self._ledger.lease(caller(), limit)


RESULT, ERROR, SECONDS = '"result": ', '"error": ', ', "seconds": '  # the members of an outcome


class ResultQueue:
    """What `get_result_queue` gives a client."""

    exposed = ("report", "put")

    def __init__(self, master: TaskMaster) -> None:
        self._master = master

    def report(self, run_id: str, busy: float, outcomes: str) -> None:
        """Take the seconds spent and a line of ids with a line for the outcome of each; returns when they are recorded.

        Outcomes of another run are dropped.
        """
        if run_id == self._master.run_id:
            self._master.report(caller(), parse_report(outcomes), float(busy))

    def put(self, result: Any) -> None:
        """Settle the oldest task that this connection took with `get`. Raises ValueError when there is none."""
        if not caller().taken:
            raise ValueError("put without get: this connection holds no task")
        task_id, taken_at = caller().taken.popleft()
        seconds = round(time.perf_counter() - taken_at, 6)
        try:
            outcome = f"{RESULT}{json.dumps(result, allow_nan=False)}{SECONDS}{seconds:.6f}"
        except (TypeError, ValueError, RecursionError) as error:
            outcome = format_error(type(error).__name__, str(error), seconds)
        self._master.report(caller(), [(task_id, outcome.startswith(RESULT), outcome)], seconds)


# An outcome whose result is a number, a short word or a string without escapes: most are, and need no closer look.
match_plain_outcome = re.compile(
    r'"result": (?:-?(?:0|[1-9][0-9]{0,300})(?:\.[0-9]+)?|true|false|null|"[^"\\\x00-\x1f]*"), '
    r'"seconds": (?:0|[1-9][0-9]{0,9})\.[0-9]{6}'
).fullmatch


def parse_report(text: str) -> list[tuple[int, bool, str]]:
    """The outcomes in a report: id, whether it is ok, and the outcome itself as two members of a record. Raises ValueError."""
    if text.count("\n") > OBJECT_LIMIT:
        raise ValueError("too many outcomes")
    first, *outcomes = text.split("\n")
    ids = [*map(int, first.split(" "))]
    if len(ids) != len(outcomes):
        raise ValueError("not as many outcomes as ids")
    outcomes = [outcome if match_plain_outcome(outcome) else check_outcome(outcome) for outcome in outcomes]
    return [*zip(ids, [outcome.startswith(RESULT) for outcome in outcomes], outcomes)]


def check_outcome(outcome: str) -> str:
    """An outcome goes into the results file as it is, so what is not sound becomes an error here."""
    try:
        if outcome.count("[") + outcome.count("{") > CONTAINER_LIMIT:
            raise ValueError(f"it has more than {CONTAINER_LIMIT} lists and objects: write it to a file")
        read_outcome(outcome)
    except (StopIteration, ValueError, RecursionError) as error:
        return format_error("ValueError", f"what the worker sent cannot be read: {error or 'it is no outcome'}")
    return outcome


def read_outcome(outcome: str) -> tuple[Any, float | None]:
    """The result or the error, and the seconds. Raises StopIteration, ValueError or RecursionError when it is no outcome."""
    start = RESULT if outcome.startswith(RESULT) else ERROR
    if not outcome.startswith(start):
        raise ValueError("it has neither a result nor an error")
    value, end = scan_json(outcome, len(start))
    if not outcome.startswith(SECONDS, end) or (start == ERROR and not isinstance(value, dict)):
        raise ValueError("it is not one value and the seconds")
    seconds, last = scan_json(outcome, end + len(SECONDS))
    if type(seconds) not in (int, float, type(None)) or last != len(outcome) or last - end > 40:
        raise ValueError("it does not tell the seconds")
    return value, seconds


def format_error(kind: str, message: str, seconds: float | None = None) -> str:
    """The outcome that is this error."""
    return ERROR + json.dumps({"type": kind, "message": message, "traceback": ""}) + SECONDS + json.dumps(seconds)


def load_outcome(task: Task) -> tuple[Any, Any, float | None]:
    """The result, the error and the seconds of a task. If it cannot be read here, that is an error."""
    try:
        value, seconds = read_outcome(task.outcome)
    except (StopIteration, ValueError, RecursionError) as error:
        return None, {"type": "ValueError", "message": f"the outcome cannot be read: {error}", "traceback": ""}, None
    return (value, None, seconds) if task.ok else (None, value, seconds)


def format_records(tasks: list[Task]) -> str:
    """Lines of the results file, put together from JSON texts: those of workers were checked when they came."""
    return "".join(
        [
            f'{{"id": {task.id}, "task": {task.text}, {task.outcome}, "worker": "{task.worker}", "attempts": {task.attempts}}}\n'
            for task in tasks
        ]
    )


# ---- server --------------------------------------------------------------------------------------------------------


class RequestConnection(PlainConnection):
    """The server's end of a connection, and the two languages that are spoken there.

    A worker of ours sends the words `QUEUE METHOD ARGUMENT ...` and a text, which is one argument more if it is not empty.
    A plain client sends what BaseManager makes of a call: a pickle. Each is answered in its own language.
    """

    _pickles = False  # how the last request came

    def recv(self) -> Any:
        """The next (id, method, args, kwds). Raises EOFError for what is not plain data, ValueError for what is no request."""
        data = self.recv_bytes()
        self._pickles = data[:1] == pickle.PROTO  # which begins no text
        try:
            request = load_plain(data) if self._pickles else read_call(data)
        except Exception as error:
            self.close()
            raise EOFError(f"the peer sent something that is not plain data ({error!r})") from None
        shape = [type(part) for part in request] if isinstance(request, tuple) else []
        if shape not in ([str, str, tuple, dict], [type(None), str, tuple, dict]):  # the server looks things up by it
            raise ValueError("this is no request")
        return request

    def send(self, answer: tuple[str, Any]) -> None:
        """Send (kind, value), the kind `#RETURN` or that of an error; to a worker as a text, as JSON, or as nothing."""
        kind, value = answer
        if self._pickles:
            self.send_bytes(pickle.dumps(answer, 4))
        elif value is None:
            self.send_bytes(pack(kind + " none"))
        elif isinstance(value, str):
            self.send_bytes(pack(kind + " text", value))
        else:
            self.send_bytes(pack(kind + " json", json.dumps(value, default=repr)))


def read_call(message: bytes) -> tuple[str, str, tuple[str, ...], dict[str, Any]]:
    """What a worker asks for, as BaseManager has it. Raises ValueError."""
    (name, method, *arguments), text = unpack(message)
    return name, method, (*arguments, text) if text else tuple(arguments), {}


# The plain clients' pickles: what they may hold, and how much.
PLAIN_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE "
    "BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT SETITEM SETITEMS MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET"
).split()
OBJECT_LIMIT = 200_000  # values in one of them; and outcomes in a worker's report


class PlainUnpickler(pickle._Unpickler):
    """Reads a pickle that holds nothing but plain data: no opcode that imports, calls or sets attributes is known.

    The documented way, refusing in `find_class`, would still let a peer make the C unpickler allocate gigabytes with
    a few bytes (CPython issue 115952); this one keeps its memo in a dictionary. Workers, who need speed, send text.
    """

    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in PLAIN_OPCODES}

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())  # type: ignore[attr-defined]

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._set_items([key, value])

    def _set_items(self, items: list[Any]) -> None:
        if not all(isinstance(key, (str, bytes, int, float, type(None))) for key in items[::2]):
            raise pickle.UnpicklingError("a key is no scalar")  # to hash tuples nested deeply would overflow the stack
        self.stack[-1].update(zip(items[::2], items[1::2]))  # type: ignore[attr-defined]

    dispatch.update({pickle.SETITEMS[0]: load_setitems, pickle.SETITEM[0]: load_setitem})  # type: ignore[dict-item]


def load_plain(data: bytes) -> Any:
    """The plain data in a pickle. Raises whatever comes when it is something else, or more than OBJECT_LIMIT objects."""
    if len(data) > OBJECT_LIMIT:  # every object takes a byte at least, and many more in memory
        import pickletools

        if any(count > OBJECT_LIMIT for count, _ in enumerate(pickletools.genops(data))):
            raise pickle.UnpicklingError("too many objects")
    return PlainUnpickler(io.BytesIO(data)).load()


class PlainListener:
    """Accepts connections; what `multiprocessing.managers` expects of a listener."""

    def __init__(self, address: tuple[str, int], backlog: int = BACKLOG) -> None:
        family, *_, bound = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._socket = socket.create_server(bound[:2], family=family, backlog=max(backlog, BACKLOG))
        self._socket.settimeout(LOOK_INTERVAL)  # close does not wake a thread that accepts
        self.address: tuple[str, int] = self._socket.getsockname()[:2]

    def accept(self) -> PlainConnection:
        """The next connection. Raises TimeoutError (an OSError) when there is none for LOOK_INTERVAL."""
        return RequestConnection(self._socket.accept()[0])

    def close(self) -> None:
        self._socket.close()


managers.listener_client["plain"] = (PlainListener, None)  # type: ignore[attr-defined]


class QueueServer(managers.Server):
    """The server of BaseManager, with what a hostile or dying peer could use against it taken away."""

    public = ["dummy", "create", "accept_connection", "incref", "decref"]  # no shutdown, nothing to look around with
    fallback_mapping: dict[str, Any] = {}  # nor `#GETVALUE`, which would pickle the object itself

    def __init__(self, registry: Any, address: Any, authkey: bytes, serializer: str) -> None:
        self.listener: PlainListener
        super().__init__(registry, address, authkey, serializer)
        self.stop_event = threading.Event()
        self._lock = threading.Lock()
        self._pending: dict[PlainConnection, None] = {}  # in the handshake, oldest first
        self._open: set[PlainConnection] = set()
        self._closed = threading.Condition(self._lock)  # notified when one is no longer open; awaited in `wait_closed`
        # The objects live as long as the server, under the name of their type, so there are no references to count
        # (the counts of BaseManager can reach 0 while another client connects).
        for typeid, (make, exposed, *_) in registry.items():
            self.id_to_obj[typeid] = (make(), set(exposed), {})

    def create(self, _conn: Any, typeid: str) -> tuple[str, tuple[str, ...]]:
        """The id and the methods of one of the queues."""
        return typeid, tuple(self.id_to_obj[typeid][1])

    def incref(self, _conn: Any, ident: str) -> None: ...

    def decref(self, _conn: Any, ident: str) -> None: ...

    def start(self, goodbye: Callable[[Peer], None], context: ssl.SSLContext | None) -> None:
        """Accept connections, in a thread of this process, so that the queues need not be pickled for a child.

        `goodbye` is called in the end of each, unless it ended before the peer had shown that it knows the key.
        """
        self._goodbye, self._context = goodbye, context
        threading.Thread(target=self.accepter, daemon=True).start()

    def wait_closed(self, timeout: float) -> None:
        """Block until every peer has closed its connection, for `timeout` seconds at most."""
        with self._lock:
            self._closed.wait_for(lambda: not self._open, timeout)

    def stop(self) -> None:
        """Close the port and every connection."""
        self.stop_event.set()
        self.listener.close()
        with self._lock:
            remaining = [*self._pending, *self._open]
        for conn in remaining:
            conn.close()

    def accepter(self) -> None:
        while not self.stop_event.is_set():
            try:
                conn = self.listener.accept()
            except OSError as error:
                if not isinstance(error, socket.timeout):  # out of file descriptors, say
                    self.stop_event.wait(LOOK_INTERVAL)
                continue
            with self._lock:
                self._pending[conn] = None
                surplus = [*self._pending][:-PENDING_LIMIT]
            for oldest in surplus:
                self._forget(oldest)
            try:
                threading.Thread(target=self.handle_request, args=(conn,), daemon=True).start()
            except RuntimeError:  # out of threads
                self._forget(conn)

    def handle_request(self, conn: Any) -> None:
        """Serve a connection to its end, in a thread of its own; then drop what it held."""
        try:
            if self._context:
                conn.secure(self._context, server_side=True)
            super().handle_request(conn)
        except (SystemExit, OSError, EOFError):
            pass
        finally:
            if hasattr(_this_thread, "peer"):
                self._goodbye(caller())
            self._forget(conn)

    def accept_connection(self, conn: Any, name: str) -> None:
        """The handshake is done, and the peer stays: `name` is what it calls itself."""
        with self._lock:
            self._pending.pop(conn, None)
            self._open.add(conn)
        host = conn.sock.getpeername()[0]
        name = re.sub(r"[^!-~]|[\"\\]", "?", str(name)[:100])  # it goes into records and onto terminals
        _this_thread.peer = Peer(name if "/" in name else f"{host}/{name}", conn)
        conn.settle(None)  # a plain client may be silent while it works; only the system's keepalive watches it
        super().accept_connection(conn, name)

    def _forget(self, conn: PlainConnection) -> None:
        with self._lock:
            self._pending.pop(conn, None)
            self._open.discard(conn)
            self._closed.notify_all()
        conn.close()


class QueueManager(managers.BaseManager):
    """The tutorial's manager; each master makes a class of its own from it, to register its own two queues."""

    def get_server(self) -> QueueServer:
        return QueueServer(self._registry, self._address, self._authkey, self._serializer)  # type: ignore[attr-defined]


def make_server(master: TaskMaster, address: tuple[str, int], authkey: bytes) -> QueueServer:
    """Bind the port. Raises Failure when that cannot be."""

    class Manager(QueueManager):
        pass

    tasks, results = TaskQueue(master), ResultQueue(master)
    Manager.register("get_task_queue", callable=lambda: tasks, exposed=TaskQueue.exposed)
    Manager.register("get_result_queue", callable=lambda: results, exposed=ResultQueue.exposed)
    try:
        return Manager(address, authkey, serializer="plain").get_server()
    except OSError as error:
        hint = "is --host one of this machine?"
        if error.errno == errno.EADDRINUSE:
            error.strerror = os.strerror(error.errno)  # without what Python adds
            hint = "stop what listens there, on macOS perhaps AirPlay Receiver, or choose another --port"
        raise Failure(f"cannot listen on {show_address(address)}: {explain_error(error)} ({hint})", 3) from None


# ---- input and output ----------------------------------------------------------------------------------------------


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# The scanner that json.loads calls: a third of the time, without what stands around it there.
scan_json = json.JSONDecoder(parse_constant=refuse_constant).scan_once  # type: ignore[attr-defined]


def check_json(text: str) -> str:
    """The JSON text of one value, without the white space around it. Raises ValueError when it is none."""
    try:
        if scan_json(text, 0)[1] == len(text):
            return text
    except (StopIteration, ValueError, RecursionError):
        pass
    text = text.strip(" \t\r\n")
    try:
        json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        shown = text if len(text) < 40 else text[:40] + "..."
        raise ValueError(f"{shown} is not JSON: {error.msg.lower()} at column {error.colno} (--text takes it as it is)") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return text


def parse_line(line: bytes, as_text: bool) -> str:
    """The JSON text of the task on a line, "" when it is blank. Raises ValueError."""
    if len(line) > TEXT_LIMIT:
        raise ValueError(f"the task has {len(line)} bytes or more, at most {TEXT_LIMIT} are possible: put a path there instead")
    if not line.strip():
        return ""
    if not as_text:
        return check_json(line.decode("utf-8"))
    text = json.dumps(line.rstrip(b"\r").decode("utf-8", "surrogateescape"))
    return parse_line(text.encode(), False) if len(text) > TEXT_LIMIT else text  # it may have grown too long


def parse_plain_lines(lines: list[bytes]) -> list[str]:
    """The JSON texts if each line is one value and nothing else, as nearly always; [] when they need a closer look."""
    try:
        texts = b"\n".join(lines).decode().split("\n")
        ends = [end for _, end in map(scan_json, texts, itertools.repeat(0))]
    except (ValueError, RecursionError):
        return []
    return texts if ends == [*map(len, texts)] and max(ends) <= TEXT_LIMIT else []


def read_tasks(descriptor: int, name: str, as_text: bool, results: ResultsFile | None) -> Iterator[list[str]]:
    """The tasks of a stream of lines, in batches as they arrive; "" for those that have a record in `results`.

    Raises Failure at a bad line, after the tasks before it.
    """
    number = task_id = 0
    for lines in read_lines(descriptor, name):
        tasks = [] if as_text or results else parse_plain_lines(lines)
        number, task_id = number + len(tasks), task_id + len(tasks)
        for line in lines[len(tasks) :]:
            number += 1
            try:
                task = parse_line(line, as_text)
                if task:
                    tasks.append("" if results and results.has(task_id, task) else task)
                    task_id += 1
            except ValueError as error:
                yield tasks
                raise Failure(f"{name}, line {number}: {error}") from None
            except Refusal as refusal:
                raise Refusal(f"{name}, line {number}: {refusal}") from None
        yield tasks
    if results and task_id < len(results.kept):
        raise Refusal(f"{name}: the results file {results.path} belongs to other tasks, it has more than these {task_id}")


def read_lines(descriptor: int, name: str) -> Iterator[list[bytes]]:
    """Lines without their end, in batches as they arrive; a line that is too long comes cut, with what was read of it.

    Read from the descriptor, since a thread that waits in sys.stdin.buffer would crash the interpreter at its end.
    Raises Failure.
    """
    rest: list[bytes] = []
    size = 0
    try:
        while chunk := os.read(descriptor, 1 << 16):
            rest.append(chunk)
            size += len(chunk)
            if b"\n" in chunk or size > TEXT_LIMIT:
                *lines, last = b"".join(rest).split(b"\n")
                if len(last) > TEXT_LIMIT:
                    lines, last = [*lines, last], b""
                rest, size = [last], len(last)
                yield lines
    except OSError as error:
        raise Failure(f"cannot read {name}: {explain_error(error)}") from None
    if size:
        yield [b"".join(rest)]


class Refusal(Failure):
    """The input is not the one that it should be: the job does not even finish what was read."""


class ResultsFile:
    """The records, appended one line each: the memory of the job.

    Raises Failure when the file cannot be used.
    """

    def __init__(self, path: str, resume: bool) -> None:
        self.path = os.path.realpath(path)
        self._dirty = False  # it has lines that are not kept; they stay until there is something to write
        self.kept = array.array("Q")  # by task id: 0, or the digest of a task that need not run again
        try:
            self._open()
            size = os.fstat(self._fd).st_size
            if size and not resume:
                raise Failure(f"the results file {path} is not empty: name another, or carry on with --resume")
            if size:
                self._resume()
        except OSError as error:
            raise Failure(f"cannot write the results file {path}: {explain_error(error)} (name one that can be made)") from None
        self._unsynced_since: float | None = None

    def write(self, tasks: list[Task]) -> None:
        """Append the records of tasks; when this returns, they survive the end of this process. Raises OSError."""
        data = memoryview(format_records(tasks).encode("utf-8", "replace"))
        if self._dirty:
            self._rewrite(choose_results)
            self._dirty = False
        while data:
            data = data[os.write(self._fd, data) :]
        self._unsynced_since = self._unsynced_since or time.monotonic()

    def sync(self, interval: float = SYNC_INTERVAL) -> None:
        """Make what was written survive a power cut, if it has waited for `interval` seconds. Raises OSError."""
        since = self._unsynced_since
        if since and self._regular and time.monotonic() - since >= interval:
            self._unsynced_since = None
            os.fsync(self._fd)

    def close(self) -> None:
        self.sync(0.0)
        os.close(self._fd)

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        if self._regular:
            lock_file(self._fd, self.path)

    def _resume(self) -> None:
        """Note the records that succeeded."""
        with open(self.path, "rb") as old:
            for number, line in enumerate(old, 1):
                try:
                    record = load_record(line.decode()) if line.endswith(b"\n") else {}  # {}: it is torn
                except ValueError:
                    raise Failure(f"{self.path}, line {number}: this is not a record, so it cannot be resumed") from None
                if "result" in record:
                    self.kept.extend([0] * (record["id"] + 1 - len(self.kept)))
                    self.kept[record["id"]] = digest_task(record["task"])
                else:
                    self._dirty = True

    def sort(self) -> None:
        """Put the records in the order of their ids. Raises OSError."""
        self._rewrite(sort_records)

    def _rewrite(self, choose: Callable[[BinaryIO], Iterator[bytes]]) -> None:
        """Write the file anew with the lines that are chosen; it stays locked until the new one is."""
        with open(self.path, "rb") as old, open(self.path + ".new", "wb") as new:
            new.writelines(choose(old))
            new.flush()
            os.fsync(new.fileno())
        shutil.copymode(self.path, new.name)
        locked = self._fd
        os.replace(new.name, self.path)
        self._open()
        os.close(locked)

    def has(self, task_id: int, text: str) -> bool:
        """Whether a task has a record that is kept. Raises Refusal when that is of another task."""
        if task_id >= len(self.kept) or not self.kept[task_id]:
            return False
        if self.kept[task_id] != digest_task(json.loads(text)):
            raise Refusal(f"the results file {self.path} belongs to other tasks, its task {task_id} is not {text[:60]}")
        return True


def choose_results(lines: BinaryIO) -> Iterator[bytes]:
    """All but the records that failed, and a torn last line."""
    return (line for line in lines if line.endswith(b"\n") and "result" in load_record(line.decode()))


def sort_records(lines: BinaryIO) -> Iterator[bytes]:
    """The records in the order of their ids."""
    offsets = array.array("q")  # by task id; -1 where there is no record
    offset = 0
    for line in lines:
        task_id = int(line[7 : line.index(b",")])
        offsets.extend([-1] * (task_id + 1 - len(offsets)))
        offsets[task_id] = offset
        offset += len(line)
    for offset in offsets:
        if offset >= 0:
            lines.seek(offset)
            yield lines.readline()


def load_record(line: str) -> dict[str, Any]:
    """A record; but for a result that is nested too deeply, None stands for it. Raises ValueError when it is none."""
    try:
        record = json.loads(line)
    except RecursionError:
        start = re.match(r'\{"id": (\d+), "task": ', line)
        if not start:
            raise ValueError("not a record") from None
        task, end = scan_json(line, start.end())
        record = {"id": int(start.group(1)), "task": task, "result" if line.startswith(', "result": ', end) else "error": None}
    if not isinstance(record, dict) or not isinstance(record.get("id"), int) or "task" not in record:
        raise ValueError("not a record")
    return record


def digest_task(value: Any) -> int:
    """64 bits that stand for a task, however it was written; never 0."""
    import hashlib  # here, as it would take its time at each start

    text = json.dumps(value, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") or 1


def lock_file(fd: int, path: str) -> None:
    """Keep other masters out until `fd` is closed. Raises Failure when one is there."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(fd, 1 << 40, os.SEEK_SET)  # a byte that nobody reads: locks on Windows keep readers out
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Failure(f"the results file {path} is being written by another master: name another") from None


def show_value(text: str) -> str:
    """A value for a person: a string as it is, any other as JSON."""
    return str(json.loads(text)) if text.startswith('"') else text


class Printer:
    """The lines on standard output, in the tutorial's words."""

    _tried = False

    def put(self, batches: Iterator[list[str]]) -> Iterator[list[str]]:
        """The tasks, each said before it can be leased."""
        for texts in batches:
            console.write("".join([f"Put task {show_value(text)}...\n" for text in texts]))
            yield texts
        self._try_get()

    def _try_get(self) -> None:
        """Said once: when all tasks are put, or before the first result."""
        with console:
            if not self._tried:
                console.write("Try get results...\n")
            self._tried = True

    def write(self, tasks: list[Task]) -> None:
        """The results; errors are told on standard error."""
        self._try_get()
        texts = [task.outcome[len(RESULT) :].rpartition(SECONDS)[0] for task in tasks if task.ok]
        console.write("".join([f"Result: {show_value(text)}\n" for text in texts]))


class Sequencer:
    """Passes settled tasks on in the order of their ids, and holds leasing back while too many wait for their turn."""

    def __init__(self, ledger: Ledger, sink: Sink, kept: Sequence[int]) -> None:
        self._ledger, self._sink, self._kept = ledger, sink, kept
        self._waiting: dict[int, Task] = {}
        self._size = 0  # characters that wait
        self._next = 0
        self._pass_on()

    def write(self, tasks: list[Task]) -> None:
        self._waiting.update([(task.id, task) for task in tasks])
        self._size += sum([len(task.outcome) for task in tasks])
        self._pass_on()

    def _pass_on(self) -> None:
        tasks: list[Task] = []
        while self._next in self._waiting or (self._next < len(self._kept) and self._kept[self._next]):
            if self._next in self._waiting:
                tasks.append(self._waiting.pop(self._next))
            self._next += 1
        self._size -= sum([len(task.outcome) for task in tasks])
        if tasks:
            self._sink(tasks)
        self._ledger.set_horizon(self._next + (WINDOW if self._size < WINDOW_BYTES else 1))


# ---- master --------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """What became of one task. `ok` tells whether there is a result or an error (type, message, traceback)."""

    id: int
    task: Any
    result: Any
    error: dict[str, str] | None
    seconds: float | None
    worker: str
    attempts: int

    @property
    def ok(self) -> bool:
        return self.error is None


class WorkerStats:
    """What the summary says of a worker."""

    def __init__(self) -> None:
        self.slots = self.processes = self.tasks = 0  # connected now, at most, with an outcome
        self.busy = self.connected = 0.0  # seconds, of all slots together

    def describe(self) -> str:
        share = f", {min(1.0, self.busy / self.connected):.0%} busy" if self.connected else ""
        tasks = count_things(self.tasks, "task")
        return f"{count_things(self.processes, 'process')}, {tasks}{share}" if self.processes else tasks


def count_things(number: int, noun: str) -> str:
    """`1 task`, `2 tasks`, `2 processes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


class LocalWorker:
    """The task_worker.py beside this file, run on this host for as long as the job lasts."""

    def __init__(self, processes: int, what: list[str]) -> None:
        if not os.path.exists(WORKER_FILE):
            raise Failure(f"--workers needs task_worker.py beside this file: copy it to {os.path.dirname(WORKER_FILE)}")
        self._command = [sys.executable, WORKER_FILE, "--processes", str(processes), "--wait", "5", *what]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, address: tuple[str, int], authkey: bytes) -> None:
        """Start the process. The key travels in its environment; what it prints goes to our standard error."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
        self._process = subprocess.Popen(
            [*self._command, "--host", host, "--port", str(address[1])],
            env={**os.environ, "TASK_AUTHKEY": os.fsdecode(authkey)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if console.is_terminal else 2,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for the master, which then drains
        )
        if self._process.stdout:
            threading.Thread(target=self._relay, args=(self._process.stdout,), daemon=True).start()

    def _relay(self, stream: Any) -> None:
        """Write what it prints so that it does not run into the line of progress."""
        for line in stream:
            with console:
                write_error(line.decode("utf-8", "replace"))

    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll() if self._process else None

    def kill(self) -> None:
        """Kill it; its children see that and end, too."""
        if self._process:
            self._process.kill()

    def stop(self, grace: float) -> None:
        """Give it `grace` seconds to leave by itself."""
        if self._process:
            timer = threading.Timer(grace, self._process.kill)
            timer.start()
            self._process.wait()  # with a timeout it would look but every 50 ms
            timer.cancel()


class TaskMaster:
    """A task farm: the queues, their server, and local workers if wanted; a context manager.

    `port` 0 takes a free one (`address` tells which). Without an `authkey` the key comes from where the command line
    finds it. `workers`, `function` and the limits are those of the command line; `quiet` is for the local workers; `log`
    is called with each line about workers, retries and failures. Raises Failure when it cannot start.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 5000,
        authkey: bytes | None = None,
        *,
        workers: int = 0,
        function: str | None = None,
        command: str | None = None,
        timeout: float | None = None,
        retries: int = 0,
        redeliveries: int = 2,
        max_failures: int | None = None,
        batch: int | None = None,
        tls: bool = False,
        quiet: bool = True,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.address = (host, port)
        self.timeout = timeout
        self.run_id = os.urandom(8).hex()
        self.ledger = Ledger(retries, redeliveries, batch)
        self.problem: BaseException | None = None  # why the job ends early
        self.done = threading.Event()  # nothing is left to wait for
        self.recorded = 0
        self.failures: list[str] = []  # the first few, for the summary
        self._authkey = find_key() if authkey is None else check_key(authkey, "authkey")
        self._max_failures, self._log = max_failures, log
        self._context = make_tls_context(self._authkey, server_side=True) if tls else None
        what = ["--function", function] if function else ["--command", command] if command else []
        if what and not workers:
            raise Failure("function and command are for local workers, of which there are none: say how many")
        self.local = LocalWorker(workers, what + ["--tls"] * tls + ["--quiet"] * quiet) if workers else None
        self._restarts = 0
        self._recording = threading.Lock()  # guards the output, and the order of deciding and writing
        self._sink: Sink = lambda tasks: None
        self._place = ""  # where the sink writes
        self.workers: dict[str, WorkerStats] = collections.defaultdict(WorkerStats)  # by name
        self.broken: BaseException | None = None  # what the sink raised: nothing can be recorded any more
        self._strangers: set[str] = set()  # workers of another version
        self._closing = False
        self._next_id = 0

    def __enter__(self) -> TaskMaster:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Open the port and start the local workers. Raises Failure."""
        self._server = make_server(self, self.address, self._authkey)
        self.address = self._server.listener.address
        if len(self._authkey) < 16 and not is_loopback(self.address[0]):
            self._server.stop()
            raise Failure(
                f"the key has {len(self._authkey)} bytes, too few to listen on {self.address[0]}: use 16 random bytes or more"
            )
        self._interpreter = gc.get_threshold(), sys.getswitchinterval()
        gc.set_threshold(100_000, 50, 100)  # tasks come and go by the thousand, and make no cycles: a quarter less time
        sys.setswitchinterval(0.0005)  # seconds; slots wait for the threads that answer them, not for the one that reads
        self._server.start(self.goodbye, self._context)
        if self.local:
            self.local.start(self.address, self._authkey)

    def close(self) -> None:
        """Let the workers leave, or lose them when the job is not done; close the port. Blocks some seconds at most."""
        self._closing = True
        unfinished = bool(self.broken) or not self.ledger.over()
        workers = self.count_workers()
        self.ledger.close()
        if not unfinished:
            self._server.wait_closed(GOODBYE)
        self._server.stop()
        gc.set_threshold(*self._interpreter[0])
        sys.setswitchinterval(self._interpreter[1])
        if self.local:
            self.local.stop(0.0 if unfinished or not workers else WORKER_GRACE)

    def run(self, tasks: Iterable[Any]) -> Iterator[Record]:
        """Run tasks (any values that JSON has), read lazily; yields their records as they come, in any order.

        The ids count from 0 in each call; a call that is left early ends the farm. Waits for ever while there is no
        worker. Raises Failure when the job cannot go on, TypeError or ValueError for a task that is not JSON, after the
        records of those before it.
        """
        if self.ledger.closed:
            raise Failure("this farm was closed, or a run of it was left early: make another")
        settled: queue.SimpleQueue[list[Task]] = queue.SimpleQueue()
        first, seen = self._next_id, 0
        self.ledger.set_horizon(first + WINDOW)
        self.begin(encode_tasks(tasks), settled.put)
        try:
            while True:
                finished = self.done.is_set()  # asked before looking for the last records
                with contextlib.suppress(queue.Empty):
                    tasks = settled.get(timeout=0 if finished else 0.01)
                    yield from make_records(tasks, first)
                    seen += len(tasks)
                    self.ledger.set_horizon(first + seen + WINDOW)
                    continue
                if finished:
                    break
                self.look()
        finally:
            if not self.done.is_set():
                self.ledger.close()  # the caller has lost interest
        if self.problem:
            raise self.problem

    def begin(self, batches: Iterable[list[str]], sink: Sink, place: str = "standard output") -> None:
        """Start reading tasks, as JSON texts; `sink` gets those that are settled, and an OSError of it ends the job.

        `place` is where it writes. `done` is set in the end. Until then `look` must be called now and then.
        """
        self._sink, self._place = sink, place
        self.problem = None
        self.done.clear()
        self.ledger.begin()
        threading.Thread(target=self._read, args=(batches,), daemon=True).start()

    def _read(self, batches: Iterable[list[str]]) -> None:
        try:
            for texts in batches:
                numbered = enumerate(texts, self._next_id)
                self._next_id += len(texts)
                if not self.ledger.submit([pair for pair in numbered if pair[1]]):
                    break
        except Refusal as refusal:
            self.fail(refusal)
        except BaseException as error:  # what the caller's own iterable raises is for the caller
            self.problem = self.problem or error
        self.ledger.end()
        self._check_done()

    def count_workers(self) -> int:
        """How many workers are connected."""
        return sum(stats.slots > 0 for stats in list(self.workers.values()))

    def drain(self) -> None:
        """Lease no more tasks; `done` is set when those that are leased have their outcomes."""
        self.ledger.close()
        self._check_done()

    def guard(self, write: Callable[..., None], *args: Any) -> None:
        """Call something that writes results. What it raises ends the job, and is raised again."""
        try:
            write(*args)
        except Exception as error:
            self.broken = error
            if isinstance(error, OSError):
                place = error.filename or self._place
                error = Failure(
                    f"cannot write {place}: {explain_error(error)} (nothing that is missing there was acknowledged)", 1
                )
            self.fail(error)
            raise

    def look(self) -> None:
        """See after the local workers."""
        if not self.local or self.done.is_set() or (status := self.local.status()) is None:
            return
        self._restarts += 1
        if status in (2, 3) or self._restarts > 5:
            self.fail(Failure(f"the local worker ended with exit status {status}, see above", 2 if status == 2 else 1))
        else:
            self._log(f"the local worker ended with exit status {status}: starting another")
            self.local.start(self.address, self._authkey)

    def fail(self, problem: BaseException) -> None:
        """End the job now, with what is recorded."""
        self.problem = self.problem or problem
        self.ledger.close()
        self.done.set()

    # Called by the server's threads

    def welcome(self, peer: Peer, protocol: int) -> None:
        """A slot has connected. One of another version is told so by its own end, and gets nothing."""
        if int(protocol) != PROTOCOL:
            with self._recording:
                first = peer.name not in self._strangers
                self._strangers.add(peer.name)
            if first:
                self._log(
                    f"worker {peer.name} speaks protocol {int(protocol)}, this master {PROTOCOL}: copy task_worker.py to its host"
                )
            return
        self.ledger.enlist(peer)
        with self._recording:
            stats = self.workers[peer.name]
            stats.slots += 1
            stats.processes = max(stats.processes, stats.slots)
            peer.enlisted_at = time.monotonic()
            first = stats.slots == 1
        if first:
            self._log(f"worker {peer.name} connected")

    def report(self, peer: Peer, outcomes: list[tuple[int, bool, str]], busy: float) -> None:
        """Record the outcomes that settle a task. When this returns, they are acknowledged."""
        with self._recording:
            if self.broken:
                raise self.broken  # no acknowledgement
            settled, retried = self.ledger.report(peer, outcomes)
            self._record(settled, peer.name)
            self.workers[peer.name].tasks += len(outcomes)
            self.workers[peer.name].busy += busy
        self._restarts = 0
        for task in retried:
            self._log(f"task {task.id} is retried: {explain_outcome(task)} on {peer.name}, attempt {task.attempts}")
        self._check_done()

    def goodbye(self, peer: Peer) -> None:
        """A connection has ended: what it held is READY again, or given up."""
        with self._recording:
            again, given_up = self.ledger.drop(peer)
            with contextlib.suppress(OSError):  # noted as the problem that ends the job
                for task in given_up:
                    times = "once" if task.losses == 1 else f"{task.losses} times"
                    task.outcome = format_error("WorkerLost", f"its worker was lost {times}; it may have run")
                self._record(given_up, peer.name)
            last = peer.enlisted_at is not None and self._count_out(peer.name, peer.enlisted_at)
        if again:
            shown = ", ".join([f"{task.id} (attempt {task.attempts})" for task in again[:5]])
            more = f" and {len(again) - 5} more" if len(again) > 5 else ""
            self._log(f"redelivered since {peer.name} was lost: task {shown}{more}")
        if last and not self._closing:
            self._log(f"worker {peer.name} disconnected")
        self._check_done()

    def _count_out(self, name: str, since: float) -> bool:
        """A slot of a worker has gone; returns whether it was the last. Called with the output's lock held."""
        stats = self.workers[name]
        stats.slots -= 1
        stats.connected += time.monotonic() - since
        return not stats.slots

    def _record(self, settled: list[Task], name: str) -> None:
        """Write records; called with the output's lock held."""
        if not settled or self.broken:  # then a line may be torn, and nothing may follow it
            return
        for task in settled:
            task.worker = name
        self.guard(self._sink, settled)
        self.recorded += len(settled)
        for task in [task for task in settled if not task.ok]:
            text = f"task {task.id} failed: {explain_outcome(task)} on {name}, attempt {task.attempts}"
            self._log(text)
            if len(self.failures) < 5:
                self.failures.append(text)
        if self._max_failures and self.ledger.failed >= self._max_failures and not self.problem:
            self.problem = Failure(f"stopped: {self.ledger.failed} tasks have failed, as --max-failures allows", 1)
            self.ledger.close()

    def _check_done(self) -> None:
        if self.ledger.over():
            self.done.set()


def explain_outcome(task: Task) -> str:
    """The error of a task, for a person, on one line."""
    try:
        _, error, _ = load_outcome(task)
        text = f"{error['type']}: {error['message']}"
    except (KeyError, TypeError):
        text = task.outcome
    text = " ".join(text.split())
    return text if len(text) < 200 else f"{text[:80]} ... {text[-110:]}"  # the reason is often in the end


def encode_tasks(tasks: Iterable[Any]) -> Iterator[list[str]]:
    """Tasks as JSON texts: in batches if all of them are there, else singly as they come. Raises TypeError, ValueError."""
    encode = json.JSONEncoder(allow_nan=False).encode
    texts: list[str] = []
    size = 1000 if isinstance(tasks, Sequence) else 1
    try:
        for task in tasks:
            texts.append(repr(task) if type(task) is int else encode(task))  # as the worker does, for time
            if len(texts) == size:
                yield texts
                texts = []
    except Exception:  # the tasks before it count
        yield texts
        raise
    yield texts


def make_records(tasks: list[Task], first: int) -> Iterable[Record]:
    """Settled tasks as Records, their ids counted from `first`: column by column, which takes half the time."""
    columns = (
        [task.id - first for task in tasks],
        [value for value, _ in map(scan_json, [task.text for task in tasks], itertools.repeat(0))],
        *(load_results(tasks) or zip(*map(load_outcome, tasks))),
        [task.worker for task in tasks],
        [task.attempts for task in tasks],
    )
    return map(functools.partial(tuple.__new__, Record), zip(*columns))


parse_seconds = functools.lru_cache(1000)(float)  # tiny tasks, of which there are most, take one of few times


def load_results(tasks: list[Task]) -> tuple[Iterable[Any], ...] | None:
    """The columns result, error and seconds, if all these tasks have results and times, as nearly always."""
    texts = [task.outcome for task in tasks if task.ok]
    with contextlib.suppress(ValueError, RecursionError):
        read = [*map(scan_json, texts, itertools.repeat(len(RESULT)))]
        seconds = [parse_seconds(text[end + len(SECONDS) :]) for text, (_, end) in zip(texts, read)]
        if len(seconds) == len(tasks):
            return [result for result, _ in read], itertools.repeat(None), seconds
    return None


def find_key(path: str | None = None) -> bytes:
    """The key, made if none is there. Raises Failure."""
    try:
        return read_key(path)
    except FileNotFoundError:
        path = os.path.expanduser(DEFAULT_KEY_FILE)
    try:
        with open(path, "x", opener=functools.partial(os.open, mode=0o600)) as file:
            file.write(os.urandom(32).hex() + "\n")
        say(f"made the key file {path}: workers on other hosts need a copy")
    except FileExistsError:  # another master was faster
        pass
    except OSError as error:
        raise Failure(f"cannot make the key file {path}: {explain_error(error)}") from None
    return read_key(path)


# ---- command line --------------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    port = bounded(int, 0, 65535, "a port: it takes 0 (any free one) to 65535")
    count = bounded(int, 1, 1e9, "a count: it takes a whole number from 1")
    number = bounded(int, 0, 1e9, "a number: it takes a whole number from 0")
    seconds = bounded(float, 0.001, 1e9, "a time: it takes seconds, at least 0.001")
    parser = Parser(
        prog="task_master",
        usage="%(prog)s [OPTION ...] [TASK ...]",
        description="Serve tasks to task_workers on this and other hosts, and collect the outcomes.",
        epilog="examples:\n  task_master.py --workers 2\n  task_master.py --tasks mails.jsonl \\\n"
        "    --results sent.jsonl --workers 4 \\\n    --function mailer:send\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors, and where it listens")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    group = parser.add_argument_group("tasks")
    group.add_argument("task", nargs="*", metavar="TASK", help="a JSON value (default: ten random integers)")
    group.add_argument("--tasks", metavar="FILE", help="JSON Lines, one task a line; - is standard input, read as it arrives")
    group.add_argument("--text", action="store_true", help="a task is a line of text, not of JSON")
    group = parser.add_argument_group("results")
    group.add_argument("--results", metavar="FILE", help="append a record of each task; - is standard output")
    group.add_argument("--resume", action="store_true", help="carry on with the job of the results file")
    group.add_argument("--ordered", action="store_true", help="in the order of the tasks")
    group = parser.add_argument_group("workers on this host")
    group.add_argument("--workers", type=count, default=0, metavar="N", help="start so many processes, too")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--function", metavar="MODULE:NAME", help="called with each task (default: the square of a number)")
    what.add_argument("--command", metavar="TEMPLATE", help="run in a shell for each task, {} replaced by the quoted task")
    group = parser.add_argument_group("limits")
    group.add_argument("--timeout", type=seconds, metavar="SECONDS", help="that a task may take (default: any)")
    group.add_argument("--retries", type=number, default=0, metavar="N", help="of a task, after errors (default: %(default)s)")
    group.add_argument(
        "--redeliveries", type=number, default=2, metavar="N", help="of a task, after lost workers (default: %(default)s)"
    )
    group.add_argument("--max-failures", type=count, metavar="N", help="failed tasks that end the job (default: any)")
    group.add_argument("--batch", type=count, metavar="N", help="tasks handed out at a time, at most (default: adaptive)")
    group = parser.add_argument_group("where workers reach it")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s; 0.0.0.0: any)")
    group.add_argument("--port", type=port, default=5000, help="port to listen on (default: %(default)s; 0: a free one)")
    group.add_argument("--authkey-file", metavar="FILE", help=f"the key (default: {DEFAULT_KEY_FILE}, made if missing)")
    group.add_argument("--tls", action="store_true", help="encrypt with the key (Python 3.13 or newer on both ends)")
    return parser


def open_input(options: argparse.Namespace, results: ResultsFile | None) -> Iterator[list[str]]:
    """The tasks as JSON texts, in batches, "" for those with a record in `results`. Raises Failure when there can be none."""
    if options.task:
        try:
            texts = [json.dumps(text) if options.text else check_json(text) for text in options.task]
            texts = [text.replace("\n", " ").replace("\r", " ") for text in texts]  # JSON may have several lines
            return iter([["" if results and results.has(task_id, text) else text for task_id, text in enumerate(texts)]])
        except ValueError as error:
            raise Failure(f"TASK {' '.join(options.task)[:60]}: {error}") from None
    if options.tasks is None:
        return iter([[str(random.randint(0, 10000)) for _ in range(10)]])
    try:
        descriptor = os.dup(0) if options.tasks == "-" else os.open(options.tasks, os.O_RDONLY)
    except OSError as error:
        raise Failure(f"cannot read the tasks file {options.tasks}: {explain_error(error)} (is the path right?)") from None
    return read_tasks(descriptor, "standard input" if options.tasks == "-" else options.tasks, options.text, results)


def verify_tasks(options: argparse.Namespace, results: ResultsFile) -> None:
    """Before a job is resumed: compare the tasks of a file with the records that are kept. Raises Failure when they differ.

    A stream can be read only once, so there the comparison is made on the way.
    """
    if options.tasks and os.path.isfile(options.tasks):
        number = 0
        for texts in open_input(options, results):
            number += len(texts)
            if number >= len(results.kept):
                break


def print_records(tasks: list[Task]) -> None:
    """The sink for --results -: UTF-8, whatever the terminal is set to."""
    with console:
        sys.stdout.buffer.write(format_records(tasks).encode("utf-8", "replace"))
        sys.stdout.buffer.flush()


def show_time(seconds: float) -> str:
    """A time for a person: 7.5 s, 3:07, 12:40:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{seconds:.1f} s" if seconds < 60 else f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_rate(rate: float) -> str:
    """A rate for a person: 1500, 15, 1.5, 0.015."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


class Job:
    """One run of the command line."""

    def __init__(self, options: argparse.Namespace, argv: list[str]) -> None:
        self._options, self._argv = options, argv
        self._log: Callable[[str], None] = (lambda text: None) if options.quiet else say
        self._stopped_by = 0  # signal number
        self._draining = False
        self._began_at = time.monotonic()
        self._history: collections.deque[tuple[float, int]] = collections.deque()  # times, and what was DONE by then
        same = "host port workers function command timeout retries redeliveries max_failures batch tls quiet".split()
        limits: dict[str, Any] = {name: getattr(options, name) for name in same}
        self._master = TaskMaster(authkey=find_key(options.authkey_file), log=self._log, **limits)
        self._results: ResultsFile | None = None
        self._batches, self._sink = self._connect_ends()

    def _connect_ends(self) -> tuple[Iterator[list[str]], Sink]:
        """Where tasks come from and where records go, with what stands between."""
        batches = open_input(self._options, None)  # before a results file is made
        kept: Sequence[int] = ()
        sink: Sink
        if self._options.results == "-":
            sink = print_records
        elif self._options.results:
            results = self._results = ResultsFile(self._options.results, self._options.resume)
            kept, sink = results.kept, results.write
            if kept:
                verify_tasks(self._options, results)
                batches = open_input(self._options, results)
        else:
            printer = Printer()
            batches, sink = printer.put(batches), printer.write
        if self._options.ordered:
            sink = Sequencer(self._master.ledger, sink, kept).write
        return batches, sink

    def run(self) -> int:
        """Run the job; returns the exit status. Raises Failure."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle_signal)
            with self._master as master:
                say(f"listening on {show_address(master.address)}")
                if not self._options.tls and not is_loopback(master.address[0]):
                    say("whoever is on the path can read and alter tasks and results: use --tls, or an SSH tunnel and no --host")
                master.begin(self._batches, self._sink, self._results.path if self._results else "standard output")
                while not master.done.wait(LOOK_INTERVAL):
                    self._look()
        finally:
            console.clear()
        master.ledger.audit()
        return self._conclude()

    def _look(self) -> None:
        self._master.look()
        if self._stopped_by and not self._draining:
            self._draining = True
            self._master.drain()
        if self._results:
            with contextlib.suppress(OSError):  # noted by the master
                self._master.guard(self._results.sync)
        if not self._options.quiet:
            console.show(self._describe_progress())

    def _describe_progress(self) -> list[str]:
        ledger, now = self._master.ledger, time.monotonic()
        counts = ledger.counts()
        done = counts[DONE]
        if not self._history or self._history[-1][1] != done:
            self._history.append((now, done))
        while len(self._history) > 1 and now - self._history[1][0] > RATE_SPAN and done - self._history[1][1] >= RATE_TASKS:
            self._history.popleft()
        since, before = self._history[0]
        rate = (done - before) / (now - since) if now > since else 0.0
        total = ledger.submitted if ledger.ended else None
        good = done - ledger.failed
        parts = [f"{good} of {total} done" if total is not None else f"{good} done"]
        if total is not None and rate:
            parts.append(f"{show_time((total - done) / rate)} left")
        running = min(counts[LEASED], counts["slots"])
        return [
            *parts,
            f"{ledger.failed} failed",
            f"{show_rate(rate)}/s",
            f"{running} running",
            count_things(self._master.count_workers(), "worker"),
        ]

    def _handle_signal(self, number: int, _frame: object) -> None:
        """The first one drains (in `_look`: a handler must not take locks), the second leaves at once."""
        if self._stopped_by:
            say("leaving at once")
            if self._master.local:
                self._master.local.kill()
            os._exit(128 + number)
        self._stopped_by = number
        say("draining: waiting for the tasks that run (once more to leave at once)")

    def _conclude(self) -> int:
        """Say how it went; returns the exit status. Raises Failure."""
        master = self._master
        if self._results:
            with contextlib.suppress(OSError):  # noted by the master
                if self._options.ordered and self._options.resume:
                    master.guard(self._results.sort)  # those that ran again stand behind those that were kept
                master.guard(self._results.close)
        elif master.broken:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try it again in the end, and complain
        self._summarize()
        if self._draining or (master.recorded and getattr(master.problem, "status", 0) == 1):
            argv = [sys.executable, *self._argv, *["--resume"] * (not self._options.resume)]  # the input was good
            lost = "what is not done is not remembered: use --results FILE to be able to resume"
            say(f"stopped; to carry on: {shlex.join(argv)}" if self._results else f"stopped; {lost}")
        if master.problem:
            raise master.problem
        if self._draining:
            return 128 + self._stopped_by
        return 1 if master.ledger.failed else 0

    def _summarize(self) -> None:
        ledger, seconds = self._master.ledger, time.monotonic() - self._began_at
        done = self._master.recorded
        if self._master.problem and not done:
            return
        if self._master.failures:
            self._log("the first failures:" if ledger.failed > len(self._master.failures) else "the failures:")
        for text in self._master.failures:
            self._log("  " + text)
        if ledger.failed > len(self._master.failures):
            self._log(f"and {ledger.failed - len(self._master.failures)} more failed, see the records with an error")
        for name, stats in list(self._master.workers.items())[:20]:
            self._log(f"worker {name}: {stats.describe()}")
        self._log(
            f"{done - ledger.failed} done, {ledger.failed} failed, {ledger.retried} retried, {ledger.redelivered} redelivered, "
            f"{show_time(seconds)}, {show_rate(done / seconds)} tasks/s"
        )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    closed = open_standard_streams()
    parser = make_parser()
    options = parser.parse_args(argv)
    if "stdout" in closed and options.results in (None, "-"):
        parser.error("standard output is closed, where the results should go: use --results FILE")
    if options.task and options.tasks is not None:
        parser.error("TASK and --tasks: give one of them")
    if (options.function or options.command) and not options.workers:
        parser.error("--function and --command are for the local workers of --workers N; other workers have their own")
    if options.resume and options.results in (None, "-"):
        parser.error("--resume needs the --results FILE of the job to carry on")
    raise_file_limit()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # not every terminal knows every letter
    try:
        return Job(options, [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]).run()
    except Failure as failure:
        say(str(failure))
        return failure.status
    except KeyboardInterrupt:  # before there was anything to drain
        return 128 + signal.SIGINT


if __name__ == "__main__":
    raise SystemExit(main())
