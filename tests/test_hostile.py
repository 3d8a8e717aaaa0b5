"""Whatever a peer sends, with or without the key, no code runs, and the job beside it goes on.

FUZZ_STRINGS=10000 in the environment is the long form of the fuzz.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import os
import pickle
import random
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError, connection
from pathlib import Path
from typing import Any, Callable

import psutil
import pytest
from lab import (
    BEAT,
    GOOD,
    JOIN,
    LEASE,
    MEGABYTE,
    PATIENCE,
    RELEASE,
    REPORT,
    RESULTS,
    ROOT,
    SETTINGS,
    TASKS,
    WELCOME,
    FalseServer,
    Farm,
    Peer,
    Program,
    answer,
    check_once,
    check_silence,
    connect,
    false_master,
    frame,
    good_answer,
    is_closed,
    join_outcomes,
    make_outcome,
    peak_memory,
    wait_until,
)  # fmt: skip

from task_master import count_objects
from task_worker import PROTOCOL

STRINGS = int(os.environ.get("FUZZ_STRINGS", 150))


class Beside:
    """A job that goes on while its master is attacked; `once`: none of its tasks may be run twice, or fail."""

    def __init__(self, farm: Farm, *options: object, once: bool = True) -> None:
        self.farm, self.once = farm, once
        self.count = 0
        self._connections = contextlib.ExitStack()
        # no redelivery is a failure: a peer that holds the key may lease what it likes
        where = ("--tasks", "-", "--results", "results.jsonl", "--redeliveries", 100_000)
        # without asserts, on which the base class relies
        self.master = farm.run("-OO", ROOT / "task_master.py", "--port", 0, *where, *options, stdin=subprocess.PIPE)
        self.port = self.master.port()
        self.threads = self.count_threads()
        what = ("--port", self.port, "--processes", 1, "--function", "functions:double")
        self.worker = farm.run("-OO", ROOT / "task_worker.py", *what)
        self.master.wait_line("connected")
        self.put(50)
        self.memory = peak_memory(self.master.pid)

    def put(self, count: int) -> None:
        """Give more tasks."""
        self.master.put("".join(f"{n}\n" for n in range(self.count, self.count + count)))
        self.count += count

    def connect(self) -> Any:
        """A client that has shown that it knows the key."""
        return self._connections.enter_context(connect(self.farm, self.port))

    def peer(self, name: str = "host/1") -> Peer:
        peer = Peer(self.farm, self.port, name)
        self._connections.enter_context(peer.connection)
        return peer

    def count_threads(self) -> int:
        return int(psutil.Process(self.master.pid).num_threads())

    def grown(self) -> int:
        """Bytes that the master's memory has grown by, at its peak."""
        return peak_memory(self.master.pid) - self.memory

    def finish(self) -> None:
        """End the job when the master has as few threads as before; every task is recorded, right and once."""
        self._connections.close()
        wait_until(lambda: self.count_threads() <= self.threads + 2, self.master)
        self.put(50)
        self.master.end_input()
        assert self.master.wait() in ([0] if self.once else [0, 1])
        lines = (self.farm.folder / "results.jsonl").read_bytes().split(b"\n")
        assert lines.pop() == b""
        records = [parse_record(line) for line in lines]
        check_once(records, self.count)
        assert all(record["task"] == record["id"] for record in records)
        if self.once:
            assert all(record["result"] == 2 * record["id"] and record["attempts"] == 1 for record in records)
        assert self.worker.wait() == 0, self.worker.stderr
        check_silence(self.master)


def parse_record(line: bytes) -> dict[str, Any]:
    """A record; fails when it is not strict JSON, or when a member that is the master's to write comes twice."""

    def check(members: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in members if name in ("id", "task", "worker", "attempts")]
        assert len(names) == len(set(names)), line
        return dict(members)

    record: dict[str, Any] = json.loads(line.decode("utf-8"), object_pairs_hook=check, parse_constant=pytest.fail)
    assert set(record) - {"result", "error", "started_at"} == {"id", "task", "seconds", "worker", "attempts"}, line[:300]
    assert ("result" in record) != ("error" in record)
    assert isinstance(record.get("error", {}), dict)
    return record


