#!/usr/bin/env python3
"""Run tasks for a task_master: take them from its queue, call a function on each, report the outcomes.

    task_master.py  <==TCP==>  slot (thread)  <--pipe-->  child (process, runs the function)
                    <==TCP==>  slot (thread)  <--pipe-->  child (process, runs the function)

This file stands alone: copy it, and the key, to any host that has Python 3.9 or newer.

    python3 task_worker.py
    python3 task_worker.py --host 10.0.0.5 --processes 8 --function mailer:send
"""
# Theory of operation.
#
# A slot leases tasks from the master, as many as make about LEASE_SECONDS of work, and hands them to its child in one
# message. Before each task the child writes its position and the time into shared memory, so that the slot knows at
# any moment which task runs and since when. Hence
#  - a child that dies names the culprit: the task that it had started. That one gets the outcome, the others run again
#    in a new child (those whose outcomes died with it, too);
#  - a task that takes long need not hold up those leased with it: the slot revokes them (the child looks at a flag
#    before it starts a task) and releases them to the master;
#  - the time limit needs no help from the child, whose GIL may be held: the slot kills its process group.
# The master is a BaseManager's server, but a worker sends it no pickles, and reads none: a message is a line of words, as
# in `get_task_queue lease 100 30.0`, and a text behind it, here the lines of the tasks or the outcomes.
# Outcomes come back in batches, and the report of an outcome to the master is its acknowledgement. When the connection
# is lost, the master hands the leased tasks to others; the slot finishes the task that runs, connects again, and
# reports what it has: the master takes it if nobody was faster.
# The process that holds the connections never imports user code, so nothing a task does can cost it a lease.

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import random
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from multiprocessing import AuthenticationError, connection
from typing import TYPE_CHECKING, Any, Callable, NoReturn

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

TASKS, RESULTS = "get_task_queue", "get_result_queue"  # what the tutorial calls them; also their ids on the wire
LEASE_SECONDS = 0.4  # of work to lease at a time, when the master is near
LEASE_GROWTH = 8  # times as many tasks as asked for last, at most; what turns out to be slow is released
MAX_LEASE_SECONDS = 10.0  # of work, however far the master
ROUND_TRIP_SHARE = 0.05  # at most this part of a slot's time should go to round trips
LEASE_WAIT = 30.0  # seconds that a request for tasks may wait at the master
REPORT_INTERVAL = 0.5  # seconds between reports while a lease is worked on
SETTINGS_LIMIT = 10_000  # characters of an answer that is read as JSON
REPORT_SIZE = 8 << 20  # characters of outcomes that are reported at once, whatever the time
ANSWER_LIMIT = 44.0  # seconds to wait for an answer; with BEAT_INTERVAL that is less than SILENCE_LIMIT
BEAT_INTERVAL = 15.0  # seconds after which a busy slot says that it lives
SLOW_TASK = 0.5  # seconds after which the tasks behind a running one are released
FLUSH_INTERVAL = 0.1  # seconds between batches of outcomes from a child
START_ATTEMPTS = 3  # of a child that dies while it loads the function
START_POLL = 0.02  # seconds between looks around while a child loads the function
POLL_INTERVAL = 0.5  # seconds after which a waiting slot looks around
EXIT_GRACE = 5.0  # seconds for a child to leave by itself
OUTPUT_LIMIT = 1 << 20  # bytes kept of each stream of a --command
ERROR_SIZE = 8192  # characters kept of an error's message, and twice that of its traceback
POSITION, STARTED_AT, REVOKED = range(3)  # the shared memory between a slot and its child

Function = Callable[[Any], Any]


def say(text: str) -> None:
    """One line on standard error."""
    write_error(f"task_worker: {text}\n")


def print_line(text: str) -> None:
    """One line on standard output."""
    write_error(text + "\n", 1)


# ---- functions: what is done with a task ---------------------------------------------------------------------------


def square(n: Any) -> str:
    """The demonstration: the square of a number, in words."""
    print(f"run task {n} * {n}...")
    return f"{n} * {n} = {n * n}"


