"""Whatever a peer sends, with or without the key, no code runs, and the job beside it goes on.

    python tests/test_hostile.py --strings 10000

runs the fuzz with that many random strings, and prints what became of the master.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import pickle
import queue
import random
import re
import select
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError, connection
from pathlib import Path
from typing import Any, Callable

import psutil
import pytest
from conftest import Farm, Program
from test_hosts import begin_scenes
from test_losses import RESULTS, TASKS, Peer, answer, join_outcomes, receive_call

from task_master import PROTOCOL

FUNCTIONS = """
def double(n):
    return 2 * n
"""
MEGABYTE = 1 << 20


def peak_memory(pid: int) -> int:
    """The most bytes of memory that a process has had so far."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process(pid).memory_info().rss)


class Beside:
    """A job that goes on while its master is attacked."""

    def __init__(self, farm: Farm, *options: object) -> None:
        (farm.folder / "hostile.py").write_text(FUNCTIONS)
        self.farm = farm
        self.count = 0
        # no redelivery is a failure: a peer that holds the key may lease what it likes
        where = ("--tasks", "-", "--results", "results.jsonl", "--redeliveries", 100_000)
        self.master = farm.master(*where, *options, stdin=subprocess.PIPE)
        self.port = self.master.port()
        self.threads = self.count_threads()
        self.worker = farm.worker(self.master, "--function", "hostile:double")
        self.master.wait_line("connected")
        self.put(50)
        self.memory = peak_memory(self.master.pid)

    def put(self, count: int) -> None:
        """Give more tasks."""
        text = "".join(f"{n}\n" for n in range(self.count, self.count + count))
        self.master.process.stdin.write(text.encode())
        self.master.process.stdin.flush()
        self.count += count

    def count_threads(self) -> int:
        return int(psutil.Process(self.master.pid).num_threads())

    def grown(self) -> int:
        """Bytes that the master's memory has grown by, at its peak."""
        return peak_memory(self.master.pid) - self.memory

    def wait_threads(self, limit: int, patience: float = 20.0) -> int:
        """Block until the master has no more threads than `limit`; returns how many there were at most."""
        most, give_up_at = 0, time.monotonic() + patience
        while True:
            threads = self.count_threads()
            most = max(most, threads)
            if threads <= limit or time.monotonic() > give_up_at:
                assert threads <= limit
                return most
            self.pause(0.05)

    def pause(self, seconds: float) -> None:
        """Let time pass, unless the master ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"the master ended with {self.master.process.wait(seconds)}: {self.master.stderr}")

    def finish(self, once: bool = True) -> list[dict[str, Any]]:
        """End the job; every task is recorded, right and once. `once`: and was run once."""
        assert self.master.process.poll() is None, self.master.stderr
        self.put(50)
        self.master.process.stdin.close()
        assert self.master.wait(30) in ([0] if once else [0, 1])
        lines = (self.farm.folder / "results.jsonl").read_bytes().split(b"\n")
        assert lines.pop() == b""
        records = [parse_record(line) for line in lines]
        assert sorted(record["id"] for record in records) == list(range(self.count))
        assert all(record["task"] == record["id"] for record in records)
        if once:
            assert all(record["result"] == 2 * record["id"] and record["attempts"] == 1 for record in records)
        assert not any("Traceback" in line for line in self.master.stderr), self.master.stderr
        assert self.worker.wait() == 0, self.worker.stderr
        return records


def parse_record(line: bytes) -> dict[str, Any]:
    """A record; fails when it is not strict JSON, or when a member that is the master's to write comes twice."""

    def check(members: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in members if name in ("id", "task", "worker", "attempts")]
        assert len(names) == len(set(names)), line
        return dict(members)

    def refuse(name: str) -> Any:
        pytest.fail(f"{name} is not JSON: {line!r}")

    try:
        record: dict[str, Any] = json.loads(line.decode("utf-8"), object_pairs_hook=check, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        pytest.fail(f"not a record ({error}): {line[:300]!r} ... {line[-100:]!r}")
    assert set(record) - {"result", "error"} == {"id", "task", "seconds", "worker", "attempts"}, line[:300]
    assert ("result" in record) != ("error" in record)
    assert isinstance(record.get("error", {}), dict)
    return record


@pytest.fixture
def beside(farm: Farm) -> Iterator[Beside]:
    beside = Beside(farm)
    yield beside
    with contextlib.suppress(BrokenPipeError):
        beside.master.process.stdin.close()


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 20)


def frame(data: bytes) -> bytes:
    return struct.pack("!i", len(data)) + data


def is_closed(sock: socket.socket, timeout: float) -> bool:
    """Whether the other end closes the connection in time; what it sends is thrown away."""
    give_up_at = time.monotonic() + timeout
    while select.select([sock], [], [], max(0.0, give_up_at - time.monotonic()))[0]:
        try:
            if not sock.recv(1 << 16):
                return True
        except OSError:
            return True
    return False


# ---- what attackers are made of --------------------------------------------------------------------------------------