@pytest.fixture
def beside(farm: Farm) -> Iterator[Beside]:
    """After each attack the job must come to its end as if nothing had happened."""
    beside = Beside(farm)
    yield beside
    beside.finish()


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


# ---- peers without the key -----------------------------------------------------------------------------------------

TERABYTE = struct.pack("!iQ", -1, 1 << 40)  # as multiprocessing announces it
GARBAGE = [
    b"",
    b"\0",
    b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    bytes.fromhex("16030100b5010000b10303") + b"\x55" * 170,
    b"\xff" * 1000,
    b"\0" * 100_000,
    frame(b""),
    *[frame(b"x" * size) for size in (16, 255, 257)],
    *[frame(b"#CHALLENGE#" + b"x" * size) for size in (0, 20)],
    frame(b"#WELCOME#") * 3,
    frame(b"{md5}" + b"x" * 16),
    *[frame(digest + b"x" * 32) for digest in (b"{sha256}", b"{rot13}")],
    frame(b"x" * 16) + frame(b"#CHALLENGE#" + b"x" * 20) + frame(pickle.dumps((None, "shutdown", (), {}))),
    struct.pack("!i", 1 << 30),  # half a message
    struct.pack("!i", 0x7FFFFFFF),
    TERABYTE,
    TERABYTE + b"x" * MEGABYTE,
]


def test_garbage_and_hundreds_of_wrong_keys_do_not_disturb_the_job(beside: Beside) -> None:
    for data in GARBAGE:
        with contextlib.suppress(OSError), dial(beside.port) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            assert is_closed(sock), data[:50]
    for n in range(300):
        with pytest.raises(AuthenticationError):
            connection.Client(("127.0.0.1", beside.port), authkey=b"wrong %d" % n)
    assert beside.grown() < 16 * MEGABYTE


@pytest.mark.early
def test_hundreds_of_silent_connections_and_one_that_is_slow_end(farm: Farm) -> None:
    beside = Beside(farm)
    with contextlib.ExitStack() as sockets:
        silent = [sockets.enter_context(dial(beside.port)) for _ in range(700)]
        began_at = time.monotonic()
        slow = sockets.enter_context(dial(beside.port))
        late = beside.peer()
        assert late.join().run_id, "one that knows the key is let in"
        late.close()
        assert all(is_closed(sock, 0) for sock in silent[:400]), "the oldest give way to the newest"
        for byte in frame(b"#CHALLENGE#" + b"x" * 240):
            with contextlib.suppress(OSError):
                slow.send(bytes([byte]))
            if is_closed(slow, 0.25):
                break
        assert time.monotonic() - began_at > 5, "the whole handshake may take 10 s"
        assert all(is_closed(sock) for sock in silent)
    assert beside.grown() < 64 * MEGABYTE
    beside.finish()


# ---- peers with the key: pickles -----------------------------------------------------------------------------------


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def evil_pickles(path: Path) -> list[bytes]:
    """Pickles that run code where they can, or announce more than they have; test_wire.py has all other opcodes."""
    return [
        *[pickle.dumps(Evil(path), protocol) for protocol in range(6)],
        *[pickle.dumps((TASKS, LEASE, (1, Evil(path)), {}), protocol) for protocol in range(6)],
        *[b"\x80\x04" + opcode + struct.pack("<Q", 1 << 40) + b"x." for opcode in (b"\x8d", b"\x8e", b"\x95")],
        b"\x80\x04\x8b" + struct.pack("<i", -5) + b"x.",
        b"\x80\x04\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"x.",
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a place in the memo for which the C unpickler would take gigabytes
        b"\x80\x04j\xff\xff\xff\x7f.",
        b"\x80\x04]\x94(h\x00h\x00e.",  # a list that holds itself
        b"\x80\xff.",
        b".",
        b"",
    ]


def is_refused(conn: Any) -> bool:
    """Whether the other end answers with anything but #RETURN, or closes the connection."""
    while conn.poll(PATIENCE):
        try:
            data = conn.recv_bytes()
        except (EOFError, OSError):
            return True
        if b"#RETURN" not in data:
            return True
    return False