def run_command(template: str, task: Any) -> dict[str, Any]:
    """Run a shell command, `{}` in it replaced by the quoted task.

    Returns exit status and output, each stream cut at OUTPUT_LIMIT. RuntimeError when the status is not 0.
    """
    import shlex
    import subprocess

    word = shlex.quote(task if isinstance(task, str) else json.dumps(task))
    process = subprocess.Popen(
        template.replace("{}", word), shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    kept: dict[str, str] = {}
    reader = threading.Thread(target=lambda: kept.update(stderr=read_output(process.stderr)), daemon=True)
    reader.start()
    kept["stdout"] = read_output(process.stdout)
    reader.join()
    status = process.wait()
    if status:
        said = kept["stderr"].strip()[-ERROR_SIZE // 2 :]  # the reason usually comes last
        how = f"exit status {status}" if status > 0 else f"killed by {name_signal(-status)}"
        raise RuntimeError(f"{how}: {said or 'nothing on standard error'}")
    return {"exit": 0, "stdout": kept["stdout"], "stderr": kept["stderr"]}


def read_output(stream: Any) -> str:
    """All of a stream as text, cut visibly after OUTPUT_LIMIT bytes; reads on to the end, so that nobody blocks."""
    data: bytes = stream.read(OUTPUT_LIMIT)
    cut = 0
    while more := stream.read(1 << 16):
        cut += len(more)
    return data.decode("utf-8", "replace") + (f"\n[... {cut} bytes cut]" if cut else "")


def load_function(spec: str) -> Function:
    """The function that MODULE:NAME names, imported from the current directory or the path.

    Raises Failure, with the reason, when there is no such function.
    """
    import importlib

    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise Failure(f"--function {spec}: it takes MODULE:NAME, as in mailer:send")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = functools.reduce(getattr, name.split("."), importlib.import_module(module_name))
    except BaseException as error:  # the module's own code runs here, and may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError):
            reason += f" (looked in {os.getcwd()} and the path of {sys.executable})"
        raise Failure(f"--function {spec}: cannot import it on {socket.gethostname()}: {reason}") from None
    if not callable(function):
        raise Failure(f"--function {spec}: it is a {type(function).__name__}, not a function")
    return function


# ---- child: the only process that runs the function ----------------------------------------------------------------


def run_child(pipe: Any, shared: Any, function_spec: str | None, command: str | None) -> None:
    """The child's main: says whether the function could be loaded, then runs every message of tasks."""
    leave_terminal()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # so that nothing a task starts waits for the terminal
    threading.Thread(target=die_with_parent, daemon=True).start()
    function: Function = functools.partial(run_command, command) if command else square
    try:
        if function_spec:
            function = load_function(function_spec)
    except Failure as failure:
        pipe.send_bytes(str(failure).encode("utf-8", "replace"))
        return
    pipe.send_bytes(b"")
    runner = Runner(function, pipe, shared)
    with contextlib.suppress(EOFError, OSError):  # the slot closed the pipe
        while True:
            runner.run(pipe.recv_bytes().decode().split("\n"))


def leave_terminal() -> None:
    """A session of its own: Ctrl-C in the terminal reaches the parent alone, and a kill takes the whole group."""
    if hasattr(os, "setsid"):
        with contextlib.suppress(OSError):  # it has one
            os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # forgets one that came in before
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def die_with_parent() -> NoReturn:
    """Waits for the parent's end, however it comes, and takes the process group along."""
    parent = multiprocessing.parent_process()
    assert parent
    connection.wait([parent.sentinel])
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


# json.loads without what stands around it there, and json.dumps without NaN: a third of the time.
scan_json = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
encode_json = json.JSONEncoder(allow_nan=False).encode


class Runner:
    """Runs tasks (`ID TEXT`) and sends their outcomes, a message every FLUSH_INTERVAL and a last one.

    Outcomes are a line of ids, and for each a line of the members of a record that tell what came of it.
    """

    def __init__(self, function: Function, pipe: Any, shared: Any) -> None:
        self._function, self._pipe, self._shared = function, pipe, shared
        self._pid, self._streams = os.getpid(), identify_streams()

    def run(self, lines: list[str]) -> None:
        """Run tasks in this order, until one is slow and the others are revoked."""
        clock, function, shared = time.perf_counter, self._function, self._shared
        ids: list[str] = []
        outcomes: list[str] = []
        size, flushed_at = 0, clock()
        for position, line in enumerate(lines):
            task_id, _, text = line.partition(" ")
            shared[STARTED_AT] = started_at = clock()
            shared[POSITION] = position
            if shared[REVOKED]:
                break
            try:
                value = function(scan_json(text, 0)[0])
                members = '"result": ' + (repr(value) if type(value) is int else encode_json(value))
                if len(members) > TEXT_LIMIT:
                    raise ValueError(f"the result has {len(members)} bytes as JSON, more than {TEXT_LIMIT}: write it to a file")
            except BaseException as error:  # SystemExit and KeyboardInterrupt too: no task may end its child
                members = describe_error(error)
            now = clock()
            ids.append(task_id)
            outcomes.append(f'{members}, "seconds": {now - started_at:.6f}')
            size += len(members)
            if now - flushed_at > FLUSH_INTERVAL or size > 1 << 20 or sys.stdout.closed or os.getpid() != self._pid:
                self._send(b"+", ids, outcomes)
                ids, outcomes, size, flushed_at = [], [], 0, now
        self._send(b".", ids, outcomes)

    def _send(self, kind: bytes, ids: list[str], outcomes: list[str]) -> None:
        """Hand outcomes to the slot, once all that their tasks printed has gone out.

        If a task has closed the streams, the process ends: the slot then has each of these run alone, in a new child. So
        does a copy of the process that a task has made by forking, and that came back, too: one is enough.
        """
        if os.getpid() != self._pid or identify_streams() != self._streams:
            os._exit(0)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # a task may have closed or replaced it
                stream.flush()
        self._pipe.send_bytes(kind + "\n".join([" ".join(ids), *outcomes]).encode())
        if sys.stdout.closed:
            os._exit(0)  # the next task is to find what it expects, in a new child


def identify_streams() -> list[tuple[int, ...]]:
    """What stands behind standard input, output and error; [] when one of them is closed."""
    try:
        return [os.fstat(descriptor)[1:3] for descriptor in range(3)]
    except OSError:
        return []


def describe_error(error: BaseException) -> str:
    """An exception as the member `"error"` of a record; its own `__str__` may be broken."""
    import traceback

    try:
        message = str(error)
    except BaseException:
        message = "(its __str__ raises)"
    frames = error.__traceback__ and error.__traceback__.tb_next  # the first one is ours
    try:
        text = "".join(traceback.format_exception(type(error), error, frames))
    except BaseException:
        text = ""
    return format_error(type(error).__name__, message, text)


def format_error(kind: str, message: str, trace: str = "") -> str:
    """The member `"error"` of a record, as JSON text."""
    if len(message) > ERROR_SIZE:
        message = message[:ERROR_SIZE] + f" [... {len(message) - ERROR_SIZE} characters cut]"
    if len(trace) > 2 * ERROR_SIZE:
        trace = trace[:ERROR_SIZE] + "\n[...]\n" + trace[-ERROR_SIZE:]
    return '"error": ' + json.dumps({"type": kind, "message": message, "traceback": trace})


class ChildDied(Exception):
    """The child process has ended, with this exit status (negative: killed by a signal; None: not known)."""

    def __init__(self, status: int | None) -> None:
        if status is not None and status < 0:
            super().__init__(f"the task's process was killed by {name_signal(-status)}")
        else:
            super().__init__(f"the task ended its process with exit status {status}")
        self.status = status


class Child:
    """The process of one slot, and the pipe and the shared memory that lead to it."""

    context = multiprocessing.get_context("spawn")
    starting = threading.Lock()  # Process.start looks at the other children, which is not safe in two threads
    closed = False  # no new one may start: the worker kills all there are and leaves

    def __init__(self, function: str | None, command: str | None) -> None:
        self._arguments = (function, command)
        self._shared = self.context.RawArray("d", 3)
        self.overdue: int | None = None  # the position of the task for which it was killed

    def start(self) -> None:
        """Start the process. Its first message says why it cannot load the function, or nothing."""
        self.overdue = None
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=run_child, args=(theirs, self._shared, *self._arguments))
        with self.starting:
            if self.closed:
                raise ChildDied(None)
            process.start()
        theirs.close()
        self._pipe, self._process, self._poll = ours, process, make_poll(ours)

    def feed(self, lines: list[str]) -> None:
        """Hand over tasks, to be run in this order; each message of outcomes comes back through `receive`."""
        self._shared[POSITION], self._shared[REVOKED], self._shared[STARTED_AT] = -1, 0, time.perf_counter()
        with contextlib.suppress(OSError):  # it just died: `receive` finds out
            self._pipe.send_bytes("\n".join(lines).encode("utf-8", "replace"))

    def receive(self, timeout: float) -> bytes | None:
        """The next message, or None when there was none for `timeout` seconds. Raises ChildDied."""
        alive = False
        try:
            if self._poll(timeout) or (not (alive := self._process.is_alive()) and self._poll(0)):
                return self._pipe.recv_bytes()  # what it said before it died counts
        except (EOFError, OSError):
            pass
        if alive:  # asked, since a process that it started may keep the pipe open
            return None
        self._process.join(EXIT_GRACE)
        raise ChildDied(self._process.exitcode)

    def position(self) -> int:
        """Of the task that was started last, in the list that was fed; -1 when none was."""
        return int(self._shared[POSITION])

    def running_for(self) -> float:
        """Seconds since the last task was started, or since the tasks were fed."""
        return time.perf_counter() - float(self._shared[STARTED_AT])

    def revoke(self) -> None:
        """Start no more of the tasks that were fed: the child ends with the one that runs."""
        self._shared[REVOKED] = 1

    def kill(self) -> None:
        """Kill the process and all that it started."""
        with contextlib.suppress(OSError, AttributeError):
            if hasattr(os, "killpg") and os.getpgid(self._process.pid or 0) == self._process.pid:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()

    def stop(self) -> None:
        """Let the child leave; kill it after EXIT_GRACE seconds."""
        if hasattr(self, "_process") and self._process.pid:
            self._pipe.close()
            self._process.join(EXIT_GRACE)
            if self._process.is_alive():
                self.kill()
                self._process.join()


def name_signal(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


# ---- worker: the connections, without user code --------------------------------------------------------------------


class Link:
    """One connection to the master, whose calls are those of a BaseManager's proxies.

    Making one blocks for HANDSHAKE_LIMIT seconds at most, a call for ANSWER_LIMIT; OSError, EOFError and
    AuthenticationError say what went wrong. `close` it when done.
    """

    def __init__(self, address: tuple[str, int], authkey: bytes, name: str, context: ssl.SSLContext | None = None) -> None:
        self._connection = PlainConnection(socket.create_connection(address, HANDSHAKE_LIMIT))
        self.called_at = self.round_trip = 0.0  # the time of the last answer; seconds
        try:
            if context:
                self._connection.secure(context)
            connection.answer_challenge(self._connection, authkey)  # type: ignore[arg-type]
            connection.deliver_challenge(self._connection, authkey)  # type: ignore[arg-type]
            self.exchange(pack("server accept_connection", name))
        except BaseException as error:
            self._connection.close()
            if isinstance(error, AssertionError):  # how Python up to 3.11 says that this is no challenge
                raise EOFError("another program answers there") from None
            if "timed out" in str(error) or "peer closed" in str(error):
                raise EOFError("it took the connection and says nothing; does it listen with --tls?") from None
            raise
        self._connection.settle(ANSWER_LIMIT)
        self.close = self._connection.close
        self._exchange_settings()

    def _exchange_settings(self) -> None:
        asked_at = time.monotonic()
        settings = self.exchange(pack(f"{TASKS} settings {PROTOCOL}"))
        self.round_trip = self.called_at - asked_at
        try:
            self.protocol, self.run_id = int(settings["protocol"]), str(settings["run"])
            self.timeout = float("inf" if settings["timeout"] is None else settings["timeout"])
        except (KeyError, TypeError, ValueError, OverflowError):
            self.close()
            raise EOFError("it does not state its settings") from None

    def exchange(self, *calls: bytes) -> Any:
        """Make calls, packed as `QUEUE METHOD ARGUMENT ...` and a text, in one round trip; returns what the last one does.

        Only that one may wait at the master.
        """
        asked_at = time.monotonic()
        self._connection.send_bytes(*calls)
        value = self._receive()
        if len(calls) > 1:  # then the first is a report, which waits for a disk at most
            self.round_trip = min(time.monotonic() - asked_at, 1.25 * self.round_trip)
        for _ in calls[1:]:
            value = self._receive()
        self.called_at = time.monotonic()
        return value

    def _receive(self) -> Any:
        """What a call has returned."""
        try:
            (kind, form, *_), text = unpack(self._connection.recv_bytes())
            if kind == "#RETURN" and form in ("text", "none"):
                return text if form == "text" else None
            if kind == "#RETURN" and len(text) < SETTINGS_LIMIT:
                return json.loads(text)
        except (ValueError, RecursionError):
            raise EOFError("it answers with what is no message") from None
        raise EOFError("it answers with an error")


class Slot(threading.Thread):
    """A child, and the thread that feeds it from a connection of its own."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(daemon=True)
        self._worker = worker
        self.child = Child(worker.function, worker.command)
        self._link: Link | None = None
        self._run_id = ""  # of the master whose outcomes we hold
        self._timeout = float("inf")  # seconds for a task
        self._fed: list[str] = []  # what the child has, as `ID TEXT`
        self._done = 0  # how many of those have an outcome
        self._outcomes: list[tuple[str, str]] = []  # ids and outcomes that came together, not yet reported
        self._reported_at = 0.0
        self._busy = 0.0  # seconds spent on leases since the last report

    def run(self) -> None:
        """Serve until the job is over, the worker drains, or something ends it; the worker is told which."""
        if hasattr(signal, "pthread_sigmask"):  # the main thread takes the signals; a new child must not, either
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._start_child()
            while not self._worker.leaving.is_set():
                self._serve()
        except Failure as failure:
            self._worker.fail(failure)
        except ChildDied as death:
            self._worker.fail(Failure(f"a child ended before it could run a task: {death}", 2))
        except Exception as error:  # a defect of this program: the one case for a traceback
            self._worker.fail(Failure(f"internal error: {error!r}", 1))
            raise
        finally:
            self.child.stop()

    def _start_child(self) -> None:
        """Start the child and wait until it has loaded the function, or the worker leaves. Raises Failure when it cannot."""
        for attempt in range(START_ATTEMPTS):
            with contextlib.suppress(*[ChildDied] * (attempt + 1 < START_ATTEMPTS)):
                self.child.start()
                while (problem := self.child.receive(START_POLL)) is None:
                    if self._worker.leaving.is_set():
                        self.child.kill()  # it has nothing to finish
                        return
                    self._keep_in_touch()
                if problem:
                    raise Failure(problem.decode())
                return

    def _serve(self) -> None:
        """Connect and work until the connection is lost or the job is over."""
        self._link = self._worker.connect()
        if self._link is None:
            return
        if self._link.run_id != self._run_id:  # another master: what was finished for the last one is void
            self._run_id, self._outcomes, self._busy = self._link.run_id, [], 0.0
        self._timeout = self._link.timeout
        limit = 1
        try:
            while self._link and not self._worker.leaving.is_set():
                lease = self._trade(self._link, limit)
                if lease is None:
                    self._worker.job_over(self._run_id)
                    break
                self._worker.served()
                if lease:
                    limit = min(LEASE_GROWTH * limit, self._work(lease.split("\n")))
            self._report()
        except (OSError, EOFError) as error:
            self._worker.lost(explain_error(error))
        finally:
            if self._link:
                self._link.close()

    def _trade(self, link: Link, limit: int) -> str | None:
        """Report what is finished and lease anew, in one round trip. Returns what `lease` does."""
        report, count = self._next_report()
        lease = link.exchange(*report, pack(f"{TASKS} lease {limit} {LEASE_WAIT}"))
        self._acknowledge(count)
        if lease is not None and not isinstance(lease, str):
            raise EOFError("it leases what is no task")
        return lease

    def _work(self, lines: list[str]) -> int:
        """Run a lease to its end. Returns how many tasks would be worth the next round trip."""
        leased, begun_at = len(lines), time.monotonic()
        singly = 0  # tasks to be run one by one, since one of them ends its child without telling which
        futile = 0  # children in a row that died before they got anywhere
        while lines:
            if self._worker.leaving.is_set() or self._link is None:
                self._release(lines)
                break
            self._fed, self._done = lines[:1] if singly else lines, 0
            rest = lines[len(self._fed) :]
            try:
                self._run()
                lines, singly, futile = rest, max(0, singly - 1), 0
            except ChildDied as death:
                remaining = self._bury(death) + rest
                futile = futile + 1 if len(remaining) == len(lines) and singly else 0
                if futile == START_ATTEMPTS or Child.closed:
                    raise
                singly = len(remaining) if len(remaining) == len(lines) else singly
                lines = remaining
                self._report()
                self._start_child()
        spent = time.monotonic() - begun_at
        self._busy += spent
        wanted = min(MAX_LEASE_SECONDS, max(LEASE_SECONDS, self._link.round_trip / ROUND_TRIP_SHARE if self._link else 0.0))
        return max(1, int(wanted * leased / max(spent, 1e-6)))

    def _run(self) -> None:
        """Run what is fed, until each task has an outcome or was released. Raises ChildDied."""
        self.child.feed(self._fed)
        while True:
            self._shorten()
            message = self.child.receive(min(POLL_INTERVAL, max(0.01, self._timeout - self.child.running_for())))
            if message is not None:
                self._done += self._keep(message[1:].decode())
                if message[:1] == b".":
                    break
            self._enforce_timeout()
            self._keep_in_touch()
        self._release(self._fed[self._done :])  # revoked just before they were started

    def _shorten(self) -> None:
        """Revoke and release what stands behind a slow task, or behind any when the worker leaves or the master is lost."""
        slow = self.child.running_for() > SLOW_TASK
        if len(self._fed) > 1 and (slow or self._worker.leaving.is_set() or self._link is None):
            self.child.revoke()
            started = self.child.position() + 1
            self._release(self._fed[started:])
            del self._fed[started:]

    def _keep(self, outcomes: str) -> int:
        """Keep a message of outcomes for the next report. Returns how many there are."""
        ids, _, members = outcomes.partition("\n")
        if ids:
            self._outcomes.append((ids, members))
        return outcomes.count("\n")

    def _bury(self, death: ChildDied) -> list[str]:
        """After the child's death: the outcome for the task that ran. Returns those that were fed and still have none."""
        position, overdue = self.child.position(), self.child.overdue
        kind, reason = "ProcessDied", str(death)
        if overdue is not None:
            kind, reason = "TimeoutError", f"no result within the time limit of {self._timeout:g} s"
        nobody_ran = position < self._done or overdue not in (None, position)
        doubtful = death.status == 0 and len(self._fed) - self._done > 1  # it left since one of them had damaged it
        if nobody_ran or doubtful or Child.closed:
            return self._fed[self._done :]
        seconds = f', "seconds": {self.child.running_for():.6f}'
        self._keep(f"{self._fed[position].partition(' ')[0]}\n{format_error(kind, reason)}{seconds}")
        return self._fed[self._done : position] + self._fed[position + 1 :]

    def _enforce_timeout(self) -> None:
        position = self.child.position()
        if position >= self._done and self.child.running_for() > self._timeout:
            self.child.overdue = position
            self.child.kill()

    def _keep_in_touch(self) -> None:
        """Report now and then, and let the master know that a busy slot lives."""
        now = time.monotonic()
        size = sum([len(members) for _, members in self._outcomes])
        if self._outcomes and (now - self._reported_at > REPORT_INTERVAL or size > REPORT_SIZE):
            self._report()
        elif self._link and now - self._link.called_at > BEAT_INTERVAL:
            self._tell(pack(f"{TASKS} beat"))

    def _report(self) -> None:
        """Hand all outcomes to the master; they are kept when the connection is lost meanwhile."""
        while self._outcomes and self._link:
            report, count = self._next_report()
            if self._tell(*report):
                self._acknowledge(count)

    def _next_report(self) -> tuple[list[bytes], int]:
        """The call that reports as many messages of outcomes as one report may hold, and how many; none if there are none."""
        if not self._outcomes:
            return [], 0
        sizes = itertools.accumulate([len(outcomes) for _, outcomes in self._outcomes])
        count = max(1, sum([size < REPORT_SIZE for size in sizes]))
        ids, outcomes = zip(*self._outcomes[:count])
        return [pack(f"{RESULTS} report {self._run_id} {self._busy:.6f}", "\n".join([" ".join(ids), *outcomes]))], count

    def _acknowledge(self, count: int) -> None:
        """The first `count` messages of outcomes are recorded."""
        del self._outcomes[:count]
        self._busy, self._reported_at = 0.0, time.monotonic()

    def _release(self, lines: list[str]) -> None:
        if lines:
            self._tell(pack(f"{TASKS} release", " ".join([line.partition(" ")[0] for line in lines])))

    def _tell(self, call: bytes) -> bool:
        """Call the master if it can be reached. False when it cannot: the link is gone then."""
        try:
            if self._link:
                self._link.exchange(call)
        except (OSError, EOFError) as error:
            assert self._link
            self._link.close()
            self._link = None
            self._worker.lost(explain_error(error))
        return self._link is not None


class Worker:
    """The slots of this host, and what they share: the way to the master and the reasons to leave."""

    def __init__(self, options: argparse.Namespace, authkey: bytes) -> None:
        self.function, self.command = options.function, options.command
        self.leaving = threading.Event()
        self._address, self._authkey = (options.host, options.port), authkey
        self.place = show_address(self._address)
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._context = make_tls_context(authkey, server_side=False) if options.tls else None
        self._quiet = options.quiet
        self._log: Callable[[str], None] = (lambda text: None) if options.quiet else say
        self._wait = options.wait  # seconds to look for the master; 0: for ever
        self._lock = threading.Lock()
        self._announced = False
        self._connected: bool | None = None  # None: never yet
        self._lost_at: float | None = time.monotonic()  # None while the master serves us
        self._finished = ""  # id of the last run that is over
        self._failure: Failure | None = None
        self._slots = [Slot(self) for _ in range(options.processes)]

    def run(self) -> None:
        """Serve until the job is over, or this worker drained. Raises Failure."""
        for slot in self._slots:
            slot.start()
        for slot in self._slots:
            while slot.is_alive() and not self._failure:
                slot.join(POLL_INTERVAL)  # with a timeout, so that Ctrl-C comes through on Windows
        if self._failure:
            with Child.starting:
                Child.closed = True
            for slot in self._slots:
                slot.child.kill()
            for slot in self._slots:  # one that starts a child flushes our streams: the interpreter must not end in between
                slot.join(EXIT_GRACE / len(self._slots))
            raise self._failure

    def connect(self) -> Link | None:
        """A link to the master, tried until --wait has passed (then Failure) or the worker leaves (then None)."""
        with self._lock:
            if not self._announced and not self._quiet:
                print_line(f"Connect to server {self._address[0]}...")
            self._announced = True
        delay = 0.05
        while not self.leaving.is_set():
            try:
                link = Link(self._address, self._authkey, self._name, self._context)
                if self._accept(link):
                    return link
            except (OSError, EOFError, AuthenticationError) as error:
                self._refuse_hopeless(error)
                self._check_patience(error)
            delay = min(2.0, delay * 2)
            self.leaving.wait(delay * random.uniform(0.5, 1.0))
        return None

    def _accept(self, link: Link) -> bool:
        """Whether to work over this link: not for a master whose job is over. Raises Failure for one that is too strange."""
        if link.protocol != PROTOCOL:
            link.close()
            raise Failure(
                f"the master at {self.place} speaks protocol {link.protocol}, this worker {PROTOCOL}: "
                "copy the task_worker.py of the master's host here",
                3,
            )
        with self._lock:
            if link.run_id == self._finished:
                link.close()
                return False
            first, self._connected = not self._connected, True
        if first:
            self._log(f"connected to {self.place}")
        return True

    def _refuse_hopeless(self, error: BaseException) -> None:
        """Raises Failure when the master is there, and will not have us however long we try."""
        reason = getattr(error, "reason", None)  # of an SSLError
        if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            raise Failure(f"the master at {self.place} does not speak TLS: start it with --tls, or this without", 3)
        if reason == "CERTIFICATE_VERIFY_FAILED":
            raise Failure(f"what answers at {self.place} shows a certificate and not the key: it is not our master", 3)
        if isinstance(error, AuthenticationError) or "ALERT" in str(reason):
            raise Failure(f"the master at {self.place} refused the key: copy its key file to this host", 3)

    def _check_patience(self, error: BaseException) -> None:
        """Say once that we wait. Raises Failure when we waited enough, or when waiting cannot help."""
        reason = explain_error(error)
        with self._lock:
            first, self._connected = self._connected is None, False
            self._lost_at = self._lost_at or time.monotonic()
            waited = time.monotonic() - self._lost_at
        unknown = isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME and first
        if self._wait and (unknown or waited >= self._wait):
            near = is_loopback(self._address[0])
            hint = "is it running? is --port right?" if near else "is it running, with --host 0.0.0.0? is --host right here?"
            raise Failure(f"cannot reach the master at {self.place}: {reason} ({hint})", 3)
        if first:
            self._log(f"waiting for the master at {self.place} ({reason})")

    def served(self) -> None:
        """The master answers a slot's request for tasks: the time to wait for it starts anew when it is lost."""
        self._lost_at = None

    def lost(self, reason: str) -> None:
        """A slot lost its connection. Raises Failure when the master has not served us for too long."""
        with self._lock:
            first, self._connected = bool(self._connected), False
            self._lost_at = self._lost_at or time.monotonic()
            waited = time.monotonic() - self._lost_at
        if first and not self.leaving.is_set():
            self._log(f"lost the master at {self.place} ({reason})")
        if self._wait and waited >= self._wait:
            raise Failure(f"gave up the master at {self.place}: {reason}", 3)
        self.leaving.wait(0.1)  # it may take connections only to end them

    def job_over(self, run_id: str) -> None:
        """A slot heard that the job is over: leave, or with --wait 0 look for the next master."""
        if self._wait:
            self.leaving.set()
            return
        with self._lock:
            first, self._finished, self._connected = self._finished != run_id, run_id, False
        if first:
            self._log("the job is over; waiting for the next master")

    def fail(self, failure: Failure) -> None:
        with self._lock:
            self._failure = self._failure or failure
        self.leaving.set()

    def handle_signal(self, number: int, _frame: object) -> None:
        """The first one drains, the second leaves at once."""
        if self.leaving.is_set():
            say("leaving at once")
            Child.closed = True  # so that no slot reports a task that is killed here
            for slot in self._slots:
                slot.child.kill()
            os._exit(128 + number)
        self.leaving.set()
        say("draining: finishing what runs, releasing the rest (once more to leave at once)")


# ---- command line --------------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    port = bounded(int, 1, 65535, "a port: it takes 1 to 65535")
    count = bounded(int, 1, 4096, "a count: it takes 1 to 4096")
    seconds = bounded(float, 0, 1e9, "a time: it takes seconds, 0 for ever")
    parser = Parser(
        prog="task_worker",
        usage="%(prog)s [OPTION ...]",
        description="Run tasks for a task_master: call a function on each, report the outcomes.",
        epilog="examples:\n  task_worker.py\n  task_worker.py --host 10.0.0.5 \\\n    --function mailer:send --wait 0\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    group = parser.add_argument_group("what to run")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--function", metavar="MODULE:NAME", help="called with each task (default: the square of a number)")
    what.add_argument("--command", metavar="TEMPLATE", help="run in a shell for each task, {} replaced by the quoted task")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # that we may use
    group.add_argument(
        "--processes", type=count, default=cpus, metavar="N", help=f"tasks at a time (default: one per CPU, {cpus} here)"
    )
    group = parser.add_argument_group("where the master is")
    group.add_argument("--host", default="127.0.0.1", help="its name or address (default: %(default)s)")
    group.add_argument("--port", type=port, default=5000, help="its port (default: %(default)s)")
    group.add_argument("--authkey-file", metavar="FILE", help=f"a copy of its key (default: {DEFAULT_KEY_FILE})")
    group.add_argument("--tls", action="store_true", help="encrypt, as the master does (Python 3.13 or newer)")
    group.add_argument(
        "--wait",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long to look for it (default: %(default)g; 0: for ever, and again after each job)",
    )
    return parser


def find_key(options: argparse.Namespace) -> bytes:
    """The key, waited for when the master, which makes it, will be started on this host."""
    give_up_at = time.monotonic() + options.wait
    told = False
    while True:
        try:
            return read_key(options.authkey_file)
        except FileNotFoundError:
            missing = f"there is no key in {os.path.expanduser(DEFAULT_KEY_FILE)}: copy that file from the master's host"
        if not is_loopback(options.host) or (options.wait and time.monotonic() > give_up_at):
            raise Failure(missing)
        if not told:
            say(f"{missing}, or start the master on this one (waiting for it)")
            told = True
        time.sleep(0.1)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    open_standard_streams()
    options = make_parser().parse_args(argv)
    raise_file_limit()
    try:
        worker = Worker(options, find_key(options))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, worker.handle_signal)
        worker.run()
    except Failure as failure:
        say(str(failure))
        return failure.status
    except KeyboardInterrupt:  # before there was anything to drain
        return 128 + signal.SIGINT
    if not options.quiet:
        print_line("worker exit.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
