"""What one peer can hold of the master's memory, threads and tasks is bounded, even if it has the key."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from multiprocessing import connection
from pathlib import Path

import psutil
import pytest
from lab import PATIENCE, ROOT, Farm, Program, tls_python

from task_master import PROTOCOL

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="looks into /proc")

# How a worker talks: a line of words, and a text.
JOIN = f"get_task_queue join {PROTOCOL}\n{{}}"
LEASE = "get_task_queue lease {limit} 0.0\n"
RELEASE = "get_task_queue release\n{ids}"
REPORT = "get_result_queue report {run} 0.0\n{id}\n{outcome}"
OUTCOME = '"result": {result}, "started_at": 1.500, "seconds": 0.500000'

MEGABYTE = 1 << 20
MEMORY_LIMIT = 500 * MEGABYTE
FUNCTIONS = """
import os, sys, time

def double(n):
    return 2 * n

def large(n):
    return "x" * 5_000_000

def flood(task):
    if task == "flood":
        for _ in range(200):
            sys.stdout.write("x" * (1 << 20))
        sys.stdout.flush()
    while task == "wait" and not os.path.exists("go"):
        time.sleep(0.01)
    return task
"""


@pytest.fixture(scope="module", autouse=True)
def many_files() -> None:
    """As many open files for ourselves as there may be: the tests hold a thousand connections."""
    import resource  # not on every system

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@pytest.fixture
def farm(farm: Farm) -> Farm:
    farm.write("bounds.py", FUNCTIONS)
    return farm


def peak_memory(pid: int) -> int:
    (line,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(line) * 1024


class Peer:
    """A worker's connection, driven by hand."""

    def __init__(self, farm: Farm, port: int, name: str = "host/1") -> None:
        self.connection = connection.Client(("127.0.0.1", port), authkey=farm.key.encode())
        self.call(f"server accept_connection\n{name}")
        self.run_id = re.search(r'"run": "([^"]*)"', self.call(JOIN)).group(1)

    def call(self, message: str) -> str:
        """What is returned, as text; "" when the master refuses it, or has closed the connection."""
        try:
            self.connection.send_bytes(message.encode())
            head, _, text = self.connection.recv_bytes().decode().partition("\n")
        except (EOFError, OSError):
            return ""
        return text if head.startswith("#RETURN") else ""

    def lease(self, limit: int) -> list[str]:
        """The ids of the tasks that it gets."""
        return [line.split()[0] for line in self.call(LEASE.format(limit=limit)).splitlines()]

    def begin_message(self, size: int, missing: int = MEGABYTE) -> None:
        """Send a message but for its end, as far as it is read."""
        data = b"x" * MEGABYTE
        with contextlib.suppress(OSError):
            os.write(self.connection.fileno(), struct.pack("!i", size))
            for _ in range((size - missing) // MEGABYTE):
                view = memoryview(data)
                while view:
                    view = view[os.write(self.connection.fileno(), view) :]

    def hang_up(self) -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)  # the connection stays, since a thread may still be sending there


def start_job(farm: Farm, *options: object) -> Program:
    where = ("--tasks", "-", "--results", "results.jsonl", "--redeliveries", 1000)
    return farm.master(*where, *options, stdin=subprocess.PIPE)


def wait_records(farm: Farm, master: Program, count: int) -> None:
    path, give_up_at = farm.folder / "results.jsonl", time.monotonic() + PATIENCE
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < give_up_at and master.process.poll() is None, master.stderr
        with contextlib.suppress(subprocess.TimeoutExpired):
            master.process.wait(0.05)


def recorded_ids(farm: Farm) -> list[int]:
    with (farm.folder / "results.jsonl").open("rb") as file:
        return sorted(int(re.match(rb'\{"id": (\d+)', line).group(1)) for line in file)