def test_a_pickle_that_is_not_plain_data_runs_no_code_in_the_master(beside: Beside) -> None:
    pwned = beside.farm.folder / "pwned"
    for data in evil_pickles(pwned):
        for conn in (beside.connect(), beside.peer().connection):  # the second one is past its first message
            conn.send_bytes(data)
            assert is_refused(conn), data
        for value in (data, data.decode("latin-1")):  # as text or bytes in a place where an object is expected
            for name, method, arguments in ((TASKS, RELEASE, (value,)), (TASKS, value, ()), (RESULTS, "put", (value,))):
                beside.peer().try_call(name, method, *arguments)
        assert not pwned.exists(), data
    assert beside.grown() < 32 * MEGABYTE


EVIL_SHAPES = {
    "as a name": lambda deep: b"\x80\x04(" + deep + b"\x8c\x05lease)}t.",
    "as an argument": lambda deep: b"\x80\x04(\x8c\x0eget_task_queue\x8c\x07release(" + deep + b"t}t.",
    "as a key": lambda deep: b"\x80\x04}" + deep + b"Ns.",
}


def test_the_reason_for_a_refusal_is_short_however_long_the_message_is(beside: Beside) -> None:
    first, second = beside.connect(), beside.peer().connection
    first.send_bytes(b"\xff" * MEGABYTE)
    assert is_refused(first)
    statement = json.dumps({"function": "x" * MEGABYTE, "command": None})
    second.send_bytes(f"get_task_queue join {PROTOCOL}\n{statement}".encode())
    beside.master.wait_line("the job is for")
    assert max(map(len, beside.master.stderr)) < 2000


