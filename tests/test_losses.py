"""A worker that is lost loses no task: it is run again within a bound, and its late outcome is taken once."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from multiprocessing import AuthenticationError, connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Farm, Program, children_of
from test_chaos import Chaos

from task_master import PROTOCOL

TASKS, RESULTS = "get_task_queue", "get_result_queue"

FUNCTIONS = """
import os, signal, time

def log(n):
    \"\"\"Note that task n was started, in one write.\"\"\"
    descriptor = os.open("started.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{n}\\n".encode())
    os.close(descriptor)

def work(n):
    time.sleep(0.002)
    return 2 * n

def count(n):
    log(n)
    time.sleep(n % 5 / 500)
    return 2 * n

def nap(seconds):
    log(seconds)
    time.sleep(seconds)
    return seconds

def kill_worker(n):
    if n == "guilty":
        log(n)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return n
"""


@pytest.fixture
def farm(farm: Farm) -> Iterator[Farm]:
    (farm.folder / "losses.py").write_text(FUNCTIONS)
    yield farm
    for program in farm.programs:
        if program.process.stdin:
            program.process.stdin.close()


def join_outcomes(*outcomes: str) -> str:
    """Outcomes, each as `ID MEMBERS`, as they are reported: a line of ids, then a line of members for each."""
    ids, _, members = zip(*[outcome.partition(" ") for outcome in outcomes])
    return "\n".join([" ".join(ids), *members])


def receive_call(peer: Any) -> tuple[str, list[str]]:
    """The method that a worker calls, and the arguments."""
    words, _, text = peer.recv_bytes().decode().partition("\n")
    _, method, *arguments = words.split(" ")
    return method, [*arguments, text]


def answer(value: Any, kind: str = "#RETURN") -> bytes:
    """What a master answers to a worker."""
    return f"{kind} text\n{value}".encode() if isinstance(value, str) else f"{kind} json\n{json.dumps(value)}".encode()


class Peer:
    """A slot driven by hand, with nothing but the standard library's client."""

    def __init__(self, farm: Farm, port: int, name: str = "host/1") -> None:
        self.connection = connection.Client(("127.0.0.1", port), authkey=farm.key.encode())
        self.connection.send((None, "accept_connection", (name,), {}))
        assert self.connection.recv() == ("#RETURN", None)

    def ask(self, queue: str, method: str, *args: object) -> None:
        """Send a call, and do not wait for what it returns."""
        self.connection.send((queue, method, args, {}))

    def call(self, queue: str, method: str, *args: object) -> Any:
        self.ask(queue, method, *args)
        kind, value = self.connection.recv()
        assert kind == "#RETURN", value
        return value

    def join(self) -> str:
        """Become a slot; returns the id of the master's run."""
        return str(self.call(TASKS, "settings", PROTOCOL)["run"])

    def report(self, run_id: str, *outcomes: str) -> None:
        """Report outcomes, each as `ID MEMBERS`."""
        self.call(RESULTS, "report", run_id, 0.0, join_outcomes(*outcomes))

    def release(self, task_ids: list[int]) -> None:
        self.call(TASKS, "release", " ".join(map(str, task_ids)))

    def close(self) -> None:
        self.connection.close()