class FalseServer:
    """Accepts connections, and does to each what `act` says."""

    def __init__(self, act: Callable[[socket.socket], None]) -> None:
        self.act = act
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.served: queue.SimpleQueue[None] = queue.SimpleQueue()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        self.served.put(None)
        with contextlib.suppress(OSError, EOFError, AuthenticationError), sock:
            self.act(sock)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def start_workers(farm: Farm, acts: list[Callable[[socket.socket], None]]) -> list[tuple[Program, FalseServer]]:
    """A worker for each false master, all at the same time; they look for it for one second."""
    (farm.folder / "hostile.py").write_text(FUNCTIONS)
    pairs = []
    for act in acts:
        server = FalseServer(act)
        options = ("--port", server.port, "--processes", 1, "--wait", 1, "--function", "hostile:double")
        pairs.append((farm.run("task_worker.py", *options), server))
    return pairs


def check_workers(pairs: list[tuple[Program, FalseServer]], patience: float, may_stay: bool) -> None:
    """They leave with status 3 and one line, or still try to get on with it; they do not crash, nor fill the memory.

    Whether code has run is for the caller to see.
    """
    most: collections.Counter[int] = collections.Counter()
    give_up_at = time.monotonic() + patience
    for _, server in pairs:
        server.served.get(timeout=60)
    while (running := [worker for worker, _ in pairs if worker.process.poll() is None]) and time.monotonic() < give_up_at:
        for number, (worker, _) in enumerate(pairs):
            with contextlib.suppress(psutil.Error):
                most[number] = max(most[number], peak_memory(worker.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].process.wait(0.1)
    for number, (worker, server) in enumerate(pairs):
        server.close()
        stays = worker.process.poll() is None
        if stays:
            worker.kill()
        said = f"false master {number}: {worker.wait()}, {worker.stderr[:10]} ... {worker.stderr[-5:]}"
        assert worker.wait() == 3 or (stays and may_stay), said
        assert not any("Traceback" in line or "internal error" in line for line in worker.stderr), said
        assert most[number] < 200 * MEGABYTE, number


GARBAGE_OF_MASTERS = [
    b"",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    frame(b"x" * 16),
    frame(b"#CHALLENGE#{rot13}" + b"x" * 32),
    struct.pack("!i", 200),
    struct.pack("!iQ", -1, 1 << 40),
]


def say_and_hold(data: bytes) -> Callable[[socket.socket], None]:
    def act(sock: socket.socket) -> None:
        sock.sendall(data)
        is_closed(sock, 15)

    return act


class Patience:
    """What takes the 10 s of a handshake that does not come to its end; other tests go on meanwhile."""

    def __init__(self, folder: Path) -> None:
        for name in ("masters", "silence"):
            (folder / name).mkdir()
        self._farms = [Farm(folder / "masters"), Farm(folder / "silence")]
        self.workers = start_workers(self._farms[0], [say_and_hold(data) for data in GARBAGE_OF_MASTERS])
        self.beside = Beside(self._farms[1])
        self._pool = ThreadPoolExecutor(1)
        self.silence = self._pool.submit(self.be_silent, self.beside)

    def be_silent(self, beside: Beside) -> dict[str, float]:
        """Hundreds of connections that say nothing, and one that says it byte by byte; returns what came of it."""
        began_at = time.monotonic()
        silent = [dial(beside.port) for _ in range(700)]
        slow = dial(beside.port)
        late = Peer(beside.farm, beside.port)
        assert late.join(), "one that knows the key is let in"
        late.close()
        beside.wait_threads(450, 5)  # the oldest give way to the newest
        outcome = {"slow ended": 0.0, "all ended": float("inf")}
        for byte in frame(b"#CHALLENGE#" + b"x" * 80):
            with contextlib.suppress(OSError):
                slow.send(bytes([byte]))
            if is_closed(slow, 0.25):
                outcome["slow ended"] = time.monotonic() - began_at
                break
        if all(is_closed(sock, max(0.0, began_at + 25 - time.monotonic())) for sock in silent):
            outcome["all ended"] = time.monotonic() - began_at
        for sock in [slow, *silent]:
            sock.close()
        return outcome

    def close(self) -> None:
        self._pool.shutdown()
        for farm in self._farms:
            farm.close()


@pytest.fixture(scope="module", autouse=True)
def patience(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patience]:
    if any(item.path.name == "test_hosts.py" for item in request.session.items):
        begin_scenes(tmp_path_factory)  # they take a minute, and do not mind company
    patience = Patience(tmp_path_factory.mktemp("patience"))
    yield patience
    patience.beside.master.process.stdin.close()
    patience.close()


# ---- peers without the key -----------------------------------------------------------------------------------------

GARBAGE = [
    b"",
    b"\0",
    b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    bytes.fromhex("16030100b5010000b10303") + b"\x55" * 170,
    b"\n" * 100,
    b"\xff" * 1000,
    b"\0" * 100_000,
    frame(b""),
    frame(b"x" * 16),
    frame(b"x" * 255),
    frame(b"x" * 257),
    frame(b"#CHALLENGE#" + b"x" * 20),
    frame(b"#CHALLENGE#"),
    frame(b"#WELCOME#") * 3,
    frame(b"#FAILURE#"),
    frame(b"{md5}" + b"x" * 16),
    frame(b"{sha256}" + b"x" * 32),
    frame(b"{rot13}" + b"x" * 32),
    frame(b"x" * 16) + frame(b"#CHALLENGE#" + b"x" * 20) + frame(pickle.dumps((None, "shutdown", (), {}))),
    struct.pack("!i", 1 << 30),  # half a message
    struct.pack("!i", 0x7FFFFFFF),
    struct.pack("!iQ", -1, 1 << 40),  # a terabyte, as multiprocessing announces it
    struct.pack("!iQ", -1, 1 << 40) + b"x" * MEGABYTE,
]


def test_garbage_before_the_handshake_does_not_disturb_the_job(beside: Beside) -> None:
    for data in GARBAGE:
        with contextlib.suppress(OSError), dial(beside.port) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            assert is_closed(sock, 8), data[:50]
    assert beside.grown() < 16 * MEGABYTE
    beside.wait_threads(beside.threads + 2)
    beside.finish()


def test_wrong_keys_by_the_hundred_are_refused(beside: Beside) -> None:
    for n in range(300):
        with pytest.raises(AuthenticationError):
            connection.Client(("127.0.0.1", beside.port), authkey=b"wrong %d" % n)
    assert beside.grown() < 16 * MEGABYTE
    beside.wait_threads(beside.threads + 2)
    beside.finish()


def test_a_worker_with_a_wrong_key_leaves_with_status_3(farm: Farm) -> None:
    master = farm.master("1")
    worker = farm.run("task_worker.py", "--port", master.port(), env=farm.env(TASK_AUTHKEY="x" * 32))
    assert worker.wait() == 3
    assert "refused the key" in worker.stderr[-1]


# ---- peers with the key: pickles -----------------------------------------------------------------------------------


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def evil_pickles(path: Path) -> list[bytes]:
    """Pickles that run code where they can, or name what is not plain data."""
    name = str(path).encode()
    text = b"V" + name + b"\n"
    short = b"\x8c" + bytes([len(name)]) + name
    return [
        *[pickle.dumps(Evil(path), protocol) for protocol in range(6)],
        *[pickle.dumps((TASKS, "lease", (1, Evil(path)), {}), protocol) for protocol in range(6)],
        b"cos\nmkdir\n(" + text + b"tR.",
        b"(" + text + b"ios\nmkdir\n.",
        b"(cos\nmkdir\n" + text + b"o.",
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + short + b"\x85R.",
        b"\x80\x02cpathlib\nPath\n" + text + b"\x85\x81.",
        b"\x80\x04cpathlib\nPath\n" + text + b"\x85}\x92.",
        b"\x80\x04}\x8c\x01ax}b.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02\x83\x01\x00.",
        b"\x80\x02\x84\x01\x00\x00\x00.",
        b"Pabc\n.",
        b"\x80\x02K\x01Q.",
        b"\x80\x05\x97.",
        b"\x80\x05\x97\x98.",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"x.",
        b"\x80\x04\x8b" + struct.pack("<i", -5) + b"x.",
        b"\x80\x04\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"x.",
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a place in the memo for which the C unpickler would take gigabytes
        b"\x80\x04j\xff\xff\xff\x7f.",
        b"\x80\x04]\x94(h\x00h\x00e.",  # a list that holds itself
        b"\x80\xff.",
        b".",
        b"",
    ]


def deep_tuple(depth: int = 2_000_000) -> bytes:
    """A pickled tuple in a tuple in a tuple: to take its hash overflows the C stack."""
    return b")" + b"\x85" * depth


EVIL_SHAPES = {
    "as a message": lambda deep: b"\x80\x04" + deep + b".",
    "as a name": lambda deep: b"\x80\x04(" + deep + b"\x8c\x05lease)}t.",
    "as a method": lambda deep: b"\x80\x04(\x8c\x0eget_task_queue" + deep + b")}t.",
    "as an argument": lambda deep: b"\x80\x04(\x8c\x0eget_task_queue\x8c\x07release(" + deep + b"t}t.",
    "as a key": lambda deep: b"\x80\x04}" + deep + b"Ns.",
    "in a list of ids": lambda deep: b"\x80\x04(\x8c\x0eget_task_queue\x8c\x07release(](" + deep + b"et}t.",
}


def is_ended(conn: Any, timeout: float = 20.0) -> bool:
    """Whether the other end answers with anything but #RETURN, or closes the connection."""
    give_up_at = time.monotonic() + timeout
    while conn.poll(max(0.0, give_up_at - time.monotonic())):
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
        first = connection.Client(("127.0.0.1", beside.port), authkey=beside.farm.key.encode())
        second = Peer(beside.farm, beside.port)  # that one is past its first message
        for conn in (first, second.connection):
            conn.send_bytes(data)
            assert is_ended(conn), data
            conn.close()
        assert not pwned.exists(), data
    assert beside.grown() < 32 * MEGABYTE
    beside.wait_threads(beside.threads + 2)
    beside.finish()


def test_what_a_task_or_a_result_looks_like_is_never_unpickled(beside: Beside) -> None:
    """Not even when it comes as text or bytes in a place where an object is expected."""
    pwned = beside.farm.folder / "pwned"
    for data in evil_pickles(pwned):
        peer = Peer(beside.farm, beside.port)
        for value in (data, data.decode("latin-1")):
            for message in ((TASKS, "release", (value,)), (TASKS, value, ()), (RESULTS, "put", (value,))):
                if ask(peer, *message[:2], *message[2]) == "":
                    peer = Peer(beside.farm, beside.port)
        peer.close()
    assert not pwned.exists()
    beside.finish()


@pytest.mark.parametrize("shape", EVIL_SHAPES)
def test_data_nested_a_million_times_does_not_crash_the_master(beside: Beside, shape: str) -> None:
    peer = Peer(beside.farm, beside.port)
    peer.connection.send_bytes(EVIL_SHAPES[shape](deep_tuple()))
    assert is_ended(peer.connection)
    peer.close()
    beside.pause(0.1)
    beside.finish()


def test_a_message_of_a_million_objects_does_not_fill_the_memory(beside: Beside) -> None:
    size = 4 * MEGABYTE
    for filling in (b"]\x94", b"]", b")\x85", b"}"):
        peer = Peer(beside.farm, beside.port)
        peer.connection.send_bytes(b"\x80\x04(" + filling * (size // len(filling)) + b"t.")
        assert is_ended(peer.connection, 30), filling
        peer.close()
    assert beside.grown() < 128 * MEGABYTE
    beside.finish()


def test_a_message_that_announces_a_terabyte_takes_no_memory(beside: Beside) -> None:
    for head in (
        struct.pack("!iQ", -1, 1 << 40),
        struct.pack("!i", 0x7FFFFFFF),
        struct.pack("!i", -2),
        struct.pack("!i", 65 << 20),
    ):
        for make in (lambda: connection.Client(("127.0.0.1", beside.port), authkey=beside.farm.key.encode()),
                     lambda: Peer(beside.farm, beside.port).connection):  # fmt: skip
            conn = make()
            with contextlib.suppress(OSError):
                os.write(conn.fileno(), head + b"x" * 100)
            assert is_ended(conn)
            conn.close()
    waiting = Peer(beside.farm, beside.port)
    os.write(waiting.connection.fileno(), struct.pack("!i", 60 << 20))  # which is allowed, and does not come
    beside.pause(0.2)
    assert beside.grown() < 16 * MEGABYTE
    waiting.close()
    beside.finish()


# ---- peers with the key: calls -------------------------------------------------------------------------------------

FOREIGN_CALLS = [
    (None, "shutdown", ()),
    (None, "stop", ()),
    (None, "start", ()),
    (None, "serve_forever", ()),
    (None, "accepter", ()),
    (None, "handle_request", ()),
    (None, "serve_client", ()),
    (None, "debug_info", ()),
    (None, "number_of_objects", ()),
    (None, "_forget", ()),
    (None, "__init__", ()),
    (None, "__class__", ()),
    (None, "create", ()),
    (None, "create", ("list",)),
    (None, "create", ("get_queue",)),
    (None, "create", (None,)),
    (None, "create", ([],)),
    (None, "create", (TASKS, 1, 2)),
    (None, 5, ()),
    (None, None, ()),
    (None, [], ()),
    (None, "get_methods", ()),
    (None, "accept_connection", ()),
    (None, "accept_connection", ("a", "b")),
    (None, "incref", ()),
    (None, "decref", ("nothing",)),
]
NOT_EXPOSED = [
    "__class__", "__init__", "__getattribute__", "__reduce_ex__", "__str__", "__repr__", "__dict__", "_lease", "_master",
    "_ledger", "#GETVALUE", "close", "stop", "shutdown", "submit", "", "exposed", None, 5, [], {},
]  # fmt: skip


def test_calls_that_are_not_for_clients_are_refused(beside: Beside) -> None:
    for _, method, arguments in FOREIGN_CALLS:
        conn = connection.Client(("127.0.0.1", beside.port), authkey=beside.farm.key.encode())
        conn.send((None, method, arguments, {}))
        with contextlib.suppress(EOFError, OSError):
            kind, _ = conn.recv()
            assert kind != "#RETURN" or method in ("incref", "decref"), (method, arguments)
        conn.close()
    beside.wait_threads(beside.threads + 2)
    beside.finish()


def test_references_dropped_too_often_leave_the_queues_where_they_are(beside: Beside) -> None:
    for name in (TASKS, RESULTS) * 5:
        conn = connection.Client(("127.0.0.1", beside.port), authkey=beside.farm.key.encode())
        conn.send((None, "decref", (name,), {}))
        conn.recv()
        conn.close()
    beside.finish()


def test_methods_that_are_not_exposed_are_refused(beside: Beside) -> None:
    peer = Peer(beside.farm, beside.port)
    for name in (TASKS, RESULTS, "0", "", None, 0, "no such queue"):
        for method in NOT_EXPOSED:
            answer = ask(peer, name, method)
            assert answer != "#RETURN", (name, method)
            if not answer:
                peer.close()
                peer = Peer(beside.farm, beside.port)
    peer.close()
    beside.finish()


def test_messages_of_the_wrong_shape_are_refused(beside: Beside) -> None:
    shapes: list[Any] = [
        None, 5, "lease", b"", 1.5, True, [], (), {}, (1, 2, 3), (1, 2, 3, 4, 5), (TASKS, "qsize", 5, {}),
        (TASKS, "qsize", (), 5),
        (TASKS, "qsize", (), {"x": 1}), (TASKS, "qsize", (), {5: 1}), ([], "qsize", (), {}),
    ]  # fmt: skip
    for shape in shapes:
        for peer in (connection.Client(("127.0.0.1", beside.port), authkey=beside.farm.key.encode()),
                     Peer(beside.farm, beside.port).connection):  # fmt: skip
            peer.send(shape)
            assert is_ended(peer), shape
            peer.close()
    beside.finish()


# ---- peers with the key: arguments ---------------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, -1, 0, 2**70, 1.5, -1.5, 1e308, float("inf"), float("-inf"), float("nan"), "", "x", "0", "\ud800", "\0",
    "0 0", "0 0 1 -1 x", "0 " * 1000, b"", b"0", [], [[]], [None], [0, 0], ["0"], [-1], [2**70], [1e308], (), (0, 0), {}, {0: 0},
]  # fmt: skip
GOOD = '"result": 1, "seconds": 0.5'
BROKEN = [
    "",
    " ",
    "\n",
    '"result": ',
    '"result": hello, "seconds": 0.5',
    '"result": 1',
    '"result": 1, "seconds": ',
    '"result": 1, "seconds": "long"',
    '"result": 1, "seconds": NaN',
    '"result": NaN, "seconds": 0.5',
    '"result": Infinity, "seconds": 0.5',
    '"result": 1}, "seconds": 0.5',
    '"result": 1} {"id": 3, "task": 3, "seconds": 0.5',
    '"result": 1, "id": 7, "seconds": 0.5',
    '"result": 1, "task": 7, "seconds": 0.5',
    '"result": 1, "worker": "other", "seconds": 0.5',
    '"result": 1, "attempts": 99, "seconds": 0.5',
    '"result": 1, "result": 2, "seconds": 0.5',
    '"result": 1, "error": {}, "seconds": 0.5',
    '"result": 1, "more": 2, "seconds": 0.5',
    '"result": [1, "seconds": 0.5',
    '"result": "open, "seconds": 0.5',
    '"result": "\t", "seconds": 0.5',
    '"result": "\r", "seconds": 0.5',
    '"result": "\0", "seconds": 0.5',
    '"result": "\ud800", "seconds": 0.5',
    '"result": "\\ud800", "seconds": 0.5',
    '"result": "\u2028", "seconds": 0.5',
    '"result": ' + "[" * 100_000 + "]" * 100_000 + ', "seconds": 0.5',
    '"result": ' + "[" * 100_000 + ', "seconds": 0.5',
    '"result": "' + "x" * 2_000_000 + ', "seconds": 0.5',
    '"result": "' + "x" * 2_000_000 + '", "id": 7, "seconds": 0.5',
    '"result": ' + "9" * 10_000 + ', "seconds": 0.5',
    '"result": 1e999, "seconds": 1e999',
    '"error": ',
    '"error": 5, "seconds": 0.5',
    '"error": {}, "seconds": 0.5',
    '"error": {"type": 1, "message": 2, "traceback": 3}, "seconds": 0.5',
    '"error": {"type": "x"}, "seconds": 0.5',
    '"error": {"type": "x", "message": "y", "traceback": "z", "more": 1}, "seconds": 0.5',
    '"error": {"type": "x", "message": "\x1b[2J", "traceback": ""}, "seconds": 0.5',
    '"error": ' + "[" * 100_000 + "]" * 100_000 + ', "seconds": 0.5',
    '"neither": 1, "seconds": 0.5',
    "x" * 9 + "[" * 100_000,
    '"result": 1, "seconds": 00.5',
    '"result": 1, "seconds": 0.500000' + "0" * 100_000,
    '"result": ' + "[[], " * 5_000_000 + "[]" + "]" * 5_000_000 + ', "seconds": 0.5',
    '"result": "' + "x" * 5_000_000 + '", "id": 7, "task": 7, "seconds": 0.5',
    '"result": "' + "\\x" * 5_000_000 + '", "seconds": 0.5',
    '"result": [' + "[], " * 9_000_000 + '[]], "seconds": 0.5',
    "}",
    "{",
    ",",
    "null",
    "\ud800",
]
FAULT = '"error": {"type": "E", "message": "m", "traceback": ""}, "seconds": 0.5'


def ask(peer: Peer, queue_name: Any, method: Any, *arguments: object) -> str:
    """Call whatever it is; returns how the master answered, "" when it closed the connection instead."""
    try:
        peer.ask(queue_name, method, *arguments)
        if not peer.connection.poll(20):
            pytest.fail(f"no answer to {method}{arguments!r:.200}")
        data = peer.connection.recv_bytes()
    except (EOFError, OSError):
        return ""
    for kind in ("#RETURN", "#ERROR", "#TRACEBACK"):
        if kind.encode() in data[:40]:
            return kind
    return ""


class Attacker:
    """A peer that has the key; connects again when it is thrown out."""

    def __init__(self, beside: Beside) -> None:
        self.beside = beside
        self.connect()

    def connect(self) -> None:
        self.peer = Peer(self.beside.farm, self.beside.port, "evil/1")
        self.run_id = self.peer.join()

    def ask(self, queue_name: str, method: str, *arguments: object) -> None:
        if ask(self.peer, queue_name, method, *arguments) == "":
            self.peer.close()
            assert self.beside.master.process.poll() is None, (method, arguments)
            self.connect()

    def lease(self) -> int:
        """The id of a task that it holds; more are given when there is none."""
        while True:
            lease = self.peer.call(TASKS, "lease", 1, 0.0)
            if lease:
                return int(lease.split()[0])
            self.beside.put(5)


@pytest.fixture
def attacker(farm: Farm) -> Iterator[Attacker]:
    beside = Beside(farm, "--retries", 2)
    attacker = Attacker(beside)
    yield attacker
    attacker.peer.close()
    with contextlib.suppress(BrokenPipeError):
        beside.master.process.stdin.close()


def test_odd_arguments_to_every_method_lose_no_task(attacker: Attacker) -> None:
    methods = {TASKS: ("settings", "lease", "release", "beat", "get", "qsize"), RESULTS: ("report", "put")}
    for name, names in methods.items():
        for method in names:
            attacker.ask(name, method, *[None] * 5)
            if method != "get":  # which may wait for ever, as it should
                attacker.ask(name, method)
            for odd in ODD:
                if method == "get":
                    attacker.ask(name, method, False, odd)
                    continue
                attacker.ask(name, method, odd)
                if method == "lease":
                    attacker.ask(name, method, odd, 0.0)
                    attacker.ask(name, method, 1, min(odd, 0.1) if isinstance(odd, (int, float)) else odd)
                elif method == "report":
                    attacker.ask(name, method, attacker.run_id, 0.0, odd)
                    attacker.ask(name, method, odd, 0.0, f"{attacker.lease()}\n{GOOD}")
                    attacker.ask(name, method, attacker.run_id, odd, f"{attacker.lease()}\n{GOOD}")
                    attacker.ask(name, method, attacker.run_id, 0.0, f"{odd}\n{GOOD}")
                    attacker.ask(name, method, attacker.run_id, 0.0, f"{attacker.lease()} {attacker.lease()}\n{GOOD}")
    attacker.peer.close()
    attacker.beside.finish(once=False)


@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
def test_broken_outcomes_leave_every_line_of_the_results_a_record(attacker: Attacker, small: bool) -> None:
    for members in [members for members in BROKEN if (len(members) < 1000) == small]:
        task_id = attacker.lease()
        attacker.ask(RESULTS, "report", attacker.run_id, 0.0, f"{task_id}\n{members}")
        others = [attacker.lease() for _ in range(2)]
        attacker.ask(RESULTS, "report", attacker.run_id, 0.0, f"{others[0]} {others[1]}\n{GOOD}\n{members}")
    attacker.peer.close()
    attacker.beside.finish(once=False)


def test_several_outcomes_for_one_task_in_a_report_make_one_record(attacker: Attacker) -> None:
    for twice in ((GOOD, GOOD), (FAULT, GOOD), (GOOD, FAULT), (FAULT, FAULT), (FAULT,) * 5, (FAULT, GOOD, FAULT)):
        ids = [attacker.lease() for _ in range(3)]
        lines = [f"{task_id} {members}" for members in twice for task_id in ids]
        attacker.ask(RESULTS, "report", attacker.run_id, 0.0, join_outcomes(*lines))
    attacker.peer.close()
    attacker.beside.finish(once=False)


def test_a_report_of_a_million_outcomes_does_not_fill_the_memory(attacker: Attacker) -> None:
    attacker.ask(RESULTS, "report", attacker.run_id, 0.0, "0 " * MEGABYTE + "0" + "\n" * (MEGABYTE + 1))
    attacker.peer.close()
    assert attacker.beside.grown() < 64 * MEGABYTE
    attacker.beside.finish(once=False)


def test_a_task_released_twice_is_leased_once(farm: Farm) -> None:
    farm.write_tasks(list(range(10)))
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl")
    peer = Peer(farm, master.port())
    run_id = peer.join()
    ids = [int(line.split()[0]) for line in peer.call(TASKS, "lease", 3, 0.0).split("\n")]
    peer.release(ids + ids)
    peer.release(ids)
    assert peer.call(TASKS, "qsize") == 10
    leased = []
    while lease := peer.call(TASKS, "lease", 4, 0.0):
        leased += [int(line.split()[0]) for line in lease.split("\n")]
    assert sorted(leased) == list(range(10))
    peer.report(run_id, *[f"{n} {GOOD}" for n in leased])
    peer.close()
    assert master.wait() == 0
    assert sorted(record["id"] for record in farm.records()) == list(range(10))


def test_a_peer_releases_only_what_it_holds_itself(farm: Farm) -> None:
    master = farm.master("5", "6", "--results", "results.jsonl")
    first, second = Peer(farm, master.port(), "host/1"), Peer(farm, master.port(), "host/2")
    run_id = first.join()
    second.join()
    assert first.call(TASKS, "lease", 1, 20.0) == "0 5"
    second.release([0, 1])
    assert second.call(TASKS, "lease", 5, 0.0) == "1 6"
    first.report(run_id, f"0 {GOOD}", f"1 {GOOD}")
    first.close()
    second.close()
    assert master.wait() == 0


def test_clients_that_wait_for_a_task_and_go_away_leave_no_threads_behind(beside: Beside) -> None:
    threads = beside.count_threads()
    peers = [Peer(beside.farm, beside.port, f"plain{n}") for n in range(30)]
    for peer in peers:
        peer.ask(TASKS, "get")
    for peer in peers:
        peer.close()
    beside.wait_threads(threads + 2, 10)
    beside.finish()


def test_a_name_cannot_break_the_log_or_the_records(beside: Beside) -> None:
    for name in (
        "host/1\ntask_master: fake line",
        "\x1b[2Jhost/1",
        'host"/1',
        "\ud800/1",
        "x" * 100_000 + "/1",
        "",
        None,
        5,
        ["a/b"],
    ):
        conn = connection.Client(("127.0.0.1", beside.port), authkey=beside.farm.key.encode())
        conn.send((None, "accept_connection", (name,), {}))
        with contextlib.suppress(EOFError, OSError):
            conn.recv()
            conn.send((TASKS, "settings", ("1\ntask_master: fake line\x1b[2J" + "y" * 100_000,), {}))
            conn.recv()
        conn.close()
    beside.finish(once=False)
    assert not any(re.match("task_master: fake", line) or "\x1b" in line or len(line) > 1000 for line in beside.master.stderr)


# ---- false masters -------------------------------------------------------------------------------------------------


def answer_with(farm: Farm, replies: dict[str, bytes]) -> Callable[[socket.socket], None]:
    """A false master that knows the key; its reply to a method is in `replies`, or RAW bytes instead of one."""
    good = {"settings": {"protocol": PROTOCOL, "run": "r", "timeout": None}, "lease": "0 7"}

    def act(sock: socket.socket) -> None:
        conn = connection.Connection(os.dup(sock.fileno()))
        sock.settimeout(None)
        with conn:
            connection.deliver_challenge(conn, farm.key.encode())
            connection.answer_challenge(conn, farm.key.encode())
            while True:
                method, _ = receive_call(conn)
                if method not in replies:
                    conn.send_bytes(answer(good.get(method)))
                elif replies[method][:3] == b"RAW":
                    os.write(conn.fileno(), replies[method][3:])
                else:
                    conn.send_bytes(replies[method])

    return act


METHODS = ("accept_connection", "settings", "lease", "report")


def test_a_pickle_runs_no_code_in_a_worker(farm: Farm) -> None:
    """Whatever it is, and wherever it stands: a worker unpickles nothing."""
    pwned = farm.folder / "pwned"
    replies = [wrap + data for data in evil_pickles(pwned) for wrap in (b"", b"#RETURN text\n", b"#RETURN json\n")]
    evil = [(method, data) for method in METHODS for data in replies]
    numbers = itertools.count()

    def act(sock: socket.socket) -> None:  # another pickle for each connection that a worker makes
        method, data = evil[next(numbers) % len(evil)]
        with contextlib.suppress(OSError, EOFError):
            answer_with(farm, {method: data})(sock)

    check_workers(start_workers(farm, [act] * 4), 4, may_stay=True)
    assert next(numbers) > 10
    assert not pwned.exists()


def test_replies_of_the_wrong_shape_do_not_crash_a_worker(farm: Farm) -> None:
    values: dict[str, list[Any]] = {
        "settings": [
            None,
            {"protocol": PROTOCOL},
            {"protocol": PROTOCOL, "run": [], "timeout": "x"},
            {"protocol": float("inf"), "run": "r", "timeout": None},
        ],
        "lease": [5, ["0 7"], "no id", "x 7", "\n", "0 7\n0 7"],
    }
    replies = [(method, answer(value)) for method in values for value in values[method]]
    replies += [("accept_connection", b"5"), ("settings", answer(1, "#ODD")), ("lease", b""), ("report", answer("x", "#ODD"))]
    replies += [("settings", b"#RETURN json\n{"), ("lease", b"#RETURN"), ("lease", b"\n" * 10), ("lease", b"#RETURN text\n\xff")]
    acts = [answer_with(farm, {method: reply}) for method, reply in replies]
    check_workers(start_workers(farm, acts), 3, may_stay=True)


def test_large_and_deep_replies_do_not_crash_a_worker_nor_fill_its_memory(farm: Farm) -> None:
    deep = b"#RETURN json\n" + b"[" * (4 * MEGABYTE)
    many = b"#RETURN json\n[" + b"[]," * MEGABYTE + b"[]]"
    words = b"#RETURN text " + b"x " * (4 * MEGABYTE)
    terabyte = b"RAW" + struct.pack("!iQ", -1, 1 << 40)
    acts = [answer_with(farm, {method: data}) for method in ("settings", "lease") for data in (deep, many, words, terabyte)]
    check_workers(start_workers(farm, acts), 6, may_stay=True)


def test_a_master_that_does_not_know_the_key_is_given_up(farm: Farm) -> None:
    """It cannot prove that it knows it: the worker gives it nothing and takes nothing from it."""

    def act(sock: socket.socket) -> None:
        conn = connection.Connection(os.dup(sock.fileno()))
        sock.settimeout(None)
        with conn:
            conn.send_bytes(b"#CHALLENGE#" + b"x" * 20)
            conn.recv_bytes()
            conn.send_bytes(b"#WELCOME#")
            conn.recv_bytes()
            conn.send_bytes(b"y" * 16)
            conn.recv_bytes()
            conn.send(("#RETURN", None))
            is_closed(sock, 5)

    ((worker, server),) = start_workers(farm, [act])
    assert worker.wait() == 3
    assert "key" in worker.stderr[-1]
    server.close()


def receive_frame(sock: socket.socket) -> bytes:
    """The next message, or b"" when the connection ends."""
    with contextlib.suppress(OSError):
        head = sock.recv(4, socket.MSG_WAITALL)
        if len(head) == 4:
            return sock.recv(struct.unpack("!i", head)[0], socket.MSG_WAITALL)
    return b""


# ---- fuzz ----------------------------------------------------------------------------------------------------------


def random_string(dice: random.Random) -> bytes:
    """Random bytes: bare, framed, or a good message with some of its bytes changed."""
    data = dice.randbytes(dice.choice((1, 4, 20, 300, 5000)))
    kind = dice.randrange(4)
    if kind == 0:
        return data
    if kind == 1:
        return frame(data)
    if kind == 2:
        return frame(b"\x80\x04" + data + b".")
    calls: list[Any] = [
        (None, "accept_connection", ("host/1",), {}),
        (TASKS, "settings", (PROTOCOL,), {}),
        (TASKS, "lease", (3, 0.0), {}),
        (TASKS, "release", ([0, 1, 2],), {}),
        (RESULTS, "report", ("run", 0.5, f"0\n{GOOD}"), {}),
        (TASKS, "get", (False,), {}),
        (RESULTS, "put", ({"a": [1, 2.5, None, "x"]},), {}),
    ]
    name, method, arguments, _ = call = dice.choice(calls)
    in_words = " ".join(map(str, [name, method, *arguments[:-1]])) + f"\n{arguments[-1]}"  # as a worker says it
    message = bytearray(frame(dice.choice([in_words.encode(), pickle.dumps(call, dice.randrange(5))])))
    for _ in range(dice.randrange(1, 4)):
        message[dice.randrange(len(message))] = dice.randrange(256)
    return bytes(message)


def fuzz(beside: Beside, strings: int, seed: int) -> None:
    """Send random strings: before the handshake, as the first message after it, and to a connection that stays."""
    dice = random.Random(seed)
    key = beside.farm.key.encode()
    for n in range(strings):
        with contextlib.suppress(OSError, EOFError, AuthenticationError):
            if n % 3 == 0:
                with dial(beside.port) as sock:
                    sock.sendall(random_string(dice))
                continue
            conn = connection.Client(("127.0.0.1", beside.port), authkey=key)
            with conn:
                if n % 3 == 2:
                    conn.send((None, "accept_connection", (f"host/{n % 7}",), {}))
                    conn.recv()
                os.write(conn.fileno(), random_string(dice))
                if conn.poll(0.001):
                    conn.recv_bytes()
        if n % 100 == 0:
            assert beside.master.process.poll() is None, beside.master.stderr
            beside.put(1)


def test_random_strings_before_and_after_the_handshake_do_not_disturb_the_job(beside: Beside) -> None:
    fuzz(beside, 150, seed=1)
    assert beside.grown() < 32 * MEGABYTE
    beside.wait_threads(beside.threads + 2)
    beside.finish(once=False)


# ---- what took its time --------------------------------------------------------------------------------------------


def test_hundreds_of_silent_connections_and_a_slow_one_end_in_time(patience: Patience) -> None:
    outcome = patience.silence.result(40)
    assert 5 < outcome["slow ended"] < 20, "the whole handshake may take 10 s"
    assert outcome["all ended"] < 25
    patience.beside.wait_threads(patience.beside.threads + 2)
    assert patience.beside.grown() < 64 * MEGABYTE
    patience.beside.finish()


def test_a_worker_gives_up_a_master_that_talks_garbage(patience: Patience) -> None:
    check_workers(patience.workers, 30, may_stay=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="The long form of the fuzz.")
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        farm = Farm(Path(folder))
        try:
            beside = Beside(farm)
            began_at = time.monotonic()
            fuzz(beside, options.strings, options.seed)
            seconds = time.monotonic() - began_at
            grown, threads = beside.grown(), beside.count_threads()
            beside.wait_threads(beside.threads + 2)
            records = beside.finish(once=False)
        finally:
            farm.close()
    failed = sum("error" in record for record in records)
    print(
        f"{options.strings} strings in {seconds:.0f} s: memory grew by {grown / MEGABYTE:.1f} MB, {threads} threads then, "
        f"{beside.threads} before and after; {len(records)} tasks recorded once, {failed} of them failed"
    )


if __name__ == "__main__":
    main()