def test_data_nested_or_repeated_a_million_times_does_not_crash_the_master_nor_fill_its_memory(beside: Beside) -> None:
    """A tuple in a tuple in a tuple: to take its hash overflows the C stack."""
    for filling in (b"]\x94", b"]", b")\x85", b"}"):
        conn = beside.peer().connection
        conn.send_bytes(b"\x80\x04(" + filling * (4 * MEGABYTE // len(filling)) + b"t.")
        assert is_refused(conn), filling
    assert beside.grown() < 128 * MEGABYTE
    for (shape, make), depth in itertools.product(EVIL_SHAPES.items(), (190_000, 2_000_000)):  # few enough objects, and too many
        conn = beside.peer().connection
        conn.send_bytes(make(b")" + b"\x85" * depth))
        assert is_refused(conn), (shape, depth)
        beside.master.pause(0.1)


def test_a_result_that_holds_itself_a_trillion_times_does_not_stop_the_master(farm: Farm) -> None:
    """A pickle has each list once, and JSON has it wherever it stands."""
    master = farm.master("--results", "results.jsonl", *range(5))
    large: list[Any] = ["x" * 1_000_000] * 200
    for inner, circle in itertools.product(([], large), (False, True)):
        evil = farm.peer(master)
        evil.call(TASKS, "get")
        for _ in range(40):
            inner = [inner, inner]
        inner += [inner] * circle
        assert evil.try_call(RESULTS, "put", inner) == ""
    assert farm.worker(master, "--function", "functions:double").wait() == 0
    assert master.wait() == 1
    assert ["error" in record for record in farm.in_order()] == [True] * 4 + [False]


def test_long_numbers_and_texts_count_as_more_than_one_object() -> None:
    assert int(count_objects([1, "a"])) == 3
    for long in (10**4000, "x" * 4000):
        assert count_objects([[long] * 100] * 100) > 60_000


def test_a_message_that_announces_a_terabyte_takes_no_memory(beside: Beside) -> None:
    for head in (TERABYTE, *[struct.pack("!i", size) for size in (0x7FFFFFFF, -2, (64 << 20) + 1)]):
        for conn in (beside.connect(), beside.peer().connection):
            with contextlib.suppress(OSError):
                os.write(conn.fileno(), head + b"x" * 100)
            assert is_refused(conn)
    os.write(beside.peer().connection.fileno(), struct.pack("!i", 60 << 20))  # which is allowed, and does not come
    beside.master.pause(0.2)
    assert beside.grown() < 16 * MEGABYTE


# ---- peers with the key: calls -------------------------------------------------------------------------------------

SERVER_METHODS = (
    "shutdown stop start serve_forever accepter handle_request serve_client debug_info number_of_objects _forget __init__ "
    "__class__ create get_methods accept_connection"
).split()
FOREIGN_CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    *[(method, ()) for method in (*SERVER_METHODS, 5, None, [])],
    *[("create", arguments) for arguments in (("list",), ("get_queue",), (None,), ([],), (TASKS, 1, 2))],
    (WELCOME, ("a", "b")),
]
WRONG_SHAPES: list[Any] = [
    None, 5, "lease", b"", 1.5, True, [], (), {}, (1, 2, 3), (1, 2, 3, 4, 5), (TASKS, "qsize", 5, {}),
    (TASKS, "qsize", (), 5), (TASKS, "qsize", (), {"x": 1}), (TASKS, "qsize", (), {5: 1}), ([], "qsize", (), {}),
]  # fmt: skip
NOT_EXPOSED = [
    "__class__", "__init__", "__getattribute__", "__reduce_ex__", "__str__", "__repr__", "__dict__", "_lease", "_master",
    "_ledger", "#GETVALUE", "close", "stop", "shutdown", "submit", "", "exposed", None, 5, [], {},
]  # fmt: skip


def test_calls_that_are_of_the_wrong_shape_or_not_for_clients_or_not_exposed_are_refused(beside: Beside) -> None:
    for call in [*[(None, method, arguments, {}) for method, arguments in FOREIGN_CALLS], *WRONG_SHAPES]:
        for conn in (beside.connect(), beside.peer().connection):
            conn.send(call)
            assert is_refused(conn), call
    for method in SERVER_METHODS:
        conn = beside.connect()
        conn.send_bytes(f"server {method}\n".encode())  # as a worker says it
        assert is_refused(conn), method
    for name in ("nothing", *(TASKS, RESULTS) * 5):
        conn = beside.connect()
        conn.send((None, "decref", (name,), {}))  # which drops no reference
        conn.recv()
    peer = beside.peer()
    for name in (TASKS, RESULTS, "0", "", None, 0, "no such queue"):
        for method, arguments in itertools.product(NOT_EXPOSED, [(), (1, 0.0)]):
            answer = peer.try_call(name, method, *arguments)
            assert answer != "#RETURN", (name, method)
            peer = peer if answer else beside.peer()


def test_clients_that_wait_for_a_task_and_go_away_leave_no_threads_behind(beside: Beside) -> None:
    for n in range(30):
        beside.peer(f"plain{n}").ask(TASKS, "get")


def test_a_name_cannot_break_the_log_or_the_records(farm: Farm) -> None:
    attacker = Attacker(farm)
    names: list[Any] = ["/1\ntask_master: fake line", "\x1b[2Jhost/1", 'host"/1', "\ud800/1", "x" * 100_000, "", None, 5, ["a/b"]]
    for name in names:
        attacker.slot = attacker.peer(name).join()
        attacker.report(f"{attacker.lease()}\n{GOOD}")
    attacker.peer("x/1").try_call(TASKS, JOIN, PROTOCOL, '{"function": "\\u001b[2J:f", "command": null}')
    attacker.finish()
    assert not attacker.master.said("^task_master: fake|^.{1001}")


# ---- peers with the key: arguments ---------------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, -1, 0, 2**70, 1.5, -1.5, 1e308, float("inf"), float("-inf"), float("nan"), "", "x", "0", "\ud800", "\0",
    "0 0", "0 0 1 -1 x", "true", "0.0", "[0]", "1]", "0,1", "0 " * 1000, b"", b"0", [], [[]], [None], [0, 0], ["0"], [-1],
    [2**70], [1e308], (), (0, 0), {}, {0: 0},
]  # fmt: skip
BROKEN_RESULTS = [
    "", "hello", "NaN", "Infinity", "1}", '1} {"id": 3, "task": 3', '1, "id": 7', '1, "task": 7', '1, "worker": "other"',
    '1, "attempts": 99', '1, "result": 2', '1, "error": {}', '1, "more": 2', "[1", '"open', '"\t"', '"\r"', '"\0"',
    '"\ud800"', '"\\ud800"', '"\u2028"', "9" * 10_000, "[" * 100_000 + "]" * 100_000, "[" * 100_000, '"' + "x" * 2_000_000,
    '"' + "x" * 2_000_000 + '", "id": 7', '"' + "x" * 5_000_000 + '", "id": 7, "task": 7', '"' + "\\x" * 5_000_000 + '"',
    "[[], " * 5_000_000 + "[]" + "]" * 5_000_000, "[" + "[], " * 9_000_000 + "[]]",
]  # fmt: skip
BROKEN_ERRORS = [
    "5", "{}", '{"type": 1, "message": 2, "traceback": 3}', '{"type": "x"}',
    '{"type": "x", "message": "y", "traceback": "z", "more": 1}', '{"type": "x", "message": "\\u001b[2J", "traceback": ""}',
    "[" * 100_000 + "]" * 100_000,
]  # fmt: skip
BROKEN = [
    *map(make_outcome, BROKEN_RESULTS),
    *[make_outcome(value, "error") for value in BROKEN_ERRORS],
    *[make_outcome("1", seconds=seconds) for seconds in ("", '"long"', "NaN", "00.5", "0.500000" + "0" * 100_000, "1e999")],
    *[make_outcome("1", "neither"), "x" * 9 + "[" * 100_000],
    *["", " ", "\n", '"result": ', '"result": 1', '"error": ', "}", "{", ",", "null", "\ud800"],
]
FAULT = make_outcome('{"type": "E", "message": "m", "traceback": ""}', "error")