class Relay:
    """Passes on what comes to its port, until it is told to cut all connections."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                with contextlib.suppress(OSError):
                    far = socket.create_connection(("127.0.0.1", self.target))
                    self._sockets += [near, far]
                    threading.Thread(target=self._pass_on, args=(near, far), daemon=True).start()
                    continue
                near.close()

    def _pass_on(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), near, far:
            while True:
                for source in select.select([near, far], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    (far if source is near else near).sendall(data)

    def cut(self) -> None:
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def close(self) -> None:
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def relay() -> Any:
    relays: list[Relay] = []

    def make(target: int) -> Relay:
        relays.append(Relay(target))
        return relays[-1]

    yield make
    for each in relays:
        each.close()


def started(farm: Farm) -> list[str]:
    """The tasks that the function was called with, in this order."""
    path = farm.folder / "started.log"
    return path.read_text().split() if path.exists() else []


def wait_started(farm: Farm, program: Program) -> None:
    """Block until the function has been called."""
    path, deadline = farm.folder / "started.log", 60.0
    while not path.exists() and deadline > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(0.02) if program.process.poll() is not None else program.process.wait(0.02)
        deadline -= 0.02
    assert path.exists(), program.stderr


def parse(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def check_once(records: list[dict[str, Any]], count: int) -> None:
    assert sorted(record["id"] for record in records) == list(range(count))


def test_a_worker_killed_in_the_middle_of_a_thousand_tasks_loses_none(farm: Farm) -> None:
    farm.write_tasks(list(range(1000)))
    master = farm.master("--tasks", "tasks.jsonl", "--results", "-")
    victim = farm.worker(master, "--processes", 2, "--function", "losses:work")
    master.wait_line('"id"', "stdout", count=200)
    victim.kill()
    farm.worker(master, "--processes", 2, "--function", "losses:work")
    assert master.wait() == 0
    records = parse(master.stdout)
    check_once(records, 1000)
    assert all(record["result"] == 2 * record["task"] for record in records)
    assert len({record["worker"] for record in records}) == 2
    assert "redelivered since" in master.wait_line("redelivered since").string


def test_the_redelivery_of_a_task_is_said_with_task_worker_attempt_and_reason(farm: Farm) -> None:
    master = farm.master("60", "--results", "results.jsonl")
    victim = farm.worker(master, "--function", "losses:nap")
    wait_started(farm, victim)
    victim.kill()
    line = master.wait_line("redeliver").string
    assert f"/{victim.pid}" in line and "lost" in line
    assert "task 0" in line and "attempt 1" in line


def test_with_no_redeliveries_no_task_is_started_twice_however_workers_are_killed(farm: Farm) -> None:
    chaos = Chaos(farm, 5, "losses:count", "--redeliveries", 0)
    status = chaos.run(800, pause=(0.05, 0.3))
    failed = chaos.check(800, status)
    assert chaos.kills["worker"]
    assert "WorkerLost" in {record["error"]["type"] for record in failed}
    ids = started(farm)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("redeliveries", [0, 2])
def test_a_task_whose_workers_are_lost_too_often_is_recorded_as_failed(farm: Farm, redeliveries: int) -> None:
    farm.write_tasks([*range(30), "guilty", *range(31, 60)])
    options = ("--redeliveries", redeliveries, "--workers", 1, "--function", "losses:kill_worker")
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", *options)
    assert master.wait() == 1
    records = farm.records()
    check_once(records, 60)
    (failed,) = [record for record in records if "error" in record]
    assert (failed["id"], failed["error"]["type"], failed["attempts"]) == (30, "WorkerLost", redeliveries + 1)
    assert started(farm) == ["guilty"] * (redeliveries + 1)


def test_a_worker_killed_while_idle_costs_no_task_its_only_chance(farm: Farm) -> None:
    master = farm.master("--tasks", "-", "--results", "-", "--redeliveries", 0, stdin=subprocess.PIPE)
    idle = farm.worker(master)
    master.wait_line("worker .* connected")
    idle.kill()
    put(master, "1\n")
    farm.worker(master)
    master.wait_line('"id": 0, .*"result": .*"attempts": 1}', "stdout")
    master.process.stdin.close()
    assert master.wait() == 0


def test_connections_that_end_while_they_wait_for_tasks_cost_none_its_only_chance(farm: Farm) -> None:
    master = farm.master("--tasks", "-", "--results", "-", "--redeliveries", 0, stdin=subprocess.PIPE)
    good = Peer(farm, master.port())
    run = good.join()
    for n in range(8):
        peers = [Peer(farm, master.port(), f"host/{n}") for _ in range(3)]
        for peer in peers:
            peer.join()
            peer.ask(TASKS, "lease", 1, 20.0)
        for peer in peers:
            peer.close()
        put(master, f"{n}\n")
        while not (lease := good.call(TASKS, "lease", 1, 20.0)):
            pass
        assert lease == f"{n} {n}"
        good.report(run, f'{n} "result": {n}, "seconds": 0.0')
    good.close()
    master.process.stdin.close()
    assert master.wait() == 0
    assert {record["attempts"] for record in parse(master.stdout)} == {1}


def put(master: Program, text: str) -> None:
    master.process.stdin.write(text.encode())
    master.process.stdin.flush()


def test_an_outcome_that_comes_late_within_the_same_run_is_recorded(farm: Farm) -> None:
    master = farm.master("7", "--results", "results.jsonl")
    first = Peer(farm, master.port())
    run = first.join()
    assert first.call(TASKS, "lease", 1, 20.0) == "0 7"
    first.close()
    master.wait_line("redelivered since")
    second = Peer(farm, master.port())
    second.join()
    second.report(run, '0 "result": 49, "seconds": 1.0')
    second.close()
    assert master.wait() == 0
    assert [record["result"] for record in farm.records()] == [49]


def test_the_first_outcome_wins_and_the_late_one_is_dropped(farm: Farm) -> None:
    master = farm.master("7", "8", "--results", "results.jsonl")
    first, second = Peer(farm, master.port(), "host/1"), Peer(farm, master.port(), "host/2")
    run = first.join()
    second.join()
    assert first.call(TASKS, "lease", 1, 20.0) == "0 7"
    second.report(run, '0 "result": "early", "seconds": 1.0')
    first.report(run, '0 "result": "late", "seconds": 1.0')
    first.report(run, '1 "result": "other", "seconds": 1.0')
    first.close()
    second.close()
    assert master.wait() == 0
    assert [record["result"] for record in farm.records()] == ["early", "other"]


def test_an_outcome_of_another_run_is_refused(farm: Farm) -> None:
    master = farm.master("7", "--results", "results.jsonl")
    peer = Peer(farm, master.port())
    peer.join()
    peer.report("another", '0 "result": "alien", "seconds": 1.0')
    assert peer.call(TASKS, "lease", 1, 20.0) == "0 7"
    peer.close()
    farm.worker(master)
    assert master.wait() == 0
    assert [record["result"] for record in farm.records()] == ["7 * 7 = 49"]


def test_a_worker_whose_connection_was_cut_reports_what_it_finished_meanwhile(farm: Farm, relay: Any) -> None:
    master = farm.master("0.3", "--results", "results.jsonl")
    cable = relay(master.port())
    worker = farm.run("task_worker.py", "--port", cable.port, "--processes", 1, "--function", "losses:nap")
    wait_started(farm, worker)
    cable.cut()
    master.wait_line("redelivered since")
    assert (master.wait(), worker.wait()) == (0, 0)
    assert started(farm) == ["0.3"], "it was not run again"
    assert [record["result"] for record in farm.records()] == [0.3]


def test_a_worker_that_meets_another_run_drops_what_it_finished(farm: Farm, relay: Any) -> None:
    farm.write_tasks([0.5])
    options = ("--tasks", "tasks.jsonl", "--results", "results.jsonl")
    master = farm.master(*options)
    cable = relay(master.port())
    worker = farm.run("task_worker.py", "--port", cable.port, "--processes", 1, "--function", "losses:nap")
    wait_started(farm, worker)
    master.kill()
    again = farm.master(*options, "--resume")
    cable.target = again.port()
    cable.cut()
    assert again.wait() == 0
    assert started(farm) == ["0.5", "0.5"]
    assert len(farm.records()) == 1


def test_connections_cut_again_and_again_lose_no_task_and_repeat_no_record(farm: Farm, relay: Any) -> None:
    farm.write_tasks(list(range(300)))
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl", "--redeliveries", 1000)
    cable = relay(master.port())
    worker = farm.run("task_worker.py", "--port", cable.port, "--processes", 2, "--function", "losses:work")
    for pause in (0.05, 0.1, 0.2, 0.4) * 8:
        with contextlib.suppress(subprocess.TimeoutExpired):
            master.process.wait(pause)
            break
        assert worker.process.poll() is None, worker.stderr
        cable.cut()
    assert master.wait() == 0
    check_once(farm.records(), 300)


class FalseMaster:
    """Replies to a worker's calls from a table; ends each connection at the call `last`, and notes its arguments."""

    def __init__(self, farm: Farm, replies: dict[str, Any], last: str) -> None:
        self._listener = connection.Listener(("127.0.0.1", 0), authkey=farm.key.encode())
        self._replies, self._last = replies, last
        self._calls: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        self.ended = 0  # connections
        self.port = int(self._listener.address[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError, AuthenticationError), self._listener.accept() as peer:
                method = ""
                while method != self._last:
                    method, arguments = receive_call(peer)
                    if method == self._last:
                        self.ended += 1
                        self._calls.put(arguments)
                    else:
                        peer.send_bytes(answer(self._replies.get(method)))

    def last_call(self, worker: Program) -> list[str]:
        """The arguments of the next call `last`; fails when the worker ends instead."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._calls.get(timeout=0.1)
            assert worker.process.poll() is None, worker.stderr


def test_an_outcome_whose_report_fails_is_reported_over_the_next_connection(farm: Farm) -> None:
    replies = {"settings": {"protocol": PROTOCOL, "run": "r", "timeout": None}, "lease": "0 7"}
    master = FalseMaster(farm, replies, "report")
    worker = farm.run("task_worker.py", "--port", master.port, "--processes", 1)
    reports = [master.last_call(worker) for _ in range(3)]
    assert [run for run, *_ in reports] == ["r"] * 3
    assert len({outcomes for *_, outcomes in reports}) == 1


def test_an_outcome_that_was_not_acknowledged_is_reported_again(farm: Farm) -> None:
    """An answer to another call that comes meanwhile is no acknowledgement."""
    reports: queue.SimpleQueue[str] = queue.SimpleQueue()
    listener = connection.Listener(("127.0.0.1", 0), authkey=farm.key.encode())

    def serve() -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                with contextlib.suppress(OSError, EOFError), listener.accept() as peer:
                    leases = ["0 7"]
                    while True:
                        method, arguments = receive_call(peer)
                        if method == "report":
                            reports.put(arguments[-1])
                            peer.send_bytes(answer("no", "#ERROR"))
                        elif method == "lease":
                            peer.send_bytes(answer(leases.pop() if leases else ""))
                        else:
                            peer.send_bytes(answer({"protocol": PROTOCOL, "run": "r", "timeout": None}))

    threading.Thread(target=serve, daemon=True).start()
    farm.run("task_worker.py", "--port", listener.address[1], "--processes", 1)
    first = reports.get(timeout=20)
    assert first.startswith('0\n"result"')
    for _ in range(3):  # whatever else it has done meanwhile
        assert first.split("\n")[1] in reports.get(timeout=20).split("\n")


def test_a_worker_that_is_thrown_out_again_and_again_takes_its_time(farm: Farm) -> None:
    """A thousand attempts a second would keep the master from whatever it is that ails it, and fill the log."""
    master = FalseMaster(farm, {}, "settings")
    worker = farm.run("task_worker.py", "--port", master.port, "--processes", 1)
    master.last_call(worker)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(1.5)
    assert master.ended < 50
    assert len(worker.stderr) < 50


def test_the_children_of_a_killed_worker_end_though_a_task_runs(farm: Farm) -> None:
    master = farm.master("1000", "--results", "results.jsonl")
    worker = farm.worker(master, "--function", "losses:nap")
    wait_started(farm, worker)
    children = [psutil.Process(pid) for pid in children_of(worker.pid)]
    worker.kill()
    assert children and psutil.wait_procs(children, 10)[1] == []


def test_the_tasks_of_a_worker_that_left_a_full_queue_go_to_the_back(farm: Farm) -> None:
    farm.write_tasks(list(range(5)))
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl")
    first, second = Peer(farm, master.port(), "host/1"), Peer(farm, master.port(), "host/2")
    run = first.join()
    second.join()
    assert first.call(TASKS, "lease", 1, 20.0) == "0 0"
    first.close()
    master.wait_line("redelivered since")
    leased = []
    while len(leased) < 5:
        leased += [int(line.split()[0]) for line in second.call(TASKS, "lease", 2, 0.0).split("\n")]
    assert leased == [1, 2, 3, 4, 0]
    second.report(run, *[f'{n} "result": {n}, "seconds": 0.0' for n in leased])
    second.close()
    assert master.wait() == 0


def test_tasks_that_were_lost_once_are_leased_singly(farm: Farm) -> None:
    farm.write_tasks(list(range(40)))
    master = farm.master("--tasks", "tasks.jsonl", "--results", "results.jsonl")
    peer = Peer(farm, master.port())
    peer.call(TASKS, "settings", PROTOCOL)
    assert len(peer.call(TASKS, "lease", 8, 0.0).split("\n")) == 8
    peer.close()
    master.wait_line("redelivered since")
    peer = Peer(farm, master.port())
    run = peer.join()
    sizes = []
    while lease := peer.call(TASKS, "lease", 100, 0.0):
        sizes.append(len(lease.split("\n")))
        ids = [line.split()[0] for line in lease.split("\n")]
        peer.report(run, *[f'{n} "result": {n}, "seconds": 0.0' for n in ids])
    assert sizes[-8:] == [1] * 8
    assert sum(sizes) == 40
    peer.close()
    assert master.wait() == 0


def test_a_child_killed_while_it_starts_does_not_end_its_worker(farm: Farm) -> None:
    (farm.folder / "slow.py").write_text(
        "import os, select\nprint('importing', os.getpid(), flush=True)\n"
        "select.select([], [], [], 0 if os.path.exists('go') else 60)\ndef same(n):\n    return n\n"
    )
    master = farm.master("1", "2", "--results", "results.jsonl")
    worker = farm.worker(master, "--function", "slow:same")
    child = int(worker.wait_line(r"importing (\d+)", "stdout").group(1))
    Path(farm.folder / "go").touch()
    os.kill(child, signal.SIGKILL)
    worker.wait_line("worker exit", "stdout")
    assert master.wait() == 0
    check_once(farm.records(), 2)
