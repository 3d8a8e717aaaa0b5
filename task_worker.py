#!/usr/bin/env python3
"""Run tasks for a task_master: take them from its queue, call a function on each, report the outcomes.

    task_master.py  <==TCP==>  slot (thread)  <--pipe, memory-->  child (process, runs the function)
                    <==TCP==>  slot (thread)  <--pipe, memory-->  child (process, runs the function)

This file stands alone: copy it, and the key, to any host that has Python 3.9 or newer.

    python3 task_worker.py
    python3 task_worker.py --host 10.0.0.5 --processes 8 --function mailer:send
"""
# Theory of operation.
#
# A slot leases tasks from the master, as many as make about LEASE_SECONDS of work, and hands them to its child in one
# message. In memory that both share the child writes which task it starts, and when, and the outcome of each task as soon
# as there is one. The slot can read that at any time, also when the child has died. Hence
#  - an outcome cannot be lost with the child, and does not wait for the task behind it;
#  - a child that dies names the culprit: the task that has started and has no outcome. The others run in a new child;
#  - the tasks behind a slow one can be revoked (the child looks at a flag before it starts a task) and released;
#  - the time limit needs no help from the child, whose GIL may be held: the slot kills it with all that it started.
# The process that holds the connections never imports user code, so nothing a task does can cost it a lease. It is itself
# the child of a supervisor, which passes signals on, and kills what is left when the worker has ended.
# The master is a BaseManager's server, but a worker sends and reads no pickles. This is the whole protocol, each call a
# line of words with a text behind it, each answered by `#RETURN text`, `#RETURN json` or `#RETURN none`:
#
#   call                                          text            answer
#   server accept_connection NAME                                 text: the id of the run (it ends the handshake)
#   get_task_queue join PROTOCOL                  what it runs    json: protocol, run, timeout, refused
#   get_task_queue lease LIMIT WAIT                               text: lines `ID TASK`; none: the job is over
#   get_task_queue release                        ids             none
#   get_task_queue beat                                           none; text: the job is over
#   get_result_queue report RUN BUSY              ids, outcomes   none: they are recorded, which is the acknowledgement
#
# When a connection is lost, the master gives its leased tasks to others. The slot finishes the task that runs, connects
# again and reports it: the master takes it if nobody was faster. The answer to a report is awaited before the next call, not
# at once: meanwhile the child works, and the time limit holds.

from __future__ import annotations

import os
import sys

if sys.version_info < (3, 9):  # noqa: UP036
    sys.stderr.write(f"task_worker: Python 3.9 or newer is needed, not {sys.version.split()[0]}\n")
    raise SystemExit(2)
if __name__ == "__main__":
    if os.path.dirname(os.path.realpath(__file__)) in sys.path[:1]:
        del sys.path[0]  # a file there could stand in for a module of the standard library
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for a Ctrl-C before `main` can take it

import _thread
import argparse
import contextlib
import errno
import functools
import importlib.util
import io
import json
import math
import mmap
import multiprocessing
import random
import re
import select
import signal
import socket
import stat
import struct
import tempfile
import threading
import time
from multiprocessing import AuthenticationError, connection, reduction, resource_tracker

TYPE_CHECKING = False  # to import typing would delay the start of worker and child by a fortieth each (row `cold`)
if TYPE_CHECKING:
    import ssl
    from typing import Any, Callable, NoReturn

__version__ = "1.2.0"

# ---- wire: what both programs need ---------------------------------------------------------------------------------

PROTOCOL = 3  # of what the two queues expect and return; both ends state theirs
MESSAGE_LIMIT = 64 << 20  # bytes; a longer message is refused before it is read
TEXT_LIMIT = 60 << 20  # bytes of one task or one result as JSON text: a message has room for it
HANDSHAKE_LIMIT = 10.0  # seconds for a new connection to prove that it knows the key
SILENCE_LIMIT = 55.0  # seconds without a word after which a peer is given up
BEAT_INTERVAL = 15.0  # seconds after which a busy slot, or a master through ssh, says that it lives
DEFAULT_KEY_FILE = "~/.task_authkey"
FILE_LIMIT = 1 << 16  # open files; a task inherits the limit, and some programs look at each number below it
RESULT, ERROR = '"result": ', '"error": '  # how an outcome begins
PLAIN_WARNING = "without TLS whoever is on the path can read and alter tasks and results"
FINAL = ', "final": true'  # ends an error that another run could not change


class Failure(Exception):
    """Ends the program with one line on standard error and an exit status (1: no success, 2: usage, 3: no connection)."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def pack(words: str, text: str = "") -> bytes:
    """A message: a line of words, and behind it text as it is, so that a batch of tasks or outcomes is encoded only once."""
    return f"{words}\n{text}".encode("utf-8", "replace")


def unpack(message: bytes) -> tuple[list[str], str]:
    """The words (some, and a rest) and the text of a message. Raises ValueError when it is not text."""
    words, _, text = message.decode().partition("\n")
    return words.split(" ", 4), text


def format_outcome(members: str, started_at: float | None = None, seconds: float | None = None) -> str:
    """An outcome: the members of a record that tell what running a task once gave, the first of them result or error."""
    if started_at is None or seconds is None:
        return f'{members}, "started_at": null, "seconds": null'
    return members + format_times(int(started_at * 1e3), int(seconds * 1e6))


@functools.lru_cache(1000)
def format_times(milliseconds: int, microseconds: int) -> str:
    """The end of an outcome: when it started and what it took; most tasks are tiny, so the same come again and again."""
    return f', "started_at": {milliseconds / 1e3:.3f}, "seconds": {microseconds / 1e6:.6f}'


def format_error(kind: str, message: str, trace: str = "", **more: Any) -> str:
    """The member `"error"` of a record, as JSON text."""
    if len(message) > ERROR_SIZE:
        message = message[:ERROR_SIZE] + f" [... {len(message) - ERROR_SIZE} characters cut]"
    if len(trace) > 2 * ERROR_SIZE:
        trace = trace[:ERROR_SIZE] + "\n[...]\n" + trace[-ERROR_SIZE:]
    return ERROR + json.dumps({"type": kind, "message": message, "traceback": trace, **more})


class PlainConnection:
    """Messages over a socket, framed as `multiprocessing.connection` does; whatever spoils the connection is an EOFError."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline: float | None = time.monotonic() + HANDSHAKE_LIMIT  # for all reading, until the handshake is done
        self._buffer = bytearray()
        self.poll = make_poll(sock)  # also for TLS, which keeps the descriptor
        sock.settimeout(HANDSHAKE_LIMIT)
        # Send at once, and notice a vanished peer within SILENCE_LIMIT, idle or with data on the way.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 15, "TCP_KEEPALIVE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
        for name, value in {**options, "TCP_USER_TIMEOUT": int(SILENCE_LIMIT * 1000)}.items():
            self.set_option(name, value)

    def set_option(self, name: str, value: int) -> None:
        """Set an option of TCP, if the system has it."""
        with contextlib.suppress(OSError, AttributeError):
            self.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def secure(self, context: ssl.SSLContext, server_side: bool = False) -> None:
        """Encrypt from now on; blocks for the handshake of TLS. Raises OSError."""
        self.sock = context.wrap_socket(self.sock, server_side=server_side, do_handshake_on_connect=False)
        self.sock.do_handshake()  # not while wrapping: then nobody else could close the socket

    def end_handshake(self, silence_limit: float | None) -> None:
        """From now on only `silence_limit` seconds without a byte end the connection (None: nothing but the system does)."""
        self.deadline = None
        self.sock.settimeout(silence_limit)

    def cut(self) -> None:
        """End the connection: the thread that uses it gets an EOFError, and closes it.

        If another thread closed it, the system could give the number of its descriptor to a new connection, or to a file, before
        OpenSSL has seen the end. OpenSSL knows only the number: it would read and write there.
        """
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # SSLSocket.shutdown would let its thread send in the clear

    def close(self) -> None:
        """Close the socket; only for the thread that uses it, or when there is none."""
        self.cut()
        self.sock.close()

    def send_bytes(self, *messages: bytes) -> None:
        """Send messages; blocks until the system has taken them all, EOFError when it takes nothing for too long."""
        view = memoryview(b"".join([struct.pack("!i", len(message)) + message for message in messages]))
        try:
            while view:
                view = view[self.sock.send(view[: 1 << 20]) :]  # since TLS has one time limit for all that it is given
        except OSError as error:
            raise EOFError(explain_error(error)) from error

    def recv_bytes(self, maxlength: int = MESSAGE_LIMIT) -> bytes:
        """The next message; blocks until it is there, EOFError when the peer is silent for too long."""
        self.fill(4)
        (size,) = struct.unpack_from("!i", self._buffer)
        if not 0 <= size <= maxlength:
            self.close()
            raise EOFError("the peer announced a message that is too long")
        if len(self._buffer) < 4 + size:
            self.fill(4 + size)
        data = bytes(memoryview(self._buffer)[4 : 4 + size])
        del self._buffer[: 4 + size]
        return data

    def has_data(self) -> bool:
        """Whether something has come, if only the end."""
        pending = self._buffer or getattr(self.sock, "pending", int)()  # which TLS has read
        return bool(pending or self.sock.fileno() < 0 or self.poll(0))

    def fill(self, size: int) -> None:
        """Have at least `size` bytes in the buffer; blocks as `recv_bytes` does."""
        while (missing := size - len(self._buffer)) > 0:
            try:
                if self.deadline is not None:
                    self.sock.settimeout(max(0.001, self.deadline - time.monotonic()))
                data = self.sock.recv(max(1 << 16, min(missing, 1 << 20)))
            except OSError as error:
                raise EOFError(explain_error(error)) from error
            if not data:
                raise EOFError("the peer closed the connection")
            self._buffer += data