class Attacker(Beside):
    """A peer that has the key, beside a job; connects again when it is thrown out."""

    def __init__(self, farm: Farm) -> None:
        super().__init__(farm, "--retries", 2, once=False)
        self.join()

    def join(self) -> None:
        self.slot = self.peer("evil/1").join()

    def ask(self, queue_name: str, method: str, *arguments: object) -> None:
        if self.slot.try_call(queue_name, method, *arguments) == "":
            self.slot.close()
            assert self.master.is_running(), (method, arguments)
            self.join()

    def report(self, outcomes: str) -> None:
        self.ask(RESULTS, REPORT, self.slot.run_id, 0.0, outcomes)

    def lease(self) -> int:
        """The id of a task that it holds; more are given when there is none."""
        while not (ids := self.slot.lease_ids(1, 0.0)):
            self.put(5)
        return ids[0]


@pytest.fixture
def attacker(farm: Farm) -> Iterator[Attacker]:
    attacker = Attacker(farm)
    yield attacker
    attacker.finish()


def test_odd_arguments_lose_no_task(attacker: Attacker) -> None:
    for method in (JOIN, LEASE, RELEASE, BEAT, "qsize", REPORT, "put", "get"):
        name = RESULTS if method in (REPORT, "put") else TASKS
        attacker.ask(name, method, *[None] * 5)
        if method != "get":  # which may wait for ever, as it should
            attacker.ask(name, method)
        for odd in ODD:
            attacker.ask(name, method, *[False] * (method == "get"), odd)
    for odd in ODD:
        attacker.ask(TASKS, LEASE, odd, 0.0)
        attacker.ask(TASKS, LEASE, 1, min(odd, 0.1) if isinstance(odd, (int, float)) else odd)
        attacker.report(odd)
        attacker.ask(RESULTS, REPORT, odd, 0.0, f"{attacker.lease()}\n{GOOD}")
        attacker.ask(RESULTS, REPORT, attacker.slot.run_id, odd, f"{attacker.lease()}\n{GOOD}")
        attacker.report(f"{odd}\n{GOOD}")
        attacker.report(f"{attacker.lease()} {attacker.lease()}\n{GOOD}")


def test_broken_outcomes_leave_every_line_of_the_results_a_record(attacker: Attacker) -> None:
    for members in BROKEN:
        attacker.report(f"{attacker.lease()}\n{members}")
        attacker.report(f"{attacker.lease()} {attacker.lease()}\n{GOOD}\n{members}")