# ---- a peer that has the key, and the memory -------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_four_attacks_at_once_leave_the_master_small_and_the_others_served(farm: Farm) -> None:
    master = start_job(farm)
    worker = farm.worker(master, "--function", "bounds:double")
    master.put("".join(f"{n}\n" for n in range(100)))
    wait_records(farm, master, 100)
    peers = [Peer(farm, master.port(), f"evil/{n}") for n in range(24)]
    master.put("".join(f"{n}\n" for n in range(100, 1000)))
    while not (ids := peers[0].lease(1)):
        pass
    report = REPORT.format(run=peers[0].run_id, id=ids[0], outcome=OUTCOME.format(result="[" + "{}," * 8_000_000 + "{}]"))
    attacks = [threading.Thread(target=peer.begin_message, args=(60 * MEGABYTE,), daemon=True) for peer in peers[4:]]
    attacks.append(threading.Thread(target=peers[0].call, args=(report,), daemon=True))
    attacks.append(threading.Thread(target=peers[1].call, args=(RELEASE.format(ids="5 " * 7_000_000),), daemon=True))
    for attack in attacks:
        attack.start()
    other = Peer(farm, master.port(), "good/1")
    for n in range(20):  # the others are served meanwhile, and the job goes on
        assert set(other.lease(1)) <= {str(n) for n in range(1000 + 10 * n)}
        master.put("".join(f"{n}\n" for n in range(1000 + 10 * n, 1010 + 10 * n)))
    other.hang_up()
    wait_records(farm, master, 1100)
    for attack in attacks[-2:]:
        attack.join(PATIENCE)
    peak = peak_memory(master.pid)
    for peer in peers:
        peer.hang_up()
    for attack in attacks:
        attack.join(PATIENCE)
    master.end_input()
    assert master.wait(120) in (0, 1)  # 1: what the attacker has reported may count as a failure
    assert worker.wait() == 0
    assert recorded_ids(farm) == list(range(1200))
    assert peak < MEMORY_LIMIT, peak // MEGABYTE


@pytest.mark.timeout(300)
def test_one_connection_cannot_lease_all_that_is_to_be_done(farm: Farm) -> None:
    count = 500_000
    (farm.folder / "tasks.txt").write_text("".join(f"{n}\n" for n in range(count)))
    master = farm.master("--tasks", "tasks.txt", "--results", "results.jsonl")
    greedy, leased, idle = Peer(farm, master.port(), "evil/1"), 0, 0
    while idle < 20 and leased < count:
        got = len(greedy.lease(100_000))
        leased, idle = leased + got, 0 if got else idle + 1
        if not got:
            with contextlib.suppress(subprocess.TimeoutExpired):
                master.process.wait(0.1)
    assert leased < count
    assert peak_memory(master.pid) < MEMORY_LIMIT
    other = Peer(farm, master.port(), "good/1")
    give_up_at = time.monotonic() + PATIENCE
    while not other.lease(1):
        assert time.monotonic() < give_up_at, "nothing is left for others"


def test_a_large_message_that_does_not_come_to_its_end_does_not_stop_another(farm: Farm) -> None:
    master = start_job(farm)
    evil = Peer(farm, master.port(), "evil/1")
    sender = threading.Thread(target=evil.begin_message, args=(60 * MEGABYTE,), daemon=True)
    sender.start()
    worker = farm.worker(master, "--function", "bounds:large")
    master.put("1\n2\n")
    wait_records(farm, master, 2)
    evil.hang_up()
    sender.join(PATIENCE)
    master.end_input()
    assert (master.wait(), worker.wait()) == (0, 0)


# ---- silent peers at a door with TLS ---------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "half a hello"])
def test_silent_connections_do_not_use_up_a_master_with_tls(farm: Farm, said: bytes) -> None:
    limits = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))"
    code = f"{limits}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    options = ("--tls", "--port", 0, "--results", "results.jsonl", "--tasks", "-")
    master = farm.run("-c", code, ROOT / "task_master.py", *options, python=tls_python(), stdin=subprocess.PIPE)
    silent = []
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", master.port()), 20))
            with contextlib.suppress(OSError):
                sock.sendall(said)
            silent.append(sock)
        where = ("--port", master.port(), "--tls", "--processes", 1, "--function", "bounds:double")
        worker = farm.run("task_worker.py", *where, python=tls_python())
        master.put("".join(f"{n}\n" for n in range(50)))
        master.end_input()
        assert (master.wait(), worker.wait()) == (0, 0), master.stderr
    assert recorded_ids(farm) == list(range(50))
    assert not any("Traceback" in line for line in master.stderr)