def make_tls_context(authkey: bytes, host: str, server_side: bool) -> ssl.SSLContext:
    """TLS 1.3 with the authkey as pre-shared key (RFC 8446, 2.2), without certificates. Raises Failure where Python cannot."""
    import hmac  # here, as they would take a tenth of the time to start
    import ssl

    if not getattr(ssl, "HAS_PSK", False):
        where = "" if is_loopback(host) else f", the default beyond loopback ({host}),"
        problem = f"TLS{where} needs Python 3.13 or newer, not {sys.version.split()[0]}"
        raise Failure(f"{problem}: start workers with the master's --ssh, or use --no-tls where nobody can listen in")
    key = hmac.digest(authkey, b"task_master TLS 1.3 pre-shared key", "sha256")  # not the key that answers challenges
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if server_side:
        context.num_tickets = 0
        context.set_psk_server_callback(lambda identity: key)  # type: ignore[attr-defined,unused-ignore]
    else:
        context.check_hostname = False  # and CERT_REQUIRED stays: without a CA no certificate will do, only the key
        context.set_psk_client_callback(lambda hint: ("task_worker", key))  # type: ignore[attr-defined,unused-ignore]
    return context


def show_address(address: tuple[Any, ...]) -> str:
    """`host:port`, or `[host]:port` for IPv6."""
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant."""
    return host in ("::1", "localhost") or bool(re.fullmatch(r"127(\.[0-9]+){1,3}", host))


def make_poll(file: Any) -> Callable[[float], bool]:
    """A function that tells whether something can be read, if only the end; it blocks for that many seconds at most."""
    if not hasattr(select, "poll"):
        return lambda timeout: bool(connection.wait([file], timeout))
    poll = select.poll()  # once: `connection.wait` makes one for each call, a tenth of what a task costs (row `latency`)
    poll.register(file, select.POLLIN)
    return lambda timeout: bool(poll.poll(timeout * 1000))


def write_all(data: bytes, descriptor: int) -> None:
    """Write all of it, however little the system takes at a time; blocks while it takes nothing. Raises OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # somebody made the pipe non-blocking for all who write there
            select.select([], [descriptor], [])


def write_line(text: str, descriptor: int = 2) -> None:
    """Write a line to standard error or output, at once and whole; nothing happens when nobody can read it."""
    with contextlib.suppress(OSError):
        write_all(f"{text}\n".encode("utf-8", "replace"), descriptor)


def write_last_line(text: str) -> None:
    """Write a line to standard error if that does not block: for those that leave at once."""
    with contextlib.suppress(OSError, ValueError):
        if os.name == "nt" or select.select([], [2], [], 0)[1]:
            os.write(2, f"{text}\n".encode("utf-8", "replace"))


def prepare_process() -> None:
    """Open /dev/null on closed standard descriptors, so that no socket gets their numbers; raise the limit of files."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some parents leave it, it would hide exit statuses
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = FILE_LIMIT if hard == resource.RLIM_INFINITY else min(hard, FILE_LIMIT)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def explain_error(error: BaseException) -> str:
    """What the system says, without its number: `connection refused`."""
    text = str(getattr(error, "strerror", None) or error or type(error).__name__)
    return text[:1].lower() + text[1:]


def explain_exit(status: int) -> str:
    """`exit status 2`, `killed by signal 9 (SIGKILL)`."""
    names = {number.value: f" ({number.name})" for number in signal.Signals}
    return f"killed by signal {-status}{names.get(-status, '')}" if status < 0 else f"exit status {status}"


STOP_SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
TERMINALS = [descriptor for descriptor in range(3) if os.isatty(descriptor)]
CAUGHT: dict[int, float] = {}  # by signal: until when another one is ignored
SAME_SIGNAL = 0.005  # seconds for which that is so: `timeout` sends a signal to a process and to its group


def catch_signals(handler: Callable[[int, Any], None]) -> None:
    """Call `handler` for the signals that stop a program, except SIGHUP where the parent ignores it, as `nohup` does."""

    def handle(number: int, frame: Any) -> None:
        again = time.monotonic() < CAUGHT.get(number, 0.0)
        # When a terminal is closed, the shell and the system both send a SIGHUP: all that come from then on count as one.
        closed = number not in (signal.SIGINT, signal.SIGTERM) and TERMINALS and not any(map(os.isatty, TERMINALS))
        CAUGHT[number] = math.inf if closed else time.monotonic() + SAME_SIGNAL
        if not again:
            handler(number, frame)

    for number in STOP_SIGNALS:
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


# ---- key -----------------------------------------------------------------------------------------------------------

GIVEN_KEYS: list[bytes] = []  # the last TASK_AUTHKEY, for a program that makes several TaskMasters


def read_key(path: str | None) -> bytes:
    """The key: TASK_AUTHKEY, the named file or ~/.task_authkey. Raises Failure; FileNotFoundError if only that is missing."""
    if "TASK_AUTHKEY" in os.environ:  # taken out, so that nothing that is started later can see it
        GIVEN_KEYS[:] = [os.fsencode(os.environ.pop("TASK_AUTHKEY"))]
    if GIVEN_KEYS:
        return check_key(GIVEN_KEYS[0], "TASK_AUTHKEY")
    source = os.path.expanduser(DEFAULT_KEY_FILE if path is None else path)
    try:  # without waiting for whoever may write into a named pipe
        with open(source, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            key = file.read(4096) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        if path is None and isinstance(error, FileNotFoundError):
            raise
        raise Failure(f"cannot read the key file {source}: {explain_error(error)} (is it there, and this user's?)") from None
    if os.name == "posix" and key:
        if status.st_uid not in (0, os.geteuid()):
            raise Failure(f"the key file {source} belongs to another user: use one of your own")
        if stat.S_IMODE(status.st_mode) & (0o077 if status.st_uid else 0o037):  # a group may read root's
            raise Failure(f"the key file {source} can be read by others: chmod 600 {source}")
    return check_key(key.removeprefix(b"\xef\xbb\xbf"), source)  # which editors on Windows put at the beginning of UTF-8


def check_key(key: bytes, source: str) -> bytes:
    """The key without the white space around it. Raises Failure when it cannot be one."""
    if not isinstance(key, bytes):
        raise Failure(f"the {source} is a {type(key).__name__}: it takes bytes")
    if not key.strip():
        raise Failure(f"the key in {source} is empty, or it is no file: put at least 16 random bytes there")
    if b"\0" in key:
        raise Failure(f"the key in {source} has a zero byte, which no environment can carry: use letters and digits")
    return key.strip()


# ---- options that both programs have -------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line."""

    def __init__(self, **options: Any) -> None:
        formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=27)
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)
        self.add_argument("--quiet", action="store_true", help="say only what stops the program (and where a master listens)")
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message: str) -> NoReturn:
        is_task = self.prog == "task_master" and re.search(r"arguments: (?!--\w)|-0/--null", message)
        hint = "TASKs stand together, behind -- if one begins with -" if is_task else "--help tells more"
        self.exit(2, f"{self.prog}: {message} ({hint})\n")