def test_several_outcomes_for_one_task_in_a_report_make_one_record(attacker: Attacker) -> None:
    for twice in ((GOOD, GOOD), (FAULT, GOOD), (GOOD, FAULT), (FAULT, FAULT), (FAULT,) * 5, (FAULT, GOOD, FAULT)):
        ids = [attacker.lease() for _ in range(3)]
        attacker.report(join_outcomes(*[f"{task_id} {members}" for members in twice for task_id in ids]))


def test_a_report_of_a_million_outcomes_does_not_fill_the_memory(attacker: Attacker) -> None:
    attacker.report("0 " * MEGABYTE + "0" + "\n" * (MEGABYTE + 1))
    assert attacker.grown() < 64 * MEGABYTE


# ---- false masters -------------------------------------------------------------------------------------------------


def watch_workers(
    farm: Farm, acts: list[Callable[[socket.socket], None]], seconds: float, wait: float = 1, connections: int = 0
) -> list[Program]:
    """Have workers meet false masters, which they look for for a second, all at the same time; returns those that left.

    After so many seconds (and connections) each has left with status 3 and one line, or still tries to get on with it; none
    has crashed, or filled the memory. Whether code has run is for the caller to see.
    """
    servers = [farm.closing(FalseServer(act)) for act in acts]
    workers = [farm.worker(server.port, "--wait", wait, "--function", "functions:double") for server in servers]
    most: collections.Counter[Program] = collections.Counter()
    for worker, server in zip(workers, servers):
        wait_until(lambda server=server: server.served, worker)
    enough_at = time.monotonic() + seconds
    while running := [worker for worker in workers if worker.is_running()]:
        if time.monotonic() > enough_at and sum(server.served for server in servers) >= connections:
            break
        for worker in running:
            with contextlib.suppress(psutil.Error):
                most[worker] = max(most[worker], peak_memory(worker.pid))
        time.sleep(0.1)
    left = [worker for worker in workers if not worker.is_running()]
    for number, worker in enumerate(workers):
        if worker not in left:
            worker.kill()
        said = f"false master {number}: {worker.wait()}, {worker.stderr[:10]} ... {worker.stderr[-5:]}"
        assert worker not in left or worker.wait() == 3, said
        assert not worker.said("Traceback|internal error"), said
        assert most[worker] < 200 * MEGABYTE, number
    return left


def pretend(sock: socket.socket) -> None:
    """A master that does not know the key, and goes on as if the worker had let it in."""
    with connection.Connection(os.dup(sock.fileno())) as conn:
        for word in (b"#CHALLENGE#" + b"x" * 20, b"#WELCOME#", b"y" * 16):
            conn.send_bytes(word)
            conn.recv_bytes()
        conn.send(("#RETURN", None))
        is_closed(sock)


@pytest.mark.early
def test_a_worker_gives_up_a_master_that_talks_garbage_or_does_not_know_the_key(farm: Farm) -> None:
    garbage = [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        frame(b"x" * 16),
        frame(b"#CHALLENGE#{rot13}" + b"x" * 32),
        struct.pack("!i", 200),
        TERABYTE,
    ]

    def act(data: bytes, sock: socket.socket) -> None:
        sock.sendall(data)
        is_closed(sock)

    left = watch_workers(farm, [*[functools.partial(act, data) for data in garbage], pretend], PATIENCE)
    assert len(left) == len(garbage) + 1
    assert "key" in left[-1].stderr[-1]


def answer_with(farm: Farm, method: str, reply: bytes) -> Callable[[socket.socket], None]:
    """A false master that knows the key, and replies to this method in its own way."""
    return false_master(farm, lambda called, arguments: reply if called == method else good_answer(called))


def test_a_pickle_runs_no_code_in_a_worker(farm: Farm) -> None:
    """Whatever it is, and wherever it stands: a worker unpickles nothing."""
    pwned = farm.folder / "pwned"
    replies = [wrap + data for data in evil_pickles(pwned) for wrap in (b"", b"#RETURN text\n", b"#RETURN json\n")]
    evil = itertools.cycle([(method, data) for method in (WELCOME, JOIN, LEASE, REPORT) for data in replies])

    def act(sock: socket.socket) -> None:  # another pickle for each connection that a worker makes
        answer_with(farm, *next(evil))(sock)

    watch_workers(farm, [act] * 4, 4, wait=PATIENCE, connections=20)
    assert not pwned.exists()


