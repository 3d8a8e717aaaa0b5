"""At most once, or recorded exactly once, whatever is killed, stopped or cut meanwhile; the seed decides what.

    ONCE_KILLS=200 ONCE_SEEDS=30 pytest tests/test_once.py

is the long form: so many kills of workers, and so many jobs in which everything happens.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from lab import Farm, Program, find_pythons, tls_python

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops processes"),
    pytest.mark.timeout(3600 if "ONCE_KILLS" in os.environ or "ONCE_SEEDS" in os.environ else 120),
]

KILLS = int(os.environ.get("ONCE_KILLS", "4"))
SEEDS = int(os.environ.get("ONCE_SEEDS", "1"))
FUNCTIONS = """
import os, time

def work(n):
    descriptor = os.open("started.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{n}\\n".encode())
    os.close(descriptor)
    time.sleep(n * 7919 % 10 / 500)  # 9 ms on average
    return 2 * n
"""


class Cable:
    """Passes bytes on to a port of this host; can be cut."""

    def __init__(self) -> None:
        self.target = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for sock in self._sockets:
            sock.close()


class Storm:
    """A job of one master and two workers, with all that happens to them."""

    def __init__(self, farm: Farm, cable: Cable, dice: random.Random, *options: object) -> None:
        self.farm, self.cable, self.dice, self.options = farm, cable, dice, options
        self.done: collections.Counter[str] = collections.Counter()
        (farm.folder / "once.py").write_text(FUNCTIONS)
        self.port = 0
        self.start_master()
        self.workers = [self.start_worker() for _ in range(2)]

    def start_master(self) -> None:
        resume = ["--resume"] if self.port else []
        options = ("--port", self.port, *self.farm.tls, "--results", "results.jsonl", *self.options, *resume)
        self.master = self.farm.run("task_master.py", *options, stdin=subprocess.PIPE)
        self.port = self.cable.target = self.master.port()

    def start_worker(self) -> Program:
        options = ("--port", self.cable.port, *self.farm.tls, "--processes", 2, "--function", "once:work")
        return self.farm.run("task_worker.py", *options)

    def pause(self, low: float, high: float) -> bool:
        """Let some time pass; whether the master still runs then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.master.process.wait(self.dice.uniform(low, high))
        return self.master.process.poll() is None

    def act(self, kinds: list[str]) -> None:
        """Do one thing of these kinds, and start anew what is gone by then."""
        kind = self.dice.choice(kinds)
        self.done[kind] += 1
        worker = self.dice.choice(self.workers)
        if kind == "cut":
            self.cable.cut()
        elif kind == "kill the master":
            self.master.kill()
            self.start_master()
        elif kind == "stop the master" or kind == "stop a worker":
            program = self.master if "master" in kind else worker
            program.signal(signal.SIGSTOP)
            self.pause(0.2, 1.5)
            program.signal(signal.SIGCONT)
        else:  # the worker, or any process below it
            with contextlib.suppress(psutil.NoSuchProcess):
                below = psutil.Process(worker.pid).children(recursive=True)
                self.dice.choice(below if kind == "kill a process" and below else [worker.process]).kill()
        for number, worker in enumerate(self.workers):
            if worker.process.poll() is not None and self.master.process.poll() is None:
                self.workers[number] = self.start_worker()

    def check(self, count: int, errors: set[str]) -> None:
        """Each task has one record, which is right, or a failure of a kind that is legal."""
        records = [json.loads(line) for line in (self.farm.folder / "results.jsonl").read_text().splitlines()]
        ids = [record["id"] for record in records]
        assert (ids if "--ordered" in self.options else sorted(ids)) == list(range(count)), self.done
        for record in records:
            assert record["task"] == record["id"]
            assert record["result"] == 2 * record["id"] if "result" in record else record["error"]["type"] in errors, record


@pytest.fixture
def cable() -> Iterator[Cable]:
    cable = Cable()
    yield cable
    cable.close()


def started(farm: Farm) -> list[int]:
    return [int(word) for word in (farm.folder / "started.log").read_text().split()]


def test_with_no_redeliveries_nothing_is_begun_twice(farm: Farm, cable: Cable) -> None:
    dice = random.Random(KILLS)
    storm = Storm(farm, cable, dice, "--tasks", "-", "--redeliveries", 0)
    count = 0
    while storm.done["kill a worker"] + storm.done["kill a process"] < KILLS:
        storm.master.process.stdin.write("".join(f"{n}\n" for n in range(count, count + 50)).encode())
        storm.master.process.stdin.flush()
        count += 50
        assert storm.pause(0.05, 0.6), storm.master.stderr
        storm.act(["kill a worker", "kill a worker", "kill a process", "cut", "stop a worker", "stop the master"])
    storm.master.process.stdin.close()
    assert storm.master.wait(600) in (0, 1)
    storm.check(count, {"WorkerLost", "ProcessDied"})
    assert len(started(farm)) == len(set(started(farm)))


@pytest.mark.parametrize("seed", range(1, SEEDS + 1))
def test_whatever_happens_each_task_is_recorded_once(tmp_path: Path, cable: Cable, seed: int) -> None:
    dice = random.Random(seed)
    farm = Farm(tmp_path, tls=seed % 2 == 1 and bool(find_pythons()) and bool(tls_python()))
    count = 500
    farm.write_tasks(list(range(count)))
    ordered = ["--ordered"] if dice.random() < 0.5 else []
    try:
        storm = Storm(farm, cable, dice, "--tasks", "tasks.jsonl", "--redeliveries", 1000, *ordered)
        kinds = ["kill a worker", "kill a process", "cut", "stop a worker", "stop the master", "kill the master"]
        for _ in range(dice.randrange(6, 14)):
            if storm.pause(0.05, 0.6):
                storm.act(kinds)
        assert storm.master.wait(100) in (0, 1)
        storm.check(count, {"ProcessDied"})
        assert set(started(farm)) == set(range(count))
    finally:
        for program in farm.programs:
            if program.process.stdin:
                with contextlib.suppress(BrokenPipeError):
                    program.process.stdin.close()
        farm.close()