def bounded(kind: Callable[[str], Any], low: float, high: float, noun: str) -> Callable[[str], Any]:
    """A type for argparse: a number from `low` to `high`."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not {noun}")

    return parse


COUNT = bounded(int, 1, 1e9, "a count: it takes a whole number from 1")


def parse_host(text: str) -> str:
    """A type for argparse: a host; the empty text is any address of this machine."""
    try:
        if not text.encode("idna").decode().isprintable() or re.search(r"[][\s/]|^[^:]*:[^:]*$", text):
            raise UnicodeError
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a host: it takes a name or an address, and --port the port") from None
    return text or "0.0.0.0"


def add_function_options(group: Any) -> None:
    """What is run, and for how long in one process."""
    add = group.add_mutually_exclusive_group().add_argument
    add("--function", type=check_spec, metavar="MODULE:NAME", help="called with each task (default: squares a number)")
    add("--command", type=check_template, metavar="TEMPLATE", help="run in a shell for each task; {} is the task")
    group.add_argument("--tasks-per-process", type=COUNT, metavar="N", help="a fresh process after N tasks (default: no limit)")


def add_connection_options(group: Any, lowest_port: int, host_help: str, key_hint: str) -> None:
    """How the two programs find and trust each other."""
    port = bounded(int, lowest_port, 65535, f"a port: it takes {lowest_port} to 65535")
    any_port = "" if lowest_port else "; 0: any free one"
    group.add_argument("--host", type=parse_host, default="127.0.0.1", help=host_help)
    group.add_argument("--port", type=port, default=5000, help=f"(default: %(default)s{any_port})")
    text = f"the key, unless TASK_AUTHKEY is set (default: {DEFAULT_KEY_FILE}{key_hint})"
    group.add_argument("--authkey-file", metavar="FILE", help=text)
    add = group.add_mutually_exclusive_group().add_argument
    add("--tls", action="store_true", default=None, help="encrypt (default beyond loopback; Python 3.13+)")
    add("--no-tls", dest="tls", action="store_false", help="do not encrypt")


# ---- end of what the master imports --------------------------------------------------------------------------------

TASKS, RESULTS = "get_task_queue", "get_result_queue"  # what the tutorial calls them; also their ids on the wire
LEASE_SECONDS = 0.4  # of work to lease at a time, when the master is near
LEASE_GROWTH = 8  # times as many tasks as asked for last, at most; what turns out to be slow is released
MAX_LEASE_SECONDS = 10.0  # of work, however far the master
LEASE_SLACK = 3  # times as long as it should, at most, a lease is worked on; then what has not begun is released
ROUND_TRIP_SHARE = 0.05  # at most this part of a slot's time should go to round trips
LEASE_WAIT = 30.0  # seconds that a request for tasks may wait at the master
ANSWER_LIMIT = 45.0  # seconds to wait for an answer, at least; a request for tasks is answered within LEASE_WAIT
SETTINGS_LIMIT = 10_000  # characters of an answer that is read as JSON
REPORT_INTERVAL = 0.3  # seconds between reports while a lease is worked on
SLOW_TASK = 0.5  # seconds of a task, or of loading the function, after which the tasks behind it are released
LOAD_BEAT = 1.0  # seconds between beats during a load, since the job may end without this slot
REMEDIES = {errno.EMFILE: "see ulimit -n", errno.EAGAIN: "see ulimit -u", errno.ENOMEM: "memory is short"}
START_ATTEMPTS = 3  # of a child that dies before it could run a task
START_POLL = 0.02  # seconds between looks around while a child loads the function
LARGE_CALL = 1 << 20  # bytes of a call that may wait for others at the master
LARGE_REPORT = 200  # outcomes: to record them takes as long as a round trip
POLL_INTERVAL = 0.25  # seconds after which a slot looks around while its child works
FEED_LIMIT = 15  # seconds in which a child reads nothing of a long text: it hangs, or is dead, and a fork of it keeps the pipe
EXIT_GRACE = 5.0  # seconds for a child to leave by itself
OUTPUT_LIMIT = 1 << 20  # bytes kept of each stream of a --command
ERROR_SIZE = 8192  # characters kept of an error's message, and twice that of its traceback
FRAMES = 1000  # of a traceback, the innermost ones: to describe a million would take minutes
PIECE = 1 << 14  # bytes of an outcome that go through the pipe at a time: written at once, so that no death can cut it
MEMORY_SIZE = 1 << 20  # bytes that a child shares with its slot: some words, the first ones named here, then outcomes
POSITION, STARTED_AT, REVOKED, LENGTH, TIME_LIMIT, HEADER = 0, 1, 2, 3, 4, 64
FORK_TIME = 1e-5  # seconds; no fork is as fast, and to ask for the process's id each time would slow tiny tasks down by a tenth
STREAM_CHECK = 0.001  # seconds of tasks after which a child looks at its standard streams
LOADING = "TASK_WORKER_LOADING"  # in the environment of a child while it loads the function
MARK = "TASK_WORKER_MARK"  # in the environment of a child, and so of all that it starts
WORKER_MARK = f"{os.getpid()}.{random.getrandbits(32):x}."  # how the value of MARK begins for all children of this worker


def say(text: str) -> None:
    """One line on standard error."""
    write_line(f"task_worker: {text}")


# ---- functions: what is done with a task ---------------------------------------------------------------------------


def square(n: Any) -> str:
    """The demonstration: the square of a number, in words."""
    if not isinstance(n, (int, float)):
        raise TypeError("the demonstration squares numbers: name a function of yours with --function MODULE:NAME")
    print(f"run task {n} * {n}...")
    return f"{n} * {n} = {n * n}"


STANDARD = getattr(sys, "stdlib_module_names", None) or {  # the names of the standard library's modules
    *sys.builtin_module_names,
    *[name.partition(".")[0] for name in os.listdir(os.path.dirname(os.__file__))],
}


def find_shadows(folder: str) -> set[str]:
    """The names of modules of the standard library, of any system, that files in the folder have, too."""
    with contextlib.suppress(PermissionError):  # one may only pass through it
        return {name.partition(".")[0] for name in os.listdir(folder)} & STANDARD
    return set()


def load_function(spec: str) -> Callable[[Any], Any]:
    """The function that MODULE:NAME names, imported from the current directory or the path. Raises Failure with the reason."""
    module_name, _, name = check_spec(spec).partition(":")
    folder = os.getcwd()
    try:  # search the user's folders behind the standard library, so that no file there stands in for a module of that
        folders = [folder, os.path.dirname(os.path.realpath(__file__))]
        for shadow in set().union(*map(find_shadows, folders)):
            if not importlib.util.find_spec(shadow):  # of another system, but Python tries to import it
                sys.modules[shadow] = None  # type: ignore[assignment]
        places = [index for index, entry in enumerate(sys.path) if entry.endswith(("site-packages", "dist-packages"))]
        place = min(places, default=len(sys.path))
        sys.path[place:place] = folders
        function = functools.reduce(getattr, name.split("."), importlib.import_module(module_name))
    except BaseException as error:  # the module's own code runs here, and may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError):
            by_ssh = folder.startswith(os.path.realpath(tempfile.gettempdir()) + "/task_worker-")  # as BOOTSTRAP names it
            where = "what --ssh sends of the master's current folder" if by_ssh else folder
            reason += f" (looked in {where} and the path of {sys.executable})"
        raise Failure(f"--function {spec}: cannot import it on {socket.gethostname()}: {reason}") from None
    if not callable(function):
        raise Failure(f"--function {spec}: it is a {type(function).__name__}, not a function")
    return function


def check_spec(spec: str) -> str:
    """A type for argparse: MODULE:NAME. Raises Failure."""
    module, _, name = spec.partition(":")
    if module.endswith(".py") or "/" in module or os.sep in module:
        path = os.path.basename(module) if os.path.isabs(module) else os.path.normpath(module)
        module = re.sub(r"\.py$", "", path).replace(os.sep, ".").strip(".")
        raise Failure(f"--function {spec}: it takes the name of a module, not of a file: say {module}:{name or 'NAME'}")
    if not (module and name):
        raise Failure(f"--function {spec}: it takes MODULE:NAME, as in mailer:send")
    if module in ("__main__", "__mp_main__"):
        remedy = "put the function into a file of its own"
        raise Failure(f"--function {spec}: workers do not have the script that was started: {remedy}")
    top = module.partition(".")[0]
    if top in {"test", *STANDARD} and (os.path.exists(top) or os.path.exists(f"{top}.py")):
        raise Failure(f"--function {spec}: {top} is a module of Python's standard library: rename yours")
    return spec


MEMBER = re.compile(r"(?<!\$)\{(\w+)\}", re.ASCII)  # `{NAME}`, for the shell's variable TASK__NAME
split_template = re.compile(
    r"""
    (?P<begin> (?<!<) << -? [ \t]* (?P<quote> ["'\\]? ) (?P<end> [\w.-]+ ) (?! [\w.-] | [ \t]*\)\) ) ["']? )  # a here-document,
    (?= (?P<rest> (?: \\. | '[^']*' | "(?:\\.|[^"\\])*" | [^\n] )* ) ) (?P=rest)  # the rest of its first line,
    (?P<body> \n (?: .*? \n )?? \t* (?P=end) $ )  # and its text
    | (?<! [^\s;&|(] ) (?<! \\. ) \# [^\n]*  # a comment
    | \\. | '[^']*'? | "(?:\\.|[^"\\])*"?  # what is quoted
    | \$\$ | \$\{ (?: \\. | '[^'{}]*' | "[^"{}]*" | [^{}"'\\\n] )* \} | \{[\w./#%]*\} | .  # a variable, braces, or a character
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
).finditer


def parse_template(template: str) -> tuple[str, list[str], list[str]]:
    """The script of a --command TEMPLATE, the members of a task that it names, and those in quotes. Raises Failure."""
    shown = f"--command {' '.join(template.split())}"
    names: list[str] = []
    quoted: list[str] = []

    def convert(text: str) -> str:
        """Shell code, with variables where tasks go."""
        return "".join([convert_part(match, text) for match in split_template(text)])

    def convert_part(match: re.Match[str], text: str) -> str:
        part, begin, quote, rest, body = match.group(0, "begin", "quote", "rest", "body")
        if begin and re.search(r"(?<!<)<<-?[ \t]*[\"'\\]?[A-Za-z_]\w*(?!\w|.*\)\))", rest):
            raise Failure(f"{shown}: two here-documents begin on one line: give each a line of its own")
        if begin and not (quote or re.search(r"\$\(|`", body)):  # a here-document, in which quotes mean themselves
            body = re.sub(r"(?<!\\)((?:\\\\)*)\\(?={)", r"\1\\\\", body)  # `\{` keeps its backslash in a shell, `\$` does not
            names.extend(MEMBER.findall(body))
            return begin + convert(rest) + MEMBER.sub(r"${TASK__\1}", body).replace("{}", "${TASK}")
        if begin:
            return begin + convert(rest) + keep(body)
        if part[0] in "'\"\\":
            end, plain = match.end(), re.sub(r"\\.", "", part)
            if part[0] == '"' and (plain.count("$(") > part.count(")") or plain.count("`") % 2):
                end = text.rfind('"')  # a command follows in these quotes
            keep(text[match.start() : max(end, match.end())])
        elif MEMBER.fullmatch(part):
            names.append(part[1:-1])
            return f'"$TASK__{part[1:-1]}"'  # never a task's text: a shell does not read what a variable holds as code
        elif re.fullmatch(r"\{[./#%]+\}", part):
            raise Failure(f'{shown}: {part} is of GNU parallel: write "${{TASK%.*}}", "${{TASK##*/}}" or "$TASK_ID", say')
        return '"$TASK"' if part == "{}" else part

    def keep(text: str) -> str:
        """Text in quotes, where nothing is replaced."""
        if found := re.search(r"\{\}" if text[0] == "'" else r"\{[./#%]*\}", text):  # GNU parallel's braces, too
            raise Failure(f'{shown}: {found[0]} in quotes is not replaced: take the quotes away, or write "$TASK"')
        quoted.extend(MEMBER.findall(text))
        return text

    script = convert(template)
    if re.search(r"\bTASK(\b|_)", script):
        return script, names, quoted
    if set(template) & set("|;&<>\n") or re.search(r"(^|\s)#", template) or not template.strip():
        raise Failure(f"{shown}: say with {{}} where the task goes")
    return f'{script} "$TASK"', names, quoted


def check_template(template: str) -> str:
    """A type for argparse: a --command TEMPLATE. Raises Failure."""
    if os.name != "posix":
        raise Failure("--command needs a POSIX shell, which this system does not have: use --function MODULE:NAME")
    if "\0" in template:
        raise Failure(f"--command {template!r}: it has a zero byte, which no command can have: take it out")
    parse_template(template)
    return template


class CommandFailed(Exception):
    """A command did not end with exit status 0; `members` are those of the error that its record shows."""

    def __init__(self, members: dict[str, Any]) -> None:
        said = members["stderr"].strip()[-ERROR_SIZE // 2 :]  # the reason usually comes last
        super().__init__(f"{explain_exit(members['exit'])}: {said or 'nothing on standard error'}")
        self.members = members


class Command:
    """A function that runs a shell command with the task in its environment. Raises Failure for a bad template."""

    def __init__(self, template: str) -> None:
        self._script, self._names, self._quoted = parse_template(template)
        self._environment = dict(os.environb)  # in bytes, as the system takes it: to encode it would take a twentieth of the time
        self.task_id = self.text = ""  # of the task to come

    def __call__(self, task: Any) -> dict[str, Any]:
        """Exit status and output, each stream cut at OUTPUT_LIMIT. Raises CommandFailed, or what the system refuses."""
        text = self.text.encode() if isinstance(task, float) else to_bytes(task)  # 3.10 stays 3.10
        environment = {**self._environment, b"TASK": text, b"TASK_ID": self.task_id.encode()}
        remedy = "{} is the whole task; quote other braces"
        for name in self._names:
            if not isinstance(task, dict) or name not in task:
                raise ValueError(f"the command has {{{name}}}, but the task no member {name} ({remedy})")
            member = json.loads(self.text, parse_float=str)[name] if isinstance(task[name], float) else task[name]
            environment[f"TASK__{name}".encode()] = to_bytes(member)
        for name in self._quoted:
            if isinstance(task, dict) and name in task:  # else it is awk's, say
                raise ValueError(f"{{{name}}} in quotes is not replaced: take the quotes away, or write {{ {name} }}")
        with open_output() as stdout, open_output() as stderr:
            actions = [(os.POSIX_SPAWN_DUP2, stdout.fileno(), 1), (os.POSIX_SPAWN_DUP2, stderr.fileno(), 2)]
            defaults = [signal.SIGPIPE, signal.SIGXFSZ]  # Python ignores them
            try:
                pid = os.posix_spawn("/bin/sh", ["sh", "-c", self._script], environment, file_actions=actions, setsigdef=defaults)
            except OSError as error:
                if error.errno != errno.E2BIG:
                    raise
                raise ValueError("the task is too long for a command (Linux takes 128 KiB): put a path there instead") from None
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            result = {"exit": status, "stdout": read_output(stdout, status), "stderr": read_output(stderr, status)}
        if status:
            raise CommandFailed(result)
        return result


def to_bytes(value: Any) -> bytes:
    """A string as it is, any other value as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "surrogateescape")  # as it came, whatever the locale is


def open_output() -> Any:
    """A file without a name for what a command prints, so that nothing waits for what it left in the background."""
    # As `tempfile.TemporaryFile` makes it, whose checks took a twentieth of a command's time (row `command` of the benchmark).
    with contextlib.suppress(OSError, AttributeError):  # not every system, and not every file system, has these
        return io.FileIO(os.open(tempfile.gettempdir(), os.O_RDWR | os.O_APPEND | os.O_TMPFILE, 0o600), "r+")
    return tempfile.TemporaryFile("a+b", buffering=0)


def read_output(file: Any, status: int) -> str:
    """A file as text, cut visibly after OUTPUT_LIMIT bytes. Raises OSError if a command that succeeded may have printed more."""
    cut = os.fstat(file.fileno()).st_size - OUTPUT_LIMIT
    text = os.pread(file.fileno(), OUTPUT_LIMIT, 0).decode("utf-8", "replace")
    if not status:
        os.write(file.fileno(), b"\n")  # raises OSError if the disk is full
    return text if cut <= 0 else f"{text}\n[... {cut} bytes cut]"


def convert_array(value: Any) -> Any:
    """For JSON: what numpy, pandas and torch have, as lists and numbers. Raises TypeError for anything else."""
    if not hasattr(type(value), "tolist"):
        raise TypeError(f"a {type(value).__name__} is not JSON: give a str, say")
    return value.tolist()


# json.loads without what stands around it there, and json.dumps without NaN: a third of the time.
scan_json = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
encode_json = json.JSONEncoder(allow_nan=False, default=convert_array).encode


def encode_result(value: Any) -> str:
    """A result as JSON text. Raises TypeError or ValueError, with the place in it that cannot be JSON."""
    try:
        text = encode_json(value)
    except (TypeError, ValueError, RecursionError):  # a second look, slowly
        try:
            text = encode_json(make_plain(value, "result", False))
        except RecursionError:
            raise ValueError("the result is nested too deeply, or contains itself") from None
    if len(text) > TEXT_LIMIT:
        raise ValueError(f"the result has {len(text)} bytes as JSON, more than {TEXT_LIMIT}: write it to a file")
    return text


def make_plain(value: Any, place: str, is_key: bool) -> Any:
    """A value as JSON has it: what has `tolist` converted, and None for NaN and infinities that are no keys. Raises TypeError."""
    # No defaults: 3.13.0 does not count such calls as recursion, and a value that contains itself would fill the memory.
    if hasattr(type(value), "tolist") and type(plain := value.tolist()) is not type(value):  # numpy, pandas, torch
        return make_plain(plain, place, is_key)
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value) if is_key and math.isinf(value) else None  # as keys, both would be "null"
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)) and not is_key:
        return [make_plain(item, f"{place}[{index}]", False) for index, item in enumerate(value)]
    if isinstance(value, dict) and not is_key:
        keys = [make_plain(key, f"{place} has a key that", True) for key in value]
        values = [make_plain(item, f"{place}[{json.dumps(key, default=str)}]", False) for key, item in value.items()]
        return dict(zip(keys, values))
    kind = f"{type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")
    raise TypeError(f"{place} is a {kind}, which JSON does not have: return list() or str() of it, say")


# ---- child: the only process that runs the function ----------------------------------------------------------------


def run_child(pipe: Any, memory: Memory, folder: str | None, function: str | None, command: str | None) -> None:
    """The child's main: says whether the function could be loaded, and which text it has; then runs what it is fed."""
    leave_terminal()
    if os.name == "posix":
        os.set_inheritable(pipe.fileno(), False)  # a command must not write there by mistake
    try:
        _thread.start_new_thread(die_with_parent, ())  # which gevent does not find, if the module patches threading
        if folder:
            os.chdir(folder)
        call: Callable[[Any], Any] = Command(command) if command else square
        if function:
            del sys.argv[1:]  # they are for the worker, not for a module that reads them
            os.environ[LOADING] = "1"
            multiprocessing.set_start_method(None, force=True)  # which spawn has set: the function may want another one
            call = load_function(function)
            os.environ.pop(LOADING, None)  # the module may have cleared them all
        pipe.send_bytes(b"+" + digest_module(function).encode())
    except (Failure, OSError, RuntimeError) as failure:  # RuntimeError: there may be no more threads
        answer = b"!" if isinstance(failure, RuntimeError) else b"-" + str(failure)[:ERROR_SIZE].encode("utf-8", "replace")
        pipe.send_bytes(answer)
        return
    streams = identify_streams()
    with contextlib.suppress(EOFError, OSError), pipe:  # the slot closed the pipe, or a task did
        while run_tasks(call, pipe.recv_bytes().decode().split("\n"), memory, pipe, streams):
            pipe.send_bytes(b".")
            if identify_streams() != streams:  # looked at while the slot reports
                break
        pipe.send_bytes(b"x")  # for the tasks to come
    if not function:  # nothing of the user's wants to be told of the end, which would take 20 ms
        os._exit(0)


class Output(io.FileIO):
    """Behind a standard stream of tasks: whatever one of them does to its descriptors, the others do not fail when they print."""

    def write(self, data: Any) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError):
            write_all(data, self.fileno())
        return len(data)


def leave_terminal() -> None:
    """Streams and a session of its own: Ctrl-C in the terminal reaches the parent alone, and a kill takes the whole group."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # so that nothing a task starts waits for the terminal
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        raw = io.BufferedWriter(Output(descriptor, "w", closefd=False))
        stream = io.TextIOWrapper(raw, errors="backslashreplace", line_buffering=True)
        vars(sys).update({name: stream, f"__{name}__": stream})  # held twice: if a module replaces one, it is not closed
    if hasattr(os, "setsid"):
        os.setsid()
    for number in STOP_SIGNALS:
        before = signal.signal(number, signal.SIG_IGN)  # forgets one that came in
        if hasattr(os, "setsid"):  # else Ctrl-C would reach it
            signal.signal(number, before)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def die_with_parent() -> NoReturn:
    """Waits for the parent's end, however it comes, and takes all that was started here along."""
    parent, mark = multiprocessing.parent_process(), os.environ[MARK]
    assert parent
    connection.wait([parent.sentinel])
    kill_started(mark)
    with contextlib.suppress(AttributeError):
        os.killpg(0, signal.SIGKILL)  # where there is no /proc
    os._exit(1)


def digest_module(spec: str | None) -> str:
    """SHA-256 of the text of the function's module; "" when it has none, or none in a file of its own."""
    path = getattr(sys.modules[spec.partition(":")[0]], "__file__", None) if spec else None
    with contextlib.suppress(OSError):  # it is in a zip, say
        if isinstance(path, str) and path.endswith(".py"):
            import hashlib

            return hashlib.sha256(read_file(path)).hexdigest()
    return ""


class Memory:
    """What a child shares with its slot: words (position, time and so on), and behind them outcomes, a line each.

    Their length is written last, so that a reader that stops there sees whole lines. It is a memfd where there is one, since
    a file on a full disk has holes, and to write into a hole is a SIGBUS.
    """

    def __init__(self, source: Any = None) -> None:
        """Make it, or open in the child what came with its start. Raises OSError."""
        self.source = source.detach() if hasattr(source, "detach") else source or make_memory()
        if isinstance(self.source, int):
            os.ftruncate(self.source, MEMORY_SIZE)
            self.bytes: Any = mmap.mmap(self.source, MEMORY_SIZE)
            os.set_inheritable(self.source, False)
        else:
            self.bytes = memoryview(self.source).cast("B")
        self.words = memoryview(self.bytes)[:HEADER].cast("d")

    def __reduce__(self) -> Any:
        """For the start of the child, which inherits the descriptor."""
        return Memory, (reduction.DupFd(self.source) if isinstance(self.source, int) else self.source,)


def make_memory() -> Any:
    """A memfd, or an array in a temporary file where there is none, or where it is forbidden, as in some containers."""
    try:
        return os.memfd_create("task_worker")
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise  # the array needs a descriptor, too
    return Child.context.RawArray("b", MEMORY_SIZE)


def run_tasks(function: Callable[[Any], Any], lines: list[str], memory: Memory, pipe: Any, streams: Any) -> bool:
    """Run tasks (`ID TEXT`) in this order, until the rest is revoked. Returns whether this process is fit for more.

    It is not if a task took too long, or has damaged the standard streams.
    """
    clock, words, place, stdout = time.perf_counter, memory.words, memory.bytes, sys.stdout
    command = function if isinstance(function, Command) else None
    getpid, pid = os.getpid, os.getpid()
    time_limit, milliseconds, tick = words[TIME_LIMIT], 0, 0.0  # milliseconds of Unix time, and when the next one begins
    end, checked_at = HEADER, math.inf if command else clock()  # a command cannot reach the streams of this process
    for position, line in enumerate(lines):
        task_id, _, text = line.partition(" ")
        words[STARTED_AT] = started_at = clock()
        words[POSITION] = position
        if words[REVOKED]:  # looked at after the position is written, see `revoke`
            words[POSITION] = position - 1  # so that it does not count as begun
            break
        if started_at >= tick:
            offset = time.time() - started_at  # anew, since the machine may have slept
            milliseconds = int((offset + started_at) * 1e3)
            tick = (milliseconds + 1) / 1e3 - offset
        if command:
            command.task_id, command.text = task_id, text
        members = run_task(function, text)
        now = clock()
        if now - started_at > FORK_TIME and getpid() != pid:
            os._exit(0)  # it is a copy that the task made by forking, and that came back
        outcome = (members + format_times(milliseconds, int((now - started_at) * 1e6)) + "\n").encode()
        if end + len(outcome) <= MEMORY_SIZE:
            place[end : end + len(outcome)] = outcome
            end += len(outcome)
            words[LENGTH] = end
        else:  # this one and all behind it go through the pipe, so that they stay in order
            end = MEMORY_SIZE
            for begin in range(0, len(outcome), PIECE):
                pipe.send_bytes(outcome[begin : begin + PIECE])
        if now - started_at > time_limit:
            return False  # it may be killed at any moment, and no other task with it
        if now - checked_at > STREAM_CHECK or sys.stdout is not stdout or getattr(stdout, "closed", False):
            checked_at = now
            flush_streams()
            if identify_streams() != streams:
                return False
    flush_streams()
    return True


def run_task(function: Callable[[Any], Any], text: str) -> str:
    """Call the function with a task. Returns the member `"result"` or `"error"` of a record."""
    try:
        value = function(scan_json(text, 0)[0])
        if type(value) is not int and hasattr(type(value), "cr_await"):  # of an `async def`
            import asyncio

            value = asyncio.run(value)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: no task may end its child
        return describe_error(error)
    try:
        return RESULT + (repr(value) if type(value) is int else encode_result(value))
    except BaseException as error:  # another run would return the same
        return describe_error(error, final=True)


def flush_streams() -> None:
    """Send out what tasks have printed."""
    with contextlib.suppress(Exception):  # a task may have closed or replaced them
        sys.stdout.flush()
        sys.stderr.flush()


def identify_streams() -> list[Any]:
    """What stands behind standard input, output and error; [] when one of them is closed."""
    with contextlib.suppress(OSError, AttributeError, ValueError):  # ValueError: what is behind one was taken away
        if not sys.stdout.closed and not sys.stderr.closed:
            return [os.fstat(descriptor)[1:3] for descriptor in range(3)]
    return []


def describe_error(error: BaseException, **more: Any) -> str:
    """An exception as the member `"error"` of a record; its own `__str__` may be broken."""
    message, trace = "(its __str__ raises)", ""
    with contextlib.suppress(BaseException):
        message = str(error)
    if isinstance(error, CommandFailed):
        return format_error("CommandFailed", message, **error.members)
    frames = error.__traceback__ and error.__traceback__.tb_next  # the first one is ours
    with contextlib.suppress(BaseException):
        import traceback  # here, since there may be no descriptor or memory left for it

        trace = "".join(traceback.format_exception(type(error), error, frames, limit=-FRAMES))
    return format_error(type(error).__name__, message, trace, **more)


def share_compiled_code() -> None:
    """Let children import this file by its name, from Python's cache of compiled code: a fifth off their start."""
    path = os.path.realpath(__file__)  # a child that knows only the path of the main module compiles it anew
    if __name__ != "__main__":
        return
    sys.modules["__main__"].__spec__ = None  # that of `python -m` would have them look for it
    with contextlib.suppress(OSError):
        if not find_shadows(os.path.dirname(path)):
            sys.path.append(os.path.dirname(path))
            found = importlib.util.find_spec("task_worker")
            if found and found.origin == path:
                sys.modules["__main__"].__spec__ = found


class ChildDied(Exception):
    """The child process has ended, with this exit status (negative: killed by a signal), `seconds` after a task's start."""

    def __init__(self, status: int, seconds: float) -> None:
        hint = " (out of memory?)" if status == -9 else ""
        super().__init__(f"the task's process ended: {explain_exit(status)}{hint}")
        self.status, self.started_at, self.seconds = status, time.time() - seconds, seconds


class Child:
    """The process of one slot, and the pipe and the memory that lead to it."""

    context = multiprocessing.get_context("spawn")
    starting = threading.RLock()  # Process.start looks at the other children, and the environment is one for all
    killing_all = False  # whether this process is about to end

    def __init__(self, worker: Worker) -> None:
        """Start the process. Its first message is what `run_child` says about the function. Raises OSError."""
        self._mark = f"{WORKER_MARK}{random.getrandbits(64):x}."
        self._memory = Memory()
        self._taken = HEADER  # up to where we have read the outcomes
        self.pieces: list[bytes] = []  # of a message that is not there as a whole
        self.overdue = False  # whether it was killed for the time limit
        self._quiet = worker.quiet
        try:
            self._pipe, theirs = self.context.Pipe()
            self._poll = make_poll(self._pipe)
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as sock:  # no socket on Windows
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", FEED_LIMIT, 0))
            while self.killing_all:  # leave `starting` to `leave_at_once`: the lock is not fair
                time.sleep(EXIT_GRACE)
            with theirs, self.starting:
                if sys.platform == "linux":
                    resource_tracker.ensure_running()  # one for all children, so without the mark of any
                os.environ[MARK] = self._mark
                arguments = (theirs, self._memory, worker.folder)
                self._process = self.context.Process(target=run_child, args=arguments, kwargs=worker.statement)
                self._process.start()
        finally:
            if isinstance(self._memory.source, int):
                os.close(self._memory.source)  # what is mapped stays

    def feed(self, lines: list[str], time_limit: float) -> None:
        """Hand over tasks, to be run in this order; blocks until the child has read most of a long text."""
        self._taken = HEADER
        struct.pack_into("5d", self._memory.bytes, 0, -1, time.perf_counter(), 0, HEADER, time_limit)  # from POSITION on
        try:
            self._pipe.send_bytes("\n".join(lines).encode("utf-8", "replace"))
        except OSError:  # it just died, or hangs: `receive` finds out
            self.kill()

    def receive(self, timeout: float) -> bytes | None:
        """The next message, or None when no piece of it came for `timeout` seconds, or the pipe has ended. Raises ChildDied."""
        # Asked, since a process that it started may keep the pipe open; and first, since what it said before it died counts.
        alive = self._process.is_alive()
        try:
            while self._poll(timeout if alive else 0):
                self.pieces.append(self._pipe.recv_bytes(MESSAGE_LIMIT))
                if len(self.pieces[-1]) < PIECE or self.pieces[-1].endswith(b"\n"):
                    message, self.pieces = b"".join(self.pieces), []
                    return message
        except (EOFError, OSError):
            self._pipe.close()  # if a task has written here, the child ends after what it was fed
            time.sleep(min(timeout, 0.01))  # the child has ended, or goes on without its end of the pipe
        if alive:
            return None
        seconds = self.running_for()
        self.stop()
        raise ChildDied(self._process.exitcode or 0, seconds)

    def take_outcomes(self) -> str:
        """The outcomes that came since the last call, each with its line end."""
        begin, self._taken = self._taken, int(self._memory.words[LENGTH])
        return bytes(self._memory.bytes[begin : self._taken]).decode()

    def position(self) -> int:
        """Of the task that was started last, in the list that was fed; -1 when none was."""
        return int(self._memory.words[POSITION])

    def running_for(self) -> float:
        """Seconds since the last task was started, or since the tasks were fed."""
        return time.perf_counter() - float(self._memory.words[STARTED_AT])

    def revoke(self) -> int:
        """Start no more of the tasks that were fed. Returns the position of the one that runs."""
        self._memory.words[REVOKED] = 1
        time.sleep(0.001)  # until the child, which writes its position and then looks at the flag, must have seen it
        return self.position()

    def kill(self) -> None:
        """Kill the process and its process group."""
        kill_group(self._process)

    def stop(self, sweep: bool = True) -> None:
        """Let the child leave for EXIT_GRACE seconds, then kill it; with `sweep` kill all that it has started and left, too."""
        self._pipe.close()
        give_up_at = time.monotonic() + EXIT_GRACE
        while self._process.is_alive() and time.monotonic() < give_up_at:
            connection.wait([self._process.sentinel], 0.05)  # not `join`: a task may have handed it on, or closed it
            time.sleep(0.001)
        if self._process.is_alive() and not self.overdue and not self._quiet:
            say(f"a process did not end within {EXIT_GRACE:g} s and is killed: its threads, or what atexit calls, may be cut")
        self.kill()
        self._process.join()
        if sweep:
            kill_started(self._mark)
        while self.killing_all:  # this process is about to end: what becomes of its children is no outcome
            time.sleep(EXIT_GRACE)


def kill_group(process: Any) -> None:
    """Kill a child process and its process group."""
    with contextlib.suppress(OSError, AttributeError):  # it has no group yet, or the system has none
        process.kill()  # first, so that it does not see its command die
        os.killpg(process.pid, signal.SIGKILL)


def read_file(path: str) -> bytes:
    """All that is in a file. Raises OSError."""
    with open(path, "rb") as file:
        return file.read()


def find_started(mark: str, root: int | None) -> set[int]:
    """What was started under a mark, or by the process `root`, with all that these have started; nothing without /proc."""
    parents: dict[int, int] = {}
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc") if sys.platform == "linux" and os.path.exists("/proc/self") else ()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is another user's
            state, parent = read_file(f"/proc/{name}/stat").rpartition(b")")[2].split()[:2]
            threads = os.listdir(f"/proc/{name}/task")[1:] if state == b"Z" else [name]  # others may outlive the first one
            if threads:
                parents[int(name)] = int(parent)
                if int(name) == root or f"{MARK}={mark}".encode() in read_file(f"/proc/{name}/task/{threads[0]}/environ"):
                    found.add(int(name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def kill_started(mark: str, root: int | None = None) -> None:
    """Kill what `find_started` finds but this process, again and again, since it may go on starting processes meanwhile."""
    give_up_at = time.monotonic() + EXIT_GRACE
    found, looks = {0}, 1  # a look that fails, say without a free descriptor, counts as a find
    while looks and time.monotonic() < give_up_at:
        with contextlib.suppress(OSError, MemoryError):  # there may be no descriptor free to look, for a moment
            found = find_started(mark, root) - {os.getpid()}
            for pid in sorted(found, reverse=True):  # the newest first, before it has gone on in another process
                try:
                    if b"from multiprocessing.resource_tracker import main" in read_file(f"/proc/{pid}/cmdline"):
                        found.discard(pid)  # it ends when those have that it serves, and removes the shared memory they left
                    else:
                        os.kill(pid, signal.SIGKILL)
                except (FileNotFoundError, ProcessLookupError):
                    pass
                except PermissionError:
                    found.discard(pid)  # it is another user's, by sudo say
        looks = 3 if found else looks - 1  # a process that keeps forking escapes some looks
        if looks:
            time.sleep(0.002)


# ---- supervisor: leaves nothing behind -----------------------------------------------------------------------------


def supervise(leaving: threading.Event) -> None:
    """Go on in a child of this process, which passes signals on (`leaving` is set there), and kills what is left at its end."""
    theirs, ours = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until both know what to do with them
    worker = os.fork()
    if not worker:
        os.close(ours)
        os.setpgid(0, 0)  # so that what kills the group of this process leaves one that sees it
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # such a group may not write where `stty tostop` is set
        catch_signals(lambda number, frame: None)  # they come through the pipe, so that each comes once
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        threading.Thread(target=watch_pipe, args=(theirs, leaving), daemon=True).start()
        return
    caught: list[int] = []  # `theirs` stays open, so that nothing fails when one comes after the worker's end

    def pass_on(number: int, _frame: object) -> None:
        caught.append(number)
        if len(caught) > 1:
            write_last_line("task_worker: leaving at once")
            with contextlib.suppress(OSError):  # it may have ended
                os.kill(worker, signal.SIGKILL)  # first, so that it does not report that its children die
            leave_at_once(128 + number)
        os.write(ours, bytes([number]))

    def pause(_number: int, _frame: object) -> None:
        with contextlib.suppress(OSError):
            os.kill(worker, signal.SIGSTOP)
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTSTP)  # stops here until continued; not at all if no shell could do that
            signal.signal(signal.SIGTSTP, pause)
            os.kill(worker, signal.SIGCONT)

    catch_signals(pass_on)
    signal.signal(signal.SIGTSTP, pause)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    with contextlib.suppress(ImportError, OSError, AttributeError):
        # PR_SET_CHILD_SUBREAPER, see prctl(2): a process whose parent is gone becomes a child of this one
        importlib.import_module("ctypes").CDLL(None).prctl(36, 1, 0, 0, 0)
    pid = status = 0
    while pid != worker:
        pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        write_last_line(f"task_worker: the worker was {explain_exit(code)}")
    leave_at_once(code if code >= 0 else 128 - code)


def drain(leaving: threading.Event) -> None:
    """What the first signal does; the second one leaves at once."""

    def leave(number: int, _frame: object) -> None:
        write_last_line("task_worker: leaving at once")
        leave_at_once(128 + number)

    if sys.platform != "linux":  # on Linux the supervisor sees to the second one
        catch_signals(leave)
    leaving.set()
    say("draining: finishing what runs, releasing the rest (once more to leave at once)")


def watch_pipe(descriptor: int, leaving: threading.Event, silence_limit: float | None = None) -> None:
    """Drain when a signal's number comes from a pipe (0: the other end lives); leave at once when it ends, or is silent."""
    with contextlib.suppress(OSError):
        while (not silence_limit or select.select([descriptor], [], [], silence_limit)[0]) and (number := os.read(descriptor, 1)):
            if number != b"\0":
                drain(leaving)
    leave_at_once(255 if silence_limit else 1)  # as ssh does when the connection is lost


def leave_at_once(status: int) -> NoReturn:
    """End this process and all that it has started now."""
    Child.killing_all = True
    Child.starting.acquire(timeout=EXIT_GRACE)  # one that is half started would end with a traceback
    for process in multiprocessing.active_children():
        kill_group(process)
    kill_started(WORKER_MARK, root=os.getpid())
    os._exit(status)


# ---- worker: the connections, without user code --------------------------------------------------------------------


class Link(PlainConnection):
    """One connection to the master. OSError, EOFError and AuthenticationError say what went wrong. `close` it when done."""

    def __init__(self, address: tuple[str, int], key: bytes, name: str, context: Any = None, limit: float | None = None) -> None:
        """Connect, and prove to each other that both know the key; blocks for HANDSHAKE_LIMIT seconds at most for each."""
        super().__init__(socket.create_connection(address, HANDSHAKE_LIMIT))
        self.answered_at = 0.0  # the time of the last answer
        self._answer_limit = limit  # seconds that a later call may block (None: for as long as the connection lives)
        self._limits: tuple[float | None, int] | None = None  # as they are set: seconds, and TCP's milliseconds
        try:
            if context:
                self.secure(context)
            connection.answer_challenge(self, key)  # type: ignore[arg-type]
            connection.deliver_challenge(self, key)  # type: ignore[arg-type]
            asked_at = time.monotonic()
            self.run_id = self.call(pack("server accept_connection", name))
            self.round_trip = self.answered_at - asked_at  # seconds
        except BaseException as error:
            self.close()
            if isinstance(error, AssertionError):  # how Python up to 3.11 says that this is no challenge
                raise EOFError("another program answers there") from None
            if "timed out" in str(error) or "peer closed" in str(error):
                hint = "" if context else "; if it listens with TLS, use --tls"
                raise EOFError(f"it took the connection and says nothing{hint}") from None
            raise
        self.end_handshake(limit)

    def call(self, message: bytes) -> Any:
        """Make a call, and return what it does; blocks meanwhile."""
        self.send(message)
        return self.receive()

    def send(self, *calls: bytes, patient: bool = False) -> None:
        """Make calls, whose answers `receive` will give one by one; `patient`: as long as the connection lives."""
        waits = patient and len(calls[0]) > LARGE_CALL  # then Linux would end a connection whose peer lives and takes no byte
        # None: the master's disk may be slow.
        limits = (None if patient else self._answer_limit, 0 if waits else int(SILENCE_LIMIT * 1000))
        if limits != self._limits:
            self._limits = limits
            try:
                self.sock.settimeout(limits[0])
            except OSError as error:  # it is closed, since a call before this one was its end
                raise EOFError(str(error)) from error
            self.set_option("TCP_USER_TIMEOUT", limits[1])
        self.send_bytes(*calls)

    def receive(self) -> Any:
        """What a call has returned; blocks until it is there."""
        try:
            (kind, form, *_), text = unpack(self.recv_bytes())
            self.answered_at = time.monotonic()
            if kind == "#RETURN" and form in ("text", "none"):
                return text if form == "text" else None
            if kind == "#RETURN" and len(text) < SETTINGS_LIMIT:
                return json.loads(text)
        except (ValueError, RecursionError):
            raise EOFError("it is no task_master.py of ours") from None
        raise EOFError("it answers with an error")


def join_ids(lines: list[str]) -> str:
    """The ids of tasks (`ID TEXT`)."""
    return " ".join([line.partition(" ")[0] for line in lines])


class Slot(threading.Thread):
    """A child, and the thread that feeds it from a connection of its own."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(daemon=True)
        self._worker = worker
        self._child: Child | None = None
        self._digest = ""  # of the module that the child has loaded
        self._started_after = ""  # `Worker.finished` at the child's start
        self._left = 0  # tasks until the child is replaced
        self._link: Link | None = None
        self._run_id = ""  # of the master whose outcomes we hold
        self._time_limit = math.inf  # seconds for a task
        self._fed: list[str] = []  # what the child has, or is to have next, as `ID TEXT`
        self._done = 0  # how many of those have an outcome
        self._outcomes: list[str] = []  # that are not acknowledged: a line of ids, and a line for each of them
        self._sent = False  # whether the first of these was sent, and no answer awaited
        self._lease_until = 0.0  # when what has not begun is released
        self._busy_from = 0.0  # when the lease came, or something was reported last

    def run(self) -> None:
        """Serve until the job is over, the worker drains, or something ends it; the worker is told which."""
        if hasattr(signal, "pthread_sigmask"):  # the main thread takes the signals; a new child must not, either
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._start_child()
            while not self._worker.leaving.is_set():
                self._serve()
            if self._outcomes and not self._worker.over:  # the connection was lost, and what ran then has finished
                self._serve()
        except Failure as failure:
            self._worker.fail(failure)
        except OSError as error:
            if not self._worker.leaving.is_set():
                self._worker.lose_slot(error)
        except MemoryError:
            self._worker.lose_slot(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
        except Exception as error:  # a defect of this program: the one case for a traceback
            self._worker.fail(Failure(f"internal error: {error!r}", 1))
            raise
        finally:
            self._stop_child()

    def _start_child(self) -> Child:
        """Start the child; wait until it has loaded the function or the worker leaves. Raises Failure, OSError, EOFError."""
        linked, begun_at = self._link is not None, time.monotonic()
        before = self._digest if self._started_after == self._worker.finished else ""  # of the same job
        for attempt in range(START_ATTEMPTS):
            self._started_after, self._left = self._worker.finished, self._worker.tasks_per_process
            try:
                self._child = child = Child(self._worker)
                while (answer := child.receive(START_POLL)) is None:
                    if self._worker.leaving.is_set():
                        child.kill()  # it has nothing to finish
                        return child
                    if time.monotonic() - begun_at > SLOW_TASK:
                        self._release(self._done)  # what was leased does not wait for a long load
                    self._keep_in_touch(LOAD_BEAT)
                    if linked and (not self._link or self._started_after != self._worker.finished):
                        child.kill()
                        self._stop_child()
                        raise EOFError("the connection was lost")  # or the job is over
            except ChildDied as died:
                problem = f"a process ended before it could run a task: {died}"
                continue
            except OSError:  # there were enough processes and files before, and may be again
                if not linked or attempt == START_ATTEMPTS - 1:
                    raise
                self._worker.leaving.wait(2.0**attempt)
                continue
            if answer[:1] == b"-":
                problem = answer[1:].decode()
                self._stop_child()
                if not linked or attempt == START_ATTEMPTS - 1:
                    break
                self._worker.leaving.wait(2.0**attempt)  # what it needs may be back: it could be loaded before
                continue
            if answer == b"!":
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            self._digest = answer[1:].decode()
            if before and self._digest not in (before, self._worker.edited) and not self._worker.quiet:
                self._worker.edited = self._digest
                say("the function's module was edited: a process that starts from now on runs the new text")
            return child
        raise Failure(problem)

    def _stop_child(self) -> None:
        if self._child:
            self._child.stop(sweep=not self._worker.over)  # then the supervisor sweeps once, for all of many slots
            self._child = None

    def is_busy(self) -> bool:
        """Whether it has tasks without an outcome."""
        return self._done < len(self._fed)

    # with the master

    def _serve(self) -> None:
        """Connect and work until the connection is lost or the job is over."""
        self._link = self._worker.connect()
        limit = 1
        try:
            joined = self._link and self._join(self._link)
            self._report()  # first, so that what was finished without a connection is not leased again
            while joined and self._link and not self._worker.leaving.is_set():
                lease = self._lease(self._link, limit)
                if lease is None:
                    self._worker.end_job(self._run_id)
                    break
                if lease:
                    limit = min(LEASE_GROWTH * limit, self._work(lease.split("\n")))
        except EOFError as error:
            self._lose_link(error)
        finally:
            self._report()
            if self._link:
                self._link.close()  # before the child has ended, since the master waits for that
        if self._started_after != self._worker.finished:
            self._stop_child()  # the next job begins with a fresh one

    def _join(self, link: Link) -> bool:
        """State what we run. Returns whether to work for this master; if not, waits a little."""
        if link.run_id == self._worker.finished:
            link.close()  # a connection would count as a worker that may help
            self._worker.leaving.wait(random.uniform(0.5, 2.0))
            return False
        if self._started_after != self._worker.finished or self._run_id not in ("", link.run_id):
            self._stop_child()  # it was too late for the last job, or is of one whose master has gone
        if self._child is None:
            self._start_child()
        statement = {**self._worker.statement, "digest": self._digest, "id": WORKER_MARK}  # names repeat, as in containers
        self._tell()  # awaits the answer to a report of the meantime
        settings = link.call(pack(f"{TASKS} join {PROTOCOL}", json.dumps(statement)))
        joined = self._worker.accept(settings)
        if settings["run"] != self._run_id:  # another master: what was finished for the last one is void
            self._run_id, self._outcomes = settings["run"], []
        self._time_limit = math.inf if settings["timeout"] is None else float(settings["timeout"])
        return joined

    def _lease(self, link: Link, limit: int) -> str | None:
        """Report what is finished and lease anew, in one round trip. Returns lines; None when the job is over."""
        self._report(keep=1)
        many = bool(self._outcomes) and self._outcomes[0].count("\n") > LARGE_REPORT
        asked_at = time.monotonic()
        call = pack(f"{TASKS} lease {limit} {0 if many else LEASE_WAIT}")
        if self._outcomes and not many:
            self._send_report(call)
        else:
            link.send(call)
        self._tell()
        lease = link.receive()
        if many:  # they are sent when the lease is there, so that the child works while the master records
            link.round_trip = min(link.answered_at - asked_at, 1.25 * link.round_trip)
            self._send_report()
        if lease is not None and not isinstance(lease, str):
            raise EOFError("it leases what is no task")
        return lease

    def _report(self, keep: int = 0) -> None:
        """Hand outcomes to the master, all but `keep`; blocks until they are recorded, or the connection is lost."""
        self._tell()
        while len(self._outcomes) > keep and self._link:
            self._send_report()
            self._tell()

    def _send_report(self, *calls: bytes) -> None:
        """Send the first outcomes, with calls behind them. The answer, awaited before the next call, says they are recorded."""
        busy, self._busy_from = time.monotonic() - self._busy_from, time.monotonic()
        try:
            if self._link:
                report = pack(f"{RESULTS} report {self._run_id} {busy:.6f}", self._outcomes[0])
                self._link.send(report, *calls, patient=True)
                self._sent = True
        except EOFError as error:
            self._lose_link(error)

    def _is_owed(self) -> bool:
        """Whether the master still records what was sent: to wait for it would suspend the time limit."""
        return self._sent and self._link is not None and not self._link.has_data()

    def _release(self, start: int) -> None:
        """Release the tasks from this position on."""
        if lines := self._fed[start:]:
            self._tell(pack(f"{TASKS} release", join_ids(lines)))
            del self._fed[start:]

    def _keep_in_touch(self, beat_interval: float = BEAT_INTERVAL) -> None:
        """Report now and then, and let the master know that a busy slot lives; its answer tells when the job is over."""
        now = time.monotonic()
        if self._is_owed():
            return
        self._tell()
        if self._outcomes and now - self._busy_from > REPORT_INTERVAL:
            self._send_report()
        elif (link := self._link) and now - link.answered_at > beat_interval:
            over = self._tell(pack(f"{TASKS} beat"))
            if over and not self.is_busy():
                self._worker.end_job(link.run_id)

    def _tell(self, message: bytes = b"") -> Any:
        """Await the answer that the master still owes; then call it, if it can be reached, and return what it answers."""
        answer = None
        try:
            if self._link and self._sent:
                self._link.receive()
                self._sent = False
                del self._outcomes[0]
            if self._link and message:
                answer = self._link.call(message)
            if self._link:
                self._worker.served_at = self._link.answered_at
        except EOFError as error:
            self._lose_link(error)
        return answer

    def _lose_link(self, error: EOFError) -> None:
        if self._link:  # else its end was told before
            self._link.close()
            self._link, self._sent = None, False
            self._worker.miss(error)

    # with the child

    def _work(self, lines: list[str]) -> int:
        """Run a lease, or as much of it as there is time for. Returns how many tasks would be worth the next round trip."""
        finished, begun_at = 0, time.monotonic()
        wanted = max(LEASE_SECONDS, min(MAX_LEASE_SECONDS, self._link.round_trip / ROUND_TRIP_SHARE) if self._link else 0.0)
        self._busy_from, self._lease_until = begun_at, begun_at + LEASE_SLACK * wanted
        self._fed, self._done = lines, 0
        deaths = 0  # of children in a row that died before they began a task
        try:
            while self._done < len(self._fed) and self._link and not self._worker.leaving.is_set():
                finished += self._done
                self._fed, self._done = self._fed[self._done :], 0
                if not self._child:
                    self._start_child()
                    continue
                try:
                    self._run(self._child)
                except ChildDied as death:
                    self._bury(self._child, death)
                    deaths = 0 if self._done else deaths + 1
                    if deaths == START_ATTEMPTS:
                        raise Failure(f"a process ended before it could run a task: {death}") from None
        finally:
            self._release(self._done)
            if not self._link:  # --wait begins anew: there are results to report
                self._worker.served_at = time.monotonic()
        finished += self._done
        return max(1, int(wanted * finished / max(time.monotonic() - begun_at, 1e-6)))

    def _run(self, child: Child) -> None:
        """Feed tasks to the child until it is done with them. Raises ChildDied."""
        child.feed(self._fed[: self._left], self._time_limit)
        while (message := self._receive(child)) not in (b".", b"x"):
            grace = EXIT_GRACE if child.pieces or child.position() < self._done else 0.0  # to send an outcome, or to begin
            if not message and (late := child.running_for() - self._time_limit - grace) > 0:
                if child.overdue and late > EXIT_GRACE:  # the system cannot kill it, as in a driver that hangs
                    raise ChildDied(-signal.SIGKILL, child.running_for())
                child.overdue = True
                child.kill()
            if not self._is_owed():
                self._shorten(child)
            elif self._worker.leaving.is_set():
                child.revoke()  # what it has not started is released later
            self._keep_in_touch()
        self._left -= self._done
        if message == b"x" or self._left <= 0:
            self._report()  # now, since the child's end may take a while
            self._stop_child()

    def _receive(self, child: Child) -> bytes:
        """The child's next message, b"" when there is none for a while; its outcomes so far are kept. Raises ChildDied."""
        message = child.receive(min(POLL_INTERVAL, max(0.01, self._time_limit - child.running_for()))) or b""
        self._keep(child.take_outcomes() + (message.decode() if len(message) > 1 else ""))  # what the memory has no room for
        return message

    def _keep(self, outcomes: str) -> None:
        """Note outcomes, each with its line end, of the first tasks without one."""
        before, self._done = self._done, self._done + outcomes.count("\n")
        if outcomes:
            ids, texts = join_ids(self._fed[before : self._done]), outcomes[:-1]
            if len(self._outcomes) > self._sent and len(self._outcomes[-1]) < MEMORY_SIZE:
                earlier_ids, _, earlier = self._outcomes.pop().partition("\n")  # one report for both: each costs a round trip
                ids, texts = f"{earlier_ids} {ids}", f"{earlier}\n{texts}"
            self._outcomes.append(f"{ids}\n{texts}")

    def _shorten(self, child: Child) -> None:
        """Release what stands behind a slow task, or any in a long lease, or when the worker leaves or the master is lost."""
        slow = child.running_for() > SLOW_TASK or time.monotonic() > self._lease_until
        unwanted = slow or self._worker.leaving.is_set() or self._link is None
        if unwanted and len(self._fed) - self._done > 1:
            self._release(max(self._done, child.revoke() + 1))

    def _bury(self, child: Child, death: ChildDied) -> None:
        """After the child's death: keep the outcomes that it left, and note one for the task that ran."""
        self._child = None
        self._keep(child.take_outcomes())
        # Told to end with its worker, as a shutdown tells all processes: that is no fault of the task.
        lost = -death.status in STOP_SIGNALS and self._worker.leaving.wait(0.5)
        if self._done <= child.position() < len(self._fed) and not lost:
            members = format_error("ProcessDied", str(death))
            if child.overdue:
                members = format_error("TimeoutError", f"no result within the time limit of {self._time_limit:g} s")
            self._keep(format_outcome(members, death.started_at, death.seconds) + "\n")
        self._report()
        if lost and self._link:
            self._link.close()  # so that the master gives the task to another worker
            self._link = None


class Worker:
    """The slots of this host, and what they share: the way to the master and the reasons to leave."""

    def __init__(self, options: argparse.Namespace, authkey: bytes, leaving: threading.Event) -> None:
        self.statement = {"function": options.function, "command": options.command}
        self.tasks_per_process = options.tasks_per_process or sys.maxsize
        self.leaving = leaving
        self._address, self._authkey = (options.host, options.port), authkey
        self._place = show_address(self._address)
        self.quiet = options.quiet
        self.edited = ""  # the digest of a module that was edited during a job, once that was said
        pid = os.getppid() if sys.platform == "linux" else os.getpid()  # which is the one that was started
        self._name = f"{os.environ.pop('TASK_HOST', '') or socket.gethostname()}/{pid}"
        self._only_run = os.environ.pop("TASK_RUN", "")  # the run that it was started for, by the master itself
        encrypt = options.tls if options.tls is not None else not is_loopback(options.host)
        self._context = make_tls_context(authkey, options.host, server_side=False) if encrypt else None
        if not encrypt and not is_loopback(options.host) and not self._only_run:
            say(PLAIN_WARNING)
        self._stays = options.wait == 0 and not self._only_run
        self._patience = math.inf if self._only_run else options.wait or math.inf  # seconds to look for the master
        self._answer_limit = None if self._patience == math.inf else max(ANSWER_LIMIT, self._patience)
        self._lock = threading.Lock()
        self._state = ""  # then "new", "connected", "waiting" or, after a job, "idle"
        self.served_at = time.monotonic()  # --wait counts from here: the last answer, the first miss, or new outcomes
        self.finished = ""  # id of the last run that is over
        self.over = False  # whether there is no job any more, nor will be
        self._failure: Failure | None = None
        self._slots = [Slot(self) for _ in range(options.processes)]
        self._slots_left = options.processes
        self.folder: str | None = None  # where the children load the function: None when it cannot be entered
        with contextlib.suppress(OSError):
            os.chdir(os.curdir)  # as a child will: it may belong to another user
            self.folder = os.getcwd()
        os.chdir(os.path.abspath(os.sep))  # since a new Python looks for modules in the current folder first

    def run(self) -> None:
        """Serve until the job is over, or this worker drained. After a failure this process ends here."""
        for slot in self._slots:
            try:
                slot.start()
            except RuntimeError:  # there may be no more threads
                self.lose_slot(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))
        for slot in self._slots:
            while slot.is_alive() and not (self._failure and self._failure.status == 3):  # then there is nobody to report to
                slot.join(1.0)  # with a timeout, so that Ctrl-C comes through on Windows
        if self._failure:
            leave_at_once(self._failure.status)

    def connect(self) -> Link | None:
        """A link to the master, tried until --wait has passed (then Failure) or the worker leaves (then None)."""
        with self._lock:
            if not self._state and not self.quiet:
                write_line(f"Connect to server {self._address[0]}...", 1)
            if not self._state:
                self._state, self.served_at = "new", time.monotonic()
        delay = 0.0
        while not (self.leaving.is_set() and delay):  # once at least: there may be outcomes to report
            try:
                return Link(self._address, self._authkey, self._name, self._context, self._answer_limit)
            except (OSError, EOFError, AuthenticationError) as error:
                if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                    raise
                self.miss(error)
            delay = min(2.0, delay * 2 or 0.1)
            self.leaving.wait(delay * random.uniform(0.5, 1.0))
        return None

    def accept(self, settings: Any) -> bool:
        """Whether to work for a master with these settings: not when its job is over. Raises Failure when it never can be."""
        types: dict[str, Any] = {"protocol": int, "run": str, "timeout": (int, float, type(None)), "refused": (str, type(None))}
        if not isinstance(settings, dict) or not all(isinstance(settings.get(name, ...), types[name]) for name in types):
            raise EOFError("it does not state its settings")
        if settings["protocol"] != PROTOCOL:
            problem = f"the master at {self._place} speaks protocol {settings['protocol']}, this worker {PROTOCOL}"
            raise Failure(f"{problem}: copy the task_worker.py of the master's host here", 3)
        if self._only_run not in ("", settings["run"]):
            raise Failure(f"at {self._place} there is another master than the one that started this worker", 3)
        if settings["refused"]:
            if not self._stays:
                raise Failure(f"the master at {self._place} refused this worker: {settings['refused']}", 3)
            self.end_job(settings["run"], f"not this one's job ({settings['refused']})")
        if settings["run"] == self.finished:
            return False
        self._change("connected", f"connected to {self._place}")
        return True

    def miss(self, error: BaseException) -> None:
        """The master cannot be reached, or was lost: say so once. Raises Failure if it will not have us, or is away too long."""
        trouble = getattr(error, "reason", None)  # of an SSLError
        if trouble in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            raise Failure(f"the master at {self._place} does not speak TLS: start both with --tls or both with --no-tls", 3)
        if trouble == "CERTIFICATE_VERIFY_FAILED":
            raise Failure(f"what answers at {self._place} shows a certificate and not the key: it is not our master", 3)
        if isinstance(error, AuthenticationError) or "ALERT" in str(trouble):
            raise Failure(f"the master at {self._place} refused the key: copy its key file here (TASK_AUTHKEY comes first)", 3)
        reason, before = explain_error(error), self._state
        if before == "connected":
            self.served_at = time.monotonic()
        waited = time.monotonic() - self.served_at
        unknown = isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME and before == "new"
        busy = any(slot.is_busy() for slot in self._slots)  # then an outage must not cost its work
        if (waited >= self._patience and not busy) or (unknown and self._patience < math.inf):
            near = is_loopback(self._address[0])
            hint = "is it running? is --port right?" if near else "is it running, with --host 0.0.0.0? is --host right? firewall?"
            raise Failure(f"cannot reach the master at {self._place}: {reason} ({hint})", 3)
        if before != "idle" and not self.over:
            verb = "lost" if before == "connected" else "waiting for"
            self._change("waiting", f"{verb} the master at {self._place} ({reason})")
        self.leaving.wait(0.1)  # it may take connections only to end them

    def end_job(self, run_id: str, reason: str = "the job is over") -> None:
        """A slot heard that there is nothing more to do here: leave, or with --wait 0 look for the next master."""
        if self._stays:
            self._state = self._state if run_id == self.finished else "new"  # so that the reason is said once for each job
            self.finished = run_id
            self._change("idle", f"{reason}; waiting for the next master")
        else:
            self.over = True
            self.leaving.set()

    def lose_slot(self, error: OSError) -> None:
        """A slot cannot have what it needs: go on with the others, if there are any."""
        with self._lock:
            first, self._slots_left = self._slots_left == len(self._slots), self._slots_left - 1
        remedy = REMEDIES.get(error.errno or 0, "the system refused")
        text = f"cannot start all of {len(self._slots)} processes: {explain_error(error)} ({remedy}, or use fewer --processes)"
        if not self._slots_left:
            self.fail(Failure(text))
        elif first:
            say(f"{text}; going on with those that run")

    def fail(self, failure: Failure) -> None:
        """Drain because of this failure, if it is the first: the other slots have done nothing wrong."""
        with self._lock:
            first = not self._failure
            self._failure = self._failure or failure
        if first:
            busy = failure.status != 3 and any(slot.is_busy() for slot in self._slots)
            say(f"{failure}; finishing what runs" if busy else str(failure))
        self.leaving.set()

    def _change(self, state: str, text: str) -> None:
        """Be in another state, and say so once."""
        with self._lock:
            is_new, self._state = self._state != state, state
        if is_new and not self.quiet:
            say(text)


# ---- command line --------------------------------------------------------------------------------------------------

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # that we may use


def make_parser() -> Parser:
    """The options of the worker."""
    parser = Parser(
        prog="task_worker",
        usage="%(prog)s [OPTION ...]",
        description="Run tasks for a task_master: call a function on each, report the outcomes.",
        epilog="examples:\n  task_worker.py\n  task_worker.py --host 10.0.0.5 --function mailer:send --wait 0\n",
    )
    group = parser.add_argument_group("what to run")
    add_function_options(group)
    count = bounded(int, 1, 4096, "a count: it takes 1 to 4096")
    text = f"how many at a time (default: the CPUs, {CPUS} here)"
    group.add_argument("--processes", type=count, default=CPUS, metavar="N", help=text)
    group = parser.add_argument_group("where the master is")
    add_connection_options(group, 1, "its name or address (default: %(default)s)", "")
    seconds = bounded(float, 0, 1e9, "a time: it takes seconds, 0 for ever")
    text = "seconds to look for it (default: %(default)g; 0: for ever, and after each job)"
    group.add_argument("--wait", type=seconds, default=60.0, metavar="S", help=text)
    return parser


def await_key(options: argparse.Namespace, leaving: threading.Event) -> bytes:
    """The key, waited for when the master, which makes it, will be started on this host. Raises Failure."""
    give_up_at = time.monotonic() + (options.wait or math.inf)
    path = os.path.expanduser(DEFAULT_KEY_FILE)
    missing = f"there is no key in {path}: copy that file from the master's host"
    is_given = options.authkey_file is not None or "TASK_AUTHKEY" in os.environ
    told = False
    while not leaving.is_set():
        with contextlib.suppress(FileNotFoundError):
            if is_given or not os.path.isfile(path) or os.stat(path).st_size:
                return read_key(options.authkey_file)
        if not is_loopback(options.host) or time.monotonic() > give_up_at:
            raise Failure(missing)
        if not told:
            say(f"{missing}, or start the master on this one (waiting for it)")
        told = True
        leaving.wait(0.1)
    raise SystemExit(0)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    prepare_process()
    try:
        options = make_parser().parse_args(argv)
        leaving = threading.Event()
        if sys.platform == "linux":
            supervise(leaving)  # from here on in a process of its own
        else:
            catch_signals(lambda number, frame: drain(leaving))
        if "TASK_RUN" in os.environ:  # a master has started this worker, which must not outlive it
            silence_limit = SILENCE_LIMIT if os.environ.get("TASK_HOST") else None  # over ssh, which may not notice the end
            pipe = os.dup(0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a Python that starts on Windows waits for who reads its input
            threading.Thread(target=watch_pipe, args=(pipe, leaving, silence_limit), daemon=True).start()
        share_compiled_code()
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CPUS // options.processes)))
        Worker(options, await_key(options, leaving), leaving).run()
    except Failure as failure:
        say(str(failure))
        return failure.status
    if not options.quiet:
        write_line("worker exit.", 1)
    if sys.platform == "linux":
        os._exit(0)  # the supervisor cleans up; to take this process apart would take 30 ms
    return 0


if __name__ == "__main__":
    raise SystemExit(main())  # which removes the folder of multiprocessing, where there is no memfd