# ---- no assert guards anything ---------------------------------------------------------------------------------------

FOREIGN = "shutdown stop serve_forever accepter debug_info number_of_objects __init__ __class__ create get_methods".split()


@pytest.mark.parametrize("flags", [(), ("-O",), ("-OO",)], ids=lambda flags: "".join(flags) or "plain")
def test_functions_that_are_not_for_clients_are_refused_without_asserts_too(farm: Farm, flags: tuple[str, ...]) -> None:
    options = ("--port", 0, "--tasks", "-", "--results", "results.jsonl")
    command = [sys.executable, *flags, str(ROOT / "task_master.py"), *map(str, options)]
    master = Program(command, farm.folder, farm.env(), stdin=subprocess.PIPE)
    farm.programs.append(master)
    for name in FOREIGN:
        for message in (f"server {name}\n".encode(), pickle.dumps((None, name, (), {}))):
            with connection.Client(("127.0.0.1", master.port()), authkey=farm.key.encode()) as peer:
                peer.send_bytes(message)
                with contextlib.suppress(EOFError, OSError):
                    assert peer.poll(PATIENCE) and b"#RETURN" not in peer.recv_bytes()
    assert master.process.poll() is None
    command = [sys.executable, *flags, str(ROOT / "task_worker.py"), "--port", str(master.port()), "--processes", "1"]
    worker = Program(command, farm.folder, farm.env())
    farm.programs.append(worker)
    master.put("3\n")
    master.end_input()
    assert (master.wait(), worker.wait()) == (0, 0)
    assert farm.records()[0]["result"] == "3 * 3 = 9"


@pytest.mark.parametrize("program", ["task_master.py", "task_worker.py"])
@pytest.mark.parametrize("flag", ["-O", "-OO"])
def test_help_needs_neither_asserts_nor_docstrings(farm: Farm, program: str, flag: str) -> None:
    help_ = farm.run(flag, ROOT / program, "--help")
    assert help_.wait() == 0
    assert "--authkey-file" in "\n".join(help_.stdout)


# ---- a plain client that stops, and a task that prints without an end ------------------------------------------------

CLIENT = """
import os, signal, sys
from multiprocessing.managers import BaseManager

class QueueManager(BaseManager):
    pass

QueueManager.register("get_task_queue")
manager = QueueManager(address=("127.0.0.1", int(sys.argv[1])), authkey=os.environ["TASK_AUTHKEY"].encode())
manager.connect()
tasks = manager.get_task_queue()
print("holds", tasks.get(), flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_the_time_limit_holds_for_a_plain_client_that_has_stopped(farm: Farm) -> None:
    (farm.folder / "client.py").write_text(CLIENT)
    master = farm.master("7", "--results", "results.jsonl", "--timeout", 2, "--retries", 1)
    client = farm.run("client.py", master.port())
    client.wait_line("holds 7", "stdout")
    worker = farm.worker(master, "--function", "bounds:double")
    assert (master.wait(), worker.wait()) == (0, 0)
    (record,) = farm.records()
    assert (record["result"], record["attempts"]) == (14, 2)
    client.signal(signal.SIGKILL)


def test_a_task_that_prints_without_a_line_end_does_not_fill_the_memory(farm: Farm) -> None:
    """Its output comes through the master when that is on a terminal."""
    import pty  # not on every system

    ours, theirs = pty.openpty()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            if select.select([ours], [], [], 0.1)[0]:
                os.read(ours, 1 << 20)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    code = f"import os, sys; os.dup2({theirs}, 2); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    options = ("--port", 0, "--workers", 1, "--function", "bounds:flood", "--results", "results.jsonl", '"flood"', '"wait"')
    master = farm.run("-c", code, ROOT / "task_master.py", *options, pass_fds=[theirs])
    wait_records(farm, master, 1)
    processes = [psutil.Process(master.pid), *psutil.Process(master.pid).children(recursive=True)]
    peaks = {" ".join(process.cmdline()): peak_memory(process.pid) // MEGABYTE for process in processes}
    (farm.folder / "go").touch()
    assert master.wait() == 0
    stop.set()
    reader.join()
    for descriptor in (ours, theirs):
        os.close(descriptor)
    assert max(peaks.values()) < 100, peaks