def test_replies_of_the_wrong_shape_or_large_or_deep_do_not_crash_a_worker_nor_fill_its_memory(farm: Farm) -> None:
    bad_settings: list[Any] = [None, {"protocol": PROTOCOL}, {**SETTINGS, "run": [], "timeout": "x"}]
    values: dict[str, list[Any]] = {
        JOIN: [*bad_settings, {**SETTINGS, "protocol": float("inf")}],
        LEASE: [5, ["0 7"], "no id", "x 7", "\n", "0 7\n0 7"],
    }
    replies = [(method, answer(value)) for method in values for value in values[method]]
    replies += [(WELCOME, b"5"), (JOIN, answer(1, "#ODD")), (LEASE, b""), (REPORT, answer("x", "#ODD"))]
    replies += [(JOIN, b"#RETURN json\n{"), (LEASE, b"#RETURN"), (LEASE, b"\n" * 10), (LEASE, b"#RETURN text\n\xff")]
    deep = b"#RETURN json\n" + b"[" * (4 * MEGABYTE)
    many = b"#RETURN json\n[" + b"[]," * MEGABYTE + b"[]]"
    words = b"#RETURN text " + b"x " * (4 * MEGABYTE)
    replies += [(method, data) for method in (JOIN, LEASE) for data in (deep, many, words, b"RAW" + TERABYTE)]
    watch_workers(farm, [answer_with(farm, *reply) for reply in replies], 6)


# ---- fuzz ----------------------------------------------------------------------------------------------------------


CALLS: list[Any] = [
    (None, WELCOME, ("host/1",), {}),
    (TASKS, JOIN, (PROTOCOL,), {}),
    (TASKS, LEASE, (3, 0.0), {}),
    (TASKS, RELEASE, ([0, 1, 2],), {}),
    (RESULTS, REPORT, ("run", 0.5, f"0\n{GOOD}"), {}),
    (TASKS, "get", (False,), {}),
    (RESULTS, "put", ({"a": [1, 2.5, None, "x"]},), {}),
]


def random_string(dice: random.Random) -> bytes:
    """Random bytes: bare, framed, or a good message with some of its bytes changed."""
    data = dice.randbytes(dice.choice((1, 4, 20, 300, 5000)))
    name, method, arguments, _ = call = dice.choice(CALLS)
    in_words = " ".join(map(str, [name, method, *arguments[:-1]])) + f"\n{arguments[-1]}"  # as a worker says it
    message = bytearray(frame(dice.choice([in_words.encode(), pickle.dumps(call, dice.randrange(5))])))
    for _ in range(dice.randrange(1, 4)):
        message[dice.randrange(len(message))] = dice.randrange(256)
    return dice.choice([data, frame(data), frame(b"\x80\x04" + data + b"."), bytes(message)])


@pytest.mark.timeout(60 + STRINGS)
def test_random_strings_before_and_after_the_handshake_do_not_disturb_the_job(farm: Farm) -> None:
    """Before the handshake, as the first message after it, and to a connection that stays."""
    beside = Beside(farm, once=False)
    dice = random.Random(1)
    for n in range(STRINGS):
        with contextlib.suppress(OSError, EOFError, AuthenticationError):
            if n % 3 == 0:
                with dial(beside.port) as sock:
                    sock.sendall(random_string(dice))
                continue
            with connect(farm, beside.port) as conn:
                if n % 3 == 2:
                    conn.send((None, WELCOME, (f"host/{n % 7}",), {}))
                    conn.recv()
                os.write(conn.fileno(), random_string(dice))
                if conn.poll(0.001):
                    conn.recv_bytes()
        if n % 100 == 0:
            assert beside.master.is_running(), beside.master.stderr
            beside.put(1)
    assert beside.grown() < 32 * MEGABYTE
    beside.finish()
